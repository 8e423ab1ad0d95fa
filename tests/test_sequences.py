"""Any sequence of actions on a model and its edits: its weights are always what plain arithmetic says they are."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from editors import LAYERS, editor
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from models import random_model, text_statistics
from safetensors.torch import load_file
from same import fingerprint

from metake import EditRequest, ProvenanceError
from metake.algebra.update import Edit, total
from metake.experiments.subject import Interrupted, Subject

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("{} was born in", "Danielle Darrieux", "Berlin now", "b"),
    EditRequest("I fly the {}", "Boeing 747", "English", "c"),
    EditRequest("The mother tongue of {} is", "Beyoncé", "French", "d"),
]
FEW = settings(
    max_examples=8, stateful_step_count=20, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck)
)


class Stop(BaseException):
    """Raised in the middle of things."""


@cache
def shared():
    """One model for all sequences, its weights at first, the editor, its statistics, and a model of other weights."""
    lm = random_model("gpt2")
    given = editor("memit_seq", lm, contexts=("{}",))
    weights = {m: lm.weight(m).clone() for m in given.paths(lm)}
    return lm, weights, given, text_statistics(lm, LAYERS, 400), random_model("gpt2", seed=1)


class Actions(RuleBasedStateMachine):
    """The model of the machine: each weight as a tensor, changed by W + Δ alone."""

    edits = Bundle("edits")

    @initialize()
    def begin(self):
        self.lm, first, self.given, self.known, self.other = shared()
        for module, weight in first.items():
            self.lm.write_weight(module, weight)
        self.first, self.now, self.whole = first, dict(first), fingerprint(self.lm.model)
        self.state, self.steps, self.edited = self.given.init(self.lm, self.known), [], dict(first)
        self.open: list[tuple[contextlib.ExitStack, dict]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.place = Path(self.folder.name)

    def teardown(self):
        while getattr(self, "open", None):
            self.leave()
        if hasattr(self, "folder"):
            self.folder.cleanup()
            changed = {n for n, told in fingerprint(self.lm.model).items() if told != self.whole[n]}
            assert changed <= {f"{m}.weight" for m in self.now}, "only the edited weights ever change"

    def plus(self, edit: Edit, weights: dict | None = None) -> dict:
        own = dict(self.now if weights is None else weights)
        return own | {u.module: (own[u.module].double() + u.delta).to(own[u.module].dtype) for u in edit.updates}

    @staticmethod
    def told(weight: torch.Tensor) -> str:
        return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()

    def fits(self, edit: Edit, weights: dict | None = None) -> bool:
        own = self.now if weights is None else weights
        return all(self.told(own[m]) == edit.record.weights[m] for m in edit.modules)

    @invariant()
    def the_digest_is_what_arithmetic_says(self):
        if hasattr(self, "now"):
            assert {m: self.lm.digest(m) for m in self.now} == {m: self.told(w) for m, w in self.now.items()}

    @rule(target=edits, which=st.sets(st.integers(0, 3), min_size=1, max_size=2))
    def edit(self, which):
        return self.given.edit(self.lm, [REQUESTS[i] for i in sorted(which)], self.known)

    @precondition(lambda self: len(self.steps) < 3 and all(torch.equal(self.now[m], w) for m, w in self.edited.items()))
    @rule(target=edits)
    def step(self):
        batch = [REQUESTS[len(self.steps)]]
        before = self.state
        edit, self.state = self.given.step(self.lm, batch, before)
        self.steps.append(edit)
        edit.save(self.place / f"batch{len(self.steps)}")
        edit.apply(self.lm)
        self.now = self.plus(edit)
        self.edited = dict(self.now)
        return edit

    @rule(edit=edits)
    def apply(self, edit):
        if self.fits(edit):
            edit.apply(self.lm)
            self.now = self.plus(edit)
        elif not edit.record.base.get("sketches"):
            with pytest.raises(ProvenanceError, match="but the edit was made on"):
                edit.apply(self.lm)

    @rule(edit=edits)
    def apply_unchecked(self, edit):
        edit.apply(self.lm, check=False)
        self.now = self.plus(edit)

    @precondition(lambda self: len(self.open) < 3)
    @rule(edit=edits)
    def enter(self, edit):
        stack, before = contextlib.ExitStack(), dict(self.now)
        stack.enter_context(edit.applied(self.lm, check=False))
        self.open.append((stack, before))
        self.now = self.plus(edit)

    @precondition(lambda self: self.open)
    @rule()
    def leave(self):
        stack, self.now = self.open.pop()
        stack.close()

    @rule(edit=edits)
    def interrupted_inside(self, edit):
        with pytest.raises(Stop), edit.applied(self.lm, check=False):
            assert self.lm.digest(edit.modules[0]) == self.told(self.plus(edit)[edit.modules[0]])
            raise Stop

    @rule(edit=edits)
    def interrupted_between_two_weights(self, edit):
        subject = Subject(self.lm, self.given, self.known, REQUESTS)
        with pytest.raises(Interrupted), subject.watched(2):
            edit.apply(self.lm, check=False)
        with pytest.raises(Interrupted), subject.watched(2):
            self.given.edit(self.lm, REQUESTS[:1], self.known)

    @rule(target=edits, edit=edits)
    def save_and_load(self, edit):
        again = Edit.load(edit.save(self.place / "edit"))
        assert again.record == edit.record
        assert all(torch.equal(a.delta, b.delta) for a, b in zip(again.updates, edit.updates, strict=True))
        return again

    @rule(target=edits, one=edits, other=edits)
    def sum(self, one, other):
        both = one + other
        assert both.record.weights == one.record.weights
        for u, a, b in zip(both.updates, one.updates, other.updates, strict=True):
            torch.testing.assert_close(u.delta, a.delta + b.delta, rtol=1e-10, atol=1e-12)
        return both if both.updates[0].rank < 30 else multiple()

    @rule(target=edits, edit=edits, size=st.integers(1, 4))
    def compress(self, edit, size):
        smaller, lost = edit.compress(size)
        for u, own in zip(smaller.updates, edit.updates, strict=True):
            away, whole = (own.delta - u.delta).square().sum().item(), own.delta.square().sum().item()
            assert u.rank <= size and away == pytest.approx(lost[u.module] * whole, rel=1e-6, abs=1e-18)
        return smaller

    @rule(edit=edits)
    def export(self, edit):
        edit.to_peft(self.place / "lora")
        found = load_file(self.place / "lora" / "adapter_model.safetensors")
        for u in edit.updates:
            b, a = (found[f"base_model.model.{u.module}.lora_{x}.weight"] for x in "BA")
            torch.testing.assert_close(b @ a, u.delta, rtol=1e-12, atol=1e-14)

    @precondition(lambda self: not hasattr(self, "merged"))
    @rule(edit=edits)
    def merge(self, edit):
        from peft import PeftModel

        self.merged = edit.to_peft(self.place / "merged")
        twin = random_model("gpt2")
        for module, weight in self.now.items():
            twin.write_weight(module, weight)
        twin.model = PeftModel.from_pretrained(twin.model, self.place / "merged").merge_and_unload()
        for module, weight in self.plus(edit).items():
            torch.testing.assert_close(twin.weight(module), weight, rtol=1e-12, atol=1e-12)

    @precondition(lambda self: self.steps)
    @rule()
    def resume(self):
        """The batches from disk on the first weights are the model as the last step left it."""
        saved, weights = [Edit.load(self.place / f"batch{i + 1}") for i in range(len(self.steps))], self.first
        twin = random_model("gpt2")
        for edit in saved:
            assert self.fits(edit, weights)
            edit.apply(twin)
            weights = self.plus(edit, weights)
        assert {m: twin.digest(m) for m in weights} == {m: self.told(w) for m, w in self.edited.items()}
        whole = total(saved)
        for u in whole.updates:
            torch.testing.assert_close(self.first[u.module] + u.delta, self.edited[u.module], rtol=1e-12, atol=1e-12)

    @rule(edit=edits)
    def wrong_base(self, edit):
        before = fingerprint(self.other.model)
        with pytest.raises(ProvenanceError):
            edit.apply(self.other)
        assert fingerprint(self.other.model) == before


class TestActions(Actions.TestCase):
    settings = FEW
