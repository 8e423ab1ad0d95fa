"""The editor of the gradient family: slopes, network, solve, write, J times; the interface of every editor.

Each step reads inputs and output gradients of the edited linear maps on the model as the steps before left it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metake.algebra import base
from metake.algebra.solve import Solution, realization
from metake.algebra.update import Edit, EditRecord, LayerUpdate
from metake.data.requests import EditRequest, check_batch
from metake.editing.gradient.network import Moments, Network, shapes
from metake.editing.gradient.rule import Corrected, Descent, GradientRule, factors
from metake.editing.gradient.slopes import Passes, Slopes
from metake.editing.record import Clock, SolvedLayer, describe, digest_of, norms, relative
from metake.editing.state import EditorState
from metake.language.model import LanguageModel
from metake.language.tokens import rewriting_rows
from metake.support.errors import NumericalError, ProvenanceError
from metake.support.machine import peak_memory, versions

PLAIN = ("{}",)
LEARNED = 1e-2  # mean −log p at which fine-tuning stops (ROME's released baseline)


@dataclass(frozen=True)
class GradientEditor:
    """An editor that needs one forward and backward pass a step, no key statistics and no contexts.

    modules: the edited linear maps, any `nn.Linear` or `Conv1D`, by paths, or by numbers of the blocks in which closed
    forms write; rule: see `GradientRule`; networks: per step and shape of weight, as `training.train` makes them; none:
    nothing is trained (UltraEdit). trained: what the networks were trained on, with the digests of the weights that
    they belong to. limit: of the entries of a change that fine-tuning makes (FT-L).
    """

    modules: tuple[str | int, ...]
    rule: GradientRule = GradientRule()
    networks: tuple[tuple[Network, ...], ...] = field(default=(), repr=False, compare=False)
    trained: Mapping[str, Any] = field(default_factory=dict, repr=False)
    seed: int = 0
    limit: float | None = None

    layers = ()  # whose key statistics it needs

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))

    def paths(self, lm: LanguageModel) -> tuple[str, ...]:
        """The weights that an edit changes."""
        return tuple(lm.write_path(place) if isinstance(place, int) else place for place in self.modules)

    def plan_key(self, state: EditorState) -> None:
        """It plans nothing that others could share."""
        return None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over modules, rule and every network's parameters: what tells one trained editor from another."""
        told = (self.modules, describe(self.rule), self.networks) + (self.limit,) * bool(self.limit)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def init(self, lm: LanguageModel, statistics: Any = None) -> EditorState:
        """The state before the first batch. `lm` is only read; statistics are not needed and not looked at.

        Raises ProvenanceError if the networks were trained on other weights than the model has; ArchitectureError if a
        module cannot be edited.
        """
        found = {path: lm.digest(path) for path in self.paths(lm)}
        for path, expected in self.trained.get("weights", {}).items():
            if found.get(path) != expected:
                raise ProvenanceError(
                    f"this editor was trained on {path} with SHA-256 {expected[:12]}…, but {lm.name!r} has "
                    f"{found.get(path, 'none')[:12]}…: train one on this model, with metake train"
                )
        # what a living normalization goes on from: the training's moments, those of its last step; else none
        tables = [torch.zeros(3, sum(size), dtype=torch.float64) for size in self._shapes(lm)]
        tables = [network.table for network in self.networks[-1]] if self.networks else tables
        begin = {i: Moments(table.to(lm.device)) for i, table in enumerate(tables)}
        return EditorState(begin if self.rule.living else {}, PLAIN, self.digest)

    def edit(self, lm: LanguageModel, requests: Sequence[EditRequest], statistics: Any = None) -> Edit:
        """One batch from a fresh state. `lm` is bit-identical on return."""
        return self.step(lm, requests, self.init(lm, statistics))[0]

    def finish(self, lm: LanguageModel, state: EditorState) -> Edit | None:
        """Nothing is left to do once all batches are applied."""
        return None

    def finished(self, lm: LanguageModel, edit: Edit, state: EditorState) -> Edit:
        return edit

    @LanguageModel.entry(gradients=True)
    def step(
        self, lm: LanguageModel, requests: Sequence[EditRequest], state: EditorState, planned: None = None
    ) -> tuple[Edit, EditorState]:
        """The edit of one batch, and the state for the next, assuming the edit will be applied.

        `lm` is bit-identical on return, also if this raises: RequestError for empty, unlocatable, repeated or
        contradicting requests, NumericalError for slopes that are not finite. Zero requests give a zero update.
        Cost: J forwards and backwards, and a solve of as many equations as there are tokens.
        """
        requests = list(requests)
        check_batch(requests)
        paths, clock = self.paths(lm), Clock(lm.device)
        known, share = base.known(lm, paths, state.edits > 0), self.rule.shares(len(requests))
        clock("digest")
        rows = rewriting_rows(lm.tokenizer, requests, PLAIN)
        passes = Passes(lm, [row._replace(weight=share[row.request] * row.weight) for row in rows], self.rule.tokens)
        places, sums = self.places(lm), {path: _nothing(lm, path) for path in paths}
        limits = {path: self.limit for path in paths if self.rule.solve == "adam"}
        tuned = {p: Descent(lm.shape(p), self.rule.step, limit, lm.device) for p, limit in limits.items()}
        solved: dict[str, list[SolvedLayer]] = {path: [] for path in paths}
        history, seen = [], {}
        with lm.scratch(paths):
            for j in range(self.rule.steps if requests else 0):
                losses, slopes = passes.slopes(paths)
                history.append(losses[:, 0])
                _check_finite(lm, history, slopes)
                clock("slopes")
                if tuned and losses[:, 0].mean() < LEARNED:
                    break
                seen = self._moments(places, slopes, seen)
                for path in paths:
                    if tuned:
                        update = replace(_nothing(lm, path), dense=tuned[path](slopes[path]))
                    else:
                        own = self._corrected(places[path], j, slopes[path], state, seen)
                        left, right = factors(self.rule, slopes[path], own)
                        update = LayerUpdate(path, left.contiguous(), right.contiguous())
                    if self.rule.solve == "least squares":
                        solved[path].append(_solved(slopes[path].keys.double(), left, right))
                    sums[path] = sums[path] + update
                    lm.add(path, update)
                clock("solve")
            if requests:
                history.append(passes.losses()[:, 0])
        losses = [step.tolist() for step in history]
        record = EditRecord(
            recipe=describe(self.rule) | {"modules": [*paths], "trained": dict(self.trained), "limit": self.limit},
            **known, requests=tuple(r.id for r in requests), requests_digest=digest_of(requests),
            statistics_digest=state.statistics_digest, context_templates=PLAIN, seed=self.seed, versions=versions(),
            layers={
                path: norms(lm, u, solved[path])
                or {"relative_update": relative(lm, u)}
                for path, u in sums.items()
            },
            trace={r.id: {"nll": [step[i] / share[i] for step in losses]} for i, r in enumerate(requests)},
            seconds=clock.seconds, peak_memory=peak_memory(lm.device),
        )  # fmt: skip
        edit = Edit(tuple(sums.values()), record)
        return edit, state.after(edit, {i: new.table for i, new in seen.items()}, len(requests))

    def _shapes(self, lm: LanguageModel) -> list[tuple[int, int]]:
        return shapes([lm.shape(path) for path in self.paths(lm)])

    def _moments(
        self, places: Mapping[str, tuple[int, int]], slopes: Mapping[str, Slopes], seen: Mapping[int, Moments]
    ) -> dict[int, Moments]:
        """Of a living normalization: what this batch adds to the moments of each shape, after its steps so far."""
        if not self.rule.living:
            return {}
        rows: dict[int, list[Tensor]] = {}
        for path, (shape, _) in places.items():
            rows.setdefault(shape, []).append(slopes[path].rows)
        new = {i: Moments.of(torch.cat(own)) for i, own in rows.items()}
        return {i: seen[i].joined(own.table) if i in seen else own for i, own in new.items()}

    def places(self, lm: LanguageModel) -> dict[str, tuple[int, int]]:
        """Each weight's shape, and its number among those of this shape, which share a network."""
        order, sizes = self._shapes(lm), [lm.shape(path) for path in self.paths(lm)]
        numbers = [(order.index(size), sizes[:i].count(size)) for i, size in enumerate(sizes)]
        return dict(zip(self.paths(lm), numbers, strict=True))

    @torch.no_grad()
    def _corrected(
        self, where: tuple[int, int], j: int, slopes: Slopes, state: EditorState, seen: Mapping[int, Moments]
    ) -> Corrected:
        shape, place = where
        moments = state.metrics[shape].joined(seen[shape].table) if self.rule.living else None
        if self.networks:
            return corrected(self.networks[j][shape].to(slopes.keys.device), slopes, place, moments)
        return Corrected((moments or Moments.of(slopes.rows)).normalized(slopes.rows), self.rule.step, 1.0)


def corrected(network: Network, slopes: Slopes, place: int, moments: Moments | None = None) -> Corrected:
    """What a network makes of slopes, differentiable in its parameters; moments: in the place of its own."""
    return Corrected(network(slopes.rows, place, moments), network.step[place], network.log_ridge[place].double().exp())


def _solved(keys: Tensor, left: Tensor, right: Tensor) -> SolvedLayer:
    """What a record tells of least squares: B = M Kᵀ, and of the residuals what is realized."""
    interaction = realization(keys, right)
    return SolvedLayer(keys, left.T, Solution(right, interaction, interaction.T @ left.T))


def _nothing(lm: LanguageModel, path: str) -> LayerUpdate:
    d_out, d_in = lm.shape(path)
    kind = {"dtype": torch.float64, "device": lm.device}
    return LayerUpdate(path, torch.zeros(d_out, 0, **kind), torch.zeros(0, d_in, **kind))


def _check_finite(lm: LanguageModel, history: Sequence[Tensor], slopes: Mapping[str, Slopes]) -> None:
    step = len(history) - 1
    if bad := (~torch.isfinite(history[-1])).nonzero()[:, 0].tolist():
        raise NumericalError(f"the loss of request(s) {bad} is not finite at step {step}: {lm.cause()}, or step less")
    for path, found in slopes.items():
        if not torch.isfinite(found.rows).all():
            raise NumericalError(f"inputs or gradients at {path} are not finite at step {step}")
