"""What the paper leaves open: the readings, the two parts of the records, the choice, and what is said of it on
held-out records.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
from models import stand_in
from same import fingerprint

import metake as mk
from metake import report
from metake.experiments.runs import read_cases, select
from metake.experiments.studies import open_readings as module
from metake.experiments.studies.readings import ALONE, CHANGED, FEW, LEVELS, LITERAL, READINGS, SETS
from metake.experiments.studies.study import Batch, one
from metake.methods import ABLATIONS, metake
from metake.support.errors import ParameterError

SETTINGS = {
    "readings": ("plain gradient",), "edits": 2, "seeds": (0,), "test_edits": 2, "test_seeds": (1,),
    "text_tokens": 3000
}


def test_the_literal_reading_is_the_default_and_no_two_are_the_same():
    literal = metake("tiny").refine
    assert READINGS[LITERAL].settings == {name: getattr(literal, name) for name in CHANGED}
    told = [tuple(reading.settings.items()) for reading in READINGS.values()]
    assert len(set(told)) == len(told) and set(FEW) < set(READINGS) and SETS["few"][0] == SETS["all"][0] == LITERAL
    assert {field for reading in READINGS.values() for field in reading.changes} == set(CHANGED)


def test_one_thing_is_changed_at_a_time_and_the_small_factorial_is_complete():
    literal = READINGS[LITERAL].settings
    for name, reading in ALONE.items():
        assert sum(value != literal[field] for field, value in reading.settings.items()) == (name != LITERAL), name
    found = [
        tuple(r.settings[k] for k in LEVELS)
        for r in FEW.values()
        if all(v == literal[k] for k, v in r.settings.items() if k not in LEVELS)
    ]
    assert set(product(*LEVELS.values())) <= set(found)


@pytest.mark.parametrize("source", ["facts", "facts-zsre"])
def test_no_subject_is_in_both_parts(source):
    cases = read_cases(source)
    parts = {part: module.part_of(cases, part) for part in ("choosing", "testing")}
    subjects = [{c.request.subject for c in own} for own in parts.values()]
    assert not subjects[0] & subjects[1] and sum(map(len, parts.values())) == len(cases)
    assert min(map(len, parts.values())) > 0.4 * len(cases)
    other = module.part_of(read_cases("facts" if source == "facts-zsre" else "facts-zsre"), "testing")
    assert {c.request.subject for c in other} == subjects[1], "a fact has one part, whatever its format"


@pytest.fixture(scope="module")
def lm():
    return stand_in()


@pytest.fixture(scope="module")
def records(lm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load", lambda *_: lm)
        before = fingerprint(lm.model)
        found = module.open_readings(**SETTINGS)
        assert fingerprint(lm.model) == before
    return found


def test_rows_are_what_each_editor_gives_alone(lm, records):
    assert (
        module.names(records, "choosing") == [LITERAL, "plain gradient"]
        and module.names(records, "testing")[0] == LITERAL
    )
    ids = [set(records.id[records.part == part]) for part in ("choosing", "testing")]
    assert len(ids[0]) == len(ids[1]) == 2 and not ids[0] & ids[1]
    full = metake("tiny")
    given = mk.statistics(lm, layers=full.layers, tokens=3000)
    batch = Batch.of(lm, given, select(lm, module.part_of(read_cases("facts-zsre"), "choosing"), 2, 0))
    plain = replace(full, refine=replace(full.refine, optimizer="sgd"))
    for method, editor in (("metake", plain), (module.KEY_ONLY, ABLATIONS[module.KEY_ONLY](plain))):
        own = records[(records.part == "choosing") & (records.reading == "plain gradient") & (records.method == method)]
        expected = pd.DataFrame(one(batch, editor, outer=True))
        pd.testing.assert_frame_equal(own[list(expected)].reset_index(drop=True), expected, rtol=1e-9)


def test_what_every_reading_shares_does_not_depend_on_it(lm, records):
    """A stopped gradient leaves the anchor's alone, zero where it starts: no optimizer, step size or norm moves the
    plan.
    """
    shared = records[(records.part == "choosing") & (records.reading == module.SHARED)]
    assert set(shared.method) == {module.NO_REFINEMENT, module.STOPPED} and (shared.moved < 1e-12).all()
    full = metake("tiny")
    batch = Batch.of(
        lm, mk.statistics(lm, layers=full.layers, tokens=3000),
        select(lm, module.part_of(read_cases("facts-zsre"), "choosing"), 2, 0)
    )
    for name in ("plain 1, relative", "anchor, half"):
        stopped = ABLATIONS[module.STOPPED](replace(full, refine=replace(full.refine, **READINGS[name].changes)))
        assert np.allclose(pd.DataFrame(one(batch, stopped)).log_p, shared.log_p[shared.method == module.NO_REFINEMENT])


def test_the_page_can_be_computed_from_what_the_experiment_returns(records):
    found = module.summary(records)
    assert list(found.reading) == [LITERAL, "plain gradient"] and (found.requests == 2).all()
    assert found.change.to_numpy() == pytest.approx((found.outer_after / found.outer_before).to_numpy())
    assert module.effects(records).empty, "two readings are no factorial design"
    assert len(module.answers(records)) == 2 and module.judge(records)["holds"] in (True, False, None)


def test_unknown_readings_and_common_seeds_are_refused():
    with pytest.raises(ParameterError, match="Did you mean 'plain gradient'"):
        module.open_readings(readings=["plain gradiant"])
    with pytest.raises(ParameterError, match="must differ; found 1 in both"):
        module.open_readings(seeds=(0, 1), test_seeds=(1, 2))


def made(
    choosing: dict[str, tuple[float, ...]], testing: dict[str, tuple[float, ...]] | None = None, noise: float = 0.0,
    datasets: tuple[str, ...] = ("F",)
) -> pd.DataFrame:
    """Twenty requests. A reading: how far its full method lies above all ablations in log p,
    in log p after paraphrases and in β̂, and above AlphaEdit in specificity; what its outer loss, which begins at 2,
    becomes.
    """
    rows, draw = [], np.random.default_rng(0)
    wobble = noise * draw.standard_normal(20)
    for part, readings in (("choosing", choosing), ("testing", testing or {})):
        for dataset, seed, i in product(datasets, (0, 1), range(10)):
            where = {"part": part, "dataset": dataset, "seed": seed, "id": f"{i}"}
            flat = {
                "efficacy": 1.0, "generalization": 0.5, "specificity": 0.5, "log_p": -1.0, "log_p_paraphrase": -2.0,
                "moved": 0.1, "outer_before": 2.0, "anchor_after": 0.1
            }
            flat |= dict.fromkeys(module.realized_residual.READINGS, 0.8)
            rows += [
                where | {"reading": module.SHARED, "method": m, "outer_after": np.nan} | flat
                for m in (module.NO_REFINEMENT, module.STOPPED)
            ]
            for name, (first, second, realized, specificity, after) in readings.items():
                own = flat | {
                    "log_p": -1 + first + wobble[10 * seed + i],
                    "log_p_paraphrase": -2 + second + wobble[10 * seed + i], "whole_initial": 0.8 + realized,
                    "specificity": 0.5 + specificity, "outer_after": after
                }
                rows += [
                    where | {"reading": name, "method": "metake"} | own,
                    where | {"reading": name, "method": module.KEY_ONLY, "outer_after": after} | flat,
                ]
    return pd.DataFrame(rows)


BOTH, NONE, BELOW = (0.2, 0.3, 0.1, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0, 2.2), (-0.2, 0.3, 0.1, 0.0, 1.0)


@pytest.mark.parametrize("values, noise, says", [
    (BOTH, 0.0, True), (BELOW, 0.0, False), (NONE, 0.0, None), ((0.2, 0.0, 0.1, 0.0, 1.0), 0.0, None),
    (BOTH, 3.0, None), (BOTH, 0.05, True),
])  # fmt: skip
def test_the_ordering_follows_the_intervals(values, noise, says):
    assert module.ordering(module.differences(made({LITERAL: values}, noise=noise), "choosing", LITERAL)).holds is says


def test_a_share_below_an_ablation_contradicts_the_ordering_and_specificity_does_not():
    records = made({LITERAL: BOTH})
    full = records.method == "metake"
    for metric, says in (("specificity", True), ("generalization", False)):
        spoiled = records.assign(**{metric: records[metric].where(~full, 0.2)})
        assert module.ordering(module.differences(spoiled, "choosing", LITERAL)).holds is says


@pytest.mark.parametrize("readings, chosen", [
    ({LITERAL: NONE, "plain gradient": BOTH}, "plain gradient"),
    # one claim and one open, against one and one contradicted
    ({LITERAL: (0.0, 0.1, 0.1, 0.0, 2.2), "plain gradient": BELOW}, LITERAL),
    # of equal ones the larger gain
    ({LITERAL: BOTH, "anchor, relative": (0.2, 0.9, 0.1, 0.0, 1.0)}, "anchor, relative"),
    ({LITERAL: (0.2, 0.9, 0.0, 0.0, 1.0), "anchor, relative": BOTH}, "anchor, relative"),
])  # fmt: skip
def test_the_choice_counts_claims_then_gains(readings, chosen):
    assert module.best(made(readings)) == chosen


def test_the_choice_does_not_see_the_records_for_testing():
    readings = {LITERAL: NONE, "plain gradient": BOTH}
    assert module.best(made(readings, {LITERAL: BOTH, "plain gradient": BELOW})) == "plain gradient"


@pytest.mark.parametrize("tested, holds, words", [
    (BOTH, True, "candidate for the default"),
    (BELOW, False, "default stays"),
    ((0.2, 0.3, 0.0, 0.0, 1.0), False, "candidate"),  # the share does not rise
    (NONE, False, "not told apart"),
    ((0.2, 0.0, 0.1, 0.0, 1.0), None, "candidate"),
    ((0.2, 0.3, 0.1, -0.3, 1.0), True, "below the literal default"),  # pays with specificity
])  # fmt: skip
def test_the_verdict_is_on_held_out_records(tested, holds, words):
    found = module.judge(made({LITERAL: NONE, "plain gradient": BOTH}, {LITERAL: NONE, "plain gradient": tested}))
    assert (
        found["holds"] is holds
        and words in found["decided_by"]
        and "chosen of 2: plain gradient" in found["decided_by"]
    )


def test_one_interval_in_a_dozen_beside_zero_contradicts_nothing():
    """What 95 % alone would call below, all of them together do not."""
    found = module.differences(made({LITERAL: (-0.025, 0.3, 0.1, 0.0, 1.0)}, noise=0.1), "choosing", LITERAL).set_index(
        ["metric", "method"]
    )
    one = found.loc["log_p", module.NO_REFINEMENT]
    assert one.high < 0 and not one.below and module.ordering(found.reset_index()).holds is None


def test_a_literal_winner_is_said_to_be_one():
    records = made({LITERAL: BOTH}, {LITERAL: BOTH})
    assert (
        module.winner(records) == LITERAL
        and "itself the best" in module.consequence(records)
        and module.judge(records)["holds"] is True
    )
    assert (module.against_default(records).difference == 0).all()


def test_a_claim_must_hold_on_every_data_set():
    records = made({LITERAL: BOTH}, {LITERAL: BOTH}, datasets=("F", "G"))
    spoiled = (records.dataset == "G") & (records.method == "metake") & (records.part == "testing")
    assert module.judge(records)["holds"] is True
    assert module.judge(records.assign(log_p=records.log_p.where(~spoiled, -3.0)))["holds"] is False


def test_effects_are_recovered_from_the_factorial():
    def at(optimizer, step, norm):
        return (
            0.0, 0.1 * (optimizer == "sgd") + 0.03 * (step == 0.5), 0.0, 0.0,
            2.0 * 2.0 ** (3 * (step == 0.5) - (norm == "relative"))
        )

    cells = {
        n: at(*(r.settings[k] for k in LEVELS))
        for n, r in FEW.items()
        if all(r.settings[k] == v for k, v in READINGS[LITERAL].settings.items() if k not in LEVELS)
    }
    cells = {n: v for n, v in cells.items() if all(READINGS[n].settings[k] in levels for k, levels in LEVELS.items())}
    assert len(cells) == 8
    found = module.effects(made(cells | {"anchor, mean": (9.0, 9.0, 9.0, 0.0, 9.0)})).set_index("factor")
    assert found.outer.to_dict() == pytest.approx({"optimizer": 0, "step size": 3, "anchor norm": -1})
    assert found.paraphrase.to_dict() == pytest.approx(
        {"optimizer": 0.1, "step size": 0.03, "anchor norm": 0}, abs=1e-12
    )
    assert module.effects(made({n: v for n, v in cells.items() if n != LITERAL})).empty


def test_the_drawing_has_a_row_per_reading_and_fills_what_is_clear():
    found = module.summary(
        made(
            {LITERAL: NONE, "step size 0.5": (0.0, -0.3, 0.0, 0.0, 40.0), "anchor, relative": BOTH}, datasets=("F", "G")
        )
    )
    drawn = report.reading_dots(found, name="test_readings")
    assert all(f">{name}<" in drawn.svg["light"] for name in found.reading) and "falls for 2 of 6" in drawn.alt
    assert drawn.summary.reading.tolist() == [n for n in found.reading] and drawn.data is found
    with pytest.raises(ParameterError, match="no column change"):
        report.reading_dots(found.drop(columns="change"))
