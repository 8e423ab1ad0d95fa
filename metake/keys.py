"""Keys and current states of a batch at each edited layer, read in one sweep that resumes where the last edit ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metake.model import LanguageModel
from metake.requests import EditRequest
from metake.tokens import Padded, buckets, pad, prompt_rows


class KeyReader:
    """Reads K_l and h^L for layers in ascending order while their weights are being edited.

    k = ½ k(plain prompt) + ½ mean of k over the other contexts          (MEMIT's averaging: within a type, then types)

    Rows are cut at the subject's last token. A read at layer l keeps block l−1's outputs, which the edit of W_l does
    not change: the next read starts there instead of at the embeddings.
    """

    def __init__(self, lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], last: int, tokens: int = 8192):
        self.lm, self.last, self.count, self.contexts = lm, last, len(requests), len(contexts)
        rows = prompt_rows(lm.tokenizer, requests, contexts)
        self.groups = [(group, pad([rows[i].ids for i in group], lm.device), self._index([rows[i].lookup for i in group])) for group in buckets([len(r.ids) for r in rows], tokens)]
        self.below: dict[int, Tensor] = {}  # group → output of block `start`
        self.start = -1

    def _index(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(positions, dtype=torch.long, device=self.lm.device)

    @torch.no_grad()
    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys at `layer`, (n, d_in), and the state at the last edited layer on the plain prompt, (n, d); float64."""
        device = self.lm.device
        shape = self.lm.shape(self.lm.write_path(layer))
        rows_of_keys = torch.zeros(self.count * self.contexts, shape[1], dtype=torch.float64, device=device)
        current = torch.zeros(self.count, self.lm.width, dtype=torch.float64, device=device)
        below: dict[int, Tensor] = {}
        for g, (group, batch, lookup) in enumerate(self.groups):
            key, state, resume = self._read(g, batch, layer)
            at = torch.arange(len(group), device=device)
            rows_of_keys[self._index(group)] = key[at, lookup].double()
            plain = self._index([i for i, row in enumerate(group) if row % self.contexts == 0])
            owner = self._index([row // self.contexts for row in group if row % self.contexts == 0])
            current[owner] = state[plain, lookup[plain]].double()
            if resume is not None:
                below[g] = resume
        self.below, self.start = (below, layer - 1) if below or not self.groups else ({}, -1)
        return self._average(rows_of_keys), current

    def _read(self, group: int, batch: Padded, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        wanted = sorted({layer - 1, self.last} - {-1})
        if group in self.below and self.start < layer:
            with self.lm.resumed(self.start, self.below[group]):
                keys, states = self.lm.read(batch, [layer], wanted)
        else:
            keys, states = self.lm.read(batch, [layer], wanted)
        return keys[layer], states[self.last], states.get(layer - 1)

    def _average(self, rows: Tensor) -> Tensor:
        grouped = rows.view(self.count, self.contexts, rows.shape[1])
        if self.contexts == 1:
            return grouped[:, 0]
        return (grouped[:, 0] + grouped[:, 1:].mean(1)) / 2
