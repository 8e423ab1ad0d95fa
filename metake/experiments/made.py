"""Of what, when, from what source and on which machine records were made: what every recording's provenance says."""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from metake import report
from metake.experiments.borrowed import borrowing
from metake.experiments.cases import read_cases
from metake.language.model import LanguageModel, load
from metake.methods import CHOSEN
from metake.support.machine import accelerator, processor, versions

PACKAGE = Path(__file__).parents[1]


def made(device: torch.device, dtype: str) -> dict[str, Any]:
    """Date, commit and digest of the source, machine and versions, as a provenance has them."""
    return {
        "date": datetime.date.today().isoformat(), "commit": commit(), "source": source(), "device": str(device),
        "dtype": dtype, "processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()
    } | accelerator(device) | {"versions": versions()}  # fmt: skip


def commit() -> str:
    """The checkout's commit, with a mark if the package has changed since; "unknown" where git or its folder is not."""
    head, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "metake")
    return (head or "unknown") + ("+changes" if changed else "")


def source() -> str:
    """SHA-256 of the package's own source, by which a run made without git tells from what commit it is."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def settings(frame: pd.DataFrame, seconds: float) -> dict[str, Any]:
    """What was asked for, and how long it took; runs that an earlier call finished count with their own time."""
    told = dict(frame.attrs.get("settings", {}))
    if runs := frame.attrs.get("runs"):
        seconds = sum(run["seconds"]["total"] for run in runs)
        told |= {name: runs[0]["config"][name] for name in ("edits", "batch")} | {
            "seeds": sorted({run["seed"] for run in runs})
        }
    return told | {"minutes": round(seconds / 60, 1)}


def provenance(model: str, data: dict[str, str], text: str, tokens: int | None) -> dict[str, Any]:
    """`of_model` of a model by name."""
    return of_model(load(model), data, text, tokens)


def of_model(lm: LanguageModel, data: Mapping[str, str], text: str, tokens: int | None) -> dict[str, Any]:
    """Where records of a model come from: itself, its data, its key statistics, and what `made` tells."""
    digests = {name: f"{Path(source).name} sha256:{read_cases(source).digest[:16]}" for name, source in data.items()}
    return {
        "model": lm.name, "model_origin": lm.origin, "model_digest": lm.digest(lm.write_path(lm.depth - 1)),
        "dataset": ", ".join(digests.values()),
        "metake": ", ".join(f"{k} {v}" for k, v in CHOSEN.items()),
        **{name: str(told) for name, told in borrowing(lm.name).items() if told},
        "statistics": f"{Path(text).name}, {tokens} tokens",
    } | made(lm.device, str(lm.dtype).removeprefix("torch."))  # fmt: skip


def _git(*words: str) -> str:
    try:
        found = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=report.project_root(), check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):  # no git at all
        return ""
    return found.stdout.strip()
