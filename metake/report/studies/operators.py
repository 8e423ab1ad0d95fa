"""What a page shows of the library's own code, and of a recording that may not be made yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from html import escape
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.files import recorded
from metake.report.shown import Shown
from metake.report.studies.comparison import forest
from metake.support.errors import ParameterError


def source(function: Callable[..., Any]) -> Shown:
    """A function as it stands in the library: a page that shows it cannot differ from what it ran."""
    code = inspect.getsource(function).rstrip()
    return Shown(f'<div class="highlight"><pre class="metake-source">{escape(code)}</pre></div>', code)


def refined_minus_base(differences: pd.DataFrame, model: str | None = None) -> Figure:
    """What `experiments.operators.differences` returns, a row per base: see `forest`."""
    return forest(differences, "refined − base", model, "operators")


def recorded_or(name: str, records: pd.DataFrame) -> pd.DataFrame:
    """The recording of this name, or else the given records. The label says which: `.attrs["label"]`."""
    found = _found(name)
    if not isinstance(found, ParameterError):
        return found
    records = records.copy()
    records.attrs.setdefault("label", "recomputed")
    return records


def if_recorded(name: str, /, *steps: Callable[..., Any], **last: Any) -> Any:
    """The recording of this name, taken through the steps one after the other; without one, the command that makes it.

    last: keyword arguments of the last step, such as the caption of a table.
    """
    found = _found(name)
    if isinstance(found, ParameterError):
        # what else is recorded is no part of a page
        text = "Not recorded yet. " + str(found)[str(found).index("Make it with") :]
        return Shown(f'<p class="metake-note">{escape(text)}</p>', text)
    for step in steps[:-1]:
        found = step(found)
    return steps[-1](found, **last)


def _found(name: str) -> pd.DataFrame | ParameterError:
    try:
        return recorded(name)
    except ParameterError as missing:  # a damaged file is another error, and goes through
        return missing
