"""One edited layer of MetaKE v3 Proposition 1: what the proposition says is written, what the objective's minimizer
writes, and what rounding may put between the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metake.algebra.geometry import InverseCovariance, KeyStatistics, Metric, NullSpace, condition
from metake.experiments.theory.comparisons import rounding

THRESHOLD = 1e-10  # variance of a direction that preserved keys of AlphaEdit's kind do not use; theirs is at least 1e-6
UPDATE = 1e-9  # of an update that is applied never more than this counts as rounding, however ill-conditioned


class Instance(NamedTuple):
    """One edited layer in float64; rows are keys, as in the library."""

    kind: str  #          "memit" or "alphaedit"
    preserved: Tensor  #  (N, d)      K₀; of AlphaEdit's kind they leave directions unused
    past: Tensor  #       (m, d)      Kₚ
    keys: Tensor  #       (n, d)      K
    residuals: Tensor  #  (n, d_out)  R
    ridge: float  #       λ

    def metric(self) -> Metric:
        """Q = (λC)⁻¹ or P/λ, conditioned on the past keys."""
        found = KeyStatistics.empty(self.preserved.shape[1])
        found.update(self.preserved)
        metric = (
            NullSpace(found, self.ridge, THRESHOLD)
            if self.kind == "alphaedit"
            else InverseCovariance(found, weight=self.ridge)
        )
        return condition(metric, self.past, lost=math.inf)  # κ bounds what rounding takes

    def predicted(self) -> Tensor:
        """What the proposition says is written at the keys: R·Γ(I+Γ)⁻¹ with Γ = KᵀQK, (n, d_out). (v3 eqs 38, 43)"""
        interaction = self.metric().apply(self.keys) @ self.keys.T
        return torch.linalg.solve(one_plus(interaction), interaction).T @ self.residuals

    def free(self) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of what Δ may read, (f, d), and the rows there whose squares are the penalty:
        λ tr(ΔCΔᵀ), or λ‖Δ‖².
        """
        dim = self.preserved.shape[1]
        if self.kind == "memit":
            return torch.eye(dim, dtype=torch.float64), (self.ridge / len(self.preserved)) ** 0.5 * self.preserved
        _, sizes, directions = torch.linalg.svd(self.preserved)
        unused = directions[int((sizes.square() / len(self.preserved) >= THRESHOLD).sum()) :]
        return unused, self.ridge**0.5 * torch.eye(len(unused), dtype=torch.float64)

    def minimizer(self) -> Tensor:
        """What the minimizer of the constrained objective writes at the keys, (n, d_out).

        min ‖ΔK − R‖² + ‖ΔKₚ‖² + λ tr(ΔCΔᵀ);  for AlphaEdit over Δ = ΔP, with λ‖Δ‖² for the last term      (v3 eqs 10,
        20, 33)

        As least squares of the stacked rows by QR: no gate, no metric, no inverse, nothing that the library solves
        with.
        """
        free, penalty = self.free()
        keys = self.keys @ free.T
        rows = torch.cat([keys, self.past @ free.T, penalty])
        wanted = torch.cat([self.residuals, self.residuals.new_zeros(len(rows) - len(keys), self.residuals.shape[1])])
        return keys @ torch.linalg.lstsq(rows, wanted, driver="gels").solution

    def conditioning(self) -> float:
        """κ: by how much the systems that stand between the objective and the prediction may amplify rounding.

        The largest condition number of A₀, A = A₀ + KₚKₚᵀ, A + KKᵀ, I + KₚᵀA₀⁻¹Kₚ, I + Γ and, under the projector,
        of C where it is not zero; times ‖K‖/‖PK‖ · ‖A₀⁻¹PK‖/‖A⁻¹PK‖, what the projection and the memory cancel.
        A₀ = λC or, projected, λI.
        """
        free, penalty = self.free()
        keys, past, plain = self.keys @ free.T, self.past @ free.T, penalty.T @ penalty
        whole = plain + past.T @ past
        solved = [torch.linalg.solve(matrix, keys.T) for matrix in (plain, whole)]
        systems = [plain, whole, whole + keys.T @ keys, one_plus(keys @ solved[1])]
        systems += [one_plus(past @ torch.linalg.solve(plain, past.T))] * bool(len(past))
        sizes = torch.linalg.svdvals(self.preserved)[
            : self.keys.shape[1] - len(free) if self.kind == "alphaedit" else None
        ]
        cancelled = self.keys.norm() / keys.norm() * solved[0].norm() / solved[1].norm()
        numbers = [*(torch.linalg.cond(s) for s in systems), (sizes[0] / sizes[-1]).square()]
        return (torch.stack(numbers).max() * cancelled).item()

    def minimizer_rounding(self) -> float:
        """What rounding may put between minimizer and prediction, relative: four sums in a row, ε κ for each term.

        They are over key space: the second moment or its projector, A₀⁻¹, what remembers the past, the batch's system.
        """
        return rounding(4 * self.keys.shape[1], self.conditioning())

    def update_rounding(self, metric: Metric) -> float:
        """The same for the library's update: it meets the prediction's Γ, so that only what follows it counts.

        Each entry of Γ sums d products of size ‖QK‖‖K‖ at most; (I+Γ)⁻¹ shrinks that, and amplifies it by cond(I+Γ).
        """
        flat = metric.apply(self.keys)
        system = one_plus(flat @ self.keys.T)
        shrunk = flat.norm() * self.keys.norm() * torch.linalg.matrix_norm(torch.linalg.inv(system), 2)
        return rounding(4 * self.keys.shape[1], 1 + shrunk * torch.linalg.cond(system), UPDATE)


def one_plus(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=torch.float64) + matrix


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def preserved_keys(kind: str, dim: int, rank: int, conditioning: float, generator: torch.Generator) -> Tensor:
    """Keys of a random orientation and a given spread of scales; of AlphaEdit's kind they span `rank` directions."""
    scales = torch.logspace(0, -torch.log10(torch.tensor(conditioning)).item(), dim, dtype=torch.float64)
    keys = normal(generator, 4 * dim, dim) * scales
    if kind == "alphaedit":
        keys[:, rank:] = 0  # the last directions are never used by preserved text: the null space
    return keys @ torch.linalg.qr(normal(generator, dim, dim))[0]
