"""Files that somebody else, or a crash, has written: every reader of this project, and what is done to its files.

A reader may answer with a MetakeError or with what can be used; nothing else is allowed, nor a hang, nor memory without
bound. Used by the tests with a thousand files, by `tools/torture.py` with more.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from crashes import MODULE, edit, model
from safetensors import safe_open
from safetensors.torch import save_file

from metake import Statistics, report
from metake.algebra.geometry import InverseCovariance, KeyStatistics
from metake.algebra.update import total
from metake.commands import pages
from metake.data.facts import facts_records
from metake.data.requests import EditRequest
from metake.editing import statistics as key_statistics
from metake.editing.gradient import stored, training
from metake.editing.gradient.rule import GradientRule
from metake.editing.gradient.training import Training
from metake.editing.record import digest_of
from metake.editing.state import EditorState
from metake.editing.texts import documents
from metake.experiments import runs
from metake.experiments.cases import read_cases
from metake.experiments.export import served
from metake.experiments.kept import kept
from metake.experiments.runs import RunConfig, open_run
from metake.experiments.studies.items import read_items
from metake.language import assets
from metake.support import storage
from metake.support.errors import MetakeError
from metake.support.storage import save_tensors, write_file

SECONDS, BYTES = 10, 2**30  # what one file may take
REQUEST = EditRequest("The capital of {} is", "France", "Rome", "1")
PAGE = {"page": "quickstart", "parameters": {"model": "tiny", "n_edits": 3}}


class Reader(NamedTuple):
    """make: writes good files into a folder, and names those to be damaged; use: reads them and uses what was read."""

    make: Callable[[Path], list[Path]]
    use: Callable[[Path], Any]


def _records(name: str, records: list[dict], lines: bool = False) -> Reader:
    def make(folder: Path) -> list[Path]:
        text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
        write_file(folder / name, text)
        return [folder / name]

    def use(folder: Path) -> None:
        found = read_cases(str(folder / name))
        assert len(found.digest) == 64 and all(isinstance(c.request.text, str) and c.probes for c in found)

    return Reader(make, use)


def _written(name: str, content: str, use: Callable[[Path], Any]) -> Reader:
    def make(folder: Path) -> list[Path]:
        write_file(folder / name, content)
        return [folder / name]

    return Reader(make, lambda folder: use(folder / name))


def _edit(folder: Path) -> list[Path]:
    record = edit(1).record
    base = {"id": "random-gpt2", "dtype": "float64", "conv1d": True, "tolerance": 1e-6, "sketches": {MODULE: [0.5] * 8}}
    told = {"weights": {MODULE: model().digest(MODULE)}, "requests_digest": digest_of([REQUEST]), "base": base}
    told |= {"recipe": {"part": "Editor", "layers": [1], "discarded": {MODULE: 0.25}}, "statistics_digest": "0" * 64}
    told |= {"context_templates": ["{}", "So. {}"], "seconds": {"targets": 1.0}, "trace": {"1": {"nll": [1.0]}}}
    type(edit(1))(edit(1).updates, type(record)(**{**asdict(record), **told})).save(folder / "edit")
    return [folder / "edit" / "record.json", folder / "edit" / "edit.safetensors"]


def _use_edit(folder: Path) -> None:
    from metake.algebra.update import Edit

    found = Edit.load(folder / "edit")
    with found.applied(model()):
        pass
    assert model().digest(MODULE) == _digest()
    total([found, found]).compress(1)[0].to_peft(folder / "lora")
    found.save(folder / "again")


@cache
def _digest() -> str:
    return model().digest(MODULE)


def _run(folder: Path) -> list[Path]:
    write_file(folder / "config.json", json.dumps(asdict(RunConfig(edits=1, batch=1))))
    record, factors = _edit(folder)
    (folder / "batches").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "batches" / "0000", ignore_errors=True)
    shutil.move(folder / "edit", folder / "batches" / "0000")
    save_tensors({"1": torch.ones(1, 128).double()}, folder / "batches" / "0000" / "keys.safetensors")
    inside = folder / "batches" / "0000"
    return [folder / "config.json", inside / "record.json", inside / "edit.safetensors", inside / "keys.safetensors"]


def _use_run(folder: Path) -> None:
    config, edits = open_run(folder)
    config.editor()
    assert all(isinstance(i, str) for record in edits.records() for i in record.requests)
    metric = {1: InverseCovariance(KeyStatistics(torch.eye(128).double() * 999, 999), 10.0)}
    state = EditorState(metric, ("{}",), "0" * 64)
    loaded, after = runs._load_batch(folder / "batches" / "0000", [REQUEST], state, "cpu")
    assert after.edits == 1


def _statistics(folder: Path) -> list[Path]:
    draw = torch.Generator().manual_seed(1)
    one = KeyStatistics.empty(8)
    one.update(torch.randn(40, 8, generator=draw, dtype=torch.float64))
    one.spectrum  # noqa: B018 (its eigenvectors are kept too)
    Statistics({1: one}, "d" * 64, {"text": "embedded", "tokens": 40}).save(folder / "s.safetensors")
    return [folder / "s.safetensors"]


def _use_statistics(folder: Path) -> None:
    found = Statistics.load(folder / "s.safetensors")
    found.null_ranks(0.5)
    assert all(one.covariance.shape == (one.dim, one.dim) for one in found.values())


def _published(folder: Path) -> list[Path]:
    moment = torch.eye(128).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    told = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": 200, "mom2.mom2": moment}
    np.savez(folder / f"{MODULE}_float32_mom2_100.npz", sample_size=100, **told)
    return [folder / f"{MODULE}_float32_mom2_100.npz"]


def _use_published(folder: Path) -> None:
    found = key_statistics.statistics(model(), str(folder), [1])[1]
    assert found.covariance.shape == (128, 128) and found.count >= 128
    found.null_rank(0.5)


def _eigenvectors(folder: Path) -> list[Path]:
    _statistics(folder)
    key_statistics._OnDisk(Statistics.load(folder / "s.safetensors")[1], folder / "s.eigh")._eigh  # noqa: B018
    return [folder / "s.eigh"]


def _use_eigenvectors(folder: Path) -> None:
    _statistics(folder)
    one = Statistics.load(folder / "s.safetensors")[1]
    found = key_statistics._OnDisk(one, folder / "s.eigh")
    values, vectors = found._eigh
    assert values.shape == (8,) and vectors.shape == (8, 8) and found.null_rank(0.5) <= 8


@cache
def _training() -> tuple:
    """Networks as training begins with them, and what their record would say."""
    made = training.begin(model(), GradientRule(), (MODULE,), Training(2, rank=2))
    told = training._told(model(), made, Training(2, rank=2), [])
    return made, told


def _trained(folder: Path) -> list[Path]:
    made, told = _training()
    stored._write(folder / "e", dict(stored._tensors(made.networks)), told)
    return [folder / "e" / "record.json", folder / "e" / "editor.safetensors"]


def _use_trained(folder: Path) -> None:
    found = stored.read(folder / "e")
    assert found.modules and found.networks and isinstance(found.seed, int)


def _checkpoint(folder: Path) -> list[Path]:
    made, told = _training()
    optimizer = training._optimizer(made, Training(2, rank=2))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    stored.checkpoint(folder, told, made, optimizer, [{"after": 1.0}])
    return [folder / "checkpoint" / "record.json", folder / "checkpoint" / "editor.safetensors"]


def _use_checkpoint(folder: Path) -> None:
    made, told = _training()
    made = copy.deepcopy(made)
    optimizer = training._optimizer(made, Training(2, rank=2))
    assert isinstance(stored.resumed(folder, told, made, optimizer), list)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def _recorded(folder: Path) -> list[Path]:
    import pandas as pd

    frame = pd.DataFrame([{"method": "memit", "seed": 1, "score": 1.0}, {"method": "rome", "seed": 2, "score": None}])
    return [report.write_recorded("fuzz", frame, {"model": "tiny", "commit": "", "date": ""}, folder)]


def _use_recorded(folder: Path) -> None:
    import pandas as pd

    found = report.recorded("fuzz", folder)
    if {"method", "score"} <= set(found):
        row = pd.DataFrame([{"method": "memit", "seed": 1, "score": 2.0}])
        report.merge_recorded("fuzz", row, {"model": "tiny", "commit": "", "date": ""}, folder)


def _cached(folder: Path) -> list[Path]:
    inside = folder / "smollm2-135m-hub-0123456789ab"
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "config.json").write_text("{}")
    assets._seal(inside, "hub", "0123456789ab", "weights as published")
    return [inside / "source.json"]


def _use_cached(folder: Path) -> None:
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(folder))
        assets._cached("smollm2-135m", "hub", thorough=True)


ROME, MEND = facts_records()[:2], facts_records("zsre")[:2]
EASYEDIT = [{
    "case_id": i, "prompt": "The capital of France is", "target_new": "Rome", "subject": "France",
    "ground_truth": "Paris", "rephrase_prompt": "France is ruled from", "locality_prompt": "The capital of Spain is",
    "locality_ground_truth": "Madrid",
} for i in range(2)]  # fmt: skip
SST2 = "".join(json.dumps({"sentence": f"a fine film {i} .", "label": i % 2}) + "\n" for i in range(3))
ADAPTER = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": [MODULE]})
TEXT = "\n".join(f"{number}: the capital of France is Paris, as everybody knows in the city." for number in range(9))
READERS = {
    "counterfact": _records("a.json", ROME), "easyedit": _records("a.json", EASYEDIT), "zsre": _records("a.json", MEND),
    "json lines": _records("a.jsonl", ROME, lines=True),
    "tasks": _written("sst2.jsonl", SST2, lambda file: read_items(file.parent, "sst2")),
    "text": _written("a.txt", TEXT, lambda file: documents(str(file))),
    "edit": Reader(_edit, _use_edit), "run": Reader(_run, _use_run),
    "statistics": Reader(_statistics, _use_statistics), "eigenvectors": Reader(_eigenvectors, _use_eigenvectors),
    "published statistics": Reader(_published, _use_published),
    "adapter": _written("adapter_config.json", ADAPTER, lambda file: served(file.parent)),
    "trained editor": Reader(_trained, _use_trained), "checkpoint": Reader(_checkpoint, _use_checkpoint),
    "recording": Reader(_recorded, _use_recorded),
    "records of a study": Reader(
        lambda f: [kept(f, "told", lambda: [{"a": 1}]), next(f.glob("[!.]*.json"))][1:],
        lambda f: kept(f, "told", lambda: [{"a": 1}]),
    ),
    "page": _written("parameters.json", json.dumps(PAGE), lambda file: pages._free(file.parent, PAGE)),
    "fetched model": Reader(_cached, _use_cached),
}  # fmt: skip


# -- what is done to a file

NASTY = (
    None, True, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "", " ", "\x00", "../../../etc/passwd", "/etc/passwd",
    "\ud800", "é" * 3000, [], {}, [[]], {"": None}, [1, "a", None], "0", "{}", "9" * 5000,
)  # fmt: skip


def _bytes(raw: bytes, draw: random.Random) -> bytes:
    at, size = draw.randrange(len(raw) + 1), draw.choice((1, 2, 8, 64))
    return draw.choice((
        lambda: raw[:at], lambda: raw[at:], lambda: raw[:at] + raw[at + size :],
        lambda: raw[:at] + draw.randbytes(size) + raw[at:], lambda: raw[:at] + bytes(size) + raw[at + size :],
        lambda: raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :], lambda: raw + raw, lambda: raw * 1 + b"\n{",
        lambda: raw[:at] + raw[at : at + size] * 50 + raw[at + size :],
        lambda: raw.replace(draw.choice((b'"', b"1", b",", b"{")), draw.choice((b"", b"[", b"\xff", b"'")), 1),
        lambda: struct.pack("<Q", draw.choice((0, 7, 10**10, 2**63))) + raw[8:],
        lambda: b"[" * 10**5, lambda: b'{"a":' * 10**5, lambda: b"", lambda: b"\xef\xbb\xbf" + raw,
    ))()  # fmt: skip


def _tree(value: Any, draw: random.Random) -> Any:
    """Plain data with one place in it changed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(NASTY)
    value = copy.copy(value)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    deed = draw.random()
    if deed < 0.15:
        value.pop(key)
    elif deed < 0.25 and isinstance(value, dict):
        value[draw.choice(("", "unknown", "__class__", "../x"))] = value.pop(key)
    elif deed < 0.3 and isinstance(value, list):
        value += value * 3
    else:
        value[key] = _tree(value[key], draw)
    return value


def _tensors(file: Path, draw: random.Random) -> None:
    """Tensors with one of them changed, and a checksum that fits."""
    with safe_open(file, "pt") as opened:
        meta, tensors = dict(opened.metadata() or {}), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    meta.pop("checksum", None)
    name = draw.choice(list(tensors))
    one = tensors[name]
    changed: Callable[[], Any] = draw.choice((
        lambda: one[:-1], lambda: one.T, lambda: one.flatten(), lambda: one[None], lambda: one * float("nan"),
        lambda: one.to(torch.int8), lambda: one.to(torch.bfloat16), lambda: one[:0], lambda: one.to(torch.bool),
        lambda: one * 1e300, lambda: torch.zeros(3), lambda: one.to(torch.complex64), lambda: -one,
    ))  # fmt: skip
    try:
        tensors[name] = changed().contiguous().clone()
    except (RuntimeError, IndexError):
        tensors[name] = torch.zeros(())
    if draw.random() < 0.3:
        tensors[draw.choice(("", "x", "x:y", "a.b.c", "1", "../x", "0.0.x", f"{name}x"))] = tensors.pop(name)
    if meta and draw.random() < 0.4:
        key = draw.choice(list(meta))
        meta[key] = draw.choice(("", "{}", "[]", "null", '{"1": "x"}', '{"1": -5}', "x", '{"1": 1e999}'))
    save_file(tensors, file, {**meta, "checksum": storage._checksum(tensors, meta)})


def damage(file: Path, draw: random.Random) -> None:
    """Change a file: bytes of it, or its content with everything around it in order."""
    if draw.random() < 0.45 and file.suffix in (".safetensors", ".eigh"):
        _tensors(file, draw)
    elif draw.random() < 0.6 and file.suffix in (".json", ".jsonl"):
        lines = file.read_text("utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
        at = draw.randrange(len(lines))
        lines[at] = json.dumps(_tree(json.loads(lines[at]), draw))
        file.write_text("\n".join(lines) + "\n", "utf-8")
    else:
        file.write_bytes(_bytes(file.read_bytes(), draw))


class Hang(BaseException):
    """A reader took too long."""


def _late(*_: Any) -> None:
    raise Hang


def fuzz(folder: Path, count: int, seed: int, names: tuple[str, ...] = tuple(READERS)) -> Iterator[str]:
    """Damage and read so many files; tells every answer that is neither a MetakeError nor usable.

    The address space of this process is bounded from here on: call it in a copy.
    """
    for name in names:
        READERS[name].make(folder / "once" / name), READERS[name].use(folder / "once" / name)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + BYTES, before + BYTES))
    signal.signal(signal.SIGALRM, _late)
    for number in range(count):
        name, draw = names[number % len(names)], random.Random(f"{seed}/{number}")
        own = folder / str(number)
        own.mkdir()
        for _ in range(draw.choice((1, 1, 2))):
            file = draw.choice(READERS[name].make(own))
        damage(file, draw)
        signal.alarm(SECONDS)
        try:
            READERS[name].use(own)
        except MetakeError as error:
            if not str(error).strip():
                yield f"{name} {number}: an error without a word"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = next((f for f in reversed(frames) if "/metake/" in f.filename), frames[-1])
            where = f"{Path(place.filename).name}:{place.lineno}"
            yield f"{name} {number}, {file.name}: {type(error).__name__} at {where}: {str(error)[:200]!r}"
        signal.alarm(0)
        shutil.rmtree(own)


def words(count: int, seed: int) -> Iterator[str]:
    """Damaged values of a page's parameters, as a user may type them; tells what is neither refused nor right."""
    usual = {"n": 3, "rate": 0.5, "model": "tiny", "deep": True, "seeds": [0, 1], "names": ["memit"]}
    typed = ("3", "0.5", "tiny", "true", "0,1", "memit,rome", "", "[", "nan", "-inf", "1e999", "9" * 5000, "٣", "0x10")
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        name, text = draw.choice(list(usual)), draw.choice(typed)
        text = _bytes(text.encode(), draw).decode("utf-8", "replace")[:9999] if draw.random() < 0.6 else text
        try:
            found = pages._value(name, text, usual[name])
            if type(found) is not type(usual[name]):
                yield f"{name}={text!r:.50}: {found!r:.50}"
        except MetakeError:
            pass
        except Exception as error:
            yield f"{name}={text!r:.50}: {type(error).__name__}: {error}"


