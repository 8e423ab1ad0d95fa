"""The picture of β in the plane: a drawing, and the same to drag, which asks nothing of a server or the network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.shown import Shown, table
from metake.report.style import in_order, style
from metake.support.errors import ParameterError

LEVELS = (0.25, 0.5, 0.75, 0.9)
REACH, HEIGHT = 3.2, 2.6  # of the plane that is drawn, to each side
LONGEST = 12.0  # norm at which the axis ends
READINGS = ["method", "angle", "gamma", "beta", "lower", "upper", "feasible"]
PLAIN = (
    "With JavaScript there is a picture here to drag. Without it, the figure above and this table show the same."
)
TOLERANCE = 1e-9  # between the script's readings and the library's


def beta_plane(records: pd.DataFrame, scene: Mapping[str, Any], name: str = "geometry_of_beta") -> Figure:
    """A key turns away from the preserved line: levels of β under each constraint, and feasible plans per angle.

    records: method, angle, x, y, ridge, planned, beta, lower, upper, feasible; scene: preserved,
    constraints with their `unit` metric.
    """
    if missing := [
        c for c in ("method", "angle", "x", "y", "ridge", "beta", "lower", "upper", "feasible") if c not in records
    ]:
        raise ParameterError(
            f"these records have no column {', '.join(missing)}; found {', '.join(map(str, records.columns))}"
        )
    methods = in_order(records.method)

    def draw(axes: Any) -> None:
        for panel, method in zip(axes[0], methods, strict=False):
            own = records[records.method == method]
            _draw_plane(panel, own, scene, method)
        _draw_intervals(axes[0, -1], records, methods)

    told = "; ".join(f"{style(r.method).name}, {r.angle:g}°: β {r.beta:.2f}, {_span(r)}" for r in records.itertuples())
    alt = (
        "Keys at several angles to a preserved line, with levels of equal β: parallel lines for a projector, "
        f"ellipses for a covariance. {told}."
    )
    columns = [c for c in READINGS if c in records]
    return Figure(
        draw, records, name, alt, None, records[columns], (11.0, 3.6), ncols=len(methods) + 1,
        width_ratios=[1] * len(methods) + [1.25]
    )


def _span(row: Any) -> str:
    return f"feasible from {row.lower:.2f} to {row.upper:.2f}" if row.feasible else "nothing feasible"


def _draw_plane(axes: Any, records: pd.DataFrame, scene: Mapping[str, Any], method: str) -> None:
    look, ink = style(method), axes.spines["left"].get_edgecolor()
    ridge, unit = records.ridge.iloc[0], scene["constraints"][method]["unit"]
    axes.axhline(0, color=ink, alpha=0.25, linewidth=4, zorder=1)
    for level in LEVELS:
        x, y = _level(unit, level / (1 - level) * ridge)
        axes.plot(x, y, color=look.color, linestyle="--", linewidth=1)
        inner = max(x) < REACH  # an ellipse that fits is named beside its left end, a line at the edge
        at = 180 if inner else min(range(181, 360), key=lambda i: abs(x[i] - (0.12 - REACH)))
        if y[at] > 0.2 - HEIGHT:
            axes.text(
                x[at] - 0.05 * inner, y[at] + (0.08 if inner else 0.03), f"β = {level:g}", fontsize=7.5,
                ha="right" if inner else "left", va="bottom"
            )
    axes.scatter(*zip(*scene["preserved"], strict=True), s=10, color=ink, alpha=0.6, linewidth=0, zorder=3)
    for row in records.itertuples():
        axes.annotate(
            "", (row.x, row.y), (0, 0),
            arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        )
        axes.text(
            1.17 * row.x, 1.17 * row.y + (0.16 if not row.y else 0), f"{row.angle:g}°", fontsize=9, ha="center",
            va="center"
        )
    axes.set(
        xlim=(-REACH, REACH), ylim=(-HEIGHT, HEIGHT), aspect="equal", xticks=(), yticks=(),
        title=f"{look.name}, λ = {ridge:g}", xlabel="gray: the preserved line, and preserved keys"
    )
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _level(unit: list[list[float]], squared: float) -> tuple[list[float], list[float]]:
    """The curve kᵀ unit k = squared, a point per degree; what has no end is cut far outside."""
    x, y = [], []
    for turn in map(math.radians, range(361)):
        along, across = math.cos(turn), math.sin(turn)
        size = unit[0][0] * along**2 + 2 * unit[0][1] * along * across + unit[1][1] * across**2
        reach = min(math.sqrt(squared / max(size, 1e-12)), 1e3)
        x.append(reach * along)
        y.append(reach * across)
    return x, y


def _draw_intervals(axes: Any, records: pd.DataFrame, methods: list[str]) -> None:
    angles = list(dict.fromkeys(records.angle))
    for place, method in enumerate(methods):
        look = style(method)
        for row in records[records.method == method].itertuples():
            at = angles.index(row.angle) + 0.34 * place - 0.17 * (len(methods) - 1)
            low, high = min(row.lower, LONGEST), min(row.upper, LONGEST)
            if row.feasible:
                axes.barh(
                    at, high - low, left=low, height=0.3, color=look.color,
                    label=look.name if row.angle == angles[-1] else ""
                )
                axes.annotate(
                    f"β = {row.beta:.2f}", (high, at), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=8
                )
            else:
                axes.plot([high, low], [at, at], color=look.color, linestyle="", marker="|", markersize=8)
                axes.plot([high, low], [at, at], color=look.color, linestyle=":", linewidth=1)
                axes.annotate(
                    f"none, β = {row.beta:.2f}", (low, at), xytext=(4, 0), textcoords="offset points", va="center",
                    fontsize=8
                )
    axes.set(
        xlim=(0, LONGEST * 1.3), ylim=(len(angles) - 0.4, -0.6), yticks=range(len(angles)),
        yticklabels=[f"{a:g}°" for a in angles]
    )
    axes.set(xticks=range(0, int(LONGEST) + 1, 2), xlabel="norm of a plan ‖r‖", title="Which plans are feasible")
    axes.set_xticklabels([*map(str, range(0, int(LONGEST), 2)), f"≥ {LONGEST:g}"])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2, borderaxespad=0)


def beta_to_drag(scene: Mapping[str, Any], reference: pd.DataFrame) -> Shown:
    """The plane with a key to drag and sliders, an SVG and its script; without JavaScript a table of the readings.

    scene: constraints (unit metric, λ at the start), preserved, past, start; reference: the library's readings,
    at which the script
    checks itself when it loads: it shows a warning where one departs by more than 1e-9 (relative).
    """
    if reference.empty:
        raise ParameterError("there are no reference points; the picture could not check itself against the library")
    constraints = {m: {"name": style(m).name, "color": style(m).color, **c} for m, c in scene["constraints"].items()}
    points = [{k: None if v == math.inf else v for k, v in row.items()} for row in reference.to_dict("records")]
    data = json.dumps(
        dict(scene) | {"constraints": constraints, "reference": points, "tolerance": TOLERANCE}, allow_nan=False
    ).replace("<", "\\u003c")
    columns = "method x y ridge past planned gamma beta realized unrealized lower upper feasible"
    shown = reference[columns.split()]
    numbers = table(shown, "Readings of the library, at which the picture checks itself")
    read = resources.files("metake.report.theory")
    css, script = ((read / f"geometry_of_beta.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    html = (
        f'<div class="metake-geometry" id="metake-geometry"><style>{css}</style>'
        f'<p class="mg-warning" role="alert" hidden></p>'
        f'<p class="mg-plain">{escape(PLAIN)}</p><div class="mg-live" hidden></div>'
        f'<details class="mg-table"><summary>The same as numbers</summary>{numbers.html}</details>'
        f'<script type="application/json">{data}</script><script>{script}</script></div>'
    )
    return Shown(html, numbers.text)
