"""What is written to disk is whole: files and folders take their name when finished, tensors carry a checksum.

The disk has the content before the name, and the name before a call returns; a second process waits or is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metake.support.errors import MetakeError, ParameterError, ProvenanceError

log = logging.getLogger("metake")


@contextlib.contextmanager
def held(path: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """No other process works at `path` within the block: a second one waits for the first or, wait=False, is refused.

    The lock is the system's, on a hidden file beside `path`: it ends with its process, however that ends.
    """
    path = Path(path)
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "stands below a file", str(path)) from error
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise MetakeError(f"another process is at work in {path}; wait for its end, or name another one") from None
        log.info("waiting for another process, which is at work in %s", path)
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where an open file cannot be removed, or a new folder is in use by now
            remove(file)
            for folder in new:
                folder.rmdir()
        lock.release()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling to write to, as a file or as a folder, that takes the name `path` on success only.

    On any failure, KeyboardInterrupt included, it is removed and what was at `path` before stays. Its name is hidden.
    What a killed process left there is cleared away first.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    with held(path.with_name(f"{path.name}.write")):  # apart from the lock of who holds `path` while it is made
        _restore(path)
        try:
            yield partial
            _flush(*partial.rglob("*"), partial)
            if not (partial.is_dir() and path.is_dir()):
                os.replace(partial, path)
            elif not _exchange(partial, path):  # a folder cannot be renamed over one that has contents
                os.replace(path, partial.with_suffix(".retired"))
                os.replace(partial, path)
            _flush(path.parent)
        finally:
            _restore(path)


def _restore(path: Path) -> None:
    """Clear away what unfinished writing left beside `path`, and give the old folder its name if none has it."""
    for left in path.parent.glob(f".*{glob.escape(path.name)}.{'?' * 12}.*"):
        if not left.name.lstrip(".").startswith(path.name.lstrip(".") + "."):
            continue  # another's, whose name ends alike; what is in the making within what is has one dot more
        if left.suffix == ".retired" and not path.exists():
            os.replace(left, path)
        elif left.suffix in (".partial", ".retired"):
            remove(left)


def contents(folder: Path) -> set[str]:
    """The names of what a folder holds, without what a process left there that was killed while it wrote."""
    return {p.name for p in folder.iterdir() if not (p.match(".*.write.lock") or p.match(f".*.{'?' * 12}.partial"))}


def _flush(*paths: Path) -> None:
    """Have the disk write what stands in files and folders, where the system lets one ask for it."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; False where the system cannot: it is not Linux, or far away."""
    rename = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), both) == 0


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


@contextlib.contextmanager
def reading(
    place: str | os.PathLike, instead: str, then: str, kind: type[MetakeError] = ProvenanceError
) -> Iterator[None]:
    """Whatever a file that anybody may have written does to its reader is one `kind` of error, with what to do."""
    try:
        yield
    except (MetakeError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        told = f"{place} is damaged or {instead} ({type(error).__name__}: {error}); {then}"
        raise kind(told) from error


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """What a JSON file holds. Raises OSError if there is no such file, ValueError if it is damaged or no `kind`."""
    return parse_json(Path(path).read_text(encoding="utf-8"), kind)


def parse_json(text: str, kind: type = dict) -> Any:
    """What a JSON text says. Raises ValueError if it is none, no `kind`, or nothing that could be written again."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:  # half a character
        json.dumps(found, ensure_ascii=False).encode()
    if not isinstance(found, kind):
        raise ValueError(f"it holds {type(found).__name__}, expected {kind.__name__}")
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, meta: Mapping[str, str] | None = None) -> None:
    """Write tensors and texts to one safetensors file with a checksum of both. Raises OSError if the disk is full."""
    kept, meta = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, meta or {}
    try:
        save_file(kept, path, {**meta, "checksum": _checksum(kept, meta)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


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
