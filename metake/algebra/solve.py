"""The one solver of the closed-form family: Δ = R·M, with the gate M = (I + KᵀQK)⁻¹KᵀQ in sample space.

Batch first: `keys` is Kᵀ, (n, d_in); `residuals` is Rᵀ, (n, d_out). Nothing here knows of a model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metake.algebra.geometry import Metric
from metake.support.errors import NumericalError, ParameterError, StatisticsError


class Solution(NamedTuple):
    """What one closed-form solve gives."""

    gate: Tensor  #          (n, d_in)   M
    realization: Tensor  #   (n, n)      B = M K
    realized: Tensor  #      (n, d_out)  (R B)ᵀ


def gate(keys: Tensor, metric: Metric, noise: float = 1.0, at: Tensor | None = None) -> Tensor:
    """Structural gate of a closed-form edit.

    M = (ν I + KᵀQK)⁻¹ KᵀQ          (MetaKE v3 eq. 8 and B.3 with ν = 1 and Q = (P/λ) | Kₚ; MEMIT with Q = (λC)⁻¹)

    keys:   (n, d_in) float, rows are Kᵀ
    metric: symmetric PSD operator on key space
    noise:  ν ≥ 0, variance of the written residual; 0 interpolates exactly (EMMET)
    at:     (n, d_in) keys K* at which the residual is to be found, M = (ν I + KᵀQK*)⁻¹ KᵀQ; by default K (ROME: the
            plain prompt's key, while K is averaged over contexts)
    Returns (n, d_in), same dtype and device as keys. Differentiable in keys.
    Raises  StatisticsError if noise = 0 and two keys coincide under the metric, NumericalError if KᵀQK is not finite.
    Cost    one application of the metric, n² d_in + n³ after.
    """
    if noise < 0:
        raise ParameterError(f"noise must be ≥ 0; found {noise}")
    given, keys = keys.dtype, keys.to(torch.promote_types(keys.dtype, torch.float32))  # half precision has no Cholesky
    metric_keys = metric.apply(keys)
    if at is not None:
        return _gate_at(metric_keys, at.to(keys), noise).to(given)
    inner = _finite(metric_keys @ keys.T)
    inner = (inner + inner.T) / 2 + noise * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed.item() or (noise == 0 and _nearly_singular(factor.diagonal().square(), keys, metric_keys)):
        raise _undetermined(len(keys))
    return torch.cholesky_solve(metric_keys, factor).to(given)


def _gate_at(metric_keys: Tensor, at: Tensor, noise: float) -> Tensor:
    inner = _finite(metric_keys @ at.T) + noise * torch.eye(len(at), dtype=at.dtype, device=at.device)
    factor, order, failed = torch.linalg.lu_factor_ex(inner)
    if failed.item() or (noise == 0 and _nearly_singular(factor.diagonal().abs(), at, metric_keys)):
        raise _undetermined(len(at))
    return torch.linalg.lu_solve(factor, order, metric_keys)


def _finite(inner: Tensor) -> Tensor:
    if not inner.isfinite().all():
        raise NumericalError(
            f"KᵀQK is not finite: keys or metric hold numbers that are not, or it exceeds {inner.dtype}; see which "
            "weights of the model are broken, or solve in a wider dtype"
        )
    return inner


def _undetermined(count: int) -> StatisticsError:
    return StatisticsError(
        f"{count} keys do not determine an exact write under this metric: two of them coincide in it, or one "
        "lies in its null space; use noise > 0, or drop the repeated requests"
    )


def _nearly_singular(pivots: Tensor, keys: Tensor, metric_keys: Tensor) -> bool:
    """Whether a pivot is rounding next to ‖k‖‖Qk‖: the key repeats earlier ones, or the metric does not see it."""
    own = keys.norm(dim=1) * metric_keys.norm(dim=1)
    return bool((pivots <= 100 * torch.finfo(pivots.dtype).eps * own).any())


def realization(keys: Tensor, gate: Tensor) -> Tensor:
    """Request-interaction matrix B = M K, (n, n), spectrum in [0, 1): what of each planned residual is written.

    For one request it is the attenuation β = γ/(1+γ) (MetaKE v3 Proposition 1, eqs 31 and 35–43).
    """
    return gate @ keys.T


def spectrum(realization: Tensor, at_keys: bool = True) -> Tensor:
    """Eigenvalues of B, real parts, (n,).

    B = (νI + Γ)⁻¹Γ is as symmetric as Γ = KᵀQK and takes a symmetric solver, n³ instead of 25 n³, unless the residual
    is found elsewhere than `at_keys` (ROME).
    """
    if at_keys:
        return torch.linalg.eigvalsh((realization + realization.T) / 2)
    return torch.linalg.eigvals(realization).real


def solve(keys: Tensor, residuals: Tensor, metric: Metric, noise: float = 1.0, at: Tensor | None = None) -> Solution:
    """Gate, request-interaction matrix and realized residuals ΔK = R B of one batch at one layer.

    keys: (n, d_in); residuals: (n, d_out), same dtype; at: as in `gate`. Raises ParameterError if their lengths differ.
    """
    if len(keys) != len(residuals):
        raise ParameterError(f"{len(keys)} keys but {len(residuals)} residuals; expected one residual a key")
    structural = gate(keys, metric, noise, at)
    interaction = realization(keys if at is None else at, structural)
    return Solution(structural, interaction, interaction.T @ residuals)


def association(keys: Tensor, metric: Metric, at: Tensor | None = None) -> Tensor:
    """Association of each request alone with the downstream constraints.

    γ = kᵀ Q k, (n,) ≥ 0           (MetaKE v3 eqs 111–112: Q = C⁻¹ for MEMIT, (P/λ) | Kₚ for AlphaEdit)

    at: as in `gate`, (n, d_in); then γ = kᵀ Q k*, of either sign.
    """
    gamma = (metric.apply(keys) * (keys if at is None else at)).sum(-1)
    return gamma.clamp_min(0) if at is None else gamma


def attenuation(association: Tensor, noise: float = 1.0) -> Tensor:
    """β = γ / (ν + γ), the realized share of a single planned residual (MetaKE v3 Proposition 1, with ν = 1).

    noise: ν, as in `gate`; 0 writes exactly, β = 1.
    """
    return association / (noise + association)


def feasible_interval(
    association: Tensor, tau: float | Tensor, epsilon: float | Tensor, noise: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Norms of the planned residual that satisfy both success and editability.

    τ/β ≤ ‖r‖ ≤ ε/(1−β) = ε(1+γ/ν);  empty (lower > upper) iff β < τ/(τ+ε)            (MetaKE v3 Theorem 1, with ν = 1)

    association: γ, (n,); tau: > 0, realized norm that success needs; epsilon: > 0, unrealized norm that is tolerated,
    both in the residual's units. Returns (lower, upper), each (n,); γ = 0 gives lower = inf, ν = 0 upper = inf.
    """
    tau, epsilon = (torch.as_tensor(x, dtype=association.dtype, device=association.device) for x in (tau, epsilon))
    if not ((tau > 0).all() and (epsilon > 0).all()):
        raise ParameterError(f"tau and epsilon must be > 0; found tau={tau.tolist()}, epsilon={epsilon.tolist()}")
    upper = epsilon * (1 + association / noise) if noise else torch.full_like(epsilon + association, torch.inf)
    return tau / attenuation(association, noise), upper
