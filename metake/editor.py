"""The editor: a value made of parts, and the one pipeline that every closed-form method runs.

    targets → (refinement) → for each layer: keys, share of the residual, gate, write → metrics that remember the keys
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metake.bilevel import Refinement, refine
from metake.errors import ParameterError, StatisticsError
from metake.generation import context_templates
from metake.geometry import Isotropic, KeyStatistics, Metric, MetricRule, condition
from metake.keys import KeyReader
from metake.machine import peak_memory, synchronize, versions
from metake.model import LanguageModel
from metake.requests import EditRequest, check_batch
from metake.solve import Solution, gate, solve
from metake.targets import TargetRule, Targets, optimize_targets
from metake.update import Edit, EditRecord, LayerUpdate

Allocation = Callable[[int, int], float]


def even(index: int, count: int) -> float:
    """The share of the remaining residual that layer number `index` of `count` takes: 1/(count − index) (MEMIT)."""
    return 1 / (count - index)


@dataclass(frozen=True)
class EditorState:
    """What one batch hands to the next: a metric per layer, and the context templates. A value, never changed in place."""

    metrics: Mapping[int, Metric] = field(repr=False)
    contexts: tuple[str, ...]
    statistics_digest: str = ""
    edits: int = 0
    keys: Mapping[int, Tensor] = field(default_factory=dict, repr=False)  # of the latest batch, if the metrics remember them


@dataclass(frozen=True)
class Editor:
    """A locate-then-edit method as a combination of parts (MetaKE v3 §3.2; the family in one formula, Δ = R·M).

    layers: edited blocks in ascending order; metric: rule that builds Q from a layer's statistics; target: Stage I;
    allocation: share of the residual per layer; refine: MetaKE's outer level or None; remember: condition the metric
    on the keys of earlier batches; noise: 1, or 0 to interpolate exactly; seed: of the context templates.
    """

    layers: tuple[int, ...]
    metric: MetricRule
    target: TargetRule = TargetRule()
    allocation: Allocation = even
    refine: Refinement | None = None
    remember: bool = False
    noise: float = 1.0
    seed: int = 0
    contexts: tuple[str, ...] | None = None  # verbatim templates instead of sampled ones

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ParameterError(f"layers must be distinct, ascending and at least one; found {self.layers}")
        if self.contexts is not None and (not self.contexts or self.contexts[0] != "{}" or any(c.count("{}") != 1 for c in self.contexts)):
            raise ParameterError("contexts must begin with the plain '{}', and each must contain exactly one '{}'")

    def init(self, lm: LanguageModel, statistics: Mapping[int, KeyStatistics]) -> EditorState:
        """The state before the first batch: a metric per layer, sampled context templates. `lm` is only read.

        Raises StatisticsError if a layer's statistics are missing, of another width, or leave no null space.
        """
        metrics = {}
        for layer in self.layers:
            if layer not in statistics:
                raise StatisticsError(f"no key statistics of layer {layer}; found {sorted(statistics)}: compute them with statistics(lm, layers={self.layers})")
            width = lm.shape(lm.write_path(layer))[1]
            if statistics[layer].dim != width:
                raise StatisticsError(f"statistics of layer {layer} have dimension {statistics[layer].dim}, the keys of {lm.name!r} have {width}: they are of another model")
            metrics[layer] = self.metric(statistics[layer].to(lm.device))
        contexts = self.contexts or context_templates(lm, seed=self.seed)
        return EditorState(metrics, contexts, getattr(statistics, "digest", ""))

    def edit(self, lm: LanguageModel, requests: Sequence[EditRequest], statistics: Mapping[int, KeyStatistics]) -> Edit:
        """One batch from a fresh state: `init` and one `step`. `lm` is bit-identical on return."""
        return self.step(lm, requests, self.init(lm, statistics))[0]

    def step(self, lm: LanguageModel, requests: Sequence[EditRequest], state: EditorState) -> tuple[Edit, EditorState]:
        """The edit of one batch, and the state for the next, assuming the edit will be applied.

        `lm` is bit-identical on return, also if this raises: RequestError for empty, unlocatable, repeated or
        contradicting requests, NumericalError for a loss that is not finite. Zero requests give a zero update.
        """
        requests = list(requests)
        check_batch(requests)
        paths = [lm.write_path(layer) for layer in self.layers]
        hashes = {path: lm.digest(path) for path in paths}
        clock = _Clock(lm.device)
        with lm.scratch(paths):
            targets = optimize_targets(lm, requests, state.contexts, self.layers[-1], self.target)
            clock("targets")
            reader = KeyReader(lm, requests, state.contexts, self.layers[-1], 2 * self.target.tokens)
            if self.refine and requests:
                targets = refine(lm, requests, state.contexts, targets, self._frozen_gate(reader, state), self.refine)
                clock("refinement")
            updates, keys, layers = self._write(lm, reader, targets, state, clock)
        record = self._record(lm, requests, state, hashes, layers, targets, clock)
        if self.remember and requests:
            state = replace(state, metrics={i: condition(state.metrics[i], keys[i]) for i in self.layers}, keys=keys)
        return Edit(updates, record), replace(state, edits=state.edits + len(requests))

    def _frozen_gate(self, reader: KeyReader, state: EditorState) -> Tensor:
        """M of the last layer on the live model; with the key-only ablation, of a metric that ignores P and Kₚ."""
        metric = state.metrics[self.layers[-1]]
        if self.refine.gate == "key_only":
            metric = Isotropic(metric.dim, getattr(self.metric, "ridge", 0.0) or 1.0)
        keys, _ = reader.read(self.layers[-1])
        return gate(keys, metric, self.noise)

    def _write(self, lm: LanguageModel, reader: KeyReader, targets: Targets, state: EditorState, clock: _Clock) -> tuple[tuple[LayerUpdate, ...], dict, dict]:
        """Stage II: layer by layer, each solved on the model that the layers before it have already changed."""
        updates, all_keys, norms = [], {}, {}
        for index, layer in enumerate(self.layers):
            keys, current = reader.read(layer)
            clock("keys")
            residuals = (targets.value - current) * self.allocation(index, len(self.layers))
            solution = solve(keys, residuals, state.metrics[layer], self.noise)
            update = LayerUpdate(lm.write_path(layer), residuals.T.contiguous(), solution.gate)
            clock("solve")
            norms[str(layer)] = _norms(lm, update, residuals, solution)
            lm.add(update.module, update)
            clock("write")
            updates.append(update)
            all_keys[layer] = keys
        return tuple(updates), all_keys, norms

    def _record(self, lm: LanguageModel, requests: list[EditRequest], state: EditorState, hashes: dict, layers: dict, targets: Targets, clock: _Clock) -> EditRecord:
        trace = {r.id: t for r, t in zip(requests, targets.trace, strict=True)}
        return EditRecord(
            recipe=describe(self), base=lm.base(), weights=hashes, requests=tuple(r.id for r in requests), requests_digest=digest_of(requests),
            statistics_digest=state.statistics_digest, context_templates=state.contexts, seed=self.seed, versions=versions(), layers=layers, trace=trace,
            seconds=clock.seconds, peak_memory=peak_memory(lm.device),
        )  # fmt: skip


class _Clock:
    """Seconds per stage: each call charges the time since the last one, once the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.device, self._last = device, time.perf_counter()

    def __call__(self, stage: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _norms(lm: LanguageModel, update: LayerUpdate, residuals: Tensor, solution: Solution) -> dict[str, float]:
    if not len(residuals):
        return {}
    spectrum = torch.linalg.eigvals(solution.realization).real
    return {
        "planned": residuals.norm().item(),
        "realized": solution.realized.norm().item(),
        "relative_update": (update.delta.norm() / lm.weight(update.module).double().norm()).item(),
        "spectrum_min": spectrum.min().item(),
        "spectrum_max": spectrum.max().item(),
    }


def describe(value: Any) -> Any:
    """A method's parts as plain data, each dataclass with its name: what a record keeps of a recipe."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"part": type(value).__name__} | {k: describe(getattr(value, k)) for k in value.__dataclass_fields__}
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return list(value) if isinstance(value, tuple) else value


def digest_of(requests: Sequence[EditRequest]) -> str:
    """SHA-256 of the requests' content, in order."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(repr(sorted(asdict(request).items())).encode())
    return digest.hexdigest()
