"""β in a plane: a key's angle to what is preserved decides what share of a plan is written, and which plans fit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metake.algebra.geometry import InverseCovariance, KeyStatistics, Metric, NullSpace, condition
from metake.algebra.solve import association, attenuation, feasible_interval, solve
from metake.experiments.decision import all_of
from metake.experiments.theory.comparisons import least, rounding, same

# Magnitudes of the preserved keys; with all four signs of each their moment is exactly diagonal, for they are dyadic.
MAGNITUDES = ((0.25, 0.0625), (0.75, 0.1875), (1.0, 0.125), (1.5, 0.0625))
PAST = (0.5, 0.75)  # the key of an earlier edit, remembered once or more often
THRESHOLD = 2e-2  # AlphaEdit's: the plane's second direction has a variance of 0.015 and counts as free
RIDGE = {"alphaedit": 1.0, "memit": 20.0}  # λ where the picture starts
START = {
    "method": "alphaedit", "x": 1.0, "y": 3**0.5, "ridge": 1.0, "past": 0, "planned": 2.0, "tau": 1.0, "epsilon": 1.0
}


def preserved_keys() -> Tensor:
    """(16, 2): mostly along the first direction."""
    return torch.tensor([(s * x, t * y) for x, y in MAGNITUDES for s in (1, -1) for t in (1, -1)], dtype=torch.float64)


def metric(method: str, ridge: float, past: int = 0) -> Metric:
    """MEMIT's (λC)⁻¹ or AlphaEdit's P/λ of the preserved keys, conditioned on the past key, `past` times."""
    found = KeyStatistics.empty(2)
    found.update(preserved_keys())
    base = NullSpace(found, ridge, THRESHOLD) if method == "alphaedit" else InverseCovariance(found, weight=ridge)
    return condition(base, torch.tensor(PAST, dtype=torch.float64).expand(past, 2))


def read(
    method: str, x: float, y: float, ridge: float, past: int, planned: float, tau: float, epsilon: float
) -> dict[str, Any]:
    """What the library says of one key (x, y) and a plan of norm `planned`: γ, β, both residuals, the interval."""
    key = torch.tensor([[x, y]], dtype=torch.float64)
    rule, plan = metric(method, ridge, past), torch.tensor([[planned, 0.0]], dtype=torch.float64)
    gamma, realized = association(key, rule), solve(key, plan, rule).realized
    lower, upper = feasible_interval(gamma, tau, epsilon)
    given = {"method": method, "x": x, "y": y, "ridge": ridge, "past": past}
    given |= {"planned": planned, "tau": tau, "epsilon": epsilon}
    norms = {"realized": realized.norm().item(), "unrealized": (plan - realized).norm().item()}
    ends = {"lower": lower.item(), "upper": upper.item(), "feasible": bool(lower <= upper)}
    return given | {"gamma": gamma.item(), "beta": attenuation(gamma).item()} | norms | ends


def polar(angle: float, length: float) -> dict[str, float]:
    """x and y of a key at `angle` degrees from the preserved line; exact along it and across."""
    turn = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
    return {
        "x": 0.0 if angle % 180 == 90 else length * torch.cos(turn).item(),
        "y": 0.0 if angle % 180 == 0 else length * torch.sin(turn).item(),
    }


def by_angle(
    angles: tuple[float, ...] = (0, 20, 40, 60, 90), length: float = 2.0, planned: float = 2.0, tau: float = 1.0,
    epsilon: float = 1.0
) -> pd.DataFrame:
    """A key that turns away from the preserved line, under both constraints: per method and angle, as `read`."""
    plan = {"planned": planned, "tau": tau, "epsilon": epsilon}
    return pd.DataFrame(
        [
            {"angle": a} | read(m, **polar(a, length), ridge=ridge, past=0, **plan)
            for m, ridge in RIDGE.items()
            for a in angles
        ]
    )


def reference_points(dense: bool = False) -> pd.DataFrame:
    """Readings for the picture to compare itself with: 24, or 2 000 if `dense`."""
    angles, lengths, settings = (0, 25, 90, -120), (2.0,), [(1.0, 0), (20.0, 0), (0.5, 3)]
    if dense:
        angles, lengths = (-170, -90, -45, -10, 0, 1, 30, 60, 90, 135), (0.1, 0.8, 2.0, 3.0, 2.5)
        settings = list(product((0.01, 0.5, 1.0, 20.0, 100.0), (0, 1, 3, 8)))
    plans, rows = ((2.0, 1.0, 1.0), (5.0, 0.3, 2.0)), []
    swept = product(RIDGE, enumerate(settings), enumerate(angles), lengths)
    for method, (i, (ridge, past)), (j, angle), length in swept:
        plan = dict(zip(("planned", "tau", "epsilon"), plans[(i + j) % 2], strict=True))
        rows.append(read(method, **polar(angle, length), ridge=ridge, past=past, **plan))
    return pd.DataFrame(rows)


def scene() -> dict[str, Any]:
    """What the picture shows: preserved keys, the past key, each constraint's metric at λ = 1, where its λ starts."""
    eye = torch.eye(2, dtype=torch.float64)
    constraints = {
        method: {"unit": metric(method, 1.0).apply(eye).tolist(), "ridge": ridge} for method, ridge in RIDGE.items()
    }
    return {"constraints": constraints, "preserved": preserved_keys().tolist(), "past": list(PAST), "start": START}


def angle_check(trials: int = 300, seed: int = 0, dims: tuple[int, ...] = (2, 16, 64)) -> pd.DataFrame:
    """Is the picture true beyond the plane? Random layers of AlphaEdit's kind: γ against lengths and angles alone.

    γ = ‖k‖² sin²θ / (λ + m ‖kₚ‖² sin²φ),  θ, φ the angles of the key and of m equal past keys to the preserved subspace

    With past keys only where one direction is free, as in the plane; there they and the key point the same way,
    or opposite.
    One row per layer: dim, free, angle (degrees), past, gamma, error (relative to the formula) and what rounding may
    make of it; tau, epsilon, feasible (the interval is not empty) and found (one of 4 000 norms, written by an explicit
    update, satisfies both demands); `agrees` = how clearly these two agree, in units of rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame(
        [_layer(dims[trial % len(dims)], trial // len(dims) % 2 == 0, generator) for trial in range(trials)]
    )


def _layer(dim: int, remembers: bool, generator: torch.Generator) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    draw = torch.rand(6, dtype=torch.float64, generator=generator).tolist()
    unused = 1 if remembers else 1 + int(draw[0] * (dim - 1))
    turned = torch.linalg.qr(normal(dim, dim))[0]
    free, used = turned[:, :unused], turned[:, unused:]
    found = KeyStatistics.empty(dim)
    found.update(normal(4 * dim, dim - unused) @ used.T)
    ridge, times, tau, epsilon = (
        10 ** (2 * draw[1] - 1), int(4 * draw[2]) * remembers, 10 ** (draw[3] - 0.5), 10 ** (draw[4] - 0.5)
    )
    key, past = 10 ** (draw[5] - 0.5) * normal(1, dim), normal(1, dim)
    rule = condition(NullSpace(found, ridge, 1e-9), past.expand(times, dim))

    def sine(vector: Tensor) -> Tensor:  # of the angle to the preserved subspace: from 1 − cos² it would cancel
        return (vector @ free).norm() / vector.norm()

    remembered = times * (past.norm() * sine(past)).square() / ridge
    formula = (key.norm() * sine(key)).square() / (ridge * (1 + remembered))
    gamma = association(key, rule)
    error = _error(found.spectrum[unused:], sine(key), sine(past) if times else None, remembered)
    row = {"dim": dim, "free": unused, "angle": torch.rad2deg(torch.asin(sine(key))).item(), "past": times}
    row |= {"gamma": gamma.item(), "error": ((gamma - formula).abs() / formula).item(), "rounding": error}
    return row | _tried(key, torch.nn.functional.normalize(normal(1, 3)), rule, tau, epsilon, error)


def _error(spectrum: Tensor, sine: Tensor, past: Tensor | None, remembered: Tensor) -> float:
    """What rounding may make of γ, relative. spectrum: of C where it is used; remembered: m ‖kₚ‖² sin²φ / λ.

    The subspace is off by ε λmax/λmin, so that a sine, twice in γ, is off by that over itself; a rank-one memory
    cancels 1 + `remembered` times what it leaves.
    """
    lean = 2 / sine + (2 / past if past is not None else 0)
    return rounding(4 * len(spectrum) + 4, spectrum.max() / spectrum.min() * lean * (1 + remembered))


def _tried(key: Tensor, plan: Tensor, rule: Metric, tau: float, epsilon: float, error: float) -> dict[str, Any]:
    """Whether one of many norms satisfies both demands, beside the interval.

    One that does proves that the interval is not empty; if none does, the interval is shorter than a step of the grid.
    """
    norms = torch.logspace(-3, 5, 4000, dtype=torch.float64)
    realized, gamma = solve(key, plan, rule).realized, association(key, rule)
    written, missing = realized.norm() * norms, (plan - realized).norm() * norms
    lower, upper = (end.item() for end in feasible_interval(gamma, tau, epsilon))
    found = bool(((written >= tau) & (missing <= epsilon)).any())
    clear = upper / lower - 1 if found else (norms[1] / norms[0]).item() - upper / lower
    # (plan − realized) leaves 1/(1+γ) of a plan
    granted = (1 + gamma.item()) * error + rounding(4 * key.shape[1], 1 + gamma.item())
    ends = {"tau": tau, "epsilon": epsilon, "width": upper / lower, "feasible": bool(lower <= upper)}
    return ends | {"found": found, "agrees": clear / granted}


def judge(records: pd.DataFrame) -> dict:
    """Holds if γ agrees with the formula in lengths and angles, and the interval with the norms that were tried: one
    that satisfies both demands lies in it, and where none does, less of it than a step of the grid is left.
    """
    formula = same("γ and the formula in lengths and angles", records.error, records.rounding)
    trial, wrong = least("the interval and the norms that were tried", records.agrees), int((records.agrees < -1).sum())
    agrees = "agrees with" if formula.holds else f"departs by {records.error.max():.0e} from"
    told = f"γ {agrees} the formula in lengths and angles in {len(records)} random layers of "
    told += f"{records.dim.min()} to {records.dim.max()} dimensions; the interval and a trial of 4 000 norms agree in "
    told += f"{len(records) - wrong} of {len(records)}, of which {int((~records.feasible).sum())} are empty"
    return all_of([formula, trial]).verdict(told)
