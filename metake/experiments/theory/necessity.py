"""MetaKE v3 Proposition 2, Corollary 1: the outer gradient through the inner solve, what an isolated target misses.

    ∇F = ∇_v J + c,   c = −∇²_vu Q (∇²_uu Q)⁻¹ ∇_u J                                    eq. 71
    ∇_v J(v_iso) = 0, c ≠ 0   ⟹   D F(v_iso)[−c] = −‖c‖² < 0                            Corollary 1

The problems are `inner`'s: Q written as the paper writes it, solved by the editor's own gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd
import torch
from torch import Tensor
from torch.func import grad, hessian

from metake.editing.outer import Refinement
from metake.experiments.decision import EPS, Decision, all_of
from metake.experiments.theory.adversary import Found, climb
from metake.experiments.theory.comparisons import least, rounding, same
from metake.experiments.theory.inner import (
    KINDS,
    KNOBS,
    Problem,
    amplification,
    coupling,
    edit_problem,
    rounding_of,
    slope,
    smooth_problem,
    total,
)
from metake.experiments.theory.real_layer import RealLayer

TOLERANCE = 1e-6  # of a relative departure never more than this is granted, however ill-conditioned the instance


def _problem(kind: str, generator: torch.Generator, knobs: Tensor, **sizes: int) -> Problem:
    return smooth_problem(generator, knobs) if kind == KINDS[2] else edit_problem(kind, generator, knobs, **sizes)


def departures(problem: Problem) -> dict[str, float]:
    """What of eqs 69–78 an instance violates, each relative, beside what it may be off by (its name and "_error").

    unsolved:     ‖∇_u Q(u*, v)‖ over that at u = 0: the editor's R M does solve the inner problem
    implicit:     eq. 71 against finite differences of F along the gradient and along a fixed direction
    through:      c against Σ s G Mᵀ with the editor's gates
    """
    v = problem.start
    u, c, direct, amplified = (problem.solved(v).detach(), *coupling(problem, v))
    slopes, size = grad(problem.inner), len(problem.solved(v)) + len(v)
    curved, start = hessian(problem.inner)(u, v), slopes(torch.zeros_like(u), v).norm()
    stretched = amplification(problem, curved) * (torch.linalg.matrix_norm(curved, 2) * u.norm() / start).item()
    found = {"unsolved": (slopes(u, v).norm() / start).item(), "unsolved_error": rounding(size, stretched, TOLERANCE)}
    found |= {"coupling": c.norm().item()}
    whole, ways = c + direct, []
    for way in (whole, torch.linspace(-1, 1, len(v), dtype=v.dtype)):
        (steep, granted), unit = slope(problem, v, way), (whole.norm() * way.norm()).item()
        granted = granted / unit + rounding(size, amplified * c.norm().item() / whole.norm().item())
        ways.append((abs(steep - (whole @ way).item()) / unit, min(granted, TOLERANCE)))
    found["implicit"], found["implicit_error"] = max(ways, key=lambda pair: pair[0] / pair[1])
    expected = problem.through(v, grad(problem.outer)(u, v)) if problem.through else c
    found["through"] = ((c - expected).norm() / expected.norm().clamp_min(1e-300)).item()
    return found | {"through_error": rounding(size, amplified, TOLERANCE)}


def isolated(problem: Problem) -> Problem:
    """The same problem with v_iso at the start, where J's direct gradient vanishes: J ← J − ⟨∇_v J, v⟩."""
    tilt = grad(problem.outer, argnums=1)(problem.solved(problem.start).detach(), problem.start)
    return problem._replace(outer=lambda u, v: problem.outer(u, v) - tilt @ v)


def improvement(problem: Problem) -> dict[str, float]:
    """Corollary 1 at v_iso: D F[−c] over −‖c‖² (1) beside its error, and the largest η = 2^−j ≤ 1 at which
    F(v_iso − ηc) < F(v_iso) beyond rounding, 0 if none; `gain`: by how much, in units of rounding.
    """
    granted, problem = rounding_of(problem, problem.start), isolated(problem)
    v, (c, direct, amplified) = problem.start, coupling(problem, problem.start)
    here, square = total(problem, v), c.square().sum().item()
    for step in (2.0**-j for j in range(40)):
        gain = ((here - total(problem, v - step * c)) / granted).item()
        if gain > 1:
            break
    steep, error = slope(problem, v, -c, granted)
    error = min(error / square + rounding(len(v), amplified), TOLERANCE)
    found = {"slope": -steep / square, "slope_error": error, "step": step if gain > 1 else 0.0, "gain": gain}
    return found | {"isolated gradient": direct.norm().item()}


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
    """A climb over how extreme an instance is (`KNOBS`, and which draw), for each kind and each departure.

    One row a kind: the largest departure of the implicit gradient, of the coupling from the gates, and of D F[−c] from
    −‖c‖² that it found, each in units of what it may be off by; and D F[−c] over ‖c‖² there (the corollary: −1).
    """
    targets = {
        "implicit": lambda p: _times(departures(p), "implicit"), "through": lambda p: _times(departures(p), "through"),
        "slope": lambda p: _times(improvement(p), "slope", 1.0)
    }
    middle, rows = torch.full((KNOBS + 1,), 0.5, dtype=torch.float64), []
    for kind in KINDS:

        def made(knobs: Tensor, kind: str = kind) -> Problem:
            return _problem(kind, torch.Generator().manual_seed(int(1e6 * knobs[-1])), knobs)

        def worst(of: Callable[[Problem], float], made: Callable[[Tensor], Problem] = made) -> Found:
            own = torch.Generator().manual_seed(seed)
            return climb(lambda knobs: of(made(knobs)), middle, steps, own)

        found = {name: worst(of) for name, of in targets.items()}
        row = {"kind": kind} | {name: one.score for name, one in found.items()}
        rows.append(row | {"value": -improvement(made(found["slope"].point))["slope"]})
    return pd.DataFrame(rows)


def _times(found: dict[str, float], name: str, expected: float = 0.0) -> float:
    return abs(found[name] - expected) / found[f"{name}_error"]


# On a real model


def corollary_on_model(layer: RealLayer, anchors: tuple[str, ...] = ("sum", "relative")) -> pd.DataFrame:
    """Each request alone, at v_init, where L_reg's gradient, the only direct one, is zero: F of the edit along −c.

    One row a request, anchor and η: c = ∇F(v_init) exact, `slope` by finite differences over −‖c‖², F(v_init)
    and F(v_init − ηc), and what rounding may make of either.
    """
    rows = []
    for index, request in enumerate(layer.requests):
        for anchor in anchors:
            rule = Refinement(prompts="plain", anchor_norm=anchor)
            whole, v = layer.downstream(rule, index)
            found = whole.gradients(v)
            c, step = found.down, 1e-3
            unit = c / c.norm()
            fall = (whole.after(v - step * unit).sum() - whole.losses(v + step * unit).sum()) / (2 * step) / -c.norm()
            row = {
                "id": request.id, "anchor": anchor, "isolated": found.pull.norm().item(), "coupling": c.norm().item(),
                "slope": fall.item(), "before": found.losses.sum().item()
            }
            row["rounding"] = (1 + row["before"]) * layer.lm.depth * rounding(
                layer.lm.width, torch.finfo(layer.lm.dtype).eps / EPS
            )
            rows += [
                row | {"eta": eta, "after": whole.after(v - eta * c).sum().item()}
                for eta in (2.0**k for k in range(-2, 9))
            ]
    return pd.DataFrame(rows)


def plane(layer: RealLayer, anchor: str = "relative", points: int = 15) -> pd.DataFrame:
    """F through the first request's edit on a plane through v_init: along −c, and the plan (made orthogonal).

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
            {"down": x, "along": y, "loss": whole.after(v + x * ways[0] + y * ways[1]).sum().item()}
            for y in spots
            for x in spots
        ]
    )


DEPARTURES = {"unsolved": "rounding", "through": "rounding", "implicit": "estimate", "slope": "estimate"}
"""What an instance may depart by, and what its error is of: two compare with finite differences."""


def explained(instances: pd.DataFrame) -> pd.DataFrame:
    """Per kind of problem: whether what it may be off by explains every departure."""
    fits = instances.assign(slope=(instances.slope - 1).abs())
    fits = fits.assign(**{name: fits[name] <= fits[f"{name}_error"] for name in DEPARTURES})
    return fits.groupby("kind", as_index=False)[[*DEPARTURES]].all()


def _same(name: str, departures: Iterable[float], errors: Iterable[float]) -> Decision:
    return same(f"the departure {name!r}", departures, errors)._replace(error=DEPARTURES[name])


def judge(instances: pd.DataFrame, search: pd.DataFrame, real: pd.DataFrame) -> dict:
    """Holds if neither random instances nor the search depart by more than rounding and finite differences explain,
    every coupled v_iso is improved, and every real one too.
    """
    slopes = instances.assign(slope=(instances.slope - 1).abs())
    random = [_same(name, slopes[name], slopes[f"{name}_error"]) for name in DEPARTURES]
    found = [_same(name, search[name], [1.0] * len(search)) for name in DEPARTURES if name in search]
    exact = all_of(random + found)
    gain = ((real.before - real.after) / real["rounding"]).groupby([real.id, real.anchor]).max()
    improved = all_of([least("the fall along −c", instances.gain), least("the fall along −c on the model", gain)])
    worst = f"{'below' if exact.holds else 'above'} what rounding and finite differences explain"
    told = f"largest relative departure {worst} in {len(instances)} random instances and the search; moving along −c "
    told += f"improves {int((instances.gain > 1).sum())} of {len(instances)} isolated points at random and "
    told += f"{int((gain > 1).sum())} of {len(gain)} on the model"
    return all_of([exact, improved]).verdict(told)
