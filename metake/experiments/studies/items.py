"""Items of the six tasks of general ability: where they come from, which are asked, and what the answers are worth."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metake.data.fact_tasks import fact_tasks
from metake.data.facts import interleaved
from metake.scoring.tasks import INVALID, Task, task
from metake.support.errors import ParameterError
from metake.support.storage import parse_json, reading

RESERVED = 10  # first items of a file, kept for examples; none are shown here (zero-shot)
MEASURES = ("accuracy", "F1", "MCC")


def read_items(source: str | Path, name: str) -> list[dict[str, Any]]:
    """Every item of a task: "facts" (made from the embedded facts, test split), "hub", or a folder.

    A folder holds <name>.jsonl, one JSON object a line; the harness's <name>.pkl is answered with how to convert it,
    for a pickle may hold code. "hub" takes GLUE and MMLU from the model hub, classes in turn as in the
    harness's files. Raises ParameterError if there is no such task or file, or it is damaged.
    """
    wanted = task(name)
    if str(source) == "facts":
        return fact_tasks("test", rounds=2)[wanted.file]
    if str(source) == "hub":
        return _from_hub(wanted)
    folder = Path(source)
    if not folder.is_dir():
        known = f"neither 'facts', nor 'hub', nor a folder with {wanted.file}.jsonl and the like"
        raise ParameterError(f"task data {str(source)!r} is {known}")
    if (file := folder / f"{wanted.file}.jsonl").is_file():
        return _checked(wanted, file)
    if (pickled := file.with_suffix(".pkl")).is_file():
        convert = "import json, pickle, sys; [print(json.dumps(item)) for item in pickle.load(sys.stdin.buffer)]"
        raise ParameterError(
            f"{pickled} is not read: opening a pickle can run what its author wants. If you trust it, convert it: "
            f"python -c '{convert}' < {pickled} > {file}"
        )
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise ParameterError(f"{folder} has no {file.name}; found {found}")


def _checked(wanted: Task, file: Path) -> list[dict[str, Any]]:
    form = f"expected a line of JSON an item, with the fields of {wanted.form!r}"
    with reading(file, "no task", form, ParameterError):
        items = [parse_json(line) for line in file.read_bytes().decode().split("\n") if line.strip()]
        for item in items:
            wanted.prompt(item), wanted.label(item)
    if not items:
        raise ParameterError(f"{file} holds no items; {form}")
    return items


HUB = {"nli": ("nyu-mll/glue", "rte", "train"), "mmlu": ("cais/mmlu", "all", "validation")} | {
    n: ("nyu-mll/glue", n, "validation") for n in ("sst2", "mrpc", "cola", "rte")
}


def _from_hub(wanted: Task) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ParameterError(
            "tasks from the hub need the package 'datasets': pip install datasets; or give a folder of JSON lines"
        ) from None
    name, config, split = HUB[wanted.file]
    items = [dict(item) for item in load_dataset(name, config, split=split)]
    if wanted.file == "nli":
        items = [item | {"label": ("entailment", "not_entailment")[item["label"]]} for item in items]
    classes = [[item for item in items if wanted.label(item) == c] for c in range(len(wanted.classes))]
    return interleaved(classes)


def asked(
    items: Sequence[dict[str, Any]], wanted: Task, tests: int, reading: str = "corrected", edited: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """The first `tests` items after the reserved ones; the corrected reading passes over those that name an edited
    subject, whose answers are meant to change. Raises ParameterError if there are not so many.
    """
    found = items[RESERVED:]
    if reading == "corrected" and (subjects := sorted(set(edited), key=len, reverse=True)):
        named = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, subjects))})(?!\w)")
        found = [item for item in found if not named.search(wanted.prompt(item))]
    if len(found) < tests:
        told = f"{tests} items of {wanted.name} were asked for; {len(found)} can be asked, of {len(items)} in the data"
        raise ParameterError(f"{told}: ask for fewer, or edit fewer facts")
    return list(found[:tests])


def measures(
    labels: Sequence[int], predictions: Sequence[int], classes: int, draws: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Accuracy, weighted F1 and Matthews' correlation in percent; INVALID is a class of its own that is never right.

    draws: how often each item counts, (draws, items); None: once. Returns one value a draw. F1 is weighted by the
    classes' sizes; it and the correlation are 0 where they are undefined, as scikit-learn has them.
    """
    cells = np.zeros((len(labels), classes, classes + 1))
    cells[np.arange(len(labels)), labels, np.where(np.asarray(predictions) == INVALID, classes, predictions)] = 1
    table = np.tensordot(np.ones((1, len(labels))) if draws is None else draws, cells, 1)  # draws × label × prediction
    total, right = table.sum((1, 2)), np.trace(table[..., :classes], axis1=1, axis2=2)
    true, said, hits = table.sum(2), table.sum(1), np.diagonal(table[..., :classes], axis1=1, axis2=2)
    spread = (total**2 - (true**2).sum(1)) * (total**2 - (said**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.nan_to_num(2 * hits / (true + said[:, :classes]))
        mcc = np.nan_to_num((right * total - (true * said[:, :classes]).sum(1)) / np.sqrt(spread))
        return {"accuracy": 100 * right / total, "F1": 100 * (f1 * true).sum(1) / total, "MCC": 100 * mcc}
