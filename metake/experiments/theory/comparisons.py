"""Many comparisons as one decision. Each comes as a distance: positive where the statement holds, in units of its own
rounding, so that beyond ±1 it is certain and in between it cannot be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from metake.experiments.decision import EPS, Decision, all_of, at_least, equal, opposite, undecided

LONG = 100  # terms of a sum that are counted at most
NEAR = 1e3  # roundings: nearer to equality a bound counts as reached; bounds on what rounding does are not tighter


def rounding(summed: int, amplified: Any = 1.0, most: float = float("inf")) -> Any:
    """What rounding may make of a number, relative to it: ε · (terms summed on the way) · (what amplifies it).

    A sum of m terms is off by at most m ε/2 of their size, so two ways to one number differ by at most m ε. Sums round
    like √m, and none here has more than 10⁴ terms: never more than LONG ε is granted.
    amplified: a condition number, or the size of what cancels over what is left; most: granted whatever amplifies it.
    """
    return np.minimum(EPS * min(summed, LONG) * np.asarray(amplified), most)[()]


def least(what: str, distances: Iterable[float], attained: bool = False) -> Decision:
    """All of many comparisons: holds if every distance is positive beyond 1; the one that is nearest to turning it.

    attained: the statement allows equality, so that within ±1 it holds. Where it comes to NEAR of equality it says so,
    with a margin of 0: how near beyond that, and on which side, is rounding, which differs between machines.
    """
    found = np.asarray(list(distances), dtype=float)
    if not len(found):
        return undecided(f"{what}: nothing was compared", "rounding")
    certain = found[~np.isnan(found)]
    if len(certain) and certain.min() < -1:
        return at_least(what, float(certain.min()), 0.0, 1.0)
    if len(certain) < len(found):
        return at_least(what, float("nan"), 0.0, 1.0)
    nearest = float(found[np.abs(found).argmin()])
    one = at_least(what, nearest, 0.0, 1.0, attained=attained)
    if attained and abs(nearest) < NEAR:
        return one._replace(margin=0.0, said=f"{what}: nearest within rounding of equality, which is allowed")
    return one._replace(said=f"{what}: {abs(nearest):.1g} times its rounding, within its error") if one.said else one


def some(what: str, distances: Iterable[float]) -> Decision:
    """At least one comparison fails beyond its rounding: a counterexample that is expected, and found."""
    return opposite(least(what, [min(distances, default=float("nan"))]))


def same(what: str, departures: Iterable[float], errors: Iterable[float]) -> Decision:
    """Two ways to one number, many times: no departure is larger than its own error."""
    off, granted = (np.asarray(list(x), dtype=float) for x in (departures, errors))
    if not len(off):
        return undecided(f"{what}: nothing was compared", "rounding")
    worst = np.where(np.isnan(off / granted), np.inf, off / granted).argmax()
    return equal(what, float(off[worst]), float(granted[worst]))


def foretold(cases: Mapping[str, str], distances: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Where an assumption is dropped. cases: how many instances ("none" or "some") should then break the statement.

    One row per case: judged; wrong = those that break it beyond their rounding; foretold, as_foretold; distance = the
    one that breaks it most clearly, or comes nearest to it.
    """
    rows = []
    for case, told in cases.items():
        found = np.asarray(distances[case], dtype=float)
        row = {"case": case, "judged": len(found), "wrong": int((found < -1).sum()), "foretold": told}
        rows.append(row | {"as_foretold": _case(case, told, found.min()).holds is True, "distance": found.min()})
    return pd.DataFrame(rows)


def _case(case: str, told: str, distance: float) -> Decision:
    return (some if told == "some" else least)(case, [distance])


def as_foretold(dropped: pd.DataFrame) -> Decision:
    """Every case of `foretold` came out as it was told."""
    return all_of(_case(row.case, row.foretold, row.distance) for row in dropped.itertuples())


def agreed(decisions: Iterable[Decision], apart: str) -> Decision:
    """What all of them say; if they do not say the same it cannot be told, and `apart` says why."""
    found = list(decisions)
    nearest, said = min(found, key=lambda d: d.margin), dict.fromkeys(d.said for d in found if d.said)
    if len({d.holds for d in found}) == 1:
        return nearest._replace(said="; ".join(said))
    return nearest._replace(holds=None, said="; ".join([*said, apart]))
