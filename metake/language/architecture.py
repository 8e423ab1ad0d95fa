"""The architecture table: where each family of models keeps its parts, strings and no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from metake.support.errors import ArchitectureError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where a family of models keeps its parts; paths with one {} for the block's number."""

    block: str
    mlp: str
    write: str  # the MLP's output projection: its input is the key
    attention: str  # its output is added to the residual stream, as the write's is
    scale: str = ""  # the configuration's name of the number by which a block multiplies both first, if there is one


def _row(block: str, mlp: str, write: str, attention: str) -> Architecture:
    """A row whose parts are named from the block on."""
    return Architecture(block, f"{block}.{mlp}", f"{block}.{write}", f"{block}.{attention}")


_LLAMA = _row("model.layers.{}", "mlp", "mlp.down_proj", "self_attn")
_BLOOM = _row("transformer.h.{}", "mlp", "mlp.dense_4h_to_h", "self_attention")

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": _row("transformer.h.{}", "mlp", "mlp.c_proj", "attn"),
    "gptj": _row("transformer.h.{}", "mlp", "mlp.fc_out", "attn"),
    "gpt_neox": _row("gpt_neox.layers.{}", "mlp", "mlp.dense_4h_to_h", "attention"),
    **dict.fromkeys("llama mistral qwen2 qwen3 cohere gemma olmo phi3 smollm3 stablelm".split(), _LLAMA),
    "phi": _row("model.layers.{}", "mlp", "mlp.fc2", "self_attn"),
    "starcoder2": _row("model.layers.{}", "mlp", "mlp.c_proj", "self_attn"),
    "granite": replace(_LLAMA, scale="residual_multiplier"),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "mpt": _row("transformer.blocks.{}", "ffn", "ffn.down_proj", "attn"),
    "opt": _row("model.decoder.layers.{}", "fc2", "fc2", "self_attn"),
}
"""One row per `config.model_type`. A user may add a row at run time."""


def experts(config: Any) -> str:
    """The sentence that refuses a mixture of experts; "" for a model that is none."""
    found = {k: n for k, n in config.to_dict().items() if "experts" in k and isinstance(n, int) and n > 1}
    said = ", ".join(f"{name} = {count}" for name, count in found.items())
    return said and (
        f"{config.model_type!r} is a mixture of experts ({said}), of which a token visits some, so that no one weight "
        "holds what a block knows: experts cannot be edited, take a dense model"
    )


def check_paths(row: Architecture, model: nn.Module) -> None:
    """The row must name modules that exist, one set a block, each where its name says. Raises ArchitectureError."""
    kind, modules = model.config.model_type, dict(model.named_modules())
    for what, inside in (("block", None), ("mlp", "block"), ("write", "mlp"), ("attention", "block")):
        path, whole = getattr(row, what), inside and getattr(row, inside)
        paths = (path.replace("{}", str(i)) for i in range(model.config.num_hidden_layers))
        missing = next((found for found in paths if found not in modules), "")
        flaws = {
            "which must contain exactly one {} for the block's number": path.count("{}") != 1,
            f"but the model has no such module ({missing})": missing,
            f"which is not inside its {inside} = {whole!r}": whole and not f"{path}.".startswith(f"{whole}."),
        }
        if flaw := next((said for said, found in flaws.items() if found), ""):
            instead = missing and (_wrapped(missing, modules) or experts(model.config))
            raise ArchitectureError(
                f"row {kind!r} names {what} = {path!r}, {flaw}"
                + (f": {instead}" if instead else f"; correct metake.ARCHITECTURES[{kind!r}]")
            )


def _wrapped(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The sentence for a module that is there under another name, which its wrapper gave it; "" if it is not."""
    for name in modules:
        plain = ".".join(part for part in name.split(".") if not part.startswith("_"))
        if f".{plain}".endswith(f".{path}"):
            return (
                f"it is wrapped, and has {name!r}. Pass the model itself: of a compiled one its _orig_mod, of one with "
                "adapters what merge_and_unload() returns, of a parallel one its module"
            )
    return ""
