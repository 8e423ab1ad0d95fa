"""Beyond the paper: what the association γ, read before any edit, says about which edits will fail."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from metake import methods
from metake.data.requests import batches
from metake.editing.diagnosis import diagnose
from metake.editing.keys import KeyReader
from metake.experiments.borrowed import borrowed
from metake.experiments.former import same_statistics, statistics_of
from metake.experiments.studies.comparison import PRIMARY, case_rows, comparison
from metake.experiments.studies.finished import finished
from metake.language.tokens import continuation
from metake.scoring.evaluation import read
from metake.support.errors import ProvenanceError


def gamma_beforehand(
    model: str = "tiny",
    methods_: Sequence[str] = PRIMARY,
    data: dict[str, str] | None = None,
    edits: int = 40,
    batch: int | None = None,
    seeds: Sequence[int] = (0,),
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """`from_run` of every run of a `comparison`, with the data set's name: those already in the folder `out` are read,
    the others made. batch: None for all edits in one."""
    for name in methods_:  # before hours are spent on what cannot be read
        methods.planning(name, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        made = comparison(
            model, list(methods_), data, edits, batch or edits, seeds, text, text_tokens, out=folder
        ).attrs["runs"]
        frame = pd.concat(
            [from_run(folder / run["folder"]).assign(dataset=run["dataset"]) for run in made], ignore_index=True
        )
    frame.attrs["runs"] = made
    return frame[["dataset", *frame.columns.drop("dataset")]]


def from_run(folder: str | Path) -> pd.DataFrame:
    """A finished run, request by request: what could be read before any edit, and what came of it.

    gamma, beta, in_batch, anchor, lower, upper, feasible   see `diagnosis.RequestDiagnosis`; under the run's own
                     metric, on the unedited model, in_batch among the requests of its batch
    target_log_p     mean log-probability of the target's tokens after the prompt, before the edit
    subject_tokens, key_norm   length of the subject; ‖k‖ at the last edited layer
    before           efficacy before the edit; efficacy, generalization: after the last batch

    Raises ProvenanceError if the run was made on another model, data, or key statistics.
    """
    config, lm, cases, edit = finished(folder)
    changes = config.changes | {"contexts": edit.record.context_templates}
    with borrowed(config.model, config.recipe, config.layers):
        editor = methods.planning(config.method, config.model, seed=config.seed, **changes)
    recorded, told = edit.record.statistics_digest.partition("+")[0], (config.text, editor.layers, config.text_tokens)
    given = statistics_of(lm, *told, recorded)
    if not same_statistics(lm, recorded, given.digest, *told):
        raise ProvenanceError(
            f"{folder} was made with other key statistics than {config.text} gives now: repeat the run in another "
            "folder"
        )
    state, requests = editor.init(lm, given), [case.request for case in cases]
    diagnosed = [found for group in batches(requests, config.batch) for found in diagnose(lm, group, editor, state)]
    last = editor.layers[-1]
    norms = KeyReader(lm, requests, editor.contexts, last).read(last).keys.norm(dim=1).tolist()
    readings = read(lm, [(request.text, request.target, request.seam) for request in requests])
    scores = zip(*(case_rows(Path(folder) / name) for name in ("before.jsonl", "cases.jsonl")), strict=True)
    rows = []
    for request, found, norm, reading, (before, after) in zip(
        requests, diagnosed, norms, readings, scores, strict=True
    ):
        told = {"gamma": found.association, "beta": found.attenuation} | {
            name: getattr(found, name) for name in ("in_batch", "anchor", "lower", "upper", "feasible")
        }
        tokens = len(continuation(lm.tokenizer, request.subject))
        simple = {"target_log_p": reading.log_p, "subject_tokens": tokens, "key_norm": norm}
        came = {"before": before["efficacy"], "efficacy": after["efficacy"]}
        came |= {"generalization": after.get("generalization")}
        rows.append({"method": config.method, "seed": config.seed, "id": request.id} | told | simple | came)
    return pd.DataFrame(rows)
