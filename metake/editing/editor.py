"""The editor: a value made of parts, and the one pipeline that every closed-form method runs.

targets → (refinement) → for each layer: keys, share of the residual, gate, post-process, write → metrics that remember
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metake.algebra import base
from metake.algebra.geometry import Isotropic, KeyStatistics, Metric, MetricRule
from metake.algebra.postprocess import PostProcess, correction
from metake.algebra.update import Edit, EditRecord, LayerUpdate
from metake.data.requests import EditRequest, check_batch
from metake.editing.bilevel import refine
from metake.editing.downstream import StageTwo
from metake.editing.keys import KeyReader, Reading
from metake.editing.outer import Refinement
from metake.editing.record import Clock, Solved, SolvedLayer, describe, digest_of, joined, norms, refinement
from metake.editing.state import EditorState
from metake.editing.targets import TargetRule, Targets, optimize_targets
from metake.language.generation import ContextRule, context_templates
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.support.errors import ParameterError, StatisticsError
from metake.support.machine import peak_memory, versions

Allocation = Callable[[int, int], float]


def even(index: int, count: int) -> float:
    """The share of the remaining residual that layer number `index` of `count` takes: 1/(count − index) (MEMIT)."""
    return 1 / (count - index)


def root(index: int, count: int) -> float:
    """1/√(count − index): the square root of `even`'s share (PMET)."""
    return (count - index) ** -0.5


def whole(index: int, count: int) -> float:
    """1: every layer takes all that remains (ROME, BLUE)."""
    return 1.0


@dataclass(frozen=True)
class Editor:
    """A locate-then-edit method as a combination of parts (MetaKE v3 §3.2; the family in one formula, Δ = R·M).

    layers: edited blocks in ascending order; metric: rule that builds Q from a layer's statistics; target: Stage I;
    allocation: share of the residual per layer; refine: MetaKE's outer level or None; remember: condition the metric
    on the keys of earlier batches; noise: 1, or 0 to interpolate exactly; seed: of the context templates.
    own_targets: each layer has targets of its own, made on the model that the layers before have changed (BLUE); else
    all share the last layer's. post: see `postprocess`. together: how many requests are solved at once, None for all of
    a batch (ROME: 1). plain: the residual is to be found at the plain prompt's key (ROME), not at the averaged one.
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
    context_rule: ContextRule = ContextRule()
    own_targets: bool = False
    post: tuple[PostProcess, ...] = ()
    together: int | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "post", tuple(self.post))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ParameterError(f"layers must be distinct, ascending and at least one; found {self.layers}")
        if self.contexts is not None and (
            not self.contexts or self.contexts[0] != "{}" or any(c.count("{}") != 1 for c in self.contexts)
        ):
            raise ParameterError("contexts must begin with the plain '{}', and each must contain exactly one '{}'")
        if self.together is not None and self.together < 1:
            raise ParameterError(f"together must be at least 1, or None for all of a batch; found {self.together}")

    def paths(self, lm: LanguageModel) -> tuple[str, ...]:
        """The weights that an edit changes."""
        return tuple(map(lm.write_path, self.layers))

    @LanguageModel.entry()
    def init(self, lm: LanguageModel, statistics: Mapping[int, KeyStatistics]) -> EditorState:
        """The state before the first batch: a metric per layer, sampled context templates. `lm` is only read.

        Raises StatisticsError if a layer's statistics are missing, of another width, or leave no null space.
        """
        metrics = {}
        for layer in self.layers:
            if layer not in statistics:
                raise StatisticsError(
                    f"no key statistics of layer {layer}; found {sorted(statistics)}: compute them with "
                    f"statistics(lm, layers={self.layers})"
                )
            if statistics[layer].dim != (width := lm.shape(lm.write_path(layer))[1]):
                raise StatisticsError(
                    f"statistics of layer {layer} have dimension {statistics[layer].dim}, the keys of "
                    f"{lm.name!r} have {width}: they are of another model"
                )
            metrics[layer] = self.metric(statistics[layer].to(lm.device))
        contexts = self.contexts or context_templates(lm, self.context_rule, self.seed)
        original = {p: lm.weight(p).to(lm.device, copy=True) for p in self.paths(lm)} if self._at("sequence") else {}
        return EditorState(metrics, contexts, getattr(statistics, "digest", ""), original=original)

    def edit(self, lm: LanguageModel, requests: Sequence[EditRequest], statistics: Mapping[int, KeyStatistics]) -> Edit:
        """One batch from a fresh state: `init`, one `step`, and `finish`. `lm` is bit-identical on return.

        The record is the step's: its norms are of what was solved, before a finish.
        """
        return self.finished(lm, *self.step(lm, requests, self.init(lm, statistics)))

    def finished(self, lm: LanguageModel, edit: Edit, state: EditorState) -> Edit:
        """A first step's edit with what `finish` adds to it, before either is applied."""
        if not (last := self.finish(lm, state)):
            return edit
        # what a rule makes of a thin update has no higher rank
        pairs = zip((edit + last).updates, edit.updates, strict=True)
        thin = (both if both.dense is not None else both.compress(max(1, own.rank))[0] for both, own in pairs)
        return replace(edit, updates=tuple(thin))

    @LanguageModel.entry(gradients=True)
    def step(
        self, lm: LanguageModel, requests: Sequence[EditRequest], state: EditorState, planned: Targets | None = None
    ) -> tuple[Edit, EditorState]:
        """The edit of one batch, and the state for the next, assuming the edit will be applied.

        planned: Stage I's targets of these requests on this very model, if at hand: methods that plan alike share them.

        `lm` is bit-identical on return, also if this raises: RequestError for empty, unlocatable, repeated or
        contradicting requests, NumericalError for a loss that is not finite. Zero requests give a zero update.
        """
        requests = list(requests)
        check_batch(requests)
        if planned and (
            self.plan_key(state) is None or (planned.layer, len(planned.value)) != (self.layers[-1], len(requests))
        ):
            raise ParameterError(
                f"these targets are of {len(planned.value)} requests at layer {planned.layer}; this editor "
                "plans otherwise: leave them out"
            )
        paths = self.paths(lm)
        clock = Clock(lm.device)
        known = base.known(lm, paths, state.edits > 0)
        clock("digest")
        rows = Rows.of(lm.tokenizer, requests, state.contexts)
        with lm.scratch(paths):
            solved = [
                self._write(lm, rows.pick(group), state, clock, planned) for group in self.reading.groups(len(rows))
            ]
        updates = tuple(
            self._posted("batch", sum(parts[1:], parts[0]), lm.weight(path).to(lm.device))
            for path, parts in zip(paths, zip(*(s.updates for s in solved), strict=True), strict=True)
        )
        trace = {r.id: t for r, t in zip(requests, (t for s in solved for t in s.trace), strict=True)}
        record = EditRecord(
            recipe=describe(self), **known, requests=tuple(r.id for r in requests),
            requests_digest=digest_of(requests), statistics_digest=state.statistics_digest,
            context_templates=state.contexts, seed=self.seed, versions=versions(),
            layers={
                str(i): norms(lm, u, [s.layers[i] for s in solved], not self.plain)
                for i, u in zip(self.layers, updates, strict=True)
            },
            trace=trace, refinement=refinement(list(trace.values())),
            seconds=clock.seconds, peak_memory=peak_memory(lm.device),
        )  # fmt: skip
        keys = {i: torch.cat([s.layers[i].keys for s in solved]) for i in self.layers if self.remember}
        edit = Edit(updates, record)
        return edit, state.after(edit, keys, len(requests))

    @LanguageModel.entry()
    def finish(self, lm: LanguageModel, state: EditorState) -> Edit | None:
        """What a method still does once all batches are applied: None, or an edit to apply on top of them (PRUNE).

        Between batches the model stays as they left it: to look at a sequence midway, apply this within `applied`.
        """
        if not (rules := self._at("sequence")) or not state.totals:
            return None
        updates = tuple(correction(rules, total, state.original[path]) for path, total in state.totals.items())
        record = EditRecord(
            recipe=describe(self), **base.known(lm, state.totals, True),
            statistics_digest=state.statistics_digest, context_templates=state.contexts, seed=self.seed,
            versions=versions()
        )
        return Edit(updates, record)

    def plan_key(self, state: EditorState) -> tuple | None:
        """What Stage I depends on besides model and requests: equal keys can share it. None: it is done in pieces."""
        return None if self.own_targets or self.together else (self.layers[-1], self.target, state.contexts)

    def _at(self, when: str) -> tuple[PostProcess, ...]:
        return tuple(p for p in self.post if p.when == when)

    def _posted(self, when: str, update: LayerUpdate, weight: Tensor) -> LayerUpdate:
        for rule in self._at(when):
            update = rule(update, weight)
        return update

    @property
    def reading(self) -> Reading:
        """How this editor reads a batch, and what it solves from that."""
        site = "block" if self.target.site == "block" else "mlp"
        return Reading(site, self.context_rule.flat, self.plain, self.noise, self.together, 2 * self.target.tokens)

    def _plan(
        self, lm: LanguageModel, reader: KeyReader, rows: Rows, state: EditorState, layer: int, clock: Clock,
        planned: Targets | None
    ) -> Targets:
        """Stage I at `layer` and, for MetaKE, the outer level through the layer's gate on the live model."""
        targets = planned or optimize_targets(lm, rows, state.contexts, layer, self.target)
        clock("targets")
        if self.refine and len(rows):
            through = self.through(lm, state, reader, layer)
            targets = refine(lm, rows, state.contexts, targets, through, self.refine)
            clock("refinement")
        return targets

    def through(self, lm: LanguageModel, state: EditorState, reader: KeyReader, layer: int) -> Tensor | StageTwo:
        """What the outer level looks through: the frozen gate of `layer`, or all of Stage II."""
        whole = self.refine and self.refine.look_ahead == "whole"
        return self.stage_two(lm, state) if whole else self._frozen_gate(reader, state, layer)

    def stage_two(self, lm: LanguageModel, state: EditorState) -> StageTwo:
        """How this editor turns targets into an edit of the live model: what a whole look-ahead passes through.

        Raises ParameterError for one whose update is not R·M towards one shared target at a block's output.
        """
        reading, rules = self.reading, self._at("layer")
        if self.own_targets or reading.plain or reading.site != "block":
            raise ParameterError(
                "only an editor that writes R·M towards one shared target at a block's output can be looked through "
                "whole (memit, alphaedit, sphere); this one has its own targets at each layer, a plain key or another "
                "site: take look_ahead='last'"
            )
        if self._at("batch") or not all(rule.linear for rule in rules) or len(rules) > 1:
            raise ParameterError(
                "only an update of which nothing more is made, or something linear (sphere), can be looked through "
                f"whole; found {', '.join(type(rule).__name__ for rule in self.post)}: take look_ahead='last'"
            )
        weights = {i: lm.weight(lm.write_path(i)).to(lm.device, torch.float64) for i in self.layers if rules}
        post = {i: rule.of(weight) for rule in rules for i, weight in weights.items()}
        metrics = {i: self._metric(state, i) for i in self.layers}
        shares = tuple(self.allocation(i, len(self.layers)) for i in range(len(self.layers)))
        return StageTwo(self.layers, shares, reading, metrics, post)

    def _metric(self, state: EditorState, layer: int) -> Metric:
        """The metric that a look-ahead gates with: a layer's own, or with the key-only ablation without P and Kₚ."""
        metric = state.metrics[layer]
        if self.refine and self.refine.gate == "key_only":
            return Isotropic(metric.dim, getattr(self.metric, "ridge", 0.0) or 1.0)
        return metric

    def _frozen_gate(self, reader: KeyReader, state: EditorState, layer: int) -> Tensor:
        """M of a layer on the live model."""
        return self.reading.gate(reader.read(layer, layer), self._metric(state, layer))

    def _write(
        self, lm: LanguageModel, rows: Rows, state: EditorState, clock: Clock, planned: Targets | None
    ) -> Solved:
        """Both stages for requests that are solved together, each layer on the model that the layers before changed."""
        reading, last = self.reading, self.layers[-1]
        scale = lm.scale if reading.site == "block" else 1.0  # of what is written on its way to where it is planned
        reader = reading.reader(lm, rows, last)
        updates, layers, trace = [], {}, []
        for index, layer in enumerate(self.layers):
            if self.own_targets or not index:
                place = layer if self.own_targets else last
                targets = self._plan(lm, reader, rows, state, place, clock, planned)
                trace.append(targets.trace)
            found, path = reader.read(layer, targets.layer), lm.write_path(layer)
            clock("keys")
            residuals = (targets.value - found.current) * self.allocation(index, len(self.layers))
            solution = reading.solve(found, residuals, state.metrics[layer])
            update = LayerUpdate(path, (residuals / scale).T.contiguous(), solution.gate)
            update = self._posted("layer", update, lm.weight(path).to(lm.device))
            clock("solve")
            lm.add(path, update)
            clock("write")
            updates.append(update)
            layers[layer] = SolvedLayer(found.keys, residuals, solution)
        return Solved(tuple(updates), layers, joined(trace))
