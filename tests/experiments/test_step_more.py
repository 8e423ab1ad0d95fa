"""The gradient family at equal specificity: curves, their differences, the choices of a training, and the claims."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

import metake as mk
from metake import report
from metake.editing.gradient.trained import to_train
from metake.experiments.cases import part_of, read_cases, select
from metake.experiments.studies import norm_or_kl, step_more
from metake.experiments.studies import training_choices as choices
from metake.experiments.studies.frontier import LEVEL, SCORES, Curves, Variant, scaled, scores, swept
from metake.support.errors import NumericalError, ParameterError

SMALL = {"rank": 3, "edits": 2}


def made(variant: Variant, height: float, noise: float = 0.0, seeds: int = 3, facts: int = 40) -> pd.DataFrame:
    """Records whose specificity falls from 100 to 50 as efficacy rises to 100, and generalization to `height`."""
    generator, rows = np.random.default_rng(len(step_more.label(variant))), []
    for seed in range(seeds):
        for factor, t in zip((0.5, 0.7, 1.0, 1.4, 2.0), np.linspace(0, 1, 5), strict=True):
            level = {"efficacy": t, "generalization": t * height, "specificity": 1 - t / 2}
            for i in range(facts):
                own = {k: float(np.clip(v + noise * generator.normal(), 0, 1)) for k, v in level.items()}
                rows.append({"variant": step_more.label(variant), **variant._asdict(), "seed": seed, "factor": factor,
                             "id": str(i), **own})  # fmt: skip
    return pd.DataFrame(rows)


def of_all(heights: dict[Variant, float], noise: float = 0.02) -> pd.DataFrame:
    return pd.concat([made(v, h, noise) for v, h in heights.items()], ignore_index=True)


def test_a_score_is_read_where_the_curve_crosses_the_level():
    one = Variant(1, "kl", "network", 60)
    curves = Curves(made(one, 0.6))
    name = step_more.label(one)
    assert curves.at(name, 80, "efficacy") == pytest.approx(40)
    assert curves.at(name, 80, "generalization") == pytest.approx(24)
    assert curves.at(name, 90, "specificity", by="efficacy") == pytest.approx(55)
    assert np.isnan(curves.at(name, 40, "efficacy"))  # it never falls so far
    assert (curves.mean(name).set_index("factor").loc[1.0, list(SCORES)] == [50, 30, 75]).all()


def test_the_order_of_records_is_no_matter_and_a_plateau_is_read_at_its_first_point():
    one = Variant(1, "kl", "network", 60)
    records, name = made(one, 0.6), step_more.label(one)
    mixed = records.sample(frac=1, random_state=0)
    assert Curves(mixed).at(name, 80, "generalization") == pytest.approx(Curves(records).at(name, 80, "generalization"))
    records.loc[records.factor >= 1.0, "specificity"] = 0.75
    assert Curves(records).at(name, 75, "efficacy") == pytest.approx(50)


def test_as_trained_is_the_mean_over_seeds_at_the_editors_own_step():
    records = made(Variant(1, "kl", "network", 60), 0.6)
    records.loc[(records.seed == 0) & (records.factor == 1.0), "efficacy"] = 0.2
    found = step_more.as_trained(records).iloc[0]
    assert found.efficacy == pytest.approx(40) and found["efficacy, sd"] == pytest.approx(np.std([20, 50, 50], ddof=1))
    assert found.specificity == pytest.approx(75) and found["specificity, sd"] == pytest.approx(0, abs=1e-9)


def test_differences_at_equal_specificity_have_intervals_that_hold_them():
    two, one = Variant(2, "kl", "network", 60), Variant(1, "kl", "network", 60)
    found = step_more.compared(of_all({one: 0.4, two: 0.9}, 0.1), "more steps").set_index("metric")
    assert found.difference["generalization"] == pytest.approx(20, abs=4)
    assert (found.low <= found.difference).all() and (found.difference <= found.high).all()
    assert found.low["generalization"] > 0 and found.low["efficacy"] < 0 < found.high["efficacy"]
    same = step_more.compared(of_all({one: 0.4, two: 0.4}, 0.1), "more steps")
    assert ((same.low < 0) & (same.high > 0)).all()


@pytest.mark.parametrize("two, four, verdict", [(0.9, 0.4, True), (0.2, 0.4, False), (0.4, 0.4, None)])
def test_a_claim_holds_fails_and_stays_open(two: float, four: float, verdict: bool | None):
    heights = {Variant(j, "kl", "network", 60): h for j, h in ((1, 0.4), (2, two), (4, four))}
    found = step_more.judge(of_all(heights, 0.1), "more steps")
    assert found["holds"] is verdict and "MALMEN, 2 steps − 4: efficacy" in found["decided_by"]


def test_of_little_data_one_batch_decides():
    heights = {Variant(2, "norm", "network", 1): 0.9, Variant(2, "norm", "network", 10): 0.1,
               Variant(1, "kl", "network", 60): 0.4}  # fmt: skip
    assert step_more.judge(of_all(heights), "low data")["holds"] is True


def test_without_the_recording_claims_are_open_and_say_so():
    nothing = step_more.empty()
    for found in (step_more.judge(nothing, "low data"), norm_or_kl.as_good(nothing)):
        assert found["holds"] is None and "among the records" in found["decided_by"]


@pytest.mark.parametrize("norm, verdict", [(0.42, True), (0.05, False)])
def test_the_norm_is_as_good_within_five_points(norm: float, verdict: bool):
    records = of_all({norm_or_kl.NORM: norm, norm_or_kl.KL: 0.4})
    assert norm_or_kl.as_good(records)["holds"] is verdict
    assert set(norm_or_kl.compared(records)["where"]) == {"at a specificity of 80 %", "at an efficacy of 90 %"}


def test_variants_are_told_apart_and_every_pair_is_recorded():
    labels = [step_more.label(v) for v in step_more.RECORDED]
    assert len(set(labels)) == len(labels) and "1 step, KL, 1 batch" in labels and "untrained, 4 steps" in labels
    pairs = [pair for question in step_more.PAIRS.values() for pair in question.values()] + [*norm_or_kl.PAIRS.values()]
    assert {v for pair in pairs for v in pair} <= set(step_more.RECORDED)
    assert set(step_more.LIVE) <= set(step_more.RECORDED)


def test_scaling_the_step_scales_a_first_update_alone():
    lm, case = mk.load("tiny"), mk.facts(limit=1)[0]
    for name in ("malmen", "ultraedit"):
        editor = mk.methods.method(name, "tiny")
        usual, twice = (e.edit(lm, [case.request]).updates for e in (editor, scaled(editor, 2.0)))
        assert all(((b.delta - 2 * a.delta).norm() < 1e-5 * b.delta.norm()) for a, b in zip(usual, twice, strict=True))
    assert mk.methods.malmen("tiny").networks[0][0].step.equal(editor_of("malmen").networks[0][0].step)


def editor_of(name: str):
    """Read again: scaling must not reach the package's own."""
    return mk.methods.method(name, "tiny")


def test_scores_are_those_of_batches_on_the_unedited_model():
    lm = mk.load("tiny")
    cases = select(lm, part_of(read_cases("facts"), "testing"), 4, 0)
    editor = mk.methods.malmen("tiny")
    found = pd.DataFrame(swept(lm, editor, cases, 2, (0.5, 1.0)))
    assert found.groupby("factor").size().tolist() == [4, 4]
    with editor.edit(lm, [c.request for c in cases[2:]]).applied(lm):
        expected = mk.evaluate(lm, cases[2:]).records()
    own = found[(found.factor == 1.0)].iloc[2:]
    assert own.efficacy.tolist() == [row["efficacy"] for row in expected]
    assert own.specificity.tolist() == [row["specificity"] for row in expected]


def test_an_edit_that_breaks_the_model_counts_as_failed():
    class Broken:
        def edit(self, lm, requests):
            raise NumericalError("not finite")

    cases = mk.facts(limit=2)
    found = scores(mk.load("tiny"), Broken(), cases, 2)
    assert [row["id"] for row in found] == [c.request.id for c in cases]
    assert all(row[name] == 0 for row in found for name in SCORES)


def test_what_learns_nothing_keeps_its_parameters_and_what_learns_the_step_its_network():
    lm, cases = mk.load("tiny"), part_of(read_cases("facts"), "choosing")
    rule, modules, training = to_train("malmen", "tiny", **SMALL)
    nothing, step, network = (
        Variant(1, "kl", learns, 2).made(lm, cases, rule, modules, training).networks[0][0]
        for learns in ("nothing", "step", "network")
    )
    assert nothing.step.tolist() == pytest.approx([training.step] * 3) and not nothing.bias[0].any()
    assert step.step.tolist() != nothing.step.tolist() and not step.bias[0].any() and network.bias[0].any()
    assert nothing.table.equal(step.table) and nothing.table[0, 0] > 0


def test_rates_may_be_zero_but_not_below():
    for name in ("rate", "step_rate", "keep"):
        with pytest.raises(ParameterError, match=f"{name} must not be below 0; found -1"):
            to_train("malmen", "tiny", **{name: -1.0})
    with pytest.raises(ParameterError, match="unknown value of outer 'promt'. Did you mean 'prompt'"):
        to_train("malmen", "tiny", outer="promt")


def test_records_are_of_facts_no_training_saw_and_are_read_again(tmp_path, monkeypatch):
    asked = {"cases": 2, "factors": (1.0,), "out": tmp_path, **SMALL}
    variants = (Variant(1, "kl", "nothing", 1), Variant(2, "none", step_more.ULTRAEDIT, 0))
    found = step_more.step_more(variants=variants, **asked)
    assert set(found.variant) == {"untrained, 1 step", "UltraEdit, 2 steps"} and len(found) == 4
    assert list(found.columns) == list(step_more.COLUMNS)
    testing = {c.request.id for c in part_of(read_cases("facts"), "testing")}
    assert set(found.id) <= testing
    monkeypatch.setattr(step_more, "swept", None)  # nothing is computed twice
    pd.testing.assert_frame_equal(step_more.step_more(variants=variants, **asked), found)


def test_the_penalty_is_chosen_by_the_rule_on_facts_left_out(tmp_path):
    scores_ = [("a", 0.5, 0.6), ("a", 1.0, 0.61), ("a", 2.0, 0.605), ("a", 4.0, 0.3), ("b", 0.5, 0.0), ("b", 1.0, 0.2),
               ("c", 0.5, 0.9), ("c", 1.0, 0.6)]  # fmt: skip
    rows = [{"method": m, "weight": w, "id": "1", **dict.fromkeys(SCORES, v)} for m, w, v in scores_]
    rows[-2]["specificity"] = 0.5  # higher harmonic mean, but under the floor
    records = pd.concat([pd.DataFrame(rows).assign(seed=seed) for seed in (0, 1)], ignore_index=True)
    table = choices.choice(records)
    assert dict(table[table.chosen][["method", "weight"]].to_numpy()) == {"a": 2.0, "b": 1.0, "c": 1.0}
    found = choices.penalty(names=("malmen",), weights=(0.5,), seeds=(0,), held=3, out=tmp_path, steps=1, **SMALL)
    lm, cases = mk.load("tiny"), part_of(read_cases("facts"), "choosing")
    assert set(found.id) == {c.request.id for c in select(lm, cases, 3, 0)} and len(found) == 3
    prompts = choices.outer_prompts(seeds=(0,), held=2, steps=1, accumulate=1, rank=3)
    assert list(choices.summarize(prompts).outer) == ["both", "prompt", "paraphrase"]


def test_a_training_step_with_the_norm_is_counted_cheaper_and_the_count_repeats():
    counted = norm_or_kl.operations(batches=2, edits=2, steps=(1,))
    pd.testing.assert_frame_equal(counted, norm_or_kl.operations(batches=2, edits=2, steps=(1,)))
    found = norm_or_kl.ratios(counted)
    wide = counted.pivot(index="batch", columns="penalty", values="operations")
    assert found["norm / KL"].tolist() == pytest.approx([(wide.norm / wide.kl).mean()]) and (wide.norm < wide.kl).all()
    equal = counted.assign(operations=1.0 + 0.01 * counted.batch)
    assert norm_or_kl.cheaper(equal)["holds"] is None
    assert norm_or_kl.cheaper(equal.assign(operations=equal.operations + (equal.penalty == "norm")))["holds"] is False


def test_the_figure_has_a_curve_a_variant(tmp_path, monkeypatch):
    monkeypatch.setenv("METAKE_FIGURES", str(tmp_path))
    records = of_all({Variant(1, "kl", "nothing", 3): 0.4, Variant(2, "norm", "network", 60): 0.5})
    drawn = report.frontier_curves(records, name="try")
    assert drawn.data.variant.nunique() == 2 and "2 steps, norm, 60 batches" in drawn.alt
    assert (tmp_path / "try.csv").is_file()
    many = of_all({v: 0.4 for v in step_more.RECORDED if v.learns == "network"}).query("seed == 0")
    lines = report.frontier_curves(step_more.low_data(many), name="many").svg["light"]
    assert len(set(re.findall(r"stroke: (#(?!1f2328|ffffff)[0-9a-f]{6})", lines))) >= 6, "a color a curve"
    only = report.frontier_curves(records, ["untrained, 1 step"], LEVEL, name="one")
    assert set(only.data.variant) == {"untrained, 1 step"}
    with pytest.raises(ParameterError, match="no records to draw"):
        report.frontier_curves(records, ["another"])
