"""A device never waits for Python: what a step reads of it, or sends it, does not grow with the requests.

Counted on a CPU, where nothing is waited for, by what would wait on a GPU: numbers and shapes that Python asks for, and
numbers that are sent there at once. Adam's own count of its steps is among them; it stands on the CPU everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from models import random_model
from torch import Tensor

import metake as mk
from metake.editing.keys import KeyReader
from metake.editing.outer import LastLayer
from metake.experiments.speed.launched import Launches, launched, of_the_model
from metake.experiments.studies.answers import answer
from metake.language.generation import sample
from metake.language.tokens import continued, pad
from metake.scoring.evaluation import read

CONTEXTS = ("{}", "So it is. {}")
SHAPES = {"nonzero", "_unique2", "unique_dim", "masked_select", "equal"}  # how large the result is, the numbers decide

class Transfers(Launches):
    """Counts operations, and what would wait for a device: `waits`."""

    def __enter__(self):
        self.waits, self.patches = Counter(), []
        for owner, names in ((torch, ("tensor", "as_tensor")), (Tensor, ("tolist", "cpu", "numpy"))):
            for name in names:
                told = self.counting(getattr(owner, name), name, sends=owner is torch)
                self.patches.append(mock.patch.object(owner, name, told))
                self.patches[-1].start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def counting(self, call: Callable, name: str, sends: bool) -> Callable:
        def counted(given, *args, **named):
            found = call(given, *args, **named)
            if not sends or (named.get("device") is not None and found.numel()):
                self.waits[name] += 1
            return found

        return counted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.partition("::")[2]
        chosen = name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if name in SHAPES or name == "_local_scalar_dense" or chosen:
            self.waits[name] += 1
        return super().__torch_dispatch__(operation, types, args, kwargs)


def a_step(call: Callable[[int], object], one: int, other: int) -> SimpleNamespace:
    """What one more of many equal steps does."""
    with Transfers() as first:
        call(one)
    with Transfers() as second:
        call(other)
    many = other - one
    waits = {k: (n - first.waits[k]) / many for k, n in second.waits.items() if n > first.waits[k]}
    return SimpleNamespace(waits=waits, launched=(second.launched.total() - first.launched.total()) / many)


def requests(number: int) -> list[mk.EditRequest]:
    """Of several lengths, so that they run in several micro-batches."""
    subjects = ["Land" + " of my" * (i % 3) + str(i) for i in range(number)]
    return [
        mk.EditRequest("The capital of {} is", subject, ("Rome", "old Berlin")[i % 2], str(i))
        for i, subject in enumerate(subjects)
    ]


@pytest.fixture(params=["gpt2", "llama"])
def lm(request, monkeypatch):
    monkeypatch.setattr("metake.language.model.start_cost", lambda _: 4)  # more micro-batches
    return random_model(request.param, torch.float32, depth=3)


def steps_of(lm, what: str, number: int) -> tuple[Callable[[int], object], int, int]:
    asked, rule = requests(number), mk.TargetRule(stop_below=0.0)
    if what == "targets":
        return lambda steps: mk.optimize_targets(lm, asked, CONTEXTS, 1, replace(rule, steps=steps)), 2, 3
    if what == "generation":
        prompts, streams = ["The capital of France is"] * number, [str(i) for i in range(number)]
        length = len(lm.tokenizer(prompts[0])["input_ids"])
        return lambda steps: sample(lm, prompts, length + steps, rows=number, streams=streams), 2, 5
    if what == "answers":
        return lambda steps: answer(lm, [("The capital of France is", ["Rome", "Bern"])] * number, steps), 2, 5
    targets = mk.optimize_targets(lm, asked, CONTEXTS, 1, replace(rule, steps=2))
    gate = torch.ones(number, lm.shape(lm.write_path(1))[1], dtype=torch.float64) / 100
    refined = mk.Refinement(step_size=1e-3, prompts="contexts")
    return lambda steps: mk.refine(lm, asked, CONTEXTS, targets, gate, replace(refined, steps=steps)), 1, 2


@pytest.mark.parametrize("what", ["targets", "refinement", "generation", "answers"])
def test_a_step_waits_for_the_device_at_most_three_times_whatever_the_number_of_requests(lm, what):
    found = {number: a_step(*steps_of(lm, what, number)).waits for number in (2, 9)}
    assert 1 <= sum(found[9].values()) <= 3, found
    assert sum(found[9].values()) <= sum(found[2].values()) + 1, found


def test_requests_that_finish_leave_without_a_look_at_the_device(lm):
    """One transfer a step tells which they are; they leave each micro-batch by numbers that Python has."""
    rule = mk.TargetRule(steps=4, stop_below=0.0)
    losses = [trace["loss"][1] for trace in mk.optimize_targets(lm, requests(8), CONTEXTS, 1, rule).trace]
    with Transfers() as seen:
        found = mk.optimize_targets(lm, requests(8), CONTEXTS, 1, replace(rule, stop_below=sorted(losses)[4]))
    assert len({len(trace["loss"]) for trace in found.trace}) > 1
    assert sum(seen.waits.values()) <= 3 * rule.steps, seen.waits


def test_a_micro_batch_of_the_evaluation_is_read_in_two_transfers(lm):
    asked = [(r.text + " then" * (i % 5), "old Berlin") for i, r in enumerate(requests(9))]
    with lm.ready(), Transfers() as seen:  # whether the weights are finite is asked before
        found = read(lm, asked)
    passes = seen.operations["embedding"] / (2 if lm.model.config.model_type == "gpt2" else 1)
    assert len(found) == 9 and passes > 1 and sum(seen.waits.values()) <= 2 * passes, seen.waits


def test_keys_are_read_in_one_transfer_a_layer(lm):
    reader = KeyReader(lm, requests(9), CONTEXTS, 2)
    with lm.ready(), Transfers() as seen:
        reader.read(1)
        reader.read(2)
    assert len(reader.groups) > 1 and sum(seen.waits.values()) <= 2, seen.waits


def test_a_step_of_the_refinement_starts_little_beside_the_model_itself(lm):
    """The model's own: a forward of its blocks above the planted layer, logits, and the backward of their sum."""
    step = a_step(*steps_of(lm, "refinement", 8)).launched
    rows = requests(8)
    targets = mk.optimize_targets(lm, rows, CONTEXTS, 1, mk.TargetRule(steps=2))
    gate = torch.ones(8, lm.shape(lm.write_path(1))[1], dtype=torch.float64) / 100
    with lm.ready(gradients=True):
        outer = LastLayer(lm, rows, CONTEXTS, targets, gate, mk.Refinement(prompts="contexts"))
        own = of_the_model(outer).total()
    count = len(outer.parts)
    assert step - own <= 45 * count + 40, (step, own, count)


def test_the_page_counts_what_is_launched_and_tells_it_by_name():
    found = launched(edits=3).set_index("operations")
    parts = found.drop("all")
    assert (parts.sum() == found.loc["all"]).all()
    assert (found["step"] - found["of the model"] == found["beside it"]).all()
    assert 0 < found["beside it"]["all"] < found["of the model"]["all"]
    assert found["of the model"]["products"] > 20 and launched(edits=3).equals(found.reset_index())


def test_a_mask_knows_its_sum_and_is_else_a_mask():
    for batch in (pad([(1, 2, 3), (4,)], "cpu"), continued([(1, 2), (3,)], [0, 2], "cpu")):
        told, ones = batch.mask, int(batch.mask.as_subclass(Tensor).sum())
        with Transfers() as seen:
            for same in (told, told.to(dtype=torch.bool), told.view(2, -1), told[:, : told.shape[1]]):
                assert same.sum() == ones
        assert not seen.waits
        assert told.sum(1).sum() == ones and type(told[:, :1]) is Tensor and type(told.bool()) is Tensor
