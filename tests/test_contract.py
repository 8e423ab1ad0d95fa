"""What every method promises on every architecture: a new entry of METHODS or ARCHITECTURES is tested by being
there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest
import torch
from editors import EVERY, LAYERS, RULES, SEED, editor
from models import CONFIGS, random_model
from same import contents, fingerprint

import metake.editing.gradient.editor
import metake.editing.keys
from metake import (
    METHODS,
    ArchitectureError,
    Edit,
    EditRequest,
    KeyStatistics,
    NumericalError,
    ParameterError,
    ProvenanceError,
    RequestError,
    Statistics,
    StatisticsError,
    statistics,
)  # fmt: skip
from metake.algebra.geometry import condition, null_space
from metake.algebra.update import total
from metake.editing.keys import KeyReader
from metake.editing.record import describe
from metake.language.generation import context_templates
from metake.language.model import LanguageModel
from metake.language.tokens import continuation, encode
from metake.support.machine import versions
from metake.testing import CHECKS, Subject

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("{} was born in", "Danielle Darrieux", "Berlin now", "b"),
    EditRequest("I fly the {}", "Boeing 747", "English", "c"),
]
LATER = [
    EditRequest("The mother tongue of {} is", "Beyoncé", "French", "d"),
    EditRequest("The capital of {} is", "Madrid", "Houston", "e"),
]
SOME = ("gpt2", "llama")  # one of each way to write a linear map
OTHERS = [kind for kind in CONFIGS if kind not in SOME]
some = pytest.mark.parametrize("kind", SOME)
both = pytest.mark.parametrize("name", EVERY)  # families
closed = pytest.mark.parametrize("name", METHODS)  # forms: an update from targets


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Every method on two architectures and, in turn, on two of the others: so each architecture has a third of the
    methods, of both families. With METAKE_EVERY_PAIR (`make torture`) every method on every architecture.
    """
    turn = {name: {OTHERS[i % 6], OTHERS[(i + 3) % 6]} for i, name in enumerate(EVERY)}
    all_ = "METAKE_EVERY_PAIR" in os.environ
    return [(name, kind) for name in names for kind in CONFIGS if all_ or kind in SOME or kind in turn[name]]


both_on_many = pytest.mark.parametrize("name, kind", pairs(EVERY))
closed_on_many = pytest.mark.parametrize("name, kind", pairs(METHODS))


def test_every_architecture_is_edited_by_methods_of_all_kinds():
    for kind in CONFIGS:
        found = {name for name, other in pairs(EVERY) if other == kind}
        assert found & RULES.keys() and found & REFINED and len(found & METHODS.keys()) >= 4
        metrics = [editor(name, None).metric for name in found & METHODS.keys()]
        assert {isinstance(metric, null_space) for metric in metrics} == {True, False}


@cache
def known(kind: str, dtype: torch.dtype = torch.float64) -> Statistics:
    return statistics(random_model(kind, dtype), layers=LAYERS, tokens=1200, cache=False)


@cache
def made(name: str, kind: str, dtype: torch.dtype = torch.float64) -> Subject:
    """A method on a fresh model, with what it edits."""
    lm, brief = random_model(kind, dtype), {} if dtype == torch.float64 else {"contexts": ("{}",)}
    given = editor(name, lm, **brief)
    return Subject(lm, given, known(kind, dtype) if given.layers else {}, REQUESTS)


def solved(name: str, kind: str) -> Edit:
    """The same edit as it was solved, R and M, before anything is done to it."""
    given = editor(name, made(name, kind).lm)
    return (
        replace(given, post=()).edit(made(name, kind).lm, REQUESTS, known(kind))
        if given.post
        else made(name, kind).edit
    )


REFINED = {name for name in METHODS if editor(name, None).refine}


def thin(name: str) -> bool:
    """Whether the method's updates are products of thin factors: unless it declares that they are dense."""
    return name in RULES or all(rule.thin for rule in editor(name, None).post)


def rank(name: str, lm: LanguageModel, module: str) -> int:
    """Of a thin update: a request's one key, or in each step one key per token."""
    if name not in RULES:
        return len(REQUESTS)
    rows = [(encode(lm.tokenizer, r.text), continuation(lm.tokenizer, r.target)) for r in REQUESTS]
    every = RULES[name].tokens == "all"
    return RULES[name].steps * sum(len(answer) + (len(prompt) - 1 if every else 0) for prompt, answer in rows)


@both_on_many
@pytest.mark.parametrize("check", ["model untouched", "saved = loaded", "adapter = merged", "finite update", "record"])
def test_every_method_keeps_the_contract_on_every_model(name, kind, check):
    assert CHECKS[check](made(name, kind))


@both
@some
@pytest.mark.parametrize("check", [
    "tokens located", "edit takes", "deterministic", "other base refused", "zero requests", "interrupted"
])
def test_every_method_keeps_the_rest_of_the_contract(name, kind, check):
    assert CHECKS[check](made(name, kind))


@both
def test_micro_batches_do_not_change_an_edit(name):
    assert CHECKS["batch = micro-batch"](made(name, "llama"))


@pytest.mark.parametrize("name, kind, dtype", [
    (name, kind, dtype)
    for name, kind in pairs(EVERY) for dtype in (torch.float64, torch.float32, torch.bfloat16)
    # a narrower number is written alike by all methods and in all blocks: not every pair of them
    if dtype == torch.float64 or kind in SOME or name in ("memit", "metake", "mend")
], ids=str)  # fmt: skip
def test_applied_changes_the_declared_weights_and_restores_them_exactly(name, kind, dtype):
    assert CHECKS["exactly restored"](made(name, kind, dtype))


@both_on_many
def test_an_edit_is_thin_unless_declared_dense(name, kind):
    m = made(name, kind)
    for update in m.edit.updates:
        size = rank(name, m.lm, update.module)
        assert (update.dense is None) == thin(name) and update.rank == (size if thin(name) else 0)
        highest = torch.linalg.matrix_rank(update.delta)
        assert highest <= size if thin(name) else highest > len(REQUESTS)


@closed
@some
def test_another_seed_gives_other_contexts(name, kind):
    lm, edit = made(name, kind).lm, made(name, kind).edit
    other = editor(name, lm, seed=SEED + 1).edit(lm, REQUESTS, known(kind))
    assert other.record.context_templates != edit.record.context_templates
    assert (other.updates[0].delta - edit.updates[0].delta).norm() > 1e-6 * edit.updates[0].delta.norm()


@both_on_many
def test_the_record_says_everything(name, kind):
    m = made(name, kind)
    record, given = m.edit.record, m.editor
    assert bool(record.refinement) == (name in REFINED) and record.base == {
        "id": f"random-{kind}", "dtype": "float64", "device": "cpu", "conv1d": kind == "gpt2"
    }
    digests = {
        module: hashlib.sha256((w.T if kind == "gpt2" else w).numpy().tobytes()).hexdigest()
        for module in m.edit.modules
        for w in [m.lm.model.get_submodule(module).weight.detach()]
    }
    assert record.weights == digests
    assert record.recipe.items() >= json.loads(
        json.dumps(describe(given.rule if name in RULES else given))
    ).items()
    assert record.statistics_digest == (given.digest if name in RULES else known(kind).digest)
    assert record.seed == SEED and record.versions == versions()
    assert all(s >= 0 for s in record.seconds.values()) and record.peak_memory > 2**20
    assert record.trace.keys() == {"a", "b", "c"} and record.context_templates[0] == "{}"
    assert all(map(math.isfinite, (loss for trace in record.trace.values() for loss in trace["nll"])))


@closed_on_many
def test_the_record_says_how_targets_were_made(name, kind):
    lm, edit = made(name, kind).lm, made(name, kind).edit
    record, given = edit.record, editor(name, lm)
    assert record.recipe["layers"] == [1, 2] and record.recipe["target"]["steps"] == 3
    assert record.recipe["metric"]["part"] == type(given.metric).__name__ and (record.recipe["refine"] is None) == (
        given.refine is None
    )
    assert [p["part"] for p in record.recipe["post"]] == [type(p).__name__ for p in given.post]
    assert record.context_templates == context_templates(lm, given.context_rule, SEED)
    assert len(record.context_templates) == 1 + 5 * len(given.context_rule.lengths) * given.context_rule.each
    stages = {"digest", "targets", "keys", "solve", "write"} | ({"refinement"} if given.refine else set())
    assert record.seconds.keys() == stages
    for trace in record.trace.values():
        assert 1 <= len(trace["loss"]) == len(trace["nll"]) == len(trace["kl"]) <= 3 and all(
            map(math.isfinite, trace["loss"])
        )
        assert len(trace["loss"]) == 3 or given.target.relax is not None, "no loss is so small that it stops"
        assert len(trace.get("refine", ())) == (given.refine.steps + 1 if given.refine else 0)
        assert len(trace.get("earlier", ())) == (len(LAYERS) - 1 if given.own_targets else 0)
    if given.refine:
        ends = [trace["refined"] for trace in record.trace.values()]
        told = {"requests": 3, "fell": sum(end["after"] < end["before"] for end in ends)}
        assert record.refinement == told | {
            name: pytest.approx(sum(end[name] for end in ends) / 3) for name in ("before", "after")
        }
        assert record.refinement["after"] <= record.refinement["before"], "the best plan is kept"


@closed_on_many
def test_the_record_tells_what_was_planned_and_what_is_realized(name, kind):
    """Norms of R and R B at each layer, and the spectrum of B: 1 where the write is exact,
    below where the metric resists.
    """
    lm, edit = made(name, kind).lm, made(name, kind).edit
    given, first, noted = editor(name, lm), solved(name, kind).updates[0], edit.record.layers["1"]
    keys = (
        KeyReader(lm, REQUESTS, edit.record.context_templates, LAYERS[-1], flat=given.context_rule.flat)
        .read(LAYERS[0])
        .keys
    )
    spectrum = torch.linalg.eigvals(first.right @ keys.T).real if given.noise else torch.ones(len(REQUESTS))
    expected = {
        "planned": first.left.norm(),
        "realized": (first.left @ first.right @ keys.T).norm() if given.noise else first.left.norm(),
        "relative_update": edit.updates[0].delta.norm() / lm.weight(first.module).norm(),
        "spectrum_min": spectrum.min(), "spectrum_max": spectrum.max(),
    }  # fmt: skip
    assert noted == pytest.approx({k: v.item() for k, v in expected.items()}) and edit.record.layers.keys() == {
        "1", "2"
    }
    for layer in edit.record.layers.values():
        assert (
            (0 <= layer["spectrum_min"] <= layer["spectrum_max"] < 1)
            if given.noise
            else layer["spectrum_min"] == pytest.approx(1) == layer["spectrum_max"]
        )


@pytest.mark.parametrize("name", [name for name in EVERY if not thin(name)])
@some
def test_a_dense_edit_loses_less_as_an_adapter_of_higher_rank(name, kind, tmp_path):
    m = made(name, kind)
    with pytest.raises(ParameterError, match="are dense, an adapter is thin: pass rank"):
        m.edit.to_peft(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    ranks = (1, 8, min(m.lm.shape(m.edit.modules[0])))
    shares = [m.edit.to_peft(tmp_path / "lora", rank).values() for rank in ranks]
    assert all(a > b > c for a, b, c in zip(*shares, strict=True)) and max(shares[-1]) < 1e-12


@both
@some
def test_another_base_is_refused_by_name(name, kind):
    edit, other = made(name, kind).edit, random_model(kind, seed=1)
    for act in (edit.apply, lambda lm: edit.applied(lm).__enter__()):
        with pytest.raises(
            ProvenanceError,
            match=rf"{edit.modules[0]} of 'random-{kind}' has SHA-256 .* but the edit was made on "
            rf"{edit.record.weights[edit.modules[0]][:12]}",
        ):
            act(other)
    edit.apply(other, check=False)


@both
@some
def test_zero_requests_cannot_be_exported(name, kind):
    m = made(name, kind)
    edit, after = m.editor.step(m.lm, [], m.editor.init(m.lm, m.statistics))
    assert m.editor.finish(m.lm, after) is None
    with pytest.raises(ParameterError, match="zero requests"):
        edit.to_peft("nowhere")


@closed
@some
def test_a_second_batch_remembers_the_first_if_the_method_does(name, kind):
    lm, first = random_model(kind), {}
    given = editor(name, lm)
    start = given.init(lm, known(kind))
    untouched = copy.deepcopy(start)
    one, state = given.step(lm, REQUESTS, start)
    reader = KeyReader(lm, REQUESTS, start.contexts, LAYERS[-1], flat=given.context_rule.flat)
    with lm.scratch(one.modules):
        for update, layer in zip(one.updates, LAYERS, strict=True):
            first[layer] = reader.read(layer)[0]
            lm.add(update.module, update)
    probe = torch.randn(4, lm.shape(one.modules[0])[1], dtype=torch.float64)
    for layer in LAYERS:
        expected = condition(start.metrics[layer], first[layer]) if given.remember else start.metrics[layer]
        torch.testing.assert_close(state.metrics[layer].apply(probe), expected.apply(probe))
        assert torch.equal(start.metrics[layer].apply(probe), untouched.metrics[layer].apply(probe)), (
            "a state is a value"
        )
    assert (state.edits, state.contexts, start.edits) == (3, start.contexts, 0)

    one.apply(lm)
    two, _ = given.step(lm, LATER, state)
    forgetful, _ = given.step(lm, LATER, replace(state, metrics=start.metrics))
    leak, loud = ((e.updates[0].delta @ first[LAYERS[0]].T).norm() for e in (two, forgetful))
    assert (leak < loud * (1 - 1e-4)) if given.remember else leak == loud, "what was written is disturbed less"
    two.apply(lm)
    fresh = random_model(kind)
    both = total([one, two])
    assert (
        both.record.requests == ("a", "b", "c", "d", "e")
        and both.record.weights == one.record.weights
        and both.modules == one.modules
    )
    both.apply(fresh)
    for module in both.modules:
        torch.testing.assert_close(fresh.weight(module), lm.weight(module), rtol=1e-12, atol=1e-12)


# What bad input gets

torn = EditRequest("{}fore is a word", "There", "Rome", "torn")
twin = replace(REQUESTS[0], id="twin")


def poisoned(lm):
    """Every weight is finite; what the last block makes of them is not."""
    weight = lm.model.state_dict()[
        f"{lm.architecture.block.format(3)}.mlp."
        + ("c_proj.weight" if lm.name == "random-gpt2" else "gate_proj.weight")
    ]
    weight.fill_(torch.finfo(weight.dtype).max)


BAD = {
    "subject inside a token": (RequestError, "ends inside the token", {"requests": [*REQUESTS, torn]}),
    "twice": (RequestError, "'twin' is a duplicate of request 'a'", {"requests": [*REQUESTS, twin]}),
    "no statistics of a layer": (StatisticsError, "no key statistics of layer 3; found \\[1, 2\\]", {"layers": (1, 3)}),
    "other model's statistics": (
        StatisticsError, "dimension 20, the keys of 'random-.*' have .*another model",
        {"statistics": {i: KeyStatistics(torch.eye(20).double(), 99) for i in LAYERS}}
    ),
    "layer out of range": (
        ParameterError, "layer 9 does not exist",
        {"layers": (9,), "statistics": {9: KeyStatistics(torch.eye(20).double(), 99)}}
    ),
    "loss not finite": (NumericalError, "not finite at step 0", {"model": poisoned}),
    "a failing solve": (ZeroDivisionError, "second layer", {"solve": ZeroDivisionError}),
    "quantized weights": (
        ArchitectureError, "quantized",
        {
            "model": lambda lm: setattr(
                lm.write(1), "weight", torch.nn.Parameter(lm.write(1).weight.to(torch.int8), requires_grad=False)
            )
        }
    ),
}

CLOSED_ONLY = {  # gradients need neither a subject's place, nor layers, nor key statistics
    "subject inside a token", "no statistics of a layer", "other model's statistics", "layer out of range"
}


@some
@pytest.mark.parametrize("name, what", [(n, w) for n in EVERY for w in BAD if n in METHODS or w not in CLOSED_ONLY])
def test_after_an_error_the_model_is_bit_identical_and_nothing_is_on_disk(
    name, kind, what, tmp_path, empty_cache, monkeypatch
):
    error, said, changes = BAD[what]
    monkeypatch.chdir(tmp_path)
    lm = random_model(kind)
    given = editor(name, lm, layers=changes.get("layers", LAYERS), contexts=("{}", "So. {}"))
    changes.get("model", lambda _: None)(lm)
    before, calls = fingerprint(lm.model), []
    place, called = (metake.editing.gradient.editor, "factors") if name in RULES else (metake.editing.keys, "solve")
    solve = getattr(place, called)

    def failing(*args):
        calls.append(fingerprint(lm.model) != before)
        if len(calls) == 2:
            raise changes["solve"]("in the second layer")
        return solve(*args)

    if "solve" in changes:
        monkeypatch.setattr(place, called, failing)
    with pytest.raises(error, match=said):
        given.edit(lm, changes.get("requests", REQUESTS), changes.get("statistics", known(kind)))
    assert fingerprint(lm.model) == before
    assert calls == ([False, True] if "solve" in changes else []), "the first layer had been written"
    assert not contents(tmp_path) and not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in lm.model.modules()
    )


@closed
def test_statistics_that_leave_no_room_are_refused_never_run(name):
    lm, given = random_model("llama"), editor(name, None)
    metric = given.metric
    full, few = (
        KeyStatistics(torch.eye(48).double() * 100, 100), KeyStatistics(torch.diag(torch.arange(48).double()), 48)
    )
    if isinstance(metric, null_space):
        bad, said = full, "null space is empty: none of 48 eigenvalues .* lies under threshold=0.02"
    else:
        bad, said = few, "second moment of 48 keys of dimension 48 is numerically singular"
    if getattr(metric, "ridge", 0.0) and bad is few:  # λC + ρI is regular whatever C is
        assert given.edit(lm, REQUESTS, dict.fromkeys(LAYERS, bad)).updates[0].delta.any()
        return
    with pytest.raises(StatisticsError, match=said):
        given.edit(lm, REQUESTS, dict.fromkeys(LAYERS, bad))
