"""A finished run asked again: does the edit hold when nothing is forced, far from its prompt, and after later edits?

free         greedy answers beside forced ones, for every kind of probe                    (arXiv 2502.11177)
portability  what follows from the edits, by sort, for data that has such probes           (arXiv 2307.12976);
             "before": the answers that were right then, of the unedited model: can it combine facts at all?
prefix       the edited prompt after 0, 16, 50 and 200 tokens of unrelated text            (arXiv 2505.11876)
retention    the edited prompt again after later batches: by age, the batches since its edit
subject      edits whose subject another edit of the run shares, and the others            (arXiv 2502.06868)
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from metake.data.facts import prose
from metake.data.requests import EditCase
from metake.experiments.runs import SavedEdits, reopened
from metake.language.model import LanguageModel
from metake.language.tokens import encode
from metake.scoring.evaluation import FREE, NAMES, Evaluation, evaluate
from metake.support.errors import ParameterError, near_misses
from metake.support.storage import write_file

PREFIXES = (0, 16, 50, 200)  # tokens
RETENTION = "retention"
POINTS = 10  # at which a long sequence is asked for retention
SUFFIXES = ("", "_accuracy", "_exact", "_contained")
EFFICACY = tuple(f"efficacy{suffix}" for suffix in SUFFIXES)


def ask(folder: str | Path, names: Sequence[str], device: str | None = None, chat: bool = False) -> pd.DataFrame:
    """Ask a finished run, and keep what it answered in its folder, as asked.jsonl.

    names: of the questions above. One row per question, group (a sort, a prefix in tokens, an age in batches) and
    metric: percent, the mean over `cases` cases, named as in `Evaluation.metrics`.
    Raises ParameterError for an unknown question, or one for which the run has no case.
    """
    if unknown := [name for name in names if name not in (*ASKED, RETENTION)]:
        raise ParameterError(near_misses(unknown[0], (*ASKED, RETENTION), "question to a run"))
    config, lm, cases, edits = reopened(folder, device, chat)
    rows = [{"ask": "portability"} | row for row in _before(lm, cases)] if "portability" in names else []
    with lm.scratch(edits[0].modules):
        rows += _edited(lm, cases, edits, RETENTION in names)
        for name in (name for name in names if name != RETENTION):
            rows += ({"ask": name} | row for row in ASKED[name](lm, cases, config.seed))
    found = pd.DataFrame(rows, columns=["ask", "group", "metric", "percent", "cases"])
    write_file(Path(folder) / "asked.jsonl", found.to_json(orient="records", lines=True, force_ascii=False))
    return found


def text(found: pd.DataFrame) -> str:
    """The answers as a table for a terminal."""
    wide = found.pivot_table(index=["ask", "group", "cases"], columns="metric", values="percent", sort=False)
    return wide.to_string(float_format=lambda value: f"{value:.1f}", na_rep="")


def _rows(group: Any, found: Evaluation, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """One row per metric that is wanted, with the number of cases that it is a mean of."""
    records = found.records()
    for name, value in found.metrics.items():
        if wanted(name):
            yield {"group": group, "metric": name, "percent": value, "cases": sum(name in row for row in records)}


def only(cases: Iterable[EditCase], *kinds: str) -> list[EditCase]:
    """The cases with their probes of these kinds."""
    return [case._replace(probes=tuple(p for p in case.probes if p.kind in kinds)) for case in cases]


def _edited(lm: LanguageModel, cases: Sequence[EditCase], edits: SavedEdits, asks: bool) -> Iterator[dict[str, Any]]:
    """Applies the edits one after the other; rows of retention, if it is asked for, by age.

    What a method does at the end of a sequence counts as no batch: it is applied, and the last ages are asked after it.
    """
    records = list(edits.records())
    count = sum(bool(record.requests) for record in records)
    made: dict[str, int] = {id: number for number, record in enumerate(records) for id in record.requests}
    scores: dict[int, list[Evaluation]] = {}
    for number, edit in enumerate(edits):
        edit.apply(lm)
        last = number + 1 == len(edits)
        if asks and (last or number + 1 < count and (number + 1) % -(-count // POINTS) == 0):
            for age, own in by_age(only(cases, "efficacy"), made, min(number, count - 1)).items():
                scores.setdefault(age, []).append(evaluate(lm, own, free=True))
    if asks and len(scores) < 2:
        raise ParameterError("retention needs an edit after which another batch was edited; this run has one batch")
    for age, found in sorted(scores.items()):
        every = Evaluation(tuple(case for one in found for case in one.cases))
        yield from ({"ask": RETENTION} | row for row in _rows(age, every, EFFICACY.__contains__))


def by_age(cases: Iterable[EditCase], made: dict[str, int], now: int) -> dict[int, list[EditCase]]:
    """The cases of which all is edited by now, by the batches since."""
    ages: dict[int, list[EditCase]] = {}
    for case in cases:
        if (latest := max(made[request.id] for request in case.requests)) <= now:
            ages.setdefault(now - latest, []).append(case)
    return ages


def _free(lm: LanguageModel, cases: Sequence[EditCase], seed: int) -> Iterator[dict[str, Any]]:
    wanted = {name + suffix for name in NAMES.values() for suffix in SUFFIXES}  # not of each sort
    yield from _rows("all", evaluate(lm, cases, free=True), wanted.__contains__)


def _portability(lm: LanguageModel, cases: Sequence[EditCase], seed: int) -> Iterator[dict[str, Any]]:
    asked = [case for case in only(cases, "portability") if case.probes]
    if not asked:
        raise ParameterError(
            "the data of this run asks nothing that follows from its edits; run on data with portability, such as "
            "MQuAKE, KnowEdit, RippleEdits or lines of your own"
        )
    found = evaluate(lm, asked, free=True)
    yield from _rows("all", found, lambda name: name.removeprefix("portability") in SUFFIXES)
    for sort in dict.fromkeys(p.sort for case in asked for p in case.probes if p.sort):
        stem = f"portability_{sort}"
        for row in _rows(sort, found, lambda name, stem=stem: name.removeprefix(stem) in SUFFIXES):
            yield row | {"metric": row["metric"].replace(stem, "portability")}


def rivals(cases: Iterable[EditCase]) -> list[EditCase]:
    """What follows from the cases' edits, asked for the answers that were right before, where they are known."""
    own = only(cases, "portability")
    probes = [
        tuple(replace(p, target=p.rival, rival=None, aliases=(), sort="") for p in case.probes if p.rival)
        for case in own
    ]
    return [case._replace(probes=mine) for case, mine in zip(own, probes, strict=True) if mine]


def _before(lm: LanguageModel, cases: Sequence[EditCase]) -> Iterator[dict[str, Any]]:
    """What the unedited model makes of the questions whose answer before the edit is known: their rival."""
    if known := rivals(cases):
        yield from _rows("before", evaluate(lm, known, free=True), lambda name: True)


def _prefix(lm: LanguageModel, cases: Sequence[EditCase], seed: int) -> Iterator[dict[str, Any]]:
    for tokens, asked in after_text(lm, cases, seed):
        yield from _rows(tokens, evaluate(lm, asked, free=True), EFFICACY.__contains__)


def after_text(
    lm: LanguageModel, cases: Sequence[EditCase], seed: int, prefixes: Sequence[int] = PREFIXES,
    tell: Callable[[list[EditCase]], Sequence[EditCase]] = list
) -> Iterator[tuple[int, list[EditCase]]]:
    """The edited prompts after so many tokens of unrelated text, those that fit the model's window; tell: what stands
    before the text, if anything, such as the facts (`in_prompt`)."""
    own = only(cases, "efficacy")
    for tokens in prefixes:
        asked = tell([case.after(unrelated(lm, tokens, f"{seed}/{case.request.id}")) for case in own])
        fits = [c for c in asked if all(len(encode(lm.tokenizer, p.prompt)) + FREE <= lm.window for p in c.probes)]
        if len(fits) < len(asked):
            told = "%d of %d cases do not fit the model's window of %d tokens after a prefix of %d: they are left out"
            logging.getLogger("metake").warning(told, len(asked) - len(fits), len(asked), lm.window, tokens)
        if fits:
            yield tokens, fits


def unrelated(lm: LanguageModel, tokens: int, seed: str) -> str:
    """So many tokens of ordinary text that shares no name with the embedded facts, its paragraphs drawn by the seed."""
    paragraphs = prose()
    random.Random(seed).shuffle(paragraphs)
    ids = lm.tokenizer(" ".join(paragraphs), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    return f"{lm.tokenizer.decode(ids, skip_special_tokens=True).strip()} " if ids else ""


def _subject(lm: LanguageModel, cases: Sequence[EditCase], seed: int) -> Iterator[dict[str, Any]]:
    subjects = [request.subject for case in cases for request in case.requests]
    groups: dict[str, list[EditCase]] = {"shared": [], "its own": []}
    for case in only(cases, "efficacy"):
        shared = any(subjects.count(request.subject) > 1 for request in case.requests)
        groups["shared" if shared else "its own"].append(case)
    if not groups["shared"]:
        raise ParameterError("no two edits of this run share a subject: edit more of the data")
    for name, own in groups.items():
        if own:
            yield from _rows(name, evaluate(lm, own, free=True), EFFICACY.__contains__)


ASKED: dict[str, Callable[[LanguageModel, Sequence[EditCase], int], Iterator[dict[str, Any]]]] = {
    "free": _free, "portability": _portability, "prefix": _prefix, "subject": _subject,
}
"""What an edited model is asked; retention is asked between the edits."""
