"""MetaKE's refinement through the gates of other methods: the same outer level, the same interface, another base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from metake import methods
from metake.experiments.decision import Decision, all_of
from metake.experiments.studies import comparison
from metake.experiments.studies.whose import CHOSEN, READINGS, preferred
from metake.report import style
from metake.report.studies.comparison import signed
from metake.support.errors import ParameterError


def pairs(reading: str = CHOSEN) -> dict[str, str]:
    """Base → the same with its targets refined, as this reading of MetaKE does it; a base that it cannot refine has
    none."""
    others = {name.rpartition("/")[2]: name for name in methods.OPERATORS if name.rpartition("/")[0] == reading}
    return {"alphaedit": reading} | others


PAIRS = pairs()


def twins(bases: Sequence[str] = tuple(PAIRS), readings: Sequence[str] = (CHOSEN,)) -> list[str]:
    """Every base, and after it its refined twins."""
    refined = [pairs(reading) for reading in readings]
    return [name for base in bases for name in (base, *(own[base] for own in refined if base in own))]


def operators(model: str = "tiny", methods_: Sequence[str] = (), **settings: Any) -> pd.DataFrame:
    """`comparison` of bases with their refined twins, default `twins()`; the rows of a refined method gain its
    request's outer losses.

    outer_first, outer_last: L_edit + L_loc + L_reg (v3 eq. 7) of the request at the initial targets and at the plan
    that was kept, at the last edited layer, or with the whole look-ahead of the whole edit. settings: as for
    `comparison`.
    """
    records = comparison.comparison(model, list(methods_) or twins(), **settings)
    found = records.rename(columns={"outer_before": "outer_first", "outer_after": "outer_last"})
    found.attrs = records.attrs
    return found


def differences(records: pd.DataFrame, reading: str = "", **bootstrap: Any) -> pd.DataFrame:
    """Refined minus base on the same cases, in points, per recorded base (column `method`), data set and metric.

    reading: of MetaKE; default: see `preferred`.
    """
    reading, there = reading or preferred(readings(records)), set(records.method)
    own = {base: refined for base, refined in pairs(reading).items() if {base, refined} <= there}
    if not own:
        raise ParameterError(
            f"the records hold no base together with its refined twin ({pairs(reading)}); found "
            f"{', '.join(sorted(there))}"
        )
    return comparison.differences(records, own, **bootstrap)


def readings(records: pd.DataFrame) -> list[str]:
    """The readings of MetaKE whose twins the records hold."""
    return [reading for reading in READINGS if set(pairs(reading).values()) & set(records.method)]


def all_differences(records: pd.DataFrame) -> pd.DataFrame:
    """`differences` of every reading that there is, below each other, a row named by the refined method."""
    found = []
    for reading in readings(records):
        own = differences(records, reading)
        found.append(own.assign(method=own.method.map(pairs(reading))))
    return comparison.labelled(pd.concat(found, ignore_index=True), records)


def look_ahead(records: pd.DataFrame) -> pd.DataFrame:
    """Did the refinement lower what it minimizes? Per refined method and data set, the outer loss of its requests.

    before, after: mean at the initial targets, and at the plan kept; fell_for: of how many requests it is lower there.
    """
    found = records.dropna(subset="outer_first") if "outer_first" in records else records[:0]
    if found.empty:
        raise ParameterError(
            "the records hold no outer losses; expected the columns outer_first and outer_last, as `operators` "
            "returns them"
        )
    found = found.assign(fell=found.outer_last < found.outer_first)
    groups = found.groupby(["dataset", "method"], sort=False)
    return comparison.labelled(
        groups.agg(
            requests=("id", "size"), before=("outer_first", "mean"), after=("outer_last", "mean"),
            fell_for=("fell", "sum")
        ).reset_index(),
        records,
    )


def by_base(records: pd.DataFrame, confidence: float = 0.95, draws: int = 40_000) -> pd.DataFrame:
    """Does the refinement help? Per reading and base, from efficacy and generalization on every data set.

    The intervals are widened (Bonferroni) so that all of a reading's together have the given confidence:
    with a dozen intervals of 95 % each, one beside zero would be no surprise. helps: "yes" if one lies above zero and
    none below, "no" if one lies below, else "open"; decided_by: the interval that says so, or the largest difference.
    """
    rows = [row for reading in readings(records) for row, _ in _decided(records, reading, confidence, draws)]
    return comparison.labelled(pd.DataFrame(rows), records)


def _decided(
    records: pd.DataFrame, reading: str, confidence: float = 0.95, draws: int = 40_000
) -> Iterator[tuple[dict[str, str], Decision]]:
    """A row of `by_base` and the decision behind it, base by base."""
    count = len(comparison.claimed(differences(records, reading, draws=1)))
    found = comparison.claimed(differences(records, reading, level=1 - (1 - confidence) / count, draws=draws))
    for base, group in found.groupby("method", sort=False):
        decision = comparison.decide(group)
        helps = {True: "yes", False: "no", None: "open"}[decision.holds]
        order = {"yes": group.low, "no": -group.high, "open": group.difference.abs()}[helps]
        row = group.loc[order.idxmax()]
        text = f"{row.metric} {row.dataset} {signed(row.difference)} [{signed(row.low)}, {signed(row.high)}]"
        yield {"method": pairs(reading)[base], "base": style(base).name, "helps": helps, "decided_by": text}, decision


def judge(records: pd.DataFrame, reading: str = "") -> dict[str, Any]:
    """A reading's refinement helps: holds if it helps on all bases, does not hold if it harms on one, else
    inconclusive."""
    found = list(_decided(records, reading or preferred(readings(records))))
    words = {"yes": "helps", "no": "harms", "open": "open"}
    parts = [f"on {row['base']} {words[row['helps']]} ({row['decided_by']})" for row, _ in found]
    return all_of(decision for _, decision in found).quiet().verdict(
        "refined − base in points, intervals of 95 % together: " + "; ".join(parts)
    )
