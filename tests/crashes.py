"""What is interrupted at any file operation: each way that this project writes, and what must be true afterwards.

Used by the tests with a few moments, by `tools/torture.py` with many.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from faults import Killed, faults, forked, leftovers
from models import random_model, stand_in

from metake import methods, report
from metake.algebra.update import Edit, EditRecord, LayerUpdate
from metake.commands import pages
from metake.data.facts import facts_records
from metake.editing import statistics as key_statistics
from metake.editing.gradient import stored
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.experiments import runs
from metake.experiments.kept import kept
from metake.experiments.runs import RunConfig, run
from metake.language import assets
from metake.support.errors import MetakeError
from metake.support.storage import load_tensors, read_json, write_file

MODULE = "transformer.h.1.mlp.c_proj"


class Scenario(NamedTuple):
    """prepare: what is there before; act: what is interrupted; read: what a reader sees, None for nothing."""

    prepare: Callable[[Path], Any]
    act: Callable[[Path], Any]
    read: Callable[[Path], Any]


def edit(seed: int) -> Edit:
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((32, 2), (2, 128)))
    return Edit((LayerUpdate(MODULE, left, right),), EditRecord(weights={MODULE: "0" * 64}, requests=(str(seed),)))


def plain(edit: Edit) -> tuple:
    return edit.record.to_json(), [(u.module, u.left.tolist(), u.right.tolist()) for u in edit.updates]


@cache
def model():
    return random_model("gpt2")


def _statistics(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(folder))
        found = key_statistics.statistics(model(), layers=(1,), tokens=300)
        return found[1].moment.tolist(), found[1].null_rank(1e-2), found.digest


@cache
def _expected_statistics() -> Any:
    found = key_statistics.statistics(model(), layers=(1,), tokens=300, cache=False)
    return found[1].moment.tolist(), found[1].null_rank(1e-2), found.digest


def _recording(folder: Path, value: int) -> Path:
    frame = pd.DataFrame([{"method": "memit", "score": 1.0}, {"method": "rome", "score": float(value)}])
    return report.write_recorded("crash", frame, {"model": "tiny", "date": "", "commit": ""}, folder)


def _merge(folder: Path) -> Path:
    frame = pd.DataFrame([{"method": "rome", "score": 7.0}])
    return report.merge_recorded("crash", frame, {"model": "tiny", "date": "", "commit": ""}, folder)


def _rows(folder: Path) -> Any:
    return report.recorded("crash", folder)[["method", "score"]].values.tolist()


def _fetch(folder: Path) -> Any:
    """`fetch`, whose network is replaced by three files."""

    def deliver(name: str, remote: Any) -> None:
        with assets.atomic_path(assets.cache_dir() / f"{name}-hub-0123456789ab") as partial:
            partial.mkdir()
            for file in ("config.json", "model.safetensors", "tokenizer.json"):
                (partial / file).write_text(file * 9)
            assets._seal(partial, "hub", "0123456789ab", "weights as published")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(folder))
        patch.setattr(assets, "_from_hub", deliver)
        assets.fetch("smollm2-135m", "hub")


def _fetched(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(folder))
        found = assets._cached("smollm2-135m", "hub", thorough=True)
    return found and sorted(p.name for p in found.path.iterdir())


def trained(seed: int) -> GradientEditor:
    return GradientEditor((MODULE,), GradientRule(living=True), (), {"seed": seed, "training": {}}, seed)


def _adapter(folder: Path) -> Any:
    tensors, _ = load_tensors(folder / "a" / "adapter_model.safetensors")
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    return {k: v.tolist() for k, v in tensors.items()}, config


def _nothing(folder: Path) -> None:
    pass


def _train(folder: Path) -> None:
    """What a training writes: the first checkpoint, in a folder that holds nothing yet, and then the editor."""
    stored._write(folder / "a" / "checkpoint", {}, {"step": 1})
    stored.save(trained(1), folder / "a")


def _read_trained(folder: Path) -> Any:
    return json.loads((folder / "a" / "record.json").read_text())["seed"], sorted(
        p.name for p in (folder / "a").iterdir()
    )


SCENARIOS = {
    "file": Scenario(
        lambda f: write_file(f / "a", "old"), lambda f: write_file(f / "a", "new"), lambda f: (f / "a").read_text()
    ),
    "edit": Scenario(_nothing, lambda f: edit(1).save(f / "a"), lambda f: plain(Edit.load(f / "a"))),
    "edit over another": Scenario(
        lambda f: edit(0).save(f / "a"), lambda f: edit(1).save(f / "a"), lambda f: plain(Edit.load(f / "a"))
    ),
    "adapter": Scenario(lambda f: edit(0).to_peft(f / "a"), lambda f: edit(1).to_peft(f / "a"), _adapter),
    "trained editor": Scenario(
        lambda f: stored.save(trained(0), f / "a"), lambda f: stored.save(trained(1), f / "a"), _read_trained
    ),
    "trained editor and its first checkpoint": Scenario(_nothing, _train, _read_trained),
    "page's folder": Scenario(
        _nothing, lambda f: pages._free(f / "a", {"page": "p"}), lambda f: read_json(f / "a" / "parameters.json")
    ),
    "statistics": Scenario(_nothing, _statistics, lambda f: _expected_statistics()),
    "recording": Scenario(lambda f: _recording(f, 1), lambda f: _recording(f, 2), _rows),
    "recording merged": Scenario(lambda f: _recording(f, 1), _merge, _rows),
    "records of a study": Scenario(
        _nothing, lambda f: kept(f, "told", lambda: [{"a": 1}]),
        lambda f: [json.loads(p.read_text()) for p in f.glob("[!.]*")] or None
    ),
    "fetch": Scenario(_nothing, _fetch, _fetched),
}  # fmt: skip


def seen(scenario: Scenario, folder: Path) -> Any:
    """What a reader sees, None where it is told that there is nothing whole."""
    try:
        return scenario.read(folder)
    except (MetakeError, FileNotFoundError):
        return None


def operations(scenario: Scenario, folder: Path) -> tuple[list[str], Any, Any]:
    """What an undisturbed act does on the disk, and what a reader sees before and after it."""
    folder.mkdir()
    scenario.prepare(folder)
    before = seen(scenario, folder)
    with faults(folder) as layer:
        scenario.act(folder)
    return layer.seen, before, scenario.read(folder)


def strike(scenario: Scenario, folder: Path, at: int, what: str, before: Any, after: Any) -> None:
    """Interrupt the act at one operation: the old or the new is there, whole; the act again gives the new."""
    folder.mkdir()
    scenario.prepare(folder)
    try:
        with faults(folder, at, what) as layer:
            scenario.act(folder)
    except (Killed, OSError, MetakeError) as error:
        assert layer.struck, error
    if what != "killed" and not layer.seen[at - 1].startswith("os.rm"):  # else clearing away is what failed
        assert not leftovers(folder), (layer.seen, leftovers(folder))
    found = seen(scenario, folder)
    assert found in (before, after), f"{what} at {layer.seen}"
    scenario.act(folder)
    assert scenario.read(folder) == after and not leftovers(folder), f"{what} at {layer.seen}"


# -- a whole run

OPENING = 9  # file operations until a run's folder says what it holds
CONFIG = RunConfig(method="memit_seq", edits=6, batch=1, seed=5, text_tokens=300)


def prepared(folder: Path, patch: pytest.MonkeyPatch) -> RunConfig:
    """Six batches on a random model, of a file of six facts, cheap enough to be begun hundreds of times."""
    make = methods.method

    def small(*words: Any, **changes: Any) -> Any:
        made = make(*words, **changes)
        return replace(made, target=replace(made.target, steps=2), layers=(1, 2))

    patch.setattr(runs, "load", stand_in)
    patch.setattr(runs.methods, "method", small)
    patch.setenv("METAKE_CACHE", str(folder / "cache"))
    records = [record | {"neighborhood_prompts": record["neighborhood_prompts"][:1]} for record in facts_records()[:6]]
    (folder / "data.json").write_text(json.dumps(records))
    return replace(CONFIG, data=str(folder / "data.json"))


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but how long it took."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = {k: t.numpy().tobytes() for k, t in load_tensors(file)[0].items()}
        elif file.suffix == ".json":
            told = json.loads(file.read_text())
            found[name] = {k: v for k, v in told.items() if k not in ("seconds", "peak_memory", "peak_memory_bytes")}
        else:
            found[name] = file.read_bytes()
    return found


def killed_runs(config: RunConfig, folder: Path, kills: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Runs killed once, each at another of the file operations that begin a run, then runs killed again and again, half
    of the times inside a file operation; all are gone on with until they are finished.

    Yields the folder of each finished one, and how it was killed.
    """
    draw, done = random.Random(seed), 0
    for number in range(kills):
        out, told = folder / f"run{number}", []
        while True:
            inside, at, after = draw.random() < 0.5, draw.randrange(1, 40), 0.6 * draw.random()
            if number < OPENING:
                inside, at = True, number + 1
            spared = done >= kills or number < OPENING and told

            def act(out=out, at=at if inside and not spared else 10**9) -> None:
                with faults(folder, at, "SIGKILL"):
                    run(config, out)

            code = forked(act, None if inside or spared else after)
            if code == -signal.SIGKILL:
                done += 1
                told.append(f"operation {at}" if inside else f"after {after:.2f} s")
            else:
                assert code == 0, f"ended with {code}; killed before: {told}"
                break
        yield out, ", ".join(told)
        if done >= kills:
            return
