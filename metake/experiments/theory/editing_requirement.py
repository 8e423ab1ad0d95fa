"""MetaKE v3 Theorem 1: which norms of a planned residual satisfy success and editability.

success: ‖r̂‖ ≥ τ.  editability: ‖r − r̂‖ ≤ ε.  A *plan* is a residual r of a norm; what it writes, r̂,
is the library's own solve.
"""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from metake.algebra.solve import association, attenuation, feasible_interval
from metake.experiments.decision import all_of
from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.comparisons import as_foretold, least, rounding, same, some
from metake.experiments.theory.one_request import Request, random_request, uniform

STEP = 1e-6  # how far beside an end of an interval a plan is tried, relative


def requirement_check(trials: int = 300, seed: int = 0, dims: tuple[int, ...] = (4, 16, 64)) -> pd.DataFrame:
    """Random instances in float64, every third next to the threshold: plans beside both ends are really written.

    One row per instance: method, dim, gamma, beta, ratio = γε/τ, plans tried, `wrong` = outcomes that membership in
    [τ/β, ε(1+γ)] does not foretell, `agrees` = how clearly the others are foretold, at the least; end_error = how far
    ‖r̂‖ at the lower end is from τ and ‖r − r̂‖ at the upper end from ε, relative, beside its rounding; empty, by the
    interval; `criteria` = how clearly β < τ/(τ+ε), γ < τ/ε and writing the best plan there is say the same, and
    `disagree` = how many of them do not. Both are in units of rounding.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        request = random_request(trial, generator, dims, near=trial // 9 % 3 == 2)
        gamma, (lower, upper) = request.gamma, request.interval
        sides = [end * (1 + s * STEP) for end in (lower, upper) for s in (-1, 1)]
        low, high = torch.minimum(lower, upper).log10() - 1, torch.maximum(lower, upper).log10() + 1
        plans = [*sides, *(uniform(generator, low.item(), high.item()) for _ in range(4))]
        outcomes = [request.agrees(request.spare(n), n) for n in plans]
        ends = (request.norms(lower)[0] / request.tau - 1).abs(), (request.norms(upper)[1] / request.epsilon - 1).abs()
        criteria = _criteria(request)
        rows.append({
            "method": request.method, "dim": request.key.shape[1], "gamma": gamma.item(),
            "beta": attenuation(gamma).item(), "ratio": (gamma * request.epsilon / request.tau).item(),
            "plans": len(plans), "wrong": sum(x < -1 for x in outcomes), "agrees": min(outcomes),
            "end_error": max(ends).item(), "rounding": request.rounding, "empty": bool(lower > upper),
            "criteria": min(criteria), "disagree": sum(x < -1 for x in criteria),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _criteria(request: Request) -> list[float]:
    """How clearly three criteria agree with the interval about emptiness, each by the less certain of the two.

    β ≥ τ/(τ+ε); γ ≥ τ/ε; and the plan that exceeds both requirements by the same factor, really written.
    """
    gamma, (lower, upper) = request.gamma, request.interval
    few = rounding(4)  # a handful of operations
    written, left = request.norms((lower * upper).sqrt())
    spares = [
        ((upper / lower).item() - 1, few),
        ((attenuation(gamma) * (1 + request.epsilon / request.tau)).item() - 1, few),
        ((gamma * request.epsilon / request.tau).item() - 1, few),
        (torch.minimum(written / request.tau, request.epsilon / left).item() - 1, request.rounding),
    ]
    interval, *others = (spare / error for spare, error in spares)
    return [math.copysign(min(abs(interval), abs(other)), interval * other) for other in others]


def adversarial_search(restarts: int = 8, steps: int = 100, seed: int = 0, most: float = 0.99) -> pd.DataFrame:
    """Gradient ascent against the theorem, in both directions. One row per start.

    "both at once": γ at most `most` of τ/ε, so the interval is empty; γ, the key's and the plan's direction and the
    plan's norm climb min(‖r̂‖/τ, ε/‖r − r̂‖), which the theorem keeps at or below √most < 1.
    "failing inside": γ at least τ/ε over `most`; the same, with a norm within the interval,
    climb max(τ/‖r̂‖, ‖r − r̂‖/ε), at most 1. Columns: largest, beside its limit; spare = what is left to it, in units
    of rounding; broken, if it is exceeded by more.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for start in range(restarts):
        empty, request = start % 2 == 0, random_request(start // 2, generator, (4, 8, 16))
        dim, wide = request.key.shape[1], len(request.direction)
        begin = torch.cat([request.key[0] / request.key.norm(), request.direction, torch.ones(2, dtype=torch.float64)])
        begin = begin + 0.3 * torch.randn(dim + wide + 2, dtype=torch.float64, generator=generator)
        found = ascend(partial(_excess, request, empty, most), begin[None], steps, rate=0.1)
        best, (limit, aim) = math.exp(found.score), (most**0.5, "both at once") if empty else (1.0, "failing inside")
        spare = (1 - best / limit) / _searched(request, empty, most, found.point)[0].rounding
        row = {"aim": aim, "method": request.method, "dim": dim, "evaluations": steps, "largest": best, "limit": limit}
        rows.append(row | {"spare": spare, "broken": spare < -1})
    return pd.DataFrame(rows)


def _searched(request: Request, empty: bool, most: float, point: Tensor) -> tuple[Request, Tensor]:
    """The request and the plan at a point: key's direction, plan's direction, how near γ is to τ/ε, the plan's norm."""
    dim = request.key.shape[1]
    key, plan, near = point[None, :dim], point[dim:-2] / point[dim:-2].norm(), most / (1 + point[-2] ** 2)
    wanted = (near if empty else 1 / near) * request.tau / request.epsilon
    found = request._replace(key=key * (wanted / association(key, request.metric)).sqrt())
    if empty:
        return found, plan * (request.tau + request.epsilon) * point[-1].exp()
    lower, upper = found.interval
    return found, plan * lower * (upper / lower) ** point[-1].sin().square()


def _excess(request: Request, empty: bool, most: float, points: Tensor) -> Tensor:
    """The logarithm that a search climbs, at one point."""
    found, plan = _searched(request, empty, most, points[0])
    written, left = found.norms(plan)
    short, long = found.tau.log() - written.log(), left.log() - found.epsilon.log()
    return (torch.minimum(-short, -long) if empty else torch.maximum(short, long))[None]


def region(tau: float = 1.0, epsilon: float = 1.0, points: int = 400) -> pd.DataFrame:
    """The two ends against β, for a drawing: beta, lower, upper; τ/(τ+ε) is among the points."""
    gamma = (
        torch.cat(
            [torch.logspace(-2, 2, points, dtype=torch.float64), torch.tensor([tau / epsilon], dtype=torch.float64)]
        )
        .sort()
        .values
    )
    lower, upper = feasible_interval(gamma, tau, epsilon)
    return pd.DataFrame({"beta": attenuation(gamma), "lower": lower, "upper": upper})


def plans(count: int = 240, seed: int = 0) -> pd.DataFrame:
    """Random plans under τ = ε = 1, for a drawing: gamma, beta, norm, and what really became of each: outcome."""
    generator, rows = torch.Generator().manual_seed(seed), []
    one = torch.ones((), dtype=torch.float64)
    words = {
        (True, True): "both hold", (False, True): "too little is written", (True, False): "too much is left",
        (False, False): "both fail"
    }
    for trial in range(count):
        request = random_request(trial, generator)._replace(tau=one, epsilon=one)
        request = request._replace(key=request.key * (uniform(generator, -1.2, 1.2) / request.gamma).sqrt())
        norm = uniform(generator, -0.3, 1.3)
        rows.append(
            {
                "gamma": request.gamma.item(), "beta": attenuation(request.gamma).item(), "norm": norm.item(),
                "outcome": words[request.outcome(norm)]
            }
        )
    return pd.DataFrame(rows)


def by_method(records: pd.DataFrame) -> pd.DataFrame:
    """Per metric: instances, plans written and wrong, ends met but for rounding, empty intervals and disagreements."""
    grouped = records.assign(met=records.end_error <= records.rounding).groupby("method", as_index=False)
    found = grouped.agg(
        instances=("plans", "size"), plans=("plans", "sum"), wrong=("wrong", "sum"), met=("met", "all"),
        empty=("empty", "sum"), disagree=("disagree", "sum")
    )
    return found.rename(columns={"met": "ends met"})


def judge(records: pd.DataFrame, searched: pd.DataFrame, dropped: pd.DataFrame, trapped: pd.DataFrame) -> dict:
    """Holds if no plan and no λ contradicts the statement, no search broke it, and it fails exactly where an
    assumption is dropped.

    trapped: `shared_strength.summary`, whose increasing law is such a dropped assumption.
    """
    lawful, increasing = trapped[trapped.decreasing], trapped[~trapped.decreasing]
    wrong, disagree = int(records.wrong.sum() + lawful.wrong.sum()), int(records.disagree.sum())
    fails = all_of([as_foretold(dropped), *(some("traps of an increasing law", [x]) for x in increasing.agrees)])
    found = all_of([
        least("outcomes of plans", records.agrees), least("emptiness by four criteria", records.criteria),
        same("what is written at the ends", records.end_error, records.rounding),
        least("a search for plans beyond the interval", searched.spare, attained=True),
        least("outcomes of strengths λ", lawful.agrees), fails,
    ])
    told = f"{records.plans.sum()} plans written in {len(records)} random layers and {lawful.tried.sum()} strengths λ: "
    told += f"{wrong} contradictions; {disagree} disagreements about emptiness; {searched.broken.sum()} of "
    told += f"{len(searched)} searches broke it; dropped assumptions fail as foretold: {'yes' if fails.holds else 'no'}"
    return found.verdict(told)
