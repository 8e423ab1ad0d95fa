"""What one batch of edits hands to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from metake.algebra.geometry import Metric, condition
from metake.algebra.update import Edit, LayerUpdate


@dataclass(frozen=True)
class EditorState:
    """What one batch hands to the next: a metric per layer, and the context templates. A value, never changed in place.

    keys: of the latest batch, if the metrics remember them (where moments live on, the table of its own); original,
    totals: weights before the first edit and the sum of all updates since, if a post-process acts on a whole sequence.
    """

    metrics: Mapping[int, Metric | Any] = field(repr=False)
    contexts: tuple[str, ...]
    statistics_digest: str = ""
    edits: int = 0
    keys: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    original: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    totals: Mapping[str, LayerUpdate] = field(default_factory=dict, repr=False)

    def after(self, edit: Edit, keys: Mapping[int, Tensor], count: int) -> EditorState:
        """The state once an edit of `count` requests is applied; keys: those to remember, per layer."""
        if not count:
            return self
        metrics, totals = {**self.metrics}, {**self.totals}
        for layer in keys.keys() & metrics:  # a metric remembers keys, living moments their own
            own, new = metrics[layer], keys[layer]
            metrics[layer] = own.joined(new) if hasattr(own, "joined") else condition(own, new)
        for u in (u for u in edit.updates if u.module in self.original):
            totals[u.module] = totals[u.module] + u if u.module in totals else u
        return replace(self, metrics=metrics, keys=keys or self.keys, totals=totals, edits=self.edits + count)
