"""Edits under stress: the edited prompt after unrelated text (arXiv 2505.11876), a second edit of the same subject
(arXiv 2502.06868), and later batches. All answers are free: nothing is forced.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from metake.data.requests import EditCase
from metake.editing.statistics import statistics
from metake.experiments.asking import after_text, by_age, only
from metake.experiments.cases import read_cases
from metake.experiments.decision import all_of, any_of, for_and_against, interval, opposite, undecided, with_interval
from metake.experiments.kept import kept
from metake.experiments.runs import RunConfig, cases_of
from metake.experiments.studies.asked import BEFORE, IN_PROMPT, Tell, asked, edited, rounded
from metake.experiments.studies.comparison import PRIMARY, labelled, paired_differences
from metake.experiments.studies.streams import visit
from metake.language.model import LanguageModel, load
from metake.report.style import in_order, style
from metake.scoring.evaluation import Evaluation, evaluate
from metake.support.errors import ParameterError

PREFIX, COMPANY, AGE = STRESSES = ("tokens of unrelated text", "company in the batch", "batches since the edit")
ALONE, SAME, OTHER = COMPANIES = ("alone", "same subject", "other subjects")
HELD = "efficacy_contained"
FEW = 10.0
"""Points of efficacy: a loss that lies below it, interval and all, is a small one."""


def stress(
    model: str = "tiny",
    methods: Sequence[str] = PRIMARY,
    edits: int = 12,
    batch: int = 4,
    subjects: int = 6,
    prefixes: Sequence[int] = (0, 16, 50),
    data: str = "facts",
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Edits under three stresses, a row a method, stress, group and fact: efficacy, forced and free, as shares.

    prefixes: tokens of unrelated text before the edited prompt, after `edits` in batches of `batch`; with the fact in
    the prompt (methods of `asked.IN_PROMPT`) the text stands between the fact and the question; groups of "batches
    since the edit": how many, along the same stream; subjects: so many facts are edited alone, with a second fact of
    each one's subject in the batch, and with as many of other subjects. out: folder in which what is done is kept.
    """
    config = RunConfig(model, PRIMARY[0], data, edits, batch, seed, text, text_tokens)
    folder, rows = out and Path(out), []
    ask = partial(_after, prefixes=tuple(prefixes), seed=seed)
    for method, found in asked(f"prefix {tuple(prefixes)}", ask, config, methods, folder):
        rows += [{"method": method} | row for row in found]
    lm = load(model)
    known = lm.base(), lm.digest(lm.write_path(0)), read_cases(data).digest
    for method in (m for m in methods if m not in IN_PROMPT):
        own = replace(config, method=method)
        for name, make in (("company", partial(_company, subjects=subjects)), ("ageing", _ageing)):
            found = kept(folder and folder / "asked", (name, subjects, own, *known), partial(make, lm, own))
            rows += [{"method": method} | row for row in found]
    frame = pd.DataFrame(rows).assign(seed=seed)
    told = f"{Path(data).name} sha256:{read_cases(data).digest[:16]}"
    frame.attrs["settings"] = {"edits": edits, "batch": batch, "seeds": [seed], "subjects": subjects, "dataset": told}
    return frame


def _rows(what: str, group: str, found: Evaluation) -> list[dict[str, Any]]:
    names = ("id", "efficacy", "efficacy_exact", HELD)
    return [{"stress": what, "group": group} | rounded({k: row[k] for k in names}) for row in found.records()]


def _after(
    method: str, lm: LanguageModel, cases: Sequence[EditCase], tell: Tell, prefixes: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    asked = after_text(lm, cases, seed, prefixes, tell)
    return [row for tokens, own in asked for row in _rows(PREFIX, str(tokens), evaluate(lm, own, free=True))]


def pairs(cases: Sequence[EditCase], count: int, seed: int) -> tuple[list[EditCase], list[EditCase], list[EditCase]]:
    """Facts, a second fact of each one's subject, and as many of other subjects: each of the second's relation, if a
    fact of it is left. Raises ParameterError if there are not so many subjects with two facts of different relations.
    """
    order = random.Random(seed).sample(list(cases), len(cases))
    by_subject: dict[str, list[EditCase]] = {}
    for case in order:
        known = by_subject.setdefault(case.request.subject, [])
        if case.request.prompt not in {c.request.prompt for c in known}:
            known.append(case)
    chosen = [found[:2] for found in by_subject.values() if len(found) > 1][:count]
    if len(chosen) < count:
        raise ParameterError(f"{count} subjects with two facts were asked for; the data has {len(chosen)}: ask fewer.")
    first, second = map(list, zip(*chosen, strict=True))
    free = [c for c in order if c.request.subject not in {c.request.subject for c in first}]
    other = []
    for case in second:
        alike = next((c for c in free if c.request.prompt == case.request.prompt), free[0])
        free.remove(alike)
        other.append(alike)
    return first, second, other


def _company(lm: LanguageModel, config: RunConfig, subjects: int) -> list[dict[str, Any]]:
    """The same facts edited alone, with a second fact of each one's subject, and with as many of other subjects."""
    first, second, other = pairs(read_cases(config.data), subjects, config.seed)
    rows = []
    for group, more in zip(COMPANIES, ([], second, other), strict=True):
        with edited(lm, [*first, *more], replace(config, batch=2 * subjects)):
            asked = only(first, "efficacy")
            rows += _rows(COMPANY, group, evaluate(lm, asked, free=True))
    return rows


def _ageing(lm: LanguageModel, config: RunConfig) -> list[dict[str, Any]]:
    """Every edited fact asked after its own batch and after each later one, the model as if the stream ended there."""
    cases, editor = cases_of(config, lm), config.editor()
    given = statistics(lm, config.text, layers=editor.layers, tokens=config.text_tokens)
    made = {case.request.id: place // config.batch for place, case in enumerate(cases)}
    points = [*range(config.batch, config.edits, config.batch), config.edits]
    asked = only(cases, "efficacy")
    rows = []
    for now, _ in enumerate(visit(lm, editor, cases, given, config.batch, points)):
        for age, own in by_age(asked, made, now).items():
            rows += _rows(AGE, str(age), evaluate(lm, own, free=True))
    return rows


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent of free answers that hold the new object, per stress and method, a column a group, of all facts asked."""
    rows = []
    for what, own in records.groupby("stress", sort=False):
        for (method, group), found in own.groupby(["method", "group"], sort=False):
            share = {"forced score": 100 * found.efficacy.mean(), "holds it, free": 100 * found[HELD].mean()}
            rows.append({"stress": what, "group": group, "method": method, "answers": len(found)} | share)
    return labelled(pd.DataFrame(rows), records)


def losses(records: pd.DataFrame) -> pd.DataFrame:
    """What each editor loses, in points of free answers that hold the new object, on the same facts: by the longest
    text; by the company of the same subject instead of others; from its own batch to the end of the stream. Intervals
    of 95 % for all editors jointly (Bonferroni). Columns as `comparison.differences` has them."""
    editors = [m for m in in_order(records.method) if m not in (BEFORE, *IN_PROMPT)]
    longest = max((int(g) for g in records[records.stress == PREFIX].group), default=0)
    oldest = max((int(g) for g in records[records.stress == AGE].group), default=0)
    ends = {PREFIX: ("0", str(longest)), COMPANY: (OTHER, SAME), AGE: ("0", str(oldest))}
    named = {PREFIX: f"{longest} tokens", COMPANY: "same subject", AGE: f"{oldest} batches"}
    rows = []
    for what, (calm, stressed) in ends.items():
        own = records[(records.stress == what) & records.group.isin([calm, stressed])]
        for method in editors:
            mine = own[own.method == method]
            mine = mine.groupby(["group", "seed", "id"], sort=False)[[HELD]].mean().reset_index()
            mine = mine.rename(columns={"group": "method"}).assign(dataset=named[what])
            found = paired_differences(mine, calm, stressed, metrics=[HELD], level=1 - 0.05 / len(editors))
            rows.append(found.assign(method=method, metric="lost"))
    return labelled(pd.concat(rows, ignore_index=True), records)


def judge(records: pd.DataFrame) -> dict[str, Any]:
    """Do edits stand the stress? Holds if every editor's loss under every stress lies below 10 points of free answers
    that hold the new object, by its interval (95 % for all editors jointly); does not hold if one editor's loss under
    one of them lies above zero with all of its interval and is 10 points or more; inconclusive otherwise."""
    found = losses(records)
    if found.empty:
        return undecided("no editor was run").verdict("no records of an editor")
    small = [opposite(interval(r.method, r.difference, r.low, r.high, FEW)) for r in found.itertuples()]
    large = [interval(r.method, r.difference, r.low, r.high) for r in found.itertuples() if r.difference >= FEW]
    most = found.loc[found.difference.idxmax()]
    lost = with_interval(most.difference, most.low, most.high)
    told = f"most is lost by {style(most.method).name}, {most.dataset}: {lost} points"
    against = any_of(large) if large else opposite(all_of(small))
    return for_and_against(all_of(small), against).quiet().verdict(told)
