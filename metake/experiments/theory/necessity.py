"""MetaKE v3 Proposition 2 and Corollary 1: the outer gradient through the inner solve, and what an isolated target
misses.

    ∇F = ∇_v J + c,   c = −∇²_vu Q (∇²_uu Q)⁻¹ ∇_u J                                    eq. 71
    ∇_v J(v_iso) = 0, c ≠ 0   ⟹   D F(v_iso)[−c] = −‖c‖² < 0                            Corollary 1

The problems are `inner`'s: Q written as the paper writes it, solved by the editor's own gates.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev

from metake.editing.bilevel import Refinement
from metake.experiments.theory.adversary import climb
from metake.experiments.theory.inner import (
    KINDS, KNOBS, Problem, coupling, draw_layer, edit_problem, slope, smooth_problem, total
)
from metake.experiments.theory.real_layer import RealLayer


def _problem(kind: str, generator: torch.Generator, knobs: Tensor, **sizes: int) -> Problem:
    return smooth_problem(generator, knobs) if kind == KINDS[2] else edit_problem(kind, generator, knobs, **sizes)


def departures(problem: Problem) -> dict[str, float]:
    """What of eqs 69–78 an instance violates, each relative: 0 but for rounding, and for the error of finite
    differences.

    unsolved:     ‖∇_u Q(u*, v)‖ over that at u = 0: the editor's R M does solve the inner problem
    implicit:     eq. 71 against finite differences of F along the gradient and along a fixed direction
    through:      c against Σ s G Mᵀ with the editor's gates
    """
    v = problem.start
    u, c, direct, cond = (problem.solved(v).detach(), *coupling(problem, v))
    slopes = grad(problem.inner)
    found = {
        "unsolved": (slopes(u, v).norm() / slopes(torch.zeros_like(u), v).norm()).item(), "coupling": c.norm().item(),
        "condition": cond
    }
    whole = c + direct
    ways = (whole, torch.linspace(-1, 1, len(v), dtype=v.dtype))
    found["implicit"] = max(
        abs(slope(problem, v, way) - (whole @ way).item()) / (whole.norm() * way.norm()).item() for way in ways
    )
    expected = problem.through(v, grad(problem.outer)(u, v)) if problem.through else c
    return found | {"through": ((c - expected).norm() / expected.norm().clamp_min(1e-300)).item()}


def isolated(problem: Problem) -> Problem:
    """The same problem with a J whose direct gradient vanishes at the start: J ← J − ⟨∇_v J, v⟩,
    so that v_iso is the start.
    """
    tilt = grad(problem.outer, argnums=1)(problem.solved(problem.start).detach(), problem.start)
    return problem._replace(outer=lambda u, v: problem.outer(u, v) - tilt @ v)


def improvement(problem: Problem) -> dict[str, float]:
    """Corollary 1 at v_iso: D F[−c] over −‖c‖² (1), and the largest η = 2^−j ≤ 1 with F(v_iso − ηc) < F(v_iso),
    0 if none.
    """
    problem = isolated(problem)
    v, (c, direct, _) = problem.start, coupling(problem, problem.start)
    here = total(problem, v)
    steps = [2.0**-j for j in range(40)]
    better = next((eta for eta in steps if total(problem, v - eta * c) < here), 0.0)
    return {
        "slope": -slope(problem, v, -c) / c.square().sum().item(), "step": better,
        "isolated gradient": direct.norm().item()
    }


def necessity_check(trials: int = 60, seed: int = 0) -> pd.DataFrame:
    """Random instances in float64; ridge, conditioning, rank, sizes and number of layers vary. One row an instance:
    kind, `departures`, `improvement`.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        kind = KINDS[trial % 3]
        knobs = torch.rand(KNOBS, dtype=torch.float64, generator=generator)
        dim, n, width, layers = (
            int(torch.randint(*ends, (), generator=generator)) for ends in ((2, 9), (1, 4), (2, 5), (1, 4))
        )
        problem = _problem(kind, generator, knobs, dim=dim, n=n, width=width, layers=layers)
        rows.append({"kind": kind, "dim": dim, "n": n, "layers": layers} | departures(problem) | improvement(problem))
    return pd.DataFrame(rows)


def necessity_search(steps: int = 30, seed: int = 0) -> pd.DataFrame:
    """A climb over how extreme an instance is (ridge, conditioning, sizes, outer weights, and which draw),
    for each kind and each departure.

    One row a kind: the largest departure of the implicit gradient, of the coupling from the gates,
    and the largest D F[−c] over ‖c‖² that it found (the corollary: −1; a counterexample: 0 or more).
    """
    targets = {
        "implicit": lambda p: departures(p)["implicit"], "through": lambda p: departures(p)["through"],
        "slope": lambda p: -improvement(p)["slope"]
    }
    middle, rows = torch.full((KNOBS + 1,), 0.5, dtype=torch.float64), []
    for kind in KINDS:

        def made(knobs: Tensor, kind: str = kind) -> Problem:
            return _problem(kind, torch.Generator().manual_seed(int(1e6 * knobs[-1])), knobs)

        found = {
            name: climb(
                lambda knobs, of=of, made=made: of(made(knobs)), middle, steps, torch.Generator().manual_seed(seed)
            ).score
            for name, of in targets.items()
        }
        rows.append({"kind": kind} | found)
    return pd.DataFrame(rows)


# Where isolation is right, and where the proposition does not apply


def _still(problem: Problem, change: Tensor) -> Problem:
    """The problem with J ← J − ⟨change, u⟩."""
    return problem._replace(outer=lambda u, v: problem.outer(u, v) - change @ u)


def decoupled(seed: int = 0) -> pd.DataFrame:
    """An ordinary instance and the three special cases of the paper, at v_iso: ‖c‖, the steepest slope of F in ten
    directions, both over ‖∇_u J‖.
    """
    generator = torch.Generator().manual_seed(seed)
    middle = torch.full((KNOBS,), 0.5, dtype=torch.float64)
    ordinary = edit_problem("AlphaEdit", generator, middle)
    u, v = ordinary.solved(ordinary.start).detach(), ordinary.start
    outer_slope = grad(ordinary.outer)(u, v)
    response = jacrev(grad(ordinary.inner), argnums=1)(u, v).T @ torch.linalg.inv(hessian(ordinary.inner)(u, v))
    unseen = edit_problem("AlphaEdit", torch.Generator().manual_seed(seed), middle, visible=False)
    cases = {
        "ordinary: the solve follows the target": ordinary,
        "the solve does not follow: Pk = 0": unseen,
        "nothing to gain: ∇_u J = 0": _still(ordinary, outer_slope),
        "gain out of reach: GMᵀ = 0, ∇_u J ≠ 0": _still(
            ordinary, torch.linalg.pinv(response) @ (response @ outer_slope)
        ),
    }
    rows = []
    for name, problem in cases.items():
        problem = isolated(problem)
        c, _, _ = coupling(problem, v)
        slopes = [
            abs(slope(problem, v, way / way.norm()))
            for way in torch.randn(10, len(v), dtype=v.dtype, generator=torch.Generator().manual_seed(1))
        ]
        size, gain = outer_slope.norm(), grad(problem.outer)(problem.solved(v).detach(), v).norm()
        rows.append(
            {
                "case": name, "gain": (gain / size).item(), "coupling": (c / size).norm().item(),
                "steepest": max(slopes) / size.item()
            }
        )
    return pd.DataFrame(rows)


def edges(seed: int = 0) -> pd.DataFrame:
    """Assumptions dropped one by one: what is then found, and what would be found if the statement still held."""
    problem = isolated(
        edit_problem("AlphaEdit", torch.Generator().manual_seed(seed), torch.full((KNOBS,), 0.5, dtype=torch.float64))
    )
    v, u = problem.start, problem.solved(problem.start).detach()
    c, _, _ = coupling(problem, v)
    short = problem._replace(solved=lambda v: 0.9 * problem.solved(v))
    at = short.solved(v).detach()
    early = coupling(short, v, at)[0] + grad(short.outer, argnums=1)(at, v)
    off = abs(slope(short, v, c) / (early @ c).item() - 1)
    rows = [("u solves the inner problem", "a solve that stops at 90 % of the way: relative error of eq. 71", off, "0")]
    rows.append(
        (
            "u are active coordinates", "whole matrices U with Δ = UP: share of directions in which ∇²_uu Q vanishes",
            _null_share(seed), "0"
        )
    )
    quick, slow = (h ** (1 / 3) / h for h in (1e-6, 1e-2))  # Q = u⁴/4 − uv: u* = v^(1/3)
    rows.append(
        (
            "∇²_uu Q is not singular", "Q = u⁴/4 − uv, J = u, v = 0: slope of F over a step of 10⁻⁶ over that of 10⁻²",
            quick / slow, "1"
        )
    )
    still = _still(problem, grad(problem.outer)(u, v))
    hollow = still._replace(outer=lambda w, x: still.outer(w, x) - 1e3 * (w - u).square().sum())
    fall = (total(hollow, v) - total(hollow, v - 0.1 * c / c.norm())).item()
    rows.append(
        (
            "“first order” is not “optimal”", "c = 0 at v_iso but J concave in u: fall of F at a distance of 0.1", fall,
            "0 or less"
        )
    )
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
    problem = isolated(
        edit_problem("AlphaEdit", torch.Generator().manual_seed(seed), torch.full((KNOBS,), 0.5, dtype=torch.float64))
    )
    c, _, _ = coupling(problem, problem.start)
    halved = problem._replace(inner=lambda u, v: problem.inner(u, v) / 2)
    apart = ((coupling(halved, problem.start)[0] - c).norm() / c.norm()).item()
    rows = []
    for name, sign in (
        ("c = −∇²_vu Q (∇²_uu Q)⁻¹ ∇_u J, step along −c", 1), ("c = +∇²_vu Q (∇²_uu Q)⁻¹ ∇_u J, step along −c", -1)
    ):
        found = slope(problem, problem.start, -sign * c) / c.square().sum().item()
        rows.append({"reading": name, "number": "D F[−c] / ‖c‖²", "value": found, "survives": found < 0})
    rows.append(
        {
            "reading": "Q with ½‖·‖² instead of ‖·‖²", "number": "relative change of c", "value": apart,
            "survives": apart < 1e-9
        }
    )
    return pd.DataFrame(rows)


# On a real model


def corollary_on_model(layer: RealLayer, anchors: tuple[str, ...] = ("sum", "relative")) -> pd.DataFrame:
    """Each request alone, at v_init, where the only direct gradient, L_reg's, is zero: F through the whole edit
    along −c.

    One row a request, anchor and η: c = ∇F(v_init) exact, `slope` by finite differences over −‖c‖², F(v_init)
    and F(v_init − ηc).
    """
    rows = []
    for index, request in enumerate(layer.requests):
        for anchor in anchors:
            rule = Refinement(prompts="plain", anchor_norm=anchor)
            whole, v = layer.downstream(rule, index)
            found = whole.gradients(v)
            c, step = found.down, 1e-3
            unit = c / c.norm()
            fall = (whole.losses(v - step * unit).sum() - whole.losses(v + step * unit).sum()) / (2 * step) / -c.norm()
            row = {
                "id": request.id, "anchor": anchor, "isolated": found.pull.norm().item(), "coupling": c.norm().item(),
                "slope": fall.item(), "before": found.losses.sum().item()
            }
            rows += [
                row | {"eta": eta, "after": whole.losses(v - eta * c).sum().item()}
                for eta in (2.0**k for k in range(-2, 9))
            ]
    return pd.DataFrame(rows)


def plane(layer: RealLayer, anchor: str = "relative", points: int = 15) -> pd.DataFrame:
    """F through the whole edit of the first request on a plane through v_init: along −c,
    and along the planned residual (made orthogonal).

    One row a point: down, along (both in the hidden state's units), loss.
    """
    whole, v = layer.downstream(Refinement(prompts="plain", anchor_norm=anchor), 0)
    c = whole.gradients(v).down
    plan = layer.targets.planned[:1]
    ways = -c / c.norm(), plan - (plan * c).sum() * c / c.square().sum()
    ways = ways[0], ways[1] / ways[1].norm()
    reach = 0.5 * plan.norm().item()
    spots = [reach * (2 * i / (points - 1) - 1) for i in range(points)]
    return pd.DataFrame(
        [
            {"down": x, "along": y, "loss": whole.losses(v + x * ways[0] + y * ways[1]).sum().item()}
            for y in spots
            for x in spots
        ]
    )


def judge(instances: pd.DataFrame, search: pd.DataFrame, real: pd.DataFrame, tolerance: float = 1e-6) -> dict:
    """Holds if neither random instances nor the search depart by more than `tolerance`,
    every coupled v_iso is improved, and every real one too.
    """
    at_random = max(instances[["unsolved", "implicit", "through"]].max().max(), (instances.slope - 1).abs().max())
    worst = max(at_random, search[["implicit", "through"]].max().max(), (search.slope + 1).max())
    improved = bool((instances.step > 0).all()) and bool(
        (real.after < real.before).groupby([real.id, real.anchor]).any().all()
    )
    told = (
        f"largest relative departure {'below' if worst < tolerance else f'{worst:.0e}, not below'} 1e-6 in "
        f"{len(instances)} random instances and "
        "the search"
    )
    count = real.groupby(["id", "anchor"]).ngroups
    gained = (real.after < real.before).groupby([real.id, real.anchor]).any().sum()
    moved = (
        f"moving along −c improves {int((instances.step > 0).sum())} of {len(instances)} isolated points at "
        f"random and {gained} of {count} on the "
        "model"
    )
    return {"holds": bool(worst < tolerance and improved), "decided_by": f"{told}; {moved}"}
