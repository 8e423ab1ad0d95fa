"""One CUDA device gives what the CPU gives, method by method and architecture by architecture, and restores its weights
bit for bit.
"""

from __future__ import annotations

import os

import pytest
import torch
from devices import GPU, MARKS, assert_same, cases, edited, likelihood, requests, short, statistics
from models import CONFIGS, random_model
from reference import double_inside  # noqa: F401 (a fixture)

import metake as mk
from metake.experiments.repeatable import repeatable

pytestmark = MARKS
FEW = ("metake", "mend")  # where the device under test is the CPU itself, equality says little
METHODS = FEW if GPU == "cpu" else (*mk.METHODS, *mk.methods.GRADIENT)
KINDS = ("gpt2", "llama") if GPU == "cpu" else tuple(CONFIGS)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_of_the_gpu_is_that_of_the_cpu(method):
    (lm, ours), (_, theirs) = edited(GPU, method), edited("cpu", method)
    assert lm.device.type == torch.device(GPU).type
    for one, other in zip(ours.updates, theirs.updates, strict=True):
        assert one.left.device == lm.device
        assert_same(one.delta, other.delta)
    assert {k: len(v.get("loss", ())) for k, v in ours.record.trace.items()} == {
        k: len(v.get("loss", ())) for k, v in theirs.record.trace.items()
    }


@pytest.mark.usefixtures("double_inside")  # else softmaxes and norms differ in the eighth digit
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_row_gives_the_same_targets(kind):
    contexts, rule, found = ("{}", "So it is. {}"), mk.TargetRule(steps=4), []
    for device in (GPU, "cpu"):
        lm = random_model(kind)
        lm.model.to(device)
        found.append(mk.optimize_targets(lm, requests(3), contexts, 0, rule).planned)
    assert_same(*found)


def test_statistics_and_metrics_agree():
    ours, theirs = (mk.statistics(mk.load("tiny", device=d), cache=False, tokens=1000) for d in (GPU, "cpu"))
    for layer in theirs:
        assert_same(ours[layer].covariance, theirs[layer].covariance, 1e-9)
    one, other = (mk.evaluate(mk.load("tiny", device=d), cases(10)).metrics for d in (GPU, "cpu"))
    assert one == pytest.approx(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_restored_bit_for_bit(dtype):
    lm = mk.load("tiny", dtype=dtype, device=GPU)
    editor = short("alphaedit")
    before = {module: lm.digest(module) for module in map(lm.write_path, editor.layers)}
    edit = editor.edit(lm, requests(), statistics(lm))
    assert {m: lm.digest(m) for m in before} == before
    with edit.applied(lm):
        assert all(lm.digest(m) != digest for m, digest in before.items())
        after = likelihood(lm)
    assert after > likelihood(lm) + 0.1
    assert {m: lm.digest(m) for m in before} == before


def test_an_edit_repeats_itself():
    """To rounding: which order a device sums in is its own affair. What is read of it is then equal."""
    found = [edited(GPU) for _ in range(2)]
    (lm, one), (_, other) = found
    for first, second in zip(one.updates, other.updates, strict=True):
        assert_same(first.delta, second.delta, 1e-6)
    scores = []
    for edit in (one, other):
        with edit.applied(lm):
            scores.append(mk.evaluate(lm, cases(2)).metrics)
    assert scores[0] == scores[1]


def test_an_edit_repeats_itself_to_the_bit_if_that_is_asked_for():
    with repeatable():
        (_, one), (_, other) = (edited(GPU, "metake", "float32") for _ in range(2))
    for first, second in zip(one.updates, other.updates, strict=True):
        assert torch.equal(first.left, second.left) and torch.equal(first.right, second.right)
    assert one.record.base["deterministic"] is True


def test_an_edit_made_on_the_gpu_loads_on_the_cpu(tmp_path):
    ours, edit = edited(GPU)
    edit.save(tmp_path / "edit")
    lm = mk.load("tiny", device="cpu")
    loaded = mk.Edit.load(tmp_path / "edit")
    with loaded.applied(lm, check=False), edit.applied(ours):
        one, other = (mk.evaluate(of, cases()).metrics for of in (lm, ours))
        assert one == pytest.approx(other)
        assert likelihood(lm) == pytest.approx(likelihood(ours), rel=1e-6)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="another worker may use the device")
def test_the_device_is_named_in_what_is_recorded():
    from metake.support.machine import accelerator

    found = accelerator(torch.device(GPU))
    assert (GPU != "cuda" and not found) or (
        found["accelerator"] and found["accelerator_memory"] > 2**30 and found["float32_products"] == "exact"
    )
