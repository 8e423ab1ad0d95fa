"""Every row of the architecture table on a random model: what is read, written, resumed and restored is exactly
that.
"""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from models import random_model
from same import fingerprint
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from metake import (
    ARCHITECTURES,
    Architecture,
    ArchitectureError,
    EditRequest,
    LayerUpdate,
    ParameterError,
    load,
    methods,
    statistics,
)
from metake.language.model import LanguageModel
from metake.language.tokens import pad

ROWS = [(5, 17, 300, 41, 9, 77), (12, 250, 33), (3, 8, 19, 27)]


def close(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def plain(lm, row, keys, states):
    """The same activations by hooks of our own on one unpadded row."""
    seen, handles = {}, []
    for i in keys:
        handles.append(
            lm.write(i).register_forward_hook(lambda _, args, __, i=i: seen.__setitem__(("key", i), args[0][0]))
        )
    for i in states:
        handles.append(
            lm.block(i).register_forward_hook(
                lambda _, __, out, i=i: seen.__setitem__(("state", i), (out[0] if isinstance(out, tuple) else out)[0])
            )
        )
    logits = lm.model(torch.tensor([row])).logits[0]
    for handle in handles:
        handle.remove()
    return seen, logits


def test_capture_equals_plain_hooks(lm):
    batch = pad(ROWS, lm.device)
    calls = []
    for i in range(lm.depth):
        lm.block(i).register_forward_hook(lambda *_, i=i: calls.append(i))
    keys, states = lm.read(batch, keys=[0, 2], states=[1])
    assert calls == [0, 1], "block 2 is left after its write, block 3 never runs"
    assert (set(keys), set(states)) == ({0, 2}, {1})
    for r, row in enumerate(ROWS):
        seen, _ = plain(lm, row, [0, 2], [1])
        for name, found in ((("key", 0), keys[0]), (("key", 2), keys[2]), (("state", 1), states[1])):
            close(found[r, : len(row)], seen[name])
    assert lm.read(batch, states=[3], then=lambda t: t[:, -1:])[1][3].shape == (3, 1, lm.width)


def test_logits_at_pairs_are_the_full_logits(lm):
    batch = pad(ROWS, lm.device)
    pairs = [(r, c) for r, row in enumerate(ROWS) for c in range(len(row))][::-1]
    rows, columns = (torch.tensor(x) for x in zip(*pairs, strict=True))
    found = lm.logits(batch, rows, columns)
    close(found, torch.stack([plain(lm, ROWS[r], (), ())[1][c] for r, c in pairs]))
    close(lm.run(batch).logits[rows, columns], found)  # and the head computes all of them again


def test_the_last_mlp_runs_where_logits_are_read_and_its_gradient_is_that_of_the_whole(lm):
    batch, seen = pad(ROWS, lm.device), []
    rows, columns = torch.tensor([0, 2, 2, 0, 1]), torch.tensor([5, 0, 3, 5, 1])  # one pair twice
    state = lm.read(batch, states=[1])[1][1].requires_grad_()
    handle = lm.write(lm.depth - 1).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    with lm.resumed(1, state):
        ours = lm.logits(batch, rows, columns)
        theirs = lm.run(batch).logits[rows, columns]
    handle.remove()
    assert seen == [4, len(ROWS) * max(map(len, ROWS))]
    close(ours, theirs)
    direction = torch.randn_like(ours)
    one, other = (torch.autograd.grad((logits * direction).sum(), state)[0] for logits in (ours, theirs))
    assert one.norm() > 0
    close(one, other)


def test_weight_is_d_out_by_d_in_and_an_update_moves_the_block_by_delta_u(lm):
    path, layer, batch = lm.write_path(1), lm.write(1), pad(ROWS, lm.device)
    weight = lm.weight(path)
    assert lm.shape(path) == tuple(weight.shape) and weight.shape[0] == lm.width
    assert isinstance(layer, Conv1D) == (lm.name == "random-gpt2")
    keys, before = lm.read(batch, [1], [1])
    bias = layer.bias if layer.bias is not None else 0.0
    close(layer(keys[1]), keys[1] @ weight.T + bias)
    old = fingerprint(lm.model)
    update = LayerUpdate(
        path, torch.randn(weight.shape[0], 2, dtype=lm.dtype), torch.randn(2, weight.shape[1], dtype=lm.dtype)
    )
    lm.add(path, update)
    keys_after, after = lm.read(batch, [1], [1])
    close(keys_after[1], keys[1], 0)
    close(after[1] - before[1], keys[1] @ (update.left @ update.right).T)
    assert {n for n, h in fingerprint(lm.model).items() if h != old[n]} == {f"{path}.weight"}
    new = torch.randn_like(weight)
    lm.write_weight(path, new)
    close(layer(keys[1]), keys[1] @ new.T + bias)
    assert torch.equal(lm.weight(path), new) and weight.data_ptr() == lm.weight(path).data_ptr(), "a view that follows"
    with pytest.raises(ArchitectureError, match=r"d_out, d_in"):
        lm.write_weight(path, new.T)


@pytest.mark.parametrize("last", [-1, 0, 2, 3])
def test_resumed_reproduces_the_forward_and_its_gradient(lm, last):
    batch = pad(ROWS, lm.device)
    rows, columns = torch.arange(len(ROWS)), torch.tensor([len(row) - 1 for row in ROWS])
    state = lm.read(batch, states=[max(last, 0)])[1][max(last, 0)].requires_grad_()
    calls = []
    handles = [lm.write(i).register_forward_hook(lambda *_, i=i: calls.append(i)) for i in range(lm.depth)]
    with lm.resumed(last, state):
        resumed = lm.logits(batch, rows, columns)
    assert calls == list(range(last + 1, lm.depth)), "blocks up to `last` are not computed"
    for handle in handles:
        handle.remove()
    close(resumed, lm.logits(batch, rows, columns))
    if last >= 0:  # the same state planted by a hook in the whole forward
        planted, direction = (
            state.detach().clone().requires_grad_(), torch.randn(len(ROWS), resumed.shape[1], dtype=lm.dtype)
        )
        lm.block(last).register_forward_hook(
            lambda _, __, out: (planted, *out[1:]) if isinstance(out, tuple) else planted
        )
        full = lm.logits(batch, rows, columns)
        ours, theirs = (
            torch.autograd.grad((out * direction).sum(), at)[0] for out, at in ((resumed, state), (full, planted))
        )
        assert ours.norm() > 0
        close(ours, theirs)


def test_hooks_and_forwards_are_gone_after_an_error(lm):
    batch, forwards = pad(ROWS, lm.device), [block.forward for block in lm.blocks]
    with pytest.raises(ZeroDivisionError), lm.resumed(2, lm.read(batch, states=[2])[1][2]):
        lm.read(batch, keys=[3], then=lambda t: 1 / 0)
    with pytest.raises(IndexError):
        lm.logits(batch, torch.tensor([99]), torch.tensor([0]))
    assert [block.forward for block in lm.blocks] == forwards
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


# Restoring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fail", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scratch_restores_bit_for_bit(kind, dtype, fail):
    lm = random_model(kind, dtype)
    paths = [lm.write_path(1), lm.write_path(3)]
    lm.weight(paths[0])[0, 0], lm.weight(paths[0])[0, 1] = -0.0, float("nan")
    before = fingerprint(lm.model)

    def edit():
        for path in paths:
            d_out, d_in = lm.shape(path)
            update = LayerUpdate(path, torch.randn(d_out, 1), torch.randn(1, d_in))
            lm.add(path, update)
            lm.add(path, LayerUpdate(path, -update.left, update.right))
        if fail:
            raise fail

    expected = pytest.raises(fail) if fail else nullcontext()
    with expected, lm.scratch(paths):
        edit()
    assert fingerprint(lm.model) == before
    with expected, lm.restored_on_error(paths):
        edit()
    assert (fingerprint(lm.model) == before) == bool(fail), (
        "adding and subtracting does not restore: only the copies do"
    )


def test_an_update_is_rounded_once():
    lm = random_model("llama", torch.bfloat16)
    path, weight = lm.write_path(0), lm.weight(lm.write_path(0)).clone()
    update = LayerUpdate(path, 1e-3 * torch.randn(32, 3, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64))
    lm.add(path, update)
    assert torch.equal(lm.weight(path), (weight.double() + update.delta).bfloat16())


# The table


def test_unknown_model_type_names_it_and_the_way_out():
    model = random_model("llama").model
    model.config.model_type = "lama"
    with pytest.raises(
        ArchitectureError,
        match=r"unknown architecture 'lama'.*Did you mean 'llama'.*ARCHITECTURES\[model_type\] = Architecture",
    ):
        LanguageModel(model, None, "a model")


@pytest.mark.parametrize(("part", "path", "said"), [
    ("mlp", "transformer.h.{}.ffn", "'gpt2' names mlp = 'transformer.h.{}.ffn', but the model has no such module"),
    ("write", "transformer.h.{}.mlp.down_proj", "'gpt2' names write = 'transformer.h.{}.mlp.down_proj', but the "
        "model has no such module"),
    ("block", "transformer.h.{}.mlp", "attention = 'transformer.h.{}.attn', which is not inside its block = "
        "'transformer.h.{}.mlp'"),
    ("block", "transformer.h.{}.mlp.c_fc", "mlp = 'transformer.h.{}.mlp', which is not inside its block = "
        "'transformer.h.{}.mlp.c_fc'"),
    ("block", "transformer.h.0", "block = 'transformer.h.0', which must contain exactly one {}"),
    ("write", "transformer.h.{}.mlp.c_fc", "the weight of 'transformer.h.0.mlp.c_fc' is (128, 32) (d_out, d_in) "
        "where (32, 32) was expected"),
    ("write", "transformer.h.{}.attn.c_proj", "write = 'transformer.h.{}.attn.c_proj', which is not inside its mlp"),
    ("write", "transformer.h.{}.mlp.dropout", "'transformer.h.0.mlp.dropout' of 'a model' is a Dropout (no "
        "weight); only nn.Linear and Conv1D"),
])  # fmt: skip
def test_a_wrong_row_is_refused_naming_what(monkeypatch, part, path, said):
    model = random_model("gpt2").model
    row = {p: getattr(ARCHITECTURES["gpt2"], p) for p in ("block", "mlp", "write", "attention")} | {part: path}
    monkeypatch.setitem(ARCHITECTURES, "gpt2", Architecture(**row))
    with pytest.raises(ArchitectureError, match=re.escape(said)):
        LanguageModel(model, None, "a model")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_block_of_another_width_is_refused(monkeypatch):
    model = random_model("llama").model

    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.model.layers[0].register_forward_hook(lambda _, __, out: out.repeat(1, 1, 2))
    model.model.norm, model.lm_head = nn.Identity(), nn.Linear(64, 384).double()
    with pytest.raises(ArchitectureError, match=r"'model.layers.0' returns \(1, 2, 64\) where \(1, 2, 32\)"):
        LanguageModel(model, None, "a model")


def test_a_row_added_by_the_user_works(monkeypatch, tmp_path):
    donor = random_model("llama")
    config = AutoConfig.for_model("codegen", vocab_size=384, n_embd=32, n_layer=3, n_head=4, rotary_dim=4)
    model = AutoModelForCausalLM.from_config(config).double()
    with pytest.raises(ArchitectureError, match="codegen"):
        LanguageModel(model, donor.tokenizer, "coder")
    monkeypatch.setitem(
        ARCHITECTURES, "codegen",
        Architecture(
            "transformer.h.{}", "transformer.h.{}.mlp", "transformer.h.{}.mlp.fc_out", "transformer.h.{}.attn"
        )
    )
    lm = LanguageModel(model, donor.tokenizer, "coder")
    edit = methods.memit("tiny", layers=(1,), contexts=("{}",)).edit(
        lm, [EditRequest("{} is in", "Paris", "Rome", "a")], statistics(lm, layers=[1], tokens=800, cache=False)
    )
    before = lm.read(pad(ROWS, lm.device), [1], [1])
    edit.apply(lm)
    after = lm.read(pad(ROWS, lm.device), [1], [1])
    close(after[1][1] - before[1][1], before[0][1] @ edit.updates[0].delta.T)


@pytest.mark.parametrize("layer", [4, -1, 99])
def test_a_layer_out_of_range_is_refused(layer):
    lm = random_model("gpt2")
    for act in (lm.write_path, lm.write, lambda i: statistics(lm, layers=[1, i], tokens=300, cache=False)):
        with pytest.raises(ParameterError, match=rf"layer {layer} does not exist: 'random-gpt2' has blocks 0 to 3"):
            act(layer)


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8], ids=str)
def test_quantized_and_other_weights_are_refused(stored):
    lm = random_model("llama")
    with pytest.raises(ArchitectureError, match=r"'model.norm' of 'random-llama' is a LlamaRMSNorm"):
        lm.weight("model.norm")
    path = lm.write_path(2)
    lm.model.get_submodule(path).weight = nn.Parameter(torch.zeros(32, 48, dtype=stored), requires_grad=False)
    for act in (lm.weight, lm.shape, lambda p: lm.write_weight(p, torch.ones(32, 48))):
        with pytest.raises(ArchitectureError, match=rf"{re.escape(path)}.*{stored}.*quantized"):
            act(path)


# Loading


def test_a_local_folder_loads_as_it_was_saved(tmp_path):
    lm = random_model("gpt2", torch.bfloat16)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert (found.dtype, found.name, found.origin["origin"]) == (torch.float32, str(tmp_path), "local"), (
        "never the checkpoint's dtype"
    )
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())
    for path in map(lm.write_path, range(lm.depth)):
        assert torch.equal(found.weight(path), lm.weight(path).float())
    text = "Beyoncé flew a Boeing 747"
    assert found.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    assert load(tmp_path, "bfloat16").dtype == torch.bfloat16 and load(tmp_path, torch.float64).dtype == torch.float64


def test_an_unknown_dtype_or_name_is_answered_with_near_matches(tmp_path):
    with pytest.raises(ParameterError, match="unknown dtype 'float23'. Did you mean 'float32'"):
        load("tiny", dtype="float23")
    with pytest.raises(ParameterError, match="unknown model 'tinny'. Did you mean 'tiny'"):
        load("tinny")
