"""Key statistics that others publish: the .npz files of the code of ROME, MEMIT and AlphaEdit, read without pickle."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from metake.algebra.geometry import KeyStatistics
from metake.language.model import LanguageModel
from metake.support.errors import StatisticsError
from metake.support.storage import reading

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, SyntaxError, tokenize.TokenError)


def is_published(text: str) -> bool:
    """Whether a text source is such a file, or a folder of them, instead of a text."""
    return Path(text).suffix == ".npz" or Path(text).is_dir()


def published(lm: LanguageModel, place: str, layers: Sequence[int]) -> dict[int, tuple[Path, KeyStatistics]]:
    """Of each layer its file in a folder (or the file itself), and Σ k kᵀ with the count of keys that it holds.

    A file is told by its name, which begins with the module whose inputs were read:
    `transformer.h.17.mlp.c_proj_float32_mom2_100000.npz`. Which model it was made with stands in the names of its
    folders alone: nothing within can be compared with `lm` but the width of its keys.
    Raises StatisticsError for a layer without a file or with several, and for files that are damaged, hold something
    else, are of another width, not symmetric, or of fewer keys than dimensions.
    """
    files, found = [Path(place)] if Path(place).is_file() else sorted(Path(place).glob("*.npz")), {}
    for layer in layers:
        module = lm.write_path(layer)
        own = [file for file in files if file.name.startswith(f"{module}_")]
        if len(own) != 1:
            there = ", ".join(file.name for file in own or files[:3]) or "no .npz file"
            raise StatisticsError(
                f"{place} must hold one file of layer {layer} of {lm.name!r}, {module}_….npz; found {there}: name the "
                "folder of this model's statistics, with one file a layer"
            )
        with reading(own[0], "holds no published key statistics", "fetch it again", StatisticsError):
            found[layer] = own[0], _moment(own[0], lm.shape(module)[1])
    return found


def _moment(file: Path, width: int) -> KeyStatistics:
    """Raises ValueError for anything but Σ k kᵀ of enough keys of this width."""
    try:
        with zipfile.ZipFile(file) as archive:
            kind, count, moment = (_array(archive, f"mom2.{name}") for name in ("constructor", "count", "mom2"))
    except DAMAGED as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if "SecondMoment" not in str(kind) or moment.dtype.kind != "f" or count.shape or count.dtype.kind not in "iu":
        raise ValueError(f"its statistics are {kind!s:.40} of {moment.dtype}, its count is {count!s:.40}")
    if moment.shape != (width, width) or count < width:
        raise ValueError(f"{count} keys, moments of {moment.shape}; expected at least {width} keys of {width} numbers")
    wide = torch.from_numpy(moment.astype(np.float64))
    scale = wide.diagonal().sqrt()  # |Σ k_i k_j| is no more than the product of two of them
    if not ((wide - wide.T).abs() <= 1e-3 * scale[:, None] * scale).all():  # nor if one is not a number
        raise ValueError("its moments are negative, not finite, or not symmetric")
    return KeyStatistics((wide + wide.T) / 2, int(count))


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
