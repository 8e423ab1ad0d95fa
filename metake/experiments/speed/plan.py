"""What a run of edits will take, before anything is loaded: bytes by part, FLOP by stage, seconds at given rates.

Everything follows from a configuration, a method's parts and the batch's token rows. Rows are those of embedded facts
in the tokens of `tiny`, which knows few words: of a real model there are fewer.

Memory is that of the device that the model is on: what it holds throughout (`held`), and at its worst moment beside
that (`stages`, one at a time). Key statistics count on a CPU alone: beside an accelerator they wait in the host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from metake import methods
from metake.algebra.geometry import null_space
from metake.data.facts import facts
from metake.editing.editor import Editor
from metake.editing.plant import HELD
from metake.experiments.borrowed import borrowed
from metake.experiments.gpu.device import copy_rate
from metake.experiments.speed.bench import product_rate
from metake.experiments.speed.sizes import config_of, random_contexts, size_of
from metake.language.architecture import ARCHITECTURES
from metake.language.assets import read_tokenizer, resolve
from metake.language.model import DTYPES, MASTERED, kept
from metake.language.tokens import Rows
from metake.support.errors import ArchitectureError, ParameterError, near_misses
from metake.support.machine import default_device, usable, working_memory

WIDE = 8  # bytes of a float64


class Shape(NamedTuple):
    """What a configuration says: numbers of all weights, of one block and of the head; the edited weight, and sizes."""

    weights: int
    block: int
    head: int
    d_out: int
    d_in: int
    depth: int
    vocabulary: int
    cached: int  # numbers of a token's keys and values in one block


class Tokens(NamedTuple):
    """Token counts of one batch."""

    requests: int
    rows: int  # in contexts
    taught: int  # tokens of those rows
    active: int  # from the subject's last token on, locality rows included
    scored: int  # positions whose logits are computed
    cut: int  # of rows that end with the subject: what keys are read from
    plain: int  # of the plain prompts with their targets, and of the locality rows


@dataclass(frozen=True)
class Plan:
    """held, stages: bytes by part; flops, reads: operations and bytes that pass, by stage, of one batch at the end of
    the run; history: keys remembered then; first: bytes of the first metrics and what they are made of; host: of key
    statistics in the memory beside an accelerator.
    """

    model: str
    method: str
    edits: int
    batch: int
    dtype: str
    shape: Shape
    tokens: Tokens
    history: int
    held: dict[str, int]
    stages: dict[str, int]
    flops: dict[str, float]
    reads: dict[str, float]
    first: int
    host: int
    micro_batch: int

    @property
    def peak(self) -> int:
        """The worst moment: a stage beside all that is held, or the making of the first state, before most of that."""
        return max(sum(self.held.values()) + max(self.stages.values()), self.held["weights"] + self.first)

    def seconds(self, rate: float, bandwidth: float) -> dict[str, float]:
        """Of each stage of a batch, at so many FLOP/s and bytes/s: whichever takes longer. Bounds from below."""
        return {name: max(own / rate, self.reads[name] / bandwidth) for name, own in self.flops.items()}


def plan(
    model: str, method: str = "alphaedit", edits: int = 2000, batch: int = 100, dtype: str = "float32",
    recipe: str | None = None, layers: Sequence[int] | None = None, on_cpu: bool = False, seed: int = 0,
    config: PreTrainedConfig | None = None, memory: float | None = None
) -> Plan:
    """Plan a run of `edits` in batches of `batch` by a method that plans targets.

    model: a size in `data/sizes.toml`, a folder with a config.json, or a hub name that is one of those sizes; on_cpu:
    the statistics are in the same memory; config: in place of the model's; memory: bytes of the device, into which
    micro-batches are halved to fit, as the library does when it is full. Raises ParameterError for unknown names,
    ArchitectureError for a family without a row.
    """
    if dtype not in DTYPES:
        raise ParameterError(near_misses(dtype, DTYPES, "dtype"))
    if not 1 <= batch <= edits:
        raise ParameterError(f"batch must be at least 1 and at most edits; found {batch} of {edits}")
    shape = shape_of(config or _config(model))
    named = recipe or (model if config is None else "default")
    with borrowed(named, recipe, layers):
        editor = methods.method(method, named, seed=seed)
    if not isinstance(editor, Editor):
        raise ParameterError(f"{method} plans no targets: what it takes is not known here; name one of the others")
    if editor.layers[-1] >= shape.depth:
        raise ParameterError(f"layers {editor.layers} do not exist in {shape.depth} blocks; name others with layers")
    tokens = tokens_of(batch, editor, seed)
    history = edits - batch if editor.remember else 0
    itemsize, square, projected = DTYPES[dtype].itemsize, WIDE * shape.d_in**2, isinstance(editor.metric, null_space)
    statistics = (1 + projected) * square * len(editor.layers)  # moments, and eigenvectors
    # one layer's on an accelerator; beside them what a projector is cut from, or a matrix and its factor
    first = len(editor.layers) * _metric(shape, editor, 0) + (statistics if on_cpu else (1 + projected) * square)
    first += 0 if projected else square
    held, most = _held(shape, editor, tokens, history, itemsize, dtype == MASTERED), editor.target.tokens
    if on_cpu:  # as `LanguageModel.room` has it
        token = kept(shape.d_out, shape.d_in, shape.depth - editor.layers[-1], shape.vocabulary) * itemsize
        most = max(1, min(most, int(working_memory(torch.device("cpu")) / token)))
    while True:
        stages = _stages(shape, editor, tokens, history, itemsize, most)
        if memory is None or most == 1 or sum(held.values()) + max(stages.values()) <= memory:
            break
        most //= 2
    flops, reads = _work(shape, editor, tokens, history, itemsize, most)
    return Plan(
        model, method, edits, batch, dtype, shape, tokens, history, held, stages, flops, reads, first,
        0 if on_cpu else statistics, most
    )


def _config(model: str) -> PreTrainedConfig:
    if (Path(model) / "config.json").is_file():
        return AutoConfig.from_pretrained(model)
    return config_of(size_of(model))


def shape_of(config: PreTrainedConfig) -> Shape:
    """Read off a model on the meta device, which holds no numbers."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ArchitectureError(near_misses(kind, ARCHITECTURES, "architecture"))
    row = ARCHITECTURES[kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block, write = (model.get_submodule(path.format(0)) for path in (row.block, row.write))
    head = model.get_output_embeddings().weight
    turned = write.weight.shape if write.weight.shape[0] == config.hidden_size else write.weight.shape[::-1]
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        sum(p.numel() for p in model.parameters()), sum(p.numel() for p in block.parameters()), head.numel(), *turned,
        config.num_hidden_layers, config.vocab_size, 2 * per_head * (getattr(config, "num_key_value_heads", 0) or heads)
    )


def tokens_of(batch: int, editor: Editor, seed: int = 0) -> Tokens:
    """The rows of a batch of embedded facts, which come round again if there are fewer."""
    tokenizer = read_tokenizer(resolve("tiny").path)
    known = facts(limit=min(batch, 200))
    contexts = editor.contexts or random_contexts(seed)
    rows, times = Rows.of(tokenizer, [case.request for case in known], contexts), batch / len(known)
    watched, plain = rows.locality(), rows.rewriting(plain=True)
    stage_one = (*rows.taught, *watched)
    counts = (
        len(rows.taught), sum(len(r.ids) for r in rows.taught), sum(len(r.ids) - r.lookup for r in stage_one),
        sum(len(r.read) for r in stage_one), sum(map(len, rows.prompts())),
        sum(len(r.ids) for r in (*plain, *watched)),
    )  # fmt: skip
    return Tokens(batch, *(round(times * count) for count in counts))


def _history(shape: Shape, remembered: int) -> int:
    """Bytes of a metric's memory of so many keys: a thin factor and its triangle, or the matrix from d_in / 2 on."""
    if remembered > shape.d_in / 2:
        return WIDE * shape.d_in**2
    return WIDE * (remembered * shape.d_in + remembered**2)


def _metric(shape: Shape, editor: Editor, remembered: int) -> int:
    """Bytes of a layer's metric; a projector's thinner factor is taken for half of the directions, its worst."""
    if editor.remember and remembered > shape.d_in / 2:
        return 0  # the matrix that the history has become is all
    return WIDE * shape.d_in**2 // (2 if isinstance(editor.metric, null_space) else 1)


def _held(
    shape: Shape, editor: Editor, tokens: Tokens, history: int, itemsize: int, masters: bool
) -> dict[str, int]:
    count = len(editor.layers)
    edited = count * shape.d_out * shape.d_in * (4 if masters else itemsize)
    return {
        "weights": shape.weights * itemsize + (edited if masters else 0),
        "originals of the edited weights": 2 * edited,  # a run's, and a step's
        "metrics": count * _metric(shape, editor, history),
        "history": count * _history(shape, history),
        "factors of the edit": count * tokens.requests * WIDE * (2 * shape.d_in + 2 * shape.d_out),
    }


def _stages(
    shape: Shape, editor: Editor, tokens: Tokens, history: int, itemsize: int, micro_batch: int
) -> dict[str, int]:
    """Bytes that a stage takes while it runs."""
    above = shape.depth - 1 - editor.layers[-1]
    size = shape.d_out, shape.d_in
    active = min(tokens.active, micro_batch)
    scored = active * tokens.scored / tokens.active
    logits = 4 * scored * shape.vocabulary * itemsize  # and their softmax, both with gradients
    token = kept(*size, above, 0) * itemsize
    chunk = min(tokens.taught, HELD * micro_batch)
    cached = chunk * (shape.cached * (above + 1) + shape.d_out) * itemsize
    found = {
        "targets": cached + active * token + logits,
        "keys": tokens.cut * (2 * shape.d_out + 2 * shape.d_in) * itemsize + WIDE * tokens.rows * shape.d_in,
        "solve": WIDE * (3 * shape.d_out * shape.d_in + 6 * tokens.requests * shape.d_in),
        "remember": 0,
    }
    if editor.remember:  # the next state is made beside the one that a caller still holds
        found["remember"] = len(editor.layers) * _history(shape, history + tokens.requests)
    if editor.refine:
        rows = tokens.plain if editor.refine.prompts == "plain" else tokens.taught
        own = min(rows, micro_batch)
        found["refinement"] = rows * (shape.d_out + tokens.requests) * itemsize + own * (
            token + 4 * shape.vocabulary * itemsize * tokens.scored / tokens.active
        )
    return {name: int(own) for name, own in found.items()}


def _work(
    shape: Shape, editor: Editor, tokens: Tokens, history: int, itemsize: int, micro_batch: int
) -> tuple[dict[str, float], dict[str, float]]:
    """FLOP and bytes of one batch by stage. 2 FLOP for a multiply-add; a backward to activations costs a forward;
    attention scores are left out. Bytes: each pass over a block reads its weights.
    """
    last, count, n = editor.layers[-1], len(editor.layers), tokens.requests
    above, block, head = shape.depth - 1 - last, 2.0 * shape.block, 2.0 * shape.head
    weights, sweeps = shape.block * itemsize, 2 * editor.target.steps - 1
    passes = -(-tokens.active // micro_batch)
    step = tokens.active * block * above + tokens.scored * head
    blocks = last + 1 + sum(last - layer + 1 for layer in editor.layers[1:])
    projected = isinstance(editor.metric, null_space)
    past = min(history, shape.d_in / 2)
    gate = (4 * 0.5 * 2 if projected else 2) * n * shape.d_in**2 + 8 * n * past * shape.d_in
    flops = {
        "targets": tokens.taught * block * shape.depth + sweeps * step,
        "keys": tokens.cut * block * blocks,
        "solve": count * (gate + 4 * n * n * shape.d_in + 2 * n * shape.d_in * shape.d_out),
    }
    numbers = shape.d_in**2 / (2 if projected else 1) + past * shape.d_in
    reads = {
        "targets": weights * (shape.depth + sweeps * passes * above) + sweeps * passes * shape.head * itemsize,
        "keys": weights * blocks,
        "solve": count * WIDE * (4 * numbers + 3 * shape.d_in * shape.d_out),
    }
    if editor.refine:
        plain = editor.refine.prompts == "plain"
        rows, scored = (tokens.plain, 2 * n) if plain else (tokens.taught, tokens.scored)
        tries, passes = 2 * editor.refine.steps + 1, -(-rows // micro_batch)
        look = rows * (block * above + 2.0 * n * shape.d_out) + scored * head
        flops["refinement"] = rows * block * (last + 1) + tries * look
        reads["refinement"] = tries * passes * (weights * above + shape.head * itemsize)
    return flops, reads


def text(found: Plan, rate: float, bandwidth: float, measured: bool) -> str:
    """A plan for a terminal."""
    worst = max(found.stages, key=found.stages.get)
    lines = [
        f"{found.model}, {found.method}: {found.edits} edits in batches of {found.batch}, {found.dtype}; the last "
        f"batch, {found.history} keys remembered, micro-batches of {found.micro_batch} tokens",
        *(f"{name:<34} {own / 1e9:9.3f} GB" for name, own in found.held.items()),
        *(f"while it runs: {name:<19} {own / 1e9:9.3f} GB{' (the most)' if name == worst else ''}"
          for name, own in found.stages.items()),
        f"{'before them: the first metrics':<34} {found.first / 1e9:9.3f} GB",
        f"{'peak':<34} {found.peak / 1e9:9.3f} GB",
    ]  # fmt: skip
    if found.host:
        lines.append(f"{'key statistics, beside it in memory':<34} {found.host / 1e9:9.3f} GB")
    source = "measured here" if measured else "as given"
    lines.append(f"at {rate / 1e12:.3g} TFLOP/s and {bandwidth / 1e9:.4g} GB/s, {source}, a batch takes at least:")
    for name, seconds in (spent := found.seconds(rate, bandwidth)).items():
        lines.append(f"{name:<34} {found.flops[name] / 1e12:9.3g} TFLOP {seconds:10.3g} s")
    lines.append(f"{'in all':<34} {'':>15} {sum(spent.values()):10.3g} s")
    return "\n".join(lines)


def rates(dtype: str, device: torch.device, largest: int = 4096, copied: int = 2**27) -> tuple[float, float]:
    """FLOP/s of this device's matrix product, and bytes/s that a copy within it reads and writes."""
    return product_rate(DTYPES[dtype], device, 0.05, largest), copy_rate(device, copied)


def told(
    device: str | None = None, memory: float | None = None, rate: float | None = None, bandwidth: float | None = None,
    **asked: Any
) -> str:
    """`text` of a plan. memory, bandwidth: in GB and GB/s, rate: in TFLOP/s, measured here if they are not given, which
    also says whether the device's memory is the host's. asked: as `plan` takes it.
    """
    here = usable(device) if device else default_device()
    found = plan(**asked, on_cpu=here.type == "cpu" and not rate, memory=memory and 1e9 * memory)
    known = (0.0, 0.0) if rate and bandwidth else rates(asked["dtype"], here)
    return text(found, 1e12 * rate if rate else known[0], 1e9 * bandwidth if bandwidth else known[1], any(known))
