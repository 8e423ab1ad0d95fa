"""Stage I: batched, resumed in the middle of the model and cached, it is the literal optimization of one request at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial

import pytest
import reference
import torch
from models import CONFIGS, random_model
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)

from metake.errors import NumericalError, ParameterError, RequestError
from metake.model import LanguageModel
from metake.requests import EditRequest
from metake.targets import TargetRule, Targets, optimize_targets
from metake.tokens import buckets

pytestmark = pytest.mark.usefixtures("double_inside")
LAYER = 1
RULE = TargetRule(steps=8, step_size=0.3, decay=0.02, clamp=1.5, stop_below=0.0)


@cache
def small(kind: str, bos: bool | None = None) -> LanguageModel:
    return random_model(kind, bos=bos)


def steps(targets: Targets) -> list[int]:
    return [len(t["loss"]) for t in targets.trace]


def literal(lm: LanguageModel, requests, rule: TargetRule, contexts=CONTEXTS, layer: int = LAYER) -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    anchors, deltas, losses = zip(*(reference.stage_one(lm, r, contexts, layer, rule) for r in requests), strict=True)
    return torch.stack(anchors), torch.stack(deltas), list(losses)


def assert_is_literal(lm: LanguageModel, found: Targets, requests, rule: TargetRule, **other) -> None:
    anchor, planned, losses = literal(lm, requests, rule, **other)
    assert [len(x) for x in losses] == steps(found)
    for trace, expected in zip(found.trace, losses, strict=True):
        assert trace["loss"] == pytest.approx(expected, abs=1e-9)
        assert len(trace["nll"]) == len(trace["kl"]) == len(expected) and min(trace["kl"]) >= -1e-12 and trace["kl"][0] == 0
    assert (found.anchor - anchor).abs().max() <= 1e-10
    assert (found.planned - planned).abs().max() <= 1e-9
    assert torch.equal(found.value, found.anchor + found.planned)


def staggered(lm: LanguageModel, rule: TargetRule = RULE) -> TargetRule:
    """`rule` with the threshold, halfway between two losses, that requests reach at the most different steps."""
    traces = [t["loss"] for t in optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule).trace]
    losses = sorted(x for t in traces for x in t)
    levels = [(low + high) / 2 for low, high in itertools.pairwise(losses) if high - low > 1e-3]
    stops = {level: {next((s for s, x in enumerate(t) if x < level), rule.steps - 1) for t in traces} for level in levels}
    return replace(rule, stop_below=max(levels, key=lambda level: len(stops[level])))


@pytest.mark.parametrize("kind", CONFIGS)
def test_batched_and_cached_is_literal_with_stops_at_different_steps(kind: str):
    lm = small(kind)
    rule = staggered(lm)
    with reference.unchanged(lm):
        found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    assert len(set(steps(found))) >= 3 and min(steps(found)) < rule.steps
    assert found.layer == LAYER and found.planned.dtype == torch.float64
    assert_is_literal(lm, found, REQUESTS, rule)


@pytest.mark.parametrize("kind, bos", [("gpt2", True), ("llama", False), ("phi", True)])
def test_subjects_at_position_0_and_after_a_bos(kind: str, bos: bool):
    """All rows of one request have an empty prefix without BOS; beside requests with long ones, theirs is masked padding."""
    lm, requests = small(kind, bos), (REQUESTS[2], REQUESTS[0])
    assert reference.lookup(lm, requests[0].prompt, requests[0].subject) == int(bos)
    for batch in (requests, requests[:1]):
        found = optimize_targets(lm, batch, ("{}",), LAYER, RULE)
        assert_is_literal(lm, found, batch, RULE, contexts=("{}",))
        assert found.planned.norm(dim=1).min() > 0


def test_attention_windows_shorter_than_the_rows():
    lm = random_model("mistral")
    wide = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, RULE)
    lm.model.config.sliding_window = 5
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, RULE)
    assert_is_literal(lm, found, REQUESTS, RULE)
    assert (found.planned - wide.planned).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_at_the_first_and_the_last_block(layer: int):
    """Above the last block no attention follows: only a target that is read at the lookup position can move its plan."""
    lm, requests = small("qwen3"), REQUESTS if layer < 3 else REQUESTS[3:4]
    found = optimize_targets(lm, requests, CONTEXTS, layer, RULE)
    assert_is_literal(lm, found, requests, RULE, layer=layer)
    assert found.planned.norm(dim=1).min() > 0.5


@pytest.mark.parametrize("change", [{"steps": 1}, {"steps": 3}, {"step_size": 0.05}, {"kl_weight": 3.0}, {"decay": 20.0}, {"clamp": 0.1}, {"stop_below": 5.5}], ids=str)
def test_every_number_of_the_rule_means_what_the_family_means(change: dict):
    lm, rule = small("gptj"), replace(RULE, **change)
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    assert_is_literal(lm, found, REQUESTS, rule)
    assert (found.planned - optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, RULE).planned).norm() > 1e-3


def test_the_clamp_bounds_every_plan_and_is_reached():
    lm, rule = small("llama"), replace(RULE, step_size=0.5, clamp=0.2)
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    share = found.planned.norm(dim=1) / found.anchor.norm(dim=1)
    assert share.max() <= 0.2 + 1e-12 and share.max() == pytest.approx(0.2)
    free = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, replace(rule, clamp=1e9))
    assert (free.planned.norm(dim=1) / free.anchor.norm(dim=1)).min() > 0.2


def test_the_plan_teaches_the_target():
    found = optimize_targets(small("qwen2"), REQUESTS, CONTEXTS, LAYER, RULE)
    assert all(t["nll"][-1] < t["nll"][0] - 0.15 for t in found.trace)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "mistral"])
def test_the_result_does_not_depend_on_micro_batches_or_on_the_batch(kind: str):
    lm = small(kind)
    rule = staggered(lm)
    whole = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    others = [optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, replace(rule, tokens=t)) for t in (1, 40)]
    alone = [optimize_targets(lm, [r], CONTEXTS, LAYER, rule) for r in REQUESTS]
    backward = optimize_targets(lm, REQUESTS[::-1], CONTEXTS, LAYER, rule)
    for planned, counts in [
        *((o.planned, steps(o)) for o in others),
        (torch.cat([t.planned for t in alone]), [steps(t)[0] for t in alone]),
        (backward.planned.flip(0), steps(backward)[::-1]),
    ]:
        assert counts == steps(whole)
        assert (planned - whole.planned).abs().max() <= 1e-9


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_begin_with_padding_stay_finite(dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch):
    """Aligning rows pads them on the left, and a padding query sees no key at all: no NaN may come out of it."""
    monkeypatch.undo()  # of `double_inside`: the float32 softmax of a row of float64's smallest numbers is what makes NaN
    lm = random_model("llama")
    lm.model.to(dtype).set_attn_implementation(implementation)
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, replace(RULE, steps=3))
    expected = optimize_targets(small("llama"), REQUESTS, CONTEXTS, LAYER, replace(RULE, steps=3))
    assert found.planned.isfinite().all() and found.planned.dtype == torch.float64
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.1)  # of the first loss, before steps amplify rounding
    assert [t["loss"][0] for t in found.trace] == pytest.approx([t["loss"][0] for t in expected.trace], rel=tolerance)


def test_only_what_a_plan_can_still_change_is_computed(monkeypatch):
    """No block up to the plant after the first forward, no position before the subject's end, no finished request."""
    monkeypatch.setattr("metake.plant.buckets", partial(buckets, waste=1.0))  # one bucket: rows are counted
    lm = small("qwen2")
    rule, seen = staggered(lm), {0: [], LAYER: [], LAYER + 1: []}
    handles = [
        lm.model.get_submodule(lm.architecture.mlp.format(layer)).register_forward_hook(lambda _, args, __, shapes=shapes: shapes.append(args[0].shape[:2]))
        for layer, shapes in seen.items()
    ]
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    for handle in handles:
        handle.remove()
    shared, whole, plain = seen[0]
    again, before, *later = seen[LAYER + 1]
    assert plain[0] == len(REQUESTS), "and once more the plain prompts, for what stands there now"
    assert seen[LAYER] == [shared, whole, plain] and again == shared and whole[0] == len(REQUESTS) * (len(CONTEXTS) + 1) == before[0]
    assert shared[0] == len(CONTEXTS) - 1, "one beginning for each sampled context"
    assert before[1] < whole[1], "above the plant, what stands before it is run once, what follows it in every step"
    still = [sum(n > step for n in steps(found)) for step in range(max(steps(found)))]
    assert [rows for rows, _ in later] == [n * (len(CONTEXTS) + 1) for n in still]
    assert len(set(still)) >= 3 and max(columns for _, columns in later) < shared[1] + whole[1]


def test_zero_requests():
    lm = small("gpt2")
    found = optimize_targets(lm, [], CONTEXTS, LAYER, RULE)
    assert found.anchor.shape == found.planned.shape == found.value.shape == (0, 32) and found.trace == () and found.layer == LAYER


@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_model_as_it_was(step: int, monkeypatch):
    monkeypatch.setattr("metake.plant.buckets", partial(buckets, waste=1.0))  # one bucket: calls are counted
    lm, calls = random_model("gpt2"), []

    def spoil(_, __, output):
        calls.append(1)
        return output * float("nan") if len(calls) > step + 2 else output  # two calls fill the caches: beginnings, rows

    handle = lm.block(3).register_forward_hook(spoil)
    with reference.unchanged(lm), pytest.raises(NumericalError, match=rf"request\(s\) \[0, 1\] is not finite at step {step}"):
        optimize_targets(lm, REQUESTS[:2], CONTEXTS, LAYER, RULE)
    handle.remove()
    assert optimize_targets(lm, REQUESTS[:2], CONTEXTS, LAYER, RULE).planned.isfinite().all()


def test_a_subject_that_ends_inside_a_token_is_refused_before_anything_runs():
    lm = small("gpt2")
    with reference.unchanged(lm), pytest.raises(RequestError, match="'Rome a' .* ends inside the token ' and'"):
        optimize_targets(lm, [REQUESTS[0], EditRequest("I think of {}nd Berlin", "Rome a", "Rome", "torn")], CONTEXTS, LAYER, RULE)


@pytest.mark.parametrize("change", [{"steps": 0}, {"step_size": 0}, {"clamp": 0}, {"tokens": 0}, {"kl_weight": -1}, {"decay": -1}, {"stop_below": -1}], ids=str)
def test_numbers_out_of_range_are_refused(change: dict):
    with pytest.raises(ParameterError, match=f"{next(iter(change))}=.* is out of range"):
        TargetRule(**change)


@pytest.mark.parametrize("tokens", [1, 24, 10**6])
def test_the_last_block_can_be_planned_for_where_the_prompt_ends_with_its_subject(tokens: int):
    """No block runs above it: rows with and without a shared beginning still go together."""
    lm, rule = random_model("gpt2"), replace(RULE, steps=3, stop_below=0.0, tokens=tokens)
    requests = [replace(REQUESTS[3], subject=subject, id=subject) for subject in ("Rome", "France", "Danielle Darrieux")]
    found = optimize_targets(lm, requests, CONTEXTS, lm.depth - 1, rule)
    for request, anchor, planned in zip(requests, found.anchor, found.planned, strict=True):
        h, delta, _ = reference.stage_one(lm, request, CONTEXTS, lm.depth - 1, rule)
        assert (anchor - h).abs().max() < 1e-9 and (planned - delta).abs().max() < 1e-8 * delta.norm()
