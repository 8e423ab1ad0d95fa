"""What an editor brings along goes to where its model is."""

from __future__ import annotations

import accelerate
import pytest
import torch
from editors import LAYERS, editor
from models import cases, random_model
from same import fingerprint
from second_device import SECOND, SecondDevice, shard

import metake as mk
from metake.editing.gradient.slopes import Slopes
from metake.editing.statistics import statistics
from metake.language.model import LanguageModel
from metake.support.errors import ArchitectureError


@pytest.mark.parametrize("method", ["mend", "malmen", "smedit"])
def test_a_trained_editor_follows_its_model_to_its_device(method):
    """`meta` is a device without numbers, but with one place: what meets there must be there."""
    lm, editor = mk.load("tiny"), mk.methods.method(method, "tiny")
    state, (where, *_) = editor.init(lm), editor.places(lm).values()
    d_out, d_in = lm.shape(editor.modules[0])
    slopes = Slopes(torch.zeros(3, d_in, device="meta"), torch.zeros(3, d_out, device="meta"))
    found = editor._corrected(where, 0, slopes, state, {})
    assert {found.rows.device.type, found.step.device.type, found.ridge.device.type} == {"meta"}


# A model over two devices


REQUESTS = [
    mk.EditRequest("The capital of {} is", "France", "Rome", "a"),
    mk.EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "b"),
]


@pytest.mark.parametrize("kind, name", [
    ("gptj", "blue"), ("llama", "pmet"), ("gpt2", "rome"), ("llama", "prune"),
    ("gpt2", "sphere"), ("llama", "metake/whole"), ("gpt2", "metake/literal"), ("llama", "ultraedit"),
])  # fmt: skip
def test_a_sharded_model_gives_the_same_edit_bit_for_bit(kind, name):
    whole = random_model(kind)
    layers = LAYERS if name != "rome" else LAYERS[1:]
    given = statistics(whole, layers=layers, tokens=600, cache=False)
    brief = {} if name == "ultraedit" else {"layers": layers, "contexts": ("{}", "And. {}")}
    made = editor(name, whole, **brief)
    expected = made.edit(whole, REQUESTS, given)
    with expected.applied(whole):
        after = mk.evaluate(whole, cases(), before=mk.evaluate(whole, cases()))
    lm = random_model(kind)
    hooks, before = shard(lm, LAYERS[1]), fingerprint(lm.model)
    with SecondDevice() as second:
        lm = LanguageModel(lm.model, lm.tokenizer, lm.name)
        own = statistics(lm, layers=layers, tokens=600, cache=False)
        edit = made.edit(lm, REQUESTS, own)
        with edit.applied(lm):
            found = mk.evaluate(lm, cases(), before=mk.evaluate(lm, cases()))
        assert lm.device.type == "cpu" and lm.weight(lm.write_path(LAYERS[1])).device == SECOND
    assert second.met > 100 and all(hook.calls > 3 for hook in hooks), "nothing crossed"
    for one, other in zip(edit.updates, expected.updates, strict=True):
        assert torch.equal(one.delta, other.delta) and one.delta.norm() > 0
    assert found.records() == after.records()
    assert fingerprint(lm.model) == before


def test_what_two_devices_do_not_share_is_noticed():
    lm = random_model("gpt2")
    shard(lm, 1)
    with SecondDevice(), pytest.raises(RuntimeError, match="same device"):
        lm.weight(lm.write_path(2)) @ lm.weight(lm.write_path(0)).T
    with SecondDevice():
        moved = lm.weight(lm.write_path(0)).to(SECOND)
        assert (lm.weight(lm.write_path(2)) @ moved.T).device == SECOND


def test_offloaded_weights_are_refused_in_one_line():
    model = random_model("llama").model
    accelerate.cpu_offload(model, execution_device="cpu")
    said = "tensors without values .*offloaded.*on devices that hold it$"
    with pytest.raises(ArchitectureError, match=said) as found:
        LanguageModel(model, random_model("llama").tokenizer, "away")
    assert "\n" not in str(found.value)


def test_accelerates_own_dispatch_changes_nothing():
    whole, lm = random_model("llama"), random_model("llama")
    names = {f"model.layers.{i}": "cpu" for i in range(lm.depth)}
    places = names | {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(lm.model, places, main_device="cpu", force_hooks=True)
    hooked = LanguageModel(model, lm.tokenizer, lm.name)
    assert all(hasattr(block, "_hf_hook") for block in hooked.blocks)
    edits = []
    for one in (whole, hooked):
        given = statistics(one, layers=LAYERS, tokens=600, cache=False)
        edits.append(editor("memit", one, contexts=("{}",)).edit(one, REQUESTS, given))
    assert all(map(torch.equal, *([u.delta for u in edit.updates] for edit in edits)))
    assert all(hasattr(block, "_hf_hook") and "forward" in vars(block) for block in hooked.blocks)


def test_a_model_is_spread_over_what_there_is():
    one, spread = mk.load("tiny"), mk.load("tiny", device="auto")
    assert spread.device == one.device and spread.digest(spread.write_path(0)) == one.digest(one.write_path(0))
