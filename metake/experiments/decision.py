"""What a verdict rests on: comparisons, each with its own error, and how far the verdict is from turning.

    distance = (bound − value) / error      of a comparison value ≤ bound; error: what is not known of the two sides

Above 1 a comparison is met beyond its error, below −1 it is missed beyond it, in between it cannot be told. The margin of
a verdict is the distance of the comparison that would turn it first. Another processor, another order of summation, or
other records may turn a verdict whose margin is below 1; it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

KINDS = {
    "rounding": "rounding, bounded from the size of what was computed",
    "sampling": "half of a 95 % interval over records",
    "estimate": "what an estimated constant may lack",
    "resolution": "the smallest difference that counts, fixed beforehand",
}
"""What an error is of."""
EPS = 2.0**-52
"""Spacing of double precision next to 1."""


class Decision(NamedTuple):
    """Whether a statement holds (None: it cannot be told), and how far that is from turning, in units of its own error."""

    holds: bool | None
    margin: float
    error: str  # a key of KINDS
    said: str = ""  # what stands within its error, with both numbers

    def verdict(self, told: str) -> dict[str, Any]:
        """What `report.verdict` takes; told: the numbers that decided."""
        text = "; ".join(filter(None, (told, self.said)))
        return {"holds": self.holds, "decided_by": text, "margin": float(self.margin), "error": KINDS[self.error]}


def at_most(
    what: str, value: float, bound: float, error: float, kind: str = "rounding", attained: bool = False
) -> Decision:
    """value ≤ bound, known up to error ≥ 0.

    attained: the statement allows equality and is known to reach it: within its error it holds then, and says so; else it
    cannot be told. What is not a number cannot be told either.
    """
    return _compared(what, value, bound, bound - value, error, kind, attained)


def at_least(
    what: str, value: float, bound: float, error: float, kind: str = "rounding", attained: bool = False
) -> Decision:
    """value ≥ bound, otherwise as `at_most`."""
    return _compared(what, value, bound, value - bound, error, kind, attained)


def _compared(what: str, value: float, bound: float, gap: float, error: float, kind: str, attained: bool) -> Decision:
    distance = gap / error if error else math.copysign(math.inf, gap) if gap else 0.0
    if math.isnan(distance):
        return Decision(None, 0.0, kind, f"{what} cannot be computed")
    if abs(distance) > 1:
        return Decision(bool(distance > 0), abs(distance), kind)
    there, limit = rounded(value, error), rounded(bound, error)
    said = f"{what}: {there} against {limit}" if there != limit else f"{what} is {bound:.6g}"
    said += f", within its error of {error:.1g} ({kind})"
    return Decision(True if attained else None, abs(distance), kind, f"{said}: reached" if attained else said)


def equal(what: str, departure: float, error: float) -> Decision:
    """Two ways to the same number: they depart by no more than error, the bound of their rounding."""
    if departure != departure:
        return undecided(f"{what} cannot be computed", "rounding")
    near, far = sorted((departure, error))
    return Decision(bool(departure <= error), far / near if near else math.inf, "rounding")


def interval(what: str, estimate: float, low: float, high: float, bound: float = 0.0) -> Decision:
    """Above the bound with its whole 95 % interval [low, high]; not, if the interval lies below; else it cannot be told."""
    error = estimate - low if estimate > bound else high - estimate
    found = at_least(what, estimate, bound, error, "sampling")
    return found._replace(said=f"{what}: the interval holds {bound:g}") if found.holds is None else found


def undecided(why: str, kind: str = "sampling") -> Decision:
    """What cannot be told for a reason other than an error, such as too few records."""
    return Decision(None, 0.0, kind, why)


def opposite(found: Decision) -> Decision:
    """The contrary statement."""
    return found._replace(holds=None if found.holds is None else not found.holds)


def all_of(decisions: Iterable[Decision]) -> Decision:
    """Holds if all do, not if one does not, else it cannot be told."""
    found = list(decisions)
    if not found:
        return undecided("nothing was compared")
    if wrong := [d for d in found if d.holds is False]:
        return max(wrong, key=lambda d: d.margin)  # all of them would have to turn
    nearest = min((d for d in found if d.holds is None), key=lambda d: d.margin, default=None)
    nearest = nearest or min(found, key=lambda d: d.margin)
    return nearest._replace(said="; ".join(dict.fromkeys(d.said for d in found if d.said)))


def any_of(decisions: Iterable[Decision]) -> Decision:
    """Holds if one does, not if none does, else it cannot be told."""
    return opposite(all_of(map(opposite, decisions)))


def rounded(value: float, error: float) -> str:
    """A number in the digits that its error leaves alone: those are the same on every machine."""
    if not 0 < error < math.inf or not math.isfinite(value):
        return f"{value:.6g}"
    places = max(0, -math.ceil(math.log10(error) + 1))
    return f"{round(value, places) + 0.0:.{places}f}"
