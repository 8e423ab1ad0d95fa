"""Stage I: batched, resumed in the middle of the model and cached, it is the literal optimization of one request at a
time.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import reference
import torch
from models import CONFIGS, random_model
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)

import metake.editing.targets
from metake.data.requests import EditRequest
from metake.editing.plant import HELD, chunks
from metake.editing.targets import TargetRule, Targets, optimize_targets
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.support.errors import NumericalError, ParameterError, RequestError

pytestmark = pytest.mark.usefixtures("double_inside", "as_in_large_batches")
LAYER = 1
RULE = TargetRule(steps=8, step_size=0.3, decay=0.02, clamp=1.5, stop_below=0.0)


@cache
def small(kind: str, bos: bool | None = None) -> LanguageModel:
    return random_model(kind, bos=bos)


def steps(targets: Targets) -> list[int]:
    return [len(t["loss"]) for t in targets.trace]


def literal(
    lm: LanguageModel, requests, rule: TargetRule, contexts=CONTEXTS, layer: int = LAYER
) -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    anchors, deltas, losses = zip(*(reference.stage_one(lm, r, contexts, layer, rule) for r in requests), strict=True)
    return torch.stack(anchors), torch.stack(deltas), list(losses)


def assert_is_literal(lm: LanguageModel, found: Targets, requests, rule: TargetRule, **other) -> None:
    anchor, planned, losses = literal(lm, requests, rule, **other)
    assert [len(x) for x in losses] == steps(found)
    for trace, expected in zip(found.trace, losses, strict=True):
        assert trace["loss"] == pytest.approx(expected, abs=1e-9)
        assert (
            len(trace["nll"]) == len(trace["kl"]) == len(expected)
            and min(trace["kl"]) >= -1e-12
            and trace["kl"][0] == 0
        )
    assert (found.anchor - anchor).abs().max() <= 1e-10
    assert (found.planned - planned).abs().max() <= 1e-9
    assert torch.equal(found.value, found.anchor + found.planned)


def dividing(traces: list[list[float]]) -> float:
    """The level, halfway between two values, that traces fall below at the most different steps."""
    values = sorted(x for t in traces for x in t if x < float("inf"))
    levels = [(low + high) / 2 for low, high in itertools.pairwise(values) if high - low > 1e-3]
    return max(levels, key=lambda level: len({next((s for s, x in enumerate(t) if x < level), None) for t in traces}))


def staggered(lm: LanguageModel, rule: TargetRule = RULE) -> TargetRule:
    """`rule` with a threshold that requests reach at different steps."""
    return replace(
        rule, stop_below=dividing([t["loss"] for t in optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule).trace])
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_batched_and_cached_is_literal_with_stops_at_different_steps(kind: str):
    lm = small(kind)
    rule = staggered(lm)
    with reference.unchanged(lm):
        found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    assert len(set(steps(found))) >= 3 and min(steps(found)) < rule.steps
    assert found.layer == LAYER and found.planned.dtype == torch.float64
    assert_is_literal(lm, found, REQUESTS, rule)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_vector_at_the_mlp_is_literal_with_stops_at_different_steps(kind: str):
    """ROME's: h is the MLP's own output, which bounds and weighs δ, not what the residual stream carries there."""
    lm = small(kind)
    rule = staggered(lm, replace(RULE, site="mlp", step_size=0.2, clamp=4.0))
    with reference.unchanged(lm):
        found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    assert len(set(steps(found))) >= 3 and min(steps(found)) < rule.steps
    assert_is_literal(lm, found, REQUESTS, rule)
    block = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, replace(rule, site="block"))
    assert (found.anchor - block.anchor).norm(dim=1).min() > 1e-2 and (found.planned - block.planned).norm() > 1e-2


@pytest.mark.parametrize("change", [{"clamp": 0.3}, {"decay": 20.0}, {"layer": 0}, {"layer": 3}], ids=str)
def test_numbers_of_a_vector_at_the_mlp(change: dict):
    lm, layer = small("gptj"), change.get("layer", LAYER)
    rule, requests = (
        replace(RULE, site="mlp", **{k: v for k, v in change.items() if k != "layer"}),
        REQUESTS if layer < 3 else REQUESTS[3:4],
    )
    found = optimize_targets(lm, requests, CONTEXTS, layer, rule)
    assert_is_literal(lm, found, requests, rule, layer=layer)
    assert found.planned.norm(dim=1).min() > 1e-2
    if "clamp" in change:
        assert torch.isclose(found.planned.norm(dim=1), 0.3 * found.anchor.norm(dim=1)).any()


# PMET: two vectors, a likelihood that counts less once it is certain, and a stop by drift

# where the subject ends the prompt, δ decides the first predicted token; the last three learn to be certain of it
PULLED = (
    REQUESTS[0], REQUESTS[2], REQUESTS[3],
    EditRequest("I fly the {}", "Boeing", "a", "boeing"), EditRequest("The capital of {}", "France", "is", "france"),
    EditRequest("The mother tongue of {}", "Danielle Darrieux", "was", "danielle"),
)  # fmt: skip
JOINT = TargetRule(
    steps=10, step_size=1.0, kl_weight=4.0, decay=0.02, clamp=8.0, stop_below=0.0, site="mlp+attention", relax=0.1,
    drift_below=0.0
)


def relaxed(found: Targets) -> list[list[bool]]:
    """Per request and step, whether the likelihood counted for less: the loss is then smaller than it."""
    return [[loss < nll for loss, nll in zip(t["loss"], t["nll"], strict=True)] for t in found.trace]


def drifting(found: Targets, rule: TargetRule) -> TargetRule:
    """`rule` with a bound on the drift that requests, once certain, reach at different steps."""
    certain = [[*r[1:], False] for r in relaxed(found)]  # at a step: it is the next one that counts less
    return replace(
        rule,
        drift_below=dividing(
            [
                [k * rule.kl_weight if c else float("inf") for k, c in zip(t["kl"], row, strict=True)]
                for t, row in zip(found.trace, certain, strict=True)
            ]
        ),
    )


@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_vectors_optimized_together_are_literal(kind: str, layer: int):
    lm = small(kind)
    free = optimize_targets(lm, PULLED, CONTEXTS, layer, JOINT)
    counts = relaxed(free)
    assert not any(map(any, counts[:3])), "a late subject decides nothing, and one certain token of seven is not enough"
    assert sum(map(any, counts)) >= 2 and not any(row[0] for row in counts)
    rule = drifting(free, JOINT)
    with reference.unchanged(lm):
        found = optimize_targets(lm, PULLED, CONTEXTS, layer, rule)
    stopped = [n for n in steps(found) if n < rule.steps]
    assert stopped and len(set(steps(found))) >= 2, "no request stopped by its drift"
    assert any(map(any, relaxed(found))), "no step counted the likelihood for less"
    assert_is_literal(lm, found, PULLED, rule, layer=layer)
    assert found.planned.shape == (len(PULLED), 32)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_likelihood_that_is_no_longer_certain_counts_in_full_again(kind: str):
    lm = small(kind)
    found = optimize_targets(lm, PULLED, CONTEXTS, LAYER, JOINT)
    assert any(False in row[row.index(True) :] for row in relaxed(found) if True in row)
    assert_is_literal(lm, found, PULLED, JOINT)


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_the_drift_is_compared_with_or_without_its_weight(kind: str):
    """PMET's own code compares λ_KL · KL with the bound, BLUE's copy KL."""
    lm = small(kind)
    weighted = drifting(optimize_targets(lm, PULLED, CONTEXTS, LAYER, JOINT), JOINT)
    plain = replace(weighted, drift_weighted=False)
    one, other = (optimize_targets(lm, PULLED, CONTEXTS, LAYER, rule) for rule in (weighted, plain))
    assert steps(one) != steps(other) and (one.planned - other.planned).norm() > 1e-3
    assert_is_literal(lm, other, PULLED, plain)


@pytest.mark.parametrize(
    "change",
    [
        {"clamp": 0.3}, {"decay": 20.0}, {"relax": 0.5}, {"relax": None}, {"kl_weight": 0.5}, {"steps": 3},
        {"stop_below": 4.0}, {"step_size": 0.3}
    ],
    ids=str,
)
def test_every_number_of_the_joint_rule_means_what_pmet_means(change: dict):
    lm, rule = small("gptj"), replace(JOINT, **change)
    found = optimize_targets(lm, PULLED, CONTEXTS, LAYER, rule)
    assert_is_literal(lm, found, PULLED, rule)
    assert (found.planned - optimize_targets(lm, PULLED, CONTEXTS, LAYER, JOINT).planned).norm() > 1e-3


def test_each_vector_has_a_clamp_of_its_own(monkeypatch: pytest.MonkeyPatch):
    lm, seen, update = small("qwen3"), [], metake.editing.targets._update

    def look(delta, optimizer, active, limit):
        update(delta, optimizer, active, limit)
        seen.append((delta.detach().norm(dim=-1), limit))

    monkeypatch.setattr(metake.editing.targets, "_update", look)
    optimize_targets(lm, PULLED, CONTEXTS, LAYER, replace(JOINT, clamp=0.5, steps=4))
    norm, limit = seen[-1]
    assert norm.shape == limit.shape == (2, len(PULLED))
    assert (norm <= limit * (1 + 1e-12)).all() and torch.isclose(norm, limit).any(dim=1).all(), "neither is reached"
    assert ((limit[0] - limit[1]).abs() > 1e-2).all(), "bounds of equal size tell nothing"


@pytest.mark.parametrize("tokens", [1, 40])
def test_two_vectors_do_not_depend_on_micro_batches_or_on_the_batch(tokens: int):
    lm = small("llama")
    rule = drifting(optimize_targets(lm, PULLED, CONTEXTS, LAYER, JOINT), JOINT)
    whole, small_ones = (optimize_targets(lm, PULLED, CONTEXTS, LAYER, replace(rule, tokens=t)) for t in (8192, tokens))
    alone = [optimize_targets(lm, [r], CONTEXTS, LAYER, rule) for r in PULLED]
    assert steps(small_ones) == steps(whole) == [steps(t)[0] for t in alone]
    assert (small_ones.planned - whole.planned).abs().max() <= 1e-9
    assert (torch.cat([t.planned for t in alone]) - whole.planned).abs().max() <= 1e-9


@pytest.mark.parametrize("site", ["mlp", "mlp+attention"])
def test_zero_requests_at_any_site(site: str):
    found = optimize_targets(small("gpt2"), [], CONTEXTS, 0, replace(RULE, site=site))
    assert found.anchor.shape == found.planned.shape == (0, 32) and found.trace == ()


@pytest.mark.parametrize("kind, bos", [("gpt2", True), ("llama", False), ("phi", True)])
def test_subjects_at_position_0_and_after_a_bos(kind: str, bos: bool):
    """All rows of one request have an empty prefix without BOS; beside requests with long ones,
    theirs is masked padding.
    """
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
    """Above the last block no attention follows: only a target that is read at the lookup position can move its
    plan.
    """
    lm, requests = small("qwen3"), REQUESTS if layer < 3 else REQUESTS[3:4]
    found = optimize_targets(lm, requests, CONTEXTS, layer, RULE)
    assert_is_literal(lm, found, requests, RULE, layer=layer)
    assert found.planned.norm(dim=1).min() > 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 1}, {"steps": 3}, {"step_size": 0.05}, {"kl_weight": 3.0}, {"decay": 20.0}, {"clamp": 0.1},
        {"stop_below": 5.5}
    ],
    ids=str,
)
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


def test_requests_are_optimized_in_chunks_of_whole_ones_of_similar_size():
    lm = small("gpt2")
    many = [replace(r, prompt="Rome " * k + r.prompt, id=f"{r.id}{k}") for r in REQUESTS for k in range(6)]
    batch = Rows.of(lm.tokenizer, many, CONTEXTS)
    whole = sum(len(row.ids) for row in (*batch.taught, *batch.watched))
    for tokens in (1, 40, whole // HELD // 3, whole // HELD + 1):
        found = chunks(batch, tokens)
        assert sorted(i for chunk in found for i in chunk) == list(range(len(many)))
        parts = [batch.pick(chunk) for chunk in found]
        held = [sum(len(row.ids) for row in (*part.taught, *part.watched)) for part in parts]
        assert all(size <= 1.5 * HELD * tokens or len(part) == 1 for part, size in zip(parts, held, strict=True))
        widths = [[len(row.ids) - row.lookup for row in part.rewriting(plain=True)] for part in parts]
        assert all(min(one) >= max(other) for one, other in itertools.pairwise(widths)), "padding would be computed"
    assert len(found) == 1 and len(chunks(batch, 1)) == len(many)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_begin_with_padding_stay_finite(
    dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    """Aligning rows pads them on the left, and a padding query sees no key at all: no NaN may come out of it."""
    # of `double_inside`: the float32 softmax of a row of float64's smallest numbers is what makes NaN
    monkeypatch.undo()
    lm = random_model("llama")
    lm.model.to(dtype).set_attn_implementation(implementation)
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, replace(RULE, steps=3))
    expected = optimize_targets(small("llama"), REQUESTS, CONTEXTS, LAYER, replace(RULE, steps=3))
    assert found.planned.isfinite().all() and found.planned.dtype == torch.float64
    # of the first loss, before steps amplify rounding
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.1)
    assert [t["loss"][0] for t in found.trace] == pytest.approx([t["loss"][0] for t in expected.trace], rel=tolerance)


def test_only_what_a_plan_can_still_change_is_computed(monkeypatch):
    """No block up to the plant after the first forward, no position before the subject's end, no finished request."""
    monkeypatch.setattr("metake.language.model.start_cost", lambda _: 10**6)  # one bucket: rows are counted
    lm = small("qwen2")
    rule, seen = staggered(lm), {0: [], LAYER: [], LAYER + 1: []}
    handles = [
        lm.model.get_submodule(lm.architecture.mlp.format(layer)).register_forward_hook(
            lambda _, args, __, shapes=shapes: shapes.append(args[0].shape[:2])
        )
        for layer, shapes in seen.items()
    ]
    found = optimize_targets(lm, REQUESTS, CONTEXTS, LAYER, rule)
    for handle in handles:
        handle.remove()
    shared, whole = seen[0]
    again, before, *later = seen[LAYER + 1]
    assert (
        seen[LAYER] == [shared, whole]
        and again == shared
        and whole[0] == len(REQUESTS) * (len(CONTEXTS) + 1) == before[0]
    )
    assert shared[0] == len(CONTEXTS) - 1, "one beginning for each sampled context"
    assert before[1] < whole[1], "above the plant, what stands before it is run once, what follows it in every step"
    still = [sum(n > step for n in steps(found)) for step in range(max(steps(found)))]
    assert [rows for rows, _ in later] == [n * (len(CONTEXTS) + 1) for n in still]
    assert len(set(still)) >= 3 and max(columns for _, columns in later) < shared[1] + whole[1]


def test_zero_requests():
    lm = small("gpt2")
    found = optimize_targets(lm, [], CONTEXTS, LAYER, RULE)
    assert (
        found.anchor.shape == found.planned.shape == found.value.shape == (0, 32)
        and found.trace == ()
        and found.layer == LAYER
    )


@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_model_as_it_was(step: int, monkeypatch):
    monkeypatch.setattr("metake.language.model.start_cost", lambda _: 10**6)  # one bucket: calls are counted
    lm, calls = random_model("gpt2"), []

    def spoil(_, __, output):
        calls.append(1)
        return output * float("nan") if len(calls) > step + 2 else output  # two calls fill the caches: beginnings, rows

    handle = lm.block(3).register_forward_hook(spoil)
    with (
        reference.unchanged(lm),
        pytest.raises(NumericalError, match=rf"request\(s\) \[0, 1\] is not finite at step {step}"),
    ):
        optimize_targets(lm, REQUESTS[:2], CONTEXTS, LAYER, RULE)
    handle.remove()
    assert optimize_targets(lm, REQUESTS[:2], CONTEXTS, LAYER, RULE).planned.isfinite().all()


def test_a_subject_that_ends_inside_a_token_is_refused_before_anything_runs():
    lm = small("gpt2")
    with reference.unchanged(lm), pytest.raises(RequestError, match="'Rome a' .* ends inside the token ' and'"):
        optimize_targets(
            lm, [REQUESTS[0], EditRequest("I think of {}nd Berlin", "Rome a", "Rome", "torn")], CONTEXTS, LAYER, RULE
        )


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"step_size": 0}, {"clamp": 0}, {"tokens": 0}, {"kl_weight": -1}, {"decay": -1},
        {"stop_below": -1}, {"relax": -0.1}, {"drift_below": -1}
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(change: dict):
    with pytest.raises(ParameterError, match=f"{next(iter(change))}=.* is out of range"):
        TargetRule(**change)


@pytest.mark.parametrize("tokens", [1, 24, 10**6])
def test_the_last_block_can_be_planned_for_where_the_prompt_ends_with_its_subject(tokens: int):
    """No block runs above it: rows with and without a shared beginning still go together."""
    lm, rule = random_model("gpt2"), replace(RULE, steps=3, stop_below=0.0, tokens=tokens)
    requests = [
        replace(REQUESTS[3], subject=subject, id=subject) for subject in ("Rome", "France", "Danielle Darrieux")
    ]
    found = optimize_targets(lm, requests, CONTEXTS, lm.depth - 1, rule)
    for request, anchor, planned in zip(requests, found.anchor, found.planned, strict=True):
        h, delta, _ = reference.stage_one(lm, request, CONTEXTS, lm.depth - 1, rule)
        assert (anchor - h).abs().max() < 1e-9 and (planned - delta).abs().max() < 1e-8 * delta.norm()


def test_an_unknown_site_is_answered_with_the_near_ones():
    with pytest.raises(ParameterError, match="unknown site 'atention'.*mlp"):
        TargetRule(site="atention")
