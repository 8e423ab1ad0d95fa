"""Where Stage I's vectors enter a model, and all that they do not change: computed once, read by every step.

A vector enters at one position, the subject's last token, so the blocks below never run again and the positions before
it are cached: only what depends on it is computed in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from metake.editing.objective import Bucket
from metake.language.capture import adding, moved, reading
from metake.language.model import LanguageModel
from metake.language.prefixes import Cached, Prefixed, Split, as_cache, columns_before, rearranged
from metake.language.tokens import Counted, Padded, Row, Rows, continued
from metake.support.machine import sent

SITES = {"block": ("block",), "mlp": ("write",), "mlp+attention": ("write", "attention")}
"""Site → the modules whose output a vector replaces, the written one first. Every architecture of the table adds its
MLP's output, times `lm.scale`, to the residual stream last, so that a vector enters there as at the block's output."""


CACHED = 2
"""So many cached columns, copied for every head, take as much memory in a step as one that is computed."""
HELD = 4
"""So many micro-batches are held between steps, as keys and values alone: a third of what one takes in a step, or less.
"""


@dataclass
class Plant:
    """A bucket with all that does not depend on δ: prefix keys and values, and the state where the first block runs."""

    bucket: Bucket  # columns counted from the lookup position
    batch: Padded  # the active positions, after those of the prefix
    prefix: Cached
    state: Tensor  # (rows, active, d): output of the last block that never runs again

    def keep(self, rows: Sequence[int]) -> Plant:
        own = sent(rows, self.state.device)
        prefix = [kv and (kv[0][own], kv[1][own]) for kv in self.prefix]
        ids, mask, positions = (t[own] for t in self.batch)
        mask = Counted.of(mask, sum(len(self.bucket.rows[i].ids) for i in rows))
        return Plant(self.bucket.keep(rows), Padded(ids, mask, positions), prefix, self.state[own])


def chunks(batch: Rows, tokens: int) -> list[list[int]]:
    """Requests of similar size, in groups of equal length that hold about HELD micro-batches of `tokens` at most.

    Requests do not meet in Stage I: what a group holds for all its steps is bounded, however large the batch.
    """
    count = len(batch.contexts)
    sizes = [
        len(batch.watched[i].ids) + sum(len(row.ids) for row in batch.taught[i * count : (i + 1) * count])
        for i in range(len(batch))
    ]
    order = sorted(range(len(batch)), key=lambda i: (_size(batch.taught[i * count]), i), reverse=True)
    share = sum(sizes) / -(-sum(sizes) // (HELD * tokens))
    middles = [end - sizes[i] / 2 for i, end in zip(order, accumulate(sizes[i] for i in order), strict=True)]
    return [[order[k] for k in group] for _, group in groupby(range(len(order)), lambda k: middles[k] // share)]


def _size(row: Row) -> tuple[int, int]:
    """Positions that a step computes, and what the cached ones before them take in place of such."""
    return len(row.ids) - row.lookup, -(-row.lookup // CACHED)


def planted(lm: LanguageModel, batch: Rows, layer: int, site: str, tokens: int) -> tuple[list[Plant], Tensor]:
    """A batch in micro-batches of at most `tokens`, ready for vectors at `site` of block `layer`, and what stands there
    in the plain prompts before anything is planted, (vectors a request, n, d).
    """
    rows, parts = batch.rewriting() + batch.locality(), []
    found = torch.zeros(len(SITES[site]), len(rows), lm.width, dtype=lm.dtype, device=lm.device)
    cuts = lm.beginnings([row.ids for row in rows], [row.lookup for row in rows])
    for group in lm.groups([_size(row) for row in rows], tokens):
        part, found[:, group] = _plant(lm, [rows[i] for i in group], [cuts[i] for i in group], layer, site)
        parts.append(part)
    return parts, found[:, : len(batch.taught) : len(batch.contexts)]


def score(lm: LanguageModel, part: Plant, delta: Tensor, layer: int, site: str) -> Tensor:
    """Logits at one bucket's scored positions with δ, (vectors a request, n, d), planted at its rows' lookups."""
    first, *others = delta.index_select(1, part.bucket.owner)
    first = first if site == "block" else first * lm.scale
    with ExitStack() as stack:
        if not others:
            stack.enter_context(lm.resumed(layer, moved(part.state, first)))
        else:
            stack.enter_context(lm.resumed(layer - 1, part.state))
            for module, vector in zip((lm.block(layer), lm.attention(layer)), (first, *others), strict=True):
                stack.enter_context(adding(module, vector))
        return lm.logits_at(part.batch, part.bucket.places, past=as_cache(part.prefix, part.batch))


@torch.no_grad()
def _plant(lm: LanguageModel, rows: Sequence[Row], cuts: Sequence[int], layer: int, site: str) -> tuple[Plant, Tensor]:
    """What δ does not change in rows that run together, and the site's outputs at their lookup positions, (vectors a
    request, rows, d). cuts: how much of each row's beginning is shared.

    What enters at the attention still passes through the block's MLP: its block runs in every step.
    """
    done = layer - 1 if "attention" in SITES[site] else layer  # the last block that never runs again
    lookups, ids = [row.lookup for row in rows], [row.ids for row in rows]
    at, before = torch.arange(len(rows), device=lm.device)[:, None], sent(lookups, lm.device)
    batch = continued([row.ids[row.lookup :] for row in rows], lookups, lm.device)
    run, upto = Prefixed(lm, ids, cuts), Prefixed(lm, [row.ids[: row.lookup + 1] for row in rows], cuts)
    start, state = Split(None, None), torch.zeros(*batch.ids.shape, 1, device=lm.device)
    owners = {"block": lm.block, "write": lm.write, "attention": lm.attention}
    outputs = {i: owners[name](layer) for i, name in enumerate(SITES[site])}
    with reading(outputs=outputs, then=lambda t: t.to(lm.device, copy=True)) as found:  # some go on adding in place
        if done >= 0:  # else no block is passed over: nobody reads a state
            whole = run.read([], [done])[1][done]
            columns = (before - run.cut)[:, None] + torch.arange(batch.ids.shape[1], device=lm.device)
            start = whole._replace(tail=whole.tail[:, : upto.tail.ids.shape[1]])
            state = whole.tail[at, columns.clamp_max(whole.tail.shape[1] - 1)]
        cache = upto.fill(done, start)
    # a row's tokens end its beginning's columns
    own = columns_before(before, max(lookups)) + (upto.width - upto.cut)[:, None]
    sites = (found[i].reshape(len(rows), -1, lm.width) for i in outputs)  # a flat output is in rows again
    anchor = torch.stack([own_site[at[:, 0], before - run.cut] for own_site in sites])
    return Plant(Bucket(rows, lookups, lm.device), batch, rearranged(cache, at, own, done), state), anchor
