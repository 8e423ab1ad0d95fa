"""The device under test, a CUDA one unless METAKE_TEST_DEVICE names another, and edits on it beside those on the CPU.

Few steps and two contexts: where Adam takes the sign of a gradient that is nearly zero, rounding grows with every step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import metake as mk
from metake.data.requests import Cases
from metake.editing.editor import Editor
from metake.language.model import LanguageModel

GPU = os.environ.get("METAKE_TEST_DEVICE", "cuda")
HERE = GPU != "cuda" or torch.cuda.is_available()
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="needs a CUDA device")]
CUDA = pytest.mark.skipif(GPU != "cuda", reason="a CPU's memory is not counted by the allocator")
CONTEXTS = ("{}", "So it is. {}")
TOKENS = 3000  # of the key statistics


def cases(number: int = 4) -> Cases:
    return mk.facts(limit=number)


def requests(number: int = 4) -> list[mk.EditRequest]:
    return [c.request for c in cases(number)]


def short(name: str) -> Any:
    """A method of `tiny` in few steps."""
    editor = mk.methods.method(name, "tiny")
    if not isinstance(editor, Editor):
        return editor
    refine = editor.refine and replace(editor.refine, steps=2)
    return replace(editor, contexts=CONTEXTS, target=replace(editor.target, steps=6), refine=refine)


def changes() -> Mapping[str, Any]:
    """Of a method that does not refine, as a run is told of it."""
    return {"contexts": CONTEXTS, "target": replace(short("alphaedit").target, steps=3)}


def statistics(lm: LanguageModel) -> Any:
    """From the session's cache, which both devices read."""
    return mk.statistics(lm, tokens=TOKENS)


def edited(device: str, name: str = "metake", dtype: str | None = None) -> tuple[LanguageModel, mk.Edit]:
    lm = mk.load("tiny", dtype=dtype, device=device)
    return lm, short(name).edit(lm, requests(), statistics(lm))


def likelihood(lm: LanguageModel) -> float:
    """Mean log-probability of the targets that `edited` writes."""
    scores = mk.evaluate(lm, cases()).cases
    return sum(p.target.log_p for case in scores for p in case.probes if p.kind == "efficacy") / len(scores)


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-7) -> None:
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    assert torch.isfinite(one).all() and (one - other).norm() <= tolerance * other.norm()
