"""RECT's mask, SPHERE's softening and PRUNE's cap equal their published forms on full matrices,
and act when they should.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model, text_statistics
from reference import CONTEXTS, REQUESTS
from same import fingerprint
from torch import Tensor

from metake.algebra.geometry import inverse_covariance
from metake.algebra.postprocess import cap_spectrum, correction, keep_largest, soften_principal
from metake.algebra.update import LayerUpdate
from metake.editing.editor import Editor
from metake.editing.record import describe
from metake.editing.targets import TargetRule
from metake.support.errors import ParameterError, ProvenanceError

quick = settings(max_examples=60, deadline=None, derandomize=True)
MEMIT = Editor(
    (1, 2), inverse_covariance(0.05), TargetRule(steps=4, step_size=1.0, clamp=8.0, stop_below=0.0),
    contexts=CONTEXTS[:1]
)


def drawn(
    rows: int, columns: int, rank: int, scale: float, seed: int, dense: bool = False
) -> tuple[LayerUpdate, Tensor]:
    """A random update whose norm is `scale` next to that of a random weight."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    weight, left, right = normal(rows, columns), normal(rows, rank), normal(rank, columns)
    left = left * scale * weight.norm() / (left @ right).norm()
    return LayerUpdate("w", left, right, normal(rows, columns) * scale if dense else None), weight


@st.composite
def pairs(draw, scales: tuple[float, ...] = (0.1, 1.0, 10.0)) -> tuple[LayerUpdate, Tensor]:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return drawn(
        rows, columns, draw(st.integers(1, 12)), draw(st.sampled_from(scales)), draw(st.integers(0, 10**6)),
        draw(st.booleans())
    )


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


# RECT


@quick
@given(pairs())
def test_rect_as_in_alphaedits_repository(pair):
    update, weight = pair
    if update.delta.numel() >= 2:  # of a single entry the 60th percentile is none
        found = keep_largest()(update, weight)
        assert torch.equal(found.delta, reference.rect_code(update.delta, weight)) and found.rank == 0


@quick
@given(pairs())
def test_rect_as_in_its_own_code(pair):
    update, weight = pair
    assert torch.equal(
        keep_largest(0.2, 0.0, strict=True)(update, weight).delta, reference.rect_original(update.delta, weight)
    )


def test_rect_keeps_the_share_that_it_names_and_the_largest_relative_changes():
    update, weight = drawn(8, 25, 3, 1.0, 0)
    for rule, count in (
        (keep_largest(0.4), 81), (keep_largest(0.4, strict=True), 80), (keep_largest(0.2), 41),
        (keep_largest(1.0), 200)
    ):
        kept = rule(update, weight).delta != 0
        assert kept.sum() == count
        relative = (update.delta / weight).abs()
        assert count == 200 or relative[kept].min() > relative[~kept].max()
        assert torch.equal(rule(update, weight).delta[kept], update.delta[kept])


def test_rect_where_weights_or_changes_are_zero():
    update, weight = drawn(4, 10, 2, 1.0, 1)
    weight[0, :3] = 0.0  # changed without bound: kept
    nothing = LayerUpdate("w", update.left[:, :0], update.right[:0])
    assert (keep_largest(0.4, 0.0)(update, weight).delta[0, :3] == update.delta[0, :3]).all()
    for rule in (keep_largest(), keep_largest(0.2, 0.0, strict=True)):
        assert not rule(nothing, torch.zeros_like(weight)).delta.any()


# SPHERE


@quick
@given(pairs(), st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_sphere_on_either_side(pair, ratio: float, strength: float):
    update, weight = pair
    for side, transposed in (("key", False), ("output", True)):
        found = soften_principal(ratio, strength, side)(update, weight)
        assert (
            found.delta - reference.sphere(update.delta, weight, ratio, strength, transposed)
        ).norm() <= 1e-9 * update.delta.norm()
        assert found.rank == update.rank and (found.dense is None) == (update.dense is None)


def test_sphere_removes_the_principal_directions_and_nothing_else():
    update, weight = drawn(6, 20, 3, 1.0, 2)
    unit = weight / weight.norm(dim=1, keepdim=True)
    energy = torch.linalg.svd(unit)[1].square()
    count = int((energy.cumsum(0) / energy.sum() <= 0.5).sum()) + 1
    U = torch.linalg.svd(unit)[2][:count].T
    gone = soften_principal(0.5, 1.0)(update, weight).delta
    assert 1 < count < 6 and (gone @ U).norm() < 1e-6 * update.delta.norm()
    assert_close(gone @ (reference.eye(20) - U @ U.T), update.delta @ (reference.eye(20) - U @ U.T), 1e-6)
    assert_close(soften_principal(0.5, 0.5)(update, weight).delta @ U, 0.5 * update.delta @ U, 1e-6)


# PRUNE


@quick
@given(pairs())
def test_prune_on_the_whole_change(pair):
    update, weight = pair
    for twice in (False, True):
        wanted = reference.prune(weight + update.delta, weight, twice)
        assert_close(weight + cap_spectrum(add_twice=twice)(update, weight).delta, wanted)
        last = correction([cap_spectrum(add_twice=twice)], update, weight)
        assert_close(weight + update.delta + last.delta, wanted)
        assert update.dense is not None or (last.dense is None and last.rank <= max(update.rank, 1))


def test_prune_caps_by_a_logarithm_what_is_larger_than_the_weight():
    update, weight = drawn(8, 12, 4, 3.0, 3)
    largest = torch.linalg.svd(weight)[1][0]
    before, after, halves = (
        torch.linalg.svd(rule(update, weight).delta)[1] for rule in (lambda u, _: u, cap_spectrum(), cap_spectrum(2.0))
    )
    above = before > largest
    assert 0 < above.sum() < 8
    torch.testing.assert_close(after[above], largest + (before[above] / largest).log())
    torch.testing.assert_close(halves[above], largest + (before[above] / largest).log2())
    torch.testing.assert_close(after[~above], before[~above])


def test_prune_leaves_a_small_change_as_it_is():
    update, weight = drawn(8, 12, 4, 0.01, 4)
    assert cap_spectrum()(update, weight) is update
    assert not correction([cap_spectrum()], update, weight).delta.any()
    assert_close(correction([cap_spectrum(add_twice=True)], update, weight).delta, update.delta)


def test_several_rules_act_one_after_the_other():
    update, weight = drawn(8, 12, 4, 3.0, 5)
    one, other = cap_spectrum(), keep_largest(0.3)
    assert_close(
        update.delta + correction([one, other], update, weight).delta, other(one(update, weight), weight).delta
    )
    assert not torch.allclose(other(one(update, weight), weight).delta, one(other(update, weight), weight).delta)


# In an editor


@pytest.fixture(scope="module")
def small():
    lm = random_model("qwen3")
    return lm, text_statistics(lm, MEMIT.layers)


def sequence(lm, editor: Editor, statistics, look: bool = False):
    """Weights after two batches and the end; look: also at the sequence midway."""
    state = editor.init(lm, statistics)
    with reference.kept(lm, editor.layers):
        for requests in (REQUESTS[:2], REQUESTS[2:]):
            edit, state = editor.step(lm, requests, state)
            edit.apply(lm)
            if look and (midway := editor.finish(lm, state)):
                before = fingerprint(lm.model)
                with midway.applied(lm):
                    assert fingerprint(lm.model) != before
                assert fingerprint(lm.model) == before
        last = editor.finish(lm, state)
        if last:
            last.apply(lm)
        return [reference.plain_weight(lm, layer) for layer in editor.layers], last


def test_what_is_done_at_the_end_sees_all_batches_and_a_look_midway_changes_nothing(small):
    lm, statistics = small
    pruned, plain = replace(MEMIT, post=(cap_spectrum(),)), MEMIT
    first = [reference.plain_weight(lm, layer) for layer in MEMIT.layers]
    (found, last), (seen, _), (edited, none) = (
        sequence(lm, pruned, statistics), sequence(lm, pruned, statistics, look=True), sequence(lm, plain, statistics)
    )
    assert none is None and last.modules == tuple(lm.write_path(layer) for layer in MEMIT.layers)
    for a, b, W, W0 in zip(found, seen, edited, first, strict=True):
        assert torch.equal(a, b)
        assert_close(a, reference.prune(W, W0))
        assert (a - W).norm() > 1e-2 * (W - W0).norm(), "nothing was capped"
    assert last.record.requests == () and last.record.recipe == describe(pruned) and last.record.layers == {}
    with pytest.raises(ProvenanceError, match="the edit was made on"):
        last.apply(lm)  # made for the edited weights


def test_one_batch_with_its_end_is_one_edit_of_no_higher_rank(small):
    lm, statistics = small
    pruned = replace(MEMIT, post=(cap_spectrum(),))
    before = fingerprint(lm.model)
    edit, plain = pruned.edit(lm, REQUESTS, statistics), MEMIT.edit(lm, REQUESTS, statistics)
    assert fingerprint(lm.model) == before
    for update, unpruned, layer in zip(edit.updates, plain.updates, MEMIT.layers, strict=True):
        W0 = reference.plain_weight(lm, layer)
        assert_close(W0 + update.delta, reference.prune(W0 + unpruned.delta, W0))
        assert update.rank == len(REQUESTS) and (update.delta - unpruned.delta).norm() > 1e-2 * unpruned.delta.norm()
    assert (
        edit.record.layers.keys() == {"1", "2"}
        and edit.record.trace.keys() == plain.record.trace.keys()
        and edit.record.requests == plain.record.requests
    )
    edit.check_base(lm)
    twice = replace(MEMIT, post=(cap_spectrum(add_twice=True),)).edit(lm, REQUESTS, statistics)
    assert [u.rank for u in twice.updates] == [len(REQUESTS)] * 2
    assert_close(twice.updates[0].delta, edit.updates[0].delta + plain.updates[0].delta)


def test_a_state_is_a_value_and_nothing_is_kept_for_methods_that_need_nothing(small):
    lm, statistics = small
    pruned = replace(MEMIT, post=(cap_spectrum(),))
    start = pruned.init(lm, statistics)
    assert [
        torch.equal(start.original[lm.write_path(layer)], lm.weight(lm.write_path(layer))) for layer in MEMIT.layers
    ] == [True, True]
    edit, after = pruned.step(lm, REQUESTS[:2], start)
    assert not start.totals and after.totals.keys() == set(edit.modules) and pruned.finish(lm, start) is None
    for rule in (keep_largest(), soften_principal()):
        state = replace(MEMIT, post=(rule,)).init(lm, statistics)
        assert not state.original and not state.totals


def test_a_mask_of_the_batch_is_made_after_all_layers_and_one_of_a_layer_before_the_next(small):
    """SPHERE's code on MEMIT softens when the deltas are applied, on AlphaEdit inside the loop:
    the layers above then see it.
    """
    lm, statistics = small
    plain = MEMIT.edit(lm, REQUESTS, statistics)
    for rule in (soften_principal, keep_largest):
        inside, at_the_end = (
            replace(MEMIT, post=(rule(when=when),)).edit(lm, REQUESTS, statistics) for when in ("layer", "batch")
        )
        for update, unmasked, layer in zip(at_the_end.updates, plain.updates, MEMIT.layers, strict=True):
            assert_close(update.delta, rule()(unmasked, reference.plain_weight(lm, layer)).delta)
        assert_close(inside.updates[0].delta, at_the_end.updates[0].delta)
        assert (inside.updates[1].delta - at_the_end.updates[1].delta).norm() > 1e-3 * plain.updates[1].delta.norm()


def test_a_record_says_what_was_done(small):
    lm, statistics = small
    rules = (soften_principal(0.4, 0.3), keep_largest(0.3, strict=True))
    recipe = replace(MEMIT, post=rules).edit(lm, REQUESTS[:1], statistics).record.recipe
    assert recipe["post"] == [
        {"part": "soften_principal", "ratio": 0.4, "strength": 0.3, "side": "key", "when": "layer"},
        {"part": "keep_largest", "share": 0.3, "epsilon": 1e-8, "when": "batch", "strict": True},
    ]


@pytest.mark.parametrize(("make", "said"), [
    (partial(keep_largest, 0.0), "share must be in"), (partial(keep_largest, 1.1), "share must be in"),
    (partial(keep_largest, epsilon=-1), "epsilon ≥ 0"),
    (partial(soften_principal, 1.0), "ratio must be in"), (partial(soften_principal, strength=2), "strength in"),
    (partial(soften_principal, side="keys"), "unknown side 'keys'.*'key'"),
    (partial(cap_spectrum, 1.0), "base must be > 1"),
    (partial(cap_spectrum, when="sequenze"), "unknown time of a post-process "
        "'sequenze'.*'sequence'"),
])  # fmt: skip
def test_values_out_of_range_are_refused(make, said: str):
    with pytest.raises(ParameterError, match=said):
        make()
