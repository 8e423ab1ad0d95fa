"""The figures of the book. Each draws records, those that `metake.experiments` returns or `recorded` reads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns

from metake.report.figure import INK, Figure
from metake.report.shown import texts
from metake.report.style import in_order, style
from metake.support.errors import ParameterError

STAGES = ("targets", "refinement", "keys", "solve")


def _require(records: pd.DataFrame, *columns: str) -> None:
    if missing := [c for c in columns if c not in records]:
        raise ParameterError(
            f"these records have no column {', '.join(missing)}; found {', '.join(map(str, records.columns))}"
        )
    if records.empty:
        raise ParameterError("there are no records to draw")


def _soft(alpha: float = 0.7) -> tuple[float, float, float, float]:
    """The ink, paler; also where a drawing's own settings are not in force yet."""
    return mpl.colors.to_rgba(INK["light"], alpha)


def _note(axes: Any, text: str, x: float, y: float) -> None:
    """A number at the end of a bar."""
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)


def _legend_below(axes: Any, columns: int, **look: Any) -> None:
    """The legend of the first panel, which stands for all, under the drawing."""
    first = axes[0, 0]
    first.figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=columns, **look)


def _log_axis(axis: Any) -> None:
    """Powers of ten, and 2 and 5 between if there are few of them, written as numbers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=9))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter("")


def attenuation_curve(
    records: pd.DataFrame, spectra: pd.DataFrame | None = None, model: str | None = None, name: str = "attenuation"
) -> Figure:
    """Share of each planned residual that is written, against its association γ, on the curve γ/(1+γ);
    beside it the spectrum of B.

    records: method, gamma, and `measured` (else beta); rows without γ are passed over. spectra: method, index,
    eigenvalue.
    """
    share = "measured" if "measured" in records else "beta"
    _require(records, "method", "gamma", share)
    single = records[records.gamma > 0]
    methods, spectrum = in_order(single.method), spectra is not None and not spectra.empty

    def draw(axes: Any) -> None:
        left = axes[0, 0]
        low, high = min(single.gamma.min() / 3, 0.01), max(single.gamma.max() * 3, 10)
        gammas = [low * (high / low) ** (i / 200) for i in range(201)]
        left.plot(
            gammas, [g / (1 + g) for g in gammas], color=_soft(0.25), linewidth=6, solid_capstyle="round", zorder=1,
            label="γ/(1+γ)"
        )
        for method in methods:
            own, look = single[single.method == method], style(method)
            left.scatter(
                own.gamma, own[share], color=look.color, marker=look.marker, s=30, alpha=0.8, linewidth=0, zorder=3,
                label=look.name
            )
        left.set(
            xscale="log", xlim=(low, high), ylim=(-0.03, 1.03), xlabel="association γ", ylabel="realized share β",
            title="One request alone"
        )
        _log_axis(left.xaxis)
        left.legend(loc="upper left", handletextpad=0.5)
        if spectrum:
            _draw_spectrum(axes[0, 1], spectra)

    off = (single[share] - single.gamma / (1 + single.gamma)).abs().max()
    alt = f"""Realized share β against association γ of {len(single)} requests under
        {" and ".join(style(m).name for m in methods)}; γ from {single.gamma.min():.2g} to
        {single.gamma.max():.2g}. The largest distance to the curve γ over one plus γ is
        {"below 1e-9" if off < 1e-9 else f"{off:.2g}"}."""
    if not spectrum:
        return Figure(draw, records, name, alt, model, _spread(single, share), (6.2, 3.6), ncols=1)
    alt += (
        f" Second panel: the sorted eigenvalues of B of the whole batch, from {spectra.eigenvalue.min():.2g} "
        f"to {spectra.eigenvalue.max():.2g}."
    )
    data = pd.concat([records.assign(kind="single"), spectra.assign(kind="eigenvalue")], ignore_index=True)
    data.attrs = records.attrs
    summary = pd.concat([_spread(single, share), _spread(spectra, "eigenvalue")], ignore_index=True)
    return Figure(draw, data, name, alt, model, summary, (8.4, 3.6), ncols=2, width_ratios=(3, 2))


def _draw_spectrum(axes: Any, spectra: pd.DataFrame) -> None:
    for method in in_order(spectra.method):
        own, look = spectra[spectra.method == method].sort_values("index"), style(method)
        axes.plot(
            own["index"], own.eigenvalue, color=look.color, marker=look.marker, markersize=4, linestyle=look.line,
            linewidth=1.2, label=look.name
        )
    axes.set(ylim=(-0.03, 1.03), xlabel="index, sorted", ylabel="eigenvalue of B", title="The batch together")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))


def _spread(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Distribution of γ and of a quantity per method, for a figure's text."""
    rows = []
    for method in in_order(records.method):
        for column in (c for c in ("gamma", quantity) if c in records):
            values = records.loc[records.method == method, column]
            rows.append(
                {
                    "method": method, "quantity": column, "n": len(values), "min": values.min(),
                    "median": values.median(), "max": values.max()
                }
            )
    return pd.DataFrame(rows)


def dispersion(records: pd.DataFrame, model: str | None = None, name: str = "association_dispersion") -> Figure:
    """Distribution of γ over requests, per data set and metric: density, requests, and the span from P5 to P95.

    records: dataset, method, gamma; one row per request. At most 300 points per row are drawn, evenly by rank;
    all count.
    """
    _require(records, "dataset", "method", "gamma")
    if records.gamma.min() <= 0:
        raise ParameterError(
            f"an association must be positive to be drawn on a logarithmic axis; found {records.gamma.min():g}"
        )
    groups = {
        (dataset, method): own.gamma.sort_values()
        for dataset in records.dataset.unique()
        for method in in_order(records.method)
        if len(own := records[(records.dataset == dataset) & (records.method == method)])
    }
    summary = _percentiles(groups)
    spans = "; ".join(
        f"{d}, {style(m).name}: {p5:.3g} to {p95:.3g}, ratio {r:.3g}"
        for d, m, _, p5, _, p95, r in summary.itertuples(index=False)
    )
    alt = (
        f"Distributions of the association γ on a logarithmic axis, {len(records)} requests in all. 5th to 95th "
        f"percentile – {spans}."
    )
    size = (7.4, 1.0 + 0.95 * len(groups))
    return Figure(lambda axes: _draw_clouds(axes, groups, summary), records, name, alt, model, summary, size)


def _percentiles(groups: Mapping[tuple[str, str], pd.Series]) -> pd.DataFrame:
    found = pd.DataFrame(
        [
            {
                "dataset": d, "method": m, "n": len(g), "P5": g.quantile(0.05), "median": g.median(),
                "P95": g.quantile(0.95)
            }
            for (d, m), g in groups.items()
        ]
    )
    return found.assign(**{"P95/P5": found.P95 / found.P5})


def _draw_clouds(axes: Any, groups: Mapping[tuple[str, str], pd.Series], summary: pd.DataFrame) -> None:
    labels = [f"{d}\n{m}" for d, m in zip(texts(summary.dataset, 0), texts(summary.method, 0), strict=True)]
    axes.set_xscale("log")
    for row, ((_, method), gamma) in enumerate(groups.items()):
        _draw_cloud(axes, row, labels, gamma, style(method).color, summary.iloc[row])
    axes.set(xlabel="association γ of a request", ylabel="", ylim=(len(groups) - 0.3, -0.5))
    axes.set(yticks=range(len(groups)), yticklabels=labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _log_axis(axes.xaxis)


def _draw_cloud(axes: Any, row: int, labels: list[str], gamma: pd.Series, color: str, span: pd.Series) -> None:
    base = row + 0.32  # the density stands on it, the requests lie below
    frame = pd.DataFrame({"gamma": gamma, "row": labels[row]})
    half = {"split": True, "inner": None, "cut": 0, "linewidth": 0, "density_norm": "width", "width": 0.64}
    sns.violinplot(frame, x="gamma", y="row", order=labels, color=color, saturation=1, alpha=0.45, ax=axes, **half)
    points = gamma.iloc[:: -(-len(gamma) // 300)]
    axes.scatter(
        points, [base + 0.08 + 0.17 * (i * 0.618034 % 1) for i in range(len(points))], s=8, color=color, alpha=0.6,
        linewidth=0
    )
    axes.plot(
        [span.P5, span.P95], [base, base], color=_soft(1), linewidth=1.6, marker="|", markersize=9, markeredgewidth=1.6
    )
    axes.plot(span["median"], base, color=_soft(1), marker="o", markersize=5.5)
    axes.annotate(
        f"P95/P5 = {span['P95/P5']:.3g}", (gamma.iloc[-1], base), xytext=(7, 5), textcoords="offset points",
        fontsize=9.5, fontweight="bold"
    )


def before_after(
    records: pd.DataFrame, method: str = "metake", model: str | None = None, name: str = "quickstart"
) -> Figure:
    """Probability of answers before and after an edit: a pair of bars per probe.

    records: prompt, answer, before, after; optionally probe, which groups them.
    """
    _require(records, "prompt", "answer", "before", "after")
    labels = [textwrap.fill(f"{r['prompt']} … {r['answer']}", 34) for r in records.to_dict("records")]
    if "probe" in records:
        labels = [f"{label}\n({probe})" for label, probe in zip(labels, records.probe, strict=True)]
    color = style(method).color

    def draw(axes: Any) -> None:
        for values, shift, own, label in (
            (records.before, -0.19, style("pre-edit").color, "before the edit"), (records.after, 0.19, color, "after")
        ):
            places = [i + shift for i in range(len(records))]
            axes.barh(places, values, height=0.34, color=own, label=label)
            for value, place in zip(values, places, strict=True):
                _note(axes, f"{value:.3f}" if value >= 0.0005 else "< 0.001", value, place)
        axes.set(xlim=(0, 1.12), xticks=(0, 0.25, 0.5, 0.75, 1), xlabel="probability of the answer")
        axes.set(ylim=(len(records) - 0.4, -0.6), yticks=range(len(records)), yticklabels=labels)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3)

    pairs = "; ".join(
        f"{p} … {a}: {b:.3f} before, {c:.3f} after"
        for p, a, b, c in records[["prompt", "answer", "before", "after"]].itertuples(index=False)
    )
    summary = records[[c for c in ("probe", "prompt", "answer", "before", "after", "restored") if c in records]].round(
        3
    )
    return Figure(
        draw, records, name, f"Probability of answers before and after an edit. {pairs}.", model, summary,
        (7.4, 0.9 + 0.62 * len(records))
    )


def stage_bars(
    records: pd.DataFrame, model: str | None = None, name: str = "run_time", stages: Sequence[str] = STAGES
) -> Figure:
    """Seconds of one edit by stage, a panel each, per method: the accelerated path, and below it the literal one.

    records: method, stage, path, seconds_per_edit; logarithmic axes that begin at a tenth of the least value.
    """
    _require(records, "method", "stage", "path", "seconds_per_edit")
    methods, paths = in_order(records.method), list(dict.fromkeys(records.path))
    stages = [s for s in stages if s in set(records.stage)]
    drawn = records[records.stage.isin(stages)]
    found = drawn.set_index(["stage", "path", "method"]).seconds_per_edit

    def draw(axes: Any) -> None:
        for panel, stage in zip(axes[0], stages, strict=True):
            for (i, method), (j, path) in (
                (m, p) for m in enumerate(methods) for p in enumerate(paths) if (stage, p[1], m[1]) in found.index
            ):
                value, place = found[stage, path, method], i + 0.38 * j - 0.19 * (len(paths) - 1)
                panel.barh(place, value, height=0.34, color=style(method).color, alpha=0.4 if j else 1)
                _note(panel, f"{value:.2g}", value, place)
            low, high = found[stage].min() / 10, found[stage].max() * 8
            panel.set(
                title=stage, xscale="log", xlim=(low, high), ylim=(len(methods) - 0.4, -0.6),
                yticks=range(len(methods)), yticklabels=[style(m).name for m in methods]
            )
            panel.grid(False, axis="y")
            panel.tick_params(axis="y", length=0)
        axes[0, 0].set_xlabel(
            "seconds an edit" + (f": {paths[0]}, below it {paths[1]}" if len(paths) > 1 else ""), loc="left"
        )

    summary = (
        drawn.pivot_table("seconds_per_edit", ["stage", "method"], "path", sort=False)
        .reindex(columns=paths)
        .reset_index()
        .rename_axis(columns=None)
    )
    told = "; ".join(f"{s}, {style(m).name}, {p}: {v:.2g}" for (s, p, m), v in found.items())
    return Figure(
        draw, records, name, f"Seconds of one edit by stage, method and path. {told}.", model, summary,
        (9.6, 1.0 + 0.62 * len(methods)), ncols=len(stages), sharey=True
    )
