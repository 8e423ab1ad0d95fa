"""The gradient family beside AlphaEdit and MetaKE: one edit at a time, a batch, and a sequence (rows of v3 Table 1)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metake import methods
from metake.data.requests import Cases
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.state import EditorState
from metake.editing.statistics import statistics
from metake.experiments.cases import for_training, part_of, read_cases, select
from metake.experiments.decision import all_of
from metake.experiments.kept import kept
from metake.experiments.studies import comparison
from metake.experiments.studies.frontier import SCORES, Variant, scores
from metake.experiments.studies.study import FORMATS, circumstances
from metake.language.model import LanguageModel, load
from metake.report import style
from metake.report.files import parts_of
from metake.scoring.evaluation import evaluate

FAMILY = tuple(methods.GRADIENT)
COMPARED = (*FAMILY, "alphaedit", "metake", "metake/whole")
ALONE, BATCH, SEQUENCE = PROTOCOLS = ("one at a time", "one batch", "sequence")
ENDS = {"first": slice(10), "last": slice(-10, None)}  # of a training, its steps
RIVALS = ("mend", "malmen")  # of the family, whom the paper's Table 1 has


def trained_editors(
    model: str = "tiny",
    names: Sequence[str] = COMPARED,
    data: Mapping[str, str] | None = None,
    edits: int = 20,
    batches: int = 3,
    alone: int = 6,
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Every method on subjects that no training has seen (part "testing"): `alone` facts one at a time, each on the
    unedited model; a batch of `edits`; and `batches` of them in sequence, all evaluated after the last.

    One row per protocol, data set, method and case, and per data set and case of "pre-edit": as `comparison`, with a
    column "protocol". out: folder of the runs, which are resumable, and of what every fact alone gave.
    """
    shared = {"model": model, "methods": names, "data": dict(data or FORMATS), "seeds": (seed,), "text": text,
              "text_tokens": text_tokens, "part": "testing"}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        one = comparison.comparison(**shared, edits=edits, batch=edits, out=folder / "batch")
        many = comparison.comparison(**shared, edits=edits * batches, batch=edits, out=folder / "sequence")
    single = _alone(load(model), names, shared, alone, seed, out and Path(out) / "alone")
    frame = pd.concat(
        [single.assign(protocol=ALONE), one.assign(protocol=BATCH), many.assign(protocol=SEQUENCE)], ignore_index=True
    )
    told = [trained_as(name, methods.method(name, model)) for name in names if name in methods.TRAINED]
    numbers = {"edits": edits, "batches": batches, "alone": alone}
    frame.attrs = {"runs": many.attrs["runs"], "settings": numbers | ({"trained": told} if told else {})}
    return frame


def _alone(
    lm: LanguageModel, names: Sequence[str], shared: Mapping[str, Any], count: int, seed: int, out: Path | None
) -> pd.DataFrame:
    rows = []
    for dataset, source in shared["data"].items():
        cases = select(lm, part_of(read_cases(source), "testing"), count, seed)
        for name in names:
            editor = methods.method(name, shared["model"], seed=seed)
            given = statistics(lm, shared["text"], layers=editor.layers, tokens=shared["text_tokens"])
            state = editor.init(lm, given)
            for case in cases:
                one = Cases([case], cases.format, cases.source)
                told = (*circumstances(lm, editor, state), one.digest)
                found = kept(out, told, lambda one=one, editor=editor, state=state: _asked(lm, editor, state, one))
                rows += [{"dataset": dataset, "method": name, "seed": seed} | row for row in found]
    return pd.DataFrame(rows)


def _asked(lm: LanguageModel, editor: Editor | GradientEditor, state: EditorState, one: Cases) -> list[dict[str, Any]]:
    """The row of a fact that is edited alone."""
    before = evaluate(lm, one)
    with editor.finished(lm, *editor.step(lm, [case.request for case in one], state)).applied(lm):
        return evaluate(lm, one, before=before).records()


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per protocol, data set and method: means over cases, and the harmonic mean of the three."""
    metrics = list(comparison.METRICS[:3])
    found = 100 * records.groupby(["protocol", "dataset", "method"], sort=False)[metrics].mean()
    found["harmonic mean"] = comparison.harmonic_mean(found)
    return comparison.labelled(found.reset_index(), records)


def of(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The rows of one protocol, with their label."""
    return comparison.labelled(records[records.protocol == protocol].reset_index(drop=True), records)


def in_sequence(records: pd.DataFrame) -> pd.DataFrame:
    """`comparison.summarize` of the sequence."""
    return comparison.summarize(of(records, SEQUENCE))


def collapse(records: pd.DataFrame) -> pd.DataFrame:
    """What a sequence leaves of a method: its scores after it minus those of one batch, in points."""
    shares = summarize(records).set_index(["dataset", "method", "protocol"])[list(comparison.METRICS[:3])]
    change = shares.xs(SEQUENCE, level="protocol") - shares.xs(BATCH, level="protocol")
    change = change.drop("pre-edit", level="method", errors="ignore")
    return comparison.labelled(change.reset_index(), records)


def judge(records: pd.DataFrame) -> dict[str, Any]:
    """The paper's rows: after a sequence MetaKE is above MEND and MALMEN. Holds if against each of them efficacy or
    generalization lies above, interval and all, and neither lies below; does not hold if one lies below."""
    sequence, decisions, told = of(records, SEQUENCE), [], []
    for rival in RIVALS:
        found = comparison.claimed(comparison.paired_differences(sequence, "metake", rival))
        decisions.append(comparison.decide(found))
        parts = ", ".join(
            f"{r.metric} {r.dataset.removesuffix(' format')} {comparison.with_interval(r.difference, r.low, r.high)}"
            for r in found.itertuples()
        )
        told.append(f"{style(rival).name}: {parts}")
    return all_of(decisions).quiet().verdict("MetaKE minus the other after a sequence, in points: " + "; ".join(told))


def live(
    model: str = "tiny", names: Sequence[str] = ("malmen", "smedit"), batches: int = 10, held: int = 20, seed: int = 0,
    data: str = "facts"
) -> pd.DataFrame:
    """Train editors from nothing, here and now: a row per method, stage and fact with the three scores as shares.

    Trained on the half of the subjects that is for choosing, asked `held` facts of the other half, in one batch.
    Stages: "as it begins", networks that are the identity with the moments of one batch; "after {batches} batches".
    """
    lm, rows = load(model), []
    cases, asked = for_training(lm, data), select(lm, part_of(read_cases(data), "testing"), held, seed)
    for name in names:
        rule, modules, training = methods.to_train(name, model, seed=seed)
        for stage, learns, count in (("as it begins", "nothing", 1), (f"after {batches} batches", "network", batches)):
            made = Variant(rule.steps, rule.penalty, learns, count).made(lm, cases, rule, modules, training)
            rows += [{"method": name, "networks": stage} | row for row in scores(lm, made, asked, held)]
    return pd.DataFrame(rows)


def learned(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per method and stage of `live`, with the harmonic mean."""
    table = 100 * records.groupby(["method", "networks"], sort=False)[list(SCORES)].mean()
    table["harmonic mean"] = comparison.harmonic_mean(table)
    return table.reset_index()


def trained_as(name: str, editor: GradientEditor) -> dict[str, Any]:
    """How a trained editor came about: facts, their digest, steps, −log p of the target after the edits, and with the
    weighted penalty the outer loss; both means over requests of its first and last ten steps."""
    told, losses = editor.trained["training"], editor.trained["losses"]
    networks = [network for step in editor.networks for network in step]
    penalty = {"kl": "drift", "norm": "‖Δ‖²"}[editor.rule.penalty]
    own = [one["drift"] if penalty == "drift" else one["norm"] ** 2 / told["edits"] for one in losses]
    target = pd.Series([one["after"] for one in losses])
    outer = target + told["keep"] * pd.Series(own)
    return {
        "method": name, "facts": len(editor.trained["ids"]), "facts a step": told["edits"] * told["accumulate"],
        "steps": len(losses), "penalty": f"{told['keep']:g} × {penalty}",
        **{f"−log p, {end}": float(target[place].mean()) for end, place in ENDS.items()},
        **{f"outer loss, {end}": float(outer[place].mean()) for end, place in ENDS.items()},
        "parameters": sum(p.numel() for n in networks for p in n.parameters()),
        "requests": f"sha256:{editor.trained['requests_digest'][:16]}",
    }  # fmt: skip


def shipped(model: str) -> pd.DataFrame:
    """`trained_as` of the editors that are found for a model."""
    return _trainings([trained_as(name, methods.method(name, model)) for name in methods.TRAINED])


def trainings(records: pd.DataFrame) -> pd.DataFrame:
    """`trained_as` of the editors of a recording, as its provenance tells it."""
    return _trainings([told for part in parts_of(records) for told in part.get("trained", ())])


def _trainings(told: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(told).drop(columns="requests")
