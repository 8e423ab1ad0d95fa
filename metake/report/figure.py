"""A figure that carries its numbers: drawn light and dark, kept with the CSV behind it, and readable as text."""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import matplotlib.figure
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.text import Text

from metake.report import hover
from metake.report.files import DEFAULT, artifact_name, figures_dir, portable
from metake.report.lean import lean, paletted
from metake.report.shown import LABELS, Shown, badge, plain
from metake.report.style import FALLBACK, METHOD_STYLE
from metake.support.storage import write_file

# all that differs between the themes: a method's color is readable in both
INK = {"light": "#1f2328", "dark": "#e6edf3"}
RC = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True,
    "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.grid": True, "grid.alpha": 0.16, "grid.linewidth": 0.8, "xtick.major.size": 3, "ytick.major.size": 3,
    "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8, "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"),
    INK["light"]),
}  # fmt: skip
WIDEST = 7.83  # inches: the column of the book; of a wider drawing the text would shrink with it, below 8 points
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
DPI = 200
GAP, FEWEST, ROUNDS = 6, 8, 4  # pixels between words side by side; letters of a broken line; layouts to fit them in
COVERS, RIM = 1.5, 3.0  # pixels within which one mark lies on another; points by which the lower one is wider
# Within a page a drawing takes the color of the text around it: here where the theme is known, elsewhere as it comes.
COLORS = sorted({*(look.color for look in METHOD_STYLE.values()), *FALLBACK[0]})
COLOR = re.compile("|".join(COLORS))
DARK, CLEAR = "#14181e", 4.5  # the dark page, and the contrast to it of a method's color there
OWN_COLORS = re.compile(f"style=\"[^\"]*(?:{'|'.join(COLORS)})[^\"]*\"")
CHOICE = (
    "<style>.metake-figure svg{max-width:100%;height:auto}"
    f":is(html[data-theme=light],[data-jp-theme-light=true]) .metake-figure svg{{color:{INK['light']}}}"
    f":is(html[data-theme=dark],[data-jp-theme-light=false]) .metake-figure svg{{color:{INK['dark']}}}</style>"
)


class Figure(Shown):
    """Draw once, and keep the drawing for both themes: <name>.light.svg, <name>.dark.svg, <name>.png
    (200 dpi), <name>.csv. A page has it once, in the color of its text.

    draw:    takes the axes (a 2-d array of them if `panels` are given)
    data:    the tidy records behind the figure: all of them go into the CSV, and say by their attrs what they are
    alt:     what a reader who does not see it should know
    model:   another model than the default one goes into the files' names; recorded data bring theirs, and are named so
    summary: what text/plain shows; default the data, or their distribution if they are many
    panels:  for matplotlib's `subplots`
    """

    def __init__(
        self, draw: Callable[[Any], None], data: pd.DataFrame, name: str, alt: str, model: str | None = None,
        summary: pd.DataFrame | None = None, size: tuple[float, float] = (7.2, 3.6), digits: int = 3, **panels: Any,
    ) -> None:  # fmt: skip
        label, origin = data.attrs.get("label", "recomputed"), data.attrs.get("provenance")
        if label == "recorded":
            name, model = f"{name}-recorded", (origin or {}).get("model", model)
        model = str(portable(model or DEFAULT))
        name, alt = artifact_name(name, model), " ".join(alt.split())
        svg, png = _render(draw, (min(size[0], WIDEST), size[1]), panels, name)
        drawings = {theme: _themed(svg, ink, f"{name}-{theme}".replace(".", "_"), alt) for theme, ink in INK.items()}
        for theme, drawing in drawings.items():
            write_file(figures_dir() / f"{name}.{theme}.svg", drawing)
        write_file(figures_dir() / f"{name}.png", png)
        write_file(figures_dir() / f"{name}.csv", data.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
        if summary is None:
            summary = data if len(data) <= 38 else data.describe().drop("std").reset_index(names="of all records")
        inline, choice = _following(drawings["light"].replace(INK["light"], "currentColor"))
        told = "" if label == "recorded" and origin else f"{escape(model)} "  # a recording's badge names its model
        note = f'<p class="metake-note">{told}{badge(label, origin)}</p>'
        text = f"Figure {name} [{LABELS[label]}]\n{plain(summary, digits)}"
        super().__init__(f'<div class="metake-figure">{CHOICE}{choice}{inline}{note}</div>', text)
        self.name, self.alt, self.data, self.summary, self.svg = name, alt, data, summary, drawings


def _render(
    draw: Callable[[Any], None], size: tuple[float, float], panels: dict[str, Any], salt: str
) -> tuple[str, bytes]:
    """The light drawing, as SVG and as PNG: one layout for all."""
    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.style.context(["default", RC | {"svg.hashsalt": salt}]):
        canvas = matplotlib.figure.Figure(figsize=size, layout="constrained")
        draw(canvas.subplots(squeeze=False, **panels) if panels else canvas.subplots())
        _break_what_meets(canvas)
        _widen_what_is_covered(canvas)
        marks = hover.name_marks(canvas)
        # the resolution of what is drawn as an image within it
        canvas.savefig(svg, format="svg", dpi=DPI, metadata=NO_METADATA)
        drawing = lean(hover.with_titles(svg.getvalue().decode(), canvas, marks))
        canvas.set_layout_engine("none")  # it is laid out
        canvas.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return drawing, paletted(png.getvalue(), DPI)


def _break_what_meets(canvas: matplotlib.figure.Figure) -> None:
    """Titles of panels and names below them break their lines before they meet what stands beside them, or the edge."""
    for _ in range(ROUNDS):
        canvas.draw_without_rendering()  # what breaks leaves other places to the rest
        if not any([_broken(text, room) for text, room in _rooms(canvas)]):
            break


def _rooms(canvas: matplotlib.figure.Figure) -> Iterator[tuple[Text, float]]:
    """The title and the name below each panel, with the pixels to what stands beside it."""
    boxes = {axes: axes.get_window_extent() for axes in canvas.axes}
    for axes, box in boxes.items():
        beside = (other.x0 for other in boxes.values() if other.x0 > box.x1 and other.y0 < box.y1 and other.y1 > box.y0)
        room = min([*beside, canvas.bbox.x1]) - box.x0 - GAP
        title = (t for t in axes.get_children() if isinstance(t, Text) and t.get_text() == axes.get_title("left"))
        yield from ((text, room) for text in (*title, axes.xaxis.label))


def _broken(text: Text, room: float) -> bool:
    """Break a text's lines until it fits; whether it had to."""
    words = text.get_text()
    letters = max(map(len, words.splitlines()), default=0)
    while letters > FEWEST and text.get_window_extent().width > room:
        letters -= 1
        text.set_text(textwrap.fill(words, letters, break_long_words=False))
    return text.get_text() != words


def _widen_what_is_covered(canvas: matplotlib.figure.Figure) -> None:
    """A curve on which others lie, mark by mark, is drawn wider than they are: its color shows on both sides."""
    canvas.draw_without_rendering()  # scales and layout are final
    for axes in canvas.axes:
        marked = (line for line in axes.lines if line.get_marker() not in ("None", "", None))
        curves = sorted((line for line in marked if len(line.get_xdata()) > 1), key=lambda line: line.get_zorder())
        places = [axes.transData.transform(np.column_stack(line.get_data()).astype(float)) for line in curves]
        for k, line in enumerate(curves):
            above = {
                other.get_color() for other, place in zip(curves[k + 1 :], places[k + 1 :], strict=True)
                if place.shape == places[k].shape and np.allclose(place, places[k], rtol=0, atol=COVERS, equal_nan=True)
            } - {line.get_color()}  # fmt: skip
            wider = RIM * min(len(above), 3)
            line.set(linewidth=line.get_linewidth() + wider, markersize=line.get_markersize() + wider)


def _themed(svg: str, ink: str, key: str, alt: str) -> str:
    """The drawing in an ink, fit to stand beside others in one page: own ids (short: every mark refers to one),
    own styles, a name for screen readers.
    """
    own = "f" + hashlib.sha256(key.encode()).hexdigest()[:5]
    svg = _recolored(svg, lifted) if ink == INK["dark"] else svg
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}", svg.replace(INK["light"], ink))
    svg = svg.replace("*{stroke", f"#{key} *{{stroke")
    return svg.replace("<svg ", f'<svg id="{key}" role="img" aria-label="{escape(alt)}" ', 1)


def luminance(color: str) -> float:
    """How much light a color gives, of white's (WCAG 2.2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def lifted(color: str) -> str:
    """A color as the dark page shows it: as much of white in it as `CLEAR` asks for, none if it is clear as it is."""
    ground = luminance(DARK) + 0.05
    for white in range(0, 101, 4):
        parts = [round(v + (255 - v) * white / 100) for v in (int(color[i : i + 2], 16) for i in (1, 3, 5))]
        found = "#" + "".join(f"{p:02x}" for p in parts)
        if (luminance(found) + 0.05) / ground >= CLEAR:
            break
    return found


def _recolored(svg: str, change: Callable[[str], str]) -> str:
    """The drawing with the methods' colors changed, in its marks alone."""
    return OWN_COLORS.sub(lambda style: COLOR.sub(lambda found: change(found[0]), style[0]), svg)


def _following(svg: str) -> tuple[str, str]:
    """The drawing within a page, whose methods' colors follow the theme, and the rule that lifts them in the dark."""
    used = sorted({c for style in OWN_COLORS.findall(svg) for c in COLOR.findall(style) if lifted(c) != c})
    rules = "".join(f"--mk-{c[1:]}:{lifted(c)};" for c in used)
    dark = f"<style>:is(html[data-theme=dark],[data-jp-theme-light=false]) .metake-figure{{{rules}}}</style>"
    return _recolored(svg, lambda c: f"var(--mk-{c[1:]},{c})" if c in used else c), dark if used else ""
