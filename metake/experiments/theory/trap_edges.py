"""Where MetaKE v1's static trap ends: assumptions dropped, readings of it, and the ellipsoid of a real batch."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import Metric
from metake.algebra.solve import gate, realization, solve
from metake.data.facts import facts
from metake.editing.keys import KeyReader
from metake.editing.statistics import statistics
from metake.experiments.theory.comparisons import foretold, rounding
from metake.experiments.theory.static_trap import (
    SLACK,
    STEP,
    Trap,
    displacement,
    quadratic,
    radii,
    random_operator,
    strengths,
    uniform,
)
from metake.language.model import load

GRID = torch.logspace(-6, 6, 121, dtype=torch.float64)  # λ, in units of the middle of what the two requests ask for
EDGES = {
    "as stated: no λ serves both": "none",
    "requests of different size α: no λ serves both": "some",
    "curvature along the hard direction: no λ serves both": "some",
    "gradients along no eigenvector: no λ serves both": "some",
    "H indefinite, λ too small: u* is the best in its ball (Lemma 1)": "some",
    "H indefinite, λ too small: the radius does not grow with λ (Lemma 1)": "some",
}
"""The statement, all where τ > δ/√λmax (v1 eq. 45), and where an assumption is dropped: how many should break it."""


def edges(trials: int = 60, seed: int = 0, dim: int = 6) -> pd.DataFrame:
    """As `comparisons.foretold`. τ is 1.05 to 3 times δ/√λmax, κ 10 to 1e4."""
    generator, spare = torch.Generator().manual_seed(seed), {case: [] for case in EDGES}
    for _ in range(trials):
        operator = random_operator(generator, dim, uniform(generator, 1, 4))
        tau = uniform(generator, 0.02, 0.48) * radii(operator, 1.0)[0].item()
        flat, hardest = torch.zeros_like(operator), torch.linalg.eigh(operator)[1][:, -1:]
        stated = Trap(operator, 1.0, tau, flat, 1.0, 1.0)
        middle = (strengths(operator, 1.0, tau)[0] / tau) ** 0.5
        cases = (
            stated, stated._replace(hard=uniform(generator, -2, 0)),
            stated._replace(hessian=uniform(generator, 0, 2) * middle * hardest @ hardest.T)
        )
        left = [-trap.least(middle * GRID).max().item() for trap in cases]
        left.append(-_oblique(stated, middle, generator))
        # H + λI is well-conditioned in all of them; A's own condition counts along no eigenvector
        found = [x / rounding(4 * dim, kappa) for x, kappa in zip(left, (1.0, 1.0, 1e2, 1e4), strict=True)]
        for case, clear in zip(EDGES, [*found, *_indefinite(generator, dim)], strict=True):
            spare[case].append(clear)
    return foretold(EDGES, spare)


def _oblique(trap: Trap, middle: float, generator: torch.Generator) -> float:
    """By how much one λ does more than two requests along random directions need: progress of the one, safety of the
    other; negative if none serves both.
    """
    drawn = torch.randn(2, len(trap.operator), dtype=torch.float64, generator=generator)
    easy, hard = torch.nn.functional.normalize(drawn)
    moved, other = (displacement(-q, trap.hessian, middle * GRID) for q in (easy, hard))
    safety = trap.delta / (other @ trap.operator * other).sum(-1).sqrt()
    return torch.minimum(moved @ easy / trap.tau, safety).max().item() - 1


def _indefinite(generator: torch.Generator, dim: int) -> tuple[float, float]:
    """With H + λI not positive definite, how clearly no point of the ball beats u*, and how clearly no larger λ has a
    larger radius; negative if one does.
    """
    directions = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
    hessian = (directions * torch.linspace(-1, 1, dim, dtype=torch.float64)) @ directions.T
    gradient = torch.randn(dim, dtype=torch.float64, generator=generator)
    small, larger = (displacement(gradient, hessian, x) for x in (0.3, 0.9))  # both under 1 = −λmin(H)
    rivals = small.norm() * torch.nn.functional.normalize(
        torch.cat([torch.randn(200, dim, dtype=torch.float64, generator=generator), directions.T, -directions.T])
    )
    values = quadratic(torch.stack([small, *rivals]), gradient, hessian)
    size, off = gradient.norm() * small.norm() + small.square().sum() / 2, torch.linspace(-1, 1, dim) + 0.3
    granted = rounding(4 * dim, 2 / off.abs().min().item())  # of a solve with H + λI, at either λ
    better, longer = values[1:].min() - values[0], small.norm() - larger.norm()
    return (better / size).item() / granted, (longer / (small.norm() + larger.norm())).item() / granted


def readings(records: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What the condition and the multiplier may mean, judged on the instances of `trap_check` and on one quadratic.

    Columns: reading, instances it speaks of, agrees = those in which what it says is found, survives.
    """
    trapped, flat = records[records.trapped], records[records.kappa > 1e3]
    counted = {
        "τ > δ/√λmax: no λ serves both, and some λ does otherwise": (records.served != records.trapped),
        "κ ≫ 1 alone (here over 1000): no λ serves both": ~flat.served,
        "it already means that no single request can be served": ~trapped.alone,
        "it already means that sharing is to blame: the easy request alone can be served": trapped.alone,
        "δ/√λmax < τ ≤ δ/√λmin: each can be served alone, no λ serves both": ~trapped[trapped.alone].served,
    }
    rows = [
        {"reading": name, "instances": len(found), "agrees": int(found.sum()), "survives": bool(found.all())}
        for name, found in counted.items()
    ]
    for name, fits in _multipliers(seed).items():
        rows.append(
            {"reading": f"λ is the multiplier of {name}", "instances": 1, "agrees": int(fits), "survives": fits}
        )
    return pd.DataFrame(rows)


def _multipliers(seed: int) -> dict[str, bool]:
    """Which form of the ball's constraint has λ as its multiplier: −dV of the least value V for its right side."""
    generator = torch.Generator().manual_seed(seed)
    hessian, gradient, strength = (
        random_operator(generator, 5, 10.0), torch.randn(5, dtype=torch.float64, generator=generator), 0.7
    )
    sides = [displacement(gradient, hessian, strength * (1 + s * 1e-4)) for s in (-1, 1)]
    values = [quadratic(u, gradient, hessian).item() for u in sides]
    forms = {
        "½‖u‖² ≤ ½ρ²": [u.square().sum().item() / 2 for u in sides],
        "‖u‖² ≤ ρ²": [u.square().sum().item() for u in sides], "‖u‖ ≤ ρ": [u.norm().item() for u in sides]
    }
    return {
        name: abs(-(values[1] - values[0]) / (right[1] - right[0]) / strength - 1) < 1e-6
        for name, right in forms.items()
    }


def batch_trap(model: str = "tiny", requests: int = 20, text: str = "embedded", seed: int = 0) -> pd.DataFrame:
    """Which ellipsoid the editor itself has: a batch leaves R(I − B) of plans R unwritten,
    so A = (I − B)² on combinations of requests.

    For one request A = (1−β)² I, a ball. Plans are really written: along the combination that is written best and the
    one that is written worst, with τ at the middle of (δ/√λmax, δ/√λmin) and a little under it, δ = 1. Per method:
    requests, √κ, √κ of the first request alone, from_tau and to_tau = where a shared λ is trapped,
    served_in and served_under = λ that serve both.
    """
    lm, asked, rows = load(model), [c.request for c in facts(limit=requests)], []
    for name in ("memit", "alphaedit"):
        editor = methods.method(name, model, seed=seed)
        state = editor.init(lm, statistics(lm, text, layers=editor.layers))
        layer = editor.layers[-1]
        keys, metric = KeyReader(lm, asked, state.contexts, layer).read(layer).keys, state.metrics[layer]
        left = torch.eye(len(keys)).to(keys) - realization(keys, gate(keys, metric))
        operator = left.T @ left
        inner, outer = (r.item() for r in radii(operator, 1.0))
        found = {"in": (inner * outer) ** 0.5, "under": inner * (1 - STEP)}
        served = {
            where: sum(_serves(keys, metric, operator, tau, x * (inner * tau) ** -0.5) for x in GRID.tolist())
            for where, tau in found.items()
        }
        single = [_left(keys[:1], residual[None], metric).norm().item() for residual in torch.eye(4).to(keys)]
        row = {
            "method": name, "requests": len(asked), "√κ": outer / inner, "√κ of one request": max(single) / min(single)
        }
        rows.append(row | {"from_tau": inner, "to_tau": outer, **{f"served_{k}": v for k, v in served.items()}})
    return pd.DataFrame(rows)


def _left(keys: Tensor, planned: Tensor, metric: Metric) -> Tensor:
    """What the library's solve leaves unwritten of a plan, (n, d_out)."""
    return planned - solve(keys, planned, metric).realized


def _serves(keys: Tensor, metric: Metric, operator: Tensor, tau: float, strength: float) -> bool:
    """Whether a shared λ takes u = q/λ by τ along A's easiest way and keeps what is left of the hardest within 1."""
    easy, hard = torch.linalg.eigh(operator)[1][:, [0, -1]].T / strength
    return bool(easy.norm() >= tau * (1 - SLACK) and _left(keys, hard[:, None], metric).norm() <= 1 + SLACK)


def drawn(kappa: float = 16.0, tau: float = 2.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A plane for a drawing, δ = λmax = α = 1: E with its two balls, and where two shared λ put the two requests.

    Returns (curve, x, y of the outlines; strength, request, x, y, ball = radius of the requests' ball, progress,
    safe). x is the easy direction, y the hard one; the λ are those that just allow progress τ,
    and just keep the hard request safe.
    """
    operator = torch.diag(torch.tensor([1 / kappa, 1.0], dtype=torch.float64))
    angle = torch.linspace(0, 2 * torch.pi, 241, dtype=torch.float64)
    circle, (inner, outer) = torch.stack([angle.cos(), angle.sin()]), radii(operator, 1.0)
    curves = {
        "feasible": circle / (circle * (operator @ circle)).sum(0).sqrt(), "inscribed": inner * circle,
        "circumscribed": outer * circle
    }
    trap, rows = Trap(operator, 1.0, tau, torch.zeros_like(operator), 1.0, 1.0), []
    for strength in sorted(strengths(operator, 1.0, tau)):
        progress, safety = (m.item() for m in trap.margins(strength))
        for name, axis in (("easy", 0), ("hard", 1)):
            moved = displacement(-torch.eye(2, dtype=torch.float64)[axis], trap.hessian, strength)
            place = {"x": moved[0].item(), "y": moved[1].item(), "ball": moved.norm().item()}
            row = {"strength": strength, "request": name, **place}
            rows.append(row | {"progress": progress >= 1 - SLACK, "safe": safety >= 1 - SLACK})
    outlines = [pd.DataFrame({"curve": name, "x": xy[0].numpy(), "y": xy[1].numpy()}) for name, xy in curves.items()]
    return pd.concat(outlines, ignore_index=True), pd.DataFrame(rows)


def sweep(points: int = 25, kappa: float = 100.0) -> pd.DataFrame:
    """What each shared λ does, to be drawn: boundary = τ√λmax/δ, strength = λ in units of α√λmax/δ, outcome."""
    rows, operator = [], torch.diag(torch.tensor([1 / kappa, 1.0], dtype=torch.float64))
    tried = torch.logspace(-1.5, 1.5, points, dtype=torch.float64)
    words = {
        (True, True): "both are served", (True, False): "hard one unsafe", (False, True): "easy one stuck",
        (False, False): "both fail"
    }
    for boundary in (10 ** (2 * i / (points - 1) - 1) for i in range(points)):
        trap = Trap(operator, 1.0, boundary, torch.zeros_like(operator), 1.0, 1.0)
        met = torch.stack(trap.margins(tried)) >= 1 - SLACK
        for strength, both in zip(tried.tolist(), met.T.tolist(), strict=True):
            rows.append({"boundary": boundary, "strength": strength, "outcome": words[tuple(both)]})
    return pd.DataFrame(rows)
