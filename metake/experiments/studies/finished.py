"""Runs that are done, taken up again: their model and cases, and all their edits as one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from metake.algebra.update import Edit, total
from metake.data.requests import Cases
from metake.experiments.runs import RunConfig, cases_of, open_run
from metake.language.model import LanguageModel, load
from metake.support.errors import ProvenanceError


class Finished(NamedTuple):
    """What a run's folder gives; the model is unedited."""

    config: RunConfig
    lm: LanguageModel
    cases: Cases  # in the order of the edits
    edit: Edit  # all batches, and what the method does at the end


def finished(folder: str | Path, lm: LanguageModel | None = None) -> Finished:
    """A run from its folder. lm: its model, if it is at hand; else it is loaded.

    Raises ProvenanceError if the run has stopped before its end, or was made on other data or another model.
    """
    config, edits = open_run(folder)
    lm = lm or load(config.model, config.dtype)
    cases = cases_of(config, lm)
    done = [i for e in edits for i in e.record.requests]
    if done != [r.id for c in cases for r in c.requests]:
        raise ProvenanceError(
            f"{folder} holds {len(done)} edits, not those of the {len(cases)} cases that {config.data} gives "
            "now: go on with that run, or repeat it"
        )
    edit = total(edits)
    edit.check_base(lm)
    return Finished(config, lm, cases, edit)
