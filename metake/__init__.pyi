from . import methods, testing
from .algebra.geometry import (
    InverseCovariance,
    Isotropic,
    KeyStatistics,
    NullSpace,
    condition,
    inverse_covariance,
    null_space,
)
from .algebra.solve import Solution, association, attenuation, feasible_interval, gate, realization, solve
from .algebra.update import Edit, EditRecord, LayerUpdate
from .data.facts import facts
from .data.files import counterfact, counterfact_cases, dataset, zsre, zsre_cases
from .data.requests import EditCase, EditRequest, Probe, batches, in_prompt
from .editing.bilevel import refine
from .editing.diagnosis import diagnose
from .editing.editor import Editor
from .editing.gradient.editor import GradientEditor
from .editing.gradient.rule import GradientRule
from .editing.gradient.training import Training, train
from .editing.outer import Refinement
from .editing.state import EditorState
from .editing.statistics import Statistics, statistics
from .editing.targets import TargetRule, Targets, optimize_targets
from .language.architecture import ARCHITECTURES, Architecture
from .language.chat import chat
from .language.model import LanguageModel, load
from .methods import METHODS
from .scoring.evaluation import Evaluation, evaluate, recall
from .support.errors import (
    ArchitectureError,
    MetakeError,
    NumericalError,
    ParameterError,
    ProvenanceError,
    RequestError,
    StatisticsError,
)

__all__ = [
    "ARCHITECTURES", "METHODS", "Architecture", "ArchitectureError", "Edit", "EditCase", "EditRecord", "EditRequest",
    "Editor", "EditorState", "Evaluation", "GradientEditor", "GradientRule",
    "InverseCovariance", "Isotropic", "KeyStatistics", "LanguageModel",
    "LayerUpdate", "MetakeError", "NullSpace", "NumericalError", "ParameterError", "Probe", "ProvenanceError",
    "Refinement", "RequestError", "Solution", "Statistics", "StatisticsError", "TargetRule", "Targets", "Training",
    "association", "attenuation", "batches", "chat", "condition", "counterfact", "counterfact_cases", "dataset",
    "diagnose", "evaluate", "facts", "feasible_interval", "gate", "in_prompt", "inverse_covariance", "load", "methods",
    "null_space", "optimize_targets", "realization", "recall", "refine", "solve", "statistics", "testing", "train",
    "zsre", "zsre_cases",
]  # fmt: skip
__version__: str
