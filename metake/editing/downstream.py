"""MetaKE's outer objective after the whole edit, differentiated through all of it (v3 eqs 5–7, 84, 99–102, A.5).

    for each edited layer l, on a model that the layers before have changed
        r_l = share · (v − h^L),   M_l = gate(k_l)                       both depend on v through k_l and h^L
        every position j of block l moves by r_l (M_l u_j)               Δ_l = r_l M_l is never formed
    F(v) = L_edit + L_loc + L_reg on the model so edited

All requests meet in (r_l, M_l) alone: rows run in micro-batches between them. For the gradient a micro-batch keeps, of
each edited layer, what goes into the block and into its edited weight; the blocks' insides are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metake.algebra.geometry import Metric
from metake.algebra.update import LayerUpdate
from metake.data.requests import EditRequest
from metake.editing.keys import Keys, Reading, average
from metake.editing.objective import Bucket
from metake.editing.outer import OuterObjective, Refinement, micro_batches, responses, shifted
from metake.editing.targets import Targets
from metake.language.model import LanguageModel
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import Row, Rows
from metake.support.errors import NumericalError

Written = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StageTwo:
    """How targets become an edit."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]  # of what is left that each layer takes
    reading: Reading
    metrics: Mapping[int, Metric] = field(repr=False)
    # what is done to a layer's update before it is written
    post: Mapping[int, Callable[[LayerUpdate], LayerUpdate]] = field(default_factory=dict, repr=False)

    def written(self, layer: int, residuals: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """(R, M) as rows, (n, d) and (n, d_in), as they are written at `layer`."""
        update = LayerUpdate("", residuals.T, gate)
        update = self.post[layer](update) if layer in self.post else update
        return update.left.T, update.right


class _Part(NamedTuple):
    """A micro-batch: which rows' activations are wanted, at which column, and the numbers they have among all."""

    run: Prefixed
    bucket: Bucket | None  # None: nothing of it is scored
    number: Tensor
    row: Tensor
    column: Tensor


class Downstream(OuterObjective):
    """The objective after the edit itself.

    F(V) = Σᵢ L_edit,i + L_loc,i + L_reg,i  at  W_l + Δ_l(V) for all edited layers l      (v3 eqs 5–7, 84, 99–102)

    requests: edited together, or their rows; initial: Stage I's targets, to which L_reg pulls. The model is only read.
    With `rule.gates` "frozen" every M_l stays as the edit towards V_init makes it; keys are then read only once.
    Cost: each evaluation a forward from the first edited block on, over the rewriting rows (in all contexts as far as
    the last edited layer), and a backward, in which the edited blocks run once more. Memory: a micro-batch's graph, and
    d + d_in numbers per position and edited layer of the whole batch.
    """

    def __init__(
        self, lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], initial: Targets,
        stage: StageTwo, rule: Refinement
    ):
        super().__init__(initial, rule, torch.float64)
        self.lm, self.stage, self.first, self.last = lm, stage, stage.layers[0], stage.layers[-1]
        batch = Rows.of(lm.tokenizer, requests, contexts)
        self.count, self.contexts = len(batch), len(batch.contexts)
        plain = [_cut(row) for row in batch.taught[:: self.contexts]]
        self.parts, self.plain = self._key_rows(batch), self._divided(list(enumerate(plain)))
        with torch.no_grad():
            self.below = [self._below(part) for part in self.parts], [self._below(part) for part in self.plain]
            for part, below in zip(self.parts, self.below[0], strict=True):
                if part.bucket and part.bucket.watches:  # p₀: the live model before this batch
                    self.score(part, part.run.read([], [self.last], self.first - 1, below)[1][self.last])
            self.gates: list[Tensor] = []  # frozen ones
            if rule.gates == "frozen":
                self.write(self.initial)
                scored = [i for i, part in enumerate(self.parts) if part.bucket]
                self.parts = [self.parts[i] for i in scored]
                self.below = [self.below[0][i] for i in scored], self.below[1]

    def _key_rows(self, batch: Rows) -> list[_Part]:
        """The scored rows, and those that give keys: with "plain" prompts the others end with the subject, unscored."""
        rows = list(enumerate(batch.taught))
        watched = [(-1, row) for row in batch.locality(self.rule.locality_position)]
        if self.rule.prompts == "contexts":
            return self._divided(rows + watched)
        scored = zip(range(0, len(rows), self.contexts), batch.rewriting(plain=True), strict=True)
        cut = [(i, _cut(row)) for i, row in rows if i % self.contexts]
        return self._divided([*scored, *watched]) + self._divided(cut)

    def _divided(self, numbered: Sequence[tuple[int, Row]]) -> list[_Part]:
        """Micro-batches of rows with their numbers among the keys, −1 for those that give none."""
        if not numbered:
            return []
        device, number, made = self.lm.device, {id(row): i for i, row in numbered}, []
        for rows, cuts in micro_batches(self.lm, [row for _, row in numbered], self.rule.tokens):
            at = [(number[id(r)], i, r.lookup - cut) for i, (r, cut) in enumerate(zip(rows, cuts, strict=True))]
            wanted = torch.tensor([x for x in at if x[0] >= 0], dtype=torch.long, device=device).view(-1, 3).T
            bucket = Bucket(rows, cuts, device) if any(row.read for row in rows) else None
            made.append(_Part(Prefixed(self.lm, [row.ids for row in rows], cuts), bucket, *wanted))
        return made

    def _below(self, part: _Part) -> Split:
        """What no target changes: the output of the block below the first edited one."""
        below = self.first - 1
        return part.run.read([], [below])[1][below] if below >= 0 else Split(None, None)

    def _ran(
        self, parts: list[_Part], states: list[Split], layer: int, after: int, wanted: int | None
    ) -> tuple[list[Split], list[Split], Tensor]:
        """Outputs of block `layer` and inputs of its edited weight at every position, from states after block `after`;
        and at the rows' own places that input, or the output of block `wanted`, in order of the rows' numbers.
        """

        def read(part: _Part, state: Split) -> tuple[Split, Split, Tensor]:
            ends = [layer] if wanted is None else sorted({layer, wanted})
            keys, found = part.run.read([layer], ends, after, state)
            source = keys[layer] if wanted is None else found[wanted]
            return found[layer], keys[layer], source.tail[part.row, part.column].double()

        ran = [
            checkpoint(read, part, state, use_reentrant=False, preserve_rng_state=False)
            for part, state in zip(parts, states, strict=True)
        ]
        order = torch.cat([part.number for part in parts]).argsort()
        return [x for x, _, _ in ran], [x for _, x, _ in ran], torch.cat([x for _, _, x in ran])[order]

    def write(self, value: Tensor) -> tuple[Written, list[Split]]:
        """The whole edit towards V, (n, d): (R, M) of each layer as rows, and block L's outputs, per micro-batch."""
        if not torch.isfinite(value).all():
            raise NumericalError(
                f"{int((~torch.isfinite(value)).any(1).sum())} of {len(value)} targets are not finite; expected "
                "vectors such as Stage I's"
            )
        rows, plain = self.below
        after, written = self.first - 1, []
        for index, layer in enumerate(self.stage.layers):
            states, inputs, keys = self._ran(self.parts, rows, layer, after, None)
            own_states, own_inputs, current = self._ran(self.plain, plain, layer, after, self.last)
            solved = self._gate(index, keys, current)
            written.append(self.stage.written(layer, (value - current) * self.stage.shares[index], solved))
            rows, plain, after = moved(states, inputs, *written[-1]), moved(own_states, own_inputs, *written[-1]), layer
        return written, rows

    def _gate(self, index: int, keys: Tensor, current: Tensor) -> Tensor:
        """M of an edited layer from every row's key, (n × contexts, d_in), or the frozen one, of the first sweep."""
        if index < len(self.gates):
            return self.gates[index]
        reading, metric = self.stage.reading, self.stage.metrics[self.stage.layers[index]]
        gate = reading.gate(Keys(average(keys, self.contexts, reading.flat), current, keys[:: self.contexts]), metric)
        if self.rule.gates == "frozen":
            self.gates.append(gate)
        return gate

    def score(self, part: _Part, states: Split) -> tuple[Tensor, Tensor]:
        """L_edit and L_loc of one micro-batch with these outputs of block L, (n,) each."""
        logits = part.run.logits(self.last, states, part.bucket.places)
        return part.bucket.losses(logits, self.count, self.rule.locality_direction)

    def slopes(self, states: list[Split]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The losses, (n, 2), and, per micro-batch, block L's outputs and their weighted sum's gradient there."""
        total, tensors, slopes = torch.zeros(self.count, 2, dtype=torch.float64, device=self.lm.device), [], []
        for part, own in zip(self.parts, states, strict=True):
            if not part.bucket:
                continue
            leaves = Split(*(t if t is None else t.detach().requires_grad_(torch.is_grad_enabled()) for t in own))
            if self.add(total, *self.score(part, leaves)):
                slopes += [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None]
                tensors += [t for t in own if t is not None]
        return total, tensors, slopes

    def task(self, value: Tensor) -> Tensor:
        losses, tensors, slopes = self.slopes(self.write(value)[1])
        if tensors and tensors[0].requires_grad:
            torch.autograd.backward(tensors, slopes)
        return losses


def moved(states: Sequence[Split], inputs: Sequence[Split], residuals: Tensor, gate: Tensor) -> list[Split]:
    """A block's outputs after its weight changed by R M, (n, d) and (n, d_in): h_j + R M u_j at every position."""
    return [shifted(h, responses(u, gate), residuals) for h, u in zip(states, inputs, strict=True)]


def _cut(row: Row) -> Row:
    """It ends with the subject, unscored."""
    return row._replace(ids=row.ids[: row.lookup + 1], read=(), labels=())
