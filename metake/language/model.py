"""A language model as the editors see it: the model, its tokenizer, and one row of the architecture table.

This is the only module that knows where weights live and how they are stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from metake.language import assets, checks
from metake.language.architecture import ARCHITECTURES, check_paths, experts
from metake.language.capture import Places, gathered, reading, resumed
from metake.language.kernels import fast_products
from metake.language.ready import Ready
from metake.language.tokens import Padded, buckets, shared_beginnings
from metake.support.errors import ArchitectureError, NumericalError, ParameterError, RequestError, near_misses
from metake.support.machine import default_device, start_cost, usable, working_memory
from metake.support.progress import no_bars_in_pipes


@dataclass
class LanguageModel(Ready):
    """Model, tokenizer and architecture row; frozen (no gradients) and in eval mode, for one thread at a time."""

    model: nn.Module
    tokenizer: Any
    name: str
    origin: dict[str, str] = field(default_factory=dict)
    arity: int = 1  # items that a decoder block returns
    fitted: dict[str, int] = field(default_factory=dict, repr=False)  # micro-batches of what ran out of memory before
    masters: dict[str, Tensor] | None = field(default=None, repr=False)  # weights in float32 that the model's own round

    def __post_init__(self) -> None:
        checks.check_whole(self.model, self.name)
        kind = self.model.config.model_type
        if kind not in ARCHITECTURES:
            raise ArchitectureError(
                experts(self.model.config) or near_misses(kind, ARCHITECTURES, "architecture")
                + " Add a row: metake.ARCHITECTURES[model_type] = Architecture(...)."
            )
        self.architecture = ARCHITECTURES[kind]
        check_paths(self.architecture, self.model)
        checks.check_tokenizer(self.model, self.tokenizer, self.name)
        checks.check_row(self)
        self.model.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Width of the residual stream, d."""
        return self.model.config.hidden_size

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return self.model.config.num_hidden_layers

    @property
    def scale(self) -> float:
        """By what a block multiplies what its MLP writes, and adds it to the residual stream: 1 but for granite."""
        return float(getattr(self.model.config, self.architecture.scale, 1.0))

    @property
    def window(self) -> float:
        """Tokens that fit in one row."""
        return getattr(self.model.config, "max_position_embeddings", None) or float("inf")

    @property
    def device(self) -> torch.device:
        """Where rows go in, and what is read comes out; the weights of a sharded model may be on others."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def block(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.architecture.block.format(layer))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(map(self.block, range(self.depth)))

    def write(self, layer: int) -> nn.Module:
        """The MLP's output projection of a block: the weight that is edited."""
        return self.model.get_submodule(self.write_path(layer))

    def attention(self, layer: int) -> nn.Module:
        """The attention of a block; its output is added to the residual stream."""
        return self.model.get_submodule(self.architecture.attention.format(layer))

    def write_path(self, layer: int) -> str:
        if not 0 <= layer < self.depth:
            raise ParameterError(f"layer {layer} does not exist: {self.name!r} has blocks 0 to {self.depth - 1}")
        return self.architecture.write.format(layer)

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, batch: Padded, past: DynamicCache | None = None) -> Any:
        """The model's own forward on padded rows; with `past`, `batch.ids` and `.positions` are the new columns only.

        Raises RequestError for a row that is longer than the model's window.
        """
        if batch.mask.shape[1] > self.window:
            length, longest = batch.mask.sum(1).max(0)
            if length > self.window:
                own = batch.ids[longest][batch.mask[longest, -batch.ids.shape[1] :].bool()]
                raise RequestError(
                    f"a row of {length} tokens does not fit {self.name!r}, which has room for {self.window}: "
                    f"{self.tokenizer.decode(own)!r:.200}; shorten its prompt"
                )
            batch = batch._replace(positions=batch.positions.clamp_max(self.window - 1))  # of padding alone
        checks.check_padding(self.model.config, self.dtype, batch)
        with fast_products(self.model.modules()):
            return self.model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, past_key_values=past,
                use_cache=past is not None
            )

    def logits(self, batch: Padded, rows: Iterable[int], columns: Iterable[int], past: Any = None) -> Tensor:
        """Next-token logits at (row, column) pairs only, (pairs, vocabulary)."""
        return self.logits_at(batch, Places.of(rows, columns, batch.ids.shape[1], self.device), past)

    def logits_at(self, batch: Padded, places: Places, past: DynamicCache | None = None, thin: bool = True) -> Tensor:
        """`logits` at places that were worked out before, for who asks again and again.

        thin: the last block's MLP runs at these places alone; not for who looks into it.
        Raises NumericalError, naming the first broken weight, if they are not finite.
        """
        last = self.model.get_submodule(self.architecture.mlp.format(self.depth - 1)) if thin else None
        with gathered(self.model.get_output_embeddings(), last, places):
            logits = self.run(batch, past).logits.to(self.device)
        if not torch.is_grad_enabled():  # else who asks looks at the loss
            row, own = places.asked // batch.ids.shape[1], batch.mask[:, -batch.ids.shape[1] :].bool()
            sums = logits.sum(-1, keepdim=True, dtype=torch.promote_types(logits.dtype, torch.float32))
            self.check_finite(sums, lambda i: batch.ids[row[i]][own[row[i]]])
        return logits

    def read(
        self, batch: Padded, keys: Sequence[int] = (), states: Sequence[int] = (), then: Any = lambda t: t,
        past: DynamicCache | None = None
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Keys (inputs of `write`) and block outputs of the given layers; blocks after the last of them are not run."""
        last = max((*keys, *states))
        inputs, rows = {("key", i): self.write(i) for i in keys}, len(batch.ids)
        outputs = {("state", i): self.block(i) for i in states}
        with reading(
            inputs, outputs,  # some blocks flatten
            lambda t: then(t if t.ndim == 3 else t.unflatten(0, (rows, -1))).to(self.device),
            stop_after=self.block(last) if last in states else self.write(last)
        ) as found:
            self.run(batch, past)
        return {i: found["key", i] for i in keys}, {i: found["state", i] for i in states}

    def resumed(self, last: int, state: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Start forwards after block `last`, which returns `state`; see `capture.resumed`."""
        return resumed(self.blocks, last, state, self.arity)

    def room(self, blocks: int, gradients: bool) -> int:
        """Tokens of a micro-batch in a pass over so many blocks that fit in `machine.working_memory`: an estimate."""
        numbers = kept(*self.shape(self.write_path(0)), blocks if gradients else 1, self.model.config.vocab_size)
        return max(1, int(working_memory(self.device) / numbers / self.dtype.itemsize))

    def groups(self, sizes: Sequence[int | tuple[int, ...]], tokens: int, passes: int = 1) -> list[list[int]]:
        """Rows in micro-batches of at most `tokens`, such that this device computes least; see `tokens.buckets`.

        passes: forwards that every micro-batch makes, one after the other.
        """
        return list(buckets(sizes, tokens, passes * start_cost(self.device)))

    def beginnings(self, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> list[int]:
        """How many first tokens of each row, at most its limit, others share, such that running them once pays here."""
        return shared_beginnings(rows, limits, start_cost(self.device))

    def continuing(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int], tokens: int
    ) -> tuple[list[list[int]], list[int]]:
        """Micro-batches as `groups` of what is left of rows after their `beginnings`, and how long those are."""
        cuts = self.beginnings(rows, limits)
        sizes = [len(row) - cut for row, cut in zip(rows, cuts, strict=True)]
        return self.groups(sizes, tokens, 2 if any(cuts) else 1), cuts

    # -- weights ----------------------------------------------------------------------------------------------------

    def weight(self, module: str) -> Tensor:
        """The weight as (d_out, d_in), however its module stores it: a view that follows later edits.

        With `masters` the float32 copy, of which the model computes with the rounded one; the copy is made anew if
        the model's own weight is no longer its rounding.
        """
        stored = self._stored(module)
        if self.masters is None:
            return stored
        if module not in self.masters or not torch.equal(self.masters[module].to(stored.dtype), stored):
            self.masters[module] = stored.float()
        return self.masters[module]

    def _stored(self, module: str) -> Tensor:
        owner = reduce(lambda inside, part: getattr(inside, "_modules", {}).get(part), module.split("."), self.model)
        if found := checks.not_plain(owner):
            raise ArchitectureError(
                f"{module!r} of {self.name!r} is {found}; only nn.Linear and Conv1D weights can be edited (quantized "
                "weights cannot): dequantize it, merge its adapter, or unwrap it"
            )
        return owner.weight.data.T if isinstance(owner, Conv1D) else owner.weight.data

    def shape(self, module: str) -> tuple[int, int]:
        """(d_out, d_in) of a weight, whatever its storage."""
        return tuple(self._stored(module).shape)

    def write_weight(self, module: str, weight: Tensor) -> None:
        """Store (d_out, d_in), rounded to the parameter's dtype."""
        self._settle(module, self._fitting(module, weight).copy_(weight))

    def add(self, module: str, update: Any) -> None:
        """W ← W + Δ, summed in float64 and rounded once to the parameter's dtype: finite, or NumericalError."""
        view = self._fitting(module, update.delta)
        delta = update.delta.to(device=view.device, dtype=torch.float64)
        total = view.double() + delta
        rounded = total.to(view.dtype)
        sound = torch.stack(rounded.aminmax()).isfinite().all()
        if not sound and not torch.equal(rounded.isfinite(), view.isfinite()):
            raise NumericalError(
                f"{module} is left unchanged: its largest number would be {total.abs().max():.3g}, and {view.dtype} "
                "does not hold that; load the model in a wider dtype, or edit with shorter targets or a larger ridge"
            )
        self._settle(module, view.copy_(rounded))

    def _settle(self, module: str, weight: Tensor) -> None:
        """With masters, the model's own weight is what was written, rounded."""
        if self.masters is not None:
            self._stored(module).copy_(weight)

    def _fitting(self, module: str, given: Tensor) -> Tensor:
        view = self.weight(module)
        if view.shape != given.shape:
            raise ArchitectureError(f"{module!r} is {tuple(view.shape)} (d_out, d_in); found {tuple(given.shape)}")
        return view

    def digest(self, module: str) -> str:
        """SHA-256 of a weight as (d_out, d_in) little-endian bytes of its own dtype."""
        raw = self.weight(module).contiguous().cpu().view(-1).view(torch.uint8).numpy()
        return hashlib.sha256(raw).hexdigest()

    def base(self) -> dict[str, Any]:
        """What an edit's record says of the model that it was made on."""
        dtype = str(self.dtype).removeprefix("torch.") if self.masters is None else MASTERED
        conv1d = isinstance(self.write(0), Conv1D)
        told = {"id": self.name, **self.origin, "dtype": dtype, "device": str(self.device), "conv1d": conv1d}
        return told | {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else told


def kept(width: int, inner: int, blocks: int, vocabulary: int) -> float:
    """Numbers that a token of a pass takes: a block keeps about 8 activations of the model's width and 4 of the MLP's
    for the backward pass; one token in four is scored, which takes three vectors of the vocabulary's size.
    """
    return (8 * width + 4 * inner) * blocks + 0.75 * vocabulary


MASTERED = "bfloat16+float32"
"""A model in bfloat16 whose edited matrices have float32 copies: edits add up in these, and what is too small for
bfloat16 is rounded away in the model, not in the sum."""
DTYPES: Mapping[str, torch.dtype] = {k: getattr(torch, k) for k in ("float64", "float32", "bfloat16", "float16")} | {
    MASTERED: torch.bfloat16
}


def load(
    name: str | os.PathLike, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None,
    source: str = "auto"
) -> LanguageModel:
    """Load a model to edit: "tiny", "smollm2-135m", a hub name, or a local folder.

    dtype: default float32 (float64 for `tiny`), never taken silently from a checkpoint; `MASTERED` is one; device:
    default the best here, "auto" to spread the blocks over all GPUs.
    Raises ParameterError for an unknown name, dtype or device, or a model that cannot be read or does not have the
    tensors and tokens of its configuration; ArchitectureError if the table has no row that it matches.
    """
    name, spread = os.fspath(name), {"device_map": "auto"} if device == "auto" else {}
    place = usable(device) if device and not spread else default_device()
    masters = {} if dtype == MASTERED else None
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ParameterError(near_misses(dtype, DTYPES, "dtype"))
        dtype = DTYPES[dtype]
    dtype = dtype or (torch.float64 if name == "tiny" else torch.float32)
    with no_bars_in_pipes():
        found = assets.resolve(name, source)
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                found.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,  # refused below
                **spread
            )
            tokenizer = assets.read_tokenizer(found.path)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            said = str(error).strip().partition("\n")[0]
            raise ParameterError(
                f"{name!r} cannot be loaded: {said} Expected a folder with config.json, weights and "
                "tokenizer, or a model of the hub."
            ) from error
    checks.check_loaded(name, loaded)
    origin = {"origin": found.origin, "revision": found.revision, "note": found.note}
    lm = LanguageModel(model if spread else model.to(place), tokenizer, name, origin)
    lm.masters = masters  # after the checks, which look at every layer's weight
    return lm
