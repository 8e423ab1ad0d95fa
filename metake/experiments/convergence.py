"""MetaKE v3 Theorem 3 and Corollary 2: descent and stationarity of the look-ahead iteration, on a real layer and at random.

    descent   F(v − η∇F) ≤ F(v) − (η − 𝖫η²/2) ‖∇F‖²                        0 < η < 2/𝖫; for η ≤ 1/𝖫 the bracket is ≥ η/2
    rate      min_{t<T} ‖∇F_VL(v_t)‖² ≤ 2 (F_VL(v_0) − inf F_VL) / (η T)      η ≤ 1/𝖫
    floor     min_{t<T} ‖∇F(v_t)‖² ≤ 4 (F_VL(v_0) − inf F_VL) / (η T) + 2 δ²
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake.bilevel import CHOICES, OuterObjective, Refinement
from metake.experiments.adversary import ascend, climb
from metake.experiments.real_layer import RealLayer

STEP = 1e-3  # of finite differences of a gradient, in the units of a hidden state (norms of tens)
SETTLED = 1e-9  # a step whose predicted fall is smaller than this share of F is rounding


def outer_rule(anchor: str, steps: int = 15, step_size: float = 1.0, optimizer: str = "sgd") -> Refinement:
    """The outer objective on the plain prompts (literal eq. 97) with a normalization of the anchor."""
    return Refinement(steps, step_size, optimizer, prompts="plain", anchor_norm=anchor)


# On a real layer


def curvature(outer: OuterObjective, value: Tensor, slope: Tensor, direction: Tensor, rounds: int) -> tuple[float, Tensor]:
    """‖∇²F_VL‖ at V by power iteration on finite differences of the gradient, and the direction to go on from: an estimate from below."""
    size = 0.0
    for _ in range(rounds):
        direction = direction / direction.norm()
        direction = (outer.evaluate(value + STEP * direction)[1] - slope) / STEP
        size = direction.norm().item()
    return size, direction


def descend(outer: OuterObjective, step_size: float, steps: int, direction: Tensor, every: int = 8) -> list[dict]:
    """v ← v − η ∇F_VL(v) from V_init (eq. 82): one row an iterate with F_VL, ‖∇F_VL‖ and 𝖫 as far as it shows there.

    smoothness: ‖∇F_VL(v) − ∇F_VL(v′)‖/‖v − v′‖ from the iterate before, and every so often ‖∇²F_VL‖, the larger.
    """
    value, last, rows = outer.initial, None, []
    for step in range(steps + 1):
        loss, slope = outer.evaluate(value)
        found = ((slope - last).norm() / (step_size * last.norm()).clamp_min(1e-300)).item() if step else 0.0
        if step % every == 0:
            size, direction = curvature(outer, value, slope, direction, 4)
            found = max(found, size)
        rows.append({"step": step, "loss": loss.item(), "gradient": slope.norm().item(), "smoothness": found, "moved": (value - outer.initial).norm().item()})
        value, last = value - step_size * slope, slope
    return rows


def pilot(outer: OuterObjective, steps: int, seed: int = 0) -> tuple[float, list[dict], Tensor]:
    """A cautious run with half of 1/𝖫(V_init): its step size, its rows, and the direction of the largest curvature at V_init."""
    direction = torch.randn(outer.initial.shape, dtype=outer.initial.dtype, generator=torch.Generator().manual_seed(seed)).to(outer.initial.device)
    size, direction = curvature(outer, outer.initial, outer.evaluate(outer.initial)[1], direction, 10)
    return 0.5 / size, descend(outer, 0.5 / size, steps, direction), direction


def descents(layer: RealLayer, factors: tuple[float, ...] = (1.0, 1.5, 1.9, 2.2, 3.0), anchors: tuple[str, ...] = ("sum", "relative"), steps: int = 15) -> pd.DataFrame:
    """Runs of the look-ahead iteration with step sizes on both sides of 1/𝖫 and 2/𝖫, as multiples of 1/𝖫.

    𝖫 is the largest that a cautious run shows, which is the first one returned. One row an iterate: anchor, factor, step_size, then `descend`.
    """
    rows = []
    for anchor in anchors:
        outer = layer.outer(outer_rule(anchor))
        size, cautious, direction = pilot(outer, steps)
        measured = max(row["smoothness"] for row in cautious)
        runs = {size * measured: cautious} | {factor: descend(outer, factor / measured, steps, direction) for factor in factors}
        rows += [{"anchor": anchor, "factor": factor, "step_size": factor / measured} | row for factor, run in runs.items() for row in run]
    return pd.DataFrame(rows)


def falls(iterates: pd.DataFrame) -> pd.DataFrame:
    """One row a step that is more than rounding: what F_VL fell by, as a share of η‖∇F_VL‖², which the theorem bounds from below by 1 − η𝖫/2.

    𝖫 is the largest that showed along the step's own run, so `product` = η𝖫 is the run's.
    """
    rows = []
    for (anchor, factor, size), run in iterates.groupby(["anchor", "factor", "step_size"], sort=False):
        product = size * run.smoothness.max()
        for one, other in zip(run.itertuples(), run.iloc[1:].itertuples(), strict=False):
            predicted = size * one.gradient**2
            if predicted > SETTLED * one.loss:
                rows.append({"anchor": anchor, "factor": factor, "step": one.step, "product": product, "share": (one.loss - other.loss) / predicted, "bound": 1 - product / 2})
    return pd.DataFrame(rows)


def rates(iterates: pd.DataFrame) -> pd.DataFrame:
    """One row a run: η𝖫, the smallest share of a fall, steps that went up, and min ‖∇F_VL‖² over its bound with inf F_VL ≥ 0.

    `covered` by the descent inequality if η𝖫 < 2, by the rate if η𝖫 ≤ 1.
    """
    steps, rows = falls(iterates), []
    for (anchor, factor, size), run in iterates.groupby(["anchor", "factor", "step_size"], sort=False):
        own, count = steps[(steps.anchor == anchor) & (steps.factor == factor)], len(run) - 1
        bound = 2 * run.loss.iloc[0] / (size * count)
        row = {"anchor": anchor, "step size": size, "times L": size * run.smoothness.max(), "covered": size * run.smoothness.max() < 2, "smallest fall": own.share.min()}
        row |= {"bound": own.bound.iloc[0], "steps up": int((own.share < 0).sum()), "last loss / first": run.loss.iloc[-1] / run.loss.iloc[0]}
        rows.append(row | {"gradient over bound": run.gradient.iloc[:-1].min() ** 2 / bound, "moved": run.moved.iloc[-1]})
    return pd.DataFrame(rows)


def stress(layer: RealLayer, iterates: pd.DataFrame, anchor: str = "relative", trials: int = 40, seed: int = 0) -> dict[str, float]:
    """A search around V_init, as far as the η ≤ 1/𝖫 runs went, for the point whose step at η = 1/𝖫 falls short of η/2 ‖∇F_VL‖².

    Six directions: the gradient, the plan, random ones. Returns the smallest share found (theorem: ≥ 1/2), and its distance from V_init.
    """
    cautious = iterates[(iterates.anchor == anchor) & (iterates.factor <= 1)]
    size, reach = float(1 / cautious.smoothness.max()), float(cautious.moved.max())
    outer, generator = layer.outer(outer_rule(anchor)), torch.Generator().manual_seed(seed)
    start = outer.initial
    ways = [outer.evaluate(start)[1], start - outer.anchor, *(torch.randn(start.shape, dtype=start.dtype, generator=generator).to(start) for _ in range(4))]
    ways = torch.stack([way / way.norm() for way in ways])

    def away(point: Tensor) -> Tensor:
        spot = 2 * point - 1
        return reach * torch.einsum("i,inj->nj", spot.to(ways) / max(1.0, spot.norm().item()), ways)

    def shortfall(point: Tensor) -> float:
        loss, slope = outer.evaluate(start + away(point))
        after = outer.evaluate(start + away(point) - size * slope)[0]
        return -((loss - after) / (size * slope.square().sum())).item()

    found = climb(shortfall, torch.full((len(ways),), 0.5, dtype=torch.float64), trials, generator)
    return {"smallest fall": -found.score, "distance": away(found.point).norm().item(), "reach": reach, "points": found.evaluations}


def floor(layer: RealLayer, anchor: str = "relative", steps: int = 40, every: int = 4) -> pd.DataFrame:
    """Along the iteration at η = 1/𝖫 on F_VL: ‖∇F_VL‖ beside the whole pipeline's ‖∇F‖ and ‖∇F − ∇F_VL‖ (Corollary 2's δ is their largest).

    One row at every `every`-th iterate; the exact gradient runs through all edited layers.
    """
    outer = layer.outer(outer_rule(anchor))
    size = 1 / max(row["smoothness"] for row in pilot(outer, steps)[1])
    whole, _ = layer.downstream(outer.rule)
    value, rows = outer.initial, []
    for step in range(steps + 1):
        loss, slope = outer.evaluate(value)
        if step % every == 0:
            exact = whole.gradients(value)
            row = {"step": step, "look-ahead": slope.norm().item(), "whole": exact.exact.norm().item(), "apart": (exact.exact - slope).norm().item()}
            rows.append(row | {"loss": loss.item(), "whole loss": exact.losses.sum().item(), "step_size": size})
        value = value - size * slope
    return pd.DataFrame(rows)


# At random


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
        """𝖫 ≥ ‖∇²f‖ everywhere: ‖S‖ + ‖Σ |h| w wᵀ‖."""
        return (torch.linalg.matrix_norm(self.stiffness, 2) + torch.linalg.matrix_norm((self.waves.T * self.heights.abs()) @ self.waves, 2)).item()

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


def _iterate(function: Callable[[Tensor], Tensor], start: Tensor, size: float, steps: int) -> tuple[Tensor, Tensor]:
    """Values and gradients, (steps + 1,) and (steps + 1, d), of the optimizer that `refine` runs as "sgd"."""
    value, losses, slopes = start.clone().requires_grad_(), [], []
    optimizer = CHOICES["optimizer"]["sgd"]([value], lr=size)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = function(value)
        loss.backward()
        losses.append(loss.detach())
        slopes.append(value.grad.clone())
        optimizer.step()
    return torch.stack(losses), torch.stack(slopes)


READINGS = {  # left side over right side, from min ‖∇F_VL‖, min ‖∇F‖, 2 (F_VL(v_0) − inf)/(ηT) and δ
    "Theorem 3: min‖∇F_VL‖² ≤ E": lambda proxy, whole, rate, delta: proxy**2 / rate,
    "Corollary 2: min‖∇F‖² ≤ 2E + 2δ²": lambda proxy, whole, rate, delta: whole**2 / (2 * rate + 2 * delta**2),
    "sharper: min‖∇F‖ ≤ √E + δ": lambda proxy, whole, rate, delta: whole / (rate**0.5 + delta),
    "without the factor: min‖∇F‖² ≤ E + δ²": lambda proxy, whole, rate, delta: whole**2 / (rate + delta**2),
}


def convergence_check(trials: int = 160, seed: int = 0, dims: tuple[int, ...] = (1, 3, 10, 30)) -> pd.DataFrame:
    """Random landscapes: F_VL = f and F = f + δ⟨e, v⟩, so that ‖∇F − ∇F_VL‖ = δ everywhere.

    One row an instance: dim, conditioning, waves, product = η𝖫 in (0, 2), steps; `shortfall`, by how much the worst step falls short of
    (η − 𝖫η²/2)‖∇f‖², relative to |f| + η‖∇f‖²; and for η𝖫 ≤ 1, per reading of the lost text, left side over right side (holds: ≤ 1).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for trial in range(trials):
        landscape, start = _draw(generator, dims[trial % len(dims)])
        share = torch.rand(3, dtype=torch.float64, generator=generator).tolist()
        product, steps = (1.0, share[0], 1 + share[0])[trial // len(dims) % 3], 1 + int(40 * share[1])
        size = product / landscape.smoothness
        losses, slopes = _iterate(landscape, start, size, steps)
        squared = slopes.square().sum(1)
        promised = (size - landscape.smoothness * size**2 / 2) * squared[:-1]
        short = (losses[1:] - losses[:-1] + promised) / (losses[:-1].abs() + size * squared[:-1]).clamp_min(1e-300)
        rate = 2 * (losses[0] - landscape.lowest).item() / (size * steps)
        delta = rate**0.5 * 10 ** (4 * share[2] - 2)
        aside = torch.randn(len(start), dtype=torch.float64, generator=generator)
        whole = (slopes + delta * aside / aside.norm())[:-1].norm(dim=1).min().item()
        eigenvalues = torch.linalg.eigvalsh(landscape.stiffness)
        row = {"dim": len(start), "conditioning": (eigenvalues[-1] / eigenvalues[0]).item(), "waves": int((landscape.heights != 0).sum()), "product": product, "steps": steps}
        row |= {"shortfall": short.max().item()} | {name: ratio(squared[:-1].min().sqrt().item(), whole, rate, delta) if product <= 1 else float("nan") for name, ratio in READINGS.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _quadratic(points: Tensor, dim: int, most: float, horizon: int) -> tuple[Tensor, ...]:
    """One instance a row: spectrum (𝖫 = 1), start, step size below `most`, δ and its direction. What READINGS and the descent compare."""
    spectrum = torch.sigmoid(points[:, :dim])
    spectrum, value, size = spectrum / spectrum.amax(1, keepdim=True), points[:, dim : 2 * dim], most * torch.sigmoid(points[:, -1:])
    losses, slopes = [], []
    for _ in range(horizon + 1):
        slopes.append(spectrum * value)
        losses.append((slopes[-1] * value).sum(1) / 2)
        value = value - size * slopes[-1]
    size = size[:, 0]
    rate, delta = 2 * losses[0] / (size * horizon), torch.exp(points[:, -2])
    aside = points[:, 2 * dim : 3 * dim] / points[:, 2 * dim : 3 * dim].norm(dim=1, keepdim=True) * delta[:, None]
    slopes = torch.stack(slopes[:-1])
    falls = torch.stack(losses[:-1]) - torch.stack(losses[1:])
    descent = ((size - size**2 / 2) * slopes.square().sum(2) / falls).amax(0)
    return slopes.norm(dim=2).amin(0), (slopes + aside).norm(dim=2).amin(0), rate, delta, descent


def convergence_search(seed: int = 0, dim: int = 3, restarts: int = 12, steps: int = 200) -> pd.DataFrame:
    """An optimizer that tries to break each reading with a quadratic: spectrum, start, step size, δ and its direction are all its to choose.

    One row a reading: left side over right side at the worst it found with T = 1 and T = 3 steps; above 1 the reading is refuted.
    """
    starts = 2 * torch.randn(restarts, 3 * dim + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scores = {name: (1.0, lambda made, ratio=ratio: ratio(*made[:4])) for name, ratio in READINGS.items()}
    scores["descent: (η − 𝖫η²/2)‖∇F_VL‖² ≤ fall, for η < 2/𝖫"] = 2.0, lambda made: made[4]
    scores["Theorem 3's rate for η < 2/𝖫"] = 2.0, lambda made: made[0] ** 2 / made[2]
    rows = []
    for name, (most, ratio) in scores.items():
        found = {f"T = {horizon}": ascend(lambda points, h=horizon: ratio(_quadratic(points, dim, most, h)), starts, steps).score for horizon in (1, 3)}
        rows.append({"reading": name} | found)
    return pd.DataFrame(rows)
