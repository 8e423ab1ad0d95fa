"""Bi-level problems with every derivative at hand: the paper's inner objective of an edit, literally,
with the editor's solve as its solution.

    u*(v) = argmin_u Q(u, v),  F(v) = J(u*(v), v)                                     MetaKE v3 eqs 69, 70

u are the active coordinates of the update, Δ_l = U_l V_lᵀ with V_l an orthonormal basis of the range of P_l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

from metake.algebra.geometry import InverseCovariance, KeyStatistics, Metric, NullSpace, condition
from metake.algebra.solve import gate
from metake.experiments.theory.comparisons import rounding

KINDS = ("MEMIT", "AlphaEdit", "any smooth Q")
# numbers in [0, 1] that say how extreme an instance is: ridge, conditioning, size of keys, of past keys, of the outer
# weights
KNOBS = 5


class Layer(NamedTuple):
    """One layer of an inner problem: ‖U VᵀK − s(v − h)‖² + tr(U S Uᵀ)."""

    keys: Tensor  #     (n, d_in)    K
    metric: Metric  #                what the editor solves it with
    basis: Tensor  #    (d_in, m)    V
    penalty: Tensor  #  (m, m)       S: λI + VᵀKₚKₚᵀV, or λC + KₚKₚᵀ
    share: float  #                  s, the allocation
    amplified: float  #              κ, by how much the editor's solve may amplify rounding


class Problem(NamedTuple):
    """A bi-level problem. u and v are flat."""

    inner: Callable[[Tensor, Tensor], Tensor]  # Q
    outer: Callable[[Tensor, Tensor], Tensor]  # J
    solved: Callable[[Tensor], Tensor]  #        u*(v); for an edit the editor's own R M
    start: Tensor
    through: Callable[[Tensor, Tensor], Tensor] | None = None  # (v, ∇_u J) → Σ s G Mᵀ from the editor's gates
    amplified: float = 1.0  #                    by how much `solved` may amplify rounding, beside Q's own Hessian


def draw_layer(
    kind: str, dim: int, n: int, share: float, knobs: Tensor, generator: torch.Generator, visible: bool = True
) -> Layer:
    """A layer's literal inner objective and, from the same preserved keys, the editor's metric. Not visible: Pk = 0."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    ridge, spread, size, old = (
        (10 ** (4 * knobs[0] - 2)).item(), 10 ** (4 * knobs[1]).item(), 10 ** (2 * knobs[2] - 1),
        10 ** (2 * knobs[3] - 1)
    )
    axes, rank = torch.linalg.qr(normal(dim, dim))[0], 1 + int(torch.randint(dim - 1, (), generator=generator))
    keys, past = size * normal(n, dim), old * normal(int(torch.randint(3, (), generator=generator)), dim)
    scales = torch.logspace(0, -torch.log10(torch.tensor(spread)).item() / 2, dim, dtype=torch.float64)
    if kind == "AlphaEdit":
        scales[rank:] = 0  # what preserved text never uses: the range of P
    found = KeyStatistics(100 * dim * (axes * scales**2) @ axes.T, 100 * dim)
    basis = axes[:, rank:] if kind == "AlphaEdit" else torch.eye(dim, dtype=torch.float64)
    base = NullSpace(found, ridge, threshold=1e-10) if kind == "AlphaEdit" else InverseCovariance(found, weight=ridge)
    constraint = (
        ridge * (torch.eye(dim, dtype=torch.float64) if kind == "AlphaEdit" else found.covariance) + past.T @ past
    )
    keys = keys if visible else keys - (keys @ basis) @ basis.T
    plain, penalty = basis.T @ (constraint - past.T @ past) @ basis, basis.T @ constraint @ basis
    used = scales[:rank] if kind == "AlphaEdit" else scales
    amplified = _amplified(keys, basis, past, plain, penalty) * max(1.0, ((used[0] / used[-1]) ** 2).item())
    remembering = condition(base, past, lost=math.inf)  # `amplified` bounds what rounding takes
    return Layer(keys, remembering, basis, penalty, share, amplified)


def _amplified(keys: Tensor, basis: Tensor, past: Tensor, plain: Tensor, penalty: Tensor) -> float:
    """κ of a layer's solve: the worst condition number of its systems, times what projection and memory cancel."""
    seen, old = keys @ basis, past @ basis
    systems = [plain, penalty, penalty + seen.T @ seen]
    systems += [torch.eye(len(old)).to(old) + old @ torch.linalg.solve(plain, old.T)] * bool(len(old))
    without, behind = (torch.linalg.solve(matrix, seen.T).norm() for matrix in (plain, penalty))
    cancelled = keys.norm() / seen.norm() * without / behind
    return (torch.stack([torch.linalg.cond(matrix) for matrix in systems]).max() * cancelled).item()


def edit_problem(
    kind: str, generator: torch.Generator, knobs: Tensor, dim: int = 6, n: int = 2, width: int = 3, layers: int = 2,
    visible: bool = True
) -> Problem:
    """The inner problem of an edit of several layers with fixed keys, and an outer loss not convex in the update.

    J = cross-entropy of a small network of the edited weights + log cosh of what it sees of v + ‖v − v_0‖².
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    parts = [draw_layer(kind, dim, n, 1 / (layers - i), knobs, generator, visible) for i in range(layers)]
    anchor, start = normal(n, width), normal(n, width)
    weights = [normal(width, dim) for _ in parts]
    inputs, readout, labels, seen = (
        [normal(dim, 4) for _ in parts], 10 ** (2 * knobs[4] - 1) * normal(5, width), torch.tensor([0, 1, 2, 3]),
        normal(n * width)
    )
    cuts = [width * p.basis.shape[1] for p in parts]

    def updates(u: Tensor) -> list[Tensor]:
        return [piece.view(width, -1) @ p.basis.T for piece, p in zip(u.split(cuts), parts, strict=True)]

    def inner(u: Tensor, v: Tensor) -> Tensor:
        total = u.new_zeros(())
        for piece, p in zip(u.split(cuts), parts, strict=True):
            block = piece.view(width, -1)
            total = (
                total
                + (block @ (p.keys @ p.basis).T - p.share * (v.view(n, width) - anchor).T).square().sum()
                + torch.trace(block @ p.penalty @ block.T)
            )
        return total

    def outer(u: Tensor, v: Tensor) -> Tensor:
        hidden = torch.tanh(sum((w + delta) @ x for w, delta, x in zip(weights, updates(u), inputs, strict=True)))
        logits = (readout @ hidden).T
        return (
            torch.nn.functional.cross_entropy(logits, labels)
            + torch.log(torch.cosh(seen @ v))
            + (v - start.flatten()).square().sum()
        )

    def solved(v: Tensor) -> Tensor:
        residuals = [p.share * (v.view(n, width) - anchor) for p in parts]
        return torch.cat(
            [(r.T @ gate(p.keys, p.metric) @ p.basis).flatten() for r, p in zip(residuals, parts, strict=True)]
        )

    def through(v: Tensor, slope: Tensor) -> Tensor:
        # G_l, as far as the update may follow it
        signals = [piece.view(width, -1) @ p.basis.T for piece, p in zip(slope.split(cuts), parts, strict=True)]
        return sum(
            p.share * gate(p.keys, p.metric) @ signal.T for signal, p in zip(signals, parts, strict=True)
        ).flatten()

    return Problem(inner, outer, solved, start.flatten(), through, max(p.amplified for p in parts))


def smooth_problem(generator: torch.Generator, knobs: Tensor, size: int = 5, width: int = 4) -> Problem:
    """A Q that is not quadratic and a J that mixes u and v: the proposition asks for smoothness only.
    u* by Newton's method.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    half, mixed, waves, seen, start = (
        normal(size, size), normal(size, width), normal(6, size), normal(6, width), normal(width)
    )
    stiffness = 10 ** (2 * knobs[0] - 1) * (half @ half.T + 0.1 * torch.eye(size, dtype=torch.float64))
    outer_u, outer_v, bend = normal(6, size), normal(6, width), 10 ** (2 * knobs[4] - 1)

    def inner(u: Tensor, v: Tensor) -> Tensor:
        return (
            u @ stiffness @ u / 2
            - u @ mixed @ torch.tanh(v)
            + torch.log(torch.cosh(waves @ u - seen @ v)).sum()
            + u.square().sum().square() / 4
        )

    def outer(u: Tensor, v: Tensor) -> Tensor:
        return torch.sin(bend * (outer_u @ u + outer_v @ v)).sum() + v.square().sum()

    def solved(v: Tensor) -> Tensor:
        u, eye = torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
        for _ in range(40):
            bent = torch.tanh(waves @ u - seen @ v)
            step = stiffness @ u - mixed @ torch.tanh(v) + waves.T @ bent + u.square().sum() * u
            curved = stiffness + (waves.T * (1 - bent**2)) @ waves + u.square().sum() * eye + 2 * torch.outer(u, u)
            change = torch.linalg.solve(curved, step)
            u = u - change / max(1.0, change.norm().item())
            if change.norm() < 1e-14:
                break
        return u

    return Problem(inner, outer, solved, start)


def coupling(problem: Problem, v: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """c = −∇²_vu Q (∇²_uu Q)⁻¹ ∇_u J and ∇_v J at (u*(v), v), (size of v,) each, and what amplifies rounding in c: the
    condition of the solve, times what the last product cancels (eqs 71, 72).
    """
    u = problem.solved(v).detach() if u is None else u
    curved, mixed = hessian(problem.inner)(u, v), jacrev(grad(problem.inner), argnums=1)(u, v)
    direct, pull = grad(problem.outer, argnums=1)(u, v), torch.linalg.solve(curved, grad(problem.outer)(u, v))
    c = -mixed.T @ pull
    return c, direct, amplification(problem, curved) * (mixed.norm() * pull.norm() / c.norm()).item()


def amplification(problem: Problem, curved: Tensor) -> float:
    """By how much rounding may be amplified in u*: the Hessian's condition number, or the editor's own solve's."""
    return max(torch.linalg.cond(curved).item(), problem.amplified)


def total(problem: Problem, v: Tensor) -> Tensor:
    """F(v) = J(u*(v), v)."""
    return problem.outer(problem.solved(v), v)


def slope(
    problem: Problem, v: Tensor, direction: Tensor, rounded: float | None = None, step: float = 3e-4
) -> tuple[float, float]:
    """D F(v)[direction] by central differences of fourth order, and what such a difference may be off by.

    Its own error falls by 16 as the step halves, so the difference from twice the step is 15 times as much as it; that
    is granted, and what rounding may make of F at the eight points (rounded: of one, by default `rounding_of`).
    """
    unit, size = direction / direction.norm(), direction.norm().item()
    near, far, wide = (_change(problem, v, k * step * unit) for k in (1, 2, 4))
    found, coarse = (8 * near - far) / (12 * step), (8 * far - wide) / (24 * step)
    rounded = rounding_of(problem, v) if rounded is None else rounded
    granted = (found - coarse).abs() + 1.5 * rounded / step
    return found.item() * size, granted.item() * size


def _change(problem: Problem, v: Tensor, way: Tensor) -> Tensor:
    return total(problem, v + way) - total(problem, v - way)


def rounding_of(problem: Problem, v: Tensor) -> float:
    """What rounding may put between two values of F near v, absolute: its own terms, and u* as J sees it.

    An edit's gate is the same at every v, with all its rounding; Newton's u* is off anew each time, by the Hessian's
    condition.
    """
    u = problem.solved(v).detach()
    amplified = 1.0 if problem.through else torch.linalg.cond(hessian(problem.inner)(u, v)).item()
    seen = amplified * (grad(problem.outer)(u, v).norm() * u.norm()).item()
    own = problem.outer(u, v).abs() + grad(problem.outer, argnums=1)(u, v).norm() * v.norm()
    return rounding(len(u) + len(v)) * (1 + own.item() + seen)
