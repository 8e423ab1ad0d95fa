"""The drawings of hidden states before and after edits (MetaKE v3 Figure 7)."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from scipy.stats import gaussian_kde

from metake.report.figure import INK, Figure
from metake.report.plots import _log_axis, _require, _soft
from metake.report.studies.comparison import _grid, _number
from metake.report.style import Style, in_order, style

EDITED = "edited"
BROAD = {True: 2.2, False: 1.0}  # points: arrows of edited facts and of the others
DRAWN = 60  # facts of a group in a panel, evenly by place; all count


def state_maps(points: pd.DataFrame, model: str | None = None, name: str = "hidden_states") -> Figure:
    """One map for all methods, a panel each: where states lay before the edits, and where they lie after.

    points: dataset (one), method ("pre-edit": before), group, id, x, y, moved. Lines join a fact's two states; arrows
    say by how much the mean of a group's has moved on the map, magnified alike in all panels;
    the curves at the upper and right edge are the densities along each axis, before (gray) and after.
    """
    _require(points, "dataset", "method", "group", "id", "x", "y", "moved")
    methods = [m for m in in_order(points.method) if m != "pre-edit"]
    medians = (
        points[points.method != "pre-edit"]
        .pivot_table("moved", "method", "group", aggfunc="median")
        .loc[methods]
        .rename_axis(columns=None)
        .reset_index()
    )
    told = "; ".join(
        f"{style(r['method']).name}: " + ", ".join(f"{g} {r[g]:.3g}" for g in medians.columns[1:])
        for r in medians.to_dict("records")
    )
    alt = (
        f"Maps of {(points.method == 'pre-edit').sum()} facts' hidden states before and after the edits, "
        f"one panel per method, the same t-SNE. Median distance that a state moved, in spreads – {told}."
    )
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    size, panels = (2.75 * columns, 0.5 + 2.6 * rows), {"nrows": rows, "ncols": columns}
    return Figure(
        lambda axes: _draw_maps(axes, points, methods), points, name, alt, model, medians, size, **panels, sharex=True,
        sharey=True
    )


def _draw_maps(axes: Any, points: pd.DataFrame, methods: list[str]) -> None:
    before = points[points.method == "pre-edit"].set_index("id")
    kept = [i for _, group in before.groupby("group", sort=False) for i in group.index[:: -(-len(group) // DRAWN)]]
    shifts = points.groupby(["method", "group"])[["x", "y"]].mean()
    shifts = (shifts - shifts.loc["pre-edit"]).drop("pre-edit")
    longer = _magnified(shifts, before[["x", "y"]].max(axis=None) - before[["x", "y"]].min(axis=None))
    for place, method in zip(axes.flat, methods, strict=False):
        after = points[points.method == method].set_index("id").loc[before.index]
        _draw_map(place, before, after, kept, style(method))
        begin = before[["x", "y"]].mean()
        for group, shift in shifts.loc[method].iterrows():
            look = {"arrowstyle": "-|>", "mutation_scale": 6, "shrinkA": 0, "shrinkB": 0, "color": INK["light"]}
            look["linewidth"] = BROAD[group == EDITED]
            place.annotate("", begin + longer * shift, begin, arrowprops=look, zorder=6)
    for place in axes.flat[len(methods) :]:
        place.set_axis_off()
    line, marks = mpl.lines.Line2D, {"linestyle": "", "color": _soft(0.8)}
    told, ink = f", {longer:g} times as long", {"color": INK["light"], "marker": ">", "markevery": [-1]}
    signs = [
        line([], [], color=style("pre-edit").color, marker="x", markersize=5, linestyle="", label="before"),
        line([], [], marker="s", markersize=6, label="after, edited fact", **marks),
        line([], [], marker="o", markersize=3.5, label="after, held-out fact", **marks),
        line([], [], linewidth=BROAD[True], label=f"mean shift, edited facts{told}", **ink),
        line([], [], linewidth=BROAD[False], label=f"mean shift, held-out facts{told}", **ink),
    ]
    axes[0, 0].figure.legend(handles=signs, loc="outside lower center", ncols=2)


def _magnified(shifts: pd.DataFrame, span: float) -> float:
    """How much longer than they are shifts are drawn: 1, 2, 5, 10, … times, the longest under half the map."""
    room = 0.45 * span / max(np.hypot(shifts.x, shifts.y).max(), 1e-9 * span)
    power = 10 ** np.floor(np.log10(max(room, 1)))
    return float(max(factor * power for factor in (1, 2, 5) if factor * power <= max(room, 1)))


def _draw_map(axes: Any, before: pd.DataFrame, after: pd.DataFrame, kept: list[str], look: Style) -> None:
    gray, one, other = style("pre-edit").color, before.loc[kept], after.loc[kept]
    gap = np.full(len(kept), np.nan)
    paths = [np.column_stack([a, b, gap]).ravel() for a, b in ((one.x, other.x), (one.y, other.y))]
    axes.plot(*paths, color=look.color, alpha=0.4, linewidth=0.9, zorder=1)
    axes.plot(
        one.x, one.y, linestyle="", marker="x", markersize=3, color=gray, alpha=0.8, markeredgewidth=0.8, zorder=2
    )
    for edited, marker, size in ((False, "o", 2.6), (True, look.marker, 5.5)):
        own = other[(other.group == EDITED) == edited]
        axes.plot(
            own.x, own.y, linestyle="", marker=marker, markersize=size, color=look.color, alpha=0.85, markeredgewidth=0,
            zorder=3 + edited
        )
    both = pd.concat([before, after])[["x", "y"]]
    low, high = both.min(axis=None), both.max(axis=None)
    span = high - low
    line = np.linspace(low, high, 120)
    for frame, color in ((before, gray), (after, look.color)):
        for k, values in enumerate((frame.x, frame.y)):
            height = high + 0.05 * span + 0.14 * span * (density := gaussian_kde(values)(line)) / density.max()
            axes.plot(*((line, height) if k == 0 else (height, line)), color=color, linewidth=1.2)
    axes.set(
        xlim=(low - 0.03 * span, high + 0.22 * span), ylim=(low - 0.03 * span, high + 0.22 * span), xticks=[],
        yticks=[], title=look.name, aspect="equal"
    )
    axes.grid(False)


def state_distances(distances: pd.DataFrame, model: str | None = None, name: str = "hidden_states_distances") -> Figure:
    """How far the states of each method moved as a whole, with intervals; a gray bar ends at the level of chance.

    distances: dataset, method, group, measure, value, low, high, chance.
    """
    _require(distances, "dataset", "method", "group", "measure", "value", "low", "high", "chance")
    several = distances.dataset.nunique() > 1
    column = distances.group.str.replace(" ", "-") + " facts"
    found = distances.assign(column=distances.dataset + ", " + distances.group if several else column)
    methods, measures, columns = in_order(found.method), list(found.measure.unique()), list(found.column.unique())
    least = found.value[found.value > 0].min() / 3

    def panel(axes: Any, column: str, measure: str) -> None:
        own = found[(found.column == column) & (found.measure == measure)].set_index("method").reindex(methods)
        for place, (method, row) in enumerate(own.iterrows()):
            look, shown = style(method), max(row.value, least)
            axes.plot(
                [least, row.chance], [place, place], color=_soft(0.16), linewidth=7, solid_capstyle="butt", zorder=1
            )
            axes.plot([max(row.low, least), row.high], [place, place], color=look.color, linewidth=1.8, zorder=2)
            axes.plot(shown, place, marker=look.marker, markersize=6.5, markeredgewidth=0, color=look.color, zorder=3)
            _number(axes, place, f"{row.value:.2f}" if row.value >= 0.01 else f"{row.value:.1g}", 36)
        axes.grid(False, axis="y")
        axes.set_xscale("log")
        axes.set_xlim(least, 1.6 * found[found.measure == measure].high.max())
        _log_axis(axes.xaxis)
        if len(columns) > 2:  # narrow panels
            axes.xaxis.set_major_locator(mpl.ticker.LogLocator(numticks=4))

    draw, layout = _grid(columns, measures, methods, panel, "spreads", 2.3)
    wide = found.pivot(index="method", columns=["column", "measure"], values="value").loc[methods]
    summary = wide.set_axis([f"{m}, {c}" for c, m in wide.columns], axis=1).reset_index()
    told = "; ".join(
        f"{m}, {c}: from {own.value.min():.3g} ({style(own.method[own.value.idxmin()]).name}) to "
        f"{own.value.max():.3g} ({style(own.method[own.value.idxmax()]).name})"
        for (c, m), own in found.groupby(["column", "measure"], sort=False)
    )
    alt = (
        f"Distances between the hidden states before and after the edits, in units of their spread, per method. {told}."
    )
    return Figure(draw, distances, name, alt, model, summary, **layout)
