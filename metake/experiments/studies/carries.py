"""Does the edit carry? What follows from edits (arXiv 2307.12976), asked of every editor and of the unedited model that
is told the fact (arXiv 2505.18690); and whether the model could combine the facts at all before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from metake.data.requests import EditCase
from metake.experiments.asking import only, rivals
from metake.experiments.cases import read_cases
from metake.experiments.decision import all_of, any_of, for_and_against, interval, opposite, undecided, with_interval
from metake.experiments.runs import RunConfig
from metake.experiments.studies.asked import BEFORE, IN_PROMPT, Tell, asked
from metake.experiments.studies.comparison import PRIMARY, labelled, paired_differences
from metake.language.model import LanguageModel
from metake.report.style import in_order, style
from metake.scoring.evaluation import evaluate

LEAST = 0.5
"""The share of the answers before the edit that a model must give by itself, to be asked what follows from one."""
SCORES = {"score": "forced", "contained": "holds it, free", "exact": "is it, free"}
HELD = SCORES["contained"]
TELLING = "in_prompt"


def carries(
    model: str = "tiny",
    methods: Sequence[str] = PRIMARY,
    data: str = "facts-portability",
    edits: int = 10,
    batch: int = 10,
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Every question that follows from the edits, forced and free: a row a question and method.

    data: as `read_cases` takes it, with probes of portability; methods: also of `asked.IN_PROMPT`; out: folder of runs.
    Columns: method, seed, id, place (of the question in its case), sort, score, accuracy, exact, contained, as shares;
    before: of "pre-edit", whether its free answer held what was right before the edit, where that is known.
    """
    config, rows = RunConfig(model, PRIMARY[0], data, edits, batch, seed, text, text_tokens), []
    for method, found in asked("portability", _carried, config, methods, out and Path(out)):
        rows += [{"method": method, "seed": seed} | row for row in found]
    frame = pd.DataFrame(rows)
    told = f"{Path(data).name} sha256:{read_cases(data).digest[:16]}"
    settings = {"edits": edits, "batch": batch, "seeds": [seed], "dataset": told}
    frame.attrs = {"settings": settings, "asked": asdict(config)}
    return frame


def _carried(method: str, lm: LanguageModel, cases: Sequence[EditCase], tell: Tell) -> list[dict[str, Any]]:
    """A row a question; of the unedited model also what it gave before: `carries`."""
    told = only(tell(cases), "portability")
    knew = dict(_known(lm, told)) if method == BEFORE else {}
    rows = []
    for case, scored in zip(told, evaluate(lm, told, free=True).cases, strict=True):
        for place, probe in enumerate(scored.probes):
            shown = {name: getattr(probe, name) for name in ("score", "accuracy", "exact", "contained")}
            own = {"id": case.request.id, "place": place, "sort": probe.sort or "any"}
            rows.append(own | shown | {"before": knew.get((case.request.id, place))})
    return rows


def _known(lm: LanguageModel, cases: Sequence[EditCase]) -> Any:
    """(id, place), and whether the free answer holds what was right before the edit, where that is known."""
    asked = rivals(cases)
    for case, scored in zip(asked, evaluate(lm, asked, free=True).cases if asked else (), strict=True):
        whole = next(c for c in cases if c.request.id == case.request.id)
        places = [place for place, probe in enumerate(whole.probes) if probe.rival]
        for place, probe in zip(places, scored.probes, strict=True):
            yield (case.request.id, place), probe.contained


def able(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of the questions that the unedited model answered as it should before the edit: those it can combine."""
    knew = records[(records.method == BEFORE) & (records.before == 1)]
    chosen = pd.MultiIndex.from_frame(knew[["seed", "id", "place"]])
    return labelled(records[pd.MultiIndex.from_frame(records[["seed", "id", "place"]]).isin(chosen)], records)


def share_before(records: pd.DataFrame) -> float:
    """Of the questions whose answer before is known, the share that the unedited model gives; 0 if none is known."""
    known = records[records.method == BEFORE].before.dropna()
    return float(known.astype(float).mean()) if len(known) else 0.0


def by_case(records: pd.DataFrame) -> pd.DataFrame:
    """Means over the questions of a case, for each sort: "dataset" is the sort, as the drawings of methods have it."""
    grouped = records.groupby(["sort", "method", "seed", "id"], sort=False)[list(SCORES)].mean().reset_index()
    named = grouped.rename(columns=SCORES | {"sort": "dataset"})
    return labelled(named.assign(dataset=named.dataset.str.replace("_", " ")), records)


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per sort and method over all questions, and over those that the model could combine before."""
    rows, could = [], able(records)
    for sort, group in records.groupby("sort", sort=False):
        for method in in_order(group.method):
            own, few = (frame[(frame.sort == sort) & (frame.method == method)] for frame in (group, could))
            row = {"sort": sort.replace("_", " "), "method": method, "questions": len(own)}
            row |= {said: 100 * own[name].mean() for name, said in SCORES.items()}
            rows.append(row | {"combined before": len(few), "of these, holds it": 100 * few.contained.mean()})
    return labelled(pd.DataFrame(rows), records)


def over_telling(records: pd.DataFrame) -> pd.DataFrame:
    """Each editor minus the fact in the prompt, on the same cases, in points of free answers that hold what follows;
    intervals of 95 % for all editors jointly (Bonferroni)."""
    own = by_case(records).assign(dataset="all sorts")
    own = own.groupby(["dataset", "method", "seed", "id"], sort=False)[[HELD]].mean().reset_index()
    own[HELD] *= 100
    editors = [m for m in in_order(own.method) if m not in (BEFORE, *IN_PROMPT)]
    level = 1 - 0.05 / max(1, len(editors))
    found = [paired_differences(own, m, TELLING, metrics=[HELD], level=level).assign(method=m) for m in editors]
    return labelled(pd.concat(found, ignore_index=True), records)


def judge(records: pd.DataFrame) -> dict[str, Any]:
    """Does editing carry further than telling? Holds if one editor's free answers hold what follows more often than
    those of the unedited model with the fact in its prompt, by an interval above zero (95 % for all editors jointly);
    does not hold if every editor's interval lies below; inconclusive otherwise, and where the unedited model gives less
    than half of the answers that were right before, so that it cannot be asked to combine facts."""
    found = over_telling(records)
    best = found.loc[found.difference.idxmax()]
    told = f"best of {len(found)}: {style(best.method).name} − in the prompt "
    told += f"{with_interval(best.difference, best.low, best.high)} points"
    if (knew := share_before(records)) < LEAST:
        why = f"unedited, the model gives {100 * knew:.0f} % of the answers that were right before"
        return undecided(f"{why}: it does not combine facts").verdict(told)
    each = [interval(r.method, r.difference, r.low, r.high) for r in found.itertuples()]
    return for_and_against(any_of(each), all_of(map(opposite, each))).quiet().verdict(told)
