"""What is refused when a model is loaded or handed over: each with what was found and what to do, nothing changed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from models import LLAMA, MORE, random_model, random_weights
from same import fingerprint
from torch import nn

from metake import ARCHITECTURES, ArchitectureError, LanguageModel
from metake.language.model import DTYPES
from metake.language.tokens import pad

LIKE_LLAMA, LIKE_GPT2 = ARCHITECTURES["llama"], ARCHITECTURES["gpt2"]
HEADS = LLAMA | {"head_dim": 8}
POST_NORM = {"gemma2": HEADS, "gemma3_text": HEADS, "olmo2": LLAMA, "olmo3": LLAMA, "glm4": HEADS, "exaone4": HEADS}


def state(model):
    return [(m.training, *(p.requires_grad for p in m.parameters())) for m in model.modules()]


def refused(model, said):
    """The one line with which a model is refused; it is as it was."""
    before = fingerprint(model), state(model)
    with pytest.raises(ArchitectureError, match=said) as error:
        LanguageModel(model, None, "a model")
    assert (fingerprint(model), state(model)) == before and "\n" not in str(error.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return str(error.value)


# Δ·k must reach the block's output


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", POST_NORM)
def test_a_norm_after_the_mlp_is_refused(monkeypatch, kind, dtype):
    monkeypatch.setitem(ARCHITECTURES, kind, LIKE_LLAMA)
    model = random_weights(kind, POST_NORM[kind], dtype)
    said = refused(model, rf"row {kind!r}: vectors added to what 'model.layers.0.mlp.down_proj' and")
    assert float(re.search(r"with (\S+) of their length in other directions", said)[1]) > 0.1
    with torch.no_grad():  # a norm that its weight makes almost an identity, or that is nothing yet
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if "gemma" in kind else 1.0)
    refused(model, "in other directions")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("change", [{}, {"num_hidden_layers": 1}, {"residual_multiplier": 1.0}], ids=str)
def test_a_scale_is_carried_or_named(monkeypatch, dtype, change):
    model = random_weights("granite", MORE["granite"] | change, dtype)
    assert LanguageModel(model, None, "a model").scale == change.get("residual_multiplier", 0.22)
    monkeypatch.setitem(ARCHITECTURES, "granite", LIKE_LLAMA)
    if change.get("residual_multiplier") == 1.0:
        assert LanguageModel(model, None, "a model").scale == 1.0
        return
    said = refused(model, r"arrive at the output of 'model.layers.0' 0\.2\d* and 0\.2\d* times, .* where 1 times")
    assert "name it as the row's scale" in said
    for wrong in ("logits_scaling", "no_such_number"):
        monkeypatch.setitem(ARCHITECTURES, "granite", replace(LIKE_LLAMA, scale=wrong))
        refused(model, "times and nothing else were expected")


class Between(nn.Module):
    """A module with something after it."""

    def __init__(self, inner, after):
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x):
        return self.after(self.inner(x))


def gate(x):
    return x * torch.sigmoid(x.mean(-1, keepdim=True))


@pytest.mark.parametrize("after", [
    lambda x: 1.01 * x, lambda x: x * torch.linspace(0.9, 1.1, 32), lambda x: 30 * torch.tanh(x / 30), gate,
    lambda x: x.roll(1, -1), lambda x: x.roll(1, 1), lambda x: 0 * x, lambda x: x.half().to(x),
])  # fmt: skip
@pytest.mark.parametrize("layer", [0, 3])
def test_whatever_follows_the_mlp_of_any_block_is_refused(monkeypatch, after, layer):
    model = random_model("gpt2").model
    model.transformer.h[layer].mlp.dropout = Between(nn.Identity(), after)
    refused(model, rf"at the output of 'transformer.h.{layer}'|logits")


def test_a_residual_stream_in_which_one_number_is_large_is_no_reason_to_refuse():
    for dtype in DTYPES.values():
        model = random_weights("llama", LLAMA, dtype)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[3] *= 3000.0
            model.model.embed_tokens.weight[:, 5] = 500.0
        LanguageModel(model, None, "a model")


# Rows of one's own


@pytest.mark.parametrize(("kind", "change", "said"), [
    ("llama", {"write": "model.layers.{}.mlp.up_proj"}, r"\(48, 32\) \(d_out, d_in\) where \(32, 32\)"),
    ("llama", {"attention": "model.layers.{}.self_attn.q_proj"}, "and 'model.layers.0.self_attn.q_proj' return arrive"),
    ("llama", {"attention": "model.layers.{}.self_attn.k_proj"}, r"k_proj' returns \(1, 2, 16\)"),
    ("llama", {"attention": "model.layers.{}.input_layernorm"}, "and 'model.layers.0.input_layernorm' return arrive"),
    ("llama", {"attention": "model.layers.{}.post_attention_layernorm"}, "post_attention_layernorm' return arrive"),
    ("llama", {"attention": "model.layers.{}.mlp"}, r"must run its attention .*\['key', 'write', 'attention'\]"),
    ("llama", {"attention": "model.layers.{}.mlp.down_proj"}, "must run its attention"),
    ("llama", {"attention": "model.layers.{}"}, "must run its attention"),
    ("phi3", {"attention": "model.layers.{}.resid_mlp_dropout"}, "must run its attention"),
    ("llama", {"mlp": "model.layers.{}"}, "two tokens do not run through the model|logits"),
    ("llama", {"block": "model.layers.{}.mlp"}, "not inside its block"),
    ("bloom", {"write": "transformer.h.{}.self_attention.dense", "mlp": "transformer.h.{}.self_attention"}, "must run"),
    ("opt", {"write": "model.decoder.layers.{}.fc1", "mlp": "model.decoder.layers.{}.fc1"}, r"\(48, 32\) \(d_out"),
    ("gpt_neox", {"attention": "gpt_neox.layers.{}.post_mlp_dropout"}, "must run its attention"),
    ("llama", {"write": "model.layers.{}.self_attn.o_proj", "mlp": "model.layers.{}.self_attn"}, "must run its att"),
])  # fmt: skip
def test_a_wrong_row_of_ones_own_is_refused(monkeypatch, kind, change, said):
    model = random_model(kind).model
    monkeypatch.setitem(ARCHITECTURES, kind, replace(ARCHITECTURES[kind], **change))
    refused(model, said)


@pytest.mark.parametrize(("kind", "change"), [
    ("llama", {"mlp": "model.layers.{}.mlp.down_proj"}), ("gpt2", {"mlp": "transformer.h.{}.mlp.c_proj"}),
    ("llama", {"attention": "model.layers.{}.self_attn.o_proj"}),
])  # fmt: skip
def test_a_row_that_names_less_than_it_could_is_right(monkeypatch, kind, change):
    model = random_model(kind).model
    monkeypatch.setitem(ARCHITECTURES, kind, replace(ARCHITECTURES[kind], **change))
    lm, rows = LanguageModel(model, None, "a model"), torch.tensor([0, 1])
    batch = pad([(5, 6, 7), (8, 9)], lm.device)
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(batch, rows, rows), lm.run(batch).logits[rows, rows])


class Kept(nn.Module):
    """A block that returns its hidden state somehow else."""

    def __init__(self, block, out):
        super().__init__()
        self.__dict__["block"], self.out = block, out
        self.mlp, self.self_attn = block.mlp, block.self_attn

    def forward(self, *args, **given):
        return self.out(self.block(*args, **given))


@pytest.mark.parametrize("out", [
    lambda x: {"hidden_states": x}, lambda x: x.flatten(0, 1), lambda x: x[:, None], lambda x: [x], lambda x: (None, x)
])  # fmt: skip
def test_blocks_that_return_something_else_are_refused(out):
    model = random_model("llama").model
    model.model.layers = nn.ModuleList(Kept(block, out) for block in model.model.layers)
    refused(model, "row 'llama'")


def test_a_block_without_the_parts_of_the_others_is_refused():
    model = random_model("gpt2").model
    model.transformer.h[2].mlp = nn.Sequential(nn.Linear(32, 32))
    refused(model, r"names write = 'transformer.h.\{\}.mlp.c_proj', but the model has no such module "
                   r"\(transformer.h.2.mlp.c_proj\)")  # fmt: skip


@pytest.mark.parametrize(("kind", "own"), [
    ("mixtral", {"num_local_experts": 4}), ("qwen3_moe", {"moe_intermediate_size": 16, "num_experts": 4}),
    ("qwen2_moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}),
    ("granitemoe", {"num_local_experts": 4}),
])  # fmt: skip
def test_mixtures_of_experts_are_refused_by_name(monkeypatch, kind, own):
    model = random_weights(kind, LLAMA | own)
    refused(model, rf"'{kind}' is a mixture of experts \(.*experts = 4.*take a dense model")
    monkeypatch.setitem(ARCHITECTURES, kind, LIKE_LLAMA)
    refused(model, "no such module .* is a mixture of experts" if kind != "granitemoe" else "mixture of experts")


def test_what_is_not_finite_is_left_to_those_who_compute_with_it():
    model = random_model("llama").model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    LanguageModel(model, None, "a model")
