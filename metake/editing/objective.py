"""The loss that both levels share: target likelihood and drift, per request, over padded buckets of rows.

Stage I (`targets`) and MetaKE's outer level (`bilevel`) differ in what they run before the logits; both score here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metake.language.capture import Places
from metake.language.tokens import Row
from metake.support.machine import sent


class Read(NamedTuple):
    """One scored position of a bucket's rectangle."""

    row: int
    column: int
    request: int
    weight: float
    label: int | None  # None: the whole distribution is compared


@dataclass
class Bucket:
    """What is scored of rows that run together, in a rectangle of `width` columns on a device; those with labels first.

    Kept as plain numbers, so that rows leave it without asking the device which ones. owner: each row's request.
    """

    owner: list[int]
    reads: list[Read]
    width: int
    device: torch.device
    initial: Tensor | None = None  # log-probabilities before the edit at the locality reads, (reads, vocabulary)

    def __post_init__(self) -> None:
        row, column, request, weight, label = zip(*self.reads, strict=True)
        labels = [own for own in label if own is not None]
        self.places = Places.of(row, column, self.width, self.device)
        self.parts = [len(labels), len(label) - len(labels)]
        self.requests = sent(request, self.device).split(self.parts)
        self.weights = sent(weight, self.device, torch.float64).split(self.parts)
        self.label, self.owners = sent(labels, self.device, torch.long), sent(self.owner, self.device)

    @classmethod
    def of(cls, rows: Sequence[Row], first: Sequence[int], device: torch.device) -> Bucket:
        """Columns count from each row's position `first`: what stands before it is not run together with the rest."""
        reads = [
            Read(i, position - first[i], row.request, row.weight, label)
            for i, row in enumerate(rows)
            for position, label in zip(row.read, row.labels or [None] * len(row.read), strict=True)
        ]
        width = max(len(r.ids) - cut for r, cut in zip(rows, first, strict=True))
        return cls([r.request for r in rows], sorted(reads, key=lambda own: own.label is None), width, device)

    def keep(self, rows: Sequence[int]) -> Bucket:
        """The bucket of some of its rows, in ascending order: so finished requests are dropped."""
        place = {row: i for i, row in enumerate(rows)}
        kept = [k for k, own in enumerate(self.reads) if own.row in place]
        initial = self.initial
        if initial is not None:
            initial = initial[sent([k - self.parts[0] for k in kept if k >= self.parts[0]], self.device, torch.long)]
        reads = [self.reads[k]._replace(row=place[self.reads[k].row]) for k in kept]
        return Bucket([self.owner[row] for row in rows], reads, self.width, self.device, initial)

    @property
    def watches(self) -> bool:
        """Whether some of its reads compare whole distributions."""
        return self.parts[1] > 0

    def losses(self, logits: Tensor, requests: int, direction: str = "post_pre") -> tuple[Tensor, Tensor]:
        """Per-request target loss and drift from this bucket's logits, each (requests,) in float32 or wider.

        nll_i = Σ weight · −log p(label)        KL_i = KL(p ‖ p₀) ("post_pre") or KL(p₀ ‖ p) ("pre_post")
        The first call keeps p₀: it must be made before any change. logits: (reads, vocabulary).
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        taught, now = (torch.log_softmax(part.to(wide), dim=-1) for part in logits.split(self.parts))
        zero = torch.zeros(requests, dtype=wide, device=logits.device)
        picked = taught.gather(1, self.label[:, None])[:, 0]
        nll = zero.index_add(0, self.requests[0], -picked * self.weights[0].to(wide))
        if self.initial is None:
            self.initial = now.detach().clone()
        p, q = (now, self.initial) if direction == "post_pre" else (self.initial, now)
        drift = (p.exp() * (p - q)).sum(-1) * self.weights[1].to(wide)
        return nll, zero.index_add(0, self.requests[1], drift)

    def missed(self, logits: Tensor, requests: int) -> Tensor:
        """Per request, how many of this bucket's target tokens are not the arg-max, (requests,)."""
        wrong = logits.split(self.parts)[0].argmax(-1) != self.label
        return torch.zeros(requests, device=logits.device).index_add(0, self.requests[0], wrong.float())
