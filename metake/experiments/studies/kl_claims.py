"""What the paper says of Figure 5, sentence by sentence, and whether the sweep of the KL weight bears it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from metake.experiments.decision import Decision, all_of, any_of, interval, opposite, undecided, with_interval
from metake.experiments.studies.comparison import PRIMARY, labelled
from metake.report.style import style

WORDS = {True: "yes", False: "no", None: "open"}


class Sentence(NamedTuple):
    """One of the paper's sentences on Figure 5, on one data set, with the number that decides it."""

    dataset: str
    claim: str
    found: float
    low: float
    high: float
    decision: Decision
    because: str  # why it is open


def sentences(shifts: pd.DataFrame, leads: pd.DataFrame) -> list[Sentence]:
    """The paper's sentences, decided by 95 % intervals; shifts, leads: as `kl_strength` returns them.

    Optima lie on a grid of whole octaves: one is above another, and they differ, if the interval leaves out half an
    octave. What ties or the grid's end decide cannot be told.
    """
    found, nearer = ["octaves", "low", "high"], ["nearer", "nearer_low", "nearer_high"]
    rows = []
    for dataset, own in shifts.groupby("dataset", sort=False):
        memit, alphaedit, ours = (own.set_index("method").loc[name] for name in PRIMARY)
        smaller, above = interval("octaves", *memit[found], 0.5), interval("octaves", *alphaedit[found], 0.5)
        differ = any_of([above, opposite(interval("octaves", *alphaedit[found], -0.5))])
        ties = memit.undecided, alphaedit.undecided, ours.undecided
        second, fourth = (interval("nearer", *own[nearer]) for own in (alphaedit, ours))
        rows += [
            _sentence(dataset, *told)
            for told in (
                ("MEMIT: the high-γ group prefers the smaller λ_KL", memit[found], smaller, ties[:1]),
                ("AlphaEdit: the groups' optima are nearer than MEMIT's", alphaedit[nearer], second, ties[1::-1]),
                ("AlphaEdit: they still differ", alphaedit[found], differ, ties[1:2]),
                ("MetaKE: the groups' optima are nearer than AlphaEdit's", ours[nearer], fourth, ties[:0:-1]),
            )
        ]
        rows += [_lead(dataset, led) for led in leads[leads.dataset == dataset].itertuples()]
    return rows


def _lead(dataset: str, led: Any) -> Sentence:
    numbers = led.difference, led.low, led.high
    decision = interval("difference", *numbers)
    if decision.holds and led.above <= (led.above + led.equal + led.below) / 2:
        decision = undecided("not above at most λ_KL")
    return _sentence(dataset, f"MetaKE: above {style(led.method).name}'s at most λ_KL", numbers, decision, ())


def _sentence(
    dataset: str, claim: str, numbers: Sequence[float], decision: Decision, reasons: Sequence[str]
) -> Sentence:
    """reasons: what leaves it open whatever the interval says, if it is not ""."""
    if because := next(filter(None, reasons), ""):
        decision = undecided(because)
    elif decision.holds is None:
        because = "the interval holds zero"
    return Sentence(dataset, claim, *numbers, decision, because)


def claims(shifts: pd.DataFrame, leads: pd.DataFrame) -> pd.DataFrame:
    """The `sentences` as a table: `says` is yes, no or open.

    found, low, high: octaves of λ_KL, in the last two points of efficacy (nats, if the records' log p was compared).
    """
    rows = [
        {name: getattr(s, name) for name in ("dataset", "claim", "found", "low", "high")}
        | {"says": WORDS[s.decision.holds], "because": s.because}
        for s in sentences(shifts, leads)
    ]
    return labelled(pd.DataFrame(rows), shifts)


def judge(shifts: pd.DataFrame, leads: pd.DataFrame) -> dict[str, Any]:
    """The claim holds if each sentence is borne out, does not hold if one is contradicted; inconclusive otherwise."""
    rows = sentences(shifts, leads)
    counts = ", ".join(
        f"{sum(s.decision.holds is holds for s in rows)} {told}"
        for holds, told in ((True, "borne out"), (False, "contradicted"), (None, "open"))
    )
    first = rows[0]
    why = f" ({first.because})" if first.because else ""
    against = "".join(
        f"; contradicted: {s.claim}, {with_interval(s.found, s.low, s.high)}" for s in rows if s.decision.holds is False
    )
    return all_of(s.decision for s in rows).quiet().verdict(
        f"of {len(rows)} sentences {counts}; low-γ optimum over high-γ optimum, MEMIT: "
        f"{with_interval(first.found, first.low, first.high)} octaves{why}{against}"
    )
