"""Short memory costs time, never the result: micro-batches are halved until they fit, and the model stays as it was."""

from __future__ import annotations

import string
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from models import random_model
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import metake as mk
from metake.editing.keys import KeyReader
from metake.editing.plant import HELD
from metake.language.generation import sample
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.scoring.evaluation import read
from metake.support import machine
from metake.support.machine import halving

pytestmark = pytest.mark.usefixtures("double_inside", "as_in_large_batches")
RULE = mk.TargetRule(steps=3)
TEXT = ["The mother tongue of Danielle Darrieux is", "Rome", "The Boeing flies to"] * 7


def keys(lm: LanguageModel) -> torch.Tensor:
    reader = KeyReader(lm, REQUESTS, CONTEXTS, 2)
    return torch.cat([reader.read(1)[0], reader.read(2)[0]])


def refined(lm: LanguageModel) -> torch.Tensor:
    targets = mk.optimize_targets(lm, REQUESTS, CONTEXTS, 1, RULE)
    gate = torch.ones(len(REQUESTS), lm.shape(lm.write_path(1))[1], dtype=torch.float64) / 100
    return mk.refine(lm, REQUESTS, CONTEXTS, targets, gate, mk.Refinement(steps=2)).planned


def moments(lm: LanguageModel) -> torch.Tensor:
    return mk.statistics(lm, "embedded", [1], tokens=3000, cache=False)[1].moment


WORK: dict[str, Callable[[LanguageModel], torch.Tensor]] = {
    "targets": lambda lm: mk.optimize_targets(lm, REQUESTS, CONTEXTS, 1, RULE).planned,
    "refinement": refined,
    "keys": keys,
    "statistics": moments,
    "evaluation": lambda lm: torch.tensor(
        [r.log_p for r in read(lm, [(text, "English") for text in TEXT[:3]])], dtype=torch.float64
    ),
    "generation": lambda lm: torch.tensor(
        [
            list(map(ord, text.ljust(400)[:400]))
            for text in sample(lm, TEXT, 12, streams=[str(i) for i in range(len(TEXT))])
        ],
        dtype=torch.float64,
    ),
}


@contextmanager
def memory_for(lm: LanguageModel, tokens: int, block: int = 2) -> Iterator[list[int]]:
    """A block that holds at most so many tokens, padding included; yields the sizes that were too large."""
    refused: list[int] = []

    def hold(_, args):
        if (size := args[0].shape[0] * args[0].shape[1]) > tokens:
            refused.append(size)
            raise torch.OutOfMemoryError("out of memory")

    handle = lm.block(block).mlp.register_forward_pre_hook(hold)
    yield refused
    handle.remove()


@pytest.mark.parametrize("what", WORK)
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(what, caplog):
    lm = random_model("llama")
    expected = WORK[what](lm)
    with (
        reference.unchanged(lm),
        memory_for(lm, 300 if what == "statistics" else 24, block=0 if what == "statistics" else 2) as refused,
    ):
        found = WORK[what](lm)
    assert refused and "half as large" in caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_memory_that_never_suffices_is_an_error_and_leaves_the_model_as_it_was():
    lm = random_model("gpt2")
    with reference.unchanged(lm), memory_for(lm, 0) as refused, pytest.raises(torch.OutOfMemoryError):
        mk.optimize_targets(lm, REQUESTS, CONTEXTS, 1, RULE)
    assert len(refused) > 8


def test_only_memory_errors_are_tried_again():
    tried = []

    def fail(tokens: int) -> None:
        tried.append(tokens)
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
            if tokens > 3
            else "of another kind"
        )

    with pytest.raises(RuntimeError, match="another kind"):
        halving(fail, 20)
    assert tried == [20, 10, 5, 2]


def test_the_memory_at_hand_bounds_the_micro_batch(monkeypatch):
    """With gradients, which is what memory is counted for; a pass that keeps nothing but its result may take twice as
    many tokens."""
    lm = random_model("qwen2")
    expected, seen = WORK["targets"](lm), {True: [], False: []}
    lm.block(3).register_forward_pre_hook(
        lambda _, args: seen[torch.is_grad_enabled()].append(args[0].shape[0] * args[0].shape[1])
    )
    WORK["targets"](lm)
    plenty = max(seen[True])
    one_token = machine.working_memory(lm.device) / lm.room(3, gradients=True)
    monkeypatch.setattr("metake.language.model.working_memory", lambda _: 30 * one_token)
    assert lm.room(3, gradients=True) == pytest.approx(30, abs=1) and lm.room(3, gradients=True) < lm.room(
        1, gradients=False
    )
    for sizes in seen.values():
        sizes.clear()
    torch.testing.assert_close(WORK["targets"](lm), expected, rtol=1e-10, atol=1e-12)
    assert max(seen[True]) <= 31 < plenty and max(seen[False]) <= 2 * 31


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside the block, and not given back, held together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, made)
        return made

    def note(self, made: torch.Tensor) -> None:
        storage = made.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.now, self.most)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, which: int, size: int) -> None:
        self.known.remove(which)
        self.now -= size


def test_ten_times_as_many_requests_take_no_more_memory_in_stage_one():
    lm = random_model("gpt2", torch.float32, depth=12)
    words = [a + b for a in string.ascii_uppercase for b in string.ascii_lowercase[:20]]
    requests = [
        mk.EditRequest(REQUESTS[i % 4].prompt, f"{words[i // 4]}{i % 4}", "English", str(i)) for i in range(1000)
    ]
    batch, most = Rows.of(lm.tokenizer, requests, CONTEXTS[:2]), {}
    few = batch.pick(range(100))
    tokens = -(-sum(len(row.ids) for row in (*few.taught, *few.watched)) // HELD)  # a hundred fill one chunk
    for rows in (few, batch):
        with Held() as held:
            mk.optimize_targets(lm, rows, batch.contexts, 1, mk.TargetRule(steps=2, tokens=tokens))
        most[len(rows)] = held.most
    assert 2**20 < most[100] and most[1000] < 1.2 * most[100], most


def test_working_memory_is_a_quarter_of_what_is_free_and_small_on_a_cpu(monkeypatch):
    for free, on_cpu in ((2**30, 2**28), (2**40, 2**31)):
        monkeypatch.setattr(machine, "free_memory", lambda _, free=free: free)
        assert (
            machine.working_memory(torch.device("cpu")) == on_cpu
            and machine.working_memory(torch.device("cuda")) == free // 4
        )
    assert machine.start_cost(torch.device("cuda")) > machine.start_cost(torch.device("cpu")) > 0


def test_peak_and_free_memory_are_bytes_of_this_machine():
    assert 2**20 < machine.peak_memory(torch.device("cpu")) and 2**20 < machine.free_memory(torch.device("cpu")) < 2**50


def test_the_processor_is_named_with_the_instructions_that_are_used(monkeypatch):
    assert machine.processor().endswith(torch.backends.cpu.get_cpu_capability())
    monkeypatch.setattr(machine, "_read", lambda _: "processor\t: 0\nmodel name\t: Some Maker 9 \nflags\t: x\n")
    assert machine.processor().startswith("Some Maker 9, ")
    monkeypatch.setattr(machine, "_read", lambda _: "")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert machine.processor().startswith("arm, ")
