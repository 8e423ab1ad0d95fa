"""Values to hover over: each mark of a drawing carries its numbers as a title, which a browser shows without any script."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

MOST = 600
"""Marks of a drawing that are told: of more, the titles would outweigh the drawing, and the CSV has the numbers."""

ELEMENT = re.compile(r'<g id="(?P<group>[^"]+)">|<use [^>]*?x="(?P<x>-?[\d.]+)" y="(?P<y>-?[\d.]+)"[^>]*?/>|<path [^>]*?/>')


def name_marks(canvas: Figure) -> dict[str, tuple[Axes, str, tuple[Any, Any] | None]]:
    """Give every artist of marks or bars an id in the drawing: id → its axes, its label, and a bar's place and value (x, y)."""
    found: dict[str, tuple[Axes, str, tuple[Any, Any] | None]] = {}

    def add(artist: Any, axes: Axes, label: Any, value: tuple[Any, Any] | None = None) -> None:
        artist.set_gid(f"mark_{len(found)}")
        found[artist.get_gid()] = axes, "" if str(label).startswith("_") else str(label), value

    for axes in canvas.axes:
        for line in axes.lines:
            if line.get_marker() not in ("None", "none", " ", "", None) and line.get_transform().contains_branch(axes.transData):
                add(line, axes, line.get_label())
        for collection in axes.collections:
            if isinstance(collection, PathCollection) and not collection.get_rasterized():
                add(collection, axes, collection.get_label())
        for bars in (c for c in axes.containers if isinstance(c, BarContainer)):
            for patch, value in zip(bars, bars.datavalues, strict=True):
                middle = (patch.get_x() + patch.get_width() / 2, patch.get_y() + patch.get_height() / 2)
                add(patch, axes, bars.get_label(), (value, middle[1]) if bars.orientation == "horizontal" else (middle[0], value))
    return found


def with_titles(svg: str, canvas: Figure, marks: dict[str, tuple[Axes, str, tuple[Any, Any] | None]]) -> str:
    """The drawing that `canvas` was just saved as, its marks with a title: label, and the values on both axes.

    A mark's values are read back from where it stands, so that they are those of the point under the pointer.
    """
    if len(marks) > MOST or svg.count("<use ") > 2 * MOST:
        return svg
    group, scale, height = "", canvas.dpi / 72, canvas.get_size_inches()[1] * 72

    def tell(match: re.Match) -> str:
        nonlocal group
        whole, group = match.group(), match["group"] or group
        if match["group"] or group not in marks:
            return whole
        axes, label, value = marks[group]
        if value is None and match["x"] is None:  # the line between the marks, or the shape of a mark
            return whole
        x, y = value or axes.transData.inverted().transform(((float(match["x"]) * scale, (height - float(match["y"])) * scale)))
        read = sorted((_read(axes, "x", x), _read(axes, "y", y)), key=lambda found: not found[0])  # names before numbers
        said = [text for text in (label, *(text for _, text in read)) if text]
        return f"{whole[:-2]}><title>{escape(', '.join(said), quote=False)}</title></{'path' if value else 'use'}>"

    return ELEMENT.sub(tell, svg)


def _read(axes: Axes, which: str, value: float) -> tuple[bool, str]:
    """A value as its axis tells it: the name beside the tick (and True), or the axis' label and the number."""
    axis, siblings = getattr(axes, f"{which}axis"), getattr(axes, f"get_shared_{which}_axes")().get_siblings(axes)
    for other in siblings:  # an inner panel's ticks have no names
        ticks = getattr(other, f"{which}axis").get_major_ticks()
        names = [(abs(tick.get_loc() - value), " ".join(tick.label1.get_text().split())) for tick in ticks]
        if isinstance(axis.get_major_locator(), FixedLocator) and any(re.search("[a-zA-Zα-ωΑ-Ω]", name) for _, name in names):
            near, name = min(names)
            return True, name if near < 0.5 else ""
    label = next((text for other in siblings if (text := getattr(other, f"get_{which}label")())), "")
    least = 1e-6 * abs(axis.get_view_interval()[1] - axis.get_view_interval()[0])  # what the drawing's own rounding leaves of zero
    return False, " ".join(f"{label} {0 if abs(value) < least and axis.get_scale() == 'linear' else value:.4g}".split())
