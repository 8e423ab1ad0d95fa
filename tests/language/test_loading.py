"""Weights that are more than numbers, wrapped models, and folders whose tensors are not the model's."""

from __future__ import annotations

import json

import pytest
import torch
from models import LLAMA, random_model, random_weights, small_tokenizer
from safetensors.torch import load_file, save_file
from same import fingerprint
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoConfig, AutoModelForCausalLM

from metake import ARCHITECTURES, ArchitectureError, LanguageModel, NumericalError, ParameterError, load
from metake.language.tokens import pad

PATH = "model.layers.2.mlp.down_proj"

# Weights that are more than numbers


class Scaled(nn.Linear):
    """x Wᵀ · s, with s kept in some way."""

    def __init__(self, kept):
        super().__init__(48, 32, bias=False)
        if kept == "buffer":
            self.register_buffer("weight_scale", torch.tensor(2.0))
        elif kept == "parameter":
            self.weight_scale = nn.Parameter(torch.tensor(2.0))
        else:
            self.weight_scale = 2.0

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.weight_scale


class Packed(torch.Tensor):
    """Numbers that a subclass of Tensor unpacks."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def float8(linear):
    linear.weight = nn.Parameter(linear.weight.float().to(torch.float8_e4m3fn), requires_grad=False)


def packed(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)


def folded(linear):
    """Two numbers in each, as 4-bit weights are stored."""
    linear.weight = nn.Parameter(torch.zeros(32 * 24, 1, dtype=torch.uint8), requires_grad=False)


def hooked(linear):
    linear.register_forward_hook(lambda _, args, out: out + 0.1 * out.roll(1, -1))


def forwarded(linear):
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) + 0.1 * x[..., :32]


CHANGED = {
    "float8": float8, "packed": packed, "4 bits": folded,
    "spectral": parametrizations.spectral_norm, "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": nn.utils.weight_norm, "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "own": lambda linear: parametrize.register_parametrization(linear, "weight", nn.Identity()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", CHANGED)
@pytest.mark.parametrize("late", [False, True])
def test_a_weight_that_is_more_than_numbers_is_refused(how, late):
    lm = random_model("llama")
    CHANGED[how](lm.model.get_submodule(PATH))
    with pytest.raises(ArchitectureError, match=f"{PATH}.*dequantize it, merge its adapter, or unwrap"):
        lm.weight(PATH) if late else LanguageModel(lm.model, lm.tokenizer, "a model")


@pytest.mark.parametrize("kept", ["buffer", "parameter", "number"])
@pytest.mark.parametrize("late", [False, True])
def test_a_subclass_that_carries_scales_is_refused(kept, late):
    lm = random_model("llama")
    lm.model.model.layers[2].mlp.down_proj = Scaled(kept).double()
    others = ", weight_scale" if kept != "number" else ""
    said = rf"{PATH}' of '.*' is a Scaled \(torch.float64{others}\); only nn.Linear"
    with pytest.raises(ArchitectureError, match=said):
        lm.weight(PATH) if late else LanguageModel(lm.model, lm.tokenizer, "a model")


@pytest.mark.parametrize("change", [hooked, forwarded])
def test_a_linear_map_to_whose_output_something_is_added_is_refused(change):
    lm = random_model("llama")
    change(lm.model.get_submodule(PATH))
    with pytest.raises(ArchitectureError, match=f"{PATH}' does not return its weight times its input"):
        LanguageModel(lm.model, lm.tokenizer, "a model")


def test_a_family_s_own_plain_linear_is_one():
    lm = random_model("falcon")
    assert type(lm.write(0)).__name__ == "FalconLinear" and lm.weight(lm.write_path(0)).shape == (32, 48)
    lm.write(0).register_buffer("scale", torch.ones(1))
    with pytest.raises(ArchitectureError, match=r"is a FalconLinear \(torch.float64, scale\)"):
        lm.weight(lm.write_path(0))


# Wrapped models


def wrapped(how, model):
    if how == "adapters":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    if how == "compiled":
        return torch.compile(model)
    if how == "compiled inside":
        model.model = torch.compile(model.model)
    if how == "one block compiled":
        model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


@pytest.mark.parametrize("how", ["adapters", "compiled", "compiled inside", "one block compiled"])
def test_a_wrapped_model_is_refused_with_what_to_do_instead(how):
    model = wrapped(how, random_model("llama").model)
    with pytest.raises(ArchitectureError, match=r"wrapped, and has '.*'\. Pass the model .*_orig_mod.*merge_and") as e:
        LanguageModel(model, None, "a model")
    assert "correct metake" not in str(e.value)


def test_adapters_in_the_edited_weight_are_refused_and_merged_ones_are_not():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(random_model("llama").model, LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ArchitectureError, match=r"down_proj' of 'a model' is a Linear \(.*lora_A.*merge its adapter"):
        LanguageModel(model.get_base_model(), None, "a model")
    LanguageModel(model.merge_and_unload(), None, "a model")


@pytest.mark.parametrize("what", ["model", "block"])
def test_a_model_compiled_in_place_is_refused(what):
    model = random_model("llama").model
    (model if what == "model" else model.model.layers[1]).compile()
    with pytest.raises(ArchitectureError, match="compiled in place.*do not compile it"):
        LanguageModel(model, None, "a model")


def test_a_module_without_a_configuration_is_refused():
    with pytest.raises(ArchitectureError, match="'a model', a DataParallel, has no configuration.*pass what it wraps"):
        LanguageModel(nn.DataParallel(random_model("llama").model), None, "a model")


# Models that are not whole


def test_tensors_without_values_are_refused():
    config = AutoConfig.for_model("llama", vocab_size=384, **LLAMA)
    with torch.device("meta"):
        away = AutoModelForCausalLM.from_config(config)
    some = random_model("llama").model
    some.model.layers[3].to("meta")
    for model, count in ((away, r"4\d"), (some, "9")):
        with pytest.raises(ArchitectureError, match=rf"has {count} of 4\d tensors without values .*without device_map"):
            LanguageModel(model, None, "a model")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    lm = random_model("gpt2")
    lm.model.save_pretrained(tmp_path)
    tokenizer = small_tokenizer()
    large = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    size = max(tokenizer.get_vocab().values()) + 1
    large.add_tokens([f"<{i}>" for i in range(390 - size)])
    large.save_pretrained(tmp_path)
    said = r"has tokens up to number 389, but the model has embeddings of 0 to 383 only"
    with pytest.raises(ParameterError, match=said):
        LanguageModel(lm.model, large, "a model")
    with pytest.raises(ParameterError, match=said):
        load(tmp_path)


def test_a_text_model_inside_a_larger_one_is_refused(monkeypatch):
    text = LLAMA | {"vocab_size": 384, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config)
    for _ in range(2):
        with pytest.raises(ArchitectureError, match=r"its text model's configuration \(gemma3_text\) inside its own"):
            LanguageModel(model, None, "a model")
        monkeypatch.setitem(ARCHITECTURES, "gemma3", ARCHITECTURES["llama"])


def test_a_configuration_without_the_common_names_is_refused(monkeypatch):
    model = random_model("llama").model
    monkeypatch.delattr(type(model.config), "hidden_size")
    del model.config.hidden_size
    with pytest.raises(ArchitectureError, match="has no hidden_size in its configuration"):
        LanguageModel(model, None, "a model")


# Folders


def folder(path, kind="llama", tensors=lambda t: t, **config):
    """A saved model whose file and configuration were changed."""
    lm = random_model(kind, torch.float32)
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    save_file(tensors(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | config))
    return lm


def without(*names):
    return lambda tensors: {k: t for k, t in tensors.items() if not any(name in k for name in names)}


def prefixed(prefix):
    return lambda tensors: {prefix + k: t for k, t in tensors.items()}


BROKEN = {
    "one missing": ({"tensors": without("layers.1.mlp.down_proj")}, "it lacks model.layers.1.mlp.down_proj.weight"),
    "a head missing": ({"tensors": without("lm_head")}, "lacks lm_head.weight"),
    "adapters": ({"tensors": prefixed("base_model.model.")}, "lacks .* and 36 more; it also holds base_model.model.lm"),
    "compiled": ({"tensors": prefixed("_orig_mod.")}, "also holds _orig_mod.lm_head.weight"),
    "parallel": ({"tensors": prefixed("module.")}, "also holds module.lm_head.weight"),
    "scales": ({"tensors": lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}},
               "it also holds model.layers.0.mlp.up_proj.weight_scale"),
    "fewer layers": ({"num_hidden_layers": 2}, "it also holds model.layers.2"),
    "more layers": ({"num_hidden_layers": 5}, "it lacks model.layers.4"),
    "another width": ({"intermediate_size": 64}, r"in another shape model.*\(32, 48\) for \(32, 64\), .* and 9 more"),
    "another vocabulary": ({"vocab_size": 390}, r"in another shape lm_head.weight \(384, 32\) for \(390, 32\), mod"),
    "of GPT-2": ({"kind": "gpt2", "n_embd": 64}, "holds in another shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_tensors_that_are_not_the_model_s_are_refused(tmp_path, what):
    change, said = BROKEN[what]
    folder(tmp_path, **change)
    with pytest.raises(ParameterError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and "or correct config.json" in str(error.value)


def buffers(names, of=4):
    def more(tensors):
        stored = {n.format(i): torch.ones(1, 1, 8, 8) for n in names for i in range(of)}
        return tensors | stored

    return more


HARMLESS = {
    "gpt2": {"tensors": buffers(("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"))},
    "gptj": {"tensors": buffers(("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"))},
    "gpt_neox": {"tensors": buffers(
        [f"gpt_neox.layers.{{}}.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")])},
    "llama": {"tensors": buffers(
        [f"model.layers.{{}}.self_attn.rotary_emb.{n}" for n in ("inv_freq", "cos_cached", "sin_cached")])},
    "phi": {"tensors": buffers(("model.layers.{}.self_attn.rotary_emb.inv_freq",))},
    "mistral": {"tensors": without("lm_head"), "tie_word_embeddings": True},
    "opt": {}, "bloom": {}, "falcon": {}, "mpt": {}, "gemma": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_older_versions_stored_beside_and_tied_heads_do_no_harm(tmp_path, kind):
    lm, found = folder(tmp_path, kind, **HARMLESS[kind]), load(tmp_path)
    for path in map(lm.write_path, range(lm.depth)):
        assert torch.equal(found.weight(path), lm.weight(path))


def test_the_base_model_s_names_are_read_too(tmp_path):
    own = folder(tmp_path, "gpt2", lambda tensors: {k.removeprefix("transformer."): t for k, t in tensors.items()})
    assert fingerprint(load(tmp_path).model) == fingerprint(own.model)


# Windows


@pytest.mark.parametrize("kind", ["mistral", "phi3", "starcoder2"])
@pytest.mark.parametrize("window", [2, 5])
def test_a_narrow_window_in_float64_is_named_where_it_gives_nan(kind, window):
    model = random_weights(kind, LLAMA | {"sliding_window": window})
    batch, edge = pad([tuple(range(12)), (1, 2)], "cpu"), pad([tuple(range(2 + window)), (3, 4, 5)], "cpu")
    wide = LanguageModel(model, small_tokenizer(), "a model").run(batch).logits
    model.set_attn_implementation("eager")
    lm = LanguageModel(model, small_tokenizer(), "a model")
    with pytest.raises(NumericalError, match=rf"padded by 10 columns .* NaN .* window of {window} in float64.*sdpa"):
        lm.run(batch)
    assert torch.isfinite(lm.run(edge).logits).all()
    found = LanguageModel(model.float(), small_tokenizer(), "a model").run(batch).logits
    real = batch.mask.bool()
    torch.testing.assert_close(found[real].double(), wide[real], rtol=1e-3, atol=1e-3)
