"""What is asked of a model before it is edited: that its tensors are there and are numbers, that its tokenizer fits,
and that its row of the architecture table says what its blocks do. No family is known by name here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from metake.language.capture import adding, hidden, hooked, reading
from metake.language.tokens import Padded, continued, pad
from metake.support.errors import ArchitectureError, MetakeError, NumericalError, ParameterError

# constants that older versions of transformers saved with a model, which now computes them by itself
STORED_FORMERLY = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$|\brotary_emb\.(inv_freq|\w+_cached)$")


def check_loaded(name: str, found: Mapping[str, Any]) -> None:
    """Raise ParameterError unless the stored tensors are the model's, all of them and no others.

    found: what `from_pretrained` answers with output_loading_info; tied tensors are not missing in it.
    """
    lists = {
        "lacks": found["missing_keys"],
        "also holds": [key for key in found["unexpected_keys"] if not STORED_FORMERLY.search(key)],
        "holds in another shape": [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in found["mismatched_keys"]],
    }
    if said := "; it ".join(f"{what} {_some(sorted(keys))}" for what, keys in lists.items() if keys):
        raise ParameterError(
            f"{name!r} is not the model that its config.json describes: it {said}. Expected that model's tensors and "
            "no others: save the model itself, unwrapped and with adapters merged, or correct config.json"
        )


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_whole(model: nn.Module, name: str) -> None:
    """Raise ArchitectureError unless this is one plain language model with all its tensors at hand."""
    config, tensors = getattr(model, "config", None), [*model.parameters(), *model.buffers()]
    text, away = config and config.get_text_config(), sum(t.is_meta for t in tensors)
    absent = [part for part in ("hidden_size", "num_hidden_layers", "vocab_size") if not hasattr(text, part)]
    flaws = {
        "has no configuration; expected a causal language model of transformers: pass what it wraps": not config,
        f"keeps its text model's configuration ({getattr(text, 'model_type', '')}) inside its own; expected a causal "
        "language model alone: load its text model by itself": text is not config,
        f"has no {' and no '.join(absent)} in its configuration; expected a causal language model": absent,
        f"has {away} of {len(tensors)} tensors without values (on the meta device, or offloaded); expected all in the "
        "memory of some device: load it without device_map, or on devices that hold it": away,
        "is compiled in place, which hides its activations; expected it as it was before: do not compile it": any(
            getattr(m, "_compiled_call_impl", None) for m in model.modules()
        ),
    }
    if flaw := next((said for said, found in flaws.items() if found), ""):
        raise ArchitectureError(f"{name!r}, a {type(model).__name__}, {flaw}")


def check_tokenizer(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Raise ParameterError for a tokenizer that has tokens of which the model has no embedding."""
    rows, known = model.get_input_embeddings().weight.shape[0], getattr(tokenizer, "get_vocab", dict)()
    if (largest := max(known.values(), default=-1)) >= rows:
        raise ParameterError(
            f"the tokenizer of {name!r} has tokens up to number {largest}, but the model has embeddings of 0 to "
            f"{rows - 1} only: take the tokenizer that belongs to it, or resize its embeddings and train them"
        )


def not_plain(owner: nn.Module | None) -> str:
    """What a module is instead of a linear map by its weight alone; "" for one.

    Scales, packed or narrow numbers, parametrizations, adapters: what is added to such a weight is not what comes out.
    """
    if owner is None:
        return "missing"
    stored = getattr(getattr(owner, "weight", None), "dtype", "no weight")
    others = sorted({*owner._parameters, *owner._buffers, *owner._modules} - {"weight", "bias"})
    family = isinstance(owner, nn.Linear | Conv1D) and type(owner).__module__.startswith("transformers.models.")
    known = (family or type(owner) in (nn.Linear, Conv1D)) and type(owner._parameters.get("weight")) is nn.Parameter
    plain = known and not others and stored.is_floating_point and stored.itemsize > 1
    return "" if plain else f"a {type(owner).__name__} ({_some([str(stored), *others])})"


def check_padding(config: Any, dtype: torch.dtype, batch: Padded) -> None:
    """Raise NumericalError where transformers' eager attention gives NaN: what it masks with in float64 is −∞ in its
    float32 softmax, and a padded position whose whole window is masked spoils the others.
    """
    window = getattr(config, "sliding_window", None)
    if window and dtype == torch.float64 and config._attn_implementation == "eager":
        if (padded := int(batch.mask.flip(1).argmax(1).max())) >= window:
            raise NumericalError(
                f"rows padded by {padded} columns become NaN in transformers' eager attention with a window of "
                f"{window} in float64: load the model with attn_implementation='sdpa', or in float32"
            )


@torch.no_grad()
def check_row(lm: Any) -> None:
    """Raise ArchitectureError unless the row of a `LanguageModel` is right; else set its `arity`.

    * In every block the write returns its weight times its input, and vectors added to what the attention returns, and
      after it the write, move the block's output by `lm.scale` times them, beside what the MLP makes of the former.
    * Logits at chosen places from a cache, and those resumed after block 0, are the model's own.

    Where the model is not finite, nothing is compared. Cost: four forwards of two tokens, each block once more.
    """
    modes, calls, layers = [(m, m.training) for m in lm.model.modules()], [], range(lm.depth)
    outputs = {("attention", i): lm.attention(i) for i in layers} | {("write", i): lm.write(i) for i in layers}
    handles = (block.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True) for block in lm.blocks)
    lm.model.eval()
    try:
        shapes = [lm.shape(lm.write_path(i)) for i in layers]
        # cloned: some blocks go on adding in place
        with hooked(handles), reading({("key", i): lm.write(i) for i in layers}, outputs, torch.clone) as seen:
            own = lm.model(torch.tensor([[1, 2]], device=lm.device), use_cache=False).logits[0]
        for layer, call in enumerate(calls):
            paths = [getattr(lm.architecture, part).format(layer) for part in ("block", "write", "attention")]
            _check_shapes(lm, paths, shapes[layer], {part: t for (part, i), t in seen.items() if i == layer}, call[-1])
            if torch.isfinite(hidden(call[-1])).all():
                _check_sums(lm, layer, paths, seen["key", layer], seen["write", layer], *call)
        lm.arity = len(calls[0][-1]) if isinstance(calls[0][-1], tuple) else 1
        if torch.isfinite(own).all():
            _check_logits(lm, own, hidden(calls[0][-1]))
    except (MetakeError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own, of any class
        said = str(error).strip().partition("\n")[0]
        raise _wrong(lm, f"two tokens do not run through the model ({type(error).__name__}: {said})") from error
    finally:
        for module, mode in modes:
            module.training = mode


def _wrong(lm: Any, said: str) -> ArchitectureError:
    kind = lm.model.config.model_type
    return ArchitectureError(f"row {kind!r}: {said}; correct metake.ARCHITECTURES[{kind!r}], or edit another model")


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether two long sums agree to half of the dtype's digits."""
    return bool((found - expected).norm() <= torch.finfo(found.dtype).eps ** 0.5 * expected.norm())


def _check_shapes(lm: Any, paths: list[str], weight: tuple[int, int], seen: dict[str, Tensor], output: Any) -> None:
    block, write, attention = paths
    if list(seen) != ["attention", "key", "write"]:
        raise _wrong(lm, f"{block!r} must run its attention {attention!r} before its write {write!r}; found {[*seen]}")
    wanted, shape = (lm.width, seen["key"].shape[-1]), (1, 2, lm.width)
    mixed, out = tuple(seen["attention"].shape), tuple(hidden(output).shape)
    if (weight, mixed, out) != (wanted, shape, shape):
        raise _wrong(
            lm, f"the weight of {write!r} is {weight} (d_out, d_in) where {wanted} was expected, {attention!r} returns "
            f"{mixed} and {block!r} returns {out} where {shape} was expected"
        )


def _check_sums(
    lm: Any, layer: int, paths: list[str], key: Tensor, written: Tensor, block: nn.Module, args: tuple, given: dict,
    output: Any
) -> None:
    """One block, as it was called and what it returned: its write's linear map, and what becomes of vectors added."""
    name, write, attention = paths
    if not _near(written, linear(key, lm.weight(write), lm.write(layer).bias)):
        raise _wrong(lm, f"{write!r} does not return its weight times its input: something else scales or adds there")
    own, scale, kind = hidden(output), lm.scale, torch.finfo(written.dtype)
    size = min(max(own.abs().max().item() / abs(scale), written.abs().max().item(), 1.0), kind.max / 16)
    angles = torch.arange(lm.width, device=own.device, dtype=torch.float64)
    sent = (size * torch.stack([angles.cos(), angles.sin()])).to(own.dtype)
    with reading(outputs={"write": lm.write(layer)}, then=torch.clone) as again:
        with adding(lm.write(layer), sent[:1]), adding(lm.attention(layer), sent[1:]):
            moved = hidden(block.forward(*args, **given)) - own
    moved = (moved - scale * (again["write"] - written).view_as(own))[0].double()
    expected, sent = scale * sent.double().sum(0), sent.double()
    apart, largest = moved - torch.stack([expected, torch.zeros_like(expected)]), again["write"].abs().max().item()
    if not apart.abs().max() <= 8 * kind.eps * max(abs(scale) * size, largest):  # a few roundings of a few terms
        shares = torch.linalg.lstsq(sent.T, moved[0]).solution
        aside = (moved[0] - shares @ sent).norm() / expected.norm()
        raise _wrong(
            lm, f"vectors added to what {write!r} and {attention!r} return arrive at the output of {name!r} "
            f"{shares[0]:.4g} and {shares[1]:.4g} times, with {aside:.2g} of their length in other directions, where "
            f"{scale:.4g} times and nothing else were expected (a norm or gate that follows cannot be edited through; "
            "one number of the configuration can: name it as the row's scale)"
        )


def _check_logits(lm: Any, own: Tensor, first: Tensor) -> None:
    """Logits as the editors have them computed, beside the model's own, (2, vocabulary); first: block 0's output."""
    rows, columns = torch.tensor([[0, 1, 1], [0, 0, 1]], device=lm.device)
    lm.run(pad([(1,), (1,)], lm.device), cache := DynamicCache())
    continuing = lm.logits(continued([(2,), (1,)], [1, 0], lm.device), rows[:2], columns[:2], cache)
    with lm.resumed(0, first.expand(2, -1, -1)):
        resumed = lm.logits(pad([(1,), (1, 2)], lm.device), rows, columns)
    for what, found, expected in (
        ("at chosen places, from a cache,", continuing, own[[1, 0]]), ("resumed after block 0", resumed, own[[0, 0, 1]])
    ):
        if not _near(found, expected):
            apart = (found - expected).norm() / expected.norm()
            raise _wrong(
                lm, f"logits {what} differ from the model's own by {apart:.2g} of their norm, more than rounding: its "
                "mlp must act on each position alone and come last, and its block return the hidden state, or a tuple "
                "that begins with it"
            )
