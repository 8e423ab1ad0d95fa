"""The paper's claims side by side: a small panel for each, a mark for each reading of MetaKE."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.style import style

APART = 0.24  # of a row: how far the marks of two readings lie apart


def claim_panels(numbers: pd.DataFrame, model: str | None = None, name: str = "does_metake_hold") -> Figure:
    """A panel per claim, a row per comparison, a mark with its 95 % interval per reading; the line is what would be no
    difference. Filled: the interval lies to one side of it.

    numbers: as `experiments.studies.claims.numbers` returns them (claim, unit, bound, least, method, what, difference,
    low, high, verdict); without a bound there is no line.
    """
    _require(numbers, "claim", "unit", "bound", "least", "method", "what", "difference", "low", "high", "verdict")
    parts = [own for _, own in numbers.groupby("claim", sort=False)]
    methods = list(dict.fromkeys(numbers.method))  # as the page tells them
    rows = [own.what.nunique() for own in parts]

    def draw(axes: Any) -> None:
        for here, own in zip(axes[:, 0], parts, strict=True):
            _panel(here, own, methods)
        marks = [mpl.lines.Line2D([], [], linestyle="", **_look(method, True), label=style(method).name)
                 for method in methods]  # fmt: skip
        axes[0, 0].figure.legend(handles=marks, loc="outside lower left", ncols=1, handletextpad=0.4)

    verdicts = numbers.groupby(["claim", "method"], sort=False).verdict.first().items()
    told = "; ".join(f"{claim}, {style(method).name}: {verdict}" for (claim, method), verdict in verdicts)
    alt = f"What each reading of MetaKE does about each claim of the paper, with 95 % intervals. {told}."
    size = (5.6, 0.3 + 0.2 * len(methods) + sum(0.62 + 0.24 * n for n in rows))
    return Figure(
        draw, numbers, name, alt, model, _text(numbers), size, nrows=len(parts),
        gridspec_kw={"height_ratios": [n + 0.3 for n in rows]}
    )


def _look(method: str, sure: bool) -> dict[str, Any]:
    look = style(method)
    return {
        "marker": look.marker, "markersize": 6.5, "color": look.color, "markeredgewidth": 1.2,
        "markerfacecolor": look.color if sure else "none", "markeredgecolor": look.color
    }


def _panel(axes: Any, own: pd.DataFrame, methods: list[str]) -> None:
    names, bound = list(own.what.unique()), own.bound.iloc[0]
    if bound == bound:
        axes.axvline(bound, color=_soft(0.8), linewidth=1, zorder=1)
    for row in own.itertuples():
        place = names.index(row.what) + APART * (methods.index(row.method) - (len(methods) - 1) / 2)
        sure = not (row.low <= bound <= row.high)
        axes.plot([row.low, row.high], [place, place], color=style(row.method).color, linewidth=1.8, zorder=2)
        axes.plot(row.difference, place, linestyle="", zorder=3, **_look(row.method, sure))
    axes.set(ylim=(len(names) - 0.45, -0.55), yticks=range(len(names)), yticklabels=names)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    axes.margins(x=0.08)
    if bound == bound:  # a thousandth of a point must not look large
        axes.update_datalim([(bound - own.least.iloc[0], 0), (bound + own.least.iloc[0], 0)])
        axes.autoscale_view(scaley=False)
    axes.annotate(
        f"{own.claim.iloc[0]}, {own.unit.iloc[0]}", (0.01, 1), (0, 5), ("figure fraction", "axes fraction"),
        "offset points", fontsize=10, fontweight="bold"
    )


def _text(numbers: pd.DataFrame) -> pd.DataFrame:
    """A row a claim and reading: how many of its intervals lie to which side, and the verdict."""
    rows = []
    for (claim, method), own in numbers.groupby(["claim", "method"], sort=False):
        rows.append(
            {
                "claim": claim, "method": method, "compared": len(own), "above": int((own.low > own.bound).sum()),
                "below": int((own.high < own.bound).sum()), "verdict": own.verdict.iloc[0]
            }
        )
    return pd.DataFrame(rows)
