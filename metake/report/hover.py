"""Values to hover over: each mark of a drawing carries its numbers as a title, which a browser shows without any
script.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

MOST = 1000
"""Marks of a drawing that are told, those of the smallest series first: of more, the titles would outweigh the
drawing.
"""

ELEMENT = re.compile(
    r'<g id="(?P<group>[^"]+)">|<use [^>]*?x="(?P<x>-?[\d.]+)" y="(?P<y>-?[\d.]+)"[^>]*?/>|<path [^>]*?/>'
)


class Series(NamedTuple):
    """What is told of an artist of marks, or of one bar."""

    artist: Any
    axes: Axes
    label: str
    count: int
    value: tuple[Any, Any] | None = None  # of a bar: its place and value, (x, y)


def name_marks(canvas: Figure) -> dict[str, Series]:
    """Give the series of marks and the bars an id in the drawing, by which `with_titles` finds them again."""
    found = [series for axes in canvas.axes for series in _series(axes)]
    room = MOST
    for count in sorted({series.count for series in found}):
        room -= sum(series.count for series in found if series.count == count)
        if room < 0:  # all of a size or none: a cloud is not told in part
            found = [series for series in found if series.count < count]
            break
    for i, series in enumerate(found):
        series.artist.set_gid(f"mark_{i}")
    return {series.artist.get_gid(): series for series in found}


def _series(axes: Axes) -> Iterator[Series]:
    for line in axes.lines:
        if line.get_marker() not in ("None", "none", " ", "", None) and line.get_transform().contains_branch(
            axes.transData
        ):
            yield Series(line, axes, line.get_label(), len(line.get_xdata()))
    for cloud in axes.collections:
        if isinstance(cloud, PathCollection) and not cloud.get_rasterized():
            yield Series(cloud, axes, cloud.get_label(), len(cloud.get_offsets()))
    for bars in (c for c in axes.containers if isinstance(c, BarContainer)):
        for patch, value in zip(bars, bars.datavalues, strict=True):
            middle = (patch.get_x() + patch.get_width() / 2, patch.get_y() + patch.get_height() / 2)
            yield Series(
                patch, axes, bars.get_label(), 1,
                (value, middle[1]) if bars.orientation == "horizontal" else (middle[0], value)
            )


def with_titles(svg: str, canvas: Figure, marks: dict[str, Series]) -> str:
    """The drawing that `canvas` was just saved as, its marks with a title: label, and the values on both axes.

    A mark's values are read back from where it stands, so that they are those of the point under the pointer.
    """
    group, scale, height = "", canvas.dpi / 72, canvas.get_size_inches()[1] * 72

    def tell(match: re.Match) -> str:
        nonlocal group
        whole, group = match.group(), match["group"] or group
        if match["group"] or group not in marks:
            return whole
        _, axes, label, _, value = marks[group]
        if value is None and match["x"] is None:  # the line between the marks, or the shape of a mark
            return whole
        x, y = value or axes.transData.inverted().transform(
            ((float(match["x"]) * scale, (height - float(match["y"])) * scale))
        )
        # names before numbers
        read = sorted((_read(axes, "x", x), _read(axes, "y", y)), key=lambda found: not found[0])
        said = [
            text for text in ("" if str(label).startswith("_") else str(label), *(text for _, text in read)) if text
        ]
        return f"{whole[:-2]}><title>{escape(', '.join(said), quote=False)}</title></{'path' if value else 'use'}>"

    return ELEMENT.sub(tell, svg)


def _read(axes: Axes, which: str, value: float) -> tuple[bool, str]:
    """A value as its axis tells it: the name beside the tick (and True), or the axis' label and the number."""
    axis, siblings = getattr(axes, f"{which}axis"), getattr(axes, f"get_shared_{which}_axes")().get_siblings(axes)
    for other in siblings:  # an inner panel's ticks have no names
        ticks = getattr(other, f"{which}axis").get_major_ticks()
        names = [(abs(tick.get_loc() - value), " ".join(tick.label1.get_text().split())) for tick in ticks]
        if isinstance(axis.get_major_locator(), FixedLocator) and any(
            re.search("[a-zA-Zα-ωΑ-Ω]", name) for _, name in names
        ):
            near, name = min(names)
            return True, name if near < 0.5 else ""
    # below it stand remarks
    label = next((text for other in siblings if (text := getattr(other, f"get_{which}label")())), "").partition("\n")[0]
    # what the drawing's own rounding leaves of zero
    least = 1e-6 * abs(axis.get_view_interval()[1] - axis.get_view_interval()[0])
    return False, " ".join(f"{label} {0 if abs(value) < least and axis.get_scale() != 'log' else value:.4g}".split())
