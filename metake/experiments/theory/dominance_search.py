"""A search that tries to break Theorem 3 of MetaKE v1, its lemmas, and a reading of it without the product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.comparisons import rounding
from metake.experiments.theory.gate_lemmas import (
    BOUNDS,
    SLACK,
    Layer,
    _metric,
    _pair,
    lemma3,
    lemma3_rounding,
    lemma4_rounding,
)

WIDTH = 3  # d of the instances


class Aim(NamedTuple):
    """An inequality to be broken: left over right side at a point, its rounding, and how many numbers a point has."""

    ratio: Callable[[Tensor], Tensor]
    rounding: Callable[[Tensor], float]
    size: int
    claimed: bool = True


def dominance_search(seed: int = 0, restarts: int = 4, steps: int = 120) -> pd.DataFrame:
    """An optimizer that tries to break each inequality and reading. One row each: the largest left over right side
    that it found; spare = what is left to 1, in units of rounding; it survives unless 1 is exceeded by more.

    Lemma 3 and 4 through the editor's own metrics and gates (d = 3, λ = μ = 1). "descent": the largest 1 − ⟨g,
    ĝ⟩/‖ĝ‖² over q.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    aims = _aims()
    starts = {
        name: torch.randn(restarts, aim.size, dtype=torch.float64, generator=generator) for name, aim in aims.items()
    }
    for name, aim in aims.items():
        found = ascend(lambda points, of=aim.ratio: torch.stack([of(x) for x in points]), starts[name], steps)
        spare = (1 - found.score) / aim.rounding(found.point)
        row = {"statement": name, "claimed": aim.claimed, "largest": found.score}
        rows.append(row | {"spare": spare, "survives": spare > -1})
    return pd.DataFrame(rows)


def _aims() -> dict[str, Aim]:
    lemma, free = 2 * WIDTH**2 + 2 * WIDTH + 2, 2 * WIDTH + WIDTH**2
    changed, aims = (lambda x: lemma3_rounding(*_changed(x))), {}
    for i, name in enumerate(("inverse", "difference")):
        aims[f"lemma 3: {name}"] = Aim(lambda x, i=i: lemma3(_metric, *_changed(x))[i], changed, lemma)
    aims |= {f"lemma 4: {name}": Aim(partial(_apart, name), partial(_apart_rounding, name), lemma) for name in BOUNDS}
    readings = {
        "theorem: ‖g − ĝ‖ ≤ (ε_tail(1+ε_gap) + ε_gap)‖ĝ‖": (1.0, False),
        "theorem without the product: (ε_tail + ε_gap)‖ĝ‖": (0.0, False),
        "descent: ⟨g, ĝ⟩ ≥ (1 − q)‖ĝ‖²": (1.0, True),
    }
    for name, (product, inner) in readings.items():
        of = partial(_theorem, product, inner)
        aims[name] = Aim(lambda x, of=of: of(x)[0], lambda x, of=of: of(x)[1], free, bool(product))
    return aims


def _changed(point: Tensor) -> tuple[Tensor, float, Tensor]:
    """C, μ = 1 and E of Lemma 3."""
    half, change = point[: 2 * WIDTH**2].view(2, WIDTH, WIDTH)
    return half @ half.T, 1.0, change / matrix_norm(change, 2) * torch.sigmoid(point[-1])


def _layers(point: Tensor) -> tuple[Layer, Layer]:
    """The two layers of Lemma 4, λ = 1."""
    halves, keys = point[: 2 * WIDTH**2].view(2, WIDTH, WIDTH), point[2 * WIDTH**2 : -2].view(2, 1, WIDTH)
    first = (keys[0], halves[0] @ halves[0].T)
    moved = first[1] + torch.exp(point[-1] - 3) * halves[1] @ halves[1].T
    return first, (keys[0] + torch.exp(point[-2] - 3) * keys[1], moved)


def _apart(name: str, point: Tensor) -> Tensor:
    """‖M_l − M_L‖ over a bound; for the paper's, which says nothing where Δ ≥ λ, −Δ there."""
    found = _pair(*_layers(point), 1.0)
    ratio = found["gates apart"] / found[name]
    return torch.where(found["delta"] < 1, ratio, -found["delta"]) if name == "paper" else ratio


def _apart_rounding(name: str, point: Tensor) -> float:
    layers = _layers(point)
    return lemma4_rounding(*layers, 1.0, _pair(*layers, 1.0))[name]


def _theorem(product: float, inner: bool, point: Tensor) -> tuple[Tensor, float]:
    """‖g − ĝ‖/‖ĝ‖, or 1 − ⟨g, ĝ⟩/‖ĝ‖², over ε_tail + product · ε_tail ε_gap + ε_gap of any proxy, any J_L and any tail,
    and the rounding of that.
    """
    proxy, off, tail = point[:WIDTH], point[WIDTH:-WIDTH].view(WIDTH, WIDTH), point[-WIDTH:]
    last = proxy + off.T @ proxy
    share, gap = tail.norm() / last.norm(), matrix_norm(off, 2)
    bound = share + product * share * gap + gap
    away = (last + tail - proxy).norm() / proxy.norm()
    left = 1 - (last + tail) @ proxy / proxy.square().sum() if inner else away
    granted = rounding(4 * WIDTH, ((2 + away) / bound + 3).item(), SLACK)
    return left / bound, granted
