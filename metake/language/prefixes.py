"""Rows that begin alike: their common beginning runs once, and every row continues from its keys and values.

In a batch of edits the same few context sentences stand before every prompt: without sharing, half of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from metake.language.capture import Places
from metake.language.model import LanguageModel
from metake.language.tokens import Padded, continued, pad
from metake.support.machine import sent

# per block: keys and values, (rows, heads, columns, head width); None where it does not run
Cached = list[tuple[Tensor, Tensor] | None]


class Split(NamedTuple):
    """Activations of the beginnings, (beginnings, positions, width) or None, and of the rows after them."""

    head: Tensor | None
    tail: Tensor


class Prefixed:
    """Rows of token ids, each cut in a beginning that others may share and the rest.

    cuts: length of each row's beginning, 0 for none (`tokens.shared_beginnings`). A pass runs the distinct beginnings
    first; gradients flow through them. Columns of the rest count from the cut.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]], cuts: Sequence[int]):
        self.lm, device = lm, lm.device
        heads, tails = zip(*((tuple(row[:cut]), row[cut:]) for row, cut in zip(rows, cuts, strict=True)), strict=True)
        place = {head: i for i, head in enumerate(dict.fromkeys(filter(None, heads)))}
        self.head = pad(list(place), device) if place else None
        self.tail = continued(tails, cuts, device)
        self.width, self.cut = max(cuts), sent(cuts, device)
        self.of = sent([place.get(head, 0) for head in heads], device)
        self._columns = columns_before(sent(list(map(len, place)), device, torch.long), self.width)

    def begin(
        self, keys: Sequence[int], states: Sequence[int], after: int = -1, start: Tensor | None = None
    ) -> tuple[DynamicCache | None, dict, dict]:
        """Run the beginnings through the blocks after `after`, whose output is `start`, up to the last one asked for.

        Returns the cache from which the rows continue, None if there are no beginnings, and the keys and states read.
        """
        if self.head is None:
            return None, {}, {}
        cache = DynamicCache()
        with self.lm.resumed(after, start):
            found = self.lm.read(self.head, keys, states, past=cache)
        each = torch.arange(len(self._columns), device=self._columns.device)[:, None]
        aligned = rearranged(cache, each, self._columns, after)
        spread = [kv and tuple(t.index_select(0, self.of.to(t.device)) for t in kv) for kv in aligned]
        return as_cache(spread, self.tail), *found

    def read(
        self, keys: Sequence[int], states: Sequence[int], after: int = -1, start: Split = Split(None, None)
    ) -> tuple[dict[int, Split], dict[int, Split]]:
        """Keys and block outputs of the layers at every position, going on after block `after`, which gave `start`."""
        past, *heads = self.begin(keys, states, after, start.head)
        with self.lm.resumed(after, start.tail):
            tails = self.lm.read(self.tail, keys, states, past=past)
        return tuple({i: Split(head.get(i), tail[i]) for i in tail} for head, tail in zip(heads, tails, strict=True))

    def fill(self, after: int, start: Split) -> DynamicCache:
        """Keys and values of the blocks after `after`, which gave `start`: the beginnings' columns, then the rows'."""
        cache = self.begin((), [self.lm.depth - 1], after, start.head)[0] or DynamicCache()
        with self.lm.resumed(after, start.tail):
            self.lm.read(self.tail, states=[self.lm.depth - 1], past=cache)
        return cache

    def logits(self, after: int, start: Split, places: Places) -> Tensor:
        """Logits at places of the rows after their cuts, going on after block `after`, which gave `start`."""
        past, *_ = self.begin((), [self.lm.depth - 1], after, start.head)
        with self.lm.resumed(after, start.tail):
            return self.lm.logits_at(self.tail, places, past=past)


def columns_before(lengths: Tensor, width: int) -> Tensor:
    """For sequences moved to the right end of `width` columns: which of their own positions each column holds.

    Columns before a sequence repeat its position 0; a mask hides them.
    """
    return (torch.arange(width, device=lengths.device) - (width - lengths)[:, None]).clamp_min(0)


def rearranged(cache: DynamicCache, rows: Tensor, columns: Tensor, after: int) -> Cached:
    """The cached keys and values of the blocks after `after` at (row, column), both (rows, columns) or broadcast."""
    return [
        tuple(
            t.transpose(1, 2)[rows.to(t.device), columns.to(t.device)].transpose(1, 2).contiguous()
            for t in (entry.keys, entry.values)
        )
        if i > after and entry.is_initialized else None
        for i, entry in enumerate(cache.layers)
    ]


def as_cache(cached: Cached, batch: Padded) -> DynamicCache | None:
    """A fresh cache of these keys and values for rows that continue them, None if there are none to continue.

    Block 0 tells the model how many columns there are: if it does not run, zeros of that length stand in for it.
    """
    width = batch.mask.shape[1] - batch.ids.shape[1]
    if not width:
        return None
    first, *others = cached or [None]
    stand_in = torch.zeros(len(batch.ids), 1, width, 1, device=batch.ids.device)
    return DynamicCache([first or (stand_in, stand_in), *(kv or (None, None) for kv in others)])
