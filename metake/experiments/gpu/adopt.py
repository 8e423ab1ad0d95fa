"""What `make gpu` brought home becomes recordings of the project, each row with the provenance that it came with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from metake import report
from metake.experiments.gpu.box import keep, merges
from metake.experiments.made import commit, source
from metake.report.files import check_same, parts_of
from metake.support.errors import ParameterError


def adopt(folder: str | Path) -> Iterator[str]:
    """Write a folder's recordings to results/, or merge them into those that are there; say which.

    Where the run had no git, its commit is this checkout's, if the sources are the same byte for byte.
    Raises ParameterError for a folder without recordings, and if rows do not fit those that are there; ProvenanceError
    for a damaged file. Nothing is written then.
    """
    files = sorted(Path(folder).glob("gpu_*.jsonl"))
    if not files:
        raise ParameterError(f"{folder} holds no recordings (gpu_*.jsonl); name a folder that `make gpu` wrote")
    found = {file.stem: report.recorded(file.stem, Path(folder)) for file in files}
    for name, frame in found.items():
        if merges(name, frame):
            check_same(name, frame, parts_of(frame)[0])
    own = source(), commit()
    return (_adopt(name, frame, *own) for name, frame in found.items())


def _adopt(name: str, frame: pd.DataFrame, digest: str, head: str) -> str:
    for place, part in enumerate(parts_of(frame)):
        known = {"commit": head} if (part["commit"], part["source"]) == ("unknown", digest) else {}
        rows = frame[frame.made == place].drop(columns="made") if "made" in frame else frame
        path = keep(name, rows.reset_index(drop=True), part | known)
    return f"wrote results/{path.name}: {len(frame)} records"
