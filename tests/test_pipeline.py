"""One step of every closed-form editor is the literal algorithm: Stage I one request at a time, a replaced weight in the
refinement, d×d solves and full rereads in Stage II, and past keys that later batches remember."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import reference
import torch
from models import random_model
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)
from test_bilevel import text_statistics
from torch import Tensor

from metake.bilevel import Refinement
from metake.editor import Editor
from metake.errors import NumericalError
from metake.geometry import KeyStatistics, inverse_covariance, null_space
from metake.model import LanguageModel
from metake.targets import TargetRule

pytestmark = pytest.mark.usefixtures("double_inside")
LAYERS = (0, 1, 2)
RULE = TargetRule(steps=4, step_size=0.3, stop_below=5.5)
MEMIT = Editor(LAYERS, inverse_covariance(0.05), RULE, contexts=CONTEXTS)
ALPHAEDIT = replace(MEMIT, metric=null_space(3e-2, 0.5), remember=True)
LOOK_AHEAD = Refinement(steps=3, step_size=0.05)
EDITORS = {
    "memit": MEMIT,
    "memit_seq": replace(MEMIT, remember=True),
    "alphaedit": ALPHAEDIT,
    "metake": replace(ALPHAEDIT, refine=LOOK_AHEAD),
    "metake, key-only gate": replace(ALPHAEDIT, refine=replace(LOOK_AHEAD, gate="key_only")),
    "metake v1": replace(MEMIT, metric=inverse_covariance(0.05, 0.01), refine=LOOK_AHEAD),
    "one layer, exact": replace(MEMIT, layers=(1,), noise=0.0, refine=LOOK_AHEAD),
    "whole residual": replace(MEMIT, allocation=lambda index, count: 1.0),
}


@cache
def small(kind: str) -> tuple[LanguageModel, dict[int, KeyStatistics]]:
    lm = random_model(kind)
    return lm, text_statistics(lm, LAYERS)


def literal_step(lm: LanguageModel, requests, editor: Editor, statistics: dict[int, KeyStatistics], past: dict[int, Tensor]) -> tuple[dict, dict]:
    """Δ and K per layer of one batch; past: Kₚ per layer."""
    last, metric = editor.layers[-1], editor.metric
    C = {layer: statistics[layer].covariance for layer in editor.layers}

    def update(layer: int, K: Tensor, R: Tensor) -> Tensor:
        Kp = past[layer] if editor.remember else K[:, :0]
        if isinstance(metric, null_space):
            return reference.alphaedit_code(K, R, reference.projector(C[layer], metric.threshold), metric.ridge, Kp)
        C_total = metric.weight * C[layer] + metric.ridge * reference.eye(len(K))
        if not editor.noise:
            return reference.emmet(K, R, C_total, 0.0)
        share = len(editor.layers) - editor.layers.index(layer) if editor.allocation(0, 2) == 1 else 1
        return reference.memit(K, R * share, C_total, 1.0, Kp)

    planned = [reference.stage_one(lm, r, editor.contexts, last, editor.target) for r in requests]
    H = torch.stack([h for h, _, _ in planned], 1)
    V = H + torch.stack([delta for _, delta, _ in planned], 1)
    if editor.refine:
        K = reference.keys(lm, requests, editor.contexts, last)
        if editor.refine.gate == "key_only":
            M = reference.gate_key_only(K, metric.ridge)
        else:  # the gate is what writes the identity
            M = update(last, K, reference.eye(K.shape[1]))
        V, _ = reference.refinement(lm, requests, editor.contexts, last, H, V, M, editor.refine)
    return reference.stage_two(lm, requests, editor.contexts, editor.layers, V, update)


@pytest.mark.parametrize("name, kind", [
    *((name, "qwen3") for name in EDITORS), ("alphaedit", "gpt2"), ("metake", "gpt2"), ("metake", "gptj"), ("metake", "llama"),
])  # fmt: skip
def test_two_batches_are_the_literal_algorithm(name: str, kind: str):
    (lm, statistics), editor = small(kind), EDITORS[name]
    state = editor.init(lm, statistics)
    past = {layer: torch.zeros(statistics[layer].dim, 0, dtype=torch.float64) for layer in editor.layers}
    kept = {layer: reference.weight(lm, layer).detach().clone() for layer in editor.layers}
    try:
        for requests in (REQUESTS[:3], REQUESTS[3:]):
            with reference.unchanged(lm):
                edit, state = editor.step(lm, requests, state)
            deltas, keys = literal_step(lm, requests, editor, statistics, past)
            assert edit.modules == tuple(lm.write_path(layer) for layer in editor.layers)
            for update, layer in zip(edit.updates, editor.layers, strict=True):
                assert (update.delta - deltas[layer]).norm() <= 1e-9 * deltas[layer].norm() > 0
                assert update.rank == len(requests)
                reference.weight(lm, layer).data += reference.stored(lm, layer, deltas[layer])
            past = {layer: torch.cat([past[layer], keys[layer]], 1) for layer in editor.layers}
        assert state.edits == 5
    finally:
        for layer, weight in kept.items():
            reference.weight(lm, layer).data.copy_(weight)


def test_the_parts_that_differ_give_different_updates():
    lm, statistics = small("qwen3")
    first = {name: torch.cat([u.delta.flatten() for u in editor.edit(lm, REQUESTS[:3], statistics).updates]) for name, editor in EDITORS.items() if editor.layers == LAYERS}
    assert torch.equal(first.pop("memit_seq"), first["memit"])  # a first batch has nothing to remember
    for name, delta in first.items():
        assert all((delta - other).norm() > 1e-4 * delta.norm() for other_name, other in first.items() if other_name != name)


@pytest.mark.parametrize("name", EDITORS)
def test_zero_requests_give_a_zero_update(name: str):
    (lm, statistics), editor = small("qwen3"), EDITORS[name]
    before = editor.init(lm, statistics)
    with reference.unchanged(lm):
        edit, after = editor.step(lm, [], before)
    assert [tuple(u.delta.shape) for u in edit.updates] == [(32, 48)] * len(editor.layers)
    assert all(not u.delta.any() and u.rank == 0 for u in edit.updates)
    assert after.metrics == before.metrics and after.edits == 0


def test_an_error_in_the_middle_of_stage_two_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    lm, statistics = small("gpt2")
    written = []

    def fail(*_):
        written.append(not torch.equal(before, lm.weight(lm.write_path(0))))
        if len(written) == 2:
            raise NumericalError("a fault")
        return 0.5

    before = lm.weight(lm.write_path(0)).clone()
    with reference.unchanged(lm), pytest.raises(NumericalError, match="a fault"):
        replace(ALPHAEDIT, allocation=fail).edit(lm, REQUESTS[:2], statistics)
    assert written == [False, True]  # the first layer had been written when the fault came
