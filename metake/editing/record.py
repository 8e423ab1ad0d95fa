"""What an edit's record is made of: what was solved at each layer, its norms, seconds, and the recipe as plain data."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metake.algebra.solve import Solution, spectrum
from metake.algebra.update import LayerUpdate
from metake.data.requests import EditRequest, told
from metake.language.model import LanguageModel
from metake.support.machine import reset_peak, synchronize


class SolvedLayer(NamedTuple):
    """What was solved at one layer."""

    keys: Tensor
    residuals: Tensor
    solution: Solution


class Solved(NamedTuple):
    """Requests that were solved together: updates per layer, what they were solved from, and each request's trace."""

    updates: tuple[LayerUpdate, ...]
    layers: dict[int, SolvedLayer]
    trace: tuple[dict, ...]


def joined(traces: list[tuple[dict, ...]]) -> tuple[dict, ...]:
    """One trace a request: of its only targets, or the last layer's with the earlier ones' under "earlier"."""
    if len(traces) == 1:
        return traces[0]
    return tuple({**last, "earlier": list(others)} for *others, last in zip(*traces, strict=True))


def refinement(traces: Sequence[dict]) -> dict[str, float]:
    """What MetaKE's outer level did to its own loss: over how many requests, for how many it fell, means before and
    after. {} without one. A request that is refined at several layers counts with the sum of its losses.
    """
    found = [[part["refined"] for part in (t, *t.get("earlier", ())) if "refined" in part] for t in traces]
    if not found or not found[0]:
        return {}
    before, after = ([sum(part[end] for part in parts) for parts in found] for end in ("before", "after"))
    fell = sum(b < a for a, b in zip(before, after, strict=True))
    return {"requests": len(found), "fell": fell, "before": sum(before) / len(found), "after": sum(after) / len(found)}


class Clock:
    """Seconds per stage: each call charges the time since the last one, once the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        reset_peak(device)  # the record's is of this edit
        self.device, self._last = device, time.perf_counter()

    def __call__(self, stage: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def norms(
    lm: LanguageModel, update: LayerUpdate, solved: Sequence[SolvedLayer], at_keys: bool = True
) -> dict[str, float]:
    """What a record says of one layer: Frobenius norms of R and of what is realized, ‖Δ‖/‖W‖, and the spectrum of B.

    at_keys: whether the residuals are found at the keys that were solved with; see `spectrum`.
    """
    solved = [layer for layer in solved if len(layer.residuals)]
    if not solved:
        return {}
    shares = torch.cat([spectrum(layer.solution.realization, at_keys) for layer in solved])
    return {
        "planned": torch.cat([layer.residuals for layer in solved]).norm().item(),
        "realized": torch.cat([layer.solution.realized for layer in solved]).norm().item(),
        "relative_update": relative(lm, update),
        "spectrum_min": shares.min().item(),
        "spectrum_max": shares.max().item(),
    }


def relative(lm: LanguageModel, update: LayerUpdate) -> float:
    """‖Δ‖/‖W‖ by Frobenius, W the weight as it is now; no copy of it is made in a wider dtype."""
    return update.norm / torch.linalg.vector_norm(lm.weight(update.module), dtype=torch.float64).item()


def describe(value: Any) -> Any:
    """A method's parts as plain data, each dataclass with its name: what a record keeps of a recipe."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"part": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return [describe(v) for v in value] if isinstance(value, tuple) else value


def digest_of(requests: Sequence[EditRequest]) -> str:
    """SHA-256 of the requests' content, in order."""
    return hashlib.sha256("".join(repr(sorted(told(r).items())) for r in requests).encode()).hexdigest()
