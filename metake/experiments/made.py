"""When, from what source and on which machine records were made: what every recording's provenance says of it."""

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

import metake
from metake import report
from metake.support.machine import accelerator, processor, versions

PACKAGE = Path(metake.__file__).parent


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


def _git(*words: str) -> str:
    try:
        found = subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=report.project_root(), check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):  # no git at all
        return ""
    return found.stdout.strip()
