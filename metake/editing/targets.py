"""Stage I: the vector each request should find at the last edited layer (MEMIT §4.3; MetaKE v3 eq. 2).

Many requests are optimized side by side, each with its own loss, stopping and clamp, to the end; `plant` holds what no
step changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metake.data.requests import EditRequest
from metake.editing.plant import SITES, Plant, chunks, planted, score
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.support.errors import NumericalError, ParameterError, near_misses
from metake.support.machine import halving
from metake.support.progress import progress


@dataclass(frozen=True)
class TargetRule:
    """How Stage I optimizes δ, in the family's usual names.

    J(δ) = NLL + kl_weight · KL(p_δ ‖ p₀) + decay · ‖δ‖ / ‖h‖²;  Adam(step_size), at most steps − 1 updates;
    stop once J < stop_below; after each update ‖δ‖ ≤ clamp · ‖h‖.       (v_lr, v_num_grad_steps, kl_factor, …)

    site:  where δ enters, and whose output h is: "block" (MEMIT), "mlp", its output projection (ROME), or
           "mlp+attention", a vector at each, together but with its own decay and clamp; the MLP's is written (PMET)
    relax: once every target token is the arg-max, NLL counts only so much in the next step, and optimization stops if
           kl_weight · KL ≤ drift_below, or KL itself unless drift_weighted (PMET: 0.1; None: no such rule)
    """

    steps: int = 25
    step_size: float = 0.5
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 0.75
    stop_below: float = 0.05
    tokens: int = 8192  # of one micro-batch at most, fewer where memory is short: never the result
    site: str = "block"
    relax: float | None = None
    drift_below: float = 0.01
    drift_weighted: bool = True

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ParameterError(near_misses(str(self.site), SITES, "site"))
        positive = ("steps", "step_size", "clamp", "tokens")
        for name in (*positive, "kl_weight", "decay", "stop_below", "drift_below", "relax"):
            value = getattr(self, name)
            if value is not None and not (value > 0 if name in positive else value >= 0):
                raise ParameterError(
                    f"{name}={value} is out of range; {', '.join(positive)} must be positive, the others ≥ 0"
                )


@dataclass(frozen=True)
class Targets:
    """Planned residuals at one layer: value = anchor + planned, each (n, d)."""

    layer: int
    anchor: Tensor  # h, the output of the rule's site at the subject's last token of the plain prompt
    planned: Tensor  # r
    trace: tuple[dict, ...] = field(default=(), repr=False)  # per request: the losses of its steps

    @property
    def value(self) -> Tensor:
        """v = h + r."""
        return self.anchor + self.planned


@LanguageModel.entry(gradients=True)
def optimize_targets(
    lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], layer: int,
    rule: TargetRule = TargetRule()
) -> Targets:
    """Optimize one planned residual per request at the output of block `layer`, on the model as it is.

    minimize NLL(target | context · prompt) + λ_KL KL + decay, one δ per request  (MEMIT's compute_z; MetaKE v3 eq. 2)

    contexts: context templates, "{}" (the plain prompt) first. Returns Targets in float64 on the model's device.
    Requests do not influence one another: the result is that of one request at a time, whatever the micro-batch, and
    memory is that of a few, however many there are. requests: or their rows, if they are made.
    Raises RequestError for a prompt that cannot be located, NumericalError if a loss is not finite.
    Cost: one forward over all rows, then at most steps − 1 forward-backward passes over the blocks above `layer` at the
    positions from the subject's last token on.
    """
    if not len(requests):
        empty = torch.zeros(0, lm.width, dtype=torch.float64, device=lm.device)
        return Targets(layer, empty, empty)
    batch = Rows.of(lm.tokenizer, requests, contexts)
    if layer >= lm.depth - 1 and any(r.read[0] > r.lookup for r in batch.taught):
        raise ParameterError(
            f"layer {layer} is the last block of {lm.name!r}: what is planted at the subject cannot reach the "
            "end of the prompt; choose a lower layer"
        )
    return halving(
        lambda tokens: _optimize(lm, batch, layer, rule, tokens),
        min(rule.tokens, lm.room(lm.depth - layer, gradients=True)), lm.fitted
    )


def _optimize(lm: LanguageModel, batch: Rows, layer: int, rule: TargetRule, tokens: int) -> Targets:
    """Chunk by chunk, in micro-batches of at most `tokens`."""
    anchor, planned = torch.zeros(2, len(batch), lm.width, dtype=torch.float64, device=lm.device)
    trace: list[dict] = [{"loss": [], "nll": [], "kl": []} for _ in range(len(batch))]
    for chunk in chunks(batch, tokens):
        parts, found = planted(lm, batch.pick(chunk), layer, rule.site, tokens)
        work = found.to(torch.promote_types(lm.dtype, torch.float32))
        delta = _descend(lm, parts, work, layer, rule, {i: trace[i] for i in chunk})
        anchor[chunk], planned[chunk] = found[0].double(), delta[0].double()
    return Targets(layer, anchor, planned, tuple(trace))


def _descend(
    lm: LanguageModel, parts: list[Plant], anchor: Tensor, layer: int, rule: TargetRule, trace: dict[int, dict]
) -> Tensor:
    """Batched Adam with per-request stopping, clamping and freezing; finished requests leave the buckets.

    anchor: (vectors a request, n, d), as is the result; trace: of each request by its number, to be filled.
    """
    delta = torch.zeros_like(anchor, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=rule.step_size)
    scale = anchor.norm(dim=-1)
    active = torch.ones(anchor.shape[1], dtype=torch.bool, device=anchor.device)
    emphasis = torch.ones_like(scale[0])  # ν
    for step in progress(range(rule.steps), "targets"):
        optimizer.zero_grad()
        with torch.set_grad_enabled(step < rule.steps - 1):  # the last loss is read, not descended
            nll, kl, wrong = _losses(lm, parts, delta, emphasis, layer, rule)
        penalty = (rule.decay * delta.norm(dim=-1) / scale.square()).sum(0)
        loss = emphasis * nll + rule.kl_weight * kl + penalty.detach()
        still = active & (loss >= rule.stop_below)
        if rule.relax is not None:
            # two plain numbers would give float32
            emphasis = torch.where(wrong == 0, emphasis.new_tensor(rule.relax), 1.0)
            still &= (wrong > 0) | ((kl * rule.kl_weight if rule.drift_weighted else kl) > rule.drift_below)
        before, after = _record(lm, trace, torch.stack([loss, nll, kl, active.to(loss), still.to(loss)]), step)
        if step == rule.steps - 1 or not any(after):
            break
        penalty.sum().backward()
        _update(delta, optimizer, still, rule.clamp * scale)
        parts, active = _compact(parts, after) if after != before else parts, still
    return delta.detach()


def _losses(
    lm: LanguageModel, parts: list[Plant], delta: Tensor, emphasis: Tensor, layer: int, rule: TargetRule
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, drift and number of missed target tokens, (n,) each; ν · NLL + kl_weight · KL is differentiated into δ."""
    nll, kl, wrong = (torch.zeros_like(emphasis) for _ in range(3))
    for part in parts:
        logits = score(lm, part, delta, layer, rule.site)
        part_nll, part_kl = part.bucket.losses(logits, len(nll))
        if part_nll.requires_grad:
            (emphasis * part_nll + rule.kl_weight * part_kl).sum().backward()
        nll, kl = nll + part_nll.detach(), kl + part_kl.detach()
        if rule.relax is not None:
            wrong += part.bucket.missed(logits.detach(), len(nll))
    return nll, kl, wrong


def _update(delta: Tensor, optimizer: torch.optim.Optimizer, active: Tensor, limit: Tensor) -> None:
    """One step of the requests that are still active, each vector clamped to its own limit."""
    before = delta.detach().clone()
    optimizer.step()
    with torch.no_grad():
        norm = delta.norm(dim=-1, keepdim=True)
        clamped = delta * torch.where(norm > limit[..., None], limit[..., None] / norm, 1.0)
        delta.copy_(torch.where(active[:, None], clamped, before))


def _record(lm: LanguageModel, trace: dict[int, dict], numbers: Tensor, step: int) -> tuple[list, list]:
    """Note the losses of the requests that were active; which these were, and which still are.

    numbers: (5, n) loss, NLL, KL, active before and after: one transfer a step.
    """
    loss, *others, before, after = numbers.tolist()
    if bad := sorted(i for i, now, value in zip(trace, before, loss, strict=True) if now and not math.isfinite(value)):
        raise NumericalError(
            f"the target loss of request(s) {bad} is not finite at step {step}: {lm.cause()}, or take a smaller step"
        )
    for one, now, *values in zip(trace.values(), before, loss, *others, strict=True):
        for name, value in zip(one, values, strict=True) if now else ():
            one[name].append(value)
    return before, after


def _compact(parts: list[Plant], active: Sequence[float]) -> list[Plant]:
    stays = ((part, [k for k, row in enumerate(part.bucket.rows) if active[row.request]]) for part in parts)
    return [part if len(rows) == len(part.bucket.rows) else part.keep(rows) for part, rows in stays if rows]
