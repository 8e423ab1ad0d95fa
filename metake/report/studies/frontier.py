"""Editors whose step η is scaled: efficacy and generalization against specificity, a curve per variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _require, _soft
from metake.report.style import FALLBACK

COLORS = (*FALLBACK[0], "#519449", "#c70a2c", "#64666c")
SHORT = (0, (5, 2))  # the line of a training that is shorter than another one in the drawing
SCORES = ("efficacy", "generalization", "specificity")
LINES = {"network": "-", "step": "-.", "living": "--", "nothing": ":"}  # what learns
MARKS = {"kl": "o", "norm": "D", "none": "^"}  # the penalty


def frontier_curves(
    records: pd.DataFrame, variants: Sequence[str] | None = None, level: float = 80.0, model: str | None = None,
    name: str = "frontier"
) -> Figure:
    """Efficacy (left) and generalization (right) against specificity, a curve per variant as its step η grows: from the
    lower right, where nothing is written, to the left. Higher is better at equal specificity; the dotted line is where
    the page compares. A large mark: the step as it was trained.

    records: `step_more`'s; variants: which of them, by label, in order; default all.
    """
    _require(records, "variant", "steps", "penalty", "learns", "batches", "factor", *SCORES)
    parts, own = ["variant", "steps", "penalty", "learns", "batches"], records
    if variants is not None:
        own = records[records.variant.isin(list(variants))]
        _require(own, "variant")
    means = (100 * own.groupby([*parts, "factor"], sort=False)[list(SCORES)].mean()).reset_index()
    order = [v for v in (variants or means.variant.unique()) if v in set(means.variant)]
    means.attrs = {k: v for k, v in records.attrs.items() if k in ("label", "provenance")}
    told = "; ".join(
        f"{v}: from {own.specificity.max():.0f} % specificity with {own.efficacy.iloc[0]:.0f} % efficacy to "
        f"{own.specificity.min():.0f} % with {own.efficacy.iloc[-1]:.0f} %"
        for v in order
        for own in [means[means.variant == v].sort_values("factor")]
    )
    alt = f"Efficacy and generalization against specificity as the step grows. {told}."
    summary = means[means.factor.isin([0.7, 1.0, 1.5])][["variant", "factor", *SCORES]]
    most = means.batches[means.learns == "network"].max()
    looks = {v: _look(means[means.variant == v].iloc[0], k, most) for k, v in enumerate(order)}
    return Figure(
        lambda axes: _draw(axes, means, looks, level), means, name, alt, model, summary,
        (8.6, 3.5 + 0.22 * ((len(order) + 1) // 2)), 1, ncols=2, sharex=True, sharey=True
    )


def _look(row: pd.Series, place: int, most: int) -> dict[str, Any]:
    """Line and mark say what learns, whether for long, and by which penalty; the color tells curves apart."""
    line = SHORT if row.learns == "network" and row.batches < most else LINES[row.learns]
    return {"color": COLORS[place % len(COLORS)], "linestyle": line, "marker": MARKS[row.penalty]}


def _draw(axes: Any, means: pd.DataFrame, looks: dict[str, dict[str, Any]], level: float) -> None:
    for here, score in zip(axes[0], SCORES[:2], strict=True):
        here.axvline(level, color=_soft(0.5), linestyle=(0, (1, 2)), linewidth=1.4, zorder=1)
        for variant, look in looks.items():
            own = means[means.variant == variant].sort_values("factor")
            filled = {"markerfacecolor": look["color"] if look["linestyle"] == "-" else "none"}
            here.plot(own.specificity, own[score], markersize=4, linewidth=1.6, label=variant, **look, **filled)
            usual = own[own.factor == 1.0]
            here.plot(usual.specificity, usual[score], **look | {"linestyle": ""}, markersize=9, **filled)
        here.set(xlabel="specificity, %", title=f"{score}, %", xlim=(0, 103), ylim=(-3, 103))
    _legend_below(axes, 2, handlelength=3)
