"""MetaKE v3 Table 2: the method with one part changed at a time."""

from __future__ import annotations

from typing import Any

import pandas as pd

from metake import methods
from metake.experiments.decision import all_of, with_interval
from metake.experiments.studies import comparison
from metake.experiments.studies.study import study


def ablation(model: str = "tiny", **settings: Any) -> pd.DataFrame:
    """MetaKE and its ablations (`methods.ABLATIONS`) on one batch; settings and rows: see `study`."""
    full = methods.metake(model)
    return study(
        model, {"metake": full} | {name: change(full) for name, change in methods.ABLATIONS.items()}, **settings
    )


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


def differences(records: pd.DataFrame) -> pd.DataFrame:
    """The full method minus each ablation on the same requests, in points, with bootstrap intervals."""
    return comparison.differences(records, dict.fromkeys(methods.ABLATIONS, "metake"))


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
