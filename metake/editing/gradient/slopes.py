"""Inputs and output gradients of linear maps, request by request: what an edit of the gradient family is made of.

A loss is a sum over requests of each request's own mean, so that what is read of a request does not depend on the
others that run with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metake.editing.objective import Bucket
from metake.language.capture import probing
from metake.language.model import LanguageModel
from metake.language.tokens import Padded, Row, pad


class Slopes(NamedTuple):
    """What a linear map m = k Wᵀ receives, and the loss's gradient at what it returns, at T token positions.

    keys: K, (T, d_in); gradients: g, (T, d_out). The gradient of the weight is gᵀK.
    """

    keys: Tensor
    gradients: Tensor

    @property
    def rows(self) -> Tensor:
        """[k; g], (T, d_in + d_out)."""
        return torch.cat([self.keys, self.gradients], 1)


class _Part(NamedTuple):
    """Rows that run together; kept: the places that are read, in the rectangle, and at which place of all."""

    batch: Padded
    bucket: Bucket
    kept: Tensor
    order: Tensor


class Passes:
    """Rows that run forwards and backwards: the losses of their requests, and the slopes at linear maps.

    tokens: "answer", the positions whose next token is scored; "all", every token of a row.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Row], tokens: str = "answer"):
        self.lm, self.requests = lm, 1 + max((row.request for row in rows), default=-1)
        budget = lm.room(lm.depth, gradients=True)
        self.parts = [self._part(rows, group, tokens) for group in lm.groups([len(r.ids) for r in rows], budget)]

    def _part(self, rows: Sequence[Row], group: Sequence[int], tokens: str) -> _Part:
        own = [rows[i] for i in group]
        batch = pad([row.ids for row in own], self.lm.device)
        columns = [row.read if tokens == "answer" else range(len(row.ids)) for row in own]
        places = [(k, column) for k, read in enumerate(columns) for column in read]
        width = batch.ids.shape[1]
        kept, order = zip(*((k * width + c, group[k] << 32 | c) for k, c in places), strict=True)
        where = {"dtype": torch.long, "device": self.lm.device}
        bucket = Bucket(own, [0] * len(own), self.lm.device)
        return _Part(batch, bucket, torch.tensor(kept, **where), torch.tensor(order, **where))

    def losses(self) -> Tensor:
        """Mean −log p of the answer and drift of each request, (n, 2) float64. The drift is from the first call's."""
        with torch.no_grad():
            found = (self._losses(part, self.lm.logits_at(part.batch, part.bucket.places)) for part in self.parts)
            return sum(found, torch.zeros(self.requests, 2, dtype=torch.float64, device=self.lm.device))

    def _losses(self, part: _Part, logits: Tensor) -> Tensor:
        return torch.stack(part.bucket.losses(logits, self.requests), 1).double()

    def slopes(self, paths: Sequence[str], drift: float = 0.0) -> tuple[Tensor, dict[str, Slopes]]:
        """The `losses`, and per linear map the slopes of Σ −log p + drift · Σ KL, in the order of the rows.

        Cost: a forward, and a backward down to the first of the maps.
        """
        total = torch.zeros(self.requests, 2, dtype=torch.float64, device=self.lm.device)
        found: dict[str, list[Slopes]] = {path: [] for path in paths}
        for part in self.parts:
            for path, own in self._read(part, paths, drift, total):
                found[path].append(own)
        order = torch.cat([part.order for part in self.parts]).argsort() if self.parts else None
        joined = {p: Slopes(*(torch.cat(t)[order] for t in zip(*own, strict=True))) for p, own in found.items() if own}
        return total, joined

    def _read(self, part: _Part, paths: Sequence[str], drift: float, total: Tensor) -> Iterator[tuple[str, Slopes]]:
        with torch.enable_grad(), probing({path: self.lm.model.get_submodule(path) for path in paths}) as probes:
            last = self.lm.architecture.mlp.format(self.lm.depth - 1)
            inside = any(f"{path}.".startswith(f"{last}.") for path in paths)
            logits = self.lm.logits_at(part.batch, part.bucket.places, thin=not inside)
            losses = self._losses(part, logits)
            scalar = losses[:, 0].sum() + (drift * losses[:, 1].sum() if drift else 0.0)
            slopes = torch.autograd.grad(scalar, [probes[path].leaf for path in paths])
        total += losses.detach()
        for path, slope in zip(paths, slopes, strict=True):
            # half precision would lose the small gradients in what follows
            wide = torch.promote_types(slope.dtype, torch.float32)
            pair = (t.to(self.lm.device) for t in (probes[path].input, slope))
            keys, gradients = (t.flatten(0, -2)[part.kept].to(wide) for t in pair)
            yield path, Slopes(keys, gradients)
