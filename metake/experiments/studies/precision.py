"""One sequence of edits in three precisions: what 16-bit weights lose of it, and what float32 copies keep."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.editing.statistics import statistics
from metake.experiments.cases import read_cases, select
from metake.experiments.kept import kept
from metake.experiments.runs import edit_sequence
from metake.experiments.studies.comparison import labelled
from metake.language.model import MASTERED, LanguageModel, load
from metake.scoring.evaluation import evaluate

DTYPES = ("float32", "bfloat16", MASTERED)
SCORES = ("efficacy", "generalization", "specificity")
NAMES = {MASTERED: "bfloat16, summed in float32"}


def precision(
    model: str = "tiny", dtypes: Sequence[str] = DTYPES, method: str = "alphaedit", edits: int = 12, batch: int = 3,
    data: str = "facts", seed: int = 0, text: str = "embedded", text_tokens: int | None = None,
    out: str | Path | None = None
) -> pd.DataFrame:
    """A method's sequence on the same requests in each dtype, one row per dtype and case: id, the three scores, and of
    the sequence, ΣΔ being what its edits ask for and W the weights that the model computes with:

    norm      ‖ΣΔ‖ over the edited matrices
    lost      ‖W_after − W_before − ΣΔ‖ / ‖ΣΔ‖, percent: what rounding the weights took or added
    restored  whether every weight was bit for bit what it was, once all edits were taken back

    out: a folder that keeps what is finished. Cost: an editing run per dtype.
    """
    rows = []
    for dtype in dtypes:
        told = ("precision", model, dtype, method, edits, batch, read_cases(data).digest, seed, text, text_tokens)
        make = partial(_sequence, model, dtype, method, edits, batch, data, seed, text, text_tokens)
        rows += kept(out, told, make)
    frame = pd.DataFrame(rows)
    digest = read_cases(data).digest[:16]
    frame.attrs["settings"] = {
        "edits": edits, "batch": batch, "seeds": [seed], "dataset": f"{Path(data).name} sha256:{digest}"
    }
    return frame


def _sequence(
    model: str, dtype: str, method: str, edits: int, batch: int, data: str, seed: int, text: str, tokens: int | None
) -> list[dict[str, Any]]:
    lm, editor = load(model, dtype), methods.method(method, model)
    cases = select(lm, read_cases(data), edits, seed)
    given = statistics(lm, text, layers=editor.layers, tokens=tokens)
    before, start = _whole(lm), _computing(lm, paths := editor.paths(lm))
    asked = {path: torch.zeros_like(weight) for path, weight in start.items()}
    unedited = evaluate(lm, cases)
    with lm.scratch(paths):
        for edit, _ in edit_sequence(lm, editor, [case.request for case in cases], given, batch):
            for update in edit.updates:
                asked[update.module] += update.delta
        after, scores = _computing(lm, paths), evaluate(lm, cases, before=unedited)
    norm = _norm(asked.values())
    lost = 100 * _norm(after[p] - start[p] - asked[p] for p in paths) / norm
    restored = all(torch.equal(was, now) for was, now in zip(before, _whole(lm), strict=True))
    told = {"dtype": dtype, "norm": norm, "lost": lost, "restored": restored}
    return [told | {name: row[name] for name in ("id", *SCORES)} for row in scores.records()]


def _computing(lm: LanguageModel, paths: Sequence[str]) -> dict[str, Tensor]:
    """(d_out, d_in) of each matrix as the model computes with it, in float64."""
    return {path: lm.weight(path).to(lm.dtype).double() for path in paths}


def _whole(lm: LanguageModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in lm.model.parameters()]


def _norm(parts: Any) -> float:
    return sum(part.square().sum().item() for part in parts) ** 0.5


def table(records: pd.DataFrame) -> pd.DataFrame:
    """One row per precision: percent of each score, and what became of the sequence's ΣΔ."""
    scores = 100 * records.groupby("dtype", sort=False)[list(SCORES)].mean()
    whole = records.groupby("dtype", sort=False)[["norm", "lost", "restored"]].first()
    whole["lost"] = whole.lost.round(3)
    whole["restored"] = whole.restored.map({True: "bit for bit", False: "no"})
    found = scores.join(whole).rename(index=NAMES).rename_axis("precision").reset_index()
    named = {"norm": "‖ΣΔ‖", "lost": "rounded, %", "restored": "taken back"}
    return labelled(found.rename(columns=named), records)
