"""Which of three readings of MetaKE a record is of: as its equations are written, as a rule fixed beforehand chose, and
with the look-ahead through the whole edit.
"""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from metake.experiments.studies.comparison import labelled

LITERAL, CHOSEN, WHOLE_EDIT = READINGS = ("metake/literal", "metake", "metake/whole")
NAMES = {LITERAL: "read literally", CHOSEN: "chosen reading", WHOLE_EDIT: "whole look-ahead"}


def as_metake(records: pd.DataFrame, reading: str) -> pd.DataFrame | None:
    """The records with one reading of MetaKE in MetaKE's place, the other readings left out; None if it is not there.

    Recordings made before a reading was chosen call the literal one "metake"; their provenance says so.
    """
    if "reading" in records:
        own = records[records.reading == reading]
        return None if own.empty else labelled(own.assign(reading=CHOSEN), records)
    old = records.attrs.get("provenance", {}).get("metake") == "read literally"
    told = [_reading(m, old) for m in records.method]
    if reading not in {r for r, _ in told}:
        return None
    own = records.assign(method=[base if r is None else CHOSEN + base for r, base in told])
    own = own[[r in (None, reading) for r, _ in told]]
    own.attrs = dict(records.attrs)
    return own


def preferred(there: Iterable[str]) -> str:
    """The reading that a page judges, of those that its records have: the chosen one, or else the first."""
    known = set(there)
    return next((reading for reading in (CHOSEN, *READINGS) if reading in known), CHOSEN)


def _reading(method: str, old: bool) -> tuple[str | None, str]:
    """Of which reading of MetaKE a method is, and what of its name remains: ("metake/whole", "/memit")."""
    for reading in (LITERAL, WHOLE_EDIT, CHOSEN):  # the shortest name last
        if f"{method}/".startswith(f"{reading}/"):
            return LITERAL if old and reading == CHOSEN else reading, method.removeprefix(reading)
    return None, method
