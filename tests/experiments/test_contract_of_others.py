"""`metake check` and `metake.testing`: a method or a model that breaks a promise is told which, and why."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from editors import LAYERS, editor
from models import random_model, stand_in, text_statistics

import metake as mk
from metake import EditRequest, TargetRule, methods
from metake.commands.cli import main
from metake.editing.editor import Editor
from metake.experiments import contract
from metake.testing import CHECKS, Subject, check_editor, check_model

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("{} was born in", "Danielle Darrieux", "Berlin now", "b"),
]


def of(kind: type) -> Editor:
    made = editor("memit", None, contexts=("{}",))
    return kind(**{f.name: getattr(made, f.name) for f in fields(made)})


class LeavesChanged(Editor):
    def step(self, lm, requests, state, planned=None):
        found = super().step(lm, requests, state, planned)
        lm.weight(self.paths(lm)[0])[0, 0] += 1e-9
        return found


class Draws(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        first, *rest = edit.updates
        return replace(edit, updates=(replace(first, left=first.left + 1e-9 * torch.randn(1)), *rest)), after


class Reversed(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        return replace(edit, updates=tuple(replace(u, left=-u.left) for u in edit.updates)), after


class NotFinite(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        edit.updates[0].left[0, :] = float("inf")
        return edit, after


class OfOneLayer(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        return replace(edit, updates=edit.updates[:1]), after


class NoScratch(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        kept = {u.module: lm.weight(u.module).clone() for u in edit.updates}
        for update in edit.updates:
            lm.add(update.module, update)
        for module, weight in kept.items():
            lm.write_weight(module, weight)
        return edit, after


class Remembers(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        return edit, replace(after, edits=after.edits + 1)


class Silent(Editor):
    def step(self, lm, requests, state, planned=None):
        edit, after = super().step(lm, requests, state, planned)
        return replace(edit, record=replace(edit.record, context_templates=(), requests_digest="")), after


BROKEN = {
    LeavesChanged: ("model untouched", "after an edit was computed, transformer.h.1.mlp.c_proj.weight differ"),
    Draws: ("deterministic", "the same call gives another edit"),
    Reversed: ("edit takes", "log p of the target -"),
    NotFinite: ("finite update", "not finite"),
    OfOneLayer: ("exactly restored", "edits other weights than it declares"),
    NoScratch: ("interrupted", "after an interruption, transformer.h.1.mlp.c_proj.weight differ"),
    Remembers: ("zero requests", "zero requests change the state"),
    Silent: ("record", "does not say: requests_digest, context_templates"),
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_is_found_and_named(kind):
    lm, (check, said) = random_model("gpt2"), BROKEN[kind]
    subject = Subject(lm, of(kind), text_statistics(lm, LAYERS), REQUESTS)
    with pytest.raises(mk.MetakeError, match=said):
        CHECKS[check](subject)
    assert CHECKS[check](Subject(random_model("gpt2"), of(Editor), subject.statistics, REQUESTS)), "a sound one passes"


@pytest.fixture
def _cheap(monkeypatch):
    """A random model under the name of `tiny`, and few steps."""
    make = methods.method
    monkeypatch.setattr(contract, "load", stand_in)
    few = {"target": TargetRule(steps=3), "layers": LAYERS}
    monkeypatch.setattr(methods, "method", lambda *words, **own: make(*words, **few, **own))


def test_the_command_tells_verdicts_and_reasons_and_ends_with_1_if_one_failed(_cheap, tmp_path, capsys, monkeypatch):
    words = ["check", "tiny", "--method", "memit", "--text-tokens", "600", "--json", str(tmp_path / "found.json")]
    assert main(words) == 0
    table, told = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert told["passed"] and [one["check"] for one in told["checks"]] == ["architecture", *CHECKS]
    assert all(one["verdict"] == "pass" and one["reason"] and one["check"] in table for one in told["checks"])
    assert "pass       adapter = merged" in table
    monkeypatch.setitem(CHECKS, "edit takes", lambda s: 1 / 0)
    monkeypatch.setattr(contract, "CHECKS", {"edit takes": CHECKS["edit takes"]})
    assert main(words[:-2]) == 1
    assert "fail       edit takes" in (table := capsys.readouterr().out) and "ZeroDivisionError" in table


def test_a_model_that_its_row_does_not_describe_fails_with_the_reason(monkeypatch):
    def refused(*_):
        raise mk.ArchitectureError("the block's output is something else")

    monkeypatch.setattr(contract, "load", refused)
    report = check_model("some/model")
    assert not report.passed and "architecture" in str(report) and "something else" in str(report)
    monkeypatch.undo()
    with pytest.raises(mk.ParameterError, match="Did you mean 'tiny'"):
        check_model("tny")


def test_a_method_of_one_s_own_is_a_function_or_an_editor():
    lm = random_model("gpt2")
    reports = [check_editor(made, lm, REQUESTS, text_tokens=300) for made in (lambda name: of(Editor), of(Reversed))]
    failed = [[r.check for r in report.results if r.verdict == "fail"] for report in reports]
    assert failed == [[], ["edit takes"]] and mk.testing.check_editor is check_editor
