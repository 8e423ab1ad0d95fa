"""Which reading of MetaKE's outer level the library takes, by the paper's own standard.

The rule, fixed before it was applied. On the records for choosing, of every model and format at hand:
(i) a reading's own outer loss must fall for at least 95 % of the requests of each (v3 Theorem 3's conclusion);
(ii) of those the one with the lowest F = L_edit + L_loc of the edited model (eqs 5 and 84; the anchor left out, because
readings scale it differently), measured alike for all, the geometric mean over models and formats;
of readings within 1 % of the lowest the one that departs in fewer places from the words of the equations.
No efficacy, generalization or verdict enters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from metake.experiments.studies import comparison
from metake.experiments.studies.readings import LITERAL, READINGS, departures
from metake.report.files import recorded

DESCENDS, TIE = 0.95, 0.01


def names(records: pd.DataFrame, part: str) -> list[str]:
    """The readings of a part, in the order of `READINGS`."""
    there = set(records.reading[records.part == part])
    return [name for name in READINGS if name in there]


def _of_all(frames: Sequence[pd.DataFrame]) -> list[str]:
    return [name for name in READINGS if all(name in names(frame, "choosing") for frame in frames)]


def _cells(frames: Sequence[pd.DataFrame], name: str) -> list[pd.DataFrame]:
    """A reading's rows for choosing, a frame a model and format."""
    own = [f[(f.part == "choosing") & (f.reading == name) & (f.method == "metake")] for f in frames]
    return [cell for frame in own for _, cell in frame.groupby("dataset", sort=False)]


def _fell(cells: Sequence[pd.DataFrame]) -> float:
    """The lowest share of requests whose own loss fell, of any model and format."""
    return min((cell.outer_after < cell.outer_before).mean() for cell in cells)


def descending(*frames: pd.DataFrame) -> list[str]:
    """The readings that these records leave for a further model to be asked: those of which (i) holds here. All, if
    there are no records yet."""
    return [name for name in _of_all(frames) if not frames or _fell(_cells(frames, name)) >= DESCENDS]


def choice(*frames: pd.DataFrame) -> pd.DataFrame:
    """What the rule sees, a row a reading that all frames hold, the chosen one first.

    fell: the lowest share of requests whose own loss fell, of any model and format, in percent; edited: geometric mean
    of F of the edited model; departs: in so many places from the equations' words; descends: whether (i); chosen.
    """
    rows = []
    for name in _of_all(frames):
        cells = _cells(frames, name)
        fell = _fell(cells)
        edited = float(np.exp(np.mean([np.log(cell.edited.mean()) for cell in cells])))
        rows.append({"reading": name, "fell": 100 * fell, "edited": edited, "departs": departures(name),
            "descends": bool(fell >= DESCENDS)})  # fmt: skip
    table = pd.DataFrame(rows)
    there = table[table.descends]
    near = there[there.edited <= (1 + TIE) * there.edited.min()].sort_values(["departs", "edited"], kind="stable")
    table["chosen"] = table.reading == (near.reading.iloc[0] if len(near) else LITERAL)
    ordered = table.sort_values(["chosen", "descends", "edited"], ascending=[False, False, True], kind="stable")
    return comparison.labelled(ordered.reset_index(drop=True), frames[0])


def of_all(records: pd.DataFrame) -> pd.DataFrame:
    """What the rule sees of a recording and of the embedded model's together."""
    return choice(records, recorded("open_readings-tiny"))


def best(*frames: pd.DataFrame) -> str:
    """The reading that the rule chooses by these records, a frame a model; the literal one if none descends."""
    return str(choice(*frames).reading.iloc[0])
