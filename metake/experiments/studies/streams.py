"""MetaKE v3 Figure 9 (App. D.3): metrics against the number of edits, along one stream whose edits accumulate."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from metake import methods as known
from metake.algebra.geometry import KeyStatistics
from metake.data.requests import EditCase
from metake.editing.editor import Editor
from metake.editing.state import EditorState
from metake.editing.statistics import statistics
from metake.experiments.cases import read_cases
from metake.experiments.decision import all_of, interval, undecided
from metake.experiments.runs import edit_sequence
from metake.experiments.studies.revisions import plan
from metake.language.model import LanguageModel, load
from metake.report.studies.comparison import signed
from metake.report.style import style
from metake.scoring.evaluation import NAMES, CaseScore, evaluate
from metake.support.errors import ParameterError, ProvenanceError
from metake.support.storage import remove, write_file

METRICS = ("efficacy", "generalization", "specificity")
IN_FORCE, FIRST, LATEST = GROUPS = ("in force", "first batch", "latest batch")
NAMED = ("memit", "alphaedit", "blue", "sphere")  # whom the paper compares MetaKE with
POINTS = 10  # of a curve
BESIDE = ("alphaedit", "metake")  # of the closed forms, whom the gradient family is drawn beside


def closed_forms(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of methods that plan, and of the unedited model."""
    return _of(records, [m for m in records.method.unique() if m not in known.GRADIENT])


def gradient_family(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of the gradient family, of two methods that plan, and of the unedited model."""
    return _of(records, ["pre-edit", *BESIDE, *known.GRADIENT])


def _of(records: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    found = records[records.method.isin(methods)]
    found.attrs = dict(records.attrs)
    return found


def streams(
    model: str = "tiny",
    methods: Sequence[str] = ("memit", "alphaedit", "metake"),
    edits: int = 60,
    batch: int = 20,
    every: int = 20,
    data: str = "facts",
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    sample: int = 100,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """One stream of `edits` per method, in batches, evaluated after every `every` edits.

    At each point: "in force", at most `sample` of the facts edited so far, asked for their newest target, drawn by
    `seed` and the same for every method; "first batch" (retention) and "latest batch" (recency).
    Method "pre-edit", edits 0, is the unedited model on the last point's cases. Methods that do something at the end
    (PRUNE) do it for the evaluation only.
    out: folder in which every evaluated point is kept, and not evaluated again; None: a temporary one.

    Returns one row per method, point, group and fact: method, edits, group, id, metrics as shares.
    Raises ParameterError if `every` is no multiple of `batch`, or `out` holds points of other settings.
    """
    if min(edits, batch, every, sample) < 1 or every % batch:
        raise ParameterError(
            f"every must be a positive multiple of batch, edits and sample at least 1; found every {every}, "
            f"batch {batch}, edits {edits}, sample {sample}"
        )
    lm, cases = load(model), read_cases(data)
    stream = plan(lm, cases, edits, batch, seed)
    settings = {
        "edits": edits, "batch": batch, "every": every, "seed": seed, "sample": sample,
        "distinct": len({c.request.text for c in stream})
    }
    origin = {"dataset": f"{Path(data).name} sha256:{cases.digest[:16]}", "stream_digest": stream.digest}
    told = {"model": model, "text": Path(text).name, "text_tokens": text_tokens} | settings | origin
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(
            along(
                lm, methods, stream, text, Path(out or scratch), told,
                lambda done: _measure(lm, stream[: done or edits], batch, sample, seed)
            )
        )
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = settings | origin
    return frame


def along(
    lm: LanguageModel, methods: Sequence[str], stream: Sequence[EditCase], text: str, folder: Path,
    told: Mapping[str, Any], measure: Callable[[int], list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """`measure(edits made)` before editing ("pre-edit", 0) and along every method's stream: its rows, with both.

    told: all that a point depends on, of it model, edits, batch, every, seed and text_tokens are read here; folder:
    every point is kept there, and not measured again; while points are missing also the edits of every batch, and not
    made again. Raises ParameterError if it holds points of other settings.
    """
    for method in ("pre-edit", *methods):
        points = Points(folder / method.replace("/", "-"), {"method": method} | told)
        if method == "pre-edit":
            points.add(0, lambda: measure(0))
        elif missing := [
            n
            for n in sorted({*range(told["every"], told["edits"] + 1, told["every"]), told["edits"]})
            if not points.has(n)
        ]:
            editor = known.method(method, told["model"], seed=told["seed"])
            given = statistics(lm, text, layers=editor.layers, tokens=told["text_tokens"])
            made = points.folder / "batches"
            for done in visit(lm, editor, stream, given, told["batch"], missing, made):
                points.add(done, lambda done=done: measure(done))
            remove(made)
        yield from ({"method": method, "edits": at} | row for at, found in points.all() for row in found)


def visit(
    lm: LanguageModel, editor: Editor, stream: Sequence[EditCase], given: Mapping[int, KeyStatistics], batch: int,
    wanted: Sequence[int], folder: Path | None = None
) -> Iterator[int]:
    """Edit a stream in batches, and yield each wanted number of edits, the model being as if the stream ended there.

    folder: where every batch's edit is kept, see `edit_sequence`. `lm` is restored, bit for bit, when the iteration
    ends.
    """
    requests = [c.request for c in stream]
    with lm.scratch(editor.paths(lm)):
        for number, (_, state) in enumerate(edit_sequence(lm, editor, requests, given, batch, folder), 1):
            if (done := min(number * batch, len(stream))) in wanted:
                with _finished(lm, editor, state):
                    yield done


@contextlib.contextmanager
def _finished(lm: LanguageModel, editor: Editor, state: EditorState) -> Iterator[None]:
    """The model as if the stream ended here; on exit it is as before, bit for bit."""
    last = editor.finish(lm, state)
    with last.applied(lm) if last else contextlib.nullcontext():
        yield


def _measure(lm: LanguageModel, done: Sequence[EditCase], batch: int, sample: int, seed: int) -> list[dict[str, Any]]:
    """Rows of one point. A fact keeps its place in the draw: consecutive points ask the same facts where possible."""
    force, names = {c.request.text: c for c in done}, {c.request.text: c.request.id for c in reversed(done)}
    drawn = sorted(force.values(), key=lambda c: random.Random(f"{seed}/{c.request.text}").random())[:sample]
    groups = dict(zip(GROUPS, (drawn, done[:batch], done[(len(done) - 1) // batch * batch :]), strict=True))
    asked = list({c.request.text: c for group in groups.values() for c in group}.values())
    scores = {c.request.id: _scores(c, found) for c, found in zip(asked, evaluate(lm, asked).cases, strict=True)}
    return [
        {"group": name, "id": names[c.request.text]} | scores[c.request.id]
        for name, group in groups.items()
        for c in group
    ]


def _scores(case: EditCase, found: CaseScore) -> dict[str, float | None]:
    """The family's metrics of one case; but of several rivals of a prompt the target must beat all.

    A mean over rivals would credit an unedited model: it ranks one counterfactual object above another half of the
    time.
    """
    probes = [p for p in case.probes if p.kind in NAMES]
    outcomes: dict[str, dict[Any, float]] = {name: {} for name in METRICS}
    for place, (probe, scored) in enumerate(zip(probes, found.probes, strict=True)):
        prompts = outcomes.setdefault(NAMES[probe.kind], {})
        key = place if probe.kind == "neighborhood" else probe.prompt
        prompts[key] = min(scored.score, prompts.get(key, 1.0))
    return {name: round(fmean(prompts.values()), 4) if prompts else None for name, prompts in outcomes.items()}


class Points:
    """The evaluated points of one method on disk: a file each, and the settings that they belong to."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, file = folder, folder / "settings.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if changed := sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k)):
                raise ParameterError(
                    f"{folder} holds points of a stream with another {', '.join(changed)}; choose another "
                    "folder, or repeat that stream's settings to go on"
                )
        else:
            write_file(file, json.dumps(settings, indent=1, sort_keys=True) + "\n")

    def _file(self, edits: int) -> Path:
        return self.folder / f"{edits:06d}.json"

    def has(self, edits: int) -> bool:
        return self._file(edits).is_file()

    def add(self, edits: int, measure: Callable[[], list[dict[str, Any]]]) -> None:
        if not self.has(edits):
            write_file(self._file(edits), json.dumps(measure(), ensure_ascii=False))

    def all(self) -> list[tuple[int, list[dict[str, Any]]]]:
        found = []
        for file in sorted(self.folder.glob("[0-9]*.json")):
            try:
                found.append((int(file.stem), json.loads(file.read_text(encoding="utf-8"))))
            except ValueError as error:
                raise ProvenanceError(f"{file} is damaged ({error}); remove it to compute it again") from error
        return found


def _matrix(records: pd.DataFrame, group: str, metric: str) -> dict[str, np.ndarray]:
    """Per method: facts × points, NaN where a fact was not asked; facts and points in the same order for all."""
    own = records[(records.group == group) & (records.edits > 0)]
    wide = own.pivot(index=["method", "id"], columns="edits", values=metric).astype(float)
    facts = own.id.unique()
    return {method: wide.loc[method].reindex(facts).to_numpy() for method in own.method.unique()}


def _curves(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Percent at each point for each row of `counts`, how often a fact is drawn: draws × points."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return 100 * (counts @ np.nan_to_num(values)) / (counts @ there)


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per method: each metric in force, mean over all points and at the last one; efficacy of the first batch
    and of the latest at the end."""
    end = records.edits.max()
    rows = []
    for method in records.method.unique():
        row, own = {"method": method}, records[records.method == method]
        for metric in METRICS:
            curve = 100 * own[own.group == IN_FORCE].groupby("edits")[metric].mean()
            row |= {f"{metric}, mean": curve.mean(), f"{metric}, end": curve.iloc[-1]}
        last = own[own.edits == (end if method != "pre-edit" else 0)]
        rows.append(
            row | {f"efficacy, {group}": 100 * last[last.group == group].efficacy.mean() for group in (FIRST, LATEST)}
        )
    frame = pd.DataFrame(rows)
    frame.attrs = dict(records.attrs)
    return frame


def differences(
    records: pd.DataFrame, one: str = "metake", rivals: Sequence[str] = NAMED, draws: int = 4000, seed: int = 0
) -> pd.DataFrame:
    """`one` minus each rival in points, on the facts in force: level, the mean over all points; slope, per 100 edits,
    by least squares.

    Metric "all three" is their mean. Intervals by bootstrap over facts, drawn alike for both methods, at all points;
    95 % for all rivals jointly (Bonferroni). Raises ParameterError if `one` or every rival is missing, or there is one
    point only.
    """
    points = sorted(records.edits[records.edits > 0].unique())
    rivals = [r for r in rivals if r in set(records.method) and r != one]
    if one not in set(records.method) or not rivals or len(points) < 2:
        raise ParameterError(
            f"differences need {one!r}, a method to compare it with, and two points; found methods "
            f"{', '.join(records.method.unique())} and points {points}"
        )
    curves: dict[str, list[np.ndarray]] = defaultdict(list)
    for metric in METRICS:
        values = _matrix(records, IN_FORCE, metric)
        facts = len(next(iter(values.values())))
        drawn = np.random.default_rng(seed).multinomial(facts, np.full(facts, 1 / facts), size=draws)
        for method in (one, *rivals):
            curves[method].append(_curves(values[method], np.vstack([np.ones(facts), drawn])))
    tail, rows = 2.5 / len(rivals), []
    for rival in rivals:
        gaps = [a - b for a, b in zip(curves[one], curves[rival], strict=True)]
        for metric, gap in zip((*METRICS, "all three"), (*gaps, np.mean(gaps, 0)), strict=True):
            slopes = np.polyfit(np.array(points) / 100, gap.T, 1)[0]
            for quantity, found in (("level", gap.mean(1)), ("slope", slopes)):
                low, high = np.nanpercentile(found[1:], [tail, 100 - tail])
                rows.append(
                    {
                        "method": rival, "quantity": quantity, "metric": metric, "difference": found[0], "low": low,
                        "high": high
                    }
                )
    frame = pd.DataFrame(rows)
    frame.attrs = dict(records.attrs)
    return frame


def judge(differences: pd.DataFrame) -> dict[str, Any]:
    """The paper's claim, stronger performance across edit counts and metrics than every method that it names:
    holds if the level over all three metrics lies above each one's, interval and all; does not hold if it lies below
    one's; else, or if one of them was not run, inconclusive."""
    own = differences[(differences.quantity == "level") & (differences.metric == "all three")]
    absent = [f"{style(m).name} was not run" for m in NAMED if m not in set(own.method)]
    exact = own.round(9).itertuples()  # equal curves are equal
    ahead = [interval(r.method, r.difference, r.low, r.high) for r in exact]
    parts = [
        f"{style(r.method).name} {signed(r.difference)} [{signed(r.low)}, {signed(r.high)}]" for r in own.itertuples()
    ]
    return all_of(ahead + [undecided(why) for why in absent]).quiet().verdict(
        "mean of efficacy, generalization and specificity over all edit counts, MetaKE minus the other, in points: "
        + "; ".join(parts + absent)
    )
