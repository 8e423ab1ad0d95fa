"""The paper's claims about MetaKE, each asked of three readings of it: as its equations are written, as a rule fixed
beforehand chose, and with the look-ahead through the whole edit.

Every claim is judged by the function of its own page: the records of one reading stand where that page has MetaKE's.
A record tests a claim only if it is of the paper's scale, within the factors `FEWER` and `SMALLER`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from metake import report
from metake.experiments.decision import Decision, all_of, interval, undecided, with_interval
from metake.experiments.studies import (
    ablation,
    case_study,
    comparison,
    general_ability,
    hidden_states,
    kl_claims,
    kl_strength,
    operators,
    realized_residual,
    streams,
)
from metake.experiments.studies.choosing import DESCENDS
from metake.experiments.studies.whose import NAMES, READINGS, as_metake
from metake.language.model import load

FEWER, SMALLER = 10, 20
"""How many times fewer edits, and fewer parameters, than the paper's smallest experiment a record may be of."""
SMALLEST = 1.3e9  # parameters of the smallest model that the paper edits: Phi-1.5 (App. D.2)
PARAMETERS = {"smollm2-135m": 135e6}  # of models that only recordings are of
FAR = "not tested at this scale"
WORDS = {True: "holds", False: "does not hold", None: "inconclusive"}


class Claim(NamedTuple):
    """One claim: whose recordings it is judged by (the first that there is), and by what.

    edits: of the paper's experiment; 0: no matter of scale. judge: what the claim's own page does with the records;
    shown: a few of the compared numbers: what, difference, low, high; bound: what is no difference; least: one that is
    small.
    """

    title: str
    said: str
    place: str
    recordings: tuple[str, ...]
    edits: int
    unit: str
    judge: Callable[[pd.DataFrame], Mapping[str, Any]]
    shown: Callable[[pd.DataFrame], pd.DataFrame]
    bound: float = 0.0
    least: float = 2.0


def falls(records: pd.DataFrame) -> pd.DataFrame:
    """For how many requests of a hundred MetaKE's own outer loss fell, per data set, with Wilson's interval."""
    rows = []
    for dataset, own in records[records.method == "metake"].groupby("dataset", sort=False):
        fell = int((own.outer_after < own.outer_before).sum())
        low, high = case_study.wilson(fell, len(own))
        share = 100 * fell / len(own)
        rows.append({"what": dataset, "requests": len(own), "difference": share, "low": 100 * low, "high": 100 * high})
    return comparison.labelled(pd.DataFrame(rows), records)


def descends(records: pd.DataFrame) -> Decision:
    """Does the outer loss fall for at least 95 % of the requests of every data set?"""
    return all_of(interval(r.what, r.difference, r.low, r.high, 100 * DESCENDS) for r in falls(records).itertuples())


def _falls(records: pd.DataFrame) -> Mapping[str, Any]:
    told = "; ".join(
        f"{r.what} {with_interval(r.difference, r.low, r.high, sign='')} % of {r.requests}"
        for r in falls(records).itertuples()
    )
    return descends(records).quiet().verdict(f"loss lower after than before for {told}")


def _compared(records: pd.DataFrame) -> pd.DataFrame:
    return _what(comparison.claimed(comparison.paired_differences(records)), "metric", "dataset")


def _parts(records: pd.DataFrame) -> pd.DataFrame:
    found = comparison.claimed(ablation.differences(records)).replace(PART)
    return _what(found[found.dataset == found.dataset.iloc[-1]], "metric", "method")


PART = {
    "without bi-level": "over no refinement", "key-only gate": "over a key-only gate",
    "stop-gradient": "over a stopped gradient"
}  # fmt: skip


def _bases(records: pd.DataFrame) -> pd.DataFrame:
    found = operators.differences(records)
    found = found[found.metric == "generalization"]
    return _what(found.assign(method=[f"on {report.style(m).name}" for m in found.method]), "method", "dataset")


def _ability(records: pd.DataFrame) -> pd.DataFrame:
    kind = general_ability.readable(records)
    found = general_ability.changes(records, kind, general_ability.able(records, kind)).dropna(subset="difference")
    return pd.DataFrame(
        {
            "what": [f"over {report.style(m).name}" for m in found.method], "difference": found.difference,
            "low": found.difference_low, "high": found.difference_high
        }
    )


def _states(records: pd.DataFrame) -> pd.DataFrame:
    found = hidden_states.ratios(records)
    found = found[found.method == "alphaedit"].rename(columns={"value": "difference"})
    return _what(found[found.measure == found.measure.iloc[0]], "group", "dataset")


def _streams(records: pd.DataFrame) -> pd.DataFrame:
    found = streams.differences(records)
    found = found[(found.quantity == "level") & (found.metric == "all three")]
    return _what(found.assign(method=[f"over {report.style(m).name}" for m in found.method]), "method")


def _written(records: pd.DataFrame) -> pd.DataFrame:
    found = case_study.summarize(records)
    found = found[found.method.isin(["metake", "alphaedit"])].rename(columns={"target": "difference"})
    return _what(found.assign(method=[report.style(m).name for m in found.method]), "method")


def _optima(records: pd.DataFrame) -> pd.DataFrame:
    found = kl_strength.shifts(records).rename(columns={"octaves": "difference"})
    return _what(found.assign(method=[report.style(m).name for m in found.method]), "method")


def _what(found: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Rows named by these columns."""
    names = found[list(columns)].astype(str).agg(", ".join, axis=1).str.replace(" format", "")
    return found.assign(what=names)[["what", "difference", "low", "high"]].reset_index(drop=True)


def _kl(records: pd.DataFrame) -> Mapping[str, Any]:
    return kl_claims.judge(kl_strength.shifts(records), kl_strength.leads(records))


HELD_OUT = ("sequences", "comparison")
CLAIMS = (
    Claim(
        "The refinement lowers its own loss", f"for at least {100 * DESCENDS:.0f} % of the requests", "Theorem 3",
        HELD_OUT[:1], 0, "% of requests", _falls, falls, 100 * DESCENDS, 5.0
    ),
    Claim(
        "It edits better than AlphaEdit", "efficacy or generalization above, neither below", "Paper Table 1, §6.2",
        HELD_OUT, 2000, "points", lambda r: comparison.judge(comparison.paired_differences(r)), _compared
    ),
    Claim(
        "Every part adds", "above each ablation in efficacy or generalization", "Paper Table 2, §6.4", ("ablation",),
        2000, "points", lambda r: ablation.judge(ablation.differences(r)), _parts
    ),
    Claim(
        "It helps on other operators", "efficacy or generalization above on each base, neither below", "§4.3",
        ("operators",), 2000, "points", operators.judge, _bases
    ),
    Claim(
        "It realizes more of its plans", "β̂ above AlphaEdit's by more than 0.01", "Paper Fig. 4, §6.3", ("realized",),
        500, "share of the plan", lambda r: realized_residual.judge(realized_residual.gains(r)),
        lambda r: _what(realized_residual.gains(r), "reading"), least=0.02
    ),
    Claim(
        "One λ_KL serves all requests", "the optima of low and high γ differ under MEMIT, and agree under MetaKE",
        "Paper Fig. 5, §6.3", ("kl_strength",), 2000, "octaves", _kl, _optima
    ),
    Claim(
        "It keeps the general ability", "less than 5 points lost, above MEMIT, PRUNE and RECT", "Paper Fig. 6, §6.5",
        ("general_ability",), 3000, "points", general_ability.judge, _ability
    ),
    Claim(
        "It shifts hidden states less", "by more than 5 % of AlphaEdit's shift", "Paper Fig. 7, §6.6",
        ("states_by_reading", "hidden_states"), 1000, "times AlphaEdit's",
        lambda r: hidden_states.judge(hidden_states.ratios(r)), _states, 1.0, 0.06
    ),
    Claim(
        "It stays ahead along streams", "mean of three scores above each of four methods", "Paper Fig. 9, App. E",
        ("streams",), 5000, "points", lambda r: streams.judge(streams.differences(r)), _streams
    ),
    Claim(
        "Its continuations name the new object", "more often than each of four methods'", "App. D.6", ("case_study",),
        0, "% of continuations", lambda r: case_study.judge(case_study.summarize(r)), _written, math.nan
    ),
)  # fmt: skip


def recordings(claim: Claim, model: str) -> list[pd.DataFrame]:
    """The claim's recordings that there are, in its order."""
    found = (report.recorded_or(f"{name}-{model}", pd.DataFrame()) for name in claim.recordings)
    return [one for one in found if one.attrs["label"] == "recorded"]


def size_of(records: pd.DataFrame) -> tuple[int, float]:
    """How many edits one sequence of the records has, and how many parameters the model."""
    told = records.attrs.get("provenance") or records.attrs["runs"][0]["config"]
    edits, model = told.get("edits") or records.id.nunique(), told["model"]
    return int(edits), PARAMETERS.get(model) or sum(p.numel() for p in load(model).model.parameters())


def tested(claim: Claim, edits: int, parameters: float) -> bool:
    """Whether records of this size test the claim: a tenth of the paper's edits, a twentieth of its smallest model."""
    return not claim.edits or (edits * FEWER >= claim.edits and parameters * SMALLER >= SMALLEST)


class Asked(NamedTuple):
    """What one reading does about one claim."""

    claim: Claim
    reading: str
    verdict: str  # a word of `WORDS`, or `FAR`
    shown: pd.DataFrame
    edits: int


def asked(model: str, records: pd.DataFrame | None = None) -> Iterator[Asked]:
    """Every claim of every reading: by these records of `comparison`, those that they can answer; without, by what is
    recorded of the model."""
    for claim in CLAIMS:
        if records is not None and claim.recordings[0] != HELD_OUT[0]:
            continue
        sources = recordings(claim, model) if records is None else [records]
        for reading in READINGS:
            if (own := _of_reading(claim, sources, reading)) is not None:
                edits, parameters = size_of(own)
                verdict = WORDS[claim.judge(own)["holds"]] if tested(claim, edits, parameters) else FAR
                yield Asked(claim, reading, verdict, claim.shown(own), edits)


def _of_reading(claim: Claim, sources: Sequence[pd.DataFrame], reading: str) -> pd.DataFrame | None:
    """The first of these records that can answer a claim about a reading."""
    found = (as_metake(one, reading) for one in sources)
    return next((own for own in found if own is not None and (claim.shown is not falls or "outer_after" in own)), None)


def by_reading(title: str, records: pd.DataFrame) -> pd.DataFrame:
    """What the page of a claim says of each reading of MetaKE that its records have: reading, verdict, decided by."""
    claim, rows = next(claim for claim in CLAIMS if claim.title == title), []
    for reading in READINGS:
        if (own := as_metake(records, reading)) is not None:
            found = claim.judge(own)
            said = {"verdict": WORDS[found["holds"]], "decided by": found["decided_by"]}
            rows.append({"reading": NAMES[reading]} | said)
    return comparison.labelled(pd.DataFrame(rows), records)


def table(model: str, records: pd.DataFrame | None = None) -> pd.DataFrame:
    """A line a claim: what the paper says, and the verdict on each reading; – where it is not recorded."""
    rows: dict[str, dict[str, str]] = {}
    for one in asked(model, records):
        row = rows.setdefault(
            one.claim.title,
            {"claim": f"{one.claim.title}: {one.claim.said}", "in the paper": one.claim.place}
            | dict.fromkeys(NAMES.values(), "–") | {"edits": _edits(one)},
        )
        row[NAMES[one.reading]] = one.verdict
        row["edits"] = max(row["edits"], _edits(one), key=lambda text: int(text.split()[0].replace(",", "")))
    return _stamped(pd.DataFrame(list(rows.values())), model, records)


def _edits(one: Asked) -> str:
    return f"{one.edits:,} of {one.claim.edits:,}" if one.claim.edits else f"{one.edits:,}"


def numbers(model: str, records: pd.DataFrame | None = None) -> pd.DataFrame:
    """The numbers behind `table`, a row a claim, reading and comparison: claim, unit, bound, least, method, what,
    difference, low, high, verdict."""
    rows = [
        {
            "claim": one.claim.title, "unit": one.claim.unit, "bound": one.claim.bound, "least": one.claim.least,
            "method": one.reading, "what": row.what, "difference": row.difference, "low": row.low, "high": row.high,
            "verdict": one.verdict,
        }
        for one in asked(model, records)
        for row in one.shown.itertuples()
    ]
    return _stamped(pd.DataFrame(rows), model, records)


def _stamped(frame: pd.DataFrame, model: str, records: pd.DataFrame | None) -> pd.DataFrame:
    """The frame with its label: recomputed from these records, or taken from several recordings of the model."""
    if records is None:
        frame.attrs |= {"label": "recorded", "provenance": {"model": model}}
        return frame
    return comparison.labelled(frame, records)


def judge(records: pd.DataFrame, reading: str) -> dict[str, Any]:
    """Does a reading of MetaKE do what it says, and edit better than AlphaEdit? Holds if it lowers its own loss and
    edits better, does not hold if it fails in one of the two; inconclusive otherwise, and where the records are not
    of the paper's scale, or have no such reading."""
    own = as_metake(records, reading)
    if own is None or "outer_after" not in own:
        return undecided(f"{NAMES[reading]}: not recorded").verdict("no records of it")
    better = comparison.paired_differences(own)
    decisions = [descends(own), comparison.decide(better)]
    told = "; ".join((_falls(own)["decided_by"], comparison.judge(better)["decided_by"]))
    edits, parameters = size_of(records)
    if not tested(CLAIMS[1], edits, parameters):
        return undecided(f"{FAR}: {edits} edits, {parameters / 1e6:.0f} million parameters").verdict(told)
    return all_of(decisions).quiet().verdict(told)
