"""The loss that both levels share: target likelihood and drift, per request, over padded buckets of rows.

Stage I (`targets`) and MetaKE's outer level (`bilevel`) differ in what they run before the logits; both score here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metake.language.tokens import Row


@dataclass
class Bucket:
    """What is scored of rows that run together: flat over all scored positions, where logits are read and what for.

    request, weight, label: (reads,); label is −1 where the whole distribution is compared. row, column: (reads,).
    owner: (rows,), each row's request.
    """

    owner: Tensor
    row: Tensor
    column: Tensor
    request: Tensor
    label: Tensor
    weight: Tensor
    # log-probabilities before the edit at the locality reads, (locality reads, vocabulary)
    initial: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], first: Sequence[int], device: torch.device) -> Bucket:
        """Columns count from each row's position `first`: what stands before it is not run together with the rest."""
        reads = [
            (i, position - first[i], row.request, label, row.weight)
            for i, row in enumerate(rows)
            for position, label in zip(row.read, row.labels or (-1,) * len(row.read), strict=True)
        ]
        row, column, request, label, weight = zip(*reads, strict=True)
        whole = (torch.tensor(x, device=device) for x in (row, column, request, label))
        return cls(
            torch.tensor([r.request for r in rows], device=device), *whole,
            torch.tensor(weight, device=device, dtype=torch.float64)
        )

    def keep(self, rows: Tensor) -> Bucket:
        """The bucket of some of its rows, (kept,) indices in ascending order: finished requests are dropped this
        way.
        """
        place = torch.full((len(self.owner),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        stays = place[self.row] >= 0
        initial = self.initial[stays[self.label < 0]] if self.initial is not None else None
        reads = (t[stays] for t in (self.column, self.request, self.label, self.weight))
        return Bucket(self.owner[rows], place[self.row[stays]], *reads, initial)

    def losses(self, logits: Tensor, requests: int, direction: str = "post_pre") -> tuple[Tensor, Tensor]:
        """Per-request target loss and drift from this bucket's logits, each (requests,) in float64 or the logits'
        dtype.

        nll_i = Σ weight · −log p(label)        KL_i = KL(p ‖ p₀) ("post_pre") or KL(p₀ ‖ p) ("pre_post")
        The first call keeps p₀: it must be made before any change. logits: (reads, vocabulary).
        """
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        taught = self.label >= 0
        zero = torch.zeros(requests, dtype=log_p.dtype, device=log_p.device)
        picked = log_p.gather(1, self.label.clamp_min(0)[:, None])[:, 0]  # first, then the mask: the vocabulary is wide
        nll = zero.index_add(0, self.request[taught], -picked[taught] * self.weight[taught].to(log_p.dtype))
        now = log_p.index_select(0, (~taught).nonzero()[:, 0])
        if self.initial is None:
            self.initial = now.detach().clone()
        p, q = (now, self.initial) if direction == "post_pre" else (self.initial, now)
        drift = (p.exp() * (p - q)).sum(-1) * self.weight[~taught].to(log_p.dtype)
        return nll, zero.index_add(0, self.request[~taught], drift)

    def missed(self, logits: Tensor, requests: int) -> Tensor:
        """Per request, how many of this bucket's target tokens are not the arg-max, (requests,)."""
        taught = self.label >= 0
        wrong = logits[taught].argmax(-1) != self.label[taught]
        return torch.zeros(requests, device=logits.device).index_add(0, self.request[taught], wrong.float())
