"""Keys and current states of a batch, read layer by layer in one sweep, and what an editor solves from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metake.algebra.geometry import Metric
from metake.algebra.solve import Solution, association, gate, realization, solve
from metake.data.requests import EditRequest
from metake.language.model import LanguageModel
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import Rows
from metake.support.machine import halving, sent


class Keys(NamedTuple):
    """What one layer says of a batch, float64."""

    keys: Tensor  #     (n, d_in), averaged over the contexts
    current: Tensor  #  (n, d), what the target's site puts out now, on the plain prompt
    plain: Tensor  #    (n, d_in), of the plain prompt alone


class _Group(NamedTuple):
    """One micro-batch: which of all rows it holds, each one's last column, which are plain prompts, how they run."""

    rows: Tensor
    last: Tensor
    plain: Tensor
    run: Prefixed


class KeyReader:
    """Reads K_l and h^L for layers in ascending order while their weights are being edited.

    k = ½ k(plain prompt) + ½ mean of k over the other contexts          (MEMIT's averaging: within a type, then types)
    k = mean of k over all contexts                                      (`flat`: ROME's)

    site: whose output at layer L is the current value, "block", or the written module's own (ROME, PMET).

    Rows are cut at the subject's last token, and begin together where they agree. A read at layer l keeps block l−1's
    outputs, which the edit of W_l does not change: the next read starts there instead of at the embeddings.
    """

    def __init__(
        self, lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], last: int,
        tokens: int = 8192, flat: bool = False, site: str = "block"
    ):
        self.lm, self.last, self.flat, self.site = lm, last, flat, site
        self.count, self.contexts = len(requests), len(contexts)
        self.rows = Rows.of(lm.tokenizer, requests, contexts).prompts()
        self._divide(min(tokens, lm.room(1, gradients=False)))

    def _divide(self, tokens: int) -> None:
        """Micro-batches of at most so many tokens; what was kept of larger ones is forgotten."""
        groups, cuts = self.lm.continuing(self.rows, [len(row) - 1 for row in self.rows], tokens)
        self.groups = [self._group(cuts, group) for group in groups]
        self.tokens, self.start = tokens, -1
        self.below: list[Split] = []  # per group: output of block `start`

    def _group(self, cuts: Sequence[int], group: list[int]) -> _Group:
        run = Prefixed(self.lm, [self.rows[i] for i in group], [cuts[i] for i in group])
        ends = [len(self.rows[i]) - cuts[i] - 1 for i in group]
        plain = [k for k, i in enumerate(group) if i % self.contexts == 0]
        return _Group(*(sent(x, self.lm.device, torch.long) for x in (group, ends, plain)), run)

    @LanguageModel.entry()
    def read(self, layer: int, last: int | None = None) -> Keys:
        """Keys at `layer`, and the current value at `last` (default: the last edited): finite, or NumericalError."""
        own = self.last if last is None else last
        return halving(lambda tokens: self._read(layer, own, tokens), self.tokens, self.lm.fitted)

    def _read(self, layer: int, last: int, tokens: int) -> Keys:
        if tokens != self.tokens:
            self._divide(tokens)
        device, widths = self.lm.device, self.lm.shape(self.lm.write_path(layer))
        rows_of_keys = torch.zeros(self.count * self.contexts, widths[1], dtype=torch.float64, device=device)
        current = torch.zeros(self.count, self.lm.width, dtype=torch.float64, device=device)
        below: list[Split] = []
        resumes, block = bool(self.below) and self.start < layer, self.site == "block"
        inputs, outputs = ({layer}, {layer - 1, last} - {-1}) if block else ({layer, last}, {layer - 1} - {-1})
        for g, (rows, ends, plain, run) in enumerate(self.groups):
            start = (self.start, self.below[g]) if resumes else ()
            keys, states = run.read(sorted(inputs), sorted(outputs), *start)
            at = torch.arange(len(rows), device=device)
            rows_of_keys[rows] = keys[layer].tail[at, ends].double()
            found = (states if block else keys)[last].tail[at, ends][plain]
            if not block:
                found = self.lm.write(last)(found.to(self.lm.write(last).weight.device)).to(device)
            current[rows[plain] // self.contexts] = found.double()
            if layer:
                below.append(states[layer - 1])
        self.below, self.start = below, layer - 1
        found = Keys(average(rows_of_keys, self.contexts, self.flat), current, rows_of_keys[:: self.contexts])
        self.lm.check_finite(torch.cat(found[:2], 1), self.rows[:: self.contexts].__getitem__)
        return found


def average(rows: Tensor, contexts: int, flat: bool = False) -> Tensor:
    """Each request's key, (n, d_in), from those in its contexts, (n × contexts, d_in): see `KeyReader`."""
    grouped = rows.view(-1, contexts, rows.shape[1])
    if contexts == 1 or flat:
        return grouped.mean(1)
    return (grouped[:, 0] + grouped[:, 1:].mean(1)) / 2


@dataclass(frozen=True)
class Reading:
    """How an editor reads a batch, and what it solves from that: one answer before, in and after an edit.

    site, flat: as in `KeyReader`; plain: the residual is to be found at the plain prompt's key; noise: ν of the gate;
    together: how many requests are solved at once, None for all of a batch.
    """

    site: str = "block"
    flat: bool = False
    plain: bool = False
    noise: float = 1.0
    together: int | None = None
    tokens: int = 8192

    def reader(self, lm: LanguageModel, rows: Rows, last: int) -> KeyReader:
        return KeyReader(lm, rows, rows.contexts, last, self.tokens, self.flat, self.site)

    def groups(self, count: int) -> list[range]:
        """The requests of a batch that are solved at once; of an empty batch the one empty group."""
        size = self.together or max(1, count)
        return [range(first, min(first + size, count)) for first in range(0, max(1, count), size)]

    def at(self, found: Keys) -> Tensor | None:
        """K*, where the residuals are to be found; None: at the keys themselves."""
        return found.plain if self.plain else None

    def gate(self, found: Keys, metric: Metric) -> Tensor:
        """M."""
        return gate(found.keys, metric, self.noise, self.at(found))

    def solve(self, found: Keys, residuals: Tensor, metric: Metric) -> Solution:
        """M, B and R B."""
        return solve(found.keys, residuals, metric, self.noise, self.at(found))

    def association(self, found: Keys, metric: Metric) -> Tensor:
        """γ of each request alone, (n,)."""
        return association(found.keys, metric, self.at(found))

    def realization(self, found: Keys, metric: Metric) -> Tensor:
        """B of requests that are solved together, (n, n)."""
        at = self.at(found)
        return realization(found.keys if at is None else at, self.gate(found, metric))
