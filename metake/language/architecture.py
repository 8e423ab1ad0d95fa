"""The architecture table: where each family of models keeps its parts, strings and no code."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from metake.support.errors import ArchitectureError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where a family of models keeps its parts; paths with one {} for the block's number."""

    block: str
    mlp: str
    write: str  # the MLP's output projection: its input is the key
    attention: str


_LLAMA = Architecture(
    "model.layers.{}", "model.layers.{}.mlp", "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn"
)
_GPT2 = Architecture("transformer.h.{}", "transformer.h.{}.mlp", "transformer.h.{}.mlp.c_proj", "transformer.h.{}.attn")

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": _GPT2,
    "gptj": Architecture(_GPT2.block, _GPT2.mlp, "transformer.h.{}.mlp.fc_out", _GPT2.attention),
    "gpt_neox": Architecture(
        "gpt_neox.layers.{}", "gpt_neox.layers.{}.mlp", "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "gpt_neox.layers.{}.attention"
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi": Architecture(_LLAMA.block, _LLAMA.mlp, "model.layers.{}.mlp.fc2", _LLAMA.attention),
}
"""One row per `config.model_type`. A user may add a row at run time."""


def check_paths(row: Architecture, model: nn.Module) -> None:
    """The row must name modules that exist, one set a block, each where its name says. Raises ArchitectureError."""
    kind, modules = model.config.model_type, dict(model.named_modules())
    for what, inside in (("block", None), ("mlp", "block"), ("write", "mlp"), ("attention", "block")):
        path, whole = getattr(row, what), inside and getattr(row, inside)
        flaws = {
            "which must contain exactly one {} for the block's number": path.count("{}") != 1,
            "but the model has no such module": path.replace("{}", "0") not in modules,
            f"which is not inside its {inside} = {whole!r}": whole and not f"{path}.".startswith(f"{whole}."),
        }
        if flaw := next((said for said, found in flaws.items() if found), ""):
            raise ArchitectureError(
                f"row {kind!r} names {what} = {path!r}, {flaw}; correct metake.ARCHITECTURES[{kind!r}]"
            )
