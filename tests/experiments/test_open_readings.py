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
from metake.experiments.cases import part_of, read_cases, select
from metake.experiments.studies import choosing
from metake.experiments.studies import open_readings as module
from metake.experiments.studies.readings import (
    ALONE,
    CHANGED,
    FEW,
    LEVELS,
    LITERAL,
    READINGS,
    SETS,
    around,
    departures,
)
from metake.experiments.studies.study import Batch, one
from metake.methods import ABLATIONS, metake, method
from metake.support.errors import ParameterError

ROOT = report.project_root()
SETTINGS = {
    "readings": ("plain gradient",), "edits": 2, "seeds": (0,), "test_edits": 2, "test_seeds": (1,),
    "text_tokens": 3000, "data": {"ZsRE format": "facts-zsre"},
}


def test_the_literal_reading_is_the_named_one_and_no_two_are_the_same():
    literal = method("metake/literal", "tiny").refine
    assert READINGS[LITERAL].rule("tiny") == replace(literal, keep="best")
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
    parts = {part: part_of(cases, part) for part in ("choosing", "testing")}
    subjects = [{c.request.subject for c in own} for own in parts.values()]
    assert not subjects[0] & subjects[1] and sum(map(len, parts.values())) == len(cases)
    assert min(map(len, parts.values())) > 0.4 * len(cases)
    other = part_of(read_cases("facts" if source == "facts-zsre" else "facts-zsre"), "testing")
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
    asked = {LITERAL, "plain gradient"}
    best = choosing.best(records[records.reading.isin({*asked, module.SHARED})])
    assert set(choosing.names(records, "choosing")) == asked | set(around(best))
    assert set(choosing.names(records, "testing")) == {LITERAL, choosing.best(records)}
    ids = [set(records.id[records.part == part]) for part in ("choosing", "testing")]
    assert len(ids[0]) == len(ids[1]) == 2 and not ids[0] & ids[1]
    full = metake("tiny")
    given = mk.statistics(lm, layers=full.layers, tokens=3000)
    batch = Batch.of(lm, given, select(lm, part_of(read_cases("facts-zsre"), "choosing"), 2, 0))
    plain = replace(full, refine=READINGS["plain gradient"].rule("tiny"))
    own = records[(records.part == "choosing") & (records.reading == "plain gradient") & (records.method == "metake")]
    expected = pd.DataFrame(one(batch, plain))
    pd.testing.assert_frame_equal(own[list(expected)].reset_index(drop=True), expected, rtol=1e-9)
    batch = Batch.of(lm, given, select(lm, part_of(read_cases("facts-zsre"), "testing"), 2, 1))
    literal = ABLATIONS[module.KEY_ONLY](replace(full, refine=READINGS[LITERAL].rule("tiny")))
    own = records[(records.part == "testing") & (records.reading == LITERAL) & (records.method == module.KEY_ONLY)]
    expected = pd.DataFrame(one(batch, literal))
    pd.testing.assert_frame_equal(own[list(expected)].reset_index(drop=True), expected, rtol=1e-9)


def test_what_every_reading_shares_does_not_depend_on_it(lm, records):
    """A stopped gradient leaves the anchor's alone, zero where it starts: no optimizer, step size or norm moves the
    plan.
    """
    shared = records[(records.part == "testing") & (records.reading == module.SHARED)]
    assert set(shared.method) == {module.NO_REFINEMENT, module.STOPPED} and (shared.moved < 1e-12).all()
    full = metake("tiny")
    batch = Batch.of(
        lm, mk.statistics(lm, layers=full.layers, tokens=3000),
        select(lm, part_of(read_cases("facts-zsre"), "testing"), 2, 1)
    )
    for name in ("plain 1, relative", "Adam 0.5, mean, eq. 98"):
        stopped = ABLATIONS[module.STOPPED](replace(full, refine=READINGS[name].rule("tiny")))
        assert np.allclose(pd.DataFrame(one(batch, stopped)).log_p, shared.log_p[shared.method == module.NO_REFINEMENT])


def test_the_page_can_be_computed_from_what_the_experiment_returns(records):
    found = module.summary(records)
    assert set(found.reading) == set(choosing.names(records, "choosing")) and (found.requests == 2).all()
    own = records[(records.part == "choosing") & (records.reading == LITERAL)].set_index("id").edited
    plain = records[(records.part == "choosing") & (records.method == module.NO_REFINEMENT)].set_index("id").edited
    row = found[found.reading == LITERAL].iloc[0]
    assert row.edited == pytest.approx(own.mean()) and row.gain == pytest.approx((own / plain).median())
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
            where = {"part": part, "dataset": dataset, "seed": seed, "id": f"{seed}/{i}"}
            flat = {
                "efficacy": 1.0, "generalization": 0.5, "specificity": 0.5, "log_p": -1.0, "log_p_paraphrase": -2.0,
                "moved": 0.1, "outer_before": 2.0, "anchor_after": 0.1, "edited": 1.0
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


def with_loss(records: pd.DataFrame, edited: dict[str, float], fell: dict[str, float] | None = None) -> pd.DataFrame:
    """`made` with other losses of the edited model, and other shares of requests whose own loss fell."""
    own = records.assign(edited=records.reading.map(edited).fillna(1.0))
    for name, share in (fell or {}).items():
        rows = own.index[(own.reading == name) & (own.method == "metake") & (own.part == "choosing")]
        own.loc[rows[round(share * len(rows)) :], "outer_after"] = 2.5
    return own


@pytest.mark.parametrize("edited, fell, chosen", [
    ({LITERAL: 0.5, "plain gradient": 0.6}, {LITERAL: 0.9}, "plain gradient"),  # what raises its own loss is out
    ({LITERAL: 0.5, "plain gradient": 0.6}, {LITERAL: 0.95}, LITERAL),
    ({LITERAL: 0.5, "plain gradient": 0.4}, {}, "plain gradient"),  # the lowest of the edited model
    ({LITERAL: 0.5, "plain gradient": 0.497, "edit loss, plain prompt": 0.501}, {}, "edit loss, plain prompt"),
    ({LITERAL: 0.5, "plain gradient": 0.497, "edit loss, plain prompt": 0.51}, {}, "plain gradient"),
    ({LITERAL: 0.5, "plain gradient": 0.4}, {LITERAL: 0.0, "plain gradient": 0.5}, LITERAL),  # none descends
])  # fmt: skip
def test_the_rule_asks_for_descent_then_for_the_edited_model_then_for_the_words(edited, fell, chosen):
    records = with_loss(made(dict.fromkeys(edited, BOTH), {n: BELOW for n in edited}), edited, fell)
    assert choosing.best(records) == chosen
    table = choosing.choice(records).set_index("reading")
    assert table.chosen.sum() == 1 and table.index[0] == chosen
    for name, share in fell.items():
        assert table.fell[name] == pytest.approx(100 * share) and table.descends[name] == (share >= 0.95)


def test_every_model_and_format_counts():
    """A reading that fails on one is out; the loss is a geometric mean; what one frame lacks is not chosen."""
    names = (LITERAL, "plain gradient", "anchor, relative")
    one_, two = (made(dict.fromkeys(names, BOTH), datasets=("F", "G")) for _ in range(2))
    one_ = with_loss(one_, {LITERAL: 4.0, "plain gradient": 1.0, "anchor, relative": 0.1})
    two = with_loss(two, {LITERAL: 0.1, "plain gradient": 1.0, "anchor, relative": 1.0}, {"anchor, relative": 0.9})
    assert choosing.best(one_) == "anchor, relative" and choosing.best(one_, two) == LITERAL
    table = choosing.choice(one_, two).set_index("reading")
    assert table.edited[LITERAL] == pytest.approx(0.4**0.5) and not table.descends["anchor, relative"]
    assert choosing.best(one_, two[two.reading != LITERAL]) == "plain gradient"


def test_no_metric_enters_the_choice():
    records = with_loss(made({LITERAL: BOTH, "plain gradient": BELOW}), {LITERAL: 0.5, "plain gradient": 0.4})
    spoiled = records.assign(**dict.fromkeys((*module.SHARES, *module.CLAIMED), 0.0))
    assert choosing.best(records) == choosing.best(spoiled) == "plain gradient"


def test_nearness_to_the_words_counts_what_departs_from_them():
    found = {name: departures(name) for name in READINGS}
    assert found[LITERAL] == 3 and found["edit loss, plain prompt"] == found["literal, eq. 98"] + 1 == 2
    assert found["literal, plain prompt, eq. 98"] == 0 and found["anchor, relative"] == 4
    assert found["plain gradient"] == found["step size 0.5"] == found[LITERAL], "left open: no departure"


def test_what_stands_around_a_reading_differs_in_prompts_and_drift_alone():
    for name in SETS["words"]:
        near = around(name)
        assert len(near) == 3 and name not in near
        changed = {k for n in near for k, v in READINGS[n].settings.items() if v != READINGS[name].settings[k]}
        assert changed == {"prompts", "locality_direction", "locality_position"}


def test_the_library_takes_the_reading_that_the_recordings_choose():
    """Of the models that are recorded, all at once: the fields of `metake` are those of the chosen one."""
    frames = [report.recorded(path.stem) for path in sorted((ROOT / "results").glob("open_readings-*.jsonl"))]
    assert {frame.attrs["provenance"]["model"] for frame in frames} == {"tiny", "smollm2-135m"}
    assert READINGS[choosing.best(*frames)].rule("gpt2-xl") == metake("gpt2-xl").refine


@pytest.mark.parametrize("tested, holds, words", [
    (BOTH, True, "beats the literal reading"),
    (BELOW, False, "below the literal reading"),
    ((0.2, 0.3, 0.0, 0.0, 1.0), False, "beats"),  # the share does not rise
    (NONE, False, "not told apart"),
    ((0.2, 0.0, 0.1, 0.0, 1.0), None, "beats"),
    ((0.2, 0.3, 0.1, -0.3, 1.0), True, "below the literal reading"),  # pays with specificity
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
        and "itself the chosen one" in module.consequence(records)
        and module.judge(records)["holds"] is True
    )
    assert (module.against_literal(records).difference == 0).all()


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
