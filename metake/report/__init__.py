"""What a page shows: tables, figures, verdicts and provenance stamps, as functions of tidy records. Never runs a model.

Everything has two faces: text/html for the reader, and a rounded text/plain, equal on every machine, that the notebook tests
compare. Everything carries one of three labels: recomputed here, recorded, reported in the paper. A frame says by
`.attrs["label"]` and `.attrs["provenance"]` which it is (`recorded` and `paper` set them); without, it was recomputed.
"""

from metake.report.figure import Figure
from metake.report.files import artifact_name, figures_dir, paper, project_root, recorded, write_recorded
from metake.report.plots import attenuation_curve, before_after, comparison_bars, dispersion, stage_bars, tradeoff
from metake.report.shown import Verdict, provenance, table, verdict
from metake.report.style import METHOD_STYLE, Style, style

__all__ = [
    "METHOD_STYLE", "Figure", "Style", "Verdict", "artifact_name", "attenuation_curve", "before_after", "comparison_bars", "dispersion", "figures_dir",
    "paper", "project_root", "provenance", "recorded", "stage_bars", "style", "table", "tradeoff", "verdict", "write_recorded",
]  # fmt: skip
