"""MetaKE v1 Theorem 2 and its Lemmas 1 and 2: a penalty that all requests share is a ball, what can be written is an
ellipsoid (eqs 36–50).

u is the displacement of a target from where Stage I begins. No part of the editor solves its problem (v1 eq. 38)
in closed form, so the formulas stand here; that a real batch has an ellipsoid at all is measured with the library's
own solve (`trap_edges.batch_trap`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake.experiments.decision import Decision, all_of
from metake.experiments.theory.comparisons import as_foretold, least, rounding, same

SLACK = 1e-9  # never more than this counts as rounding, however ill-conditioned the instance
STEP = 1e-6  # how far beside a boundary something is tried, relative


def displacement(gradient: Tensor, hessian: Tensor, strength: float | Tensor) -> Tensor:
    """u*(λ) = −(H + λI)⁻¹ g, the minimizer of gᵀu + ½uᵀHu + (λ/2)‖u‖², (…, d)        (v1 eqs 38, 39; H = 0: eq. 46)

    gradient: (d,); hessian: (d, d) symmetric; strength: λ, or several (…,), with H + λI positive definite, else u* is
    no minimum. Cost d³/3 each.
    """
    strengths = torch.as_tensor(strength, dtype=gradient.dtype)[..., None, None]
    shifted = hessian + strengths * torch.eye(len(gradient), dtype=gradient.dtype)
    return -torch.linalg.solve(shifted, gradient[:, None])[..., 0]


def radii(operator: Tensor, delta: float | Tensor) -> tuple[Tensor, Tensor]:
    """The largest ball inside E = {u: uᵀAu ≤ δ²} and the smallest around it: δ/√λmax(A), δ/√λmin(A); ratio √κ(A)
    (v1 Lemma 2, eq. 42)
    """
    values = torch.linalg.eigvalsh(operator)
    return delta / values[-1].sqrt(), delta / values[0].sqrt()


def strengths(operator: Tensor, delta: float, tau: float, easy: float = 1.0, hard: float = 1.0) -> tuple[float, float]:
    """The λ that serve both requests: from α_hard √λmax / δ (the hard one is safe) to α_easy / τ (progress).

    Empty (the first is larger) iff τ/α_easy > δ/(α_hard √λmax): τ > δ/√λmax where both gradients have one size α
    (v1 eqs 45, 49, 50)
    """
    return (hard / radii(operator, delta)[0]).item(), easy / tau


class Trap(NamedTuple):
    """Two requests with g = −α q along E's least and most restricted direction (v1 eq. 47), and their curvature."""

    operator: Tensor  # A
    delta: float
    tau: float
    hessian: Tensor
    easy: float  #      α of the request along q_min
    hard: float  #      α of the request along q_max

    def margins(self, strength: float | Tensor) -> tuple[Tensor, Tensor]:
        """(⟨q_min, u_easy⟩/τ, δ/√(uᵀAu) of u_hard) at a shared λ, or at several: both hold where they are ≥ 1."""
        directions = torch.linalg.eigh(self.operator)[1]
        easy = displacement(-self.easy * directions[:, 0], self.hessian, strength)
        hard = displacement(-self.hard * directions[:, -1], self.hessian, strength)
        return easy @ directions[:, 0] / self.tau, self.delta / (hard @ self.operator * hard).sum(-1).sqrt()

    def least(self, strength: float | Tensor) -> Tensor:
        """By how much a shared λ, or each of several, does more than both requests need; negative if one fails."""
        return torch.minimum(*self.margins(strength)) - 1

    @property
    def rounding(self) -> float:
        """What rounding may make of it: products over d directions, amplified as far as H + λI and A leave their own.

        Both displacements lie along eigenvectors, A's extreme ones: safety is that of λmax, whatever A's condition.
        """
        return rounding(4 * len(self.operator))


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    return 10 ** (low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item())


def random_operator(generator: torch.Generator, dim: int, condition: float, scale: float = 1.0) -> Tensor:
    """A random symmetric matrix of a given condition number and largest eigenvalue."""
    values = 10 ** (-math.log10(condition) * torch.rand(dim, dtype=torch.float64, generator=generator))
    values[0], values[-1] = 1.0, 1 / condition
    directions = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
    made = scale * (directions * values) @ directions.T
    return (made + made.T) / 2


def penalty_check(
    trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (2, 8, 32), rivals: int = 200
) -> pd.DataFrame:
    """Lemma 1 on random quadratics, singular ones among them: the penalized minimizer against points of its own ball.

    One row per instance: dim, rank, strength, radius, `better` = by how much the best of many rivals in the ball beats
    u*, relative (≤ 0: none does), `multiplier` = −d(minimum)/d(½ρ²) over a step in λ, in units of λ, `stretch` = the
    most that a larger λ adds to the radius, relative (≤ 0: nothing); and of each its error.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        dim, scale = dims[trial % len(dims)], uniform(generator, -3, 3)
        rank = dim if trial % 2 else dim // 2  # a singular H: the problem is convex only
        values, directions = torch.linalg.eigh(random_operator(generator, dim, uniform(generator, 0, 6), scale))
        hessian, gradient = (
            (directions * values * (torch.arange(dim) < rank)) @ directions.T,
            torch.randn(dim, dtype=torch.float64, generator=generator),
        )
        strength = scale * uniform(generator, -3, 3)
        at = displacement(gradient, hessian, strength)
        drawn = torch.randn(rivals, dim, dtype=torch.float64, generator=generator)
        drawn = torch.cat([drawn, at / at.norm() + 0.01 * drawn])  # anywhere, and next to it
        inside = torch.rand(2 * rivals, 1, dtype=torch.float64, generator=generator).pow(1 / dim)
        tried = at.norm() * torch.cat(
            [drawn / drawn.norm(dim=1, keepdim=True), inside * drawn / drawn.norm(dim=1, keepdim=True)]
        )
        best = quadratic(tried, gradient, hessian).min()
        larger = torch.logspace(0, 4, 30, dtype=torch.float64)
        norms = displacement(gradient, hessian, strength * larger).norm(dim=-1)
        value, condition = quadratic(at, gradient, hessian), ((values.max() + strength) / strength).item()
        # u* is the best of its ball: off by εκ along it, its value is off by the square of that only
        size = gradient.norm() * at.norm() + (at @ hessian @ at).abs() / 2
        rows.append({
            "dim": dim, "rank": rank, "strength": strength, "radius": at.norm().item(),
            "better": ((value - best) / value.abs()).item(),
            "better_error": rounding(4 * dim, size / value.abs(), SLACK),
            "multiplier": _multiplier(gradient, hessian, strength) / strength,
            "multiplier_error": rounding(4 * dim, 1 + condition, STEP),
            "stretch": (norms.diff() / norms[:-1]).max().item(), "stretch_error": rounding(4 * dim, condition, SLACK),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _multiplier(gradient: Tensor, hessian: Tensor, strength: float) -> float:
    """−d(minimum)/d(½ρ²) over a step from λ(1 − h) to λ(1 + h): λ, but for λh² at most, which is less than rounding.

    V₂ − V₁ = ⟨g + Hm, w⟩ and ½ρ₂² − ½ρ₁² = ⟨m, w⟩ with m = (u₁ + u₂)/2 and w = u₂ − u₁ = −(λ₂ − λ₁)(H + λ₂I)⁻¹u₁, so
    that nothing cancels.
    """
    step = 1e-8
    first, last = (displacement(gradient, hessian, strength * (1 + s * step)) for s in (-1, 1))
    middle, way = (first + last) / 2, displacement(first, hessian, strength * (1 + step)) * (2 * step * strength)
    return (-(gradient + hessian @ middle) @ way / (middle @ way)).item()


def quadratic(points: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """gᵀu + ½uᵀHu of one point or of rows."""
    return points @ gradient + (points @ hessian * points).sum(-1) / 2


def ellipsoid_check(trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (2, 8, 32)) -> pd.DataFrame:
    """Lemma 2 on random A: its balls, and a little larger and smaller ones, probed along random ways and A's own.

    One row per instance: dim, kappa, `inside` and `around` = how clearly no probe contradicts the two bounds, `tight` =
    how clearly both fail once they are moved by a millionth, in units of rounding; ratio_error = of √κ, relative, and
    its rounding.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        dim, condition, delta = dims[trial % len(dims)], uniform(generator, 0, 6), uniform(generator, -2, 2)
        operator = random_operator(generator, dim, condition, uniform(generator, -2, 2))
        inner, outer = radii(operator, delta)
        probes = torch.randn(400, dim, dtype=torch.float64, generator=generator)
        probes = torch.cat([probes, torch.linalg.eigh(operator)[1].T])
        probes = probes / probes.norm(dim=1, keepdim=True)
        reach = delta / (probes @ operator * probes).sum(1).sqrt()  # how far E goes in each direction
        errors = rounding(4 * dim) * (reach / inner).square()  # uᵀAu is off by ελmax
        inside, around = reach / inner - 1, 1 - reach / outer
        tight = [((STEP - spare) / errors).max().item() for spare in (inside, around)]
        rows.append({
            "dim": dim, "kappa": condition, "inside": (inside / errors).min().item(),
            "around": (around / errors).min().item(), "tight": min(tight),
            "ratio_error": abs((outer / inner).item() / condition**0.5 - 1),
            "rounding": rounding(4 * dim, condition, STEP),
        })  # fmt: skip
    return pd.DataFrame(rows)


def trap_check(trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (2, 8, 32), grid: int = 61) -> pd.DataFrame:
    """The two-request construction (v1 eqs 46–50): λ over eight decades, and next to each demand, is really tried.

    Every third instance lies within 1e-5 of the boundary τ = δ/√λmax. One row per instance: dim, kappa,
    boundary = τ√λmax/δ, trapped where τ > δ/√λmax, served = a tried λ serves both, alone = the easy request's own
    displacement of size τ is feasible, tried, `agrees` = how clearly a λ serves both where it should, and none where
    none should, in units of rounding; best = the largest of min(progress, safety) over λ, whose foretold value is
    (τ√λmax/δ)^−½, best_error relative, and its rounding.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        dim, condition = dims[trial % len(dims)], uniform(generator, 0, 6)
        operator, delta, alpha = (
            random_operator(generator, dim, condition, uniform(generator, -2, 2)), uniform(generator, -2, 2),
            uniform(generator, -2, 2)
        )
        inner, outer = (r.item() for r in radii(operator, delta))
        boundary = (
            1 + 1e-5 * (2 * torch.rand((), generator=generator).item() - 1)
            if trial // 3 % 3 == 2
            else uniform(generator, -2, 2)
        )
        trap = Trap(operator, delta, boundary * inner, torch.zeros_like(operator), alpha, alpha)
        first, last = strengths(operator, delta, trap.tau, alpha, alpha)
        middle = (first * last) ** 0.5
        tried = [middle * 10 ** (8 * i / (grid - 1) - 4) for i in range(grid)] + [
            end * (1 + s * STEP) for end in (first, last) for s in (-1, 1)
        ]
        *least, there = trap.least(torch.tensor([*tried, middle], dtype=torch.float64)).tolist()
        most, best = max(least), 1 + there
        rows.append({
            "dim": dim, "kappa": condition, "boundary": boundary, "trapped": boundary > 1, "served": most >= 0,
            "alone": trap.tau <= outer, "tried": len(tried),
            "agrees": (most if boundary <= 1 else -most) / trap.rounding,
            "best": best, "best_error": abs(best * boundary**0.5 - 1), "rounding": trap.rounding,
        })  # fmt: skip
    return pd.DataFrame(rows)


def judge(
    penalty: pd.DataFrame, ellipsoid: pd.DataFrame, trapped: pd.DataFrame, searched: pd.DataFrame,
    dropped: pd.DataFrame
) -> dict:
    """Holds if no instance contradicts either lemma or the construction, no search breaks one,
    and they fail where an assumption is dropped.
    """
    against = counted(penalty, ellipsoid, trapped).groupby("statement").found.sum()
    fails = as_foretold(dropped)
    found = [
        decide(f"{name} ({text})", distances)
        for name, text, decide, distances in _contradictions(penalty, ellipsoid, trapped)
    ]
    whole = all_of([*found, _reached("limits of the directed searches", searched.spare), fails])
    told = f"contradictions: {against['Lemma 1']} to Lemma 1 in {len(penalty)} quadratics, {against['Lemma 2']} to "
    told += f"Lemma 2 in {len(ellipsoid)} ellipsoids, {against['Theorem 2']} to the condition τ > δ/√λmax in "
    told += f"{len(trapped)} pairs of requests with {trapped.tried.sum()} λ tried; {int(searched.broken.sum())} of "
    told += f"{len(searched)} directed searches broke one; dropped assumptions fail as foretold: "
    return whole.verdict(told + ("yes" if fails.holds else "no"))


def _reached(what: str, distances: pd.Series) -> Decision:
    return least(what, distances, attained=True)


def _equal(what: str, distances: pd.Series) -> Decision:
    """Two ways to one number; minus how far they depart."""
    return same(what, -distances, [1.0] * len(distances))


def _contradictions(
    penalty: pd.DataFrame, ellipsoid: pd.DataFrame, trapped: pd.DataFrame
) -> list[tuple[str, str, Callable[[str, pd.Series], Decision], pd.Series]]:
    """What would contradict each statement: statement, contradiction, how it is decided whether it was found, and how
    far every instance is from it, in units of rounding.
    """
    multiplier, ratio = -(penalty.multiplier - 1).abs() / penalty.multiplier_error, -ellipsoid.ratio_error
    balls, share = ellipsoid[["inside", "around"]].min(axis=1), -trapped.best_error / trapped["rounding"]
    return [
        ("Lemma 1", "a point of the ball is better than u*", _reached, -penalty.better / penalty.better_error),
        ("Lemma 1", "the multiplier is not λ", _equal, multiplier),
        ("Lemma 1", "a larger λ has a larger ball", least, -penalty.stretch / penalty.stretch_error),
        ("Lemma 2", "the inscribed ball sticks out, or the other is too small", _reached, balls),
        ("Lemma 2", "either bound could be moved by a millionth", least, ellipsoid.tight),
        ("Lemma 2", "the ratio is not √κ", _equal, ratio / ellipsoid["rounding"]),
        ("Theorem 2", "τ > δ/√λmax, and a λ serves both", least, trapped.agrees[trapped.trapped]),
        ("Theorem 2", "τ ≤ δ/√λmax, and no λ serves both", least, trapped.agrees[~trapped.trapped]),
        ("Theorem 2", "the best λ meets another share than foretold", _equal, share),
    ]


def counted(penalty: pd.DataFrame, ellipsoid: pd.DataFrame, trapped: pd.DataFrame) -> pd.DataFrame:
    """What would contradict each statement, in how many instances it was looked for, and in how many it was found."""
    return pd.DataFrame([
        {"statement": name, "contradiction": text, "instances": len(found), "found": int((found < -1).sum())}
        for name, text, _, found in _contradictions(penalty, ellipsoid, trapped)
    ])
