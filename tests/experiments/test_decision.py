"""A decision knows how far it is from turning, and never calls what stands within its error decided."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metake.experiments import decision
from metake.experiments.decision import Decision, all_of, any_of, at_least, at_most, equal, interval, opposite

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
