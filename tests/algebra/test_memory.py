"""What a metric remembers, beside the literal d × d inverse in sixty digits: right, or refused."""

import mpmath
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metake.algebra.geometry import InverseCovariance, Isotropic, KeyStatistics, Metric, NullSpace, condition
from metake.algebra.solve import association, gate, solve
from metake.support.errors import NumericalError

WIDTH = 8
mpmath.mp.dps = 60


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(rows: Tensor) -> mpmath.matrix:
    return mpmath.matrix(rows.double().tolist())


def metric_and_truth(kind: str, spread: float, ridge: float, seed: int):
    """A metric, and Q | K of any keys (rows) by definition: (Q⁻¹ + KKᵀ)⁻¹, in the null space with P."""
    basis = torch.linalg.qr(normal(WIDTH, WIDTH, seed=seed))[0]
    C = basis @ torch.diag(torch.logspace(-spread, 0, WIDTH, dtype=torch.float64)) @ basis.T
    statistics = KeyStatistics(1000 * (C + C.T) / 2, 1000)
    if kind == "null space":
        made = NullSpace(statistics, ridge, 10 ** (-spread / 2))
        U = mpmath.qr(exact(statistics._eigh[1][:, : made.rank]), mode="skinny")[0]
    else:
        made = Isotropic(WIDTH, ridge) if kind == "isotropic" else InverseCovariance(statistics, ridge)
        U = mpmath.eye(WIDTH)
    weight = exact(statistics.moment) / 1000 if kind == "inverse covariance" else mpmath.eye(WIDTH)
    inverse = U.T * (mpmath.mpf(ridge) * weight) * U

    def remembering(keys: Tensor) -> mpmath.matrix:
        inside = exact(keys) * U
        return U * (inverse + inside.T * inside) ** -1 * U.T

    return made, remembering


def realized(Q: mpmath.matrix, keys: Tensor) -> Tensor:
    """B = (I + KᵀQK)⁻¹KᵀQK."""
    K = exact(keys)
    inner = K * Q * K.T
    found = (mpmath.eye(len(keys)) + inner) ** -1 * inner
    return torch.tensor([[float(found[i, j]) for j in range(len(keys))] for i in range(len(keys))])


def remember(metric: Metric, parts: list[Tensor]) -> Metric:
    for part in parts:
        metric = condition(metric, part)
    return metric


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["inverse covariance", "null space", "isotropic"]), st.floats(1, 10), st.floats(-10, 2),
    st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 10**6),
)  # fmt: skip
def test_what_is_remembered_is_right_or_refused(kind, spread, exponent, sizes, seed):
    """Of keys that were edited before and of new ones: B within 1e-5 of sixty digits, or a NumericalError."""
    metric, truth = metric_and_truth(kind, spread, 10**exponent, seed)
    past = normal(sum(sizes), WIDTH, seed=seed + 1)
    size = (metric.apply(past) @ past.T).trace()
    try:
        found = remember(metric, list(past.split(sizes)))
    except NumericalError as error:
        assert "give finite keys, and the metric a larger ridge" in str(error) and size > 1e-6 / 2.3e-16
        return
    assert size < 1e10
    keys = torch.cat([past[:2], normal(1, WIDTH, seed=seed + 2)])
    B = solve(keys, torch.zeros(len(keys), 1, dtype=torch.float64), found).realization
    assert (B - realized(truth(past), keys)).abs().max() < 1e-5


@pytest.mark.parametrize("exponent", [-4, -8])
def test_what_lost_most_is_refused(exponent):
    """Condition 1e10 and a small λ: without the bound a remembered key would realize 0.87 more or less than ½."""
    metric, _ = metric_and_truth("inverse covariance", 10, 10.0**exponent, 0)
    keys = normal(3, WIDTH, seed=1)
    with pytest.raises(NumericalError, match=r"trace \d\.\de\+1\d, and float64 keeps 1e-06 .* larger ridge"):
        condition(metric, keys)
    few = condition(metric, 1e-7 * keys[:1])
    with pytest.raises(NumericalError, match="cannot be remembered"):  # in a second step
        condition(few, keys)
    many = condition(metric, 1e-8 * normal(6, WIDTH, seed=2))  # kept as the matrix
    with pytest.raises(NumericalError, match="cannot be remembered"):
        condition(many, normal(6, WIDTH, seed=3)[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("past", [2, 7])
@pytest.mark.parametrize("kind", ["inverse covariance", "null space", "isotropic"])
def test_half_precision_is_remembered_as_its_numbers_say(kind, past, dtype):
    """The memory is that of the same numbers in float64; what is applied comes back in the rows' own dtype."""
    metric, truth = metric_and_truth(kind, 2.0, 0.5, 4)
    keys = normal(past, WIDTH, seed=5).to(dtype)
    found, wide = condition(metric, keys), condition(metric, keys.double())
    eye = reference.eye(WIDTH)
    assert torch.equal(found.apply(eye), wide.apply(eye))
    rows = normal(3, WIDTH, seed=6).to(dtype)
    step = torch.finfo(dtype).eps
    for narrow, exact_one in (
        (found.apply(rows), wide.apply(rows.double())), (gate(rows, found), gate(rows.double(), wide)),
        (association(rows, found), association(rows.double(), wide)),
    ):  # fmt: skip
        assert narrow.dtype == dtype
        assert (narrow.double() - exact_one).norm() <= 8 * step * exact_one.norm()
