"""What a page shows of the library's own code, and of a recording that may not be made yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
from IPython.display import display

from metake.report.figure import Figure
from metake.report.files import recorded, results_file
from metake.report.shown import Shown
from metake.report.studies.comparison import forest
from metake.support.errors import ParameterError

REAL, SHOWN = "-smollm2-135m", "SmolLM2-135M"  # the model whose recordings the pages name, in files and in captions


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
    The same recording of further models is shown first: see `of_others`.

    last: keyword arguments of the last step, such as the caption of a table.
    """
    of_others(name, *steps, **last)
    found = _found(name)
    if isinstance(found, ParameterError):
        # what else is recorded is no part of a page
        text = "Not recorded yet. " + str(found)[str(found).index("Make it with") :]
        return Shown(f'<p class="metake-note">{escape(text)}</p>', text)
    return _taken(found, steps, last)


def of_others(name: str, /, *steps: Callable[..., Any], **last: Any) -> None:
    """Display what `if_recorded` shows for the models that no page names, such as those of the paper's grid: every
    recording that is called like this one but for the model. Where a caption names the page's model, theirs stands.
    """
    kind, dash, own = name.rpartition(REAL)
    for path in sorted(results_file(name).parent.glob(f"{kind}-*.jsonl")) if dash and not own else ():
        if path.stem in (name, f"{kind}-tiny") or path.stem.partition("-")[0] != kind:
            continue
        found = recorded(path.stem, path.parent)
        model = path.stem.removeprefix(f"{kind}-")
        said = {k: v.replace(SHOWN, model) if isinstance(v, str) else v for k, v in last.items()}
        display(_taken(found, steps, said))


def _taken(found: pd.DataFrame, steps: Sequence[Callable[..., Any]], last: Mapping[str, Any]) -> Any:
    for step in steps[:-1]:
        found = step(found)
    return steps[-1](found, **last)


def _found(name: str) -> pd.DataFrame | ParameterError:
    try:
        return recorded(name)
    except ParameterError as missing:  # a damaged file is another error, and goes through
        return missing
