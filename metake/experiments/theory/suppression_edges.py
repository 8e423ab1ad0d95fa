"""Where MetaKE v1 Theorem 1 ends: assumptions dropped, and readings of the C that is meant to grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch

from metake.algebra.geometry import InverseCovariance, KeyStatistics
from metake.algebra.solve import association, attenuation
from metake.experiments.theory.comparisons import foretold, rounding
from metake.experiments.theory.spectral_suppression import amplified, layer, suppression_bound
from metake.support.errors import StatisticsError

EDGES = {
    "all energy in H, ideal bound": "none", "energy outside H, judged by the ideal bound": "some",
    "a small eigenvalue counted into H": "some",
    "all energy in H: β → 0": "none", "1 % of the energy outside H: β → 0": "some",
    "λ = 0 and C singular: A can be inverted": "some",
}  # fmt: skip
"""The theorem and its limit as stated, and where an assumption is dropped: how many instances should then break it."""


def edges(trials: int = 40, seed: int = 0, dim: int = 12) -> pd.DataFrame:
    """As `comparisons.foretold`: a bound is broken if γ exceeds it by more than rounding; β → 0 is judged at s_H = 1e8,
    λ = 1, ‖k‖² = d, where the ideal bound allows 1e-6.
    """
    generator, spare = torch.Generator().manual_seed(seed), {case: [] for case in EDGES}
    protected = torch.arange(dim) >= dim // 2
    for _ in range(trials):
        directions = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
        spectrum = torch.where(protected, 10.0, 0.1) * (1 + torch.rand(dim, dtype=torch.float64, generator=generator))
        drawn = torch.randn(dim, dtype=torch.float64, generator=generator)
        inside, leaning = (
            ((drawn * m) / (drawn * m).norm() * dim**0.5)[None] @ directions.T
            for m in (protected, torch.where(protected, 1.0, 0.5))
        )
        one_percent = 0.99**0.5 * inside + 0.1 * dim**0.5 * directions[:, 0][None]
        allowed = dim / (spectrum[protected].min() + 1)
        gammas = [
            association(key, InverseCovariance(layer(spectrum, directions), ridge=1.0)) for key in (inside, leaning)
        ]
        far = torch.where(protected, 1e8, spectrum)
        grown = InverseCovariance(layer(far, directions), ridge=1.0)
        counted = suppression_bound(
            leaning, torch.where(protected, spectrum, 10.0), directions, protected | (torch.arange(dim) > 0), 1.0
        )
        bounded = ((gammas[0], allowed), (gammas[1], allowed), (gammas[1], counted))
        left = [1 - (gamma / most).item() for gamma, most in bounded]
        left += [1 - 1e6 * attenuation(association(key, grown)).item() for key in (inside, one_percent)]
        keys, spectra = (inside, leaning, leaning, inside, one_percent), (*[spectrum] * 3, far, far)
        errors = [rounding(4 * dim, amplified(k @ directions, x, 1.0)) for k, x in zip(keys, spectra, strict=True)]
        found = [x / error for x, error in zip(left, errors, strict=True)]
        found.append(-math.inf if _refused(layer(torch.where(protected, spectrum, 0.0), directions)) else math.inf)
        for case, clear in zip(EDGES, found, strict=True):
            spare[case].append(clear)
    return foretold(EDGES, spare)


def _refused(found: KeyStatistics) -> bool:
    """Whether the library refuses to invert C without a ridge."""
    try:
        InverseCovariance(found)
    except StatisticsError:
        return True
    return False


def readings(seed: int = 0, dim: int = 8, counts: Sequence[int] = (100, 1000, 10_000, 100_000)) -> pd.DataFrame:
    """Whether more text of the same kind suppresses an edit: β of one key as the number N of preserved keys grows.

    (13) needs a C; the texts allow the mean of kkᵀ over the preserved keys, as the code of the whole family has it,
    or the sum K₀K₀ᵀ. The proof's "increasing old-key density ⇒ s_H → ∞" speaks of N. Columns: reading, at N = 100, …,
    falls.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    scales = torch.logspace(0.5, -1, dim, dtype=torch.float64)
    key = (torch.arange(dim) == 0).double()[None]  # along what the preserved keys use most
    for name in ("mean, E[kkᵀ]", "sum, K₀K₀ᵀ"):
        betas = []
        for count in counts:
            found = KeyStatistics.empty(dim)
            found.update(torch.randn(count, dim, dtype=torch.float64, generator=generator) * scales)
            found = KeyStatistics(found.moment, 1) if name.startswith("sum") else found
            betas.append(attenuation(association(key, InverseCovariance(found, ridge=1.0))).item())
        rows.append(
            {"C": name}
            | {f"β at N = {n:,}": b for n, b in zip(counts, betas, strict=True)}
            | {"β → 0": betas[-1] < 0.1 * betas[0]}
        )
    return pd.DataFrame(rows)
