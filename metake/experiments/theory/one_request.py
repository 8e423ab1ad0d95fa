"""One request at one layer: what a plan of it writes and leaves, beside the norms that MetaKE v3 Theorem 1 allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import Metric
from metake.algebra.solve import association, feasible_interval, solve
from metake.experiments.theory.comparisons import rounding
from metake.experiments.theory.solves import draw

KINDS = ("memit", "memit_seq", "alphaedit")
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


def uniform(generator: torch.Generator, low: float, high: float) -> Tensor:
    """10 to a power between low and high."""
    return 10 ** (low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator))


def random_request(
    trial: int, generator: torch.Generator, dims: Sequence[int] = (4, 16, 64), near: bool = False
) -> Request:
    """A layer of random dimension, rank, conditioning (to 1e6), strength and past; a request of γ from 1e-3 to 1e3.

    τ from 0.01 to 100; ε/τ from 0.001 to 1000, or, if `near`, 1/γ up to 1e-5: the interval is a point, or just empty.
    """
    method, dim = KINDS[trial % 3], dims[trial // 3 % len(dims)]
    case = draw(generator, dim, 1)
    metric, key = case.metric(methods.method(method, "tiny")), case.keys.T
    key = key * (uniform(generator, -3, 3) / association(key, metric)).sqrt()
    tau, gamma = uniform(generator, -2, 2), association(key, metric)[0]
    if near:
        ratio = (1 + 1e-5 * (2 * torch.rand((), dtype=torch.float64, generator=generator) - 1)) / gamma
    else:
        ratio = uniform(generator, -3, 3)
    return Request(method, metric, key, case.residuals[:, 0] / case.residuals.norm(), tau, ratio * tau)
