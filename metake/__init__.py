"""metake: knowledge editing in one formula, and the reproducibility companion of MetaKE (arXiv 2603.12677).

An edit is Δ = R·M: targets decide the residuals R, a metric decides the gate M.
"""

__version__ = "0.1.0"

from metake import methods
from metake.bilevel import Refinement, refine
from metake.diagnosis import diagnose
from metake.editor import Editor, EditorState
from metake.errors import ArchitectureError, MetakeError, NumericalError, ParameterError, ProvenanceError, RequestError, StatisticsError
from metake.evaluation import Evaluation, evaluate, recall
from metake.facts import facts
from metake.geometry import InverseCovariance, Isotropic, KeyStatistics, NullSpace, condition, inverse_covariance, null_space
from metake.methods import METHODS
from metake.model import ARCHITECTURES, Architecture, LanguageModel, load
from metake.requests import EditCase, EditRequest, Probe, batches, counterfact, counterfact_cases, zsre, zsre_cases
from metake.solve import Solution, association, attenuation, feasible_interval, gate, realization, solve
from metake.statistics import Statistics, statistics
from metake.targets import TargetRule, Targets, optimize_targets
from metake.update import Edit, EditRecord, LayerUpdate

__all__ = [
    "ARCHITECTURES", "METHODS", "Architecture", "ArchitectureError", "Edit", "EditCase", "EditRecord", "EditRequest", "Editor", "EditorState",
    "Evaluation", "InverseCovariance", "Isotropic", "KeyStatistics", "LanguageModel", "LayerUpdate", "MetakeError", "NullSpace", "NumericalError",
    "ParameterError", "Probe", "ProvenanceError", "Refinement", "RequestError", "Solution", "Statistics", "StatisticsError", "TargetRule", "Targets",
    "association", "attenuation", "batches", "condition", "counterfact", "counterfact_cases", "diagnose", "evaluate", "facts", "feasible_interval",
    "gate", "inverse_covariance", "load", "methods", "null_space", "optimize_targets", "realization", "recall", "refine", "solve", "statistics",
    "zsre", "zsre_cases",
]  # fmt: skip
