"""A search against MetaKE v1's static trap and its two lemmas, by gradient ascent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.comparisons import rounding
from metake.experiments.theory.static_trap import SLACK, Trap, displacement, quadratic, radii


def adversarial_search(
    starts: int = 2, steps: int = 120, seed: int = 0, dims: Sequence[int] = (2, 5), boundary: float = 1.02
) -> pd.DataFrame:
    """Gradient ascent against each statement. One row per statement and dimension: largest, limit, spare = what is left
    to the limit, in units of rounding; broken, if it is exceeded by more.

    "Lemma 1": a point of the ball, H, g and λ climb 1 + how much the point beats u*, relative to |minimum|: at most 1.
    "Lemma 2": the center and A climb the size of a ball inside E, anywhere, in units of δ/√λmax: at most 1.
    "Theorem 2": λ and A climb min(progress/τ, δ/√(uᵀAu)) where τ = `boundary` · δ/√λmax: at most boundary^−½ < 1.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    searches = {
        "Lemma 1": (_rival, 2, 1.0), "Lemma 2": (_ball, 1, 1.0),
        "Theorem 2": (partial(_shared, boundary), 0, boundary**-0.5)
    }
    for (name, (objective, vectors, limit)), dim in ((s, d) for s in searches.items() for d in dims):
        size = dim * dim + vectors * dim + (name != "Lemma 2")
        begin = torch.randn(starts, size, dtype=torch.float64, generator=generator)
        found = ascend(partial(_each, objective, dim), begin, steps, rate=0.1)
        # forms in d² products; A, or H + λI, amplifies their rounding by its condition number at most
        spare = (1 - found.score / limit) / rounding(dim * dim, _condition(name, dim, found.point), SLACK)
        row = {"statement": name, "dim": dim, "starts": starts, "evaluations": found.evaluations}
        rows.append(row | {"largest": found.score, "limit": limit, "spare": spare, "broken": spare < -1})
    return pd.DataFrame(rows)


def _condition(name: str, dim: int, point: Tensor) -> float:
    """Condition number of what a search's statement solves or measures with, at a point."""
    root = point[: dim * dim].view(dim, dim)
    floor = point[-1].exp() if name == "Lemma 1" else 0.01
    return torch.linalg.cond(root @ root.T + floor * torch.eye(dim, dtype=point.dtype)).item()


def _each(objective: Callable[[int, Tensor], Tensor], dim: int, points: Tensor) -> Tensor:
    return torch.stack([objective(dim, point) for point in points])


def _rival(dim: int, point: Tensor) -> Tensor:
    root, gradient, inside, strength = point.split([dim * dim, dim, dim, 1])
    hessian = root.view(dim, dim) @ root.view(dim, dim).T
    at = displacement(gradient, hessian, strength[0].exp())
    rival = at.norm() * inside / (1 + inside.square().sum()).sqrt()
    value = quadratic(at, gradient, hessian)
    return 1 + (value - quadratic(rival, gradient, hessian)) / value.abs()


def _ball(dim: int, point: Tensor) -> Tensor:
    """The way out of E from a center inside it, along A's own directions and between them, at its shortest; δ = 1."""
    half, center = point.split([dim * dim, dim])
    operator = half.view(dim, dim) @ half.view(dim, dim).T + 0.01 * torch.eye(dim, dtype=point.dtype)
    values, directions = torch.linalg.eigh(operator)
    center = directions @ (center / (1 + center.square().sum()).sqrt() / values.sqrt())
    probes = torch.cat([directions.T, -directions.T, (directions[:, :1] + directions).T / 2**0.5])
    across, along = probes @ operator @ center, (probes @ operator * probes).sum(1)
    left = 1 - center @ operator @ center
    root = (across.square() + along * left).sqrt()
    out = torch.where(across > 0, left / (across + root), (root - across) / along)  # whichever does not cancel
    return out.min() * values[-1].sqrt()


def _shared(boundary: float, dim: int, point: Tensor) -> Tensor:
    root, strength = point[:-1].view(dim, dim), point[-1].exp()
    operator = root @ root.T + 0.01 * torch.eye(dim, dtype=point.dtype)
    trap = Trap(operator, 1.0, boundary * radii(operator, 1.0)[0], torch.zeros_like(operator), 1.0, 1.0)
    return torch.minimum(*trap.margins(strength))
