"""Where Stage I's vectors enter a model, and all that they do not change: computed once, read by every step.

A vector enters at one position, the subject's last token, so the blocks below never run again and the positions before
it are cached: only what depends on it is computed in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from metake.editing.objective import Bucket
from metake.language.capture import adding, moved, reading
from metake.language.model import LanguageModel
from metake.language.prefixes import Cached, Prefixed, Split, as_cache, columns_before, rearranged
from metake.language.tokens import Padded, Row, continued, pad

SITES = {"block": ("block",), "mlp": ("write",), "mlp+attention": ("write", "attention")}
"""Site → the modules whose output a vector replaces, the written one first. Every architecture of the table adds its
MLP's output to the residual stream last, so that a vector enters there as it would at the block's output."""


CACHED = 2
"""So many cached columns take as much memory in a step as one that is computed: their keys and values are copied,
for every head.
"""


@dataclass
class Plant:
    """A bucket with everything that does not depend on δ: prefix keys and values, and the state where the first block
    runs.
    """

    bucket: Bucket  # columns counted from the lookup position
    batch: Padded  # the active positions, after those of the prefix
    prefix: Cached
    state: Tensor  # (rows, active, d): output of the last block that never runs again

    def keep(self, rows: Tensor) -> Plant:
        prefix = [kv and (kv[0][rows], kv[1][rows]) for kv in self.prefix]
        return Plant(self.bucket.keep(rows), Padded(*(t[rows] for t in self.batch)), prefix, self.state[rows])


def plants(lm: LanguageModel, rows: Sequence[Row], layer: int, site: str, tokens: int) -> list[Plant]:
    """Rows in micro-batches of at most `tokens`, ready for vectors at `site` of block `layer`."""
    done = _done(layer, site)
    runs, cuts = lm.continuing([r.ids for r in rows], [r.lookup for r in rows], tokens)
    pieces = [_constant(lm, [rows[i] for i in run], [cuts[i] for i in run], done) for run in runs]
    place = {row: k for k, row in enumerate(i for run in runs for i in run)}
    groups = lm.groups([(len(r.ids) - r.lookup, -(-r.lookup // CACHED)) for r in rows], tokens)
    return _assemble(
        lm, [[rows[i] for i in group] for group in groups],
        [torch.tensor([place[i] for i in group], device=lm.device) for group in groups], pieces
    )


def _done(layer: int, site: str) -> int:
    """The last block that never runs again: what enters at the attention still passes through the block's MLP."""
    return layer - 1 if "attention" in SITES[site] else layer


@torch.no_grad()
def anchors(lm: LanguageModel, rows: Sequence[Row], layer: int, site: str, tokens: int) -> Tensor:
    """What stands at these rows' lookup positions before anything is planted, (vectors a request, rows, d)."""
    modules = {
        i: {"block": lm.block, "write": lm.write, "attention": lm.attention}[name](layer)
        for i, name in enumerate(SITES[site])
    }
    found = torch.zeros(len(modules), len(rows), lm.width, dtype=lm.dtype, device=lm.device)
    ids = [row.ids[: row.lookup + 1] for row in rows]
    for group in lm.groups([len(row) for row in ids], tokens):
        with reading(outputs=modules, stop_after=lm.block(layer)) as seen:
            lm.run(pad([ids[i] for i in group], lm.device))
        last = torch.tensor([len(ids[i]) - 1 for i in group], device=lm.device)
        for i, output in seen.items():
            found[i, group] = output[torch.arange(len(group), device=lm.device), last]
    return found


def score(lm: LanguageModel, part: Plant, delta: Tensor, layer: int) -> Tensor:
    """Logits at one bucket's scored positions with δ, (vectors a request, n, d), planted at its rows' lookup
    positions.
    """
    planted = delta.index_select(1, part.bucket.owner)
    with ExitStack() as stack:
        if len(planted) == 1:
            stack.enter_context(lm.resumed(layer, moved(part.state, planted[0])))
        else:
            stack.enter_context(lm.resumed(layer - 1, part.state))
            for module, vector in zip((lm.block(layer), lm.attention(layer)), planted, strict=True):
                stack.enter_context(adding(module, vector))
        return lm.logits(part.batch, part.bucket.row, part.bucket.column, past=as_cache(part.prefix, part.batch))


@torch.no_grad()
def _constant(lm: LanguageModel, rows: Sequence[Row], cuts: Sequence[int], done: int) -> tuple[Cached, Tensor]:
    """What δ does not change: keys and values before the lookup position, aligned at their end,
    and the state from it on.
    """
    run, at = Prefixed(lm, [r.ids for r in rows], cuts), torch.arange(len(rows), device=lm.device)[:, None]
    before = torch.tensor([r.lookup for r in rows], device=lm.device)
    active = torch.arange(max(len(r.ids) - r.lookup for r in rows), device=lm.device)
    columns = ((before - run.cut)[:, None] + active).clamp_max(run.tail.ids.shape[1] - 1)
    above = Prefixed(lm, [r.ids[: r.lookup + 1] for r in rows], cuts)
    if done < 0:
        # no block is passed over: nobody reads it
        start, state = Split(None, None), torch.zeros(*columns.shape, 1, device=lm.device)
    else:
        whole = run.read([], [done])[1][done]
        start, state = whole._replace(tail=whole.tail[:, : above.tail.ids.shape[1]]), whole.tail[at, columns]
    cache = above.fill(done, start)
    # a row's tokens end its beginning's columns
    own = columns_before(before, int(before.max())) + (above.width - above.cut)[:, None]
    return rearranged(cache, at, own, done), state


def _assemble(
    lm: LanguageModel, groups: list[list[Row]], places: list[Tensor], pieces: list[tuple[Cached, Tensor]]
) -> list[Plant]:
    """Buckets of rows that every step runs together, from pieces that ran together once: block by block,
    to hold each once.
    """
    lookups = [[row.lookup for row in rows] for rows in groups]
    batches = [
        continued([r.ids[r.lookup :] for r in rows], lookup, lm.device)
        for rows, lookup in zip(groups, lookups, strict=True)
    ]
    states = _stacked([state.transpose(1, 2) for _, state in pieces], left=False).transpose(1, 2)
    prefixes: list[Cached] = [[] for _ in groups]
    # where no block runs, a piece may still count its columns
    for block in range(min(len(cached) for cached, _ in pieces)):
        ran = pieces[0][0][block] is not None
        whole = (
            [
                _stacked([cached[block][side].transpose(2, 3) for cached, _ in pieces], left=True).transpose(2, 3)
                for side in (0, 1)
            ]
            if ran
            else []
        )
        for cached, _ in pieces:
            cached[block] = None
        for prefix, place, lookup in zip(prefixes, places, lookups, strict=True):
            prefix.append(
                tuple(t.index_select(0, place)[:, :, t.shape[2] - max(lookup) :].contiguous() for t in whole) or None
            )
    return [
        Plant(Bucket.of(rows, lookup, lm.device), batch, prefix, states.index_select(0, place)[:, : batch.ids.shape[1]])
        for rows, lookup, batch, prefix, place in zip(groups, lookups, batches, prefixes, places, strict=True)
    ]


def _stacked(tensors: list[Tensor], left: bool) -> Tensor:
    """One tensor of all rows, the last dimension padded on the left or the right to the widest."""
    width = max(t.shape[-1] for t in tensors)
    return torch.cat(
        [torch.nn.functional.pad(t, (width - t.shape[-1], 0) if left else (0, width - t.shape[-1])) for t in tensors]
    )
