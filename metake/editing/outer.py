"""MetaKE's outer objective, and its look-ahead through the last edited layer alone (v3 §4.3, eqs 79–82).

    freeze   M ← gate of layer L                                         eq. 8, B.3
    look     W̃_L ← W_L + R M,   R = V − H                                virtual look-ahead, eq. 81
    score    F_VL(V) = L_edit + L_loc + L_reg at W̃_L                     eqs 7, 79, 80

∇_V flows through R only: it is (∂L/∂W̃_L) Mᵀ plus the anchor's own gradient, the Structural Gradient Proxy of eq. 9.
W̃_L is never formed: at every position j the block's output moves by R (M u_j), u_j the input of W_L there.
`downstream` looks ahead through all edited layers instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metake.data.requests import EditRequest
from metake.editing.objective import Bucket
from metake.editing.targets import Targets
from metake.language.model import LanguageModel
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import Row, Rows
from metake.support.errors import ParameterError, near_misses

CHOICES = {
    "optimizer": {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "lbfgs": torch.optim.LBFGS},
    "anchor_norm": {"sum": 0, "mean": 1, "relative": 2},
    "locality_direction": {"post_pre": 0, "pre_post": 1},
    "locality_position": {"subject": 0, "final": 1},
    "prompts": {"contexts": 0, "plain": 1},
    "gate": {"structural": 0, "key_only": 1},
    "look_ahead": {"last": 0, "whole": 1},
    "gates": {"exact": 0, "frozen": 1},
    "keep": {"best": 0, "last": 1},
}


@dataclass(frozen=True)
class Refinement:
    """How the outer level refines V. Steps and unit coefficients are the paper's; what it leaves open is a field.

    optimizer:          "adam" (first version of the paper), "sgd" ("gradient descent", v3 eq. 82), or "lbfgs", which
                        searches along its directions (strong Wolfe): `steps` then counts every plan that it tries
    step_size:          η; the paper's value did not survive
    anchor_norm:        L_reg = ‖v − v_init‖²: "sum" (literal), "mean" over d, "relative" to ‖v_init‖²
    locality_direction: KL of L_loc: "post_pre" as in Stage I, or "pre_post" (literal reading of v3 eq. 98)
    locality_position:  where L_loc reads: at the "subject"'s last token as Stage I, or the "final" token
    prompts:            L_edit over Stage I's "contexts", or the "plain" prompt (literal reading of v3 eq. 97)
    gate:               "structural", or "key_only": Kᵀ(KKᵀ + λI)⁻¹, the paper's ablation without P and Kₚ
    feedback:           False detaches the look-ahead from V: the paper's stop-gradient ablation
    look_ahead:         what is edited virtually: the "last" layer (eqs 79–81), or by the "whole" edit all (eq. 84)
    gates:              of the whole look-ahead: "exact", following V, or "frozen" as the edit towards V_init makes them
    keep:               of the plans that were tried, V_init included, the "best" by F, or the "last" (literal)
    """

    steps: int = 15
    step_size: float = 0.1
    optimizer: str = "adam"
    edit_weight: float = 1.0
    locality_weight: float = 1.0
    anchor_weight: float = 1.0
    anchor_norm: str = "sum"
    locality_direction: str = "post_pre"
    locality_position: str = "subject"
    prompts: str = "contexts"
    gate: str = "structural"
    feedback: bool = True
    look_ahead: str = "last"
    gates: str = "exact"
    keep: str = "best"
    tokens: int = 8192  # of one micro-batch at most, fewer where memory is short: never the result

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ParameterError(near_misses(str(getattr(self, name)), known, name))
        if self.steps < 0 or not 0 < self.step_size < float("inf") or self.tokens < 1:
            found = f"{self.steps}, {self.step_size}, {self.tokens}"
            raise ParameterError(f"steps must be ≥ 0, step_size > 0 and finite, tokens ≥ 1; found {found}")
        for name in ("edit_weight", "locality_weight", "anchor_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ParameterError(f"{name} must be ≥ 0 and finite; found {getattr(self, name)}")


class OuterObjective:
    """F(V) = Σᵢ w_e L_edit,i + w_l L_loc,i + w_a L_reg,i of one batch on a virtually edited model; subclasses edit it.

    anchor: H, initial: V_init, (n, d) each; weights: (3,).
    """

    def __init__(self, targets: Targets, rule: Refinement, dtype: torch.dtype):
        self.rule, self.anchor, self.initial = rule, targets.anchor.to(dtype), targets.value.to(dtype)
        weights = (rule.edit_weight, rule.locality_weight, rule.anchor_weight)
        self.weights = torch.tensor(weights, dtype=dtype, device=self.initial.device)

    def task(self, value: Tensor) -> Tensor:
        """L_edit and L_loc of each request, (n, 2); with gradients on, their weighted sum's is added to a leaf's, V."""
        raise NotImplementedError

    def losses(self, value: Tensor) -> Tensor:
        """L_edit, L_loc, L_reg of each request, (n, 3); where gradients are on, ∇F is added to that of `value`."""
        task = self.task(value if self.rule.feedback else value.detach())
        pull = self.pull(value)
        if pull.requires_grad:
            (self.rule.anchor_weight * pull).sum().backward()
        return torch.cat([task, pull.detach()[:, None]], 1)

    def pull(self, value: Tensor) -> Tensor:
        """L_reg of each request, (n,)."""
        scale = {"sum": 1.0, "mean": value.shape[1], "relative": self.initial.square().sum(1)}[self.rule.anchor_norm]
        return (value - self.initial).square().sum(1) / scale

    @LanguageModel.entry(gradients=True)
    def evaluate(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F, (), and ∇F, (n, d), at V = value."""
        leaf = value.detach().to(self.initial).clone().requires_grad_()
        return self.losses(leaf).sum(0) @ self.weights, leaf.grad

    def add(self, total: Tensor, nll: Tensor, drift: Tensor) -> bool:
        """Add a micro-batch's losses to `total`, (n, 2); whether w_e Σ L_edit + w_l Σ L_loc was differentiated too."""
        total += torch.stack([nll, drift], 1).detach()
        if nll.requires_grad:
            (self.rule.edit_weight * nll + self.rule.locality_weight * drift).sum().backward()
        return nll.requires_grad


class _LookAhead(NamedTuple):
    """One bucket with what the look-ahead needs: the block's outputs and the gate's response at every position."""

    bucket: Bucket
    run: Prefixed
    state: Split  # (rows, positions, d)        H
    response: Split  # (rows, positions, n)     M u_j


class LastLayer(OuterObjective):
    """F_VL(V): the objective at W̃_L = W_L + (V − H) M, with what no step changes read once from the live model.

    requests: or their rows, if they are made; targets: Stage I's, planted at layer L; gate: (n, d_in) frozen M of layer
    L on the live model. Its gradient is the proxy GMᵀ of eq. 9 plus the anchor's own.
    Cost: each evaluation a forward and backward of the blocks above L at all positions, shared contexts counted once.
    """

    def __init__(
        self, lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], targets: Targets,
        gate: Tensor, rule: Refinement
    ):
        super().__init__(targets, rule, torch.promote_types(lm.dtype, torch.float32))
        self.lm, self.layer, self.gate = lm, targets.layer, gate
        batch = Rows.of(lm.tokenizer, requests, contexts)
        self.parts = [self._part(*part) for part in scored(lm, batch, rule, rule.tokens)]

    @torch.no_grad()
    def _part(self, bucket: Bucket, run: Prefixed) -> _LookAhead:
        keys, states = run.read([self.layer], [self.layer])
        part = _LookAhead(bucket, run, states[self.layer], responses(keys[self.layer], self.gate))
        if bucket.watches:  # p₀: the live model before this batch
            self._score(part, torch.zeros_like(self.anchor))
        return part

    def _score(self, part: _LookAhead, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """L_edit and L_loc of one bucket on the virtually edited model, (n,) each. residuals: R as rows, (n, d)."""
        moved = shifted(part.state, part.response, residuals)
        logits = part.run.logits(self.layer, moved, part.bucket.places)
        return part.bucket.losses(logits, len(residuals), self.rule.locality_direction)

    def task(self, value: Tensor) -> Tensor:
        total = torch.zeros(len(value), 2, dtype=value.dtype, device=value.device)
        for part in self.parts:  # every bucket sees all virtual edits, so gradients add up over buckets before the step
            self.add(total, *self._score(part, value - self.anchor))
        return total


def responses(inputs: Split, gate: Tensor) -> Split:
    """M u_j of a weight's inputs at every position, (…, n). gate: (n, d_in)."""
    return Split(*(u if u is None else u @ gate.T.to(u.dtype) for u in inputs))


def shifted(state: Split, response: Split, residuals: Tensor) -> Split:
    """h_j + R (M u_j) at every position. residuals: R as rows, (n, d)."""
    pairs = zip(state, response, strict=True)
    return Split(*(h if h is None else h + a @ residuals.to(h.dtype) for h, a in pairs))


def micro_batches(lm: LanguageModel, rows: Sequence[Row], tokens: int) -> list[tuple[list[Row], list[int]]]:
    """Rows that run together, and how much of each one's beginning is shared: at most before its lookup position."""
    groups, cuts = lm.continuing([r.ids for r in rows], [r.lookup for r in rows], tokens)
    return [([rows[i] for i in group], [cuts[i] for i in group]) for group in groups]


def scored(lm: LanguageModel, batch: Rows, rule: Refinement, tokens: int) -> list[tuple[Bucket, Prefixed]]:
    """What L_edit and L_loc read, in micro-batches."""
    rows = batch.rewriting(plain=rule.prompts == "plain") + batch.locality(rule.locality_position)
    made = micro_batches(lm, rows, tokens)
    return [(Bucket(own, cuts, lm.device), Prefixed(lm, [r.ids for r in own], cuts)) for own, cuts in made]
