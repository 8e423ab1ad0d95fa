"""What a method does to an update once it is solved: RECT's mask, SPHERE's softening, PRUNE's cap.

`when` says on what it acts: "layer", each layer's update before it is written (weight: the layer's current one);
"batch", the finished updates of a batch (weight: as the batch found it); "sequence", the sum of all batches, once,
at the end (weight: the original one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from metake.algebra.update import LayerUpdate
from metake.support.errors import ParameterError, near_misses

WHEN = ("layer", "batch", "sequence")


class PostProcess(Protocol):
    """A frozen value, so that it can be recorded. thin: what is made of a thin update is thin, of no higher rank;
    linear: it is linear in the update, once the weight is known.
    """

    when: str
    thin: ClassVar[bool]
    linear: ClassVar[bool]

    def __call__(self, update: LayerUpdate, weight: Tensor) -> LayerUpdate:
        """The update to make instead. weight: (d_out, d_in), see the module."""


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ParameterError(near_misses(str(value), known, name))


@dataclass(frozen=True)
class keep_largest:  # noqa: N801  (reads as a function in an editor's parts)
    """RECT (Gu et al. 2024): only the largest relative changes of a weight are made.

    Δᵢⱼ ← Δᵢⱼ if ρᵢⱼ ≥ τ else 0,   ρ = |Δ / (W + ε)|,   τ = the ⌊(1 − share) N⌋-th smallest of the N entries of ρ

    strict: the entry at τ goes too, so that ⌊(1 − share) N⌋ changes are dropped (RECT's own code), not one fewer.
    The result is dense. Cost: one selection among N entries.
    """

    thin: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    share: float = 0.4
    epsilon: float = 1e-8
    when: str = "batch"
    strict: bool = False

    def __post_init__(self) -> None:
        _check("time of a post-process", self.when, WHEN)
        if not (0 < self.share <= 1 and self.epsilon >= 0):
            raise ParameterError(f"share must be in (0, 1] and epsilon ≥ 0; found {self.share}, {self.epsilon}")

    def __call__(self, update: LayerUpdate, weight: Tensor) -> LayerUpdate:
        delta = update.delta
        if not delta.any():
            return update
        if drop := math.floor((1 - self.share) * delta.numel() + 1e-9):  # 0.6 · 10 is 6, not 5.999…
            # 0/0: nothing changes
            change = (delta / (weight.to(delta) + self.epsilon)).abs().nan_to_num(0.0, torch.inf)
            threshold = change.flatten().kthvalue(drop).values
            delta = torch.where(change > threshold if self.strict else change >= threshold, delta, 0.0)
        return LayerUpdate(update.module, update.left[:, :0], update.right[:0], delta)


@dataclass(frozen=True)
class soften_principal:  # noqa: N801
    """SPHERE: the update avoids the principal directions of the weight's rows.

    Δ ← Δ (I − α U Uᵀ),   U = the top r eigenvectors of ŴᵀŴ,  Ŵ = rows of W of unit norm,
    r = #{j : Σ_{i≤j} μᵢ / Σ μᵢ ≤ ratio} + 1,  α = strength

    side: "key", the paper's; "output" normalizes the columns and softens ΔᵀU, which the released code does wherever the
    weight is stored transposed (GPT-2). The eigenvectors come from the smaller of the two Gram matrices,
    ~9 min(d_out, d_in)³; the rank of the update does not grow.
    """

    thin: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    ratio: float = 0.5
    strength: float = 0.5
    side: str = "key"
    when: str = "layer"

    def __post_init__(self) -> None:
        _check("time of a post-process", self.when, WHEN)
        _check("side", self.side, ("key", "output"))
        if not (0 <= self.ratio < 1 and 0 <= self.strength <= 1):
            raise ParameterError(f"ratio must be in [0, 1) and strength in [0, 1]; found {self.ratio}, {self.strength}")

    def __call__(self, update: LayerUpdate, weight: Tensor) -> LayerUpdate:
        return self.of(weight.to(update.left))(update)

    def of(self, weight: Tensor) -> Callable[[LayerUpdate], LayerUpdate]:
        """The rule for one weight, whose eigenvectors are found once; in the weight's dtype."""
        return partial(self._softened, principal=self._principal(weight if self.side == "key" else weight.T))

    def _softened(self, update: LayerUpdate, principal: Tensor) -> LayerUpdate:
        def soften(rows: Tensor) -> Tensor:
            return rows - self.strength * (rows @ principal) @ principal.T

        dense = update.dense
        if self.side == "key":
            return replace(update, right=soften(update.right), dense=dense if dense is None else soften(dense))
        left, dense = soften(update.left.T).T.contiguous(), dense if dense is None else soften(dense.T).T
        return replace(update, left=left, dense=dense)

    def _principal(self, rows: Tensor) -> Tensor:
        """The top eigenvectors, (width, r), of the Gram matrix of unit rows, (count, width)."""
        unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
        few = len(unit) < unit.shape[1]
        values, vectors = torch.linalg.eigh(unit @ unit.T if few else unit.T @ unit)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        rank = min(len(values), int((values.cumsum(0) / values.sum() <= self.ratio).sum()) + 1)
        vectors = vectors[:, :rank]
        return unit.T @ vectors / values[:rank].sqrt() if few else vectors


@dataclass(frozen=True)
class cap_spectrum:  # noqa: N801
    """PRUNE (Ma et al. 2025): singular values of the change grow only logarithmically beyond the weight's largest.

    σᵢ ← σ_max + log_α σᵢ − log_α σ_max  where σᵢ ≥ σ_max = σ₁(W₀),  α = base;   unchanged below

    add_twice: the capped change is added to the already changed weight, W₀ + Δ + Δ', as the code released with
    AlphaEdit does. A thin change is capped through the QR of its factors, O((d_out + d_in) r²), and stays thin.
    """

    thin: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    base: float = math.e
    add_twice: bool = False
    when: str = "sequence"

    def __post_init__(self) -> None:
        _check("time of a post-process", self.when, WHEN)
        if not self.base > 1:
            raise ParameterError(f"base must be > 1; found {self.base}")

    def __call__(self, update: LayerUpdate, weight: Tensor) -> LayerUpdate:
        wide = weight.double() if len(weight) <= weight.shape[1] else weight.T.double()
        limit = torch.linalg.eigvalsh(wide @ wide.T)[-1].sqrt().to(update.left)  # σ₁ by the smaller Gram matrix
        u, s, vh = update.svd()
        grown = limit + (s.clamp_min(limit) / limit).log() / math.log(self.base)
        capped = LayerUpdate(update.module, u * torch.where(s >= limit, grown, s), vh)
        if self.add_twice:
            return update + capped
        return capped if (s >= limit).any() else update


def correction(rules: Sequence[PostProcess], total: LayerUpdate, weight: Tensor) -> LayerUpdate:
    """What must still be added to a weight that already carries `total`, for it to carry what the rules make of it."""
    wanted = reduce(lambda update, rule: rule(update, weight), rules, total)
    if wanted is total:
        return LayerUpdate(total.module, total.left[:, :0], total.right[:0])
    difference = wanted + replace(total, left=-total.left, dense=None if total.dense is None else -total.dense)
    return difference if difference.dense is not None else difference.compress(max(1, total.rank))[0]
