"""A figure that carries its numbers: drawn light and dark, kept with the CSV behind it, and readable as text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib.figure
import matplotlib.style
import pandas as pd

from metake.report.files import DEFAULT, artifact_name, figures_dir, write
from metake.report.shown import LABELS, Shown, badge, plain

INK = {"light": "#1f2328", "dark": "#e6edf3"}
RC = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.grid": True, "grid.alpha": 0.16, "grid.linewidth": 0.8, "xtick.major.size": 3, "ytick.major.size": 3, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.8, "svg.fonttype": "none", "axes.unicode_minus": True,
}  # fmt: skip
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color", "legend.labelcolor")
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
# In the book the theme hides one of the two drawings; in a plain notebook viewer this does.
CHOICE = (
    "<style>.metake-figure svg{max-width:100%;height:auto}.metake-figure .only-dark{display:none}html[data-theme=dark] .metake-figure .only-dark,[data-jp-theme-light=false] .metake-figure .only-dark{display:block}"
    "html[data-theme=dark] .metake-figure .only-light,[data-jp-theme-light=false] .metake-figure .only-light{display:none}</style>"
)


class Figure(Shown):
    """Draw once per theme and keep the files: <name>.light.svg, <name>.dark.svg, <name>.png (200 dpi), <name>.csv.

    draw:    takes the axes (a 2-d array of them if `panels` are given) and draws the same whenever it is called
    data:    the tidy records behind the figure: all of them go into the CSV, and say by their attrs what they are
    alt:     what a reader who does not see it should know
    model:   other models than the default one go into the files' names; taken from the provenance of recorded data
    summary: what text/plain shows; default the data, or their distribution if they are many
    panels:  for matplotlib's `subplots`
    """

    def __init__(
        self, draw: Callable[[Any], None], data: pd.DataFrame, name: str, alt: str, model: str | None = None,
        summary: pd.DataFrame | None = None, size: tuple[float, float] = (7.2, 3.6), digits: int = 3, **panels: Any,
    ) -> None:  # fmt: skip
        label, origin = data.attrs.get("label", "recomputed"), data.attrs.get("provenance")
        model = model or (origin or {}).get("model" if label == "recorded" else "", DEFAULT)
        name, alt = artifact_name(name, model), " ".join(alt.split())
        drawings = {theme: _svg(draw, theme, size, panels, name, alt) for theme in INK}
        for theme, svg in drawings.items():
            write(figures_dir() / f"{name}.{theme}.svg", svg)
        write(figures_dir() / f"{name}.png", _render(draw, "light", size, panels, format="png", dpi=200, facecolor="white", metadata={"Software": None}))
        write(figures_dir() / f"{name}.csv", data.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
        if summary is None:
            summary = data if len(data) <= 38 else data.describe().drop("std").reset_index(names="of all records")
        inline = "".join(f'<div class="only-{theme}">{svg[svg.index("<svg") :]}</div>' for theme, svg in drawings.items())
        note = f'<p class="metake-note">{escape(model)} {badge(label, origin)}</p>'
        text = f"Figure {name} [{LABELS[label]}]\n{plain(summary, digits)}"
        super().__init__(f'<div class="metake-figure">{CHOICE}{inline}{note}</div>', text)
        self.name, self.alt, self.data, self.summary, self.svg = name, alt, data, summary, drawings


def _render(draw: Callable[[Any], None], theme: str, size: tuple[float, float], panels: dict[str, Any], salt: str = "", **options: Any) -> bytes:
    with matplotlib.style.context(["default", RC | dict.fromkeys(INKED, INK[theme]) | {"svg.hashsalt": salt}]):
        canvas = matplotlib.figure.Figure(figsize=size, layout="constrained")
        draw(canvas.subplots(squeeze=False, **panels) if panels else canvas.subplots())
        file = io.BytesIO()
        canvas.savefig(file, **options)
    return file.getvalue()


def _svg(draw: Callable[[Any], None], theme: str, size: tuple[float, float], panels: dict[str, Any], name: str, alt: str) -> str:
    """The drawing as SVG that may stand beside others in one page: own ids, own styles, a name for screen readers."""
    key = f"{name}-{theme}".replace(".", "_")
    svg = _render(draw, theme, size, panels, salt=key, format="svg", metadata=NO_METADATA).decode()
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    svg = svg.replace("*{stroke", f"#{key} *{{stroke")
    return svg.replace("<svg ", f'<svg id="{key}" role="img" aria-label="{escape(alt)}" ', 1)
