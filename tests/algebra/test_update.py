"""Edits as values: summed, compressed, saved whole or not at all, exported, and refused when they are not what they
say.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import random_model
from same import contents, fingerprint

import metake.algebra.update
from metake import ArchitectureError, Edit, EditRecord, LayerUpdate, ParameterError, ProvenanceError
from metake.algebra.update import total

ROWS = [(5, 17, 300, 41, 9, 77), (12, 250, 33)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def update(module: str = "m", rank: int = 4, seed: int = 0, shape=(32, 48), dense: bool = False) -> LayerUpdate:
    return LayerUpdate(
        module, normal(shape[0], rank, seed=seed), normal(rank, shape[1], seed=seed + 50),
        normal(*shape, seed=seed + 99) if dense else None
    )


def of(lm, *ranks: int, dense: bool = False, layers=(1, 2, 0)) -> Edit:
    paths = [lm.write_path(i) for i, _ in zip(layers, ranks, strict=False)]
    parts = tuple(update(p, r, i, lm.shape(p), dense) for i, (p, r) in enumerate(zip(paths, ranks, strict=True)))
    return Edit(
        parts,
        EditRecord(
            base=lm.base(), weights={p: lm.digest(p) for p in paths}, requests=("é",),
            seconds={"targets": 1.5, "refinement": 2.0}
        ),
    )


def logits(model) -> torch.Tensor:
    return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Algebra


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (6, 3)])
def test_compression_is_exact_at_full_rank_and_the_best_below(dense, shape):
    given = update(rank=5, shape=shape, dense=dense)
    values = torch.linalg.svdvals(given.delta)
    for rank in (min(shape), 50, torch.linalg.matrix_rank(given.delta).item()):
        full, lost = given.compress(rank)
        close(full.delta, given.delta)
        assert lost < 1e-25 and full.dense is None and full.rank <= min(rank, *shape)
    for rank in (1, 2):
        low, lost = given.compress(rank)
        best = values[rank:].square().sum()
        assert low.rank == rank and lost == pytest.approx((best / values.square().sum()).item())
        assert (given.delta - low.delta).square().sum().item() == pytest.approx(best.item())
    with pytest.raises(ParameterError, match="rank must be ≥ 1; found 0"):
        given.compress(0)


@pytest.mark.parametrize(
    ("rank", "dense", "thin"), [(4, False, True), (0, False, True), (25, False, False), (4, True, False)]
)
def test_the_norm_of_a_thin_update_needs_no_matrix_of_its_size(rank, dense, thin, monkeypatch):
    one = update(rank=rank, dense=dense)
    expected = one.delta.norm().item()
    if thin:
        monkeypatch.setattr(LayerUpdate, "delta", property(lambda self: pytest.fail("Δ was formed")))
    assert one.norm == pytest.approx(expected, rel=1e-12) and type(one.norm) is float


def test_nothing_compresses_to_nothing():
    none, lost = update(rank=0).compress(3)
    assert (none.rank, lost) == (0, 0.0) and not none.delta.any() and none.delta.shape == (32, 48)


@pytest.mark.parametrize("dense", [(False, False), (True, False), (False, True), (True, True)])
def test_updates_add_as_matrices(dense):
    a, b = update(rank=2, seed=1, dense=dense[0]), update(rank=3, seed=2, dense=dense[1])
    close((a + b).delta, a.delta + b.delta)
    assert (a + b).rank == 5 and ((a + b).dense is None) == (not any(dense))
    with pytest.raises(ParameterError, match="different weights do not add: m and other"):
        a + update("other")


def test_a_sum_of_edits_does_what_they_do_in_order():
    lm = random_model("gpt2")
    one, two = of(lm, 2, 3, layers=(1, 2)), of(lm, 1, 4, layers=(2, 3))
    with lm.scratch(two.modules):
        for module in two.modules:
            lm.weight(module).add_(1)
        two = replace(
            two,
            record=replace(
                of(lm, 1, 4, layers=(2, 3)).record, requests=("f",), seconds={"targets": 1.0}, peak_memory=9
            ),
        )
    both = total([one, two])
    assert both.modules == tuple(lm.write_path(i) for i in (1, 2, 3))
    for module in both.modules:
        close(
            sum(u.delta for u in both.updates if u.module == module),
            sum(u.delta for e in (one, two) for u in e.updates if u.module == module),
        )
    record = both.record
    assert (
        record.requests == ("é", "f")
        and record.seconds == {"targets": 2.5, "refinement": 2.0}
        and record.peak_memory == 9
    )
    assert record.weights == {**one.record.weights, lm.write_path(3): two.record.weights[lm.write_path(3)]}, (
        "every weight's first base"
    )
    assert total([one]) is one
    with pytest.raises(ParameterError, match="no edits"):
        total([])


@pytest.mark.parametrize("dense", [False, True])
def test_a_long_sum_is_that_of_pairs_and_joins_factors_once(dense, monkeypatch):
    """Pair by pair, the factors of a sequence are copied once for every edit after them: quadratic in its length."""
    names = ("a", "b", "c")
    edits = [
        Edit(
            tuple(update(names[(i + k) % 3], 1 + i % 2, i, (4, 6), dense and i % 4 == 0) for k in range(2)),
            EditRecord(
                weights={names[(i + k) % 3]: f"{i}{k}" for k in range(2)}, requests=(f"r{i}",), peak_memory=i % 7,
                requests_digest=f"d{i}" if i % 4 else "", seconds={"targets": 0.1 * i, f"stage {i % 2}": 0.7}
            ),
        )
        for i in range(200)
    ]
    pairwise, parts = edits[0], {u.module: u for u in edits[0].updates}
    for edit in edits[1:]:
        pairwise = pairwise + edit
        parts |= {u.module: parts[u.module] + u if u.module in parts else u for u in edit.updates}
    cat, joined = torch.cat, []
    monkeypatch.setattr(torch, "cat", lambda tensors, *dim: joined.append(len(tensors)) or cat(tensors, *dim))
    found = total(edits)
    assert len(joined) == 2 * 3 and sum(joined) == 2 * 400
    assert found.record == pairwise.record and found.modules == pairwise.modules
    assert list(found.record.weights) == list(pairwise.record.weights)
    for one, other in zip(found.updates * 2, (*pairwise.updates, *parts.values()), strict=True):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
        assert torch.equal(one.dense, other.dense) if dense else one.dense is other.dense is None


def test_applying_is_all_or_nothing():
    lm = random_model("gpt2")
    before, good = fingerprint(lm.model), of(lm, 2, 2)
    for wrong in (
        replace(good.updates[1], left=good.updates[1].left[:1]),
        replace(good.updates[1], module="transformer.h.9.mlp.c_proj"),
        replace(good.updates[1], module="transformer.ln_f"),
    ):
        with pytest.raises(ArchitectureError, match="d_out, d_in|is missing|LayerNorm"):
            replace(good, updates=(good.updates[0], wrong)).apply(lm)
        assert fingerprint(lm.model) == before
    with pytest.raises(
        ProvenanceError, match="made on 'random-gpt2'.*'transformer.h.1.mlp.c_proj' of 'random-llama' is missing"
    ):
        good.apply(random_model("llama"))
    good.apply(lm)
    assert fingerprint(lm.model) != before


# On disk


@pytest.mark.parametrize("dense", [False, True])
def test_saved_and_loaded_it_is_equal(tmp_path, dense):
    record = EditRecord(weights={"layers.9": "a", "layers.10": "b"}, requests=("é",))
    edit = Edit((update("layers.9", 3, dense=dense), update("layers.10", 0), update("unlisted", 2)), record)
    folder = edit.save(tmp_path / "deep" / "e")
    again = Edit.load(folder)
    assert again.record == edit.record and again.modules == ("layers.9", "layers.10", "unlisted")
    for a, b in zip(again.updates, edit.updates, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right) and torch.equal(a.delta, b.delta)
    assert sorted(contents(tmp_path)) == ["deep/e/edit.safetensors", "deep/e/record.json"]
    replace(edit, updates=edit.updates[:1], record=EditRecord(seed=5)).save(folder)
    assert Edit.load(folder).modules == ("layers.9",) and Edit.load(folder).record.seed == 5, (
        "an older edit is replaced"
    )


def rewrite(folder: Path, change) -> None:
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    (folder / "record.json").write_text(json.dumps(change(record)), encoding="utf-8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "no record": (lambda f: (f / "record.json").unlink(), "holds no saved edit"),
    "no factors": (lambda f: (f / "edit.safetensors").unlink(), "holds no saved edit"),
    "truncated factors": (lambda f: cut(f / "edit.safetensors"), "damaged.*truncated"),
    "a flipped byte": (lambda f: flip(f / "edit.safetensors"), "damaged.*checksum"),
    "truncated record": (lambda f: cut(f / "record.json"), "damaged"),
    "record of another version": (lambda f: rewrite(f, lambda r: r | {"news": 1}),
    "unknown fields \\['news'\\].*another "
        "version"),
    "record of no kind": (lambda f: rewrite(f, lambda r: [r]), "damaged"),
    "weights without factors": (lambda f: rewrite(f, lambda r: r | {"weights": {"m": "a", "other": "b"}}),
    "damaged.*'other'"),
    "half of the factors": (lambda f: metake.support.storage.save_tensors({"m:left": normal(3, 1)},
    f / "edit.safetensors"), "damaged.*right"),
    "strange factors": (lambda f: metake.support.storage.save_tensors({"m": normal(3, 1)}, f / "edit.safetensors"),
    "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_edit_is_refused(tmp_path, how):
    folder = Edit((update("m"),), EditRecord(weights={"m": "a"})).save(tmp_path / "e")
    damage, said = DAMAGE[how]
    damage(folder)
    with pytest.raises(ProvenanceError, match=said):
        Edit.load(folder)


def test_a_record_is_read_back_as_it_was_written():
    record = EditRecord(
        recipe={"layers": [1, 2], "refine": None}, weights={"b": "1", "a": "2"}, requests=("ü", "é"),
        context_templates=("{}", 'So "…". {}'), layers={"1": {"planned": 0.1 + 0.2}}, trace={"é": {"loss": [1e-17]}}
    )
    again = EditRecord.from_json(record.to_json())
    assert again == record and list(again.weights) == ["b", "a"] and "…" in record.to_json()


@pytest.mark.parametrize("changed", [
    {"recipe": {"discarded": {"m": "x"}}}, {"recipe": {"discarded": [1]}}, {"seconds": {"solve": "x"}},
    {"seconds": []}, {"base": {"tolerance": "x"}}, {"base": {"sketches": {"m": ["x"] * 8}}},
    {"base": {"sketches": {"m": [1.0]}}}, {"base": {"sketches": [[1.0] * 8]}}, {"weights": {"m": 1}}, {"requests": [1]},
    {"base": {"id": 7}},
], ids=str)  # fmt: skip
def test_a_record_that_cannot_be_computed_with_is_refused_where_it_is_read(tmp_path, changed):
    folder = Edit((update("m"),), EditRecord(weights={"m": "a"})).save(tmp_path / "e")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | changed))
    with pytest.raises(ProvenanceError, match="is damaged or no saved edit"):
        Edit.load(folder)


@pytest.mark.parametrize("act", ["save", "to_peft"])
@pytest.mark.parametrize("name", ["notes.txt", "adapter_config.json", "config.json"])
def test_a_strangers_folder_or_file_is_never_replaced(tmp_path, act, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text("{}")
    for target in (tmp_path / "theirs", tmp_path / "theirs" / name):
        with pytest.raises(ParameterError, match=f"{target} exists and is not of this kind"):
            getattr(Edit((update("m"),)), act)(target)
    assert contents(tmp_path) == {f"theirs/{name}": b"{}"} and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    getattr(Edit((update("m"),)), act)(tmp_path / "empty")
    assert contents(tmp_path / "empty")


# Adapters


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("ranks", "dense", "rank"),
    [((4, 1, 3), False, None), ((4, 1, 3), False, 2), ((2, 2), True, 32), ((2, 0), True, 5)], ids=str
)
def test_adapters_give_the_logits_of_what_was_exported(tmp_path, kind, ranks, dense, rank):
    from peft import PeftModel

    lm = random_model(kind)
    edit = of(lm, *ranks, dense=dense)
    lost = edit.to_peft(tmp_path / "lora", rank)
    kept, expected = edit.compress(rank) if rank else (edit, dict.fromkeys(edit.modules, 0.0))
    assert lost == expected and all(
        (v > 1e-3) == bool(rank and rank < min(r + 32 * dense, 32)) for v, r in zip(lost.values(), ranks, strict=True)
    )
    assert json.loads((tmp_path / "lora" / "metake.json").read_text())["discarded_energy"] == lost
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = PeftModel.from_pretrained(copy.deepcopy(lm.model), tmp_path / "lora")
    before = logits(lm.model)
    with kept.applied(lm):
        assert (logits(lm.model) - before).abs().max() > 0.1
        close(logits(adapted), logits(lm.model), 1e-9)


def test_a_dense_update_needs_a_rank_and_an_empty_one_has_no_adapter(tmp_path):
    with pytest.raises(ParameterError, match="updates of m are dense, an adapter is thin: pass rank="):
        Edit((update("m", dense=True),)).to_peft(tmp_path / "lora")
    with pytest.raises(ParameterError, match="zero requests has no adapter"):
        Edit((update("m", rank=0),)).to_peft(tmp_path / "lora")
    with pytest.raises(ParameterError, match="rank must be ≥ 1"):
        Edit((update("m"),)).to_peft(tmp_path / "lora", 0)
    assert not list(tmp_path.iterdir())
