"""The one solver equals every published d×d solve, and the theorems on what it realizes hold."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metake.algebra.geometry import InverseCovariance, Isotropic, KeyStatistics, NullSpace, condition
from metake.algebra.solve import association, attenuation, feasible_interval, gate, realization, solve, spectrum
from metake.support.errors import ParameterError, StatisticsError

THRESHOLD = 1e-6
quick = settings(max_examples=60, deadline=None, derandomize=True)


class Problem(NamedTuple):
    """Columns as in the papers."""

    keys: Tensor
    residuals: Tensor
    past: Tensor
    full: KeyStatistics  # of full rank
    flat: KeyStatistics  # with a null space
    ridge: float

    @property
    def projector(self) -> Tensor:
        return reference.projector(self.flat.covariance, THRESHOLD)

    def null_space(self) -> NullSpace:
        return NullSpace(self.flat, self.ridge, THRESHOLD)


def second_moment(keys: Tensor) -> KeyStatistics:
    statistics = KeyStatistics.empty(keys.shape[1])
    statistics.update(keys)
    return statistics


def problem(d: int = 9, n: int = 4, past: int = 3, rank: int = 4, ridge: float = 3.0, seed: int = 0) -> Problem:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    draw = torch.Generator().manual_seed(seed)
    preserved = normal(8 * d, d)
    basis = torch.linalg.qr(normal(d, d))[0][:, : d - rank]
    return Problem(
        normal(d, n), normal(5, n), normal(d, past), second_moment(preserved),
        second_moment(preserved @ basis @ basis.T), ridge
    )


@st.composite
def problems(draw, least: int = 0, most: int = 14) -> Problem:
    d = draw(st.integers(2, 11))
    n, past, rank = draw(st.integers(least, most)), draw(st.integers(0, 6)), draw(st.integers(1, d))
    return problem(d, n, past, rank, 10 ** draw(st.floats(-1, 2)), draw(st.integers(0, 10**6)))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def written(p: Problem, metric, noise: float = 1.0) -> Tensor:
    """Δ = R M."""
    return p.residuals @ gate(p.keys.T, metric, noise)


# The published solves


@quick
@given(problems())
def test_memit(p: Problem):
    metric = InverseCovariance(p.full, weight=p.ridge)
    assert_close(written(p, metric), reference.memit(p.keys, p.residuals, p.full.covariance, p.ridge))
    assert_close(
        written(p, condition(metric, p.past.T)),
        reference.memit(p.keys, p.residuals, p.full.covariance, p.ridge, p.past),
    )


@quick
@given(problems())
def test_alphaedit_in_its_three_forms_and_the_gate_of_b3(p: Problem):
    metric = condition(p.null_space(), p.past.T)
    for form in (reference.alphaedit_code, reference.alphaedit_paper, reference.alphaedit_projected):
        assert_close(written(p, metric), form(p.keys, p.residuals, p.projector, p.ridge, p.past))
    assert_close(gate(p.keys.T, metric), reference.gate_b3(p.keys, p.projector, p.ridge, p.past))


@quick
@given(problems(least=1, most=1))
def test_rome_writes_its_one_request_exactly(p: Problem):
    expected = reference.rome(p.keys[:, 0], p.residuals[:, 0], p.full.covariance)
    assert_close(written(p, InverseCovariance(p.full), noise=0), expected)
    assert_close(expected @ p.keys, p.residuals)


@quick
@given(problems(least=1, most=1), st.integers(0, 10**6))
def test_rome_is_exact_at_the_plain_key_with_another_mean(p: Problem, seed: int):
    """k̄ is averaged over contexts, k is the plain prompt's: (W + Δ) k = v, along C⁻¹k̄; without covariance along
    k̄.
    """
    k, R = (
        p.keys[:, 0]
        + 0.3 * torch.randn(len(p.keys), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
        p.residuals[:, 0],
    )
    for metric, C in ((InverseCovariance(p.full), p.full.covariance), (Isotropic(len(k)), reference.eye(len(k)))):
        if (
            abs(p.keys[:, 0] @ torch.linalg.solve(C, k))
            < 1e-3 * (p.keys[:, 0] @ torch.linalg.solve(C, p.keys[:, 0])).sqrt() * (k @ torch.linalg.solve(C, k)).sqrt()
        ):
            continue  # nearly orthogonal: nothing to be exact with
        found = solve(p.keys.T, p.residuals.T, metric, 0, k[None])
        assert_close(p.residuals @ found.gate, reference.rome(p.keys[:, 0], R, C, k), 1e-9)
        assert_close(p.residuals @ found.gate @ k, R, 1e-9)
        assert_close(found.realization, torch.ones(1, 1, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_gate_for_other_keys_than_it_writes_along(noise: float):
    """M = (νI + KᵀQK*)⁻¹KᵀQ by its definition; K* = K is the gate itself; differentiable in both."""
    p = problem(n=3)
    at = p.keys + 0.2 * torch.randn(p.keys.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    metric, Q = InverseCovariance(p.full), torch.linalg.inv(p.full.covariance)
    found = solve(p.keys.T, p.residuals.T, metric, noise, at.T)
    assert_close(found.gate, torch.linalg.inv(noise * reference.eye(3) + p.keys.T @ Q @ at) @ p.keys.T @ Q)
    assert_close(found.realization, found.gate @ at)
    assert_close(found.realized.T, p.residuals @ found.gate @ at)
    assert_close(gate(p.keys.T, metric, noise, p.keys.T), gate(p.keys.T, metric, noise))
    assert torch.autograd.gradcheck(
        lambda keys, at: gate(keys, metric, noise, at),
        (p.keys.T.clone().requires_grad_(), at.T.clone().requires_grad_()),
    )


def test_a_plain_key_that_the_mean_does_not_see_is_refused():
    k = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(StatisticsError, match="1 keys do not determine an exact write"):
        gate(k, Isotropic(3), 0, torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64))
    with pytest.raises(StatisticsError, match="2 keys do not determine an exact write"):
        gate(k.repeat(2, 1), Isotropic(3), 0, k.repeat(2, 1))


@quick
@given(problems())
def test_pmet_inverts_what_memit_solves(p: Problem):
    assert_close(
        written(p, InverseCovariance(p.full, p.ridge)), reference.pmet(p.keys, p.residuals, p.full.covariance, p.ridge)
    )


@quick
@given(problems())
def test_emmet(p: Problem):
    C = p.full.covariance
    assert_close(
        written(p, InverseCovariance(p.full, weight=p.ridge)), reference.emmet(p.keys, p.residuals, C, p.ridge)
    )
    assert_close(written(p, InverseCovariance(p.full), noise=p.ridge), reference.emmet(p.keys, p.residuals, C, p.ridge))


def test_without_noise_the_write_is_exact_and_the_smallest_that_is():
    p = problem(d=9, n=5)
    update = written(p, InverseCovariance(p.full), noise=0)
    assert_close(update, reference.emmet(p.keys, p.residuals, p.full.covariance, 0.0))
    assert_close(update @ p.keys, p.residuals)


@quick
@given(problems())
def test_gates_of_metake_v1_and_of_the_key_only_ablation(p: Problem):
    assert_close(
        gate(p.keys.T, InverseCovariance(p.full, ridge=p.ridge)), reference.gate_v1(p.keys, p.full.covariance, p.ridge)
    )
    assert_close(gate(p.keys.T, Isotropic(len(p.keys), p.ridge)), reference.gate_key_only(p.keys, p.ridge))


def test_the_write_minimizes_the_published_objectives():
    """The gradients of MEMIT's and, over Δ = ΔP, of AlphaEdit's objective vanish at Δ, and do not at 1.01 Δ."""
    p, P = problem(), problem().projector

    def memit(D: Tensor) -> Tensor:
        return (D @ p.keys - p.residuals).square().sum() + p.ridge * (D @ p.full.covariance @ D.T).trace()

    def alphaedit(D: Tensor) -> Tensor:
        return (
            (D @ P @ p.keys - p.residuals).square().sum()
            + (D @ P @ p.past).square().sum()
            + p.ridge * (D @ P).square().sum()
        )

    for objective, metric in (
        (memit, InverseCovariance(p.full, p.ridge)), (alphaedit, condition(p.null_space(), p.past.T))
    ):
        at, off = (torch.func.grad(objective)(factor * written(p, metric)).norm() for factor in (1.0, 1.01))
        assert at < 1e-10 < 1e-3 < off


@quick
@given(problems(least=2))
def test_sequential_equals_batch_for_fixed_keys(p: Problem):
    """Each batch plans what is still missing and remembers the keys before it: the sum is the one-batch update."""
    for metric in (InverseCovariance(p.full, p.ridge), p.null_space()):
        whole, total = written(p, metric), torch.zeros(5, len(p.keys), dtype=torch.float64)
        for part in (slice(0, 1), slice(1, None)):
            K = p.keys[:, part]
            total = total + (p.residuals[:, part] - total @ K) @ gate(K.T, metric)
            metric = condition(metric, K.T)
        assert_close(total, whole, 1e-9)


# What is realized


@quick
@given(problems(least=1))
def test_realization_has_its_spectrum_between_zero_and_one(p: Problem):
    for metric in (
        InverseCovariance(p.full, p.ridge), condition(p.null_space(), p.past.T), Isotropic(len(p.keys), p.ridge)
    ):
        s = solve(p.keys.T, p.residuals.T, metric)
        spectrum = torch.linalg.eigvalsh(s.realization)
        assert_close(s.realization, s.realization.T)
        assert spectrum.min() >= -1e-12 and spectrum.max() < 1
        assert_close(s.realized.T, p.residuals @ s.gate @ p.keys)
        assert_close(s.realized.T, p.residuals @ s.realization)
        Gamma = metric.apply(p.keys.T) @ p.keys
        assert_close(s.realization, Gamma @ torch.linalg.inv(torch.eye(len(Gamma), dtype=torch.float64) + Gamma))
        assert_close(association(p.keys.T, metric), Gamma.diagonal())


@quick
@given(problems(least=1, most=1))
def test_proposition_1(p: Problem):
    """One request realizes β = γ/(1+γ) of its plan, with γ as in eqs 111–112 of the paper, and M = (1 − β) kᵀQ."""
    k, P, Kp = p.keys, p.projector, p.past
    A = P @ Kp @ Kp.T @ P + p.ridge * reference.eye(len(k))
    cases = (
        (InverseCovariance(p.full, p.ridge), torch.linalg.inv(p.ridge * p.full.covariance)),
        (condition(p.null_space(), Kp.T), P @ torch.linalg.inv(A) @ P),
    )
    for metric, Q in cases:
        gamma = k.T @ Q @ k
        beta = gamma / (1 + gamma)
        found = solve(k.T, p.residuals.T, metric)
        assert_close(association(k.T, metric), gamma[0])
        assert_close(attenuation(association(k.T, metric)), beta[0])
        assert_close(realization(k.T, found.gate), beta)
        assert_close(found.realized.T, beta * p.residuals)
        assert_close(p.residuals - found.realized.T, p.residuals / (1 + gamma))
        assert_close(found.gate, (1 - beta) * k.T @ Q)


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_theorem_1(gamma: float, tau: float, epsilon: float):
    """The interval is empty iff β < τ/(τ+ε) iff γ < τ/ε; its ends satisfy success and editability with equality."""
    lower, upper = (x.item() for x in feasible_interval(torch.tensor([gamma], dtype=torch.float64), tau, epsilon))
    beta = attenuation(torch.tensor(gamma, dtype=torch.float64)).item()
    assert beta * lower == pytest.approx(tau, rel=1e-12)
    assert upper / (1 + gamma) == pytest.approx(epsilon, rel=1e-12)
    if abs(gamma * epsilon / tau - 1) > 1e-9:
        assert (lower <= upper) == (gamma > tau / epsilon) == (beta > tau / (tau + epsilon))
        inside = (lower + upper) / 2
        assert (beta * inside >= tau and (1 - beta) * inside <= epsilon) == (lower <= upper)


def test_interval_of_a_request_that_nothing_can_realize():
    gamma = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    lower, upper = feasible_interval(gamma, torch.tensor([1.0, 2.0, 3.0]), 0.5)
    assert lower.tolist() == [float("inf"), 4, 4] and upper.tolist() == [0.5, 1, 2] and lower.dtype == torch.float64


# Gradients, edges, refusals


@pytest.mark.parametrize("noise", [1.0, 0.0])
def test_gate_is_differentiable_in_the_keys(noise: float):
    p = problem(d=6, n=2, past=2, rank=3)
    for metric in (InverseCovariance(p.full), p.null_space(), condition(p.null_space(), p.past.T), Isotropic(6)):
        assert torch.autograd.gradcheck(
            lambda keys, metric=metric: gate(keys, metric, noise), p.keys.T.clone().requires_grad_()
        )


def test_zero_requests():
    p = problem(n=0)
    for metric in (InverseCovariance(p.full), condition(p.null_space(), p.past.T)):
        for noise in (1.0, 0.0):
            s = solve(p.keys.T, p.residuals.T, metric, noise)
            assert s.gate.shape == (0, 9) and s.realization.shape == (0, 0) and s.realized.shape == (0, 5)
        assert association(p.keys.T, metric).shape == (0,)


def test_duplicate_keys_share_the_write_with_noise_and_are_refused_without():
    p = problem(n=3)
    p = p._replace(keys=p.keys[:, [0, 1, 0]])
    metric = InverseCovariance(p.full, 10.0)
    M = gate(p.keys.T, metric)
    assert_close(M[0], M[2])
    assert_close(p.residuals @ M, reference.memit(p.keys, p.residuals, p.full.covariance, 10.0))
    with pytest.raises(StatisticsError, match="3 keys .* noise > 0"):
        gate(p.keys.T, metric, noise=0)


@pytest.mark.parametrize("rank", [2, 3], ids=["its own factor", "its complement"])
@pytest.mark.parametrize("seed", range(5))
def test_more_keys_than_dimensions_or_a_key_outside_the_null_space_have_no_exact_write(seed: int, rank: int):
    p = problem(d=4, n=6, rank=rank, seed=seed)
    assert p.null_space()._thin.shape[1] == min(rank, 4 - rank)
    preserved = (p.keys - p.projector @ p.keys)[:, :1]
    assert gate(p.keys.T, p.null_space()).isfinite().all() and gate(preserved.T, p.null_space()).norm() < 1e-10
    for keys in (p.keys, preserved):
        with pytest.raises(StatisticsError, match="coincide in it, or one lies in its null space"):
            gate(keys.T, p.null_space(), noise=0)


def test_an_exact_write_does_not_depend_on_the_scale_of_the_keys():
    p = problem(n=3)
    scale = torch.tensor([1.0, 1e5, 1e-5], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        found = gate((p.keys * scale).T.to(dtype), InverseCovariance(p.full), noise=0) * scale[:, None].to(dtype)
        assert_close(found.double(), gate(p.keys.T, InverseCovariance(p.full), noise=0), tolerance)


def test_single_precision_keys_give_single_precision_gates():
    p = problem(d=11, n=5)
    for metric in (InverseCovariance(p.full, 2.0), p.null_space(), condition(p.null_space(), p.past.T), Isotropic(11)):
        found = solve(p.keys.T.float(), p.residuals.T.float(), metric)
        expected = solve(p.keys.T, p.residuals.T, metric)
        assert {t.dtype for t in found} == {torch.float32}
        for one, other in zip(found, expected, strict=True):
            assert_close(one.double(), other, 1e-4)


def test_values_out_of_range_are_refused():
    p, gamma = problem(), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ParameterError, match="noise must be ≥ 0; found -1"):
        gate(p.keys.T, Isotropic(9), noise=-1)
    with pytest.raises(ParameterError, match="4 keys but 3 residuals"):
        solve(p.keys.T, p.residuals.T[:3], Isotropic(9))
    for tau, epsilon in ((0.0, 1.0), (1.0, -1.0), (torch.tensor([1.0, 0.0]), 1.0)):
        with pytest.raises(ParameterError, match="tau and epsilon must be > 0"):
            feasible_interval(gamma, tau, epsilon)


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("apart", [False, True], ids=["at the keys", "elsewhere"])
def test_the_spectrum_is_that_of_the_realization(noise: float, apart: bool):
    """By a symmetric solver wherever B is symmetric, by the general one where it is not (ROME's plain key)."""
    p = problem()
    for metric in (InverseCovariance(p.full, p.ridge), p.null_space(), condition(p.null_space(), p.past.T)):
        away = torch.randn(p.keys.T.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        at = p.keys.T + 0.3 * away
        B = solve(p.keys.T, p.residuals.T, metric, noise, at if apart else None).realization
        expected = torch.linalg.eigvals(B).real.sort().values
        assert (spectrum(B, not apart).sort().values - expected).abs().max() < 1e-10
        assert not apart or noise == 0 or (B - B.T).norm() > 1e-3 * B.norm()


@pytest.mark.parametrize("noise", [0.25, 1.0, 5.0, 0.0])
def test_one_request_alone_under_any_noise(noise: float):
    """β = γ/(ν+γ) is what the solve realizes, also at another key; the interval's ends are τ/β and ε/(1−β)."""
    p = problem(n=1)
    metric, k, r = InverseCovariance(p.full, p.ridge), p.keys.T, p.residuals.T
    for at in (None, k + 0.1 * torch.ones_like(k)):
        gamma = association(k, metric, at)
        beta = attenuation(gamma, noise)
        assert_close(solve(k, r, metric, noise, at).realization[0], beta)
        lower, upper = feasible_interval(gamma, 0.2, 0.3, noise)
        assert_close(lower, 0.2 / beta)
        assert upper.item() == float("inf") if noise == 0 else torch.isclose(upper, 0.3 / (1 - beta)).all()
