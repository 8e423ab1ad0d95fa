"""What a page shows: tables, figures, verdicts and provenance stamps, as functions of tidy records. Never runs a model.

Everything has two faces: text/html for the reader, and a rounded text/plain, equal on every machine,
that the notebook tests compare. Everything carries one of three labels: recomputed here, recorded,
reported in the paper. A frame says by `.attrs["label"]` and `.attrs["provenance"]` which it is
(`recorded` and `paper` set them); without, it was recomputed.

`theory/` and `studies/` draw for the pages of these names. Imports `support`. Read first: `shown.py`.
"""

from metake.report.figure import Figure
from metake.report.files import (
    artifact_name,
    figures_dir,
    merge_recorded,
    paper,
    project_root,
    recorded,
    write_joined,
    write_recorded,
)
from metake.report.plots import attenuation_curve, before_after, dispersion, stage_bars
from metake.report.shown import Verdict, provenance, table, verdict
from metake.report.studies.ability import ability_curves
from metake.report.studies.claims import claim_panels
from metake.report.studies.comparison import comparison_dots, comparison_table, forest, tradeoff
from metake.report.studies.forcing import forced_and_free, stress_curves
from metake.report.studies.frontier import frontier_curves
from metake.report.studies.gamma import gamma_auroc, gamma_calibration
from metake.report.studies.generations import generations, target_shares
from metake.report.studies.hidden_states import state_distances, state_maps
from metake.report.studies.operators import if_recorded, of_others, recorded_or, refined_minus_base, source
from metake.report.studies.readings import reading_dots
from metake.report.studies.realized import realized_curves
from metake.report.studies.streams import stream_curves
from metake.report.studies.sweeps import kl_curves, sensitivity_curves
from metake.report.studies.text import text_curves
from metake.report.style import METHOD_STYLE, Style, style
from metake.report.theory.bilevel_theory import coupling_step, descent, last_layer
from metake.report.theory.family import agreement, option_effects
from metake.report.theory.interactive import beta_plane, beta_to_drag
from metake.report.theory.proxy import proxy_certificates, proxy_cosines, proxy_descent
from metake.report.theory.requirement import ball_and_ellipsoid, feasible_plans, real_plans, suppression

__all__ = [
    "METHOD_STYLE", "Figure", "Style", "Verdict", "ability_curves", "agreement", "artifact_name", "attenuation_curve",
    "ball_and_ellipsoid", "before_after", "beta_plane", "beta_to_drag", "claim_panels", "comparison_dots",
    "comparison_table",
    "coupling_step", "descent", "dispersion",
    "feasible_plans", "figures_dir", "forced_and_free", "forest", "frontier_curves",
    "gamma_auroc", "gamma_calibration", "generations", "if_recorded",
    "kl_curves", "last_layer", "merge_recorded", "of_others", "option_effects", "paper", "project_root", "provenance",
    "proxy_certificates",
    "proxy_cosines", "proxy_descent", "reading_dots", "real_plans", "realized_curves", "recorded", "recorded_or",
    "refined_minus_base", "sensitivity_curves", "source", "stage_bars", "state_distances", "state_maps",
    "stream_curves", "style", "suppression", "table",
    "target_shares", "text_curves", "tradeoff", "verdict", "write_joined", "write_recorded",
    "stream_curves", "stress_curves", "style", "suppression", "table",
    "target_shares", "tradeoff", "verdict", "write_joined", "write_recorded",
]  # fmt: skip
