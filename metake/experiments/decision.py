"""What a verdict rests on: comparisons, each with its own error, and how far the verdict is from turning.

    distance = (bound − value) / error      of a comparison value ≤ bound; error: what is not known of the two sides

Above 1 a comparison is met beyond its error, below −1 it is missed beyond it, in between it cannot be told. The margin
of a verdict is the distance of the comparison that would turn it first. Another processor, another order of summation,
or other records may turn a verdict whose margin is below 1; it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

KINDS = {
    "rounding": "rounding, bounded from the size of what was computed",
    "sampling": "half of a 95 % interval over records",
    "estimate": "what an estimated constant may lack",
    "timing": "how far timings of the same work lie apart",
    "resolution": "the smallest difference that counts, fixed beforehand",
}
"""What an error is of."""
EPS = 2.0**-52
"""Spacing of double precision next to 1."""


class Decision(NamedTuple):
    """Whether a statement holds (None: it cannot be told), and how far that is from turning, in its own errors."""

    holds: bool | None
    margin: float
    error: str  # a key of KINDS
    said: str = ""  # what stands within its error, with both numbers

    def verdict(self, told: str) -> dict[str, Any]:
        """What `report.verdict` takes; told: the numbers that decided."""
        text = "; ".join(filter(None, (told, self.said)))
        return {"holds": self.holds, "decided_by": text, "margin": self.margin, "error": KINDS[self.error]}

    def quiet(self) -> Decision:
        """The same without words of its own: for a page that tells every interval anyway."""
        return self._replace(said="")


def at_most(
    what: str, value: float, bound: float, error: float, kind: str = "rounding", attained: bool = False
) -> Decision:
    """value ≤ bound, known up to error ≥ 0.

    attained: the statement allows equality and is known to reach it: within its error it holds then, and says so; else
    it cannot be told. What is not a number cannot be told either.
    """
    return _compared(what, value, bound, bound - value, error, kind, attained)


def at_least(
    what: str, value: float, bound: float, error: float, kind: str = "rounding", attained: bool = False
) -> Decision:
    """value ≥ bound, otherwise as `at_most`."""
    return _compared(what, value, bound, value - bound, error, kind, attained)


def _compared(what: str, value: float, bound: float, gap: float, error: float, kind: str, attained: bool) -> Decision:
    gap, error = float(gap), float(error)  # numpy's numbers divide, and are true, in their own way
    distance = gap / error if error else math.copysign(math.inf, gap) if gap else 0.0
    if math.isnan(distance):
        return Decision(None, 0.0, kind, f"{what} cannot be computed")
    if abs(distance) > 1:
        return Decision(distance > 0, abs(distance), kind)
    there, limit = rounded(value, error), rounded(bound, error)
    said = f"{what}: {there} against {limit}" if there != limit else f"{what} is {bound:.6g}"
    said += f", within its error of {error:.1g} ({kind})"
    return Decision(True if attained else None, abs(distance), kind, f"{said}: reached" if attained else said)


def equal(what: str, departure: float, error: float) -> Decision:
    """Two ways to the same number: they depart by no more than error, the bound of their rounding."""
    departure, error = float(departure), float(error)
    if departure != departure:
        return undecided(f"{what} cannot be computed", "rounding")
    near, far = sorted((departure, error))
    return Decision(departure <= error, far / near if near else math.inf, "rounding")


def interval(what: str, estimate: float, low: float, high: float, bound: float = 0.0) -> Decision:
    """Above the bound with the whole 95 % interval [low, high]; not, if below with all of it; else it cannot be told.

    An estimate outside of its own interval, as a skewed bootstrap may have it, gives way to the interval's middle.
    """
    value = estimate if low <= estimate <= high else (low + high) / 2
    found = at_least(what, value, bound, value - low if value > bound else high - value, "sampling")
    return found._replace(said=f"{what}: the interval holds {bound:g}") if found.holds is None else found


def apart(what: str, one: Sequence[float], other: Sequence[float]) -> Decision:
    """One (estimate, low, high) above another with their whole intervals; not, if below; else it cannot be told."""
    (value, low, high), (against, least, most) = one, other
    error = value - low + most - against if value > against else high - value + against - least
    return at_least(what, value, against, error, "sampling")


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


def for_and_against(proof: Decision, refutation: Decision) -> Decision:
    """A rule with two sides: not, if the refutation holds; else it holds if the proof does; else it cannot be told.

    Where neither side holds, the one that is nearer to turning has the margin.
    """
    if refutation.holds:
        return opposite(refutation)
    if proof.holds:
        return proof
    undecided_sides = [side for side in (proof, refutation) if side.holds is None]
    return min(undecided_sides or (proof, refutation), key=lambda side: side.margin)._replace(holds=None)


def one_and_none_against(decisions: Iterable[Decision]) -> Decision:
    """Holds if one does and none is refuted, not if one is refuted, else it cannot be told."""
    found = list(decisions)
    return for_and_against(any_of(found), any_of(map(opposite, found)))


def rounded(value: float, error: float) -> str:
    """A number in the digits that its error leaves alone: those are the same on every machine."""
    if not 0 < error < math.inf or not math.isfinite(value):
        return f"{value:.6g}"
    places = max(0, -math.ceil(math.log10(error) + 1))
    return f"{round(value, places) + 0.0:.{places}f}"


def with_interval(value: float, low: float, high: float, digits: int = 1, sign: str = "+") -> str:
    """+0.5 [-1.5, 2.0]. What is shown as zero is no rounding error below zero: it has the sign of zero."""
    value, low, high = (round(float(number), digits) + 0.0 for number in (value, low, high))
    return f"{value:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
