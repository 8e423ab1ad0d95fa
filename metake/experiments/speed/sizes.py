"""Models of published sizes with random weights: what a batch of edits costs on them needs no download."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from metake.algebra.geometry import KeyStatistics
from metake.editing.recipes import recipe
from metake.editing.statistics import Statistics
from metake.language import assets
from metake.language.generation import context_templates
from metake.language.model import DTYPES, MASTERED, LanguageModel, load
from metake.support.errors import ParameterError, near_misses
from metake.support.machine import default_device, usable

BLOCK = 4_194_301  # random numbers drawn for all weights: a prime, so that no two rows of a matrix are equal
SPREAD = 0.02  # of a weight: what these families are initialized with


def size_of(model: str) -> str:
    """The name in `data/sizes.toml` of a model, by its own or its hub name; else ParameterError, with near matches."""
    known = _sizes()
    if model in known:
        return model
    try:
        name = recipe(model).model
    except ParameterError:
        name = ""
    if name not in known:
        raise ParameterError(near_misses(model, known, "model of known size"))
    return name


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a size."""
    numbers = dict(_sizes()[name])
    return AutoConfig.for_model(numbers.pop("kind"), **numbers, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def random_model(model: str, dtype: str | None = None, device: str | None = None) -> LanguageModel:
    """A model of `model`'s full size with random weights, in `dtype` on `device`; its tokenizer is that of `tiny`.

    Weights repeat one block of 4 million normal numbers: a memory copy, not a draw, for each. `tiny`'s token ids exist
    in every larger vocabulary; as it knows few words, a text has more tokens than the real model's tokenizer would give
    it.
    dtype: default float32 (float64 for "tiny"). Raises ParameterError for an unknown name, dtype or device.
    """
    name = size_of(model)
    place = usable(device) if device else default_device()
    if dtype is not None and dtype not in DTYPES:
        raise ParameterError(near_misses(dtype, DTYPES, "dtype"))
    kind = DTYPES[dtype or ("float64" if name == "tiny" else "float32")]
    config = config_of(name)
    with no_init_weights(), place:
        built = AutoModelForCausalLM.from_config(config, dtype=kind)
    built.tie_weights()  # a part of the initialization that was passed over
    _fill(built)
    origin = {"origin": "random weights", "revision": "", "note": f"of the size of {name}; tokenizer of tiny"}
    lm = LanguageModel(built, assets.read_tokenizer(assets.resolve("tiny").path), name, origin)
    lm.masters = {} if dtype == MASTERED else None
    return lm


def random_contexts(seed: int = 0) -> tuple[str, ...]:
    """Context templates for a model that writes no words: those that `tiny` samples."""
    return context_templates(load("tiny"), seed=seed)


def random_statistics(lm: LanguageModel, layers: Sequence[int], threshold: float, seed: int = 0) -> Statistics:
    """Key statistics of random keys with independent coordinates: a diagonal second moment, whose spectrum is known.

    Half of the eigenvalues lie below `threshold`, the most costly share for a projector that keeps the thinner factor.
    Solves are as dense as with real statistics: no kernel looks for zeros. All layers share one moment.
    """
    width = lm.shape(lm.write_path(layers[0]))[1]
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    below, above = 0.05 + 0.9 * drawn[: width // 2], 2 + 100 * drawn[width // 2 :]
    values = (threshold * torch.cat([below, above])).sort().values.to(lm.device)
    count = 100 * width
    one = KeyStatistics((count * values).diag(), count)
    one.__dict__["_eigh"] = (values, torch.eye(width, dtype=torch.float64, device=lm.device))
    return Statistics(dict.fromkeys(layers, one), "", {"text": "random keys", "tokens": count, "model": lm.name})


def _sizes() -> dict[str, Any]:
    return tomllib.loads((resources.files("metake") / "data" / "sizes.toml").read_text(encoding="utf-8"))


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int = 0) -> None:
    """Matrices become random numbers, scales of norms ones, biases zeros; buffers stay as the model made them."""
    block = SPREAD * torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))
    place = {(p.device, p.dtype): block.to(p.device, p.dtype) for p in model.parameters()}
    begin = 0
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        if parameter.ndim == 1:
            flat.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        source = place[parameter.device, parameter.dtype]
        for at in range(math.ceil((len(flat) + begin) / BLOCK)):
            low, high = max(at * BLOCK - begin, 0), min((at + 1) * BLOCK - begin, len(flat))
            flat[low:high] = source[low + begin - at * BLOCK : high + begin - at * BLOCK]
        begin = (begin + len(flat)) % BLOCK
