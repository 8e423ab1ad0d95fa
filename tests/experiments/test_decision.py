"""A decision knows how far it is from turning, and never calls what stands within its error decided."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metake.experiments import decision
from metake.experiments.decision import (
    Decision,
    all_of,
    any_of,
    apart,
    at_least,
    at_most,
    equal,
    for_and_against,
    interval,
    one_and_none_against,
    opposite,
    undecided,
    with_interval,
)

numbers = st.floats(-1e6, 1e6)
errors = st.floats(1e-9, 1e3)
decisions = st.lists(
    st.builds(Decision, st.sampled_from([True, False]), st.floats(1, 1e6), st.sampled_from(sorted(decision.KINDS)))
    | st.builds(Decision, st.none(), st.floats(0, 0.99), st.just("sampling"), st.just("said")),
    min_size=1, max_size=5
)


@given(numbers, numbers, errors)
def test_a_comparison_is_decided_beyond_its_error_only(value, bound, error):
    found, mirrored = at_most("x", value, bound, error), at_least("x", -value, -bound, error)
    gap = (bound - value) / error
    assert found.margin == pytest.approx(abs(gap)) and found[:3] == mirrored[:3]
    assert found.holds is (None if abs(gap) <= 1 else gap > 0) and bool(found.said) == (found.holds is None)


@given(numbers, numbers, errors, st.floats(-0.9, 0.9))
def test_no_disturbance_below_the_error_turns_a_decision(value, bound, error, part):
    found = at_most("x", value, bound, error)
    moved = at_most("x", value + part * error, bound, error)
    assert {found.holds, moved.holds} != {True, False}


def test_a_bound_that_may_be_reached_holds_within_its_error_and_says_so():
    found = at_most("ratio", 1 + 3e-13, 1.0, 1e-12, attained=True)
    assert found.holds is True and found.margin < 1
    assert found.said == "ratio is 1, within its error of 1e-12 (rounding): reached"
    assert at_most("ratio", 1 + 3e-12, 1.0, 1e-12, attained=True).holds is False


def test_what_cannot_be_computed_is_not_decided():
    assert at_most("x", math.nan, 1.0, 0.1).holds is None and equal("x", math.nan, 1e-9).holds is None
    assert at_most("x", 1.0, 1.0, 0.0)[:2] == (None, 0.0) and at_most("x", 0.0, 1.0, 0.0)[:2] == (True, math.inf)
    assert all_of([]).holds is None


def test_two_ways_to_one_number():
    assert equal("x", 1e-12, 1e-9) == Decision(True, pytest.approx(1000), "rounding")
    assert equal("x", 1e-6, 1e-9) == Decision(False, pytest.approx(1000), "rounding")
    assert equal("x", 0.0, 1e-9).margin == math.inf


@pytest.mark.parametrize(("estimate", "low", "high", "holds", "margin"), [
    (2.0, 1.0, 3.0, True, 2.0), (-2.0, -3.0, -1.5, False, 4.0), (0.5, -0.5, 1.5, None, 0.5), (0.0, 0.0, 0.0, None, 0.0),
])  # fmt: skip
def test_an_interval_over_records(estimate, low, high, holds, margin):
    found = interval("difference", estimate, low, high)
    assert (found.holds, found.margin) == (holds, margin) and found.error == "sampling"


def test_an_estimate_outside_of_its_own_interval_gives_way_to_its_middle():
    """Else its error would be negative, and the decision the contrary of what the interval says."""
    assert interval("octaves", 3.0, -6.0, 0.0, 0.5)[:2] == (False, pytest.approx(3.5 / 3))
    assert interval("octaves", 1.0, 2.0, 4.0)[:2] == (True, 3.0) and interval("x", 9.0, -1.0, 3.0).holds is None
    assert interval("x", 5.0, math.nan, math.nan).holds is None


@pytest.mark.parametrize(("one", "other", "holds"), [
    ((9, 8, 11), (5, 4, 7), True), ((9, 8, 11), (5, 4, 8.5), None), ((5, 4, 7), (9, 8, 11), False),
    ((5, 4, 8.5), (9, 8, 11), None), ((5, 4, 6), (5, 4, 6), None),
])  # fmt: skip
def test_two_estimates_are_apart_if_their_intervals_are(one, other, holds):
    found = apart("x", one, other)
    assert found.holds is holds and (found.margin > 1) is (holds is not None)


def test_numbers_of_numpy_decide_as_others_do():
    found = at_most("x", np.float64(1), np.float64(2), np.float64(0.5))
    assert found.holds is True and type(found.margin) is float
    assert at_most("x", np.float64(3), 2.0, np.float64(0)).holds is False  # no division by zero
    assert equal("x", np.float64(0), 1e-9).margin == math.inf


SIDES = [Decision(True, 3.0, "sampling"), Decision(False, 2.0, "sampling"), undecided("few")]


@given(st.sampled_from(SIDES), st.sampled_from(SIDES))
def test_a_rule_with_two_sides_follows_the_refutation_first(proof, refutation):
    found = for_and_against(proof, refutation)
    if refutation.holds:
        assert found[:2] == (False, refutation.margin)
    elif proof.holds:
        assert found[:2] == (True, proof.margin)
    else:
        unclear = [side.margin for side in (proof, refutation) if side.holds is None]
        assert found[:2] == (None, min(unclear or [proof.margin, refutation.margin]))


@given(decisions)
def test_one_for_and_none_against(found):
    values = [d.holds for d in found]
    whole = one_and_none_against(found)
    assert whole.holds is (False if False in values else True if True in values else None)
    if whole.holds is not None:
        assert whole.margin == max(d.margin for d in found if d.holds is whole.holds)


@pytest.mark.parametrize(("numbers", "digits", "sign", "text"), [
    ((0.52, -1.5, 2.04), 1, "+", "+0.5 [-1.5, 2.0]"), ((-1e-17, -2e-17, 0.04), 1, "+", "+0.0 [0.0, 0.0]"),
    ((0.99949, 0.998, 1.0), 3, "", "0.999 [0.998, 1.000]"), ((-0.0004, -0.001, 0.0), 3, "+", "+0.000 [-0.001, 0.000]"),
])  # fmt: skip
def test_what_is_shown_as_zero_has_no_sign_of_rounding(numbers, digits, sign, text):
    assert with_interval(*numbers, digits, sign) == text


@given(decisions)
def test_together_they_turn_where_the_first_that_decides_does(found):
    whole, values = all_of(found), [d.holds for d in found]
    assert whole.holds is (False if False in values else None if None in values else True)
    own = [d.margin for d in found if d.holds is whole.holds]
    assert whole.margin == (max(own) if whole.holds is False else min(own))
    assert any_of(map(opposite, found))[:2] == opposite(whole)[:2]


@given(numbers, errors)
def test_rounding_below_an_error_hides_it(value, error):
    shown = float(decision.rounded(value, error))
    assert abs(shown - value) <= max(50 * error, 1e-6 * abs(value))
    assert decision.rounded(-1e-9, 1e-6) == decision.rounded(2e-9, 1e-6) == "0.00000"
