"""The contract, asked of a method or a model of one's own: every promise in turn, with verdict and reason."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metake import methods
from metake.data.facts import facts
from metake.data.requests import EditRequest
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.statistics import statistics
from metake.experiments.cases import select
from metake.experiments.promises import CHECKS
from metake.experiments.subject import BrokenPromise, NotAsked, Subject
from metake.language.model import LanguageModel, load
from metake.support.errors import MetakeError, ParameterError
from metake.support.progress import progress
from metake.support.storage import write_file

ASKED, KEYS = 4, 4  # facts that a check edits; tokens of text for each dimension of a key


class Result(NamedTuple):
    """Of one check: its name, "pass", "fail" or "not asked", why, and how long it took."""

    check: str
    verdict: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """What a method and a model keep of the contract."""

    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        return all(result.verdict != "fail" for result in self.results)

    def __str__(self) -> str:
        wide = max(len(result.check) for result in self.results)
        return "\n".join(
            f"{r.verdict:<9}  {r.check:<{wide}}  {r.seconds:6.1f} s  {' '.join(r.reason.split())}" for r in self.results
        )

    def save(self, file: str | Path) -> None:
        """Write the table as JSON."""
        write_file(file, self.to_json() + "\n")

    def to_json(self) -> str:
        return json.dumps({"passed": self.passed, "checks": [r._asdict() for r in self.results]}, indent=1)


def check_editor(
    make: Callable[[str], Editor | GradientEditor] | Editor | GradientEditor, model: str | LanguageModel = "tiny",
    requests: Sequence[EditRequest] | None = None, text: str = "embedded", text_tokens: int | None = None,
    seed: int = 0
) -> Report:
    """Whether a method keeps the contract: every check of `CHECKS` on a model, which is bit-identical on return.

    make: from a model's name to an editor, as the methods are, or an editor; requests: default a few embedded facts;
    text, text_tokens: of the key statistics, by default a few tokens for each dimension of a key.
    Cost: three edits of the requests, and the statistics.
    """
    lm = load(model) if isinstance(model, str) else model
    editor = make if hasattr(make, "step") else make(lm.name)
    asked = requests or [case.request for case in select(lm, facts(), ASKED, seed)]
    width = max((lm.shape(lm.write_path(i))[1] for i in editor.layers), default=0)
    known = statistics(lm, text, layers=editor.layers, tokens=text_tokens or KEYS * width)
    subject = Subject(lm, editor, known, list(asked))
    return Report(tuple(_asked(name, check, subject) for name, check in progress(CHECKS.items(), "contract")))


def check_model(
    model: str, method: str = "metake", dtype: str | None = None, device: str | None = None, text: str = "embedded",
    text_tokens: int | None = None, seed: int = 0
) -> Report:
    """Whether a model can be edited: its row of the architecture table, then `check_editor` with a method on it.

    Raises ParameterError for a model that cannot be found or read.
    """
    start = time.perf_counter()
    try:
        lm = load(model, dtype, device)
    except ParameterError:
        raise
    except MetakeError as error:
        return Report((Result("architecture", "fail", str(error), time.perf_counter() - start),))
    kind = lm.model.config.model_type
    said = f"{kind}: {lm.depth} blocks add up as its row says"
    first = Result("architecture", "pass", said, time.perf_counter() - start)
    editor = methods.method(method, model, seed=seed)
    return Report((first, *check_editor(editor, lm, None, text, text_tokens, seed).results))


def _asked(name: str, check: Callable[[Subject], str], subject: Subject) -> Result:
    start = time.perf_counter()
    try:
        verdict, reason = "pass", check(subject)
    except NotAsked as why:
        verdict, reason = "not asked", str(why)
    except Exception as error:  # of a method that somebody else wrote: whatever it is, it is what the check found
        verdict, reason = "fail", str(error) if isinstance(error, BrokenPromise) else f"{type(error).__name__}: {error}"
    return Result(name, verdict, reason, time.perf_counter() - start)
