"""Key statistics of a model over a text: all layers in one pass stopped at the last of them, cached by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from metake.algebra.geometry import KeyStatistics
from metake.data.facts import prose, reference_texts, rendered_sentences
from metake.editing.recipes import recipe
from metake.language import assets
from metake.language.model import LanguageModel
from metake.language.tokens import encode, pad
from metake.scoring.tasks import lessons
from metake.support.errors import ParameterError, StatisticsError
from metake.support.machine import halving
from metake.support.progress import progress
from metake.support.storage import atomic_path, load_tensors, save_tensors

log = logging.getLogger("metake")


class Statistics(dict[int, KeyStatistics]):
    """Key statistics per layer, with the digest of everything they were computed from."""

    def __init__(self, layers: dict[int, KeyStatistics], digest: str = "", source: dict[str, str | int] | None = None):
        super().__init__(layers)
        self.digest, self.source = digest, source or {}

    def null_ranks(self, threshold: float) -> dict[int, int]:
        """Rank of the null space per layer: eigenvalues of C under the threshold."""
        return {layer: s.null_rank(threshold) for layer, s in self.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write moments and eigenvectors to one safetensors file, which appears whole or not at all."""
        tensors = {}
        for layer, one in self.items():
            values, vectors = one._eigh
            tensors |= {f"{layer}.moment": one.moment, f"{layer}.values": values, f"{layer}.vectors": vectors}
        counts = {str(layer): one.count for layer, one in self.items()}
        with atomic_path(Path(path)) as temporary:
            save_tensors(
                tensors, temporary,
                {"digest": self.digest, "source": json.dumps(self.source), "counts": json.dumps(counts)}
            )

    @classmethod
    def load(cls, path: str | os.PathLike, digest: str | None = None, device: torch.device | str = "cpu") -> Statistics:
        """Read what `save` wrote. Raises StatisticsError if the file is damaged, or not the one `digest` names."""
        try:
            tensors, meta = load_tensors(path)
            counts, source = json.loads(meta["counts"]), json.loads(meta["source"])
        except (OSError, KeyError, ValueError) as error:
            raise StatisticsError(
                f"{path} is damaged or holds no key statistics ({error}); remove it and compute them again"
            ) from error
        if digest is not None and meta["digest"] != digest:
            raise StatisticsError(
                f"{path} holds statistics {meta['digest'][:12]}… of another model or text ({source}); expected "
                f"{digest[:12]}…"
            )
        layers = {}
        for layer, count in counts.items():
            one = layers[int(layer)] = KeyStatistics(tensors[f"{layer}.moment"].to(device), count)
            one.__dict__["_eigh"] = (tensors[f"{layer}.values"].to(device), tensors[f"{layer}.vectors"].to(device))
        return cls(layers, meta["digest"], source)


def documents(text: str = "embedded") -> list[str]:
    """Documents of a text source: "embedded", a text file (one document a line), or "hub:owner/name[:config]".

    "embedded+tasks": beside the facts and prose a third of what `tiny` was taught of the small tasks (`tasks.lessons`).
    """
    if text == "embedded":
        return [*prose(), *reference_texts().values(), *rendered_sentences()]
    if text == "embedded+tasks":
        return [
            *documents("embedded"),
            *(prompt + answer for taught in lessons().values() for prompt, answer in taught[::3]),
        ]
    if text.startswith("hub:"):
        return list(_hub_documents(text.removeprefix("hub:")))
    path = Path(text)
    if not path.is_file():
        raise ParameterError(
            f"text source {text!r} is neither 'embedded' or 'embedded+tasks', nor 'hub:owner/name[:config]', nor a file"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ParameterError(f"text source {text!r} is not UTF-8 text ({error})") from error
    found = [clean for line in lines if len(clean := _untokenize(line)) >= 40]
    if not found:
        raise ParameterError(f"text source {text!r} has no line of 40 or more characters; expected one document a line")
    return found


def _hub_documents(name: str, limit: int = 100_000) -> Iterable[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ParameterError("text from the hub needs the package 'datasets': pip install datasets") from None
    dataset, _, config = name.partition(":")
    for i, record in enumerate(load_dataset(dataset, config or None, split="train", streaming=True)):
        if i == limit:
            return
        yield record["text"]


def _untokenize(line: str) -> str:
    """Undo WikiText's tokenization: joined punctuation, no <unk> marks. Ordinary text passes through unchanged."""
    line = re.sub(r" @(.)@ ", r"\1", line.strip().replace("<unk>", ""))
    line = re.sub(r" ([,.;:!?)\]%]|'s\b)", r"\1", line)
    return re.sub(r"([(\[]) ", r"\1", re.sub(r"\s+", " ", line)).strip()


@LanguageModel.entry()
def statistics(
    lm: LanguageModel, text: str = "embedded", layers: Sequence[int] | None = None, tokens: int | None = None,
    context: int = 256, seed: int = 1, cache: bool = True
) -> Statistics:
    """Key statistics of `lm` at the edited layers, over a text; read from the cache if the same was computed before.

    C_l = E[k kᵀ] over all tokens of the documents              (MEMIT's C₀: uncentred, special tokens included)

    text: see `documents`; layers: default those of the model's recipe, () gives none; tokens: at most so many (default:
    all of them), from documents shuffled by `seed` and cut to `context` tokens. Raises StatisticsError if the text is
    too short to say anything about d_in directions. Cost: a forward pass over the text up to the last layer, and one
    `eigh` each.
    """
    layers = sorted({*(layers if layers is not None else recipe(lm.name).layers)})
    if not layers:  # of a method that needs none, nothing is read
        return Statistics({})
    rows = _rows(lm, documents(text), tokens, context, seed)
    digest = _digest(lm, rows, layers)
    path = assets.cache_dir() / "statistics" / f"{digest}.safetensors"
    if cache and path.exists():
        try:
            return Statistics.load(path, digest, lm.device)
        except StatisticsError as error:
            log.warning("%s", error)
            path.unlink()
    layer_sums = halving(lambda size: _stream(lm, rows, layers, size), min(8192, lm.room(1, gradients=False)))
    result = Statistics(
        layer_sums, digest,
        {"text": text if text == "embedded" else Path(text).name, "tokens": sum(map(len, rows)), "model": lm.name}
    )
    if cache:
        result.save(path)
    return result


def _rows(lm: LanguageModel, found: list[str], tokens: int | None, context: int, seed: int) -> list[tuple[int, ...]]:
    order = list(range(len(found)))
    random.Random(seed).shuffle(order)
    rows: list[tuple[int, ...]] = []
    left = tokens if tokens is not None else float("inf")
    limit = min(context, getattr(lm.model.config, "max_position_embeddings", context))
    for i in order:
        if left <= 0:
            break
        row = encode(lm.tokenizer, found[i])[:limit]
        row = row[: int(min(left, len(row)))]
        if row:
            rows.append(row)
            left -= len(row)
    return rows


@torch.no_grad()
def _stream(lm: LanguageModel, rows: list[tuple[int, ...]], layers: list[int], size: int) -> dict[int, KeyStatistics]:
    sums = {i: KeyStatistics.empty(lm.shape(lm.write_path(i))[1], lm.device) for i in layers}
    for group in progress(lm.groups([len(r) for r in rows], size), "statistics"):
        batch = pad([rows[i] for i in group], lm.device)
        keys, _ = lm.read(batch, layers)
        real = batch.mask.bool()
        for i in layers:
            sums[i].update(keys[i][real])
    least = min(s.dim for s in sums.values())
    count = sums[layers[0]].count
    if count < least:
        raise StatisticsError(
            f"{count} tokens of text cannot span {least} key dimensions; give a text of at least {least} "
            "tokens, better ten times as many"
        )
    return sums


def _digest(lm: LanguageModel, rows: list[tuple[int, ...]], layers: list[int]) -> str:
    """SHA-256 of everything that the statistics depend on: configuration, weights up to the last layer, tokens,
    layers.
    """
    config = {
        k: v for k, v in lm.model.config.to_diff_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    digest = hashlib.sha256(
        json.dumps(["v2", layers, str(lm.dtype), config, rows], sort_keys=True, default=str).encode()
    )
    later = {id(t) for block in lm.blocks[layers[-1] + 1 :] for t in block.state_dict(keep_vars=True).values()}
    for name, tensor in lm.model.base_model.state_dict(keep_vars=True).items():
        if id(tensor) not in later:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
