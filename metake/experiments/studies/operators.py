"""MetaKE's refinement through the gates of other methods: the same outer level, the same interface, another base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from metake import methods
from metake.experiments.decision import Decision, all_of
from metake.experiments.studies import comparison
from metake.report import style
from metake.report.studies.comparison import signed
from metake.support.errors import ParameterError

PAIRS = {"alphaedit": "metake"} | {name.partition("/")[2]: name for name in methods.OPERATORS}
"""Base → the same with its targets refined."""


def operators(model: str = "tiny", bases: Sequence[str] = tuple(PAIRS), **settings: Any) -> pd.DataFrame:
    """`comparison` of every base with its refined twin; the rows of a refined method gain its request's outer losses.

    outer_first, outer_last: L_edit + L_loc + L_reg (v3 eq. 7) of the request at the initial targets and at the plan
    that was kept, at the last edited layer. settings: as for `comparison`.
    """
    methods_ = [method for base in bases for method in (base, PAIRS[base])]
    records = comparison.comparison(model, methods_, **settings)
    found = records.rename(columns={"outer_before": "outer_first", "outer_after": "outer_last"})
    found.attrs = records.attrs
    return found


def differences(records: pd.DataFrame, **bootstrap: Any) -> pd.DataFrame:
    """Refined minus base on the same cases, in points, per recorded base (column `method`), data set and metric."""
    there = set(records.method)
    pairs = {base: refined for base, refined in PAIRS.items() if {base, refined} <= there}
    if not pairs:
        raise ParameterError(
            f"the records hold no base together with its refined twin ({PAIRS}); found {', '.join(sorted(there))}"
        )
    return comparison.differences(records, pairs, **bootstrap)


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
    """Does the refinement help? Per base, from efficacy and generalization on every data set.

    The intervals are widened (Bonferroni) so that all of them together have the given confidence:
    with a dozen intervals of 95 % each, one beside zero would be no surprise. helps: "yes" if one lies above zero and
    none below, "no" if one lies below, else "open"; decided_by: the interval that says so, or the largest difference.
    """
    rows = [row for row, _ in _decided(records, confidence, draws)]
    return comparison.labelled(pd.DataFrame(rows), records)


def _decided(
    records: pd.DataFrame, confidence: float = 0.95, draws: int = 40_000
) -> Iterator[tuple[dict[str, str], Decision]]:
    """A row of `by_base` and the decision behind it, base by base."""
    count = len(comparison.claimed(differences(records, draws=1)))
    found = comparison.claimed(differences(records, level=1 - (1 - confidence) / count, draws=draws))
    for base, group in found.groupby("method", sort=False):
        decision = comparison.decide(group)
        helps = {True: "yes", False: "no", None: "open"}[decision.holds]
        order = {"yes": group.low, "no": -group.high, "open": group.difference.abs()}[helps]
        row = group.loc[order.idxmax()]
        text = f"{row.metric} {row.dataset} {signed(row.difference)} [{signed(row.low)}, {signed(row.high)}]"
        yield {"method": base, "helps": helps, "decided_by": text}, decision


def judge(records: pd.DataFrame) -> dict[str, Any]:
    """The refinement helps: holds if it helps on all bases, does not hold if it harms on one, else inconclusive."""
    found = list(_decided(records))
    words = {"yes": "helps", "no": "harms", "open": "open"}
    parts = [f"on {style(row['method']).name} {words[row['helps']]} ({row['decided_by']})" for row, _ in found]
    return all_of(decision for _, decision in found).quiet().verdict(
        "refined − base in points, intervals of 95 % together: " + "; ".join(parts)
    )
