"""MetaKE's outer level: looking ahead by moving block outputs is really replacing W_L by W_L + R M,
every option of it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import NamedTuple

import pytest
import reference
import torch
from models import CONFIGS, random_model, text_statistics
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)
from torch import Tensor

from metake.algebra.geometry import Isotropic, inverse_covariance, null_space
from metake.algebra.solve import gate
from metake.editing.bilevel import refine
from metake.editing.editor import Editor
from metake.editing.keys import KeyReader
from metake.editing.outer import LastLayer, Refinement
from metake.editing.targets import TargetRule, Targets, optimize_targets
from metake.language.model import LanguageModel
from metake.support.errors import NumericalError, ParameterError

pytestmark = pytest.mark.usefixtures("double_inside", "as_in_large_batches")
LAYER, BATCH = 1, REQUESTS[:3]
STAGE_ONE = TargetRule(steps=4, step_size=0.3, stop_below=0.0)
RULE = Refinement(steps=3, step_size=0.05, keep="last")


class Start(NamedTuple):
    lm: LanguageModel
    targets: Targets
    gate: Tensor


@cache
def start(kind: str, bos: bool | None = None) -> Start:
    """Stage I and a gate that couples the requests, with keys of the model."""
    lm = random_model(kind, bos=bos)
    targets = optimize_targets(lm, BATCH, CONTEXTS, LAYER, STAGE_ONE)
    keys = reference.keys(lm, BATCH, CONTEXTS, LAYER).T
    return Start(lm, targets, gate(keys, Isotropic(keys.shape[1], keys.square().sum(1).mean().item() / 3)))


def literal(s: Start, rule: Refinement) -> tuple[Tensor, Tensor]:
    """V and the losses of the look-ahead through a model whose weight is replaced."""
    H, V = s.targets.anchor.T, s.targets.value.T
    return reference.refinement(s.lm, BATCH, CONTEXTS, V, reference.last_layer(s.lm, LAYER, H, s.gate), rule)


def assert_is_literal(s: Start, rule: Refinement) -> Targets:
    with reference.unchanged(s.lm):
        found = refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, rule)
    V, losses = literal(s, rule)
    assert (found.value.T - V).abs().max() <= 1e-8
    names = ("edit", "locality", "anchor")
    traced = torch.tensor(
        [[[step[name] for name in names] for step in t["refine"]] for t in found.trace], dtype=torch.float64
    )
    assert (traced.transpose(0, 1) - losses).abs().max() <= 1e-8
    assert torch.equal(found.anchor, s.targets.anchor) and found.layer == LAYER and found.planned.dtype == torch.float64
    assert [t["loss"] for t in found.trace] == [t["loss"] for t in s.targets.trace]
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_look_ahead_is_a_replaced_weight(kind: str):
    s = start(kind)
    found = assert_is_literal(s, RULE)
    moved = (found.planned - s.targets.planned).abs().amax(1)
    assert moved.min() > 0.02  # every request's plan moves
    losses = [sum(step["edit"] for step in steps) for steps in zip(*(t["refine"] for t in found.trace), strict=True)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind, bos", [("gpt2", True), ("qwen3", True), ("llama", False)])
def test_with_and_without_bos(kind: str, bos: bool):
    assert_is_literal(start(kind, bos), RULE)


CHANGES = {
    "steps": [1, 5],
    "step_size": [0.2],
    "optimizer": ["sgd"],
    "edit_weight": [0.0, 3.0],
    "locality_weight": [0.0, 5.0],
    "anchor_weight": [0.0, 5.0],
    "anchor_norm": ["mean", "relative"],
    "locality_direction": ["pre_post"],
    "locality_position": ["final"],
    "prompts": ["plain"],
    "feedback": [False],
}
# the next two tests, those of what is kept, and of the whole look-ahead (test_hypergradient)
ELSEWHERE = {"tokens", "gate", "keep", "look_ahead", "gates"}


@pytest.mark.parametrize("change", [{name: value} for name, values in CHANGES.items() for value in values], ids=str)
def test_every_field_changes_the_result_as_it_says(change: dict):
    s = start("phi")
    found = assert_is_literal(s, replace(RULE, **change))
    assert (found.planned - refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, RULE).planned).abs().max() > 1e-5


def test_no_field_is_left_untested():
    assert {f.name for f in fields(Refinement)} == CHANGES.keys() | ELSEWHERE


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_micro_batches_do_not_change_the_result(kind: str):
    s = start(kind)
    whole, *parts = (refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, replace(RULE, tokens=t)) for t in (10**6, 1, 40))
    for part in parts:
        assert (part.planned - whole.planned).abs().max() <= 1e-10


@pytest.mark.parametrize(
    "metric, ridge", [(null_space(1e-2, 0.5), 0.5), (inverse_covariance(0.05, 0.02), 0.02)],
    ids=["null space", "inverse covariance"]
)
def test_the_gate_is_the_structural_one_or_that_of_the_keys_alone(metric, ridge: float):
    lm = start("gptj").lm
    editor = Editor((0, LAYER), metric, STAGE_ONE, refine=RULE, contexts=CONTEXTS, remember=True)
    past, state = REQUESTS[3:], editor.init(lm, text_statistics(lm, (0, LAYER)))
    _, state = editor.step(lm, past, state)
    K, C = reference.keys(lm, BATCH, CONTEXTS, LAYER), text_statistics(lm, [LAYER])[LAYER].covariance
    structural = editor._frozen_gate(KeyReader(lm, BATCH, CONTEXTS, LAYER), state, LAYER)
    Kp = state.keys[LAYER].T
    assert Kp.shape == (64, 2)
    if isinstance(metric, null_space):
        expected = reference.gate_b3(K, reference.projector(C, metric.threshold), ridge, Kp)
    else:
        expected = reference.gate_v1(K, metric.weight * C + Kp @ Kp.T, ridge)
    assert (structural - expected).norm() <= 1e-9 * expected.norm()
    key_only = replace(editor, refine=replace(RULE, gate="key_only"))._frozen_gate(
        KeyReader(lm, BATCH, CONTEXTS, LAYER), state, LAYER
    )
    expected = reference.gate_key_only(K, ridge)
    assert (key_only - expected).norm() <= 1e-9 * expected.norm()
    assert (key_only - structural).norm() > 1e-2 * structural.norm()


def test_the_gradient_is_the_task_signal_times_the_gate():
    """Eq. 9: one step of gradient descent moves V by −η ∂(L_edit + L_loc)/∂W̃ Mᵀ; the anchor adds nothing at v_init."""
    s = start("llama")
    found = refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, Refinement(steps=1, step_size=0.1, optimizer="sgd"))
    name = s.lm.write_path(LAYER) + ".weight"
    edited = {name: (reference.weight(s.lm, LAYER) + s.targets.planned.T @ s.gate).requires_grad_()}
    total = 0
    for i, r in enumerate(BATCH):
        before = reference.drift(s.lm, r, {}, "subject").detach()
        v = s.targets.value[i]
        total = total + reference.outer_loss(s.lm, r, CONTEXTS, edited, before, v, v, RULE).sum()
    (G,) = torch.autograd.grad(total, list(edited.values()))
    expected = -0.1 * G @ s.gate.T
    assert (found.planned.T - s.targets.planned.T - expected).norm() <= 1e-9 * expected.norm() > 0


def test_requests_meet_in_the_look_ahead():
    """The virtual weight holds all requests' updates: another request's plan changes this one's refinement."""
    s = start("gpt2")
    other = replace(s.targets, planned=s.targets.planned * torch.tensor([[1.0], [1.0], [-2.0]], dtype=torch.float64))
    one, two = (refine(s.lm, BATCH, CONTEXTS, t, s.gate, RULE).planned[0] for t in (s.targets, other))
    assert (one - two).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_without_feedback_the_plan_stays_where_it_was_to_the_bit(kind: str, optimizer: str):
    s = start(kind)
    found = refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, Refinement(steps=15, optimizer=optimizer, feedback=False))
    assert torch.equal(found.planned, s.targets.planned)
    assert all(
        len(t["refine"]) == 16 and t["refine"][0] == t["refine"][-1] and t["refine"][0]["edit"] > 0 for t in found.trace
    )


def test_nothing_to_refine():
    s = start("gpt2")
    assert refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, Refinement(steps=0)) is s.targets
    none = Targets(LAYER, s.targets.anchor[:0], s.targets.planned[:0])
    assert refine(s.lm, [], CONTEXTS, none, s.gate[:0], RULE).planned.shape == (0, 32)


def test_plans_without_a_trace_get_one():
    s = start("gpt2")
    found = refine(s.lm, BATCH, CONTEXTS, replace(s.targets, trace=()), s.gate, RULE)
    assert [len(t["refine"]) for t in found.trace] == [4, 4, 4]


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_model_as_it_was():
    s = start("gpt2")
    planned = s.targets.planned.clone()
    planned[1] = float("inf")
    with (
        reference.unchanged(s.lm),
        pytest.raises(NumericalError, match="is not finite at step 0; try a smaller step_size"),
    ):
        refine(s.lm, BATCH, CONTEXTS, replace(s.targets, planned=planned), s.gate, RULE)


@pytest.mark.parametrize(
    "name, near, meant",
    [
        ("optimizer", "adamm", "adam"), ("anchor_norm", "means", "mean"),
        ("locality_direction", "post-pre", "post_pre"), ("locality_position", "subjects", "subject"),
        ("prompts", "context", "contexts"), ("gate", "keyonly", "key_only"), ("look_ahead", "wholes", "whole"),
        ("gates", "frosen", "frozen"), ("keep", "beste", "best")
    ],
)
def test_an_unknown_choice_is_answered_with_a_near_match(name: str, near: str, meant: str):
    with pytest.raises(ParameterError, match=f"unknown {name} '{near}'. Did you mean '{meant}'"):
        Refinement(**{name: near})


@pytest.mark.parametrize("step_size, best", [(0.002, 3), (30.0, 0)])
def test_the_best_plan_that_was_tried_is_kept_or_the_last(step_size: float, best: int, caplog):
    """A step that is too long loses nothing, and says so; the literal algorithm ends where it ends."""
    caplog.set_level("WARNING", "metake.editing")  # a page that ran before in this process asks for less
    s = start("llama")
    for keep, number in (("best", best), ("last", 3)):
        caplog.clear()
        found = assert_is_literal(s, replace(RULE, step_size=step_size, keep=keep))
        ends = [t["refined"] for t in found.trace]
        assert {end["kept"] for end in ends} == {number}
        for trace, end in zip(found.trace, ends, strict=True):
            steps = [sum(step.values()) for step in trace["refine"]]
            assert end["before"] == pytest.approx(steps[0]) and end["after"] == pytest.approx(steps[number])
        fell = sum(end["after"] < end["before"] for end in ends)
        assert (fell == 3) == (number == 3 and best == 3)
        said = [record.getMessage() for record in caplog.records]
        assert said == [] if fell == 3 else f"lowered the outer loss for {fell} of 3 requests only" in said[0]
    lost = refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, replace(RULE, step_size=30.0, keep="best"))
    assert torch.equal(lost.planned, s.targets.planned)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_line_search_tries_so_many_plans_and_ends_at_the_lowest(steps: int):
    s = start("llama")
    rule = Refinement(steps=steps, step_size=1.0, optimizer="lbfgs", anchor_norm="relative")
    found = refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, rule)
    totals = [sum(sum(step.values()) for step in at) for at in zip(*(t["refine"] for t in found.trace), strict=True)]
    kept = found.trace[0]["refined"]["kept"]
    assert len(totals) == steps + 1 and kept > 0 and totals[kept] == min(totals) < totals[0]
    again = LastLayer(s.lm, BATCH, CONTEXTS, s.targets, s.gate, rule).evaluate(found.value)[0]
    assert again.item() == pytest.approx(totals[kept], rel=1e-10)


def test_a_plan_at_rest_is_left_there():
    s = start("gpt2")
    rule = Refinement(steps=4, step_size=1.0, optimizer="lbfgs", edit_weight=0.0, locality_weight=0.0)
    found = refine(s.lm, BATCH, CONTEXTS, s.targets, s.gate, rule)
    assert torch.equal(found.planned, s.targets.planned) and len(found.trace[0]["refine"]) == 1


@pytest.mark.parametrize("change", [{"steps": -1}, {"step_size": 0}, {"tokens": 0}], ids=str)
def test_numbers_out_of_range_are_refused(change: dict):
    with pytest.raises(ParameterError, match="steps must be ≥ 0, step_size > 0 and finite, tokens ≥ 1"):
        Refinement(**change)
