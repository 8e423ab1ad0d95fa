"""A directed search for a counterexample: what random instances do not meet, an optimizer may."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """The best that a search found."""

    score: float
    point: Tensor
    trace: list[float]  # best score so far, one entry a step
    evaluations: int


def ascend(score: Callable[[Tensor], Tensor], starts: Tensor, steps: int = 200, rate: float = 0.05) -> Found:
    """Raise a differentiable score by gradient ascent (Adam, falling rate) from all starts at once;
    the best point of all.

    score: (starts, numbers) → (starts,). A start whose score or gradient is not finite stays where it is.
    Cost: `steps` forward-backward passes of `score`.
    """
    points = starts.clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=rate, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 100)
    best, kept, trace = torch.full((len(starts),), -torch.inf, dtype=starts.dtype), starts.clone(), []
    for _ in range(steps):
        optimizer.zero_grad()
        values = score(points)
        better = torch.isfinite(values) & (values.detach() > best)
        best, kept = torch.where(better, values.detach(), best), torch.where(better[:, None], points.detach(), kept)
        trace.append(best.max().item())
        values.sum().backward()
        points.grad.nan_to_num_(0, 0, 0)
        optimizer.step()
        schedule.step()
    return Found(best.max().item(), kept[best.argmax()], trace, steps * len(starts))


def climb(
    score: Callable[[Tensor], float], start: Tensor, steps: int, generator: torch.Generator, width: float = 0.3
) -> Found:
    """Raise a score that has no useful gradient: Gaussian trials around the best point, wider after a success,
    narrower after a failure.

    start: numbers in [0, 1], where all trials stay. A score that is not finite counts as a failure.
    """
    best, point, trace = score(start), start, []
    for _ in range(steps):
        trial = (point + width * torch.randn(start.shape, dtype=start.dtype, generator=generator)).clamp(0, 1)
        value = score(trial)
        if value > best:
            best, point, width = value, trial, min(0.5, 1.5 * width)
        else:
            width = max(0.02, 0.95 * width)
        trace.append(best)
    return Found(best, point, trace, steps + 1)
