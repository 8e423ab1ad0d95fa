"""What is written to disk is whole: files and folders take their name when finished, tensors carry a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metake.support.errors import ParameterError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling to write to, as a file or as a folder, that takes the name `path` on success only.

    On any failure, KeyboardInterrupt included, it is removed and what was at `path` before stays. Its name is hidden.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    retired = partial.with_suffix(".retired")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():  # a folder cannot be renamed over one that has contents
            os.replace(path, retired)
        os.replace(partial, path)
    finally:
        if retired.exists() and not path.exists():
            os.replace(retired, path)
        remove(partial)
        remove(retired)


@contextlib.contextmanager
def whole_folder(folder: str | os.PathLike, marker: str) -> Iterator[Path]:
    """A folder to fill that takes its name when it is whole; a stranger's, without `marker`, stays: ParameterError."""
    folder = Path(folder)
    if folder.exists() and not (folder / marker).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ParameterError(f"{folder} exists and is not of this kind (no {marker} in it); choose another folder")
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        yield scratch


def write_file(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file, all or nothing; text as UTF-8 with its line ends as they are."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, meta: Mapping[str, str] | None = None) -> None:
    """Write tensors and texts to one safetensors file with a checksum of both."""
    kept, meta = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, meta or {}
    save_file(kept, path, {**meta, "checksum": _checksum(kept, meta)})


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote. Raises OSError if there is no such file, ValueError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            meta = dict(file.metadata() or {})
            # noqa: SIM118 (not a dict); aligned memory: same last digits
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{Path(path).name} is truncated or not of this format: {error}") from error
    if meta.pop("checksum", None) != _checksum(tensors, meta):
        raise ValueError(f"the checksum of {Path(path).name} does not fit its content")
    return tensors, meta


def _checksum(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(meta.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
