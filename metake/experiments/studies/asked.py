"""Questions to edited models beside the two baselines that change no weight: the unedited model, and the unedited model
with the fact in its prompt. What the pages on free answers, on portability and on stress have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from metake.data.requests import Cases, EditCase, in_prompt
from metake.editing.statistics import statistics
from metake.experiments.kept import kept
from metake.experiments.runs import RunConfig, Unedited, cases_of, edit_sequence
from metake.experiments.studies.comparison import made
from metake.experiments.studies.finished import finished
from metake.language.model import LanguageModel, load
from metake.methods import named

BEFORE = "pre-edit"
IN_PROMPT = {"in_prompt": 0, "in_prompt/beside": 1}
"""The fact told before every question, and how many unrelated ones are told before it: see `data.requests.in_prompt`"""

Tell = Callable[[Sequence[EditCase]], Sequence[EditCase]]
Ask = Callable[[str, LanguageModel, Sequence[EditCase], Tell], list[dict[str, Any]]]


def names() -> list[str]:
    """What `methods` of these pages may name."""
    return [*named(), *IN_PROMPT]


def asked(
    what: str, ask: Ask, config: RunConfig, methods: Sequence[str], folder: Path | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(method, what `ask` finds) of the unedited model as "pre-edit", and after each method's edits of `config`.

    ask: plain rows from the method's name, the model, the cases, and how to tell them (as they are, or with the facts
    in the prompt); what: the question's name, by which its answers are kept; config: of the runs, but for the method;
    methods: also of `IN_PROMPT`. folder: of the runs, those of `comparison`, which go on where they stopped, are left
    there and are not asked twice; None: edited in memory, nothing is left.
    """
    lm, unedited = load(config.model), Unedited()
    cases = cases_of(config, lm)
    for method in (BEFORE, *methods):
        own = config if method in (BEFORE, *IN_PROMPT) else replace(config, method=method)
        told = (what, method, asdict(own), cases.digest, lm.base(), lm.digest(lm.write_path(0)))
        answer = partial(_answer, ask, method, own, lm, cases, folder, unedited)
        yield method, kept(folder and folder / "asked", told, answer)


def _answer(
    ask: Ask, method: str, config: RunConfig, lm: LanguageModel, cases: Cases, folder: Path | None, unedited: Unedited
) -> list[dict[str, Any]]:
    if method in (BEFORE, *IN_PROMPT):
        return ask(method, lm, cases, partial(in_prompt, beside=IN_PROMPT[method]) if method in IN_PROMPT else list)
    if folder:
        done = finished(made(config, folder, unedited), lm)
        with done.edit.applied(lm):
            return ask(method, lm, cases, list)
    with edited(lm, cases, config, unedited):
        return ask(method, lm, cases, list)


@contextmanager
def edited(
    lm: LanguageModel, cases: Sequence[EditCase], config: RunConfig, unedited: Unedited | None = None
) -> Iterator[None]:
    """The model after a run of `config` on these cases; on exit it is as before, bit for bit."""
    editor, requests = config.editor(), [request for case in cases for request in case.requests]
    given = statistics(lm, config.text, layers=editor.layers, tokens=config.text_tokens)
    with lm.scratch(editor.paths(lm)):
        for _, state in edit_sequence(lm, editor, requests, given, config.batch, shared=unedited):
            pass
        if last := editor.finish(lm, state):
            last.apply(lm)
        yield


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Shares in four decimals, the rest as it is."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
