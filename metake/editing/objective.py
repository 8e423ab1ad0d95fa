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
from metake.support.machine import sent


@dataclass
class Bucket:
    """What is scored of rows that run together: flat over all scored positions, those with a label first.

    first: from which position of each row on it runs with the others; columns count from there. What the device is sent
    follows from the rows, so that some can leave without asking it which.
    """

    rows: Sequence[Row]
    first: Sequence[int]
    device: torch.device
    width: int = 0  # columns of the rectangle, if not as many as these rows have
    initial: Tensor | None = None  # log-probabilities before the edit at the locality reads, (reads, vocabulary)

    def __post_init__(self) -> None:
        self.width = self.width or max(len(r.ids) - cut for r, cut in zip(self.rows, self.first, strict=True))
        order = sorted(enumerate(self.rows), key=lambda pair: not pair[1].labels)
        reads = [(i, position - self.first[i], row.request, row.weight) for i, row in order for position in row.read]
        self.row, column, request, weight = zip(*reads, strict=True)
        labels = [label for _, row in order for label in row.labels]
        self.parts = [len(labels), len(reads) - len(labels)]
        self.places = Places.of(self.row, column, self.width, self.device)
        self.label, self.owner = (sent(x, self.device, torch.long) for x in (labels, [r.request for r in self.rows]))
        self.requests = sent(request, self.device).split(self.parts)
        self.weights = sent(weight, self.device, torch.float64).split(self.parts)

    def keep(self, rows: Sequence[int]) -> Bucket:
        """The bucket of some of its rows, in ascending order: so finished requests are dropped."""
        own, first = [self.rows[i] for i in rows], [self.first[i] for i in rows]
        watched = [k for k, row in enumerate(self.row[self.parts[0] :]) if row in rows]
        initial = self.initial if self.initial is None else self.initial[sent(watched, self.device, torch.long)]
        return Bucket(own, first, self.device, self.width, initial)

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
