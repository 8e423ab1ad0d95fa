"""Lemmas 3–5 of MetaKE v1: how far two layers' gates are apart, and what passes through one.

Lemma 3    A ⪰ μI, ‖E‖ < μ:  ‖(A+E)⁻¹‖ ≤ 1/(μ−‖E‖),  ‖(A+E)⁻¹ − A⁻¹‖ ≤ ‖E‖ / (μ(μ−‖E‖))
Lemma 4    ‖M_l − M_L‖ ≤ ε_k/λ + ‖k_L‖ Δ/(λ(λ−Δ)) ≤ c (ε_k + ε_C),  Δ = ε_C + (‖k_l‖+‖k_L‖) ε_k < λ
Lemma 5    ∇_R ℓ(W + R M) = G Mᵀ,  ‖G Mᵀ‖_F ≤ ‖G‖_F ‖M‖
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from metake.algebra.geometry import InverseCovariance, KeyStatistics, Metric
from metake.algebra.solve import gate
from metake.experiments.theory.comparisons import rounding

BOUNDS = ("paper", "no condition", "mean value")
LEMMAS = ("lemma 3: inverse", "lemma 3: difference", *(f"lemma 4: {name}" for name in BOUNDS), "lemma 5")
"""The inequalities, each a column with its left over its right side, and another with the rounding of that."""
SLACK = 1e-9  # of such a ratio never more than this counts as rounding, however ill-conditioned the instance
Layer = tuple[Tensor, Tensor]  # keys, (n, d), and covariance, (d, d)


def _metric(covariance: Tensor, ridge: float) -> Metric:
    """(C + λI)⁻¹, the first version's metric."""
    return InverseCovariance(
        KeyStatistics(covariance * 100 * len(covariance), 100 * len(covariance)), weight=1.0, ridge=ridge
    )


def lemma3(
    metric_of: Callable[[Tensor, float], Metric], covariance: Tensor, mu: float, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Left over right sides of Lemma 3, () each, for A = C + μI and E = change."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    inverse, size = metric_of(covariance, mu).apply(eye), matrix_norm(change, 2)
    moved = torch.linalg.inv(covariance + mu * eye + change)
    apart = moved @ change @ inverse  # A⁻¹ − (A+E)⁻¹, without subtracting
    return matrix_norm(moved, 2) * (mu - size), matrix_norm(apart, 2) * mu * (mu - size) / size


def lemma3_rounding(covariance: Tensor, mu: float, change: Tensor) -> float:
    """What rounding may make of either ratio of `lemma3`: both inverses' condition, and μ − ‖E‖ over what is left."""
    eye, size = torch.eye(len(covariance), dtype=covariance.dtype), matrix_norm(change, 2)
    systems = [torch.linalg.cond(covariance + mu * eye), torch.linalg.cond(covariance + mu * eye + change)]
    return rounding(4 * len(covariance), (sum(systems) + mu / (mu - size)).item(), SLACK)


def gate_bounds(keys_apart: Tensor, apart: Tensor, keys: Tensor, last: Tensor, ridge: float) -> dict[str, Tensor]:
    """Bounds of ‖M_l − M_L‖ from ε_k, ε_C, ‖K_l‖, ‖K_L‖ and λ, () each, and Δ.

    "paper":        ε_k/λ + ‖K_L‖ Δ/(λ(λ−Δ)), infinite where Δ ≥ λ      (Lemma 3 with μ = λ)
    "no condition": ε_k/λ + ‖K_L‖ Δ/λ²                    (the resolvent identity alone: both inverses are ≤ 1/λ)
    "mean value":   (5/4) ε_k/λ + ε_C/(2 λ^{3/2}), 1 for 5/4 with one key   (ours: M's derivative along a segment)
    """
    delta = apart + (keys + last) * keys_apart
    paper = torch.where(delta < ridge, keys_apart / ridge + last * delta / (ridge * (ridge - delta)), torch.inf)
    return {
        "delta": delta, "paper": paper, "no condition": keys_apart / ridge + last * delta / ridge**2,
        "mean value": 1.25 * keys_apart / ridge + apart / (2 * ridge**1.5)
    }


def drift(
    keys: Tensor, last: Tensor, metric: Metric, last_metric: Metric, apart: Tensor, ridge: float
) -> dict[str, Tensor]:
    """Lemma 4 for the keys, (n, d), and metrics of two layers whose covariances are `apart` = ε_C: ε_k,
    ‖M_l − M_L‖ by the editor's gates, the bounds.
    """
    here, there, keys_apart = gate(keys, metric), gate(last, last_metric), matrix_norm(keys - last, 2)
    found = {
        "keys apart": keys_apart, "covariances apart": apart, "gates apart": matrix_norm(here - there, 2),
        "gates": matrix_norm(here, 2) + matrix_norm(there, 2)
    }
    found |= gate_bounds(keys_apart, apart, matrix_norm(keys, 2), matrix_norm(last, 2), ridge)
    if len(keys) == 1:
        found["mean value"] = found["mean value"] - 0.25 * keys_apart / ridge
    return found


def _pair(one: Layer, last: Layer, ridge: float) -> dict[str, Tensor]:
    """`drift` of two layers given as keys and covariance."""
    return drift(
        one[0], last[0], _metric(one[1], ridge), _metric(last[1], ridge), matrix_norm(one[1] - last[1], 2), ridge
    )


def lemma4_rounding(one: Layer, last: Layer, ridge: float, found: dict[str, Tensor]) -> dict[str, float]:
    """What rounding may make of each ratio of Lemma 4: of the gates, each as far as its own solve amplifies, next to
    the bound; and of ε_k, ε_C and λ − Δ, differences, next to themselves.
    """
    size = max(matrix_norm(layer[1], 2).item() for layer in (one, last))
    keys = matrix_norm(one[0], 2) + matrix_norm(last[0], 2)
    differences = keys / found["keys apart"] + 2 * size / found["covariances apart"].clamp_min(1e-300)
    solves = (1 + size / ridge) * found["gates"]
    errors = {name: differences + solves / found[name] for name in BOUNDS}
    errors["paper"] = errors["paper"] + ridge / (ridge - found["delta"]).clamp_min(1e-300)
    return {name: rounding(4 * len(one[1]), error.item(), SLACK) for name, error in errors.items()}


def _draw(generator: torch.Generator, dim: int, n: int) -> tuple[Layer, Layer, float]:
    """Two layers that differ by a little or by a lot, and λ: rank, conditioning, sizes and drift over six decades."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    share = torch.rand(5, dtype=torch.float64, generator=generator)
    rank = 1 + int(share[0] * dim)
    basis = torch.linalg.qr(normal(dim, dim))[0][:, :rank] * 10 ** (
        -3 * share[1] * torch.linspace(0, 1, rank, dtype=torch.float64)
    )
    keys, apart, ridge = (
        10 ** (2 * share[2] - 1) * normal(n, dim), 10 ** (6 * share[3] - 5), (10 ** (4 * share[4] - 2)).item()
    )
    covariance, noise = basis @ basis.T, normal(dim, dim)
    other = covariance + apart * noise @ noise.T / dim
    return (keys, covariance), (keys + apart * normal(n, dim), other), ridge


def lemmas_check(trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (2, 6, 20)) -> pd.DataFrame:
    """Random instances: one row each with dim, n, whether Δ < λ, and left over right side of each inequality
    (holds: ≤ 1), with its rounding.

    "lemma 4: paper" is 0 where Δ ≥ λ: there it says nothing. "identity" is the relative error of Lemma 5's ∇_R ℓ = G
    Mᵀ by autograd.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        dim, n = dims[trial % len(dims)], 1 + trial // len(dims) % 3
        one, last, ridge = _draw(generator, dim, n)
        change = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
        change = change + change.T if trial % 2 else change
        share = 0.001 + 0.998 * torch.rand((), dtype=torch.float64, generator=generator)
        change = change / matrix_norm(change, 2) * ridge * share
        inverse, moved = lemma3(_metric, one[1], ridge, change)
        found = _pair(one, last, ridge)
        row = {"dim": dim, "n": n, "ridge": ridge, "covered": bool(found["delta"] < ridge)}
        row |= {"lemma 3: inverse": inverse.item(), "lemma 3: difference": moved.item()}
        row |= dict.fromkeys((f"{name} rounding" for name in LEMMAS[:2]), lemma3_rounding(one[1], ridge, change))
        row |= {f"lemma 4: {name}": (found["gates apart"] / found[name]).item() for name in BOUNDS}
        granted = lemma4_rounding(one, last, ridge, found)
        row |= {f"lemma 4: {name} rounding": granted[name] for name in BOUNDS}
        row |= {name: found[name].item() for name in ("gates apart", "paper", "mean value")}
        rows.append(row | _lemma5(last, ridge, generator))
    return pd.DataFrame(rows)


def _lemma5(layer: Layer, ridge: float, generator: torch.Generator) -> dict[str, float]:
    """∇_R of a loss of W + R M by autograd against G Mᵀ, and the norm bound."""
    keys, covariance = layer
    weight, inputs, labels = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((4, keys.shape[1]), (keys.shape[1], 7), (4, 7))
    )
    through = gate(keys, _metric(covariance, ridge))
    residuals = torch.randn(4, len(keys), dtype=torch.float64, generator=generator).requires_grad_()
    edited = weight + residuals @ through
    loss = (torch.tanh(edited @ inputs) * labels).sum()
    direct, signal = torch.autograd.grad(loss, [residuals, edited])
    norm = matrix_norm(signal) * matrix_norm(through, 2)
    granted = rounding(4 * keys.shape[1])
    return {
        "identity": ((direct - signal @ through.T).norm() / direct.norm()).item(),
        "identity rounding": granted * (norm / direct.norm()).item(),
        "lemma 5": (direct.norm() / norm).item(), "lemma 5 rounding": granted,
    }
