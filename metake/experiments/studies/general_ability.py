"""MetaKE v3 Figure 6 (§6.5, App. C.4): six tasks of general ability before editing, and along a stream of edits."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metake.experiments.cases import read_cases
from metake.experiments.decision import all_of, any_of, for_and_against, interval, opposite, undecided
from metake.experiments.studies.answers import LENGTH, answer
from metake.experiments.studies.comparison import labelled
from metake.experiments.studies.items import MEASURES, asked, measures, read_items
from metake.experiments.studies.revisions import plan
from metake.experiments.studies.streams import along
from metake.language.model import LanguageModel, load
from metake.report.studies.comparison import signed
from metake.report.style import style
from metake.scoring.tasks import INVALID, READINGS, TASKS, Task, task
from metake.support.errors import ParameterError, near_misses

KINDS = {"generated": "what the model writes", "probable": "the more probable of the answers to choose from"}
HARMED = ("memit", "prune", "rect")  # whom the paper sees collapse
STABLE = ("alphaedit", "blue", "sphere")  # and whom it finds "considerably more stable"
FLAT = 5.0  # points: a smaller loss is "nearly flat"
PRE = "pre-edit"


def general_ability(
    model: str = "tiny",
    methods: Sequence[str] = ("memit", "alphaedit", "metake"),
    edits: int = 60,
    batch: int = 20,
    every: int = 60,
    tasks: str = "facts",
    names: Sequence[str] = tuple(TASKS),
    tests: int = 100,
    reading: str = "corrected",
    data: str = "facts",
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """`tests` items of every task, asked before editing and after every `every` edits of one stream per method.

    tasks: see `items.read_items`; names: which of them; reading: "corrected" or "parity", see `metake.scoring.tasks`;
    data, seed: of the stream (`revisions.plan`); out: folder in which every point is kept, and not asked again; None:
    a temporary one.

    Returns one row per method, point, task and item: method, edits, task, item, label, and two predictions: generated,
    the class that five greedy tokens name, or −1 (invalid), and probable, the class whose answer has the highest mean
    log-probability (the last of them where they tie). Method "pre-edit" at 0 edits is the unedited model.
    Raises ParameterError for unknown names, too few items, or if `out` holds points of other settings.
    Cost: one forward over each item per point, beside the editing.
    """
    _check(reading, edits, batch, every, tests)
    wanted, lm = [task(name) for name in names], load(model)
    stream = plan(lm, read_cases(data), edits, batch, seed)
    questions = _questions(wanted, tasks, tests, reading, [c.request.subject for c in stream])
    source = f"{Path(tasks).name} sha256:{_digest(questions, reading)[:16]}"
    settings = {
        "edits": edits, "batch": batch, "every": every, "seed": seed, "tests": tests, "reading": reading,
        "tasks": source
    }
    told = {
        "model": model, "text": Path(text).name, "text_tokens": text_tokens, "asked": [t.file for t in wanted],
        "stream_digest": stream.digest
    } | settings
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(
            along(lm, methods, stream, text, Path(out or scratch), told, lambda _: _ask(lm, questions, reading))
        )
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = settings
    return frame


Question = tuple[Task, dict[str, Any]]


def _check(reading: str, edits: int, batch: int, every: int, tests: int) -> None:
    if reading not in READINGS:
        raise ParameterError(near_misses(reading, READINGS, "reading"))
    if min(edits, batch, every, tests) < 1 or every % batch:
        raise ParameterError(
            f"every must be a positive multiple of batch, edits and tests at least 1; found every {every}, "
            f"batch {batch}, edits {edits}, tests {tests}"
        )


def _questions(wanted: Sequence[Task], source: str, tests: int, reading: str, edited: Sequence[str]) -> list[Question]:
    return [(t, item) for t in wanted for item in asked(read_items(source, t.file), t, tests, reading, edited)]


def _digest(questions: Sequence[Question], reading: str) -> str:
    return hashlib.sha256(
        repr([(t.prompt(item, reading), t.label(item, reading)) for t, item in questions]).encode()
    ).hexdigest()


def _ask(lm: LanguageModel, questions: Sequence[Question], reading: str) -> list[dict[str, Any]]:
    """One row per item, as the model answers now."""
    prompts = [t.prompt(item, reading) for t, item in questions]
    answers = answer(lm, [(prompt, t.classes) for prompt, (t, _) in zip(prompts, questions, strict=True)], LENGTH)
    rows, counts = [], defaultdict(int)
    for prompt, (t, item), found in zip(prompts, questions, answers, strict=True):
        read = {"generated": t.read(prompt, found.text, reading), "probable": _most_probable(found.log_p)}
        rows.append({"task": t.file, "item": counts[t.file], "label": t.label(item, reading)} | read)
        counts[t.file] += 1
    return rows


def _most_probable(log_p: Sequence[float]) -> int:
    """The class with the highest value; of two that tie the harness takes 0, of four none."""
    best = [i for i, value in enumerate(log_p) if value == max(log_p)]
    return best[0] if len(best) == 1 or len(log_p) == 2 else INVALID


def scores(records: pd.DataFrame) -> pd.DataFrame:
    """Per method, point, task and kind of prediction: correct, incorrect, invalid; accuracy, F1, MCC in percent."""
    rows = []
    for (method, edits, name), own in records.groupby(["method", "edits", "task"], sort=False):
        for kind in KINDS:
            right, invalid = int((own[kind] == own.label).sum()), int((own[kind] == INVALID).sum())
            counts = {"items": len(own), "correct": right, "incorrect": len(own) - right - invalid, "invalid": invalid}
            found = measures(own.label.to_list(), own[kind].to_list(), len(TASKS[name].classes))
            rows.append(
                {"method": method, "edits": edits, "task": name, "kind": kind}
                | counts
                | {m: found[m][0] for m in MEASURES}
            )
    return labelled(pd.DataFrame(rows), records)


def paper_scores(records: pd.DataFrame, kind: str = "generated") -> pd.DataFrame:
    """One value per method, point and task, "score": the metric that the paper names for the task, in percent.

    title: task and metric; guess: what guessing among the classes scores, if they are equally frequent; invalid:
    answers that name no class, in percent.
    """
    rows = []
    for row in scores(records).query("kind == @kind").to_dict("records"):
        which = TASKS[row["task"]]
        told = {
            "title": f"{title(which.file, records)}, {which.paper}", "score": row[which.paper],
            "guess": 0.0 if which.paper == "MCC" else 100 / len(which.classes)
        }
        rows.append(
            {k: row[k] for k in ("method", "edits", "task")} | told | {"invalid": 100 * row["invalid"] / row["items"]}
        )
    return labelled(pd.DataFrame(rows), records)


def title(name: str, records: pd.DataFrame) -> str:
    """What a task is called: a benchmark's own name only where its own items were asked."""
    told = records.attrs.get("settings") or records.attrs.get("provenance") or {}
    return f"{TASKS[name].name}-like (toy)" if str(told.get("tasks")).startswith("facts") else TASKS[name].name


def table(records: pd.DataFrame, kind: str = "generated") -> pd.DataFrame:
    """Percent per method at the last point: every task's score, their mean, and the answers that name no class."""
    found = paper_scores(records, kind)
    last = found[found.edits == found.groupby("method").edits.transform("max")]
    wide = last.pivot(index="method", columns="title", values="score")[list(dict.fromkeys(last.title))]
    wide = wide.assign(mean=wide.mean(axis=1), invalid=last.groupby("method").invalid.mean())
    return labelled(wide.loc[list(dict.fromkeys(last.method))].rename_axis(columns=None).reset_index(), records)


def able(records: pd.DataFrame, kind: str = "generated", level: float = 0.05) -> list[str]:
    """The tasks at which the unedited model beats the most frequent answer (exact one-sided binomial test).

    Nothing can be forgotten in the others: a model at chance stays there.
    """
    before = records[records.method == PRE]
    chance = before.groupby("task", sort=False).label.agg(lambda labels: labels.value_counts(normalize=True).max())
    hits = (before[kind] == before.label).groupby(before.task, sort=False).agg(["sum", "size"])
    return [name for name in hits.index if _tail(int(hits["sum"][name]), int(hits["size"][name]), chance[name]) < level]


def _tail(hits: int, items: int, chance: float) -> float:
    """Probability of so many hits or more by chance."""
    return math.fsum(math.comb(items, k) * chance**k * (1 - chance) ** (items - k) for k in range(hits, items + 1))


def _drawn(
    records: pd.DataFrame, kind: str, names: Sequence[str], draws: int, seed: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Per method and point the mean score over tasks: of the items themselves, then of `draws` bootstrap samples.

    Items are drawn within each task, alike for all methods and points.
    """
    generator, drawn = np.random.default_rng(seed), {}
    for name in names:
        items = records[records.task == name].item.nunique()
        drawn[name] = np.vstack([np.ones(items), generator.multinomial(items, np.full(items, 1 / items), size=draws)])
    for (method, edits), own in records[records.task.isin(names)].groupby(["method", "edits"], sort=False):
        found = []
        for name in names:
            one = own[own.task == name].sort_values("item")
            found.append(
                measures(one.label.to_list(), one[kind].to_list(), len(TASKS[name].classes), drawn[name])[
                    TASKS[name].paper
                ]
            )
        yield method, int(edits), np.mean(found, 0)


def changes(
    records: pd.DataFrame, kind: str | None = None, names: Sequence[str] | None = None, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """What editing does to the mean score over tasks, in points, with 95 % intervals by bootstrap over items.

    change: at the last point, minus before editing, with low and high. difference: MetaKE minus the method, means over
    all points after editing began; its interval is for all methods jointly (Bonferroni). kind:
    of predictions, default `readable`; names:
    of the tasks, default those that the unedited model can do (`able`). Raises ParameterError if there is none, or
    MetaKE is missing.
    """
    kind = kind or readable(records)
    names = able(records, kind) if names is None else list(names)
    if not names:
        raise ParameterError(
            "the unedited model is above chance in none of these tasks: nothing can be forgotten; name the "
            "tasks to look at them all the same"
        )
    curves: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for method, edits, values in _drawn(records, kind, names, draws, seed):
        curves[method][edits] = values
    start = curves.pop(PRE)[0]
    if "metake" not in curves:
        raise ParameterError(f"these records have no 'metake' to compare with; found {', '.join(curves)}")
    level = {method: np.mean(list(points.values()), 0) for method, points in curves.items()}
    tail, rows = 2.5 / max(1, len(curves) - 1), []
    for method, points in curves.items():
        change, gap = points[max(points)] - start, level["metake"] - level[method]
        low, high = np.percentile(change[1:], [2.5, 97.5])
        row = {"method": method, "tasks": len(names), "before": start[0], "change": change[0], "low": low, "high": high}
        between = dict.fromkeys(("difference", "difference_low", "difference_high"), np.nan)
        if method != "metake":
            between = dict(zip(between, (gap[0], *np.percentile(gap[1:], [tail, 100 - tail])), strict=True))
        rows.append(row | between)
    return labelled(pd.DataFrame(rows), records)


def readable(records: pd.DataFrame) -> str:
    """Which predictions can show that something is forgotten: the generated ones, unless the unedited model can do no
    task by them but can by the more probable answer, as small models that do not keep to the form of an answer."""
    return "generated" if able(records) or not able(records, "probable") else "probable"


def judge(records: pd.DataFrame, draws: int = 2000) -> dict[str, Any]:
    """The paper's claim: MetaKE's curve is nearly flat, as good as the strongest others, above those that collapse.

    Over the tasks that the unedited model can do, by the paper's metrics, of the predictions that are `readable`.
    Holds if MetaKE loses less than 5 points from before editing to the last point, its level is above that of each of
    MEMIT, PRUNE, RECT that was run, and below none of AlphaEdit, BLUE, SPHERE, all by intervals.
    Does not hold if the loss is more than 5 points or its level is below another's, by intervals. Else, or if the
    unedited model can do none of the tasks, inconclusive.
    """
    kind = readable(records)
    if not (names := able(records, kind)):
        return undecided("").verdict(
            f"the unedited model is above chance in none of {records.task.nunique()} tasks: there is nothing that it "
            "could forget"
        )
    found = changes(records, kind, names, draws).set_index("method")
    own, rivals = found.loc["metake"], found.drop("metake")
    flat = interval("MetaKE's change", own.change, own.low, own.high, -FLAT)
    ahead = {
        m: interval(f"against {m}", r.difference, r.difference_low, r.difference_high) for m, r in rivals.iterrows()
    }
    harmed = [ahead[m] for m in HARMED if m in ahead]
    compared = bool(harmed) and any(m in ahead for m in STABLE)
    decided = for_and_against(
        all_of([flat, *harmed]) if compared else undecided(""), any_of(map(opposite, [flat, *ahead.values()]))
    )
    said = [
        f"MetaKE changes by {signed(own.change)} [{signed(own.low)}, {signed(own.high)}] points from before editing to "
        "the end"
    ]
    said += [
        f"against {style(m).name} {signed(r.difference)} [{signed(r.difference_low)}, {signed(r.difference_high)}] "
        "over all points"
        for m, r in rivals.iterrows()
    ]
    able_in = ", ".join(title(name, records) for name in names)
    return decided.quiet().verdict(
        f"{KINDS[kind]}, mean over the tasks that the unedited model can do ({able_in}): " + "; ".join(said)
    )
