"""What the paper leaves open of MetaKE's outer level: which reading the library takes, by the paper's own standard, and
whether it reproduces the ordering of v3 Table 2 and the direction of Figure 4. How it is chosen: see `choosing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metake import methods
from metake.editing.editor import Editor
from metake.editing.statistics import statistics
from metake.experiments.cases import part_of, read_cases, select
from metake.experiments.decision import Decision, all_of, any_of, for_and_against, interval, opposite, with_interval
from metake.experiments.studies import comparison, realized_residual
from metake.experiments.studies.choosing import best, names
from metake.experiments.studies.readings import FEW, LEVELS, LITERAL, READINGS, around
from metake.experiments.studies.study import FORMATS, Batch, one
from metake.language.model import load
from metake.support.errors import ParameterError, near_misses

SHARED = "every reading"
NO_REFINEMENT, KEY_ONLY, STOPPED = methods.ABLATIONS
CLAIMED = ("log_p", "log_p_paraphrase")  # what efficacy and generalization cut to success or failure
SHARES = ("efficacy", "generalization", "specificity")
PLACE = ["part", "dataset", "seed", "reading", "method", "id"]
WORDS = {True: "yes", False: "no", None: "open"}


def open_readings(
    model: str = "tiny",
    readings: Sequence[str] = tuple(FEW),
    edits: int = 4,
    seeds: Sequence[int] = (0,),
    test_edits: int = 4,
    test_seeds: Sequence[int] = (2, 3),
    data: Mapping[str, str] | None = None,
    beside: Sequence[pd.DataFrame] = (),
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Every reading on records for choosing; the chosen and the literal one with their ablations on those for testing.

    readings: names of `READINGS`; the literal one is always among them, and so are those `around` the best of them.
    A record belongs to one part by its subject (`part_of`): no subject, in whatever format or relation, is in both.
    edits, seeds: batches of the first part; test_edits, test_seeds: of the second. data: default both formats.
    beside: what this returned for other models, to be chosen by as well. out: see `study`.

    One row per part ("choosing", "testing"), data set, seed, reading, variant ("method": "metake" or an ablation) and
    request: see `study`. What is the same under every reading stands once, as reading "every reading": without the
    refinement, and with a stopped gradient, whose only force, the anchor's, is zero where it starts.
    Raises ParameterError for an unknown reading, or seeds that are in both parts. Cost: a refinement a reading and
    batch, two on the records for testing.
    """
    wanted = list(dict.fromkeys((LITERAL, *readings)))
    if unknown := [name for name in wanted if name not in READINGS]:
        raise ParameterError(near_misses(unknown[0], READINGS, "reading"))
    if both := set(seeds) & set(test_seeds):
        raise ParameterError(
            f"seeds for choosing and for testing must differ; found {', '.join(map(str, sorted(both)))} in both"
        )
    lm, full = load(model), methods.metake(model)
    given = statistics(lm, text, layers=list(full.layers), tokens=text_tokens)
    state = full.init(lm, given)

    def rows(part: str, names: Sequence[str], count: int, drawn: Sequence[int]) -> Iterator[dict[str, Any]]:
        for dataset, source in (data or FORMATS).items():
            for seed in drawn:
                batch = Batch.of(lm, given, select(lm, part_of(read_cases(source), part), count, seed))
                for (name, method), editor in _editors(full, model, names, part).items():
                    where = {"part": part, "dataset": dataset, "seed": seed, "reading": name, "method": method}
                    yield from (where | row for row in one(batch, editor, state, out=out))

    chosen = pd.DataFrame(rows("choosing", wanted, edits, seeds))
    near = [name for name in around(best(chosen, *beside)) if name not in wanted]
    chosen = pd.concat([chosen, pd.DataFrame(rows("choosing", near, edits, seeds) if near else [])], ignore_index=True)
    tested = pd.DataFrame(
        rows("testing", list(dict.fromkeys((LITERAL, best(chosen, *beside)))), test_edits, test_seeds)
    )
    frame = pd.concat([chosen.drop_duplicates(PLACE), tested], ignore_index=True)
    frame.attrs["settings"] = {
        "edits": edits, "seeds": list(seeds), "test_edits": test_edits, "test_seeds": list(test_seeds)
    }
    return frame


def _editors(full: Editor, model: str, names: Sequence[str], part: str) -> dict[tuple[str, str], Editor]:
    shared = (NO_REFINEMENT, STOPPED) if part == "testing" else (NO_REFINEMENT,)
    found = {(SHARED, name): methods.ABLATIONS[name](full) for name in shared}
    for name in names:
        own = replace(full, refine=READINGS[name].rule(model))
        found[name, "metake"] = own
        if part == "testing":
            found[name, KEY_ONLY] = methods.ABLATIONS[KEY_ONLY](own)
    return found


def of(records: pd.DataFrame, part: str, reading: str) -> pd.DataFrame:
    """One reading's rows of a part, with those that every reading shares."""
    return records[(records.part == part) & records.reading.isin([reading, SHARED])]


def differences(
    records: pd.DataFrame, part: str, reading: str, draws: int = 4000, pairs: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """The full method minus each ablation on the same requests: points, of log-probabilities nats; 95 % intervals.

    most: the upper end of an interval that is widened so that all of them together have 95 % (Bonferroni); below:
    whether even that lies below zero.
    """
    own, pairs = of(records, part, reading), dict(pairs or dict.fromkeys(methods.ABLATIONS, "metake"))
    found = comparison.differences(own, pairs, metrics=SHARES + CLAIMED, draws=draws)
    most = _together(own, pairs, len(found)).high
    return comparison.labelled(found.assign(most=most, below=most < 0), records)


def _together(records: pd.DataFrame, pairs: dict[str, str], count: int) -> pd.DataFrame:
    """Differences with intervals of 95 % together: with a dozen of 95 % each, one beside zero would be no surprise."""
    return comparison.differences(records, pairs, metrics=SHARES + CLAIMED, level=1 - 0.05 / count, draws=10_000)


def ordering(found: pd.DataFrame) -> Decision:
    """Table 2: is the full method above each ablation in efficacy and generalization, on every data set?

    Holds if the log-probability of the target is higher after the prompt and after its paraphrases, every interval
    above zero; does not hold if one of these, or of efficacy or generalization themselves, is `below`; else it cannot
    be told. found: of `differences`.
    """
    finer, wide = found[found.metric.isin(CLAIMED)], found[found.metric != "specificity"]
    return for_and_against(
        all_of(interval(r.metric, r.difference, r.low, r.high) for r in finer.itertuples()),
        any_of(opposite(interval(r.metric, r.difference, r.low, r.most)) for r in wide.itertuples()),
    )


def gains(records: pd.DataFrame, part: str, reading: str, draws: int = 4000) -> pd.DataFrame:
    """Figure 4: β̂ of the refined plan minus AlphaEdit's, in each of `realized_residual.READINGS` of β̂."""
    return realized_residual.gains(of(records, part, reading), "metake", NO_REFINEMENT, draws)


def summary(records: pd.DataFrame, part: str = "choosing", draws: int = 4000) -> pd.DataFrame:
    """One row per reading and data set: what it does to its own outer loss, to the edited model's, and to the edit.

    outer_before, outer_after: means over requests, at Stage I's plan and at the one that was kept; anchor_after:
    the anchor's part of the latter; change: outer_after over outer_before, lowest and highest of the seeds beside it;
    fell: for how many requests of a hundred; moved: median, percent of the plan; edited: mean F of the edited model,
    and over AlphaEdit's, the median over requests with its quartiles ("gain", "gain_low", "gain_high");
    generalization: MetaKE minus AlphaEdit, points; paraphrase: the same of log p after paraphrases, nats, with its
    interval; realized: of β̂ over all layers against Stage I's plan, with its interval.
    """
    rows = []
    for name in names(records, part):
        compared = differences(records, part, name, draws, {NO_REFINEMENT: "metake"})
        realized = gains(records, part, name, draws)
        own = records[(records.part == part) & (records.reading == name) & (records.method == "metake")]
        for dataset, group in own.groupby("dataset", sort=False):
            against = compared[compared.dataset == dataset].set_index("metric")
            share = realized[
                (realized.dataset == dataset) & (realized.reading == realized_residual.READINGS["whole_initial"])
            ].iloc[0]
            rows.append({"reading": name, "factor": READINGS[name].factor, "dataset": dataset,
            "requests": len(group)} | _outer(group) | _edited(group, of(records, part, name)) | {
                "generalization": against.difference["generalization"],
                **_interval("paraphrase", against.loc["log_p_paraphrase"]), **_interval("realized", share),
            })  # fmt: skip
    return comparison.labelled(pd.DataFrame(rows), records)


def _outer(group: pd.DataFrame) -> dict[str, float]:
    mean = group[["outer_before", "outer_after", "anchor_after"]].mean()
    by_seed = group.groupby("seed")[["outer_before", "outer_after"]].mean()
    ratio = by_seed.outer_after / by_seed.outer_before
    return mean.to_dict() | {
        "change": mean.outer_after / mean.outer_before, "change_low": ratio.min(), "change_high": ratio.max(),
        "fell": 100 * (group.outer_after < group.outer_before).mean(), "moved": 100 * group.moved.median()
    }


def _edited(group: pd.DataFrame, beside: pd.DataFrame) -> dict[str, float]:
    plain = beside[(beside.method == NO_REFINEMENT) & (beside.dataset == group.dataset.iloc[0])]
    ratio = group.set_index(["seed", "id"]).edited / plain.set_index(["seed", "id"]).edited
    low, middle, high = ratio.quantile([0.25, 0.5, 0.75])
    return {"edited": group.edited.mean(), "gain": middle, "gain_low": low, "gain_high": high}


def _interval(name: str, row: pd.Series) -> dict[str, float]:
    return {name: row.difference, f"{name}_low": row.low, f"{name}_high": row.high}


def winner(records: pd.DataFrame) -> str:
    """The reading that was tested beside the literal reading: `best`, as the records tell it."""
    return next((name for name in names(records, "testing") if name != LITERAL), LITERAL)


def against_literal(records: pd.DataFrame) -> pd.DataFrame:
    """The winner minus the literal reading on the records for testing: shares in points, log-probabilities in nats,
    with intervals of 95 % together."""
    own = records[(records.part == "testing") & (records.method == "metake")].assign(method=lambda r: r.reading)
    return _together(
        comparison.labelled(own, records), {LITERAL: winner(records)}, len(SHARES + CLAIMED) * own.dataset.nunique()
    )


def beats(found: pd.DataFrame) -> bool | None:
    """True if some interval of efficacy or generalization, or of their log-probabilities, lies above zero and none, nor
    that of specificity, below; False if one lies below; None otherwise. found: what `against_literal` returns."""
    if (found.high < 0).any():
        return False
    return True if (found[found.metric != "specificity"].low > 0).any() else None


def effects(records: pd.DataFrame) -> pd.DataFrame:
    """Which factor matters: each one's mean effect in the factorial design of `LEVELS`, over all other combinations.

    Per data set and factor, second level minus first: of log₂ of the outer loss's change (1: twice as high), of the
    percent that the plan moves, of log₂ of the edited model's F over AlphaEdit's, of log p after paraphrases (nats).
    Empty if the records do not hold all combinations.
    """
    found = summary(records, draws=1)
    table = pd.DataFrame([READINGS[name].settings for name in found.reading], index=found.index)
    literal = READINGS[LITERAL].settings
    inside = np.logical_and.reduce([table[k].isin(LEVELS[k]) if k in LEVELS else table[k] == literal[k] for k in table])
    found = found.assign(outer=np.log2(found.change), edited=np.log2(found.gain))[inside]
    table, rows = table[inside], []
    for dataset, own in found.groupby("dataset", sort=False):
        if len(own) < np.prod([len(levels) for levels in LEVELS.values()]):
            continue
        for factor, (first, second) in LEVELS.items():
            means = own.groupby(table[factor])[["outer", "moved", "edited", "paraphrase"]].mean()
            rows.append(
                {"dataset": dataset, "factor": factor.replace("_", " "), "from": str(first), "to": str(second)}
                | (means.loc[second] - means.loc[first]).to_dict()
            )
    columns = ["dataset", "factor", "from", "to", "outer", "moved", "edited", "paraphrase"]
    return comparison.labelled(pd.DataFrame(rows, columns=columns), records)


def answers(records: pd.DataFrame) -> pd.DataFrame:
    """The two claims, a row each: what the winner and the literal reading say on the records for testing."""
    rows = {"Paper Table 2's ordering": {}, "Paper Fig. 4's direction": {}}
    for reading in dict.fromkeys((winner(records), LITERAL)):
        rows["Paper Table 2's ordering"][reading] = WORDS[ordering(differences(records, "testing", reading)).holds]
        direction = realized_residual.decide(gains(records, "testing", reading))
        rows["Paper Fig. 4's direction"][reading] = WORDS[direction.holds]
    frame = pd.DataFrame([{"reproduced": question} | found for question, found in rows.items()])
    return comparison.labelled(frame, records)


def judge(records: pd.DataFrame) -> dict[str, Any]:
    """The claim, a reading reproduces Table 2's ordering and Figure 4's direction: holds if the chosen one does both on
    the records for testing; does not hold if it contradicts one there; inconclusive otherwise. Also said:
    how it does beside the literal reading there."""
    name = winner(records)
    compared, realized = differences(records, "testing", name), gains(records, "testing", name)
    order, direction = ordering(compared), realized_residual.decide(realized)
    finer = compared[compared.metric.isin(CLAIMED)]
    weakest = finer.loc[finer.difference.idxmin()]
    told = (
        f"chosen of {len(names(records, 'choosing'))}: {name}; on held-out records the ordering is "
        f"{WORDS[order.holds]} (weakest: {with_interval(weakest.difference, weakest.low, weakest.high, 3)} nats, "
        f"{weakest.metric.replace('_', ' ')} over {weakest.method}, {weakest.dataset}), Paper Fig. 4's direction "
        f"{WORDS[direction.holds]} ({realized_residual.judge(realized)['decided_by']}); {consequence(records)}"
    )
    return all_of([order, direction]).quiet().verdict(told)


def consequence(records: pd.DataFrame) -> str:
    """How the chosen reading does beside the literal one, in words."""
    if winner(records) == LITERAL:
        return "the literal reading is itself the chosen one"
    wins = beats(against_literal(records))
    return {
        True: "it beats the literal reading there", False: "it is below the literal reading in some metric there",
        None: "it is not told apart from the literal reading there",
    }[wins]
