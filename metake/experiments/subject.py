"""What is under the contract: a method on a model, with the edit that all checks look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metake.algebra.geometry import KeyStatistics
from metake.algebra.update import Edit
from metake.data.requests import EditRequest
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.statistics import checksum
from metake.language.model import LanguageModel
from metake.language.tokens import encode
from metake.support.errors import MetakeError


class BrokenPromise(MetakeError):
    """A check found what must not be."""


class NotAsked(MetakeError):
    """A check has nothing to ask here."""


class Interrupted(BaseException):
    """Ends an edit in the middle."""


@dataclass
class Subject:
    """A method and a model under the contract, with what it edits; the edit is computed once, when it is asked for."""

    lm: LanguageModel
    editor: Editor | GradientEditor
    statistics: Mapping[int, KeyStatistics]
    requests: Sequence[EditRequest]

    def compute(self, requests: Sequence[EditRequest] | None = None) -> Edit:
        return self.editor.edit(self.lm, self.requests if requests is None else requests, self.statistics)

    @cached_property
    def before(self) -> dict[str, bytes]:
        return fingerprint(self.lm)

    @cached_property
    def edit(self) -> Edit:
        self.before  # noqa: B018 (known before anything is done)
        with self.watched(None):
            return self.compute()

    @contextlib.contextmanager
    def watched(self, last: int | None) -> Iterator[None]:
        """Count what is added to weights, in `adds`; Interrupted at the `last` of them."""
        self.adds, add = 0, self.lm.add

        def counting(module: str, update: Any) -> None:
            self.adds += 1
            if self.adds == last:
                raise Interrupted
            add(module, update)

        with in_place_of(self.lm, add=counting):
            yield

    def expect_unchanged(self, when: str) -> None:
        """Raise BrokenPromise unless every tensor of the model is what it was at first, bit for bit."""
        now = fingerprint(self.lm)
        if changed := [name for name in self.before if now.get(name) != self.before[name]]:
            raise BrokenPromise(f"{when}, {', '.join(changed[:3])} differ from what they were")

    def logits(self, model: Any = None) -> Tensor:
        """After each request's text, (n, vocabulary)."""
        rows = [torch.tensor([encode(self.lm.tokenizer, r.text)], device=self.lm.device) for r in self.requests]
        with torch.no_grad():
            return torch.stack([(model or self.lm.model)(row).logits[0, -1] for row in rows])


def fingerprint(lm: LanguageModel) -> dict[str, bytes]:
    """A checksum of every tensor of a model."""
    return {name: checksum(tensor) for name, tensor in lm.model.state_dict().items()}


def same(one: Edit, other: Edit) -> bool:
    """Whether two edits have the same factors and dense parts, bit for bit."""
    pairs = [
        (getattr(a, part), getattr(b, part))
        for a, b in zip(one.updates, other.updates, strict=True)
        for part in ("left", "right", "dense")
    ]
    return one.modules == other.modules and all(
        torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs
    )


def expect(holds: Any, otherwise: str) -> None:
    """Raise BrokenPromise unless it holds."""
    if not holds:
        raise BrokenPromise(otherwise)


@contextlib.contextmanager
def in_place_of(lm: LanguageModel, **own: Any) -> Iterator[None]:
    """Methods of this model alone."""
    vars(lm).update(own)
    try:
        yield
    finally:
        for name in own:
            del vars(lm)[name]
