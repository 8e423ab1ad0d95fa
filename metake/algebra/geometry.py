"""Key space: the streamed second moment of the keys, and the metrics on key space that tell the methods apart.

A *metric* is a symmetric positive semi-definite operator Q on key space, applied to rows: `metric.apply(keys)` is KᵀQ
for `keys` = Kᵀ. A *metric rule* is a recipe that builds one from a layer's statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from metake.support.errors import NumericalError, ParameterError, StatisticsError


class Metric(Protocol):
    """A symmetric positive semi-definite operator on key space."""

    dim: int

    def apply(self, rows: Tensor) -> Tensor:
        """Rows times Q: (n, d_in) → (n, d_in), in the dtype of `rows`, differentiable in them."""


@dataclass
class KeyStatistics:
    """Streamed uncentred second moment of the keys of one layer.

    C = E[k kᵀ] = (1/N) Σ k kᵀ                    (MEMIT's C₀; float64 whatever the keys' dtype)

    moment: (d_in, d_in) float64, Σ k kᵀ;  count: N, the keys seen so far.
    """

    moment: Tensor
    count: int = 0

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> KeyStatistics:
        return cls(torch.zeros(dim, dim, dtype=torch.float64, device=device))

    @property
    def dim(self) -> int:
        return self.moment.shape[0]

    def update(self, keys: Tensor) -> None:
        """Add keys, (n, d_in). Cost n d_in²."""
        keys = keys.detach().to(self.moment)
        if keys.ndim != 2 or keys.shape[1] != self.dim:
            found = f"keys of shape {tuple(keys.shape)} do not fit statistics of dimension {self.dim}"
            raise StatisticsError(f"{found}; expected (n, {self.dim})")
        self.moment.addmm_(keys.T, keys)
        self.count += keys.shape[0]
        self.__dict__.pop("_eigh", None)

    def to(self, device: torch.device | str) -> KeyStatistics:
        """These statistics on a device; themselves if they are there."""
        if self.moment.device == torch.device(device):
            return self
        moved = object.__new__(type(self))
        vars(moved).update(vars(self), moment=self.moment.to(device))
        if "_eigh" in vars(self):
            vars(moved)["_eigh"] = tuple(t.to(device) for t in self._eigh)
        return moved

    @property
    def covariance(self) -> Tensor:
        """C, (d_in, d_in) float64."""
        if not self.count:
            raise StatisticsError("statistics of zero keys have no second moment; stream some text through them first")
        return self.moment / self.count

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        worst = values[0].item()
        if worst < -1e-8 * max(values[-1].item(), 1e-300):
            found = f"second moment is not positive semi-definite (smallest eigenvalue {worst:.2e})"
            raise StatisticsError(f"{found}; recompute the statistics")
        return values.clamp_min(0), vectors.contiguous()  # as read from a cache: the last digit depends on the layout

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues of C in ascending order, (d_in,). One `eigh`, ~9 d_in³, kept."""
        return self._eigh[0]

    def null_rank(self, threshold: float) -> int:
        """Number of eigenvalues of C below `threshold`: the directions in which AlphaEdit may write."""
        return int((self.spectrum < threshold).sum())


Layers = KeyStatistics | Mapping[int, KeyStatistics]  # of one layer, or of several by their number


def one_layer(statistics: Layers) -> KeyStatistics:
    """Statistics of one layer: themselves, or the last layer (the paper's L) of a collection."""
    return statistics[max(statistics)] if isinstance(statistics, Mapping) else statistics


class InverseCovariance:
    """MEMIT's metric.

    Q = (λ C + ρ I)⁻¹        λ = weight, ρ = ridge      (MEMIT: ρ = 0; MetaKE's first version: λ = 1, ρ > 0)

    Factored once by Cholesky in float64, d_in³/3; an application is two triangular solves, 2 n d_in².
    Raises StatisticsError if λC + ρI is numerically singular: no silent pseudo-inverse.
    """

    def __init__(self, statistics: Layers, weight: float = 1.0, ridge: float = 0.0):
        statistics = one_layer(statistics)
        if weight <= 0 or ridge < 0:
            raise ParameterError(f"weight must be > 0 and ridge ≥ 0; found weight={weight}, ridge={ridge}")
        self.dim = statistics.dim
        operator = weight * statistics.covariance
        operator.diagonal().add_(ridge)
        self._factor, failed = torch.linalg.cholesky_ex(operator)
        # next to each direction's own variance: keys may have outlier dimensions
        lost = self._factor.diagonal().square() <= 1e-12 * operator.diagonal()
        if failed.item() or (ridge == 0 and statistics.count < self.dim) or lost.any():
            raise StatisticsError(
                f"the second moment of {statistics.count} keys of dimension {self.dim} is numerically singular; "
                f"stream more or more varied text (at least several times {self.dim} tokens), or choose a ridge > 0"
            )

    def apply(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.to(self._factor.dtype).T, self._factor).T.to(rows.dtype)


class NullSpace:
    """AlphaEdit's metric.

    Q = P / λ       P = U₀U₀ᵀ,  U₀ = eigenvectors of C with eigenvalue < threshold,  λ = ridge     (AlphaEdit eq. 12–13)

    P is kept as the thinner of U₀ and its complement; an application costs 4 n d_in min(rank, d_in − rank).
    Raises StatisticsError if no eigenvalue lies under the threshold: nothing could be written.
    """

    def __init__(self, statistics: Layers, ridge: float = 1.0, threshold: float = 2e-2):
        statistics = one_layer(statistics)
        if ridge <= 0 or threshold <= 0:
            raise ParameterError(f"ridge and threshold must be > 0; found ridge={ridge}, threshold={threshold}")
        self.dim, self.ridge = statistics.dim, ridge
        self.rank = statistics.null_rank(threshold)
        if self.rank == 0:
            raise StatisticsError(
                f"the null space is empty: none of {self.dim} eigenvalues of the key second moment lies under "
                f"threshold={threshold} (smallest {statistics.spectrum[0]:.2e}, {statistics.count} keys), so no update "
                "could be written; raise the threshold, or take a method without a projector (memit)"
            )
        self._thin_is_null, vectors = self.rank <= self.dim - self.rank, statistics._eigh[1]
        self._thin = (vectors[:, : self.rank] if self._thin_is_null else vectors[:, self.rank :]).clone()

    def project(self, rows: Tensor) -> Tensor:
        """Rows times P, (n, d_in)."""
        thin = self._thin.to(rows.dtype)
        if self._thin_is_null:
            return (rows @ thin) @ thin.T
        for _ in range(2):  # twice: a key outside the null space leaves rounding of its own size after one subtraction
            rows = rows - (rows @ thin) @ thin.T
        return rows

    def apply(self, rows: Tensor) -> Tensor:
        return self.project(rows) / self.ridge


@dataclass(frozen=True)
class Isotropic:
    """The metric that knows nothing of the preserved keys: Q = I / λ. MetaKE's key-only ablation gates with it."""

    dim: int
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ParameterError(f"ridge must be > 0; found {self.ridge}")

    def apply(self, rows: Tensor) -> Tensor:
        return rows / self.ridge


@dataclass(frozen=True)
class Conditioned:
    """A metric that remembers past keys.

    Q | Kₚ = Q − Q Kₚ (I + KₚᵀQKₚ)⁻¹ KₚᵀQ               (Woodbury on (Q⁻¹ + KₚKₚᵀ)⁻¹)

    Kept as the thin factor KₚᵀQ, (N, d_in), and the Cholesky factor of I + KₚᵀQKₚ, (N, N): an application costs
    2 n N d_in on top of the base metric; conditioning on n more keys adds their border to the factor, N² n + n³.
    Nothing asks for Kₚ itself: where it meets a further key it does so through the metric.
    """

    base: Metric
    past_metric: Tensor = field(repr=False)
    factor: Tensor = field(repr=False)

    @property
    def dim(self) -> int:
        return self.base.dim

    def apply(self, rows: Tensor) -> Tensor:
        wide = rows.double()
        overlap = torch.cholesky_solve(self.past_metric @ wide.T, self.factor)
        return (self.base.apply(wide) - overlap.T @ self.past_metric).to(rows.dtype)


@dataclass(frozen=True)
class Dense:
    """A metric as its matrix Q, (d_in, d_in): what a history becomes whose thin factor has outgrown it.

    An application costs 2 n d_in², conditioning on n more keys 4 n d_in², however many came before.
    """

    operator: Tensor = field(repr=False)

    @property
    def dim(self) -> int:
        return self.operator.shape[0]

    def apply(self, rows: Tensor) -> Tensor:
        return (rows.double() @ self.operator).to(rows.dtype)

    def condition(self, keys: Tensor, lost: float = 1e-6) -> Dense:
        """Q − QK (I + KᵀQK)⁻¹ KᵀQ as L⁻¹KᵀQ squared, symmetric to the last bit, which not every BLAS makes it."""
        thin = _remember(self, keys, lost)
        factor = thin.factor.T.contiguous().T  # as LAPACK writes it: the last digit depends on the layout
        half = torch.linalg.solve_triangular(factor, thin.past_metric, upper=False)
        square = half.T @ half
        return Dense(self.operator - (square + square.T) / 2)


def condition(metric: Metric, keys: Tensor, lost: float = 1e-6) -> Metric:
    """Q | K: the metric that also remembers `keys`, (n, d_in). Conditioning twice equals conditioning on both.

    The past is kept in float64, as a thin factor up to d_in / 2 keys, where it costs as much time and memory as the
    matrix itself, and as the matrix from there on: the cost of an edit stops growing.
    Exact up to ε‖KᵀQK‖, ε = 2e-16: what a remembered key may still realize is a difference of numbers so large.
    Raises NumericalError where that is more than `lost`, or not a number.
    """
    if not keys.shape[0]:
        return metric
    if isinstance(metric, Dense):
        return metric.condition(keys.double(), lost)
    thin = _remember(metric, keys.double(), lost)
    if len(thin.past_metric) <= thin.dim / 2:
        return thin
    every = torch.eye(thin.dim, dtype=torch.float64, device=keys.device).split(4096)  # large ones not all at once
    operator = torch.cat(list(map(thin.apply, every)))
    return Dense(operator.add_(operator.T.clone()).div_(2))


def _remember(metric: Metric, keys: Tensor, lost: float) -> Conditioned:
    if not isinstance(metric, Conditioned):
        metric = Conditioned(metric, keys[:0], keys.new_zeros(0, 0))
    keys_metric = metric.base.apply(keys)
    corner = keys_metric @ keys.T
    corner.diagonal().add_(1.0)
    border = torch.linalg.solve_triangular(metric.factor, metric.past_metric @ keys.T, upper=False)
    low = torch.linalg.cholesky_ex(corner - border.T @ border).L
    top = torch.cat([metric.factor, torch.zeros_like(border)], dim=1)
    factor = torch.cat([top, torch.cat([border.T, low], dim=1)])
    if not (trace := factor.square().sum()) <= (most := lost / torch.finfo(factor.dtype).eps):
        raise NumericalError(
            f"these keys cannot be remembered: I + KᵀQK has the trace {trace:.1e}, and float64 keeps {lost:g} of what "
            f"they realize up to {most:.0e}; give finite keys, and the metric a larger ridge or weight"
        )
    return Conditioned(metric.base, torch.cat([metric.past_metric, keys_metric]), factor)


class MetricRule(Protocol):
    """How an editor turns one layer's statistics into its metric; a frozen value that can be recorded."""

    def __call__(self, statistics: KeyStatistics) -> Metric: ...


@dataclass(frozen=True)
class inverse_covariance:  # noqa: N801  (reads as a function in an editor's parts)
    """Rule for `InverseCovariance`: MEMIT's `weight` = λ_C (15 000 on most models), MetaKE v1's `ridge`."""

    weight: float = 1.0
    ridge: float = 0.0

    def __call__(self, statistics: KeyStatistics) -> InverseCovariance:
        return InverseCovariance(statistics, self.weight, self.ridge)


@dataclass(frozen=True)
class null_space:  # noqa: N801
    """Rule for `NullSpace`: AlphaEdit's `threshold` on the eigenvalues of C, and `ridge` = λ ("L2": 10 in its code)."""

    threshold: float = 2e-2
    ridge: float = 1.0

    def __call__(self, statistics: KeyStatistics) -> NullSpace:
        return NullSpace(statistics, self.ridge, self.threshold)


@dataclass(frozen=True)
class isotropic:  # noqa: N801
    """Rule for `Isotropic`: a metric that asks nothing of the statistics (ROME without its covariance)."""

    ridge: float = 1.0

    def __call__(self, statistics: KeyStatistics) -> Isotropic:
        return Isotropic(statistics.dim, self.ridge)
