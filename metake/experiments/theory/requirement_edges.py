"""Where MetaKE v3 Theorem 1 ends: assumptions dropped, and readings of its two requirements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake.algebra.geometry import Conditioned, Isotropic, NullSpace
from metake.algebra.solve import attenuation, gate, solve
from metake.experiments.theory.comparisons import foretold
from metake.experiments.theory.one_request import SLACK, Request, random_request

EDGES = {
    "as stated": "none", "noise 0: the write interpolates": "some", "another request in the batch": "some",
    "written at one key, read at another": "some", "β = 0: no plan succeeds": "none",
}  # fmt: skip
"""Where an assumption is dropped, and how many plans the interval should then misjudge."""


def edges(trials: int = 60, seed: int = 0) -> pd.DataFrame:
    """The theorem as stated, at its limit β = 0, and without an assumption: plans inside the interval and beside it.

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


class _Written(NamedTuple):
    """Plans of one direction: their norms, and what share of one is written, is written along the plan, is left."""

    norms: Tensor
    share: Tensor
    along: Tensor
    left: Tensor


def _succeeds(w: _Written, q: Request) -> Tensor:
    return w.share * w.norms >= q.tau * (1 - SLACK)


def _editable(w: _Written, q: Request) -> Tensor:
    return w.left * w.norms <= q.epsilon * (1 + SLACK)


READINGS: dict[str, tuple[str, Callable[[_Written, Request], Tensor]]] = {
    "absolute": ("‖r̂‖ ≥ τ and ‖r − r̂‖ ≤ ε", lambda w, q: _succeeds(w, q) & _editable(w, q)),
    "along the plan": (
        "⟨r̂, r⟩/‖r‖ ≥ τ and ‖r − r̂‖ ≤ ε", lambda w, q: _succeeds(w._replace(share=w.along), q) & _editable(w, q)
    ),
    "relative": ("‖r̂‖ ≥ τ and ‖r − r̂‖ ≤ ε‖r‖", lambda w, q: _succeeds(w, q) & (w.left <= q.epsilon)),
    "too much is written": (
        "‖r̂‖ ≥ τ and ‖r̂‖ ≤ ε", lambda w, q: _succeeds(w, q) & _editable(w._replace(left=w.share), q)
    ),
}
"""What success and editability may mean, each with the requirement that it puts on plans."""


def readings(trials: int = 200, seed: int = 0) -> pd.DataFrame:
    """How often β < τ/(τ+ε) foretells, under each reading of the requirements, that no plan satisfies them.

    Judged are the plans that can be first or last among the feasible ones, and 200 more. Columns: reading, requirement,
    instances, agrees, survives. The last row asks the same of (58) with ≤ in place of <, where γ = τ/ε = 3 without
    rounding.
    """
    generator, agreed = torch.Generator().manual_seed(seed), dict.fromkeys(READINGS, 0)
    one = torch.ones((), dtype=torch.float64)
    for trial in range(trials):
        request = random_request(trial, generator)
        written = solve(request.key, request.direction[None], request.metric).realized[0]
        share, left = request.norms(one)
        ends = torch.stack([request.tau / share, request.epsilon / left, request.epsilon / share])
        norms = torch.cat([ends, ends[0] * torch.logspace(-6, 6, 200, dtype=torch.float64)])
        tried = _Written(norms, share, written @ request.direction, left)
        told = bool(attenuation(request.gamma) < request.tau / (request.tau + request.epsilon))
        for name, (_, rule) in READINGS.items():
            agreed[name] += told != bool(rule(tried, request).any())
    told = [(name, text, trials, agreed[name]) for name, (text, _) in READINGS.items()]
    key, way = torch.ones(1, 3, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    point = Request("", Isotropic(3), key, way, 3 * one, one)
    empty = not all(point.outcome(4 * one))  # β = τ/(τ+ε) = 3/4, and the one plan of norm τ + ε
    told.append(("≤ in place of <", "empty at β = τ/(τ+ε) too", 1, int(empty)))
    found = pd.DataFrame(told, columns=["reading", "requirement", "instances", "agrees"])
    return found.assign(survives=found.agrees == found.instances)
