"""The editing requirement, spectral suppression and the static trap: what their pages check would be found if it were
otherwise.
"""

from functools import partial

import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import random_model

import metake as mk
from metake.algebra.geometry import InverseCovariance, Isotropic, KeyStatistics
from metake.algebra.solve import association, attenuation, feasible_interval
from metake.editing.statistics import statistics
from metake.experiments.theory import (
    editing_requirement,
    one_request,
    requirement_edges,
    shared_strength,
    spectral_suppression,
    static_trap,
    suppression_edges,
    trap_edges,
    trap_search,
)
from metake.support.errors import StatisticsError

power = st.floats(-3, 3)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _random_base(monkeypatch):
    def base(*_):
        lm = random_model("gpt2")
        lm.name, lm.origin = "tiny", {"origin": "test", "revision": "", "note": ""}
        return lm

    for module in (shared_strength, spectral_suppression, trap_edges):
        monkeypatch.setattr(module, "load", base)
        monkeypatch.setattr(module, "statistics", partial(statistics, tokens=3000))


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def request(gamma: float, tau: float, epsilon: float) -> one_request.Request:
    key, direction = (
        torch.tensor([[gamma**0.5, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
    )
    return one_request.Request("", Isotropic(3), key, direction, number(tau), number(epsilon))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Editing requirement


@settings(max_examples=150, deadline=None)
@given(power, power, power, st.floats(-2, 2))
def test_a_plan_satisfies_both_exactly_inside_the_interval(gamma, tau, epsilon, place):
    one = request(10**gamma, 10**tau, 10**epsilon)
    lower, upper = (x.item() for x in one.interval)
    norm = lower ** (1 - place) * upper**place
    assume(min(abs(norm / lower - 1), abs(norm / upper - 1)) > 1e-9 and 1e-12 < norm < 1e12)
    assert one.outcome(number(norm)) == (norm >= lower, norm <= upper)


@settings(max_examples=150, deadline=None)
@given(power, power, power)
def test_the_interval_is_empty_below_the_threshold_and_only_there(gamma, tau, epsilon):
    gamma, tau, epsilon = 10**gamma, 10**tau, 10**epsilon
    assume(abs(gamma * epsilon / tau - 1) > 1e-9)
    lower, upper = feasible_interval(torch.tensor([gamma], dtype=torch.float64), tau, epsilon)
    beta = attenuation(number(gamma))
    assert (lower > upper).item() == (gamma < tau / epsilon) == bool(beta < tau / (tau + epsilon))
    written, left = request(gamma, tau, epsilon).norms((lower * upper).sqrt()[0])
    assert min(written / tau, epsilon / left).item() == pytest.approx((gamma * epsilon / tau) ** 0.5, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(power, power, power, st.floats(0, 3))
def test_requests_that_share_everything_but_the_association_are_nested(gamma, tau, epsilon, more):
    low, high = (request(10**g, 10**tau, 10**epsilon) for g in (gamma, gamma + more))
    (first_low, last_low), (first_high, last_high) = (
        shared_strength.admissible(shared_strength.LAWS["a/λ"], number(1.0), q) for q in (low, high)
    )
    assert first_high <= first_low * (1 + 1e-12) and last_low <= last_high * (1 + 1e-12)


def test_requirement_holds_in_all_instances_and_they_differ():
    found = editing_requirement.requirement_check(54)
    assert (
        found.wrong.sum() == 0
        and found.end_error.max() < 1e-8
        and set(found.method) == set(one_request.KINDS)
        and set(found.dim) == {4, 16, 64}
    )
    assert 10 < found["empty"].sum() < 44 and found.gamma.max() / found.gamma.min() > 1e4
    near = found[(found.ratio - 1).abs() < 1.1e-5]
    assert len(near) >= 18 and near["empty"].nunique() == 2
    pd.testing.assert_frame_equal(found, editing_requirement.requirement_check(54), check_exact=True)


@pytest.mark.parametrize("end", [0, 1])
def test_requirement_would_find_a_wrong_end(monkeypatch, end):
    def wrong(gamma, tau, epsilon):
        ends = list(feasible_interval(gamma, tau, epsilon))
        ends[end] = ends[end] * (1 + 1e-4)
        return tuple(ends)

    searched, dropped = editing_requirement.adversarial_search(2, 5), requirement_edges.edges(30)
    trapped = shared_strength.summary(shared_strength.trap_check(64))
    assert (
        editing_requirement.judge(editing_requirement.requirement_check(27), searched, dropped, trapped)["holds"]
        is True
    )
    monkeypatch.setattr(one_request, "feasible_interval", wrong)
    found = editing_requirement.requirement_check(27)
    assert found.wrong.sum() > 0 and editing_requirement.judge(found, searched, dropped, trapped)["holds"] is False
    assert shared_strength.summary(shared_strength.trap_check(64)).wrong.sum() > trapped.wrong.sum()


def test_requirement_search_comes_near_both_limits_and_would_cross_a_wrong_one(monkeypatch):
    found = editing_requirement.adversarial_search(4)
    assert not found.broken.any() and (found.largest > 0.98 * found.limit).all()
    right = one_request.solve
    monkeypatch.setattr(
        one_request, "solve", lambda keys, plan, metric, noise=1.0: right(keys, plan, metric, 0.5 * noise)
    )
    assert editing_requirement.adversarial_search(2).broken.any(), "a solve that writes more than β"


def test_requirement_fails_where_an_assumption_is_dropped_and_one_reading_survives():
    dropped = requirement_edges.edges(30)
    assert dropped.as_foretold.all() and set(dropped.foretold) == {"none", "some"}
    read = requirement_edges.readings(40).set_index("reading").survives
    assert (
        read[["absolute", "along the plan"]].all()
        and not read[["relative", "too much is written", "≤ in place of <"]].any()
    )


def test_traps_follow_from_decreasing_laws_only():
    found = shared_strength.trap_check(128)
    lawful = found[found.decreasing]
    assert lawful.wrong.sum() == 0 and lawful.trap.sum() > 10 and (found[~found.decreasing].wrong > 0).all()
    shared = lawful[~lawful.own & lawful.feasible]
    assert len(shared) > 5 and shared.nested.all() and not shared.trap.any()
    assert (lawful[lawful.own].feasible & lawful[lawful.own].trap).any(), "a trap of two requests that each have a plan"
    example = shared_strength.example().set_index(["pair", "request"])
    assert example.loc[("a differs", "high γ"), "last"] < example.loc[("a differs", "low γ"), "first"]


def test_requirement_on_a_model():
    plans = shared_strength.plans_on_model(requests=3, strengths=(0.0625, 64.0))
    assert len(plans) == 12 and (plans.served == plans.planned.between(plans.lower, plans.upper)).all()
    assert plans.groupby(["id", "kl_weight"]).planned.nunique().eq(1).all(), "Stage I does not see the metric"
    assert len(shared_strength.response(plans)) == 3 and shared_strength.served(plans).requests.eq(3).all()
    found = shared_strength.diagnosed(requests=4).set_index("method")
    editor = mk.methods.alphaedit("tiny", seed=0)
    lm = shared_strength.load("tiny")
    expected = mk.diagnose(
        lm, [c.request for c in mk.facts(limit=4)], editor, shared_strength.statistics(lm, layers=editor.layers)
    )
    assert found.loc["alphaedit", "empty"] == sum(d.lower > d.upper for d in expected)
    assert found.loc["alphaedit", "largest β"] == pytest.approx(max(d.attenuation for d in expected))


# Spectral suppression


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 10), power, power, st.data())
def test_no_key_exceeds_the_bound(seed, dim, scale, ridge, data):
    spectrum = 10**scale * 10 ** normal(seed, dim).clamp(-3, 3)
    directions, key = (
        torch.linalg.qr(normal(seed + 1, dim, dim))[0],
        normal(seed + 2, 1, dim) @ torch.diag(10 ** normal(seed + 3, dim)),
    )
    protected = torch.tensor(data.draw(st.lists(st.booleans(), min_size=dim, max_size=dim).filter(any)))
    gamma = association(key, InverseCovariance(spectral_suppression.layer(spectrum, directions), ridge=10**ridge))
    assert gamma.item() == pytest.approx(
        spectral_suppression.spectral_association(key, spectrum, directions, 10**ridge).item(), rel=1e-8
    )
    assert gamma.item() <= spectral_suppression.suppression_bound(
        key, spectrum, directions, protected, 10**ridge
    ).item() * (1 + 1e-8)


def test_suppression_holds_and_a_wrong_association_would_be_found(monkeypatch):
    found, searched, dropped = (
        spectral_suppression.suppression_check(60), spectral_suppression.adversarial_search(),
        suppression_edges.edges(10)
    )
    assert (
        found.excess.max() < 1e-9 < 0.9 < found.excess.max() + 1
        and (found.projector_error < 1e-9).sum() > 20
        and (searched.largest > 0.99).all()
    )
    assert (
        spectral_suppression.judge(found, searched, dropped)["holds"] is True
        and len(spectral_suppression.departures(found)) == 3
    )
    monkeypatch.setattr(spectral_suppression, "association", lambda keys, metric: 1.001 * association(keys, metric))
    found, searched = (
        spectral_suppression.suppression_check(30), spectral_suppression.adversarial_search(2, 100, dims=(3,))
    )
    assert (
        found.spectral_error.max() > 1e-4
        and searched.broken.any()
        and spectral_suppression.judge(found, searched, dropped)["holds"] is False
    )


def test_suppression_ends_where_energy_lies_outside():
    dropped = suppression_edges.edges(20)
    assert dropped.as_foretold.all()
    found = spectral_suppression.limits()
    last = found[found.floor == found.floor.max()].set_index("outside")
    assert (
        last.beta[0.0] < 1e-6
        and last.beta[1e-2] == pytest.approx(last.limit[1e-2], rel=1e-3)
        and (found.beta <= found.bound * (1 + 1e-9)).all()
    )
    with pytest.raises(StatisticsError, match="singular"):
        InverseCovariance(KeyStatistics(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), 10))
    assert suppression_edges.readings().set_index("C")["β → 0"].tolist() == [False, True]


def test_suppression_on_a_model():
    spectrum, bounds = spectral_suppression.spectrum_on_model(requests=3)
    for _, own in spectrum.groupby("method"):
        assert (
            own.energy.sum() == pytest.approx(1)
            and (own.sort_values("eigenvalue").beta.is_monotonic_decreasing or own.method.iloc[0] == "alphaedit")
        )
    assert (
        (bounds.ratio >= 1 - 1e-9).all()
        and (bounds.groupby("request")["size"].diff().dropna() >= 0).all()
        and len(spectral_suppression.looseness(bounds)) == 4
    )


# Static trap


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 8), power, st.floats(0, 3))
def test_a_penalty_is_a_ball_that_shrinks(seed, dim, strength, more):
    root, gradient = normal(seed, dim, dim), normal(seed + 1, dim)
    hessian, strength = root @ root.T, 10**strength
    at, later = (static_trap.displacement(gradient, hessian, x) for x in (strength, strength * 10**more))
    rivals = torch.nn.functional.normalize(normal(seed + 2, 50, dim)) * at.norm()
    values = rivals @ gradient + (rivals @ hessian * rivals).sum(1) / 2
    assert later.norm() <= at.norm() * (1 + 1e-9)
    value = at @ gradient + at @ hessian @ at / 2
    assert values.min() >= value - 1e-9 * value.abs()


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 8), st.floats(0, 5), power, st.floats(-1.5, 1.5), st.floats(-3, 3))
def test_a_shared_strength_serves_both_exactly_between_the_two_demands(seed, dim, condition, delta, boundary, place):
    operator = static_trap.random_operator(torch.Generator().manual_seed(seed), dim, 10**condition)
    inner, outer = static_trap.radii(operator, 10**delta)
    assert (outer / inner).item() == pytest.approx(10 ** (condition / 2), rel=1e-6)
    trap = static_trap.Trap(operator, 10**delta, 10**boundary * inner.item(), torch.zeros_like(operator), 1.0, 1.0)
    first, last = static_trap.strengths(operator, trap.delta, trap.tau)
    assert (first > last) == (boundary > 0) or abs(boundary) < 1e-9
    strength = first ** (1 - place) * last**place
    assume(min(abs(strength / first - 1), abs(strength / last - 1)) > 1e-6)
    assert (trap.least(strength) >= 0) == (first <= strength <= last)


def test_static_trap_holds_and_wrong_formulas_would_be_found(monkeypatch):
    def checked():
        return static_trap.penalty_check(36), static_trap.ellipsoid_check(36), static_trap.trap_check(36)

    searched, dropped, right = trap_search.adversarial_search(1, 60), trap_edges.edges(10), checked()
    assert static_trap.judge(*right, searched, dropped)["holds"] is True and not static_trap.counted(*right).found.any()
    assert 5 < right[2].trapped.sum() < 31 and ((right[2].boundary - 1).abs() < 1.1e-5).sum() >= 9
    with monkeypatch.context() as patch:
        displacement = static_trap.displacement
        patch.setattr(static_trap, "displacement", lambda g, h, x: displacement(g, h, 1.001 * x))
        found = static_trap.counted(*checked()).set_index("contradiction").found
        assert found["the multiplier is not λ"] and static_trap.judge(*checked(), searched, dropped)["holds"] is False
    radii = static_trap.radii
    monkeypatch.setattr(static_trap, "radii", lambda a, d: tuple(1.0001 * r for r in radii(a, d)))
    found = static_trap.counted(*checked()).groupby("statement").found.sum()
    assert found["Lemma 2"] and found["Theorem 2"] and not found["Lemma 1"]


def test_static_trap_search_comes_near_the_limits():
    found = trap_search.adversarial_search(2, dims=(3,))
    assert (
        not found.broken.any()
        and (found.largest > 0.97 * found.limit).all()
        and set(found.statement) == {"Lemma 1", "Lemma 2", "Theorem 2"}
    )


def test_static_trap_ends_where_an_assumption_is_dropped_and_readings_differ():
    assert trap_edges.edges(20).as_foretold.all()
    read = trap_edges.readings(static_trap.trap_check(90)).set_index("reading").survives
    assert (
        read.sum() == 3 and read[[r for r in read.index if r.startswith("τ >") or "< τ ≤" in r or "½‖u‖²" in r]].all()
    )
    swept = trap_edges.sweep(9)
    served = swept[swept.outcome == "both are served"]
    assert served.boundary.max() <= 1 + 1e-9 and len(served) > 5


def test_the_ellipsoid_of_a_batch():
    found = trap_edges.batch_trap(requests=4)
    assert (found.served_in == 0).all() and (found.served_under >= 1).all() and (found["√κ"] > 1).all()
    assert (
        found["√κ of one request"].sub(1).abs().max() < 1e-9
        and (found.to_tau / found.from_tau).sub(found["√κ"]).abs().max() < 1e-9
    )
