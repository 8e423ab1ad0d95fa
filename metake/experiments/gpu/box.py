"""Work in a box of time: units in order of value, each kept once it is finished, none begun that would not fit."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from metake import report
from metake.report.files import OWN, parts_of
from metake.support.errors import ParameterError

log = logging.getLogger(__name__)
KEPT, DONE, LEFT_OUT, FAILED = "kept", "done", "left out", "failed"


class NotHereError(Exception):
    """What a unit needs is not on this machine; its message says what."""


class Outcome(NamedTuple):
    """What became of a unit, and a line that says so."""

    state: str
    line: str


@dataclass(frozen=True)
class Unit:
    """A piece of work that is kept when it is finished.

    recording: under which name; whose: columns and values by which the recording's rows are known to be this unit's, {}
    for all; seconds: what it takes on one H200, a guess that counts beside those of its recording's other units only,
    once one of them is done; make: gives the records, their provenance, and a line that sums them up.
    """

    recording: str
    whose: Mapping[str, str]
    seconds: float
    make: Callable[[], tuple[pd.DataFrame, dict[str, Any], str]]

    def __str__(self) -> str:
        return " ".join((self.recording.removeprefix("gpu_"), *self.whose.values()))

    def kept(self, folder: Path) -> bool:
        """Whether an earlier call finished it; failed tests are run again."""
        found = _found(self.recording, folder)
        if found is None:
            return False
        for column, value in self.whose.items():
            found = found[found[column] == value]
        return len(found) > 0 and not ("outcome" in found and (found.outcome == "failed").any())

    def cost(self, folder: Path) -> float:
        """Seconds that it will take, by the slowest of its recording's units that are done."""
        found = _found(self.recording, folder)
        return self.seconds * max([part.get("pace", 1.0) for part in parts_of(found)] if found is not None else [1.0])


def carry_out(units: Iterable[Unit], folder: Path, until: float) -> Iterator[Outcome]:
    """Do what is not done yet and fits before `until` (as `time.time` counts), and keep it; say what became of each.

    A unit that raises is told of and passed over: the others are worth no less.
    """
    for unit in units:
        if unit.kept(folder):
            yield Outcome(KEPT, f"{unit}")
            continue
        cost, left = unit.cost(folder), until - time.time()
        if cost > left:
            yield Outcome(LEFT_OUT, f"{unit}: takes about {cost:.0f} s, {max(left, 0):.0f} s are left")
            continue
        yield _done(unit, folder)
        gc.collect()  # a model may lie in a circle of references, and the next one needs its memory


def _done(unit: Unit, folder: Path) -> Outcome:
    start = time.perf_counter()
    try:
        frame, origin, said = unit.make()
        spent = time.perf_counter() - start
        # rounding must not make a pace or a minute of nothing
        took = {"pace": round(max(spent / unit.seconds, 1e-3), 3), "minutes": max(round(spent / 60, 1), 0.1)}
        keep(unit.recording, frame, origin | took, folder)
    except NotHereError as missing:
        return Outcome(LEFT_OUT, f"{unit}: {missing}")
    except torch.OutOfMemoryError:
        return Outcome(LEFT_OUT, f"{unit}: does not fit into this device's memory")
    except Exception as error:  # of any unit's code: the others go on
        log.exception("%s failed", unit)
        return Outcome(FAILED, f"{unit}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Outcome(DONE, f"{unit} in {spent:.0f} s: {said}")


def keep(name: str, frame: pd.DataFrame, origin: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write a recording, or merge it with the one of this name. Raises ParameterError as `report.merge_recorded`."""
    write = report.merge_recorded if merges(name, frame, folder) else report.write_recorded
    return write(name, frame, origin, folder)


def merges(name: str, frame: pd.DataFrame, folder: Path | None = None) -> bool:
    """Whether there is a recording of this name whose rows may stay beside these."""
    return any(column in frame for column in OWN) and _found(name, folder) is not None


def _found(name: str, folder: Path | None) -> pd.DataFrame | None:
    """A recording, None without one. A damaged file is refused, as everywhere."""
    try:
        return report.recorded(name, folder)
    except ParameterError:
        return None
