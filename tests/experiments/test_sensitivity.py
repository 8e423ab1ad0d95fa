"""The outer level's numbers, one changed at a time: what is compared with what, and what the verdict follows."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from models import stand_in

import metake as mk
from metake import methods, report
from metake.editing.targets import TargetRule, optimize_targets
from metake.experiments.cases import read_cases, select
from metake.experiments.studies import sensitivity as module
from metake.experiments.studies import study
from metake.support.errors import ParameterError

RULE = TargetRule(steps=4, step_size=0.5, clamp=2.0)
CONTEXTS = ("{}", "So. {}")
SWEPT = {"steps": (1, 15), "adam": (1e-3, 0.1), "plain": (0.01, 0.1, 0.5)}


@pytest.fixture(scope="module")
def full():
    return methods.method("metake/literal", "tiny", target=RULE, contexts=CONTEXTS)


@pytest.fixture(scope="module")
def records(full):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "load", stand_in)
        patch.setattr(module.methods, "method", lambda name, model: full)
        return module.sensitivity("tiny", **SWEPT, data={"Z": "facts-zsre"}, edits=3)


def test_one_number_changes_at_a_time(full, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        module, "study",
        lambda model, editors, **settings: (
            asked.update(editors) or pd.DataFrame({"method": list(editors), "edits": settings["edits"]})
        )
    )
    found = module.sensitivity("tiny", edits=7)
    assert len(asked) == 11 and len(found) == 12, "the default stands in two sweeps and is computed once"
    rule = methods.method("metake/literal", "tiny").refine
    assert asked["Adam η = 0.1, T = 15"].refine == rule and asked["Adam η = 0.1, T = 5"].refine == replace(
        rule, steps=5
    )
    assert asked["plain η = 0.5, T = 15"].refine == replace(
        rule, optimizer="sgd", anchor_norm="relative", step_size=0.5
    )
    assert found[found.default].set_index("sweep").value.to_dict() == {"steps": 15, "adam": 0.1, "plain": 0.5} and set(
        found.edits
    ) == {7}


def test_a_sweep_without_its_default_is_refused():
    with pytest.raises(ParameterError, match="measured against 15"):
        module.sensitivity("tiny", steps=(5, 10))


def test_the_outer_objective_is_told_at_both_ends(records, full):
    """Before: the first losses of the trace; after: those of the plan that the edit was solved for."""
    lm = stand_in()
    cases = select(lm, read_cases("facts-zsre"), 3, 0)
    requests = [c.request for c in cases]
    state = full.init(lm, mk.statistics(lm, layers=full.layers))
    edit, _ = full.step(lm, requests, state)
    found = records[(records.sweep == "adam") & records.default].set_index("id")
    plan = optimize_targets(lm, requests, CONTEXTS, full.layers[-1], RULE)
    value = study.refined(edit, full, plan)
    for i, request in enumerate(requests):
        first = edit.record.trace[request.id]["refine"][0]
        assert found.outer_before[request.id] == pytest.approx(sum(first.values()), rel=1e-9)
        assert found.anchor_after[request.id] == pytest.approx(
            (value[i] - plan.value[i]).square().sum().item(), rel=1e-6
        )
    assert records.groupby("id").outer_before.agg(lambda x: x.max() - x.min()).max() < 1e-9, (
        "every setting starts at the same plan"
    )
    short = records[(records.sweep == "plain") & (records.value == 0.01)]
    assert short.outer_after.sum() < short.outer_before.sum(), "short plain steps descend"


def test_a_larger_step_moves_the_plan_farther(records):
    moved = records.groupby(["sweep", "value"]).moved.median()
    assert moved["adam", 1e-3] < moved["adam", 0.1] and moved["plain", 0.01] < moved["plain", 0.5]
    assert moved["steps", 15] == moved["adam", 0.1]


def test_effects_and_the_drawing(records):
    effects = module.effects(records)
    assert len(effects) == 7 and effects.default.sum() == 3
    own = records[(records.sweep == "plain") & (records.value == 0.1)]
    row = effects[(effects.sweep == "plain") & (effects.value == 0.1)].iloc[0]
    assert row["after / before"] == pytest.approx(own.outer_after.sum() / own.outer_before.sum())
    assert row["log p"] == pytest.approx(own.log_p.mean()) and row["moved, %"] == pytest.approx(
        100 * own.moved.median()
    )
    figure = report.sensitivity_curves(effects, module.SWEEPS)
    assert "plan moved" in figure.alt and len(figure.data) == 7


def told(shift: float = 0.0, requests: int = 100, value: float = 5.0) -> pd.DataFrame:
    """One other setting of T beside the default; `shift`: of its efficacy, in requests."""
    rows = []
    for other in (False, True):
        for i in range(requests):
            success = i < 50 + shift * other
            rows.append({"dataset": "Z", "sweep": "steps", "value": value if other else 15.0, "default": not other,
            "seed": 0, "id": str(i), "method": str(other),
                         "efficacy": float(success), "generalization": float(success), "specificity": 0.5,
                         "log_p": -1.0 - 0.1 * other, "moved": 0.1})  # fmt: skip
    return pd.DataFrame(rows)


def test_differences_are_setting_minus_default():
    found = module.differences(told(-10)).set_index("measure")
    assert found.difference.to_dict() == pytest.approx(
        {"efficacy": -10, "generalization": -10, "specificity": 0, "trade_off": -20 / 3, "log_p": -0.1}
    )
    assert found.high["efficacy"] < 0 and (found.requests == 100).all() and (found.value == 5).all()
    wide = module.wide(module.differences(told(-10)))
    assert len(wide) == 1 and wide.efficacy.iloc[0].startswith("-10.0 [") and wide.sweep.iloc[0] == "look-ahead steps T"


@pytest.mark.parametrize("shift, requests, holds, robust", [
    (0, 100, None, "yes"),  # nothing differs: robust, and no setting is the best
    (0, 20, None, "open"),  # nothing differs among too few to tell
    (-20, 2000, True, "yes"),  # a little worse, which 2000 requests show
    (-30, 100, False, "no"),  # the default is best, and far from robust
    (20, 2000, False, "yes"),  # a little better than the default
])  # fmt: skip
def test_the_verdict_follows_both_claims(shift, requests, holds, robust):
    found = module.judge(module.differences(told(shift, requests)))
    assert found["holds"] is holds and found["decided_by"].startswith(f"robust: {robust}")


def test_the_papers_own_table_as_differences():
    found = module.reported(report.paper("table3"))
    default = found[found.setting.str.contains("default")]
    assert (default[[f"{s} − default" for s in module.SCORES]] == 0).all(axis=None) and found.attrs[
        "label"
    ] == "reported"
    best = found[found.best].set_index(["parameter", "model"]).setting
    assert set(best["steps"]) == {"15 (default)"}
    assert best["step size"].to_dict() == {
        "GPT2-XL": "fourth", "GPT-J": "third (default)", "LLaMA3": "third (default)"
    }, "by the mean of the three"
