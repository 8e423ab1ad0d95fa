"""The loss that both levels share: target likelihood and drift, per request, over padded buckets of rows.

Stage I (`targets`) and MetaKE's outer level (`bilevel`) differ in what they run before the logits; both score here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metake.language.capture import Places
from metake.language.tokens import Row


@dataclass
class Bucket:
    """What is scored of rows that run together: flat over all scored positions, those with a label first.

    owner: (rows,), each row's request. row, column, request, weight: (reads,), of a rectangle of `width` columns;
    label: (taught,), the first reads'; at the others the whole distribution is compared.
    """

    owner: Tensor
    row: Tensor
    column: Tensor
    request: Tensor
    weight: Tensor
    label: Tensor
    width: int
    initial: Tensor | None = None  # log-probabilities before the edit at the locality reads, (reads, vocabulary)

    def __post_init__(self) -> None:
        self.places = Places.of(self.row, self.column, self.width)
        self.parts = [len(self.label), len(self.row) - len(self.label)]
        self.requests, self.weights = self.request.split(self.parts), self.weight.split(self.parts)

    @classmethod
    def of(cls, rows: Sequence[Row], first: Sequence[int], device: torch.device) -> Bucket:
        """Columns count from each row's position `first`: what stands before it is not run together with the rest."""
        order = sorted(enumerate(rows), key=lambda pair: not pair[1].labels)  # those with labels first
        reads = [(i, position - first[i], row.request, row.weight) for i, row in order for position in row.read]
        row, column, request, weight = zip(*reads, strict=True)
        return cls(
            torch.tensor([r.request for r in rows], device=device),
            *(torch.tensor(x, device=device) for x in (row, column, request)),
            torch.tensor(weight, device=device, dtype=torch.float64),
            torch.tensor([label for r in rows for label in r.labels], dtype=torch.long, device=device),
            max(len(r.ids) - cut for r, cut in zip(rows, first, strict=True)),
        )

    def keep(self, rows: Tensor) -> Bucket:
        """The bucket of some of its rows, (kept,) indices in ascending order: so finished requests are dropped."""
        place = torch.full((len(self.owner),), -1, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        stays = place[self.row] >= 0
        taught, watched = stays.split(self.parts)
        initial = self.initial[watched] if self.initial is not None else None
        reads = (t[stays] for t in (self.column, self.request, self.weight))
        return Bucket(self.owner[rows], place[self.row[stays]], *reads, self.label[taught], self.width, initial)

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
