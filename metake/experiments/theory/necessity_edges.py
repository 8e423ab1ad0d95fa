"""Where isolation is right, and where MetaKE v3 Proposition 2 does not apply."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

from metake.experiments.theory.inner import KNOBS, Problem, coupling, draw_layer, edit_problem, slope, total
from metake.experiments.theory.necessity import isolated


def _still(problem: Problem, change: Tensor) -> Problem:
    """The problem with J ← J − ⟨change, u⟩."""
    return problem._replace(outer=lambda u, v: problem.outer(u, v) - change @ u)


def decoupled(seed: int = 0) -> pd.DataFrame:
    """An ordinary instance and the paper's three special cases: ‖c‖, F's steepest slope in ten ways, over ‖∇_u J‖."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.full((KNOBS,), 0.5, dtype=torch.float64)
    ordinary = edit_problem("AlphaEdit", generator, middle)
    u, v = ordinary.solved(ordinary.start).detach(), ordinary.start
    outer_slope = grad(ordinary.outer)(u, v)
    response = jacrev(grad(ordinary.inner), argnums=1)(u, v).T @ torch.linalg.inv(hessian(ordinary.inner)(u, v))
    reached = torch.linalg.pinv(response) @ (response @ outer_slope)
    unseen = edit_problem("AlphaEdit", torch.Generator().manual_seed(seed), middle, visible=False)
    cases = {
        "ordinary: the solve follows the target": ordinary,
        "the solve does not follow: Pk = 0": unseen,
        "nothing to gain: ∇_u J = 0": _still(ordinary, outer_slope),
        "gain out of reach: GMᵀ = 0, ∇_u J ≠ 0": _still(ordinary, reached),
    }
    rows, size = [], outer_slope.norm()
    for name, problem in cases.items():
        problem, own = isolated(problem), torch.Generator().manual_seed(1)
        ways = torch.randn(10, len(v), dtype=v.dtype, generator=own)
        steepest = max(abs(slope(problem, v, way / way.norm())[0]) for way in ways)
        gain = grad(problem.outer)(problem.solved(v).detach(), v).norm()
        row = {"case": name, "gain": (gain / size).item(), "coupling": (coupling(problem, v)[0] / size).norm().item()}
        rows.append(row | {"steepest": steepest / size.item()})
    return pd.DataFrame(rows)


def _ordinary(seed: int) -> Problem:
    middle = torch.full((KNOBS,), 0.5, dtype=torch.float64)
    return isolated(edit_problem("AlphaEdit", torch.Generator().manual_seed(seed), middle))


def edges(seed: int = 0) -> pd.DataFrame:
    """Assumptions dropped one by one: what is then found, and what would be found if the statement still held."""
    problem = _ordinary(seed)
    v, u = problem.start, problem.solved(problem.start).detach()
    c, _, _ = coupling(problem, v)
    short = problem._replace(solved=lambda v: 0.9 * problem.solved(v))
    at = short.solved(v).detach()
    early = coupling(short, v, at)[0] + grad(short.outer, argnums=1)(at, v)
    off = abs(slope(short, v, c)[0] / (early @ c).item() - 1)
    quick, slow = (h ** (1 / 3) / h for h in (1e-6, 1e-2))  # Q = u⁴/4 − uv: u* = v^(1/3)
    still = _still(problem, grad(problem.outer)(u, v))
    hollow = still._replace(outer=lambda w, x: still.outer(w, x) - 1e3 * (w - u).square().sum())
    fall = (total(hollow, v) - total(hollow, v - 0.1 * c / c.norm())).item()
    rows = [
        ("u solves the inner problem", "a solve that stops at 90 % of the way: relative error of eq. 71", off, "0"),
        ("u are active coordinates", "whole matrices U with Δ = UP: share of directions in which ∇²_uu Q vanishes",
         _null_share(seed), "0"),
        ("∇²_uu Q is not singular", "Q = u⁴/4 − uv, J = u, v = 0: slope of F over a step of 10⁻⁶ over that of 10⁻²",
         quick / slow, "1"),
        ("“first order” is not “optimal”", "c = 0 at v_iso but J concave in u: fall of F at a distance of 0.1",
         fall, "0 or less"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["assumption", "without it", "found", "if it still held"])


def _null_share(seed: int) -> float:
    """Of the Hessian of the inner problem in whole matrices, the eigenvalues that are zero next to the largest."""
    part = draw_layer(
        "AlphaEdit", 6, 1, 1.0, torch.full((KNOBS,), 0.5, dtype=torch.float64), torch.Generator().manual_seed(seed)
    )
    projector, width = part.basis @ part.basis.T, 3

    def inner(u: Tensor) -> Tensor:
        applied = u.view(width, -1) @ projector
        return (applied @ part.keys.T - 1).square().sum() + torch.trace(
            applied @ part.basis @ part.penalty @ part.basis.T @ applied.T
        )

    values = torch.linalg.eigvalsh(hessian(inner)(torch.zeros(width * len(projector), dtype=torch.float64)))
    return (values < 1e-10 * values[-1]).double().mean().item()


def readings(seed: int = 0) -> pd.DataFrame:
    """Readings of the stripped formulas: the sign of c, and a factor in Q. survives: computed."""
    problem, rows = _ordinary(seed), []
    c, _, _ = coupling(problem, problem.start)
    halved = problem._replace(inner=lambda u, v: problem.inner(u, v) / 2)
    apart = round(((coupling(halved, problem.start)[0] - c).norm() / c.norm()).item(), 9)
    for name, sign in (("c = −", 1), ("c = +", -1)):
        found = slope(problem, problem.start, -sign * c)[0] / c.square().sum().item()
        rows.append((f"{name}∇²_vu Q (∇²_uu Q)⁻¹ ∇_u J, step along −c", "D F[−c] / ‖c‖²", found, found < 0))
    rows.append(("Q with ½‖·‖² instead of ‖·‖²", "relative change of c", apart, apart == 0))
    return pd.DataFrame(rows, columns=["reading", "number", "value", "survives"])
