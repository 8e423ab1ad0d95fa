"""Keys and current states of a batch at each edited layer, read in one sweep that resumes where the last edit ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metake.machine import halving
from metake.model import LanguageModel
from metake.prefixes import Prefixed, Split
from metake.requests import EditRequest
from metake.tokens import buckets, prompt_rows, shared_beginnings


class _Group(NamedTuple):
    """One micro-batch: which of all rows it holds, how they run, and each one's last column."""

    rows: Tensor
    run: Prefixed
    last: Tensor


class KeyReader:
    """Reads K_l and h^L for layers in ascending order while their weights are being edited.

    k = ½ k(plain prompt) + ½ mean of k over the other contexts          (MEMIT's averaging: within a type, then types)

    Rows are cut at the subject's last token, and begin together where they agree. A read at layer l keeps block l−1's
    outputs, which the edit of W_l does not change: the next read starts there instead of at the embeddings.
    """

    def __init__(self, lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], last: int, tokens: int = 8192):
        self.lm, self.last, self.count, self.contexts = lm, last, len(requests), len(contexts)
        self.rows = [row.ids for row in prompt_rows(lm.tokenizer, requests, contexts)]
        self._divide(min(tokens, lm.room(1, gradients=False)))

    def _divide(self, tokens: int) -> None:
        """Micro-batches of at most so many tokens; what was kept of larger ones is forgotten."""
        cuts = shared_beginnings(self.rows, [len(row) - 1 for row in self.rows])
        groups = buckets([len(row) - cut for row, cut in zip(self.rows, cuts, strict=True)], tokens)
        self.groups = [self._group(cuts, group) for group in groups]
        self.tokens, self.start = tokens, -1
        self.below: list[Split] = []  # per group: output of block `start`

    def _group(self, cuts: Sequence[int], group: list[int]) -> _Group:
        run = Prefixed(self.lm, [self.rows[i] for i in group], [cuts[i] for i in group])
        ends = [len(self.rows[i]) - cuts[i] - 1 for i in group]
        return _Group(torch.tensor(group, device=self.lm.device), run, torch.tensor(ends, device=self.lm.device))

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys at `layer`, (n, d_in), and the state at the last edited layer on the plain prompt, (n, d); float64."""
        return halving(lambda tokens: self._read(layer, tokens), self.tokens)

    @torch.no_grad()
    def _read(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        if tokens != self.tokens:
            self._divide(tokens)
        device = self.lm.device
        shape = self.lm.shape(self.lm.write_path(layer))
        rows_of_keys = torch.zeros(self.count * self.contexts, shape[1], dtype=torch.float64, device=device)
        current = torch.zeros(self.count, self.lm.width, dtype=torch.float64, device=device)
        below: list[Split] = []
        resumes = bool(self.below) and self.start < layer
        for g, (rows, run, last) in enumerate(self.groups):
            start = (self.start, self.below[g]) if resumes else ()
            keys, states = run.read([layer], sorted({layer - 1, self.last} - {-1}), *start)
            at = torch.arange(len(rows), device=device)
            rows_of_keys[rows] = keys[layer].tail[at, last].double()
            plain = rows % self.contexts == 0
            current[rows[plain] // self.contexts] = states[self.last].tail[at, last][plain].double()
            if layer:
                below.append(states[layer - 1])
        self.below, self.start = below, layer - 1
        return self._average(rows_of_keys), current

    def _average(self, rows: Tensor) -> Tensor:
        grouped = rows.view(self.count, self.contexts, rows.shape[1])
        if self.contexts == 1:
            return grouped[:, 0]
        return (grouped[:, 0] + grouped[:, 1:].mean(1)) / 2
