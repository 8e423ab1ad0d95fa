"""MetaKE v3 Figure 4: how much of each planned residual an edit realizes, against the request's association γ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from metake import methods
from metake.experiments.decision import (
    Decision,
    all_of,
    any_of,
    at_least,
    for_and_against,
    interval,
    opposite,
    with_interval,
)
from metake.experiments.studies import whose
from metake.experiments.studies.comparison import PRIMARY, labelled
from metake.experiments.studies.study import study

READINGS = {
    "beta_layer": "last layer, own plan",
    "beta_initial": "last layer, initial plan",
    "whole": "all layers, own plan",
    "whole_initial": "all layers, initial plan",
}
"""What may be meant by β̂ = ⟨r̂, r⟩ / ‖r‖² (eq. 115): realized by the last layer or by all, of the refined plan or of
Stage I's."""


def realized_residual(model: str = "tiny", methods_: Sequence[str] = PRIMARY, **settings: Any) -> pd.DataFrame:
    """β̂ of every request under every method, in each of the `READINGS`; settings and rows: see `study`. `percentile`:
    of γ, in (0, 100], within data set, seed and method."""
    records = study(model, {name: methods.planning(name, model) for name in methods_}, **settings)
    records["percentile"] = 100 * records.groupby(["dataset", "seed", "method"]).gamma.rank(pct=True, method="first")
    return records


def binned(records: pd.DataFrame, bins: int = 13) -> pd.DataFrame:
    """Mean and standard error of each reading in quantile bins of γ, per data set and method:
    one row a bin and reading."""
    long = records.melt(["dataset", "method", "percentile"], list(READINGS), "reading", "value").dropna()
    long["bin"] = np.minimum((long.percentile * bins / 100).apply(np.ceil).astype(int), bins)
    found = long.groupby(["dataset", "reading", "method", "bin"], sort=False).agg(
        percentile=("percentile", "mean"), mean=("value", "mean"), error=("value", "sem"), requests=("value", "size")
    )
    return labelled(found.reset_index().sort_values("bin", kind="stable"), records)


def curves(records: pd.DataFrame, bins: int = 13) -> pd.DataFrame:
    """What Figure 4 draws: the `binned` readings (kind "bin"), and of each request its own (kind "request")."""
    requests = records.melt(["dataset", "method", "percentile"], list(READINGS), "reading", "mean").dropna()
    return labelled(
        pd.concat([binned(records, bins).assign(kind="bin"), requests.assign(kind="request")], ignore_index=True),
        records,
    )


def gains(
    records: pd.DataFrame, one: str = "metake", other: str = "alphaedit", draws: int = 4000, seed: int = 0
) -> pd.DataFrame:
    """Mean difference of β̂ on the same requests, per data set and reading, with a 95 % bootstrap interval."""
    generator, rows = np.random.default_rng(seed), []
    for dataset, group in records.groupby("dataset", sort=False):
        sides = [group[group.method == m].set_index(["seed", "id"]) for m in (one, other)]
        for reading, name in READINGS.items():
            difference = (sides[0][reading] - sides[1][reading]).dropna().to_numpy()
            low, high = np.percentile(generator.choice(difference, (draws, len(difference))).mean(1), [2.5, 97.5])
            rows.append(
                {
                    "dataset": dataset, "reading": name, one: sides[0][reading].mean(), other: sides[1][reading].mean(),
                    "difference": difference.mean(), "low": low, "high": high
                }
            )
    return labelled(pd.DataFrame(rows), records)


def all_gains(records: pd.DataFrame, of: Sequence[str] = whose.READINGS) -> pd.DataFrame:
    """`gains` of every reading of MetaKE that there is, below each other: "its own" is that of the named method."""
    there = [name for name in of if name in set(records.method)]
    found = [gains(records, name).rename(columns={name: "its own"}).assign(method=name) for name in there]
    table = pd.concat(found, ignore_index=True)
    return labelled(table[["method", *table.columns.drop("method")]], records)


def decide(found: pd.DataFrame, least: float = 0.01) -> Decision:
    """Does β̂ rise by more than `least`, with its interval above zero, in some reading on every data set (holds), or is
    every interval in every reading below `least` (does not hold)?"""
    risen: dict[str, list[Decision]] = {}
    for r in found.itertuples():
        enough = at_least(f"rise of β̂, {r.reading}", r.difference, 0.0, least, "resolution")
        risen.setdefault(r.reading, []).append(all_of([enough, interval(r.reading, r.difference, r.low, r.high)]))
    return for_and_against(
        any_of(map(all_of, risen.values())),
        all_of(opposite(interval(r.reading, r.difference, r.low, r.high, least)) for r in found.itertuples()),
    )


def judge(found: pd.DataFrame, least: float = 0.01) -> dict[str, Any]:
    """The paper's claim, MetaKE realizes more of the plan than AlphaEdit: holds if β̂ rises by more than `least`,
    with its interval above zero, in some reading on every data set; does not hold if every interval in every reading
    lies below `least`; else inconclusive."""
    best = found.loc[found.difference.idxmax()]
    return decide(found, least).quiet().verdict(
        f"largest rise of β̂ in any reading: {with_interval(best.difference, best.low, best.high, 4)}, {best.reading}, "
        f"{best.dataset}"
    )
