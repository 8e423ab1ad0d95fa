"""MetaKE v3 Theorem 3 and Corollary 2 on objectives whose smoothness, infimum and distance δ are known,
at random and searched for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake.editing.outer import CHOICES
from metake.experiments.decision import EPS
from metake.experiments.theory.adversary import ascend


class Landscape(NamedTuple):
    """f(v) = ½ vᵀSv + Σ h cos(w·v + φ): not convex, with a known bound of its smoothness and of its infimum."""

    stiffness: Tensor  # (d, d)  S ⪰ 0
    waves: Tensor  #     (m, d)  w
    heights: Tensor  #   (m,)    h
    phases: Tensor  #    (m,)    φ

    def __call__(self, value: Tensor) -> Tensor:
        return value @ self.stiffness @ value / 2 + (self.heights * torch.cos(self.waves @ value + self.phases)).sum()

    @property
    def smoothness(self) -> float:
        """L ≥ ‖∇²f‖ everywhere: ‖S‖ + ‖Σ |h| w wᵀ‖."""
        return (
            torch.linalg.matrix_norm(self.stiffness, 2)
            + torch.linalg.matrix_norm((self.waves.T * self.heights.abs()) @ self.waves, 2)
        ).item()

    def rounding(self, value: Tensor, slope: Tensor, size: float) -> float:
        """Of f and of η‖∇f‖² at a point, from the size of what is summed: sums of n terms lose n units of their
        absolute values, and a step loses one unit of v, along which f changes by ‖∇f‖ a unit of length.
        """
        terms = 2 * (len(value) + len(self.heights)) + 4
        summed = value.abs() @ self.stiffness.abs() @ value.abs() / 2 + self.heights.abs().sum()
        inside = self.stiffness.abs() @ value.abs() + self.waves.abs().T @ self.heights.abs()
        lost = 2 * summed + 2 * size * slope.norm() * inside.norm() + slope.norm() * value.norm()
        return (EPS * terms * lost).item()

    @property
    def lowest(self) -> float:
        """A lower bound of inf f."""
        return -self.heights.abs().sum().item()


def _draw(generator: torch.Generator, dim: int) -> tuple[Landscape, Tensor]:
    """A landscape and a start: conditioning up to 1e6, scale 1e-3 to 1e3, from purely quadratic to mostly waves."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    share = torch.rand(5, dtype=torch.float64, generator=generator)
    eigenvalues = 10 ** (6 * share[0] * (torch.rand(dim, dtype=torch.float64, generator=generator) - 1))
    basis, scale = torch.linalg.qr(normal(dim, dim))[0], 10 ** (6 * share[1] - 3)
    stiffness = scale * (basis * eigenvalues) @ basis.T
    heights = scale * share[2] * normal(1 + int(share[3] * 6)) * (share[4] > 0.3)
    return Landscape(stiffness, normal(len(heights), dim), heights, 6 * normal(len(heights))), 3 * normal(dim)


def _iterate(function: Callable[[Tensor], Tensor], start: Tensor, size: float, steps: int) -> tuple[Tensor, ...]:
    """Points, values and gradients, steps + 1 of each, of the optimizer that `refine` runs as "sgd"."""
    value, losses, slopes, points = start.clone().requires_grad_(), [], [], []
    optimizer = CHOICES["optimizer"]["sgd"]([value], lr=size)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = function(value)
        loss.backward()
        losses.append(loss.detach())
        slopes.append(value.grad.clone())
        points.append(value.detach().clone())
        optimizer.step()
    return torch.stack(points), torch.stack(losses), torch.stack(slopes)


READINGS = {  # left side over right side, from min ‖∇F_VL‖, min ‖∇F‖, 2 (F_VL(v_0) − inf)/(ηT) and δ
    "Theorem 3: min‖∇F_VL‖² ≤ E": lambda proxy, whole, rate, delta: proxy**2 / rate,
    "Corollary 2: min‖∇F‖² ≤ 2E + 2δ²": lambda proxy, whole, rate, delta: whole**2 / (2 * rate + 2 * delta**2),
    "sharper: min‖∇F‖ ≤ √E + δ": lambda proxy, whole, rate, delta: whole / (rate**0.5 + delta),
    "without the factor: min‖∇F‖² ≤ E + δ²": lambda proxy, whole, rate, delta: whole**2 / (rate + delta**2),
}


def convergence_check(trials: int = 160, seed: int = 0, dims: tuple[int, ...] = (1, 3, 10, 30)) -> pd.DataFrame:
    """Random landscapes: F_VL = f and F = f + δ⟨e, v⟩, so that ‖∇F − ∇F_VL‖ = δ everywhere.

    One row an instance: dim, conditioning, waves, product = ηL in (0, 2), steps; `shortfall`, by how much the worst
    step falls short of (η − Lη²/2)‖∇f‖², relative to |f| + η‖∇f‖², and the `rounding` of it; and for ηL ≤ 1,
    per reading of the lost text, left side over right side (holds: ≤ 1).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for trial in range(trials):
        landscape, start = _draw(generator, dims[trial % len(dims)])
        share = torch.rand(3, dtype=torch.float64, generator=generator).tolist()
        product, steps = (1.0, share[0], 1 + share[0])[trial // len(dims) % 3], 1 + int(40 * share[1])
        size = product / landscape.smoothness
        points, losses, slopes = _iterate(landscape, start, size, steps)
        squared = slopes.square().sum(1)
        promised = (size - landscape.smoothness * size**2 / 2) * squared[:-1]
        scale = (losses[:-1].abs() + size * squared[:-1]).clamp_min(1e-300)
        short = (losses[1:] - losses[:-1] + promised) / scale
        lost = [landscape.rounding(*pair, size) for pair in zip(points[:-1], slopes[:-1], strict=True)]
        worst = (short / (torch.tensor(lost, dtype=torch.float64) / scale)).argmax()
        rate = 2 * (losses[0] - landscape.lowest).item() / (size * steps)
        delta = rate**0.5 * 10 ** (4 * share[2] - 2)
        aside = torch.randn(len(start), dtype=torch.float64, generator=generator)
        whole = (slopes + delta * aside / aside.norm())[:-1].norm(dim=1).min().item()
        eigenvalues = torch.linalg.eigvalsh(landscape.stiffness)
        row = {
            "dim": len(start), "conditioning": (eigenvalues[-1] / eigenvalues[0]).item(),
            "waves": int((landscape.heights != 0).sum()), "product": product, "steps": steps
        }
        proxy = squared[:-1].min().sqrt().item()
        row |= {"shortfall": short[worst].item(), "rounding": lost[worst] / scale[worst].item()} | {
            name: ratio(proxy, whole, rate, delta) if product <= 1 else float("nan") for name, ratio in READINGS.items()
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _quadratic(points: Tensor, dim: int, most: float, horizon: int) -> tuple[Tensor, ...]:
    """One instance a row: spectrum (L = 1), start, step size below `most`, δ and its direction.
    What READINGS and the descent compare.
    """
    spectrum = torch.sigmoid(points[:, :dim])
    spectrum, value, size = (
        spectrum / spectrum.amax(1, keepdim=True), points[:, dim : 2 * dim], most * torch.sigmoid(points[:, -1:])
    )
    losses, slopes, fallen = [], [], []
    for _ in range(horizon + 1):
        slopes.append(spectrum * value)
        losses.append((slopes[-1] * value).sum(1) / 2)
        # F(v) − F(v′) without a difference
        fallen.append((slopes[-1].square() * size * (2 - size * spectrum)).sum(1) / 2)
        value = value - size * slopes[-1]
    size = size[:, 0]
    rate, delta = 2 * losses[0] / (size * horizon), torch.exp(points[:, -2])
    aside = points[:, 2 * dim : 3 * dim] / points[:, 2 * dim : 3 * dim].norm(dim=1, keepdim=True) * delta[:, None]
    slopes = torch.stack(slopes[:-1])
    descent = ((size - size**2 / 2) * slopes.square().sum(2) / torch.stack(fallen[:-1])).amax(0)
    return slopes.norm(dim=2).amin(0), (slopes + aside).norm(dim=2).amin(0), rate, delta, descent


def convergence_search(seed: int = 0, dim: int = 3, restarts: int = 12, steps: int = 200) -> pd.DataFrame:
    """An optimizer that tries to break each reading with a quadratic: spectrum, start, step size,
    δ and its direction are all its to choose.

    One row a reading: left side over right side at the worst it found with T = 1 and T = 3 steps; above 1, by more than
    `rounding`, the reading is refuted. Both sides are sums of squares: a ratio loses a few units a term and step.
    """
    starts = 2 * torch.randn(restarts, 3 * dim + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = {name: (1.0, lambda made, ratio=ratio: ratio(*made[:4])) for name, ratio in READINGS.items()}
    scores["descent: (η − Lη²/2)‖∇F_VL‖² ≤ fall, for η < 2/L"] = 2.0, lambda made: made[4]
    scores["Theorem 3's rate for η < 2/L"] = 2.0, lambda made: made[0] ** 2 / made[2]
    rows = []
    for name, (most, ratio) in scores.items():
        found = {
            f"T = {horizon}": ascend(
                lambda points, h=horizon: ratio(_quadratic(points, dim, most, h)), starts, steps
            ).score
            for horizon in (1, 3)
        }
        known = {"claimed": name in list(READINGS)[:3] or name.startswith("descent"), "rounding": 64 * dim * EPS}
        rows.append({"reading": name} | known | found)
    return pd.DataFrame(rows)
