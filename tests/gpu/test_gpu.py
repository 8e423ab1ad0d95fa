"""One CUDA device gives what the CPU gives, restores its weights bit for bit, and stays within a bounded memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import CONFIGS, random_model

import metake as mk
from metake.support.machine import peak_memory

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def requests(number: int = 6) -> list[mk.EditRequest]:
    return [c.request for c in mk.facts(limit=number)]


def edited(device: str, method: str = "metake") -> tuple[mk.LanguageModel, mk.Edit]:
    lm = mk.load("tiny", device=device)
    return lm, mk.methods.method(method, "tiny").edit(lm, requests(), mk.statistics(lm))


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-8) -> None:
    assert (one.cpu().double() - other.cpu().double()).norm() <= tolerance * other.cpu().double().norm()


@pytest.mark.parametrize("method", mk.METHODS)
def test_an_edit_of_the_gpu_is_that_of_the_cpu(method):
    (lm, ours), (_, theirs) = edited(GPU, method), edited("cpu", method)
    assert lm.device.type == GPU
    for one, other in zip(ours.updates, theirs.updates, strict=True):
        assert_same(one.delta, other.delta)
    assert {k: len(v["loss"]) for k, v in ours.record.trace.items()} == {
        k: len(v["loss"]) for k, v in theirs.record.trace.items()
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_row_gives_the_same_targets(kind):
    contexts, rule, found = ("{}", "So it is. {}"), mk.TargetRule(steps=4), []
    for device in (GPU, "cpu"):
        lm = random_model(kind)
        lm.model.to(device)
        found.append(mk.optimize_targets(lm, requests(3), contexts, 0, rule).planned)
    assert_same(*found)


def test_statistics_and_metrics_agree():
    ours, theirs = (mk.statistics(mk.load("tiny", device=d), cache=False, tokens=5_000) for d in (GPU, "cpu"))
    for layer in theirs:
        assert_same(ours[layer].covariance, theirs[layer].covariance)
    cases = mk.facts(limit=20)
    one, other = (mk.evaluate(mk.load("tiny", device=d), cases).metrics for d in (GPU, "cpu"))
    assert one == pytest.approx(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_restored_bit_for_bit(dtype):
    lm = mk.load("tiny", dtype=dtype, device=GPU)
    editor = replace(mk.methods.alphaedit("tiny"), target=mk.TargetRule(steps=3))
    before = {module: lm.digest(module) for module in map(lm.write_path, editor.layers)}
    edit = editor.edit(lm, requests(), mk.statistics(lm))
    assert {m: lm.digest(m) for m in before} == before
    with edit.applied(lm):
        assert all(lm.digest(m) != digest for m, digest in before.items())
    assert {m: lm.digest(m) for m in before} == before


def test_an_edit_made_on_the_gpu_loads_on_the_cpu(tmp_path):
    _, edit = edited(GPU)
    edit.save(tmp_path / "edit")
    lm = mk.load("tiny", device="cpu")
    with mk.Edit.load(tmp_path / "edit").applied(lm, check=False):
        assert mk.evaluate(lm, mk.facts(limit=6))["efficacy"] > 0


def test_a_smaller_micro_batch_needs_less_memory_and_gives_the_same():
    lm, peaks, found = mk.load("tiny", device=GPU), [], []
    for tokens in (100_000, 200):
        torch.cuda.reset_peak_memory_stats()
        found.append(mk.optimize_targets(lm, requests(60), ("{}",), 1, mk.TargetRule(steps=2, tokens=tokens)).planned)
        peaks.append(peak_memory(lm.device))
    assert_same(*found)
    assert peaks[1] < peaks[0]
