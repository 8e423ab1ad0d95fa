"""Stage I: the vector each request should find at the last edited layer (MEMIT §4.3; MetaKE v3 eq. 2).

All requests are optimized in one batch. A planted vector enters at one block's output at one position, so the blocks
below never run again and the positions before it are cached once: only what depends on it is computed in a step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metake.errors import NumericalError, ParameterError
from metake.machine import halving
from metake.model import LanguageModel
from metake.objective import Bucket
from metake.prefixes import Cached, Prefixed, as_cache, columns_before, rearranged
from metake.progress import progress
from metake.requests import EditRequest
from metake.tokens import Padded, Row, buckets, continued, locality_rows, rewriting_rows, shared_beginnings

log = logging.getLogger("metake")


@dataclass(frozen=True)
class TargetRule:
    """How Stage I optimizes δ, in the family's usual names.

    J(δ) = NLL + kl_weight · KL(p_δ ‖ p₀) + decay · ‖δ‖ / ‖h‖²;  Adam(step_size), at most steps − 1 updates;
    stop once J < stop_below; after each update ‖δ‖ ≤ clamp · ‖h‖.       (v_lr, v_num_grad_steps, kl_factor, …)
    """

    steps: int = 25
    step_size: float = 0.5
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 0.75
    stop_below: float = 0.05
    tokens: int = 8192  # of one micro-batch at most, fewer where memory is short: never the result

    def __post_init__(self) -> None:
        ranges = {"steps": self.steps >= 1, "step_size": self.step_size > 0, "clamp": self.clamp > 0, "tokens": self.tokens >= 1}
        ranges |= {k: getattr(self, k) >= 0 for k in ("kl_weight", "decay", "stop_below")}
        for name, fine in ranges.items():
            if not fine:
                raise ParameterError(f"{name}={getattr(self, name)} is out of range; steps, step_size, clamp and tokens must be positive, the others ≥ 0")


@dataclass(frozen=True)
class Targets:
    """Planned residuals at one layer: value = anchor + planned, each (n, d)."""

    layer: int
    anchor: Tensor  # h, the block's output at the subject's last token of the plain prompt
    planned: Tensor  # r
    trace: tuple[dict, ...] = field(default=(), repr=False)  # per request: the losses of its steps

    @property
    def value(self) -> Tensor:
        """v = h + r."""
        return self.anchor + self.planned


@dataclass
class _Resumable:
    """A bucket with everything that does not depend on δ: prefix keys and values, and the state where δ enters."""

    bucket: Bucket  # columns counted from the lookup position
    batch: Padded  # the active positions, after those of the prefix
    prefix: Cached
    state: Tensor  # (rows, active, d)

    def keep(self, rows: Tensor) -> _Resumable:
        prefix = [kv and (kv[0][rows], kv[1][rows]) for kv in self.prefix]
        return _Resumable(self.bucket.keep(rows), Padded(*(t[rows] for t in self.batch)), prefix, self.state[rows])


def optimize_targets(lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, rule: TargetRule = TargetRule()) -> Targets:
    """Optimize one planned residual per request at the output of block `layer`, on the model as it is.

    minimize NLL(target | context · prompt) + λ_KL KL + decay, one δ per request  (MEMIT's compute_z; MetaKE v3 eq. 2)

    contexts: context templates, "{}" (the plain prompt) first. Returns Targets in float64 on the model's device.
    Requests do not influence one another: the result is that of one request at a time, whatever the micro-batch.
    Raises RequestError for a prompt that cannot be located, NumericalError if a loss is not finite.
    Cost: one forward over all rows, then at most steps − 1 forward-backward passes over the blocks above `layer` at the
    positions from the subject's last token on.
    """
    if not requests:
        empty = torch.zeros(0, lm.width, dtype=torch.float64, device=lm.device)
        return Targets(layer, empty, empty)
    rows = rewriting_rows(lm.tokenizer, requests, contexts) + locality_rows(lm.tokenizer, requests)
    if layer >= lm.depth - 1 and any(r.labels and r.read[0] > r.lookup for r in rows):
        raise ParameterError(f"layer {layer} is the last block of {lm.name!r}: what is planted at the subject cannot reach the end of the prompt; choose a lower layer")
    plain = {i * len(contexts): i for i in range(len(requests))}
    return halving(lambda tokens: _optimize(lm, rows, plain, layer, rule, tokens), min(rule.tokens, lm.room(lm.depth - layer, gradients=True)))


def _optimize(lm: LanguageModel, rows: list[Row], plain: dict[int, int], layer: int, rule: TargetRule, tokens: int) -> Targets:
    """In micro-batches of at most `tokens`; plain: which row is which request's plain prompt."""
    cuts = shared_beginnings([r.ids for r in rows], [r.lookup for r in rows])
    runs = list(buckets([len(r.ids) - cut for r, cut in zip(rows, cuts, strict=True)], tokens))
    pieces = [_constant(lm, [rows[i] for i in run], [cuts[i] for i in run], layer) for run in runs]
    place = {row: k for k, row in enumerate(i for run in runs for i in run)}
    groups = list(buckets([(len(r.ids) - r.lookup, r.lookup) for r in rows], tokens))
    parts = _assemble(lm, [[rows[i] for i in group] for group in groups], [torch.tensor([place[i] for i in group], device=lm.device) for group in groups], pieces)
    anchor = torch.zeros(len(plain), lm.width, dtype=lm.dtype, device=lm.device)
    for group, part in zip(groups, parts, strict=True):
        for k, i in enumerate(group):
            if i in plain:
                anchor[plain[i]] = part.state[k, 0]
    planned, trace = _descend(lm, parts, anchor.to(_work(lm)), layer, rule)
    return Targets(layer, anchor.double(), planned.double(), trace)


def _work(lm: LanguageModel) -> torch.dtype:
    return torch.promote_types(lm.dtype, torch.float32)


@torch.no_grad()
def _constant(lm: LanguageModel, rows: Sequence[Row], cuts: Sequence[int], layer: int) -> tuple[Cached, Tensor]:
    """What δ does not change: keys and values before the lookup position, aligned at their end, and the state from it on."""
    run, at = Prefixed(lm, [r.ids for r in rows], cuts), torch.arange(len(rows), device=lm.device)[:, None]
    state, before = run.read([], [layer])[1][layer], torch.tensor([r.lookup for r in rows], device=lm.device)
    active = torch.arange(max(len(r.ids) - r.lookup for r in rows), device=lm.device)
    columns = ((before - run.cut)[:, None] + active).clamp_max(state.tail.shape[1] - 1)
    above = Prefixed(lm, [r.ids[: r.lookup + 1] for r in rows], cuts)
    cache = above.fill(layer, state._replace(tail=state.tail[:, : above.tail.ids.shape[1]]))
    own = columns_before(before, int(before.max())) + (above.width - above.cut)[:, None]  # a row's tokens end its beginning's columns
    return rearranged(cache, at, own, layer), state.tail[at, columns]


def _assemble(lm: LanguageModel, groups: list[list[Row]], places: list[Tensor], pieces: list[tuple[Cached, Tensor]]) -> list[_Resumable]:
    """Buckets of rows that every step runs together, from pieces that ran together once: block by block, to hold each once."""
    lookups = [[row.lookup for row in rows] for rows in groups]
    batches = [continued([r.ids[r.lookup :] for r in rows], lookup, lm.device) for rows, lookup in zip(groups, lookups, strict=True)]
    states = _stacked([state.transpose(1, 2) for _, state in pieces], left=False).transpose(1, 2)
    prefixes: list[Cached] = [[] for _ in groups]
    for block in range(min(len(cached) for cached, _ in pieces)):  # where no block runs, a piece may still count its columns
        ran = pieces[0][0][block] is not None
        whole = [_stacked([cached[block][side].transpose(2, 3) for cached, _ in pieces], left=True).transpose(2, 3) for side in (0, 1)] if ran else []
        for cached, _ in pieces:
            cached[block] = None
        for prefix, place, lookup in zip(prefixes, places, lookups, strict=True):
            prefix.append(tuple(t.index_select(0, place)[:, :, t.shape[2] - max(lookup) :].contiguous() for t in whole) or None)
    return [
        _Resumable(Bucket.of(rows, lookup, lm.device), batch, prefix, states.index_select(0, place)[:, : batch.ids.shape[1]])
        for rows, lookup, batch, prefix, place in zip(groups, lookups, batches, prefixes, places, strict=True)
    ]


def _stacked(tensors: list[Tensor], left: bool) -> Tensor:
    """One tensor of all rows, the last dimension padded on the left or the right to the widest."""
    width = max(t.shape[-1] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (width - t.shape[-1], 0) if left else (0, width - t.shape[-1])) for t in tensors])


def _score(lm: LanguageModel, part: _Resumable, delta: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Per-request losses of one bucket with δ planted at its rows' lookup positions, (requests,) each."""
    first = part.state[:, 0].to(delta.dtype) + delta.index_select(0, part.bucket.owner)
    planted = torch.cat([first.to(part.state.dtype)[:, None], part.state[:, 1:]], 1)
    with lm.resumed(layer, planted):
        logits = lm.logits(part.batch, part.bucket.row, part.bucket.column, past=as_cache(part.prefix, part.batch))
    return part.bucket.losses(logits, len(delta))


def _descend(lm: LanguageModel, parts: list[_Resumable], anchor: Tensor, layer: int, rule: TargetRule) -> tuple[Tensor, tuple[dict, ...]]:
    """Batched Adam with per-request stopping, clamping and freezing; finished requests leave the buckets."""
    delta = torch.zeros_like(anchor, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=rule.step_size)
    scale = anchor.norm(dim=1)
    active = torch.ones(len(anchor), dtype=torch.bool, device=anchor.device)
    trace: list[dict] = [{"loss": [], "nll": [], "kl": []} for _ in range(len(anchor))]
    for step in progress(range(rule.steps), "targets"):
        optimizer.zero_grad()
        nll, kl = (torch.zeros_like(scale) for _ in range(2))
        for part in parts:
            with torch.set_grad_enabled(step < rule.steps - 1):  # the last loss is read, not descended
                part_nll, part_kl = _score(lm, part, delta, layer)
            if part_nll.requires_grad:
                (part_nll + rule.kl_weight * part_kl).sum().backward()
            nll, kl = nll + part_nll.detach(), kl + part_kl.detach()
        penalty = rule.decay * delta.norm(dim=1) / scale.square()
        loss = nll + rule.kl_weight * kl + penalty.detach()
        _record(trace, active, loss, nll, kl, step)
        active &= loss >= rule.stop_below
        if step == rule.steps - 1 or not active.any():
            break
        penalty.sum().backward()
        before = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            norm = delta.norm(dim=1, keepdim=True)
            limit = rule.clamp * scale[:, None]
            delta.mul_(torch.where(norm > limit, limit / norm, 1.0))
            delta[~active] = before[~active]
        parts = _compact(parts, active)
    return delta.detach(), tuple(trace)


def _record(trace: list[dict], active: Tensor, loss: Tensor, nll: Tensor, kl: Tensor, step: int) -> None:
    if not torch.isfinite(loss[active]).all():
        bad = (active & ~torch.isfinite(loss)).nonzero()[:, 0].tolist()
        raise NumericalError(f"the target loss of request(s) {bad} is not finite at step {step}; try a smaller step size, or a wider dtype than the model's")
    for i in active.nonzero()[:, 0].tolist():
        for name, value in (("loss", loss), ("nll", nll), ("kl", kl)):
            trace[i][name].append(value[i].item())


def _compact(parts: list[_Resumable], active: Tensor) -> list[_Resumable]:
    kept = []
    for part in parts:
        stays = active[part.bucket.owner]
        if stays.all():
            kept.append(part)
        elif stays.any():
            kept.append(part.keep(stays.nonzero()[:, 0]))
    return kept
