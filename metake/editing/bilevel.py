"""MetaKE's outer level: refine the planned targets by looking ahead through the frozen gate (v3 §4.3, Algorithm 1).

    freeze   M ← gate of layer L                                         eq. 8, B.3
    repeat T times
        W̃_L ← W_L + R M,   R = V − H                                     virtual look-ahead, eq. 81
        V   ← V − η · optimizer(∇_V [L_edit + L_loc + L_reg])            eqs 7, 9, 82

∇_V flows through R only: it is (∂L/∂W̃_L) Mᵀ plus the anchor's own gradient, the Structural Gradient Proxy of eq. 9.
W̃_L is never formed: at every position j the block's output moves by R (M u_j), u_j the input of W_L there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from metake.data.requests import EditRequest
from metake.editing.objective import Bucket
from metake.editing.targets import Targets
from metake.language.model import LanguageModel
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import Row, Rows
from metake.support.errors import NumericalError, ParameterError, near_misses
from metake.support.machine import halving
from metake.support.progress import progress

CHOICES = {
    "optimizer": {"adam": torch.optim.Adam, "sgd": torch.optim.SGD},
    "anchor_norm": {"sum": 0, "mean": 1, "relative": 2},
    "locality_direction": {"post_pre": 0, "pre_post": 1},
    "locality_position": {"subject": 0, "final": 1},
    "prompts": {"contexts": 0, "plain": 1},
    "gate": {"structural": 0, "key_only": 1},
}


@dataclass(frozen=True)
class Refinement:
    """How the outer level refines V. Steps and unit coefficients are the paper's; what it leaves open is a field.

    optimizer:          "adam" (first version of the paper) or "sgd" ("gradient descent", v3 eq. 82)
    step_size:          η; the paper's value did not survive
    anchor_norm:        L_reg = ‖v − v_init‖²: "sum" (literal), "mean" over d, "relative" to ‖v_init‖²
    locality_direction: KL of L_loc: "post_pre" as in Stage I, or "pre_post" (literal reading of v3 eq. 98)
    locality_position:  where L_loc reads: at the "subject"'s last token as Stage I, or the "final" token
    prompts:            L_edit over Stage I's "contexts", or the "plain" prompt (literal reading of v3 eq. 97)
    gate:               "structural", or "key_only": Kᵀ(KKᵀ + λI)⁻¹, the paper's ablation without P and Kₚ
    feedback:           False detaches the look-ahead from V: the paper's stop-gradient ablation
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
    tokens: int = 8192  # of one micro-batch at most, fewer where memory is short: never the result

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ParameterError(near_misses(str(getattr(self, name)), known, name))
        if self.steps < 0 or not 0 < self.step_size < float("inf") or self.tokens < 1:
            raise ParameterError(
                f"steps must be ≥ 0, step_size > 0 and finite, tokens ≥ 1; found {self.steps}, "
                f"{self.step_size}, {self.tokens}"
            )
        for name in ("edit_weight", "locality_weight", "anchor_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ParameterError(f"{name} must be ≥ 0 and finite; found {getattr(self, name)}")


class _LookAhead(NamedTuple):
    """One bucket with what the look-ahead needs: the block's outputs and the gate's response at every position."""

    bucket: Bucket
    run: Prefixed
    state: Split  # (rows, positions, d)        H
    response: Split  # (rows, positions, n)     M u_j


def refine(
    lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], targets: Targets, gate: Tensor,
    rule: Refinement = Refinement()
) -> Targets:
    """Targets refined by `rule.steps` look-ahead iterations on the virtually edited model.

    min_V Σᵢ L_edit,i + L_loc,i + L_reg,i  at  W̃_L = W_L + (V − H) M      (MetaKE v3 eqs 7–9, 79–82)

    requests: or their rows, if they are made; targets: Stage I's, planted at layer L; gate: (n, d_in) frozen M of layer
    L on the live model.
    Returns Targets with the same anchor and the refined plan; `trace` gains the outer losses under "refine".
    Raises NumericalError if a loss is not finite. The model is not changed.
    Cost: `steps` forward-backward passes over the blocks above L at all positions, the shared contexts counted once.
    """
    if not len(requests) or not rule.steps:
        return targets
    rows = Rows.of(lm.tokenizer, requests, contexts)
    tokens = min(rule.tokens, lm.room(lm.depth - targets.layer, gradients=True))
    return halving(
        lambda few: _descend(outer_objective(lm, rows, contexts, targets, gate, replace(rule, tokens=few)), targets),
        tokens,
    )


def outer_objective(
    lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], targets: Targets, gate: Tensor,
    rule: Refinement = Refinement()
) -> OuterObjective:
    """F_VL as `refine` descends it, with what no step changes read once from the live model; arguments as there."""
    batch = Rows.of(lm.tokenizer, requests, contexts)
    rows = batch.rewriting(plain=rule.prompts == "plain") + batch.locality(rule.locality_position)
    parts = [_look_ahead(lm, *group, targets, gate, rule) for group in _groups(lm, rows, rule.tokens)]
    work = torch.promote_types(lm.dtype, torch.float32)
    return OuterObjective(parts, targets.anchor.to(work), targets.value.to(work), targets.layer, rule)


class OuterObjective(NamedTuple):
    """The virtual look-ahead objective of one batch.

    F_VL(V) = Σᵢ w_e L_edit,i + w_l L_loc,i + w_a L_reg,i   at   W̃_L = W_L + (V − H) M        (MetaKE v3 eqs 79–81)
    """

    parts: list[_LookAhead]
    anchor: Tensor  #   (n, d)  H
    initial: Tensor  #  (n, d)  V_init
    layer: int
    rule: Refinement

    def losses(self, value: Tensor) -> Tensor:
        """L_edit, L_loc, L_reg of each request, (n, 3); ∇F_VL is added to the gradient of `value`, (n, d), a leaf."""
        return _outer_losses(self.parts, value, self.anchor, self.initial, self.layer, self.rule)

    def evaluate(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """F_VL, (), and ∇F_VL, (n, d), at V = value: the proxy GMᵀ of eq. 9 plus the anchor's own gradient."""
        leaf = value.detach().to(self.initial).clone().requires_grad_()
        weights = (self.rule.edit_weight, self.rule.locality_weight, self.rule.anchor_weight)
        return self.losses(leaf).sum(0) @ torch.tensor(weights).to(leaf), leaf.grad


def _descend(outer: OuterObjective, targets: Targets) -> Targets:
    """`steps` updates of V from the initial plan."""
    rule, initial = outer.rule, outer.initial
    value = initial.clone().requires_grad_()
    optimizer = CHOICES["optimizer"][rule.optimizer]([value], lr=rule.step_size)
    history = []
    for step in progress(range(rule.steps), "refine"):
        optimizer.zero_grad()
        history.append(outer.losses(value))
        if not torch.isfinite(history[-1]).all():
            bad = (~torch.isfinite(history[-1]).all(1)).nonzero()[:, 0].tolist()
            raise NumericalError(
                f"the refinement loss of request(s) {bad} is not finite at step {step}; try a smaller step_size"
            )
        optimizer.step()
    losses = torch.stack(history).tolist()
    names = ("edit", "locality", "anchor")
    trace = tuple(
        old | {"refine": [dict(zip(names, step[i], strict=True)) for step in losses]}
        for i, old in enumerate(targets.trace or [{}] * len(value))
    )
    return replace(targets, planned=targets.planned + (value.detach() - initial).double(), trace=trace)


def _groups(lm: LanguageModel, rows: list[Row], tokens: int) -> list[tuple[list[Row], list[int]]]:
    """Micro-batches: rows, and how much of each one's beginning is shared."""
    groups, cuts = lm.continuing([r.ids for r in rows], [r.lookup for r in rows], tokens)
    return [([rows[i] for i in group], [cuts[i] for i in group]) for group in groups]


@torch.no_grad()
def _look_ahead(
    lm: LanguageModel, rows: list[Row], cuts: list[int], targets: Targets, gate: Tensor, rule: Refinement
) -> _LookAhead:
    bucket, run = Bucket.of(rows, cuts, lm.device), Prefixed(lm, [r.ids for r in rows], cuts)
    keys, states = run.read([targets.layer], [targets.layer])
    response = (u if u is None else u @ gate.T.to(lm.dtype) for u in keys[targets.layer])
    part = _LookAhead(bucket, run, states[targets.layer], Split(*response))
    if bucket.watches:  # p₀: the live model before this batch
        _losses(part, torch.zeros_like(targets.planned), targets.layer, rule)
    return part


def _losses(part: _LookAhead, residuals: Tensor, layer: int, rule: Refinement) -> tuple[Tensor, Tensor]:
    """L_edit and L_loc of one bucket on the virtually edited model, (n,) each. residuals: R as rows, (n, d)."""
    moved = (h if h is None else h + a @ residuals.to(h.dtype) for h, a in zip(part.state, part.response, strict=True))
    logits = part.run.logits(layer, Split(*moved), part.bucket.places)
    return part.bucket.losses(logits, len(residuals), rule.locality_direction)


def _outer_losses(
    parts: list[_LookAhead], value: Tensor, anchor: Tensor, initial: Tensor, layer: int, rule: Refinement
) -> Tensor:
    """Per-request outer losses, (n, 3): edit, locality, anchor; their weighted sum is differentiated into `value`."""
    total = torch.zeros(len(value), 3, dtype=value.dtype, device=value.device)
    for part in parts:  # every bucket sees all virtual edits, so gradients add up over buckets before the step
        residuals = value - anchor
        nll, drift = _losses(part, residuals if rule.feedback else residuals.detach(), layer, rule)
        total[:, 0] += nll.detach()
        total[:, 1] += drift.detach()
        if rule.feedback:
            (rule.edit_weight * nll + rule.locality_weight * drift).sum().backward()
    scale = {"sum": 1.0, "mean": value.shape[1], "relative": initial.square().sum(1)}[rule.anchor_norm]
    pull = (value - initial).square().sum(1) / scale
    total[:, 2] = pull.detach()
    (rule.anchor_weight * pull).sum().backward()
    return total
