"""Metrics on key space: streamed moments, remembered keys, null spaces, and what is refused."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve import THRESHOLD, assert_close, problem, second_moment
from torch import Tensor

from metake.algebra.geometry import (
    Conditioned,
    Dense,
    InverseCovariance,
    Isotropic,
    KeyStatistics,
    NullSpace,
    condition,
    inverse_covariance,
    null_space,
    one_layer,
)
from metake.support.errors import ParameterError, StatisticsError

quick = settings(max_examples=50, deadline=None, derandomize=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(metric) -> Tensor:
    """Q, (d_in, d_in)."""
    return metric.apply(reference.eye(metric.dim))


# Statistics


@quick
@given(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 10**6))
def test_streamed_second_moment_is_that_of_one_batch(d: int, sizes: list[int], seed: int):
    keys = 3 + normal(sum(sizes) + 1, d, seed=seed)  # a mean, which an uncentered moment keeps
    statistics = KeyStatistics.empty(d)
    for part in keys.split([*sizes, 1]):
        statistics.update(part)
    assert statistics.count == len(keys)
    assert_close(statistics.covariance, sum(torch.outer(k, k) for k in keys) / len(keys))
    assert_close(statistics.spectrum, torch.linalg.eigvalsh(statistics.covariance).clamp_min(0), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_summed_in_double_precision(dtype: torch.dtype):
    keys = (1 + normal(4000, 3) / 100).to(dtype)
    assert_close(second_moment(keys).moment, keys.double().T @ keys.double(), 1e-13)
    assert second_moment(keys).moment.dtype == torch.float64


def test_the_spectrum_follows_later_keys():
    statistics = second_moment(normal(6, 4))
    before = statistics.spectrum.clone()
    statistics.update(5 * normal(6, 4, seed=1))
    assert_close(statistics.spectrum, torch.linalg.eigvalsh(statistics.covariance))
    assert (statistics.spectrum - before).norm() > 1


def test_null_rank_counts_eigenvalues_strictly_under_the_threshold():
    statistics = KeyStatistics(torch.diag(torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)), 1)
    assert [statistics.null_rank(t) for t in (1e-9, 1.0, 1.5, 4.0, 5.0)] == [1, 1, 2, 3, 4]


def test_statistics_that_say_nothing_are_refused():
    with pytest.raises(StatisticsError, match="zero keys"):
        _ = KeyStatistics.empty(3).covariance
    with pytest.raises(StatisticsError, match=r"\(2, 4\) do not fit statistics of dimension 3; expected \(n, 3\)"):
        KeyStatistics.empty(3).update(torch.zeros(2, 4))
    with pytest.raises(StatisticsError, match="not positive semi-definite"):
        _ = KeyStatistics(-reference.eye(3), 1).spectrum


def test_one_layer_of_a_collection_is_the_last():
    layers = {
        3: second_moment(normal(9, 4)), 7: second_moment(normal(9, 4, seed=1)), 5: second_moment(normal(9, 4, seed=2))
    }
    assert one_layer(layers) is layers[7] and one_layer(layers[3]) is layers[3]
    assert torch.equal(dense(InverseCovariance(layers)), dense(InverseCovariance(layers[7])))


# Metrics


def test_metrics_are_what_they_say():
    p = problem()
    C, P = p.full.covariance, p.projector
    assert_close(dense(InverseCovariance(p.full, 7.0, 0.3)), torch.linalg.inv(7 * C + 0.3 * reference.eye(9)))
    assert_close(dense(NullSpace(p.flat, 5.0, THRESHOLD)), P / 5)
    assert_close(dense(Isotropic(9, 4.0)), reference.eye(9) / 4)
    assert torch.equal(dense(inverse_covariance(7.0, 0.3)(p.full)), dense(InverseCovariance(p.full, 7.0, 0.3)))
    assert torch.equal(dense(null_space(THRESHOLD, 5.0)(p.flat)), dense(NullSpace(p.flat, 5.0, THRESHOLD)))


def test_a_metric_and_its_rule_have_the_same_defaults():
    p = problem()
    for metric, rule, statistics in ((InverseCovariance, inverse_covariance, p.full), (NullSpace, null_space, p.flat)):
        assert torch.equal(dense(metric(statistics)), dense(rule()(statistics)))


def test_building_a_metric_leaves_the_statistics_alone():
    p = problem()
    before = p.full.moment.clone()
    InverseCovariance(p.full, 1.0, 5.0)
    NullSpace(p.full, 1.0, 1e3)
    assert torch.equal(before, p.full.moment)


@pytest.mark.parametrize("rank", range(1, 10))
def test_null_space_is_null_whichever_factor_is_kept(rank: int):
    p = problem(rank=rank)
    metric, C, keys = NullSpace(p.flat, 1.0, THRESHOLD), p.flat.covariance, normal(20, 9)
    P = metric.project(reference.eye(9))
    assert metric.rank == rank and metric._thin.shape == (9, min(rank, 9 - rank))
    assert_close(P, reference.projector(C, THRESHOLD), 1e-9)
    assert_close(P @ P, P)
    assert_close(P.T, P)
    flat = metric.project(keys)
    assert ((flat @ C * flat).sum(1) <= THRESHOLD * flat.square().sum(1)).all() and (flat @ C).norm() < 1e-9
    assert_close(metric.project(flat), flat)
    assert (flat.norm(dim=1) > 1e-3).all()


def test_thin_and_complement_give_the_same_projector():
    p = problem(rank=4)
    one, other = NullSpace(p.flat, 1.0, THRESHOLD), NullSpace(p.flat, 1.0, THRESHOLD)
    other._thin_is_null, other._thin = False, p.flat._eigh[1][:, 4:]
    assert one._thin_is_null
    assert_close(dense(one), dense(other))


def bases(p) -> dict:
    """Metric and Q⁻¹ on its own range, with the projector on that range."""
    eye = reference.eye(9)
    return {
        "inverse covariance": (InverseCovariance(p.full, 2.0), 2 * p.full.covariance, eye),
        "null space": (NullSpace(p.flat, p.ridge, THRESHOLD), p.ridge * eye, p.projector),
        "isotropic": (Isotropic(9, 3.0), 3 * eye, eye),
    }


@pytest.mark.parametrize("past", [1, 5, 30])
@pytest.mark.parametrize("kind", ["inverse covariance", "null space", "isotropic"])
def test_conditioning_is_a_refit_with_the_past_keys(kind: str, past: int):
    p = problem(past=past)
    metric, inverse, P = bases(p)[kind]
    expected = P @ torch.linalg.inv(inverse + P @ p.past @ p.past.T @ P) @ P
    assert_close(dense(condition(metric, p.past.T)), expected)


@quick
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=4),
    st.sampled_from(["inverse covariance", "null space", "isotropic"]), st.integers(0, 10**6)
)
def test_conditioning_step_by_step_is_conditioning_once(sizes: list[int], kind: str, seed: int):
    p = problem(past=sum(sizes), seed=seed)
    metric = base = bases(p)[kind][0]
    for part in p.past.T.split(sizes):
        metric = condition(metric, part)
    once = condition(base, p.past.T)
    assert_close(dense(metric), dense(once))
    assert isinstance(metric, Dense) == (sum(sizes) > 9 / 2), (
        "a history of more than half the dimensions becomes a matrix"
    )
    if isinstance(metric, Conditioned):
        assert metric.base is base and metric.past_metric.shape == p.past.T.shape
        assert_close(metric.past_metric, base.apply(p.past.T))
        assert_close(metric.factor, once.factor)


def test_a_history_is_kept_once():
    """A number for each coordinate of each past key, and their n × n factor: nothing holds the keys a second time."""
    p = problem(past=4)
    held = [t for t in vars(condition(p.null_space(), p.past.T)).values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held) == 4 * 9 + 4 * 4


@pytest.mark.parametrize("kind", ["inverse covariance", "null space", "isotropic"])
def test_a_long_history_stays_exact_and_costs_no_more(kind: str):
    p = problem(past=400)
    metric, inverse, P = bases(p)[kind]
    for part in p.past.T.split(5):
        metric = condition(metric, part)
    assert_close(dense(metric), P @ torch.linalg.inv(inverse + P @ p.past @ p.past.T @ P) @ P)
    assert isinstance(metric, Dense) and metric.operator.shape == (9, 9) == (metric.dim, metric.dim)
    assert torch.equal(metric.operator, metric.operator.T) and torch.linalg.eigvalsh(metric.operator).min() > -1e-14


def test_conditioning_returns_a_new_metric_and_forgets_nothing():
    p = problem()
    base = p.null_space()
    one = condition(base, p.past.T)
    before = dense(one)
    two = condition(one, p.keys.T)
    assert isinstance(one, Conditioned) and len(one.past_metric) == 3 and isinstance(two, Dense) and two.dim == 9
    assert (
        torch.equal(dense(one), before)
        and condition(one, p.keys.T[:0]) is one
        and condition(base, p.keys.T[:0]) is base
    )
    assert (dense(two) - before).norm() > 1e-2 * before.norm()
    assert torch.linalg.eigvalsh(before - dense(two)).min() > -1e-12  # a constraint more never loosens the metric


def test_metrics_answer_in_the_dtype_of_the_rows_and_carry_gradients():
    p = problem()
    for metric in (InverseCovariance(p.full), p.null_space(), condition(p.null_space(), p.past.T), Isotropic(9)):
        rows = p.keys.T.float().requires_grad_()
        found = metric.apply(rows)
        found.sum().backward()
        assert found.dtype == torch.float32 and found.shape == rows.shape
        assert_close(found.detach().double(), metric.apply(p.keys.T), 1e-5)
        assert_close(rows.grad.double(), dense(metric).sum(1).expand(4, 9), 1e-5)


# Refusals


@pytest.mark.parametrize("missing", [1, 2, 8])
def test_singular_covariances_are_refused(missing: int):
    """Fewer keys than dimensions, by one or by many, whatever the rounding; a ridge helps."""
    for seed in range(200):
        statistics = second_moment(normal(20 - missing, 20, seed=seed))
        with pytest.raises(
            StatisticsError, match=f"{20 - missing} keys of dimension 20 is numerically singular; .* ridge > 0"
        ):
            InverseCovariance(statistics, 15_000.0)
        assert_close(
            dense(InverseCovariance(statistics, 1.0, 0.1)),
            torch.linalg.inv(statistics.covariance + 0.1 * reference.eye(20)), 1e-9
        )


@pytest.mark.parametrize("rank", [1, 5, 8])
def test_keys_of_a_subspace_make_a_singular_covariance_however_many(rank: int):
    for seed in range(20):
        with pytest.raises(StatisticsError, match="72 keys of dimension 9 is numerically singular"):
            InverseCovariance(problem(rank=rank, seed=seed).flat)


def test_directions_of_very_different_scale_are_not_singular():
    scale = torch.logspace(-7, 7, 8, dtype=torch.float64)
    keys = normal(100, 8)
    expected = dense(InverseCovariance(second_moment(keys)))
    assert_close(scale[:, None] * dense(InverseCovariance(second_moment(keys * scale))) * scale, expected)


def test_ill_conditioned_covariances_are_not_refused():
    C = torch.diag(torch.logspace(-10, 0, 8, dtype=torch.float64))
    basis = torch.linalg.qr(normal(8, 8))[0]
    metric = InverseCovariance(KeyStatistics(1000 * basis @ C @ basis.T, 1000))
    assert_close(dense(metric), basis @ torch.linalg.inv(C) @ basis.T, 1e-5)


def test_an_empty_null_space_is_refused_with_what_was_found():
    statistics = second_moment(normal(60, 6))
    smallest = f"{statistics.spectrum[0]:.2e}"
    with pytest.raises(
        StatisticsError,
        match=rf"none of 6 eigenvalues .* threshold=0.001 \(smallest {smallest}, 60 keys\).* raise the threshold",
    ):
        NullSpace(statistics, 1.0, 1e-3)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda s: InverseCovariance(s, weight=0), "weight must be > 0"),
        (lambda s: InverseCovariance(s, ridge=-1), "ridge ≥ 0"),
        (lambda s: NullSpace(s, ridge=0), "ridge and threshold must be > 0"),
        (lambda s: NullSpace(s, threshold=0), "threshold must be > 0"),
    ],
)
def test_parameters_out_of_range_are_refused(build, said: str):
    with pytest.raises(ParameterError, match=said):
        build(problem().flat)
