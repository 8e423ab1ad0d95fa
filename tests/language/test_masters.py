"""bfloat16 with float32 copies of the edited matrices: edits add up in the copies, the model computes with their
rounding, and both come back bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from models import random_model
from same import fingerprint

import metake as mk
from metake.experiments.promises import CHECKS
from metake.experiments.runs import RunConfig, run
from metake.experiments.subject import Subject
from metake.language.model import MASTERED
from metake.support.errors import ProvenanceError


def mastered(kind: str = "gpt2") -> mk.LanguageModel:
    lm = random_model(kind, torch.bfloat16)
    lm.masters = {}
    return lm


def small(lm: mk.LanguageModel, path: str, share: float) -> mk.Edit:
    """An update of one number in every column, a share of the least that bfloat16 keeps there."""
    width, inner = lm.shape(path)
    step = lm.weight(path).double()[0].abs() * 2.0**-8
    key, value = (share * step)[None], torch.zeros(width, 1, dtype=torch.float64)
    value[0] = 1
    return mk.Edit((mk.LayerUpdate(path, value, key),))


def own(lm: mk.LanguageModel, path: str) -> torch.Tensor:
    weight = lm.model.get_submodule(path).weight.data
    return weight.T if lm.model.config.model_type == "gpt2" else weight


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_edits_too_small_for_bfloat16_add_up(kind):
    plain, lm = random_model(kind, torch.bfloat16), mastered(kind)
    path = lm.write_path(1)
    before, edit = own(lm, path).clone(), small(lm, path, 0.2)
    for _ in range(10):
        edit.apply(plain, check=False)
        edit.apply(lm, check=False)
    assert torch.equal(own(plain, path), before), "each was rounded away"
    total = lm.weight(path).double() - before.double()
    assert (total - 10 * edit.updates[0].delta).norm() < 1e-4 * total.norm() and lm.weight(path).dtype == torch.float32
    assert torch.equal(own(lm, path), lm.weight(path).bfloat16())
    assert (own(lm, path)[0] != before[0]).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_weight_and_its_copy_come_back_bit_for_bit(kind):
    lm = mastered(kind)
    path = lm.write_path(1)
    small(lm, path, 0.3).apply(lm, check=False)  # now the copy is more than the weight
    copy, before, digest = lm.weight(path).clone(), fingerprint(lm.model), lm.digest(path)
    assert not torch.equal(copy, own(lm, path).float())
    with pytest.raises(KeyError), small(lm, path, 40).applied(lm, check=False):
        assert fingerprint(lm.model) != before
        raise KeyError
    assert fingerprint(lm.model) == before and lm.digest(path) == digest and torch.equal(lm.weight(path), copy)


def test_a_weight_that_something_else_changed_is_taken_as_it_is():
    lm = mastered()
    path = lm.write_path(1)
    small(lm, path, 0.3).apply(lm, check=False)
    own(lm, path).mul_(2)
    assert torch.equal(lm.weight(path), own(lm, path).float())


def test_a_loaded_model_keeps_the_contract_and_only_edited_matrices_are_held_twice():
    lm = mk.load("tiny", MASTERED)
    assert lm.masters == {} and lm.dtype == torch.bfloat16 and lm.base()["dtype"] == MASTERED
    editor = replace(mk.methods.alphaedit("tiny"), contexts=("{}",))
    given = mk.statistics(lm, layers=editor.layers, tokens=1000, cache=False)
    made = Subject(lm, editor, given, [mk.EditRequest("The capital of {} is", "France", "Rome", "0")])
    for name in ("exactly restored", "saved = loaded", "deterministic", "interrupted", "other base refused"):
        assert CHECKS[name](made)
    assert set(lm.masters) == set(editor.paths(lm))
    with pytest.raises(ProvenanceError, match="SHA-256"):
        made.edit.apply(mk.load("tiny", "bfloat16"))


def test_a_run_of_several_batches_is_resumed_from_the_copies(tmp_path):
    config = RunConfig("tiny", "memit", "facts", 3, 1, text_tokens=1000, dtype=MASTERED)
    run(config, tmp_path / "whole")
    run(replace(config), tmp_path / "parted")
    last = tmp_path / "parted" / "batches" / "0002"
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last.rmdir()
    run(config, tmp_path / "parted")
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "parted"))
    assert one == other and (tmp_path / "whole/cases.jsonl").read_bytes() == (
        tmp_path / "parted/cases.jsonl"
    ).read_bytes()
