"""Every theory page's judgment turns where a number is pushed beyond its error, and says so where it stands within."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metake.experiments.decision import EPS, Decision
from metake.experiments.theory import (
    attenuation,
    comparisons,
    dominance,
    editing_requirement,
    gate_lemmas,
    geometry_of_beta,
    necessity,
    one_formula,
    proxy_fidelity,
    proxy_theorem,
    sequential,
    spectral_suppression,
    static_trap,
)

distances = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


def frame(**columns):
    size = max(len(c) for c in columns.values() if isinstance(c, list))
    return pd.DataFrame({k: c if isinstance(c, list) else [c] * size for k, c in columns.items()})


# Many comparisons as one


@given(distances, st.booleans())
def test_the_nearest_comparison_decides(found, attained):
    one = comparisons.least("x", found, attained)
    if min(found) < -1:
        assert one.holds is False and one.margin == pytest.approx(-min(found))
    elif attained:
        assert one.holds is True and (one.margin == 0.0) == ("within" in one.said) == (min(map(abs, found)) < 1000)
    else:
        assert one.holds is (None if min(map(abs, found)) <= 1 else True) and one.margin == min(map(abs, found))
        assert (one.holds is None) == ("within its error" in one.said)
    assert comparisons.some("x", found).holds is (True if min(found) < -1 else False if min(found) > 1 else None)


def test_nothing_and_what_is_not_a_number_decide_nothing():
    assert comparisons.least("x", []).holds is comparisons.same("x", [], []).holds is None
    assert comparisons.least("x", [5.0, math.nan]).holds is None
    assert comparisons.same("x", [0.0, math.nan], [1.0, 1.0]).holds is None
    assert comparisons.least("x", [-5.0, math.nan]).holds is False


def test_two_ways_to_one_number_differ_by_their_own_error_at_most():
    assert comparisons.same("x", [1e-9, 1e-12], [1e-8, 1e-14])[:2] == (False, pytest.approx(100))
    assert comparisons.same("x", [1e-9, 1e-12], [1e-8, 4e-12])[:2] == (True, pytest.approx(4))


def test_rounding_grows_with_the_terms_and_what_amplifies_them_up_to_a_limit():
    assert comparisons.rounding(7, 1e3) == pytest.approx(7e3 * EPS)
    assert comparisons.rounding(10**4) == 100 * EPS and comparisons.rounding(7, 1e12, 1e-6) == 1e-6


def test_dropped_assumptions_fail_beyond_rounding_or_are_not_as_foretold():
    told = {"a": "none", "b": "none", "c": "some", "d": "some"}
    found = comparisons.foretold(told, {"a": [3.0, 5.0], "b": [0.5, 5.0], "c": [5.0, -3.0], "d": [-0.5, 5.0]})
    assert found.wrong.tolist() == [0, 0, 1, 0] and found.as_foretold.tolist() == [True, False, True, False]
    assert comparisons.as_foretold(found[found.as_foretold])[:2] == (True, 3.0)
    assert comparisons.as_foretold(found).holds is None and "within its error" in comparisons.as_foretold(found).said


def test_what_does_not_agree_cannot_be_told():
    yes, no = Decision(True, 5.0, "rounding"), Decision(False, 3.0, "rounding")
    assert comparisons.agreed([yes, no], "apart") == Decision(None, 3.0, "rounding", "apart")
    assert comparisons.agreed([no, no], "apart") == no and comparisons.agreed([yes, yes], "apart") == yes


# The judgments: frames that hold clearly, and for each the columns that turn it


def good() -> dict[str, tuple]:
    clear, drop = 1e6, frame(case=["a"], foretold="some", as_foretold=True, distance=-1e6)
    lemma = frame(**{"identity": [0.0], "identity rounding": 1e-12}, **{name: [0.5] for name in gate_lemmas.LEMMAS})
    drifts = frame(delta=[2.0], ridge=1.0)
    drifts.attrs["model"] = "tiny"
    exact = frame(unsolved=[0.0], through=0.0, implicit=0.0, slope=1.0, gain=clear)
    theorem = frame(leakage=[0.1], gap=0.1, strength=1.0, compatibility=1.0, bound=0.21, ratio=0.21, threshold=0.8)
    theorem = theorem.assign(alignment=0.9, off=0.2, terms=3, spacing=EPS, found=1.1)
    penalty = frame(better=[-1.0], better_error=1e-12, multiplier=1.0, multiplier_error=1e-12, stretch=-1.0)
    caught = frame(trapped=[True, False], agrees=clear, best_error=0.0, tried=3, rounding=1e-12)
    return {
        "attenuation": (attenuation.judge, [
            frame(n=[1], error=0.0, remainder_error=0.0, rounding=1e-12, minimizer_error=0.0, minimizer_rounding=1e-12),
            frame(times_rounding=[0.1], evaluations=1)
        ]),
        "one_formula": (lambda *f: one_formula.judge(*f, names=("memit",)), [
            frame(method=["memit"], ratio=0.1), frame(ratio=[0.1])
        ]),
        "sequential": (sequential.judge, [frame(
            method=["blue"] * 2, keys="any", reading=list(sequential.READINGS), difference=[0.0, 0.5], rounding=1e-12
        )]),
        "geometry_of_beta": (geometry_of_beta.judge, [
            frame(error=[0.0], rounding=1e-12, agrees=clear, dim=2, feasible=True)
        ]),
        "editing_requirement": (editing_requirement.judge, [
            frame(agrees=[clear], criteria=clear, end_error=0.0, rounding=1e-12, wrong=0, disagree=0, plans=8),
            frame(spare=[clear], broken=False), drop,
            frame(decreasing=[True, False], agrees=[clear, -clear], wrong=0, tried=5)
        ]),
        "necessity": (necessity.judge, [
            exact.assign(**{f"{name}_error": 1e-9 for name in necessity.DEPARTURES}),
            frame(implicit=[0.1], through=0.1, slope=0.1),
            frame(id=[0], anchor="sum", before=1.0, after=0.5, rounding=1e-12)
        ]),
        "proxy_theorem": (proxy_theorem.judge_theorem, [theorem, theorem.assign(ratio=1.5, threshold=0.05), theorem]),
        "spectral_suppression": (spectral_suppression.judge, [
            frame(spectral_error=[0.0], share_error=0.0, projector_error=0.0, projector_rounding=1e-12, rounding=1e-12,
                  excess=-0.5),
            frame(spare=[clear], broken=False, largest=0.9), drop
        ]),
        "static_trap": (static_trap.judge, [
            penalty.assign(stretch_error=1e-12),
            frame(inside=[clear], around=clear, tight=clear, ratio_error=0.0, rounding=1e-12), caught,
            frame(spare=[clear], broken=False), drop
        ]),
        "dominance": (dominance.judge, [
            lemma.assign(**{f"{name} rounding": 1e-12 for name in gate_lemmas.LEMMAS}),
            frame(**{"q": [0.5], "error": 0.3, "inner": 0.9, "rounding": 1e-12, "assembly": 0.0, "fall": clear,
                     "lower": True, "assembly rounding": 1e-12}),
            frame(claimed=[True], largest=0.9, spare=clear), drifts,
            frame(proxy=["one G", "Algorithm 1"], q=1.0, error=0.5, rounding=1e-12)
        ]),
    }  # fmt: skip


TURNS = [  # judgment, frame, column; a value beyond its error, one within, and what is then said
    ("attenuation", 0, "error", 2e-12, 0.5e-12, True), ("attenuation", 0, "remainder_error", 2e-12, 0.5e-12, True),
    ("attenuation", 0, "minimizer_error", 2e-12, 0.5e-12, True), ("attenuation", 1, "times_rounding", 2.0, 0.5, True),
    ("one_formula", 0, "ratio", 2.0, 0.5, True), ("one_formula", 1, "ratio", 2.0, 0.5, True),
    ("sequential", 0, "difference", 2e-12, 0.5e-12, None),
    ("geometry_of_beta", 0, "error", 2e-12, 0.5e-12, True), ("geometry_of_beta", 0, "agrees", -2.0, -0.5, None),
    ("editing_requirement", 0, "agrees", -2.0, 0.5, None), ("editing_requirement", 0, "criteria", -2.0, -0.5, None),
    ("editing_requirement", 0, "end_error", 2e-12, 0.5e-12, True),
    ("editing_requirement", 1, "spare", -2.0, -0.5, True),
    ("editing_requirement", 2, "distance", 2.0, -0.5, None), ("editing_requirement", 3, "agrees", -2.0, -0.5, None),
    ("necessity", 0, "unsolved", 2e-9, 0.5e-9, True), ("necessity", 0, "implicit", 2e-9, 0.5e-9, True),
    ("necessity", 0, "through", 2e-9, 0.5e-9, True), ("necessity", 0, "slope", 1 + 2e-9, 1 + 0.5e-9, True),
    ("necessity", 0, "gain", -2.0, 0.5, None), ("necessity", 1, "slope", 2.0, 0.5, True),
    ("necessity", 2, "after", 1 + 2e-12, 1 - 0.5e-12, None),
    ("proxy_theorem", 0, "off", 0.21 + 1e-14, 0.21 + 1e-16, True),
    ("proxy_theorem", 0, "alignment", 0.79 - 1e-14, 0.79 - 2e-16, True), ("proxy_theorem", 0, "gap", 0.81, 0.1, True),
    ("spectral_suppression", 0, "spectral_error", 2e-12, 0.5e-12, True),
    ("spectral_suppression", 0, "projector_error", 2e-12, 0.5e-12, True),
    ("spectral_suppression", 0, "excess", 2e-12, 0.5e-12, True), ("spectral_suppression", 1, "spare", -2.0, -0.5, True),
    ("spectral_suppression", 2, "distance", 2.0, 0.5, None),
    ("static_trap", 0, "better", 2e-12, 0.5e-12, True), ("static_trap", 0, "multiplier", 1 + 2e-12, 1 + 0.5e-12, True),
    ("static_trap", 0, "stretch", 2e-12, 0.5e-12, None), ("static_trap", 1, "inside", -2.0, -0.5, True),
    ("static_trap", 1, "tight", -2.0, 0.5, None), ("static_trap", 2, "agrees", -2.0, 0.5, None),
    ("static_trap", 3, "spare", -2.0, -0.5, True), ("static_trap", 4, "distance", 2.0, -0.5, None),
    ("dominance", 0, "lemma 3: inverse", 1 + 2e-12, 1 + 0.5e-12, True),
    ("dominance", 0, "identity", 2e-12, 0.5e-12, True),
    ("dominance", 1, "error", 0.5 + 2e-12, 0.5 + 0.5e-12, True), ("dominance", 1, "fall", -2.0, 0.5, None),
    ("dominance", 1, "assembly", 2e-12, 0.5e-12, True), ("dominance", 2, "spare", -2.0, -0.5, True),
    ("dominance", 4, "error", 1 + 2e-12, 1 + 0.5e-12, True),
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(good()))
def test_a_judgment_that_holds_clearly_says_no_more(name):
    judge, frames = good()[name]
    found = judge(*frames)
    assert found["holds"] is True and found["margin"] >= 1 and "within" not in found["decided_by"]


@pytest.mark.parametrize(("name", "which", "column", "beyond", "within", "holds"), TURNS)
def test_a_judgment_turns_beyond_its_error_and_says_so_within(name, which, column, beyond, within, holds):
    judge, frames = good()[name]
    turned = list(frames)
    turned[which] = frames[which].assign(**{column: beyond})
    found = judge(*turned)
    assert found["holds"] is False and found["margin"] > 1
    turned[which] = frames[which].assign(**{column: within})
    near = judge(*turned)
    assert near["holds"] is holds
    assert near["margin"] >= 1 or "within" in near["decided_by"]
    assert holds is True or "within its error" in near["decided_by"]


def test_figures_3_and_8_are_judged_by_their_own_errors():
    records = pd.DataFrame([(i, p, 1.5 + i / 100) for i in range(40) for p in proxy_fidelity.REFINED])
    records = records.set_axis(["request", "point", "leakage"], axis=1)
    records = records.assign(cosine=0.5, down_cosine=0.5, proxy=1.0, rounding=1e-10)
    assert proxy_fidelity.judge_alignment(records)["holds"] is True
    assert proxy_fidelity.judge_alignment(records.assign(proxy=-1e-8))["holds"] is False
    near = proxy_fidelity.judge_alignment(records.assign(proxy=5e-11))
    assert near["holds"] is None and "within its error" in near["decided_by"] and near["margin"] == pytest.approx(0.5)
    assert proxy_fidelity.judge_dominance(records)["holds"] is False
    assert proxy_fidelity.judge_dominance(records.assign(leakage=records.leakage - 1))["holds"] is True
    open_ = proxy_fidelity.judge_dominance(records.assign(leakage=records.leakage - 0.7))
    assert open_["holds"] is None and open_["margin"] < 1 and "half of a 95 % interval" in open_["error"]
