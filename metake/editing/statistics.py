"""Key statistics of a model over a text: all layers in one pass stopped at the last of them, cached by content.

A layer is a file, named by all that its statistics depend on; a hit reads no text as tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metake.algebra.geometry import KeyStatistics
from metake.editing.published import is_published, published
from metake.editing.recipes import recipe
from metake.editing.texts import documents
from metake.language import assets
from metake.language.model import LanguageModel
from metake.language.tokens import encode, pad
from metake.support.errors import NumericalError, ParameterError, StatisticsError
from metake.support.machine import halving, sent
from metake.support.progress import progress
from metake.support.storage import atomic_path, held, load_tensors, reading, remove, save_tensors

log = logging.getLogger("metake")
PLAIN = (bool, int, float, str, list, dict)
ENOUGH = 50
"""Tokens of a text for each dimension of a key: with more no score moved by ten points, on the page about it."""
LONG = 256  # tokens: a line that holds more than a paragraph


class Statistics(dict[int, KeyStatistics]):
    """Key statistics per layer, with the digest of everything they were computed from."""

    def __init__(self, layers: dict[int, KeyStatistics], digest: str = "", source: dict[str, str | int] | None = None):
        super().__init__(layers)
        self.digest, self.source = digest, source or {}

    def null_ranks(self, threshold: float) -> dict[int, int]:
        """Rank of the null space per layer: eigenvalues of C under the threshold."""
        return {layer: s.null_rank(threshold) for layer, s in self.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write moments, and eigenvectors once known, to one safetensors file, which appears whole or not at all."""
        tensors = {f"{layer}.moment": one.moment for layer, one in self.items()}
        for layer, one in self.items():
            if "_eigh" in one.__dict__:
                tensors[f"{layer}.values"], tensors[f"{layer}.vectors"] = one._eigh
        counts = json.dumps({layer: one.count for layer, one in self.items()})
        with atomic_path(Path(path)) as file:
            save_tensors(tensors, file, {"digest": self.digest, "source": json.dumps(self.source), "counts": counts})

    @classmethod
    def load(cls, path: str | os.PathLike, digest: str | None = None, device: torch.device | str = "cpu") -> Statistics:
        """Read what `save` wrote. Raises StatisticsError if the file is damaged, or not the one `digest` names."""
        with reading(path, "holds no key statistics", "remove it and compute them again", StatisticsError):
            tensors, meta = load_tensors(path)
            counts, source = json.loads(meta["counts"]), json.loads(meta["source"])
            layers = {int(layer): KeyStatistics(tensors[f"{layer}.moment"], count) for layer, count in counts.items()}
            for layer, one in layers.items():
                if f"{layer}.values" in tensors:
                    one.__dict__["_eigh"] = tensors[f"{layer}.values"], tensors[f"{layer}.vectors"]
                _check_shapes(one.count, one.moment, *one.__dict__.get("_eigh", ()))
        if digest is not None and meta["digest"] != digest:
            raise StatisticsError(
                f"{path} holds statistics {meta['digest'][:12]}… of another model or text ({source}); expected "
                f"{digest[:12]}…"
            )
        return cls({layer: one.to(device) for layer, one in layers.items()}, meta["digest"], source)


def _check_shapes(count: int, moment: Tensor, *eigh: Tensor) -> None:
    """Raise ValueError for what cannot be key statistics, and their eigenvectors."""
    d = len(moment) if moment.ndim else 0
    sized = zip((moment, *eigh), ((d, d), (d,), (d, d)), strict=False)
    if any(t.shape != size or t.dtype != torch.float64 or not t.isfinite().all() for t, size in sized):
        raise ValueError("its moments or eigenvectors are no square matrices of finite numbers")
    if type(count) is not int or count < 0:
        raise ValueError(f"its count of keys is {count!r:.40}")


class _OnDisk(KeyStatistics):
    """Statistics whose eigenvectors are read from a file, or written there, once a method asks for them."""

    def __init__(self, one: KeyStatistics, file: Path):
        super().__init__(one.moment, one.count)
        self.kept = file, one.count

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        file, count = self.kept
        if self.count != count:  # keys were added since
            return KeyStatistics._eigh.func(self)
        try:
            found = load_tensors(file)[0]
            _check_shapes(count, self.moment, found["values"], found["vectors"])
            return found["values"].to(self.moment.device), found["vectors"].to(self.moment.device)
        except (OSError, KeyError, ValueError):
            values, vectors = KeyStatistics._eigh.func(self)
            with atomic_path(file) as temporary:
                save_tensors({"values": values, "vectors": vectors}, temporary)
            return values, vectors


@LanguageModel.entry()
def statistics(
    lm: LanguageModel, text: str = "embedded", layers: Sequence[int] | None = None, tokens: float | None = None,
    context: int = 256, seed: int = 1, cache: bool = True
) -> Statistics:
    """Key statistics of `lm` at the edited layers, over a text; read from the cache if the same was computed before.

    C_l = E[k kᵀ] over all tokens of the documents              (MEMIT's C₀: uncentred, special tokens included)

    text: see `documents`, or what others computed: see `published`; layers: default those of the model's recipe, ()
    gives none; tokens: at most so many (math.inf: all; default: all of the embedded text, of another `ENOUGH` for each
    dimension of a key), from documents shuffled by `seed` and cut to `context` tokens; if that would lose most of a
    file, the rest of its long lines follows in further pieces. Raises StatisticsError if the text is too short to say
    anything about d_in directions, NumericalError if a key is not finite. Cost: a forward pass over the text up to the
    last layer that is not cached; one `eigh` each, for methods that project.
    """
    layers = sorted({*(layers if layers is not None else recipe(lm.name).layers)})
    if not layers:  # of a method that needs none, nothing is read
        return Statistics({})
    for layer in layers:
        lm.write_path(layer)  # refuses one that does not exist
    if is_published(text):
        if tokens is not None:
            raise ParameterError(f"{text} was computed by others, of all their text: leave tokens={tokens} out")
        theirs = published(lm, text, layers)
        digests = _digests(lm, [assets.sha256_file(file) for file, _ in theirs.values()], layers)
        made, count = {i: one for i, (_, one) in theirs.items()}, max(one.count for _, one in theirs.values())
        source = {"text": "/".join(Path(text).absolute().parts[-3:]), "tokens": count, "model": lm.name}
        return Statistics(made, _whole(digests), source)
    tokens, file = _limit(lm, text, layers, tokens), _is_file(text)
    found = [] if file else documents(text)
    digests = _digests(lm, [_content(text, found), tokens, context, seed], layers)
    paths = {i: assets.cache_dir() / "statistics" / f"{digest}.safetensors" for i, digest in digests.items()}
    with contextlib.ExitStack() as alone:
        for path in paths.values() if cache else ():
            if not path.exists():
                alone.enter_context(held(path))  # who is second waits, and reads what the first has computed
        kept = {i: one for i, path in paths.items() if cache and (one := _cached(path, digests[i]))}
        made, source = {i: one[i] for i, one in kept.items()}, next((one.source for one in kept.values()), None)
        if missing := [i for i in layers if i not in kept]:
            rows = token_rows(lm, found or documents(text), tokens, context, seed, file)
            size = min(8192, lm.room(1, gradients=False))
            made |= halving(lambda size: stream(lm, rows, missing, size), size, lm.fitted)
            least, count = min(made[i].dim for i in missing), made[missing[0]].count
            if count < least:
                raise StatisticsError(
                    f"{count} tokens of text cannot span {least} key dimensions; give a text of at least {least} "
                    "tokens, better ten times as many"
                )
            name = text if text == "embedded" else Path(text).name
            source = {"text": name, "tokens": sum(map(len, rows)), "model": lm.name}
            for i in missing if cache else ():
                Statistics({i: made[i]}, digests[i], source).save(paths[i])
    if cache:
        made = {i: _OnDisk(one, paths[i].with_suffix(".eigh")) for i, one in made.items()}
    return Statistics({i: made[i] for i in layers}, _whole(digests), source)


def digest_of(lm: LanguageModel, text: str, layers: Sequence[int], tokens: float | None) -> str:
    """The digest that `statistics` of a text would have; nothing is computed."""
    layers, found = sorted({*layers}), [] if _is_file(text) else documents(text)
    return _whole(_digests(lm, [_content(text, found), _limit(lm, text, layers, tokens), 256, 1], layers))


def _is_file(text: str) -> bool:
    return text.partition("+")[0] != "embedded" and Path(text).is_file()


def _content(text: str, found: list[str]) -> str:
    return assets.sha256_file(text) if _is_file(text) else hashlib.sha256(repr(found).encode()).hexdigest()


def _limit(lm: LanguageModel, text: str, layers: Sequence[int], tokens: float | None) -> int | None:
    """At most so many tokens are read; None: all of them."""
    if tokens is None and text.partition("+")[0] != "embedded":
        return ENOUGH * max(lm.shape(lm.write_path(i))[1] for i in layers)
    return None if tokens is None or tokens == math.inf else int(tokens)


def _whole(digests: dict[int, str]) -> str:
    """One digest of several layers', or the only one."""
    first, *others = digests.values()
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def _cached(path: Path, digest: str) -> Statistics | None:
    try:
        return Statistics.load(path, digest) if path.exists() else None
    except StatisticsError as error:
        log.warning("%s", error)
        remove(path)


def token_rows(
    lm: LanguageModel, found: list[str], tokens: int | None, context: int = 256, seed: int = 1, pieces: bool = False
) -> list[tuple[int, ...]]:
    """The rows that statistics are computed over, as `statistics` says; pieces: whether long texts may go on."""
    found, rows = [*found], []
    random.Random(seed).shuffle(found)
    left = tokens if tokens is not None else float("inf")
    limit = min(context, getattr(lm.model.config, "max_position_embeddings", context))
    for row in _pieces(lm.tokenizer, found, limit, pieces):
        if left <= 0:
            break
        if row := row[: int(min(left, len(row)))]:
            rows.append(row)
            left -= len(row)
    return rows


def _pieces(tokenizer: Any, texts: Iterable[str], limit: int, pieces: bool) -> Iterator[tuple[int, ...]]:
    """The first `limit` tokens of each text; with `pieces`, if most lie behind, the rest of long ones, begun by BOS."""
    start, rest, lost, count = encode(tokenizer, "")[: limit - 1], [], 0, 0
    for text in texts:
        ids = encode(tokenizer, text)
        yield ids[:limit]
        lost, count = lost + len(ids[limit:]), count + len(ids)
        if pieces and len(ids) > LONG:
            rest += [start + ids[at : at + limit - len(start)] for at in range(limit, len(ids), limit - len(start))]
    if rest and lost > count / 2:
        yield from rest
    elif lost and pieces:
        log.warning("%d of %d tokens are left out, which lie behind the first %d of their lines", lost, count, limit)


@LanguageModel.entry()
def stream(lm: LanguageModel, rows: list[tuple[int, ...]], layers: list[int], size: int) -> dict[int, KeyStatistics]:
    """Statistics of the keys that rows of tokens give at `layers`, `size` tokens at a time; all finite."""
    sums = {i: KeyStatistics.empty(lm.shape(lm.write_path(i))[1], lm.device) for i in layers}
    for group in progress(lm.groups([len(r) for r in rows], size), "statistics"):
        batch = pad([rows[i] for i in group], lm.device)
        width = batch.ids.shape[1]
        keys, _ = lm.read(batch, layers)
        real = sent([k * width + c for k, i in enumerate(group) for c in range(len(rows[i]))], lm.device)
        for i in layers:
            sums[i].update(keys[i].flatten(0, 1)[real])
        sound = torch.stack([sums[i].moment.diagonal().isfinite().all() for i in layers]).tolist()
        for i, finite in zip(layers, sound, strict=True):
            if not finite:
                raise NumericalError(
                    f"keys of layer {i} of {lm.name!r} ({lm.dtype}) are not finite; look for NaN in its weights up to "
                    "there, or load it in a wider dtype. No statistics were kept"
                )
    return {i: one.to("cpu") for i, one in sums.items()}  # where they wait until a method asks for their layer


def _digests(lm: LanguageModel, text: list[Any], layers: list[int]) -> dict[int, str]:
    """SHA-256 of everything that each layer's statistics depend on: text, tokenizer, configuration, and up to this
    layer the model's weights and what its modules are set to, such as adapters that are switched off.
    """
    names = ("_name_or_path", "transformers_version")
    config = {k: v for k, v in lm.model.config.to_diff_dict().items() if k not in names}
    begun = encode(lm.tokenizer, "The capital of France is Paris.")
    own = getattr(lm.tokenizer, "backend_tokenizer", None)
    words = sorted(lm.tokenizer.get_vocab().items()) if own is None else own.to_str()
    told = json.dumps(["v3", text, str(lm.dtype), config, begun, words], sort_keys=True, default=str)
    digest, found, base = hashlib.sha256(told.encode()), {}, lm.model.base_model
    inside = {id(part) for b in lm.blocks for part in (*b.modules(), *b.state_dict(keep_vars=True).values())}
    for layer, owner in enumerate([base, *lm.blocks[: layers[-1] + 1]], -1):
        others = inside | {id(base)} if owner is base else ()
        for name, module in owner.named_modules():
            if id(module) not in others:
                digest.update(f"{name} {type(module).__name__} {_settings(module)}".encode())
        for name, tensor in owner.state_dict(keep_vars=True).items():
            if id(tensor) not in others:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + checksum(tensor))
        found[layer] = digest.hexdigest()
    return {layer: found[layer] for layer in layers}


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """A module's own plain values: sizes, scales, switches."""
    names = vars(module).keys() - vars(nn.Module()).keys() | {"training"}
    plain = ((k, repr(v)) for k, v in vars(module).items() if k in names and isinstance(v, PLAIN) and "_hf_" not in k)
    return sorted((name, told) for name, told in plain if " at 0x" not in told)


@torch.no_grad()
def checksum(tensor: Tensor) -> bytes:
    """Σ wᵢ aᵢ mod 2⁶⁴ over every 2¹⁷ eight-byte words of a tensor, a odd and fixed: exact on every device.

    The memory is read once, where it is; SHA-256 would need it on the CPU, byte after byte.
    """
    factors, whole = _factors().to(tensor.device), tensor.detach().contiguous()
    raw = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
    raw = torch.cat([raw, raw.new_zeros(-len(raw) % 8)]) if len(raw) % 8 else raw
    sums = [(words * factors[: len(words)]).sum() for words in raw.view(torch.int64).split(2**17)]
    return torch.stack(sums).cpu().numpy().tobytes()


@cache
def _factors() -> Tensor:
    mixed = torch.arange(1, 2**17 + 1) * -7046029254386353131
    return (mixed ^ mixed >> 29) * -4658895280553007687 | 1
