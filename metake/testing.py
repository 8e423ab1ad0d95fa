"""For methods and models of one's own: do they keep the contract? See `experiments.promises`."""

from metake.experiments.contract import Report, Result, check_editor, check_model
from metake.experiments.promises import CHECKS
from metake.experiments.subject import Subject

__all__ = ["CHECKS", "Report", "Result", "Subject", "check_editor", "check_model"]
