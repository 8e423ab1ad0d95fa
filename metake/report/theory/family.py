"""The family's methods beside their published forms: how far apart the two are, and how much of it is rounding."""

from __future__ import annotations

from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.style import in_order, style

LEAST = 1e-18  # where an exact agreement is drawn
RING = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5, "linestyle": ""}
DISC = {"marker": "o", "markersize": 5, "markeredgewidth": 0, "linestyle": ""}


def agreement(
    records: pd.DataFrame, searched: pd.DataFrame | None = None, model: str | None = None, name: str = "one_formula"
) -> Figure:
    """Relative differences of two forms of one update: a row per method, a dot per instance, larger for larger d.

    Left: the difference itself; right: in units of its rounding. records: method, form, dim, error, ratio; searched:
    stage, method, ratio; the ends of a search for the largest ratio are drawn as rings.
    """
    _require(records, "method", "form", "dim", "error", "ratio")
    methods = in_order(records.method)
    ends = searched[searched.stage == "end"] if searched is not None else records[:0]
    summary = _explained(records, methods)

    def draw(axes: Any) -> None:
        _draw_agreement(axes, records, ends, methods)

    told = "; ".join(
        f"{style(r.method).name}: {r.comparisons} comparisons, {'all' if r[4] else 'not all'} explained by rounding"
        for r in summary.itertuples()
    )
    alt = "Relative difference of the library's update from the published one on random instances, per method, on "
    alt += f"logarithmic axes; right the same in units of its rounding. {told}."
    data = records
    if len(ends):
        found = "stays within" if (ends.ratio < 1).all() else "exceeds"
        alt += f" A directed search for the largest difference {found} rounding in {len(ends)} solves."
        data = pd.concat([records.assign(kind="random"), ends.assign(kind="searched")], ignore_index=True)
    data.attrs = records.attrs
    return Figure(draw, data, name, alt, model, summary, (7.6, 1.5 + 0.33 * len(methods)), ncols=2, sharey=True)


def _explained(records: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    rows = []
    for method in methods:
        own = records[records.method == method]
        row = {"method": method, "forms": own.form.nunique(), "comparisons": len(own)}
        rows.append(row | {"all explained by rounding": bool((own.ratio < 1).all())})
    return pd.DataFrame(rows)


def _draw_agreement(axes: Any, records: pd.DataFrame, ends: pd.DataFrame, methods: list[str]) -> None:
    dims = sorted(records.dim.unique())
    for panel, quantity in zip(axes[0], ("error", "ratio"), strict=True):
        for row, method in enumerate(methods):
            _cloud(panel, row, records[records.method == method], quantity, dims)
        panel.set(
            xscale="log", ylim=(len(methods) - 0.4, -0.6), yticks=range(len(methods)),
            yticklabels=[style(m).name for m in methods]
        )
        panel.grid(False, axis="y")
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    left, right = axes[0]
    left.set(title="Difference of the two forms", xlabel="‖ours − published‖ / ‖published‖")
    right.set(title="… in units of its rounding", xlabel="difference / rounding")
    right.axvline(1, color=_soft(0.8), linewidth=1.2, linestyle="--")
    right.annotate("limit", (1, -0.5), (-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8.5)
    for end in ends.itertuples():
        label = "found by the search" if end.Index == ends.index[0] else ""
        place = max(end.ratio, LEAST), methods.index(end.method)
        right.plot(*place, color=_soft(1), zorder=4, label=label, **RING)
    for dim in dims:
        left.scatter([], [], s=_size(dim, dims), color=_soft(0.6), linewidth=0, label=f"d = {dim}")
    handles = [h for panel in axes[0] for h in panel.get_legend_handles_labels()[0]]
    left.figure.legend(
        handles, [h.get_label() for h in handles], loc="outside lower center", ncols=4, columnspacing=1.4,
        handletextpad=0.3
    )


def _size(dim: int, dims: list[int]) -> float:
    return 7 + 26 * dims.index(dim) / max(1, len(dims) - 1)


def _cloud(axes: Any, row: int, own: pd.DataFrame, quantity: str, dims: list[int]) -> None:
    """One method's instances, spread over its row so that all are seen, each at one place for all its forms."""
    look = style(own.method.iloc[0])
    spread = [row + 0.62 * (i * 0.618034 % 1) - 0.31 for i in range(len(own))]
    sizes = [_size(d, dims) for d in own.dim]  # an image within the drawing: there are hundreds of marks
    axes.scatter(
        own[quantity].clip(lower=LEAST), spread, s=sizes, color=look.color, marker=look.marker, alpha=0.55, linewidth=0,
        zorder=3, rasterized=True
    )


def option_effects(scores: pd.DataFrame, model: str | None = None, name: str = "published_differences") -> Figure:
    """What an option changes, a panel per metric: a hollow mark for the default, a full one for the option.

    scores: as `experiments.differences.beside` returns them (method, metric, default, option, low, high;
    percent and points).
    A bold number, the difference in points: its interval excludes zero.
    """
    _require(scores, "method", "metric", "default", "option", "difference", "low", "high")
    methods, metrics = in_order(scores.method), list(scores.metric.unique())
    clear = (scores.low > 0) | (scores.high < 0)

    def draw(axes: Any) -> None:
        for panel, metric in zip(axes[0], metrics, strict=True):
            for row in scores[scores.metric == metric].itertuples():
                place, look = methods.index(row.method), style(row.method)
                panel.plot(
                    [row.default, row.option], [place, place], color=look.color, linewidth=2.2, alpha=0.5, zorder=2
                )
                panel.plot(row.default, place, color=look.color, **RING, zorder=3)
                panel.plot(row.option, place, color=look.color, **DISC, zorder=3)
                text = f"{row.difference:+.1f}".replace("-", "−") if round(row.difference, 1) else "0.0"
                weight = {"fontweight": "bold" if clear[row.Index] else "normal"}
                panel.annotate(
                    text, (1, place), (33, 0), ("axes fraction", "data"), "offset points", ha="right", va="center",
                    fontsize=9, **weight
                )
            panel.set(
                xlim=(-6, 106), xticks=(0, 50, 100), title=f"{metric.capitalize()}, %", ylim=(len(methods) - 0.4, -0.6)
            )
            panel.set(yticks=range(len(methods)), yticklabels=[style(m).name for m in methods])
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
        for label, mark in (("default", RING), ("option", DISC)):
            axes[0, 0].plot([], [], color=_soft(0.9), label=label, **mark)
        axes[0, 0].figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2, handletextpad=0.2
        )

    told = "; ".join(
        f"{style(r.method).name}, {r.metric}: {r.default:.1f} and {r.option:.1f}" for r in scores.itertuples()
    )
    alt = f"Percent of cases with the default and with the option, per metric. {told}. The interval of the difference "
    alt += f"excludes zero in {int(clear.sum())} of {len(scores)} cases."
    return Figure(
        draw, scores, name, alt, model, digits=1, size=(8.2, 1.1 + 0.36 * len(methods)), ncols=len(metrics), sharey=True
    )
