"""MetaKE v3 Theorem 1: which norms of a planned residual satisfy success and editability, and what a KL weight that
all share does.

success: ‖r̂‖ ≥ τ.  editability: ‖r − r̂‖ ≤ ε.  A *plan* is a residual r of a norm; what it writes, r̂,
is the library's own solve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import Conditioned, Isotropic, Metric, NullSpace
from metake.algebra.solve import association, attenuation, feasible_interval, gate, solve
from metake.experiments.decision import all_of
from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.comparisons import as_foretold, foretold, least, rounding, same, some
from metake.experiments.theory.solves import draw

KINDS = ("memit", "memit_seq", "alphaedit")
STEP = 1e-6  # how far beside an end of an interval a plan is tried, relative
SLACK = 1e-9  # of a ratio of norms never more than this counts as rounding


class Request(NamedTuple):
    """One request at one layer, float64, with the two tolerances of the theorem."""

    method: str
    metric: Metric
    key: Tensor  #        (1, d)
    direction: Tensor  #  (d_out,) of the plan, norm 1
    tau: Tensor
    epsilon: Tensor

    @property
    def gamma(self) -> Tensor:
        return association(self.key, self.metric)[0]

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        lower, upper = feasible_interval(self.gamma[None], self.tau, self.epsilon)
        return lower[0], upper[0]

    def norms(self, plan: Tensor, noise: float = 1.0) -> tuple[Tensor, Tensor]:
        """‖r̂‖ and ‖r − r̂‖ of a plan, (d_out,) or its norm along the request's direction, as the library writes it."""
        plan = plan if plan.ndim else plan * self.direction
        written = solve(self.key, plan[None], self.metric, noise).realized[0]
        return written.norm(), (plan - written).norm()

    @property
    def rounding(self) -> float:
        """What rounding may make of ‖r̂‖ and ‖r − r̂‖, relative.

        γ sums d products of size ‖QK‖‖K‖, what is left is the small part 1/(1+γ) of a plan.
        """
        cancelled = self.metric.apply(self.key).norm() * self.key.norm() / self.gamma
        return rounding(self.key.shape[1] + len(self.direction), (1 + cancelled) * (1 + self.gamma), SLACK)

    def spare(self, plan: Tensor, noise: float = 1.0) -> tuple[float, float]:
        """By how much a plan succeeds, and by how much it is editable; negative where not; in units of rounding."""
        return self.judged(*self.norms(plan, noise))

    def judged(self, written: Tensor, left: Tensor) -> tuple[float, float]:
        return (
            (written / self.tau - 1).item() / self.rounding,
            ((self.epsilon - left) / torch.maximum(left, self.epsilon)).item() / self.rounding,
        )

    def outcome(self, plan: Tensor) -> tuple[bool, bool]:
        """Whether a plan succeeds, and whether it is editable."""
        succeeds, editable = self.spare(plan)
        return succeeds >= 0, editable >= 0

    def agrees(self, spare: tuple[float, float], norm: Tensor) -> float:
        """How clearly an outcome is the one that [τ/β, ε(1+γ)] foretells of a norm; negative if it is not."""
        lower, upper = self.interval
        return min(spare[0] * (1 if norm >= lower else -1), spare[1] * (1 if norm <= upper else -1))


def _uniform(generator: torch.Generator, low: float, high: float) -> Tensor:
    """10 to a power between low and high."""
    return 10 ** (low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator))


def random_request(
    trial: int, generator: torch.Generator, dims: Sequence[int] = (4, 16, 64), near: bool = False
) -> Request:
    """A layer of random dimension, rank, conditioning (to 1e6), strength and past keys, and a request of γ from 1e-3
    to 1e3 in it.

    τ from 0.01 to 100; ε/τ from 0.001 to 1000, or, if `near`, 1/γ up to 1e-5: the interval is all but a point,
    or just empty.
    """
    method, dim = KINDS[trial % 3], dims[trial // 3 % len(dims)]
    case = draw(generator, dim, 1)
    metric, key = case.metric(methods.method(method, "tiny")), case.keys.T
    key = key * (_uniform(generator, -3, 3) / association(key, metric)).sqrt()
    tau, gamma = _uniform(generator, -2, 2), association(key, metric)[0]
    ratio = (
        (1 + 1e-5 * (2 * torch.rand((), dtype=torch.float64, generator=generator) - 1)) / gamma
        if near
        else _uniform(generator, -3, 3)
    )
    return Request(method, metric, key, case.residuals[:, 0] / case.residuals.norm(), tau, ratio * tau)


def requirement_check(trials: int = 300, seed: int = 0, dims: tuple[int, ...] = (4, 16, 64)) -> pd.DataFrame:
    """Random instances in float64, every third next to the threshold: plans on both sides of both ends are really
    written.

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
        plans = [*sides, *(_uniform(generator, low.item(), high.item()) for _ in range(4))]
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
    """How clearly three criteria agree with the interval about emptiness, each by the less certain side, as `rounding`.

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
    climb max(τ/‖r̂‖, ‖r − r̂‖/ε), at most 1. Columns: largest, beside its limit; spare = what is left to it, in units of
    rounding; broken, if it is exceeded by more.
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


EDGES = {
    "as stated": "none", "noise 0: the write interpolates": "some", "another request in the batch": "some",
    "written at one key, read at another": "some", "β = 0: no plan succeeds": "none",
}  # fmt: skip
"""Where an assumption is dropped, and how many plans the interval should then misjudge."""


class _Written(NamedTuple):
    """Plans of one direction: their norms, and the shares of a norm that are written, written along the plan,
    and left.
    """

    norms: Tensor
    share: Tensor
    along: Tensor
    left: Tensor


READINGS: dict[str, tuple[str, Callable[[_Written, Request], Tensor]]] = {
    "absolute": (
        "‖r̂‖ ≥ τ and ‖r − r̂‖ ≤ ε",
        lambda w, q: (w.share * w.norms >= q.tau * (1 - SLACK)) & (w.left * w.norms <= q.epsilon * (1 + SLACK)),
    ),
    "along the plan": (
        "⟨r̂, r⟩/‖r‖ ≥ τ and ‖r − r̂‖ ≤ ε",
        lambda w, q: (w.along * w.norms >= q.tau * (1 - SLACK)) & (w.left * w.norms <= q.epsilon * (1 + SLACK)),
    ),
    "relative": (
        "‖r̂‖ ≥ τ and ‖r − r̂‖ ≤ ε‖r‖", lambda w, q: (w.share * w.norms >= q.tau * (1 - SLACK)) & (w.left <= q.epsilon)
    ),
    "too much is written": (
        "‖r̂‖ ≥ τ and ‖r̂‖ ≤ ε",
        lambda w, q: (w.share * w.norms >= q.tau * (1 - SLACK)) & (w.share * w.norms <= q.epsilon * (1 + SLACK)),
    ),
}
"""What success and editability may mean, each with the requirement that it puts on plans."""


def readings(trials: int = 200, seed: int = 0) -> pd.DataFrame:
    """How often the threshold β < τ/(τ+ε) foretells, under each reading of the requirements,
    that no plan satisfies them.

    Judged are the plans that can be first or last among the feasible ones, and 200 more. Columns: reading, requirement,
    instances, agrees, survives. The last row asks the same of (58) with ≤ in place of <, where γ = τ/ε = 3 without
    rounding.
    """
    generator, agreed, one = (
        torch.Generator().manual_seed(seed), dict.fromkeys(READINGS, 0), torch.ones((), dtype=torch.float64)
    )
    for trial in range(trials):
        request = random_request(trial, generator)
        written = solve(request.key, request.direction[None], request.metric).realized[0]
        share, left = request.norms(one)
        ends = torch.stack([request.tau / share, request.epsilon / left, request.epsilon / share])
        norms = torch.cat([ends, ends[0] * torch.logspace(-6, 6, 200, dtype=torch.float64)])
        tried = _Written(norms, share, written @ request.direction, left)
        foretold = bool(attenuation(request.gamma) < request.tau / (request.tau + request.epsilon))
        for name, (_, rule) in READINGS.items():
            agreed[name] += foretold != bool(rule(tried, request).any())
    rows = [
        {
            "reading": name, "requirement": text, "instances": trials, "agrees": agreed[name],
            "survives": agreed[name] == trials
        }
        for name, (text, _) in READINGS.items()
    ]
    point = Request(
        "", Isotropic(3), torch.ones(1, 3, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64), 3 * one,
        one
    )
    empty = not all(point.outcome(4 * one))  # β = τ/(τ+ε) = 3/4, and the one plan of norm τ + ε
    return pd.DataFrame(
        [
            *rows,
            {
                "reading": "≤ in place of <", "requirement": "empty at β = τ/(τ+ε) too", "instances": 1,
                "agrees": int(empty), "survives": empty
            },
        ]
    )


def edges(trials: int = 60, seed: int = 0) -> pd.DataFrame:
    """The theorem as stated, at its own limit β = 0, and where an assumption is dropped: plans inside the interval and
    on both sides of it.

    As `comparisons.foretold`: a plan is wrong whose outcome is not the one that the interval foretells.
    """
    generator, agrees = torch.Generator().manual_seed(seed), {case: [] for case in EDGES}
    for trial in range(trials):
        request = random_request(trial, generator)
        lower, upper = request.interval
        near = request.key + 0.1 * request.key.norm() * _direction(generator, request.key.shape)
        opposed = 0.1 * _direction(generator, request.direction.shape) - request.direction
        hidden = request.metric.base if isinstance(request.metric, Conditioned) else request.metric
        hidden = request.key - hidden.project(request.key) if isinstance(hidden, NullSpace) else 0 * request.key
        for place in (-0.5, 0.25, 0.75, 1.5):
            norm = lower ** (1 - place) * upper**place
            plan, keys = norm * request.direction, torch.cat([request.key, near])
            batch = solve(keys, torch.stack([plan, norm * opposed]), request.metric).realized[0]
            elsewhere = plan * (near @ gate(request.key, request.metric).T).squeeze()
            found = [
                request.spare(plan), request.spare(plan, noise=0.0),
                *(request.judged(w.norm(), (plan - w).norm()) for w in (batch, elsewhere))
            ]
            unwritten = request._replace(key=hidden).norms(plan)[0]  # however long: no plan succeeds
            told = [*(request.agrees(spare, norm) for spare in found), -request.judged(unwritten, unwritten)[0]]
            for case, clear in zip(EDGES, told, strict=True):
                agrees[case].append(clear)
    return foretold(EDGES, agrees)


def _direction(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    drawn = torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
    return drawn / drawn.norm()


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
        request = request._replace(key=request.key * (_uniform(generator, -1.2, 1.2) / request.gamma).sqrt())
        norm = _uniform(generator, -0.3, 1.3)
        rows.append(
            {
                "gamma": request.gamma.item(), "beta": attenuation(request.gamma).item(), "norm": norm.item(),
                "outcome": words[request.outcome(norm)]
            }
        )
    return pd.DataFrame(rows)


def by_method(records: pd.DataFrame) -> pd.DataFrame:
    """Per metric: instances, plans written, wrong ones, whether the ends are met but for rounding, empty intervals,
    and disagreements about them.
    """
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
