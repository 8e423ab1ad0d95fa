"""MetaKE v3 Table 2: the method with one part changed at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from metake import methods
from metake.experiments.decision import all_of, with_interval
from metake.experiments.studies import comparison
from metake.experiments.studies.study import study
from metake.experiments.studies.whose import CHOSEN, READINGS, preferred
from metake.support.errors import ParameterError

WITHOUT = "without bi-level"


def ablation(model: str = "tiny", readings: Sequence[str] = (CHOSEN,), **settings: Any) -> pd.DataFrame:
    """Each of these readings of MetaKE ("metake" in column `method`) and its ablations (`methods.ABLATIONS`) on one
    batch; settings and rows: see `study`. `reading`: whose row it is. Raises ParameterError for a method that refines
    nothing."""
    full = {reading: methods.planning(reading, model) for reading in readings}
    if plain := [reading for reading, editor in full.items() if not editor.refine]:
        raise ParameterError(f"{plain[0]} has no outer level to ablate; name readings of MetaKE: {', '.join(READINGS)}")
    changes = {"metake": lambda editor: editor} | methods.ABLATIONS
    editors = {(reading, name): change(full[reading]) for reading in readings for name, change in changes.items()}
    found = study(model, editors, **settings)
    return found.assign(reading=[r for r, _ in found.method], method=[m for _, m in found.method])


def by_name(records: pd.DataFrame) -> pd.DataFrame:
    """The records of several readings with a name for each editor; without the bi-level refinement all are the same,
    which stands once."""
    own = records[(records.method != WITHOUT) | (records.reading == records.reading.iloc[0])]
    names = [m if m == WITHOUT else _name(r, m) for r, m in zip(own.reading, own.method, strict=True)]
    return comparison.labelled(own.assign(method=names), records)


def _name(reading: str, method: str) -> str:
    """What a reading's own row is called: its ablations say whose they are, those of "metake" aside."""
    if method == "metake" or reading == "metake":
        return reading if method == "metake" else method
    return f"{method} ({reading.rpartition('/')[2]})"


def moved(records: pd.DataFrame) -> pd.DataFrame:
    """How far the refinement takes the plan, ‖v − v_init‖ / ‖v_init − h‖ in percent, and its realized share."""
    table = (
        records.assign(moved=(100 * records.moved).round(9))  # below it is what rounding moves a plan that stays
        .groupby(["dataset", "method"], sort=False)[["planned", "moved", "whole"]]
        .median()
        .reset_index()
    )
    return comparison.labelled(
        table.rename(columns={"planned": "‖v − h‖", "moved": "moved, %", "whole": "realized share"}), records
    )


def differences(records: pd.DataFrame, reading: str = "") -> pd.DataFrame:
    """A reading's full method minus each ablation on the same requests, in points, with bootstrap intervals; default:
    see `preferred`."""
    own = comparison.labelled(records[records.reading == (reading or preferred(records.reading))], records)
    return comparison.differences(own, dict.fromkeys(methods.ABLATIONS, "metake"))


def all_differences(records: pd.DataFrame) -> pd.DataFrame:
    """`differences` of every reading that there is, below each other, each ablation under a name of its own."""
    found = []
    for reading in records.reading.unique():
        own = differences(records, reading)
        found.append(own.assign(method=[_name(reading, method) for method in own.method]))
    return comparison.labelled(pd.concat(found, ignore_index=True), records)


def judge(differences: pd.DataFrame) -> dict[str, Any]:
    """The paper's claim, every part adds to efficacy or generalization: holds if the full method is above each ablation
    in one of them, with an interval above zero, and below none; does not hold if it is below one;
    inconclusive otherwise."""
    claimed = comparison.claimed(differences)
    better, worse = claimed[claimed.low > 0], claimed[claimed.high < 0]
    largest = claimed.loc[claimed.difference.abs().idxmax()]
    said = (
        f"MetaKE is above {better.method.nunique()} of {claimed.method.nunique()} ablations and below "
        f"{worse.method.nunique()}; largest difference {with_interval(largest.difference, largest.low, largest.high)} "
        f"points, {largest.metric} against {largest.method}, {largest.dataset}"
    )
    found = all_of(comparison.decide(own) for _, own in claimed.groupby("method", sort=False))
    return found.quiet().verdict(said)
