"""The KL sweep: who is in which group, that sharing Stage I changes nothing, and what the verdict follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from models import stand_in

import metake as mk
from metake import methods, report
from metake.editing.diagnosis import diagnose
from metake.editing.targets import TargetRule
from metake.experiments import runs
from metake.experiments.cases import read_cases, select
from metake.experiments.studies import kl_claims, study
from metake.experiments.studies import kl_strength as kl
from metake.support.errors import ParameterError

RULE = TargetRule(steps=4, step_size=0.5, clamp=2.0)
CONTEXTS = ("{}", "So. {}")
SIZES = {"pool": 6, "share": 1 / 3, "octaves": (0, 3)}


def made(name: str, model: str = "tiny"):
    changes = {"target": RULE, "contexts": CONTEXTS}
    editor = methods.METHODS[name](model, **changes)
    return replace(editor, refine=replace(editor.refine, steps=2)) if editor.refine else editor


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kl, "load", stand_in)
        patch.setattr(kl.methods, "method", made)
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def records(small, folder):
    return kl.kl_strength("tiny", **SIZES, out=folder)


def test_a_row_per_method_group_weight_and_request(records):
    counts = records.groupby(["method", "group", "kl_weight"]).size()
    assert (counts == 2).all() and len(counts) == 3 * 2 * 3
    assert sorted(records.kl_weight.unique()) == [RULE.kl_weight / 8, RULE.kl_weight, RULE.kl_weight * 8]
    assert records.attrs["settings"] == {"requests": 6, "requests_per_group": 2, "seeds": [0]}


def test_groups_are_the_ends_of_each_methods_own_ranking(records):
    lm = stand_in()
    requests = [c.request for c in select(lm, read_cases("facts-zsre"), 6, 0)]
    for name in ("memit", "alphaedit", "metake"):
        editor = made(name)
        ranked = sorted(
            diagnose(lm, requests, editor, mk.statistics(lm, layers=editor.layers)), key=lambda d: d.association
        )
        for group, expected in (("low", ranked[:2]), ("high", ranked[-2:])):
            found = records[(records.method == name) & (records.group == group)]
            assert set(found.id) == {d.id for d in expected}


def test_each_point_is_the_edit_of_its_group_alone(records):
    """Stage I is made once for all groups of a λ_KL, which changes nothing."""
    lm = stand_in()
    cases = {c.request.id: c for c in select(lm, read_cases("facts-zsre"), 6, 0)}
    for name, group, weight in (("memit", "high", RULE.kl_weight * 8), ("metake", "low", RULE.kl_weight / 8)):
        found = records[(records.method == name) & (records.group == group) & (records.kl_weight == weight)].set_index(
            "id"
        )
        own, editor = [cases[i] for i in found.index], made(name)
        editor = replace(editor, target=replace(editor.target, kl_weight=weight))
        with editor.edit(lm, [c.request for c in own], mk.statistics(lm, layers=editor.layers)).applied(lm):
            expected = mk.evaluate(lm, own).cases
        for case in expected:
            assert found.log_p[case.id] == pytest.approx(study.likelihood(case)["log_p"], rel=1e-9)
            assert found.efficacy[case.id] == case.mean("efficacy")


def test_the_weight_reaches_stage_one(records):
    planned = records[records.method == "alphaedit"].pivot(index=["group", "id"], columns="kl_weight", values="planned")
    assert (planned.std(axis=1) > 1e-6).all()


def test_what_is_kept_is_not_computed_again(records, small, folder, monkeypatch):
    monkeypatch.setattr(runs, "optimize_targets", None)
    pd.testing.assert_frame_equal(kl.kl_strength("tiny", **SIZES, out=folder), records)


def test_log_odds_are_against_the_rival():
    case = mk.evaluate(stand_in(), mk.facts(limit=1)).cases[0]
    probe = next(p for p in case.probes if p.kind == "efficacy")
    found = study.likelihood(case)
    assert found["log_p"] == probe.target.log_p and found["log_odds"] == pytest.approx(
        probe.target.log_p - probe.rival.log_p
    )
    assert np.isnan(study.likelihood(mk.evaluate(stand_in(), mk.facts(limit=1, format="zsre")).cases[0])["log_odds"])


def test_extremes():
    assert kl.extremes([5.0, 1.0, 3.0, 2.0, 4.0], 0.4) == {"high": [0, 4], "low": [1, 3]}
    assert kl.extremes([1.0, 1.0], 0.5) == {"high": [1], "low": [0]}, "of equal γ no request is in both groups"


@pytest.mark.parametrize("changes", [{"share": 0.6}, {"share": 0.0}, {"pool": 2, "share": 0.2}])
def test_groups_that_cannot_be_formed_are_refused(changes):
    with pytest.raises(ParameterError, match="two groups"):
        kl.kl_strength("tiny", **changes)


GRID = (1.0, 2.0, 4.0)


def told(levels: dict[str, tuple], requests: int = 40) -> pd.DataFrame:
    """Shares of success at each λ_KL: method → (high group's, low group's); log p falls with λ_KL throughout."""
    rows = []
    for method, groups in levels.items():
        for group, shares in zip(("high", "low"), groups, strict=True):
            for weight, share in zip(GRID, shares, strict=True):
                for i in range(requests):
                    rows.append({"dataset": "Z", "seed": 0, "method": method, "group": group, "kl_weight": weight,
                    "id": f"{group}{i}", "efficacy": float(i < share * requests),
                                 "generalization": 0.5, "specificity": 1.0, "log_p": -weight - i,
                                 "log_p_paraphrase": -weight, "planned": 2.0, "whole": 0.5})  # fmt: skip
    return pd.DataFrame(rows)


RISING, FALLING, FLAT, HUMP, HIGH = (0.1, 0.5, 0.9), (0.9, 0.5, 0.1), (0.5, 0.5, 0.5), (0.1, 0.9, 0.1), (0.5, 1.0, 0.5)


def test_the_best_weight_is_the_first_of_equal_ones():
    found = kl.curves(told({"memit": ((0.5, 0.75, 0.75), FLAT)}))
    assert found[found.best].set_index("group").kl_weight.to_dict() == {"high": 2.0, "low": 1.0}
    best = kl.optima(told({"memit": ((0.5, 0.75, 0.75), FLAT)})).set_index("group")
    assert best.loc["high γ", ["λ*", "tied", "at λ*"]].tolist() == [2.0, 2, 75.0] and best.loc["low γ", "tied"] == 3
    assert best.loc["high γ", "span"] == pytest.approx(25)


def test_an_optimum_has_an_interval_that_narrows_with_the_sample():
    few, many = (kl.optima(told({"memit": ((0.5, 0.6, 0.5), RISING)}, n)).set_index("group") for n in (10, 1000))
    assert few.low["high γ"] < few.high["high γ"], "of ten requests one decides"
    assert many.low["low γ"] == many.high["low γ"] == 4.0


def test_shifts_are_octaves_from_the_high_to_the_low_group():
    found = kl.shifts(
        told({"memit": (FALLING, RISING), "alphaedit": (FALLING, HUMP), "metake": (HUMP, HUMP)})
    ).set_index("method")
    assert found.octaves.to_dict() == {"memit": 2.0, "alphaedit": 1.0, "metake": 0.0}
    assert found.nearer.iloc[1:].tolist() == [1.0, 1.0] and np.isnan(found.nearer.iloc[0])
    assert (found.low <= found.octaves).all() and (found.octaves <= found.high).all() and not any(found.undecided)
    assert found.gap["metake"] == pytest.approx(0) and found.gap["alphaedit"] == pytest.approx(
        100 * (1.5 / 3 - 1.1 / 3)
    )


def test_what_ties_or_the_grids_end_decide_is_said():
    found = kl.shifts(
        told({"memit": (FLAT, RISING), "alphaedit": (FALLING, FALLING), "metake": (HUMP, HUMP)})
    ).set_index("method")
    assert found.undecided.to_dict() == {"memit": "a flat curve", "alphaedit": "both at the grid's end", "metake": ""}


def test_leads_compare_the_same_requests_by_pair():
    found = kl.leads(told({"memit": (FALLING, FALLING), "metake": (FALLING, HIGH)})).iloc[0]
    assert (found.above, found.equal, found.below) == (2, 3, 1) and found.difference == pytest.approx(100 * 0.5 / 6)
    same = kl.leads(told({"memit": (FALLING, RISING), "metake": (FALLING, RISING)})).iloc[0]
    assert same.low == same.high == 0, "equal request by request, whatever is drawn"


CLAIMED = {"memit": (FALLING, RISING), "alphaedit": (FALLING, HUMP), "metake": (HIGH, HIGH)}


@pytest.mark.parametrize("levels, holds", [
    (CLAIMED, True),
    (CLAIMED | {"memit": (RISING, FALLING)}, False),
    (CLAIMED | {"metake": (FALLING, RISING)}, False),
    (dict.fromkeys(CLAIMED, (FLAT, FLAT)), None),
    (dict.fromkeys(CLAIMED, (FALLING, FALLING)), None),
])  # fmt: skip
def test_the_verdict_follows_the_sentences(levels, holds):
    records = told(levels)
    shifts, leads = kl.shifts(records), kl.leads(records)
    claims = kl_claims.claims(shifts, leads)
    assert len(claims) == 6 and set(claims.says) <= {"yes", "no", "open"}
    found = kl_claims.judge(shifts, leads)
    assert found["holds"] is holds and "sentences" in found["decided_by"]
    assert ("contradicted:" in found["decided_by"]) is (holds is False)


def test_the_drawing_marks_the_best_weights():
    found = report.kl_curves(kl.curves(told(CLAIMED)))
    assert "MEMIT: high γ at 1 with 90 %, low γ at 4 with 90 %" in found.alt and len(found.data) == 18
    with pytest.raises(ParameterError, match="no column best"):
        report.kl_curves(kl.curves(told(CLAIMED)).drop(columns="best"))
