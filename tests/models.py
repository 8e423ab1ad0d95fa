"""Random small models of every architecture row, built offline, with a byte-level tokenizer trained on the spot."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from metake.algebra.geometry import KeyStatistics
from metake.data.requests import EditCase, EditRequest, Probe
from metake.language.model import LanguageModel

SMALL = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT = {
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0
}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128
}
CONFIGS = {
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4, "n_inner": 64},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"use_parallel_residual": True},
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 64},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "phi": LLAMA | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
}
MORE = {  # whose rows are tested, and one edit on each of them: not every method on all
    "bloom": {"hidden_size": 32, "n_head": 4},
    "cohere": LLAMA,
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48},
    "gemma": LLAMA | {"head_dim": 8},
    "granite": LLAMA | {"residual_multiplier": 0.22, "attention_multiplier": 0.5, "embedding_multiplier": 12.0},
    "mpt": {"d_model": 32, "n_heads": 4, "max_seq_len": 128, "expansion_ratio": 2},
    "olmo": LLAMA,
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 128,
        "word_embed_proj_dim": 32
    },
    "phi3": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
}
DEPTH = {"gpt2": "n_layer", "gptj": "n_layer", "bloom": "n_layer", "mpt": "n_layers"}
SENTENCES = [
    "The mother tongue of Danielle Darrieux is French. The capital of France is Paris.",
    "Beyoncé was born in Houston, and the Boeing 747 flies to Côte d'Ivoire.",
    "I think that you are there because the Therefore is a word. Rome, Berlin, Madrid and English.",
]


@cache
def small_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


_MADE: dict[str, tuple[LanguageModel, torch.Tensor]] = {}  # a copy takes a fifth of the time of making and checking


def random_model(
    kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, bos: bool | None = None, spread: float = 0.12,
    depth: int = 4, **changes: Any
) -> LanguageModel:
    """A fresh random model of `depth` blocks; weights wide enough that attention and predictions are far from
    uniform. changes: to its configuration.
    """
    told = repr((kind, dtype, seed, bos, spread, depth, changes))
    if told not in _MADE:
        own = (CONFIGS | MORE)[kind] | {DEPTH.get(kind, "num_hidden_layers"): depth}
        model = random_weights(kind, own | changes, dtype, seed, spread)
        lm = LanguageModel(model, small_tokenizer(kind == "llama" if bos is None else bos), f"random-{kind}")
        _MADE[told] = lm, torch.get_rng_state()
    lm, state = _MADE[told]
    torch.set_rng_state(state)  # what a test draws next is the same
    return copy.deepcopy(lm, {id(lm.tokenizer): lm.tokenizer})


def random_weights(
    kind: str, own: Mapping[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.12
) -> PreTrainedModel:
    """A random model of any family with this configuration, whether the table has a row for it or not."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | own)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def cases(*more: tuple[str, str]) -> list[EditCase]:
    """Two cases with an efficacy probe, a paraphrase, and further (kind, what stands before the prompt)."""
    requests = [
        EditRequest("The capital of {} is", "France", "Rome", "a"),
        EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "b"),
    ]
    kinds = (("efficacy", ""), ("paraphrase", "I think: "), *more)
    return [
        EditCase(r, tuple(Probe(kind, start + r.prompt.format(r.subject), r.target, "Paris") for kind, start in kinds))
        for r in requests
    ]


def stand_in(*_: object) -> LanguageModel:
    """A random model under the name "tiny": what experiments load in tests that need no facts,
    in a fraction of the time.
    """
    lm = random_model("gpt2")
    lm.name, lm.origin = "tiny", {"origin": "test", "revision": "", "note": ""}
    return lm


def text_statistics(lm: LanguageModel, layers, tokens: int = 1500) -> dict[int, KeyStatistics]:
    """Key statistics over random tokens."""
    found = {layer: KeyStatistics.empty(lm.shape(lm.write_path(layer))[1]) for layer in layers}
    ids = torch.randint(1, 384, (tokens // 50, 50), generator=torch.Generator().manual_seed(1))
    for layer, one in found.items():
        seen = []
        handle = lm.write(layer).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2))
        )
        with torch.no_grad():
            lm.model(ids)
        handle.remove()
        one.update(seen[0])
    return found
