"""What an edit takes of a device's memory is bounded, whatever the batch, and a full device is no end."""

from __future__ import annotations

import pytest
import torch
from devices import CUDA, GPU, MARKS, assert_same, cases, requests

import metake as mk
from metake.language.model import LanguageModel
from metake.support import machine

pytestmark = MARKS
MIB = 2**20


def planned(lm: LanguageModel, number: int, tokens: int) -> tuple[torch.Tensor, int]:
    """Targets, and the bytes that they took beyond what was there before."""
    before = torch.cuda.memory_allocated() if GPU == "cuda" else 0
    machine.reset_peak(lm.device)
    found = mk.optimize_targets(lm, requests(number), ("{}",), 1, mk.TargetRule(steps=2, tokens=tokens)).planned
    return found, machine.peak_memory(lm.device) - before


def test_a_micro_batch_decides_memory_and_never_the_result():
    lm, number = mk.load("tiny", device=GPU), 6 if GPU == "cpu" else 60
    (one, much), (other, little) = planned(lm, number, 100_000), planned(lm, number, 200)
    assert_same(one, other)
    assert GPU != "cuda" or little < much


@CUDA
def test_memory_stays_below_a_ceiling_however_large_the_batch():
    """Of 2000 tokens at once, 160 kB each by `LanguageModel.room`, in float64: 320 MB, and as much again for rows that
    wait."""
    lm = mk.load("tiny", device=GPU)
    planned(lm, 20, 2000)  # the libraries' own workspaces
    took = [planned(lm, number, 2000)[1] for number in (150, 600)]
    assert max(took) < 640 * MIB and took[1] < 1.3 * took[0]
    machine.reset_peak(lm.device)
    before = torch.cuda.memory_allocated()
    mk.evaluate(lm, cases(300), tokens=2000)
    assert machine.peak_memory(lm.device) - before < 640 * MIB


@CUDA
def test_a_full_device_halves_the_micro_batch(monkeypatch, caplog):
    lm = mk.load("tiny", device=GPU)
    expected, _ = planned(lm, 300, 500)
    torch.cuda.empty_cache()
    monkeypatch.setattr(LanguageModel, "room", lambda *_, **__: 10**6)
    most = torch.cuda.memory_reserved() + 200 * MIB
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    try:
        found, _ = planned(lm, 300, 10**6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(found, expected)
    assert "half as large" in caplog.text and torch.cuda.max_memory_reserved() > 0


@pytest.mark.parametrize("asked", [1, 7, 64])
def test_halving_ends_at_what_fits(asked):
    """On any device: an allocation that no device has."""
    tried = []

    def attempt(tokens: int) -> int:
        tried.append(tokens)
        if tokens > 3:
            torch.empty(2**60, dtype=torch.uint8, device=GPU)
        return tokens

    assert machine.halving(attempt, asked) <= 3 and tried == sorted(tried, reverse=True)
