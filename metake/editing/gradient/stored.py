"""Trained editors on disk: networks and record of a finished one, and the checkpoint that training goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.network import Network
from metake.editing.gradient.rule import GradientRule
from metake.support.errors import ParameterError, ProvenanceError
from metake.support.storage import atomic_path, contents, load_tensors, read_json, reading, save_tensors

WEIGHTS, RECORD = "editor.safetensors", "record.json"


def _tensors(networks: Sequence[Sequence[Network]]) -> Iterator[tuple[str, Tensor]]:
    for j, step in enumerate(networks):
        for i, network in enumerate(step):
            yield from ((f"{j}.{i}.{name}", tensor) for name, tensor in network.state_dict().items())


def save(editor: GradientEditor, folder: str | Path) -> Path:
    """Write networks and record, whole. Raises ParameterError if the folder holds something else."""
    folder = Path(folder)
    if folder.exists() and contents(folder) - {WEIGHTS, RECORD, "checkpoint"}:
        raise ParameterError(f"{folder} exists and holds no trained editor; choose another folder")
    return _write(folder, dict(_tensors(editor.networks)), dict(editor.trained))


def _write(folder: Path, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> Path:
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        save_tensors(tensors, scratch / WEIGHTS)
        (scratch / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def read(folder: str | Path, device: Any = "cpu") -> GradientEditor:
    """A trained editor that `save` wrote. Raises ProvenanceError if the folder is none, or damaged."""
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ProvenanceError(f"{folder} holds no trained editor; make one with: metake train METHOD --out {folder}")
    with reading(folder, "no trained editor", "train it again"):
        told = read_json(folder / RECORD)
        rule = GradientRule(**{k: v for k, v in told["rule"].items() if k != "part"})
        networks = _networks(load_tensors(folder / WEIGHTS)[0], rule, told["training"])
        if not (isinstance(told["modules"], list) and told["modules"] and all(networks)):
            raise ValueError("it names no linear maps, or has no network for them")
        placed = tuple(tuple(network.to(device) for network in step) for step in networks)
        return GradientEditor(tuple(map(str, told["modules"])), rule, placed, told, int(told["training"]["seed"]))


def _networks(tensors: Mapping[str, Tensor], rule: GradientRule, training: Mapping[str, Any]) -> list[list[Network]]:
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        j, i, rest = name.split(".", 2)
        found.setdefault((int(j), int(i)), {})[rest] = tensor
    steps: list[list[Network]] = [[] for _ in range(rule.steps)]
    for (j, _), own in sorted(found.items()):
        network = Network(
            own["table"].shape[1], len(own["step"]), training["rank"], training["blocks"], 0.0, rule.inside, 0,
            own["step"].dtype
        )
        network.load_state_dict(own)
        steps[j].append(network)
    return steps


def finished(folder: str | Path, told: Mapping[str, Any]) -> GradientEditor | None:
    """The editor that these settings made in a folder, or None. Raises ParameterError for one of other settings."""
    if not (Path(folder) / RECORD).is_file():
        return None
    done = read(folder)
    kept, wanted = ({**_same(one), "training": one["training"]} for one in (done.trained, told))
    _refuse_others(kept, wanted, f"{folder} holds an editor")
    return done


def _refuse_others(kept: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    wanted = json.loads(json.dumps(wanted))
    if changed := sorted(k for k in wanted if kept.get(k) != wanted[k]):
        raise ParameterError(
            f"{where} with another {', '.join(changed)}; choose another folder, or repeat its settings to go on"
        )


def checkpoint(
    out: Path, told: Mapping[str, Any], made: GradientEditor, optimizer: torch.optim.Optimizer,
    losses: Sequence[Mapping[str, float]]
) -> None:
    """What a further call goes on from: networks, the optimizer's moments, the losses so far."""
    state = {
        f"adam.{i}.{name}": torch.as_tensor(value)
        for i, own in optimizer.state_dict()["state"].items()
        for name, value in own.items()
    }
    _write(out / "checkpoint", dict(_tensors(made.networks)) | state, {"told": _same(told), "losses": list(losses)})


def _same(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a call that goes on must have in common: all but how far it goes."""
    training = {k: v for k, v in told["training"].items() if k not in ("steps", "every")}
    return {k: told[k] for k in ("rule", "modules", "weights", "ids", "requests_digest")} | {"training": training}


def resumed(
    out: str | Path | None, told: Mapping[str, Any], made: GradientEditor, optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    """The losses of the steps that a checkpoint has made, whose networks and moments are taken over; [] without one."""
    folder = Path(out) / "checkpoint" if out else None
    if folder is None or not (folder / RECORD).is_file():
        return []
    with reading(folder, "no checkpoint", "remove it to train from the beginning"):
        kept, tensors = read_json(folder / RECORD), load_tensors(folder / WEIGHTS)[0]
        _refuse_others(kept["told"], _same(told), f"{out} holds a training")
        for name, tensor in _tensors(made.networks):
            tensor.copy_(tensors[name])
        own, state = [p for group in optimizer.param_groups for p in group["params"]], {}
        for name in (name for name in tensors if name.startswith("adam.")):
            _, place, key = name.split(".", 2)
            state.setdefault(int(place), {})[key] = tensors[name]
        for place, parts in state.items():
            wanted = {"step": (), "exp_avg": own[place].shape, "exp_avg_sq": own[place].shape}
            if {k: t.shape for k, t in parts.items() if t.is_floating_point()} != wanted or not parts["step"] >= 1:
                raise ValueError("its moments do not fit the networks")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        return list(kept["losses"])
