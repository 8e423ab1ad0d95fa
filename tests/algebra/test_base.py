"""The base of an edit: the first one to the bit, later ones of a run up to the digit that another machine forms."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model, text_statistics
from same import fingerprint

import metake as mk
from metake.algebra.base import TOLERANCE, sketch
from metake.algebra.update import Edit, EditRecord, LayerUpdate, total
from metake.data.requests import EditRequest
from metake.support.errors import ParameterError, ProvenanceError

BATCHES = [
    [EditRequest("The capital of {} is", name, city, name)]
    for name, city in (("France", "Rome"), ("Danielle Darrieux", "Berlin"), ("Beyoncé", "Madrid"))
]


def sequence(dtype=torch.float64, method="memit") -> tuple[list[Edit], str]:
    """A sequence of batches, each applied before the next is computed, and the edited model's fingerprint."""
    lm = random_model("gpt2", dtype)
    editor = getattr(mk.methods, method)("tiny", contexts=("{}",), layers=(0, 1), target=mk.TargetRule(steps=2))
    state, edits = editor.init(lm, text_statistics(lm, (0, 1), 400)), []
    for batch in BATCHES:
        edit, state = editor.step(lm, batch, state)
        edit.apply(lm)
        edits.append(edit)
    if last := editor.finish(lm, state):
        last.apply(lm)
        edits.append(last)
    return edits, fingerprint(lm.model)


@pytest.fixture(scope="module")
def made() -> tuple[list[Edit], str]:
    return sequence()


def other_digits(update: LayerUpdate, here=LayerUpdate.delta.fget) -> torch.Tensor:
    """Δ as another machine's products give it."""
    return here(replace(update, left=update.left.flip(1), right=update.right.flip(0))) * (1 + 3e-16)


def test_the_first_record_names_digests_alone_and_later_ones_state_a_tolerance(made):
    first, *later = (edit.record for edit in made[0])
    assert first.base == random_model("gpt2").base() and len(later) == 2
    assert all(r.base["sketches"].keys() == r.weights.keys() and r.base["tolerance"] == TOLERANCE for r in later)
    assert all(EditRecord.from_json(r.to_json()) == r for r in (first, *later))


@pytest.mark.parametrize(
    ("dtype", "method"), [(torch.float64, "memit"), (torch.float32, "memit"), (torch.bfloat16, "prune")]
)
def test_a_sequence_is_applied_where_products_have_another_last_digit(dtype, method, monkeypatch):
    edits, here = sequence(dtype, method)
    monkeypatch.setattr(LayerUpdate, "delta", property(other_digits))
    lm = random_model("gpt2", dtype)
    for edit in edits:
        edit.apply(lm)
    assert (fingerprint(lm.model) != here) == (dtype == torch.float64)


def test_on_the_same_machine_it_is_undone_to_the_bit(made):
    lm = random_model("gpt2")
    before = fingerprint(lm.model)
    first, *later = made[0]
    with first.applied(lm):
        middle = fingerprint(lm.model)
        with later[0].applied(lm):
            assert fingerprint(lm.model) != middle
        assert fingerprint(lm.model) == middle
    assert fingerprint(lm.model) == before
    for edit in made[0]:
        edit.apply(lm)
    assert fingerprint(lm.model) == made[1]


@pytest.mark.parametrize("nudge", [1e-15, 1e-9, 1e-2])
def test_the_first_base_is_compared_to_the_bit(made, nudge):
    lm = random_model("gpt2")
    lm.weight(lm.write_path(0))[3, 5] += nudge
    before = fingerprint(lm.model)
    for edit in (made[0][0], total(made[0])):
        with pytest.raises(ProvenanceError, match="has SHA-256 .*apply it to that base"):
            edit.apply(lm)
    assert fingerprint(lm.model) == before


@pytest.mark.parametrize("order", [(1,), (0, 2), (0, 0), (0, 1, 1)])
def test_a_batch_out_of_its_order_is_refused(made, order):
    lm = random_model("gpt2")
    for number in order[:-1]:
        made[0][number].apply(lm, check=False)
    before = fingerprint(lm.model)
    with pytest.raises(ProvenanceError) as told:
        made[0][order[-1]].apply(lm)
    assert fingerprint(lm.model) == before
    if order[-1]:
        assert "of its norm away" in str(told.value) and "at most 1e-06" in str(told.value)


def test_a_record_without_sketches_is_as_strict_as_before(made, monkeypatch):
    """Edits saved by an earlier version."""
    monkeypatch.setattr(LayerUpdate, "delta", property(other_digits))
    lm = random_model("gpt2")
    old = [replace(e, record=replace(e.record, base=made[0][0].record.base)) for e in made[0]]
    old[0].apply(lm)
    with pytest.raises(ProvenanceError, match="SHA-256"):
        old[1].apply(lm)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([1, 3, None]))
def test_a_sketch_measures_how_far_two_weights_lie_apart(rows, columns, seed, entries):
    draw = torch.Generator().manual_seed(seed)
    weight, change = torch.randn(2, rows, columns, dtype=torch.float64, generator=draw)
    if entries:  # a few of them alone
        kept = torch.zeros(rows * columns, dtype=torch.float64)
        kept[torch.randperm(rows * columns, generator=draw)[:entries]] = 1
        change = change * kept.view(rows, columns)
    found = (sketch(weight) - sketch(weight + change)).square().mean().sqrt() / change.norm()
    assert 0.05 < found < 12
    assert torch.equal(sketch(weight), sketch(weight.clone()))


# Devices: `meta` is a second one on every machine; its tensors have no content


def on_meta(update: LayerUpdate) -> LayerUpdate:
    return update.to("meta")


def parts(update: LayerUpdate) -> set[str]:
    return {t.device.type for t in (update.left, update.right, update.dense) if t is not None}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1)])
def test_updates_of_several_devices_add_up_on_the_accelerator(order, dense):
    made = [
        LayerUpdate("m", torch.randn(3, 2), torch.randn(2, 4), torch.randn(3, 4) if dense else None) for _ in order
    ]
    mixed = [on_meta(u) if place else u for u, place in zip(made, order, strict=True)]
    whole = total([Edit((u,)) for u in mixed]).updates[0]
    by_pairs = sum(mixed[1:], mixed[0])
    assert parts(whole) == parts(by_pairs) == {"meta"} and whole.rank == by_pairs.rank == 2 * len(order)


def test_an_edit_is_applied_where_the_weights_are():
    """Wherever its factors are: Δ is formed on the weight's device."""
    added = []

    class Elsewhere:
        name = "elsewhere"

        def weight(self, module):
            return torch.empty(3, 4, device="meta")

        def add(self, module, update):
            added.append((module, parts(update), update.delta.device.type))

        def restored_on_error(self, modules):
            return contextlib.nullcontext()

    thick = LayerUpdate("b", torch.randn(3, 2), torch.randn(2, 4), torch.randn(3, 4))
    Edit((LayerUpdate("a", torch.randn(3, 2), torch.randn(2, 4)), thick)).apply(Elsewhere())
    assert added == [("a", {"meta"}, "meta"), ("b", {"meta"}, "meta")]


def test_an_edit_is_loaded_on_a_device(made, tmp_path):
    folder = made[0][0].save(tmp_path / "e")
    assert {t for u in Edit.load(folder, device="meta").updates for t in parts(u)} == {"meta"}
    assert {t for u in Edit.load(folder).updates for t in parts(u)} == {"cpu"}
    with pytest.raises(ParameterError, match="device 'gpu' cannot be used here"):
        Edit.load(folder, device="gpu")


# What a compression drops


@pytest.mark.parametrize("ranks", [(3,), (3, 2), (4, 3, 1)])
def test_a_record_keeps_what_compression_dropped(made, tmp_path, ranks):
    whole = total(made[0])
    edit, product = whole, dict.fromkeys(whole.modules, 1.0)
    for rank in ranks:
        edit, lost = edit.compress(rank)
        product = {m: share * (1 - lost[m]) for m, share in product.items()}
    for before, after in zip(whole.updates, edit.updates, strict=True):
        share = edit.record.recipe["discarded"][after.module]
        away = (before.delta - after.delta).square().sum() / before.delta.square().sum()
        assert share == pytest.approx(1 - product[after.module]) == pytest.approx(away.item(), abs=1e-12)
    assert Edit.load(edit.save(tmp_path / "e")).record.recipe == edit.record.recipe
    assert total([whole, edit]).record.recipe == edit.record.recipe and "discarded" not in whole.record.recipe


def test_editors_of_both_families_state_their_base():
    lm = random_model("gpt2")
    editor = mk.methods.ultraedit("tiny")
    state = editor.init(lm)
    first, state = editor.step(lm, BATCHES[0], state)
    first.apply(lm)
    second, _ = editor.step(lm, BATCHES[1], state)
    assert "sketches" not in first.record.base and second.record.base["sketches"]
    assert second.record.base["tolerance"] == TOLERANCE
