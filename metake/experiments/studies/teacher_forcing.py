"""What teacher forcing hides (arXiv 2502.11177): the same edits asked as the field asks them, with the answer forced
and read token by token, and asked freely, where the model writes until it ends its sentence by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from metake.data.requests import EditCase
from metake.experiments.asking import only
from metake.experiments.decision import all_of, interval, undecided, with_interval
from metake.experiments.runs import RunConfig
from metake.experiments.studies import comparison
from metake.experiments.studies.asked import BEFORE, IN_PROMPT, Tell, asked, rounded
from metake.experiments.studies.comparison import FREE, PRIMARY, labelled, place, run_rows, told
from metake.experiments.studies.study import FORMATS
from metake.language.model import LanguageModel
from metake.report.style import style
from metake.scoring.evaluation import Evaluation, evaluate

KINDS = ("efficacy", "paraphrase", "neighborhood")
QUICK = KINDS[:2]  # without what is asked of other subjects, most of all questions
ASKED = ("efficacy", "generalization")
SAID = ("question", "wanted", "answer")  # of one case, for a reader's eye: they are no part of a recording


def teacher_forcing(
    model: str = "tiny",
    methods: Sequence[str] = PRIMARY,
    data: dict[str, str] | None = None,
    edits: int = 20,
    batch: int = 10,
    seeds: Sequence[int] = (0,),
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
    part: str = "all",
    kinds: Sequence[str] = KINDS,
    free: Sequence[str] = KINDS,
) -> pd.DataFrame:
    """`comparison.comparison` whose every question is asked freely too: its rows, and *_exact and *_contained of what
    was written (`Evaluation.metrics`), as shares; methods: also of `asked.IN_PROMPT`, which edit nothing.

    kinds: of the probes that are asked; free: of those that are asked freely too. out: folder of the runs, which go on
    where they stopped, and beside which is kept what was answered; without one nothing is left, and rows lack a
    method's own outer loss.
    attrs["said"]: of every method and case the edited prompt, what was wanted after it, and what was written, as JSON.
    """
    rows, runs, said = [], [], []
    for dataset, source in (data or FORMATS).items():
        for seed in seeds:
            config = RunConfig(model, PRIMARY[0], source, edits, batch, seed, text, text_tokens, part=part)
            ask, named = Freely(kinds, free), f"free, {kinds}, {free}"
            for method, found in asked(named, ask, config, methods, out and Path(out)):
                own, ran = {"dataset": dataset, "method": method, "seed": seed}, {}
                if out and method not in (BEFORE, *IN_PROMPT):
                    where = place(Path(out), edited := replace(config, method=method))
                    runs.append(told(dataset, edited, where))
                    ran = {row["id"]: row for row in run_rows(where, dataset, method, seed, before=False)}
                rows += [own | ran.get(row["id"], {}) | _without(row, SAID) for row in found]
                said += [own | {k: row[k] for k in ("id", *SAID)} for row in found]
    frame = pd.DataFrame(rows)
    settings = {"edits": edits, "batch": batch, "seeds": sorted(set(seeds)), "part": part}
    # as text: pandas copies attrs with every step, and the parts of a list one by one
    frame.attrs = {"said": json.dumps(said), "settings": settings, "asked": asdict(config) | {"data": data or FORMATS}}
    frame.attrs |= {"runs": runs} if runs else {}
    return frame


def _without(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@dataclass
class Freely:
    """Asks the questions of some kinds forced, and of some free: a row a case, with what was written after its prompt.

    before: what the unedited model answered, if it was asked here, for `specificity_pre_edit`.
    """

    kinds: Sequence[str]
    free: Sequence[str]
    before: Evaluation | None = None

    def __call__(self, method: str, lm: LanguageModel, cases: Sequence[EditCase], tell: Tell) -> list[dict[str, Any]]:
        told = tell(cases)
        freely = evaluate(lm, only(told, *({*self.kinds} & {*self.free})), free=True)
        found = freely if {*self.kinds} <= {*self.free} else evaluate(lm, only(told, *self.kinds))
        self.before = found if method == BEFORE else self.before
        forced = Evaluation(found.cases, self.before if method != BEFORE else None).records()
        rows = []
        for case, scored, own, row in zip(cases, freely.cases, forced, freely.records(), strict=True):
            answer = next(p.answer for p in scored.probes if p.kind == "efficacy")
            shown = dict(zip(SAID, (case.request.text, case.request.target, answer), strict=True))
            rows.append(rounded(_without(row, ("answers",)) | _without(own, ("answers",))) | shown)
        return rows


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per data set and method: the field's score, the answer's tokens all first choices when forced, and of the
    free answers those that are the new answer, and those that hold it."""
    names = {
        "": "score, forced", "_accuracy": "all tokens, forced", "_contained": "holds it, free", "_exact": "is it, free"
    }
    wide = records.groupby(["dataset", "method"], sort=False)
    rows = []
    for (dataset, method), own in wide:
        for metric in ASKED:
            shares = {said: 100 * own[f"{metric}{suffix}"].mean() for suffix, said in names.items()}
            rows.append({"asked": metric, "dataset": dataset, "method": method} | shares)
    frame = pd.DataFrame(rows)
    return labelled(pd.concat([frame[frame.asked == metric] for metric in ASKED], ignore_index=True), records)


def examples(records: pd.DataFrame, methods: Sequence[str], count: int = 3) -> pd.DataFrame:
    """What was written freely after edited prompts: the first cases of the first data set whose forced score is 1 with
    every one of the methods, and whose free answers are not all the one that was wanted; others if there are too few.
    """
    said = pd.DataFrame(json.loads(records.attrs["said"]))
    both = records.merge(said, on=["dataset", "method", "seed", "id"])
    both = both[(both.dataset == both.dataset.iloc[0]) & both.method.isin(methods) & (both.seed == both.seed.iloc[0])]
    by_case = both.groupby("id", sort=False)
    hidden = (by_case.efficacy.min() == 1) & (by_case.efficacy_exact.min() < 1)
    chosen = [*hidden[hidden].index, *hidden[~hidden].index][:count]
    shown = pd.concat([both[both.id == name] for name in chosen], ignore_index=True)
    shown = shown.rename(columns={"efficacy": "forced score", "answer": "written freely"})
    return labelled(shown[["question", "wanted", "method", "forced score", "written freely"]], records)


def lost(records: pd.DataFrame) -> pd.DataFrame:
    """The forced score minus what the free answers hold, in points on the same cases, per data set, method and metric:
    columns as `comparison.differences` has them."""
    free = records.assign(**{metric: records[f"{metric}_contained"] for metric in ASKED}, method="free")
    found = []
    for method in records.method.unique():
        own = records.method == method
        both = pd.concat([records[own].assign(method="forced"), free[own]])
        found.append(comparison.paired_differences(both, "forced", "free", metrics=ASKED).assign(method=method))
    return labelled(pd.concat(found, ignore_index=True), records)


def free_differences(records: pd.DataFrame) -> pd.DataFrame:
    """MetaKE minus every other method on the same cases, in the free answers that hold the new one."""
    metrics = [name for name in FREE if name.endswith("_contained")]
    pairs = {m: "metake" for m in records.method.unique() if m not in ("metake", BEFORE)}
    found = comparison.differences(records, pairs, metrics=metrics)
    return labelled(found.assign(metric=found.metric.str.removesuffix("_contained")), records)


def judge_hidden(records: pd.DataFrame) -> dict[str, Any]:
    """Does teacher forcing flatter? Holds if on every data set the forced efficacy of every editor lies above what its
    free answers hold, by an interval above zero; does not hold if one editor's lies below; inconclusive otherwise."""
    found = lost(records)
    own = found[(found.metric == "efficacy") & ~found.method.isin([BEFORE, *IN_PROMPT])]
    if own.empty:
        return undecided("no editor was run").verdict("no records of an editor")
    decisions = [interval(f"{r.method}, {r.dataset}", r.difference, r.low, r.high) for r in own.itertuples()]
    most, least = own.loc[own.difference.idxmax()], own.loc[own.difference.idxmin()]
    told = [
        f"{word} {style(r.method).name}, {r.dataset}: {with_interval(r.difference, r.low, r.high)}"
        for word, r in (("most", most), ("least", least))
    ]
    above = sum(bool(d.holds) for d in decisions)
    return all_of(decisions).quiet().verdict(
        f"forced efficacy − free answers that hold the new one, in points, {above} of {len(own)} above zero; "
        + "; ".join(told)
    )


def judge(records: pd.DataFrame) -> dict[str, Any]:
    """The paper's claim asked of free answers, that MetaKE's edits succeed and generalize more often than AlphaEdit's:
    holds if an interval of the free answers that hold the new one lies above zero and none below; does not hold if one
    lies below; inconclusive if all include zero."""
    metrics = [name for name in FREE if name.endswith("_contained")]
    return comparison.judge(comparison.paired_differences(records, metrics=metrics))
