"""Metrics along a stream of edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _require, _soft
from metake.report.shown import SHOWN
from metake.report.style import in_order, style

SHARES = ("efficacy", "generalization", "specificity")
ROWS = {
    "in force": "all edits still in force", "first batch": "the first batch only",
    "latest batch": "the latest batch only"
}


def stream_curves(
    records: pd.DataFrame, groups: Sequence[str] = ("in force", "first batch"), model: str | None = None,
    name: str = "long_streams"
) -> Figure:
    """Metrics against the number of edits made, a line per method, a column per metric, a row per group of facts asked.

    records: method, edits, group, and the metrics as shares; "pre-edit" is drawn as a level.
    From the dotted upright line on, facts that were edited before are edited again, if attrs tell how many there are
    ("distinct").
    """
    _require(records, "method", "edits", "group", *SHARES)
    found = _means(records)
    settings = records.attrs.get("settings") or records.attrs.get("provenance") or {}
    end, turn = records.edits.max(), settings.get("distinct", records.edits.max())
    methods = [m for m in in_order(records.method) if m != "pre-edit"]
    last = found[(found.edits == end) & (found.group == groups[0])].set_index("method")
    told = "; ".join(
        f"{SHOWN['method'](m)}: " + ", ".join(f"{metric} {last[metric][m]:.1f}" for metric in SHARES)
        for m in methods
        if m in last.index
    )
    alt = (
        f"Efficacy, generalization and specificity in percent against the number of edits, up to {end}. After the "
        f"last, over {ROWS.get(groups[0], groups[0])} – {told}."
    )
    summary = found[found.group == groups[0]].drop(columns="group")
    keep = sorted(summary.edits.unique())
    summary = summary[summary.edits.isin({keep[0], keep[len(keep) // 2], keep[-1]})]  # first, middle and last point
    size, panels = (8.6, 0.9 + 2.15 * len(groups)), {"nrows": len(groups), "ncols": len(SHARES)}
    return Figure(
        lambda axes: _draw(axes, found, groups, methods, turn), found, name, alt, model, summary, size, 1, **panels,
        sharex=True, sharey=True
    )


def _draw(axes: Any, found: pd.DataFrame, groups: Sequence[str], methods: list[str], turn: int) -> None:
    """turn: from how many edits on facts are edited again."""
    end = found.edits.max()
    for i, group in enumerate(groups):
        for j, metric in enumerate(SHARES):
            here = axes[i, j]
            if turn < end:
                here.axvline(turn, color=_soft(0.5), linestyle=":", linewidth=1.2)
            _draw_lines(here, found[found.group == group], metric, methods)
            here.set(ylim=(-3, 103), xlim=(0, 1.04 * end), yticks=(0, 25, 50, 75, 100))
            here.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True, steps=(1, 2, 5, 10)))
            here.set_title("" if i else f"{metric}, %")
        axes[i, 0].set_ylabel(ROWS.get(group, group), fontweight="bold", labelpad=8)
    again = ", dotted: from here on facts are edited again" if turn < end else ""
    axes[-1, 1].set_xlabel("edits made so far" + again)
    _legend_below(axes, min(5, len(methods) + 1))


def _draw_lines(axes: Any, found: pd.DataFrame, metric: str, methods: list[str]) -> None:
    for k, method in enumerate(methods):  # later ones slimmer, so that equal curves show one inside the other
        own, look, slim = found[found.method == method], style(method), k / len(methods)
        looks = {"color": look.color, "marker": look.marker, "linestyle": look.line, "label": look.name}
        axes.plot(own.edits, own[metric], markersize=7 - 2.5 * slim, linewidth=2.4 - 1.2 * slim, **looks)
    looks = {"color": style("pre-edit").color, "linestyle": (0, (1, 2)), "linewidth": 1.6}
    for level in found[found.method == "pre-edit"][metric]:
        axes.axhline(level, label="before any edit", **looks)


def _means(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per method, point and group: the mean over facts, of those that have a probe for it."""
    found = (100 * records.groupby(["method", "edits", "group"], sort=False)[list(SHARES)].mean()).reset_index()
    found.attrs = {k: v for k, v in records.attrs.items() if k in ("label", "provenance", "settings")}
    return found
