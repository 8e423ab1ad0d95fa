"""The paper's tables and figures as a grid of cells: one process each, which goes on where a killed one stopped.

An engine that others keep (Snakemake, see the Snakefile) runs the cells on one machine or on a cluster; this module
says what they are, and makes recordings of what they leave. It needs no torch to say it.

    run       `metake run`: one method, data set and seed of Table 1 or 4, edited in batches and evaluated
    train     `metake train`: the editor that a run of MEND or MALMEN takes
    record    `metake record`: one figure or table of a model, or one seed or method of it
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metake.experiments.scales import FIRST, SCALES, Needs, Scale
from metake.support.errors import ParameterError, ProvenanceError, near_misses

if TYPE_CHECKING:
    import pandas as pd

RUN, RECORD, TRAINED = "summary.json", "{}-{}.jsonl", "record.json"  # what a cell writes last: it is finished then
TRAINS = ("mend", "malmen")


class Cell(NamedTuple):
    """One process. folder: its own, which it may go on in; words: what `metake` is called with; done: the file that it
    writes last, whole; after: files of cells that come before it; told: of a run, what its rows say of it."""

    folder: str
    words: tuple[str, ...]
    done: str
    needs: Needs
    after: tuple[str, ...] = ()
    told: Mapping[str, Any] = {}

    @property
    def output(self) -> str:
        return f"{self.folder}/{self.done}"


class Recording(NamedTuple):
    """A file of results, and the cells that it is made of, in the order of its rows."""

    target: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """A scale laid out. recordings: by the path of their file; cells: by their output."""

    scale: Scale
    recordings: dict[str, Recording] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any]) -> Grid:
        """The grid of `SCALES[name]` with some of its fields given. Raises ParameterError as `plan`."""
        scale = plan(name, given)
        grid = cls(scale)
        for target, cell in _all_cells(name, scale):
            known = grid.recordings.setdefault(f"{scale.results}/{target}.jsonl", Recording(target, ()))
            if cell.done != TRAINED:
                grid.recordings[f"{scale.results}/{target}.jsonl"] = known._replace(cells=(*known.cells, cell))
            grid.cells[cell.output] = cell
        return grid


def plan(name: str, given: Mapping[str, Any]) -> Scale:
    """`SCALES[name]` with other data, text, models, methods, seeds or numbers.

    models and methods: some of the scale's, or names and folders of others, which then need what its first model does.
    Raises ParameterError, with near matches, for an unknown scale or field, or a value of another kind.
    """
    if name not in SCALES:
        raise ParameterError(near_misses(name, SCALES, "scale"))
    scale = SCALES[name]
    known = [f.name for f in fields(Scale) if f.name not in ("studies", "results", "work")]
    for word, value in given.items():
        if word not in known:
            raise ParameterError(near_misses(word, known, "setting of the grid"))
        usual = getattr(scale, word)
        if isinstance(usual, Mapping) and isinstance(value, str | Sequence):
            value, first = [value] if isinstance(value, str) else value, next(iter(scale.models.values()))
            value = {model: _like(model, usual) or first for model in value}
        kind = tuple if isinstance(usual, Sequence) and not isinstance(usual, str) else type(usual)
        if kind is tuple and isinstance(value, list | tuple):
            value = tuple(value)
        if kind is bool:  # a command line has only words
            value = {"true": True, "false": False}.get(str(value).lower(), value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ParameterError(f"{word} of the grid is such as {usual!r}; found {value!r}")
        scale = replace(scale, **{word: value})
    return scale


def _like(model: str, known: Mapping[str, Needs]) -> Needs | None:
    return next((needs for name, needs in known.items() if _short(name) == _short(model)), None)


def _short(name: str) -> str:
    """The last part of a name or path, as recordings have it."""
    return Path(name).name


def settings(name: str, only: Sequence[str] | None) -> dict[str, Mapping[str, Any]]:
    """The numbers of recordings at a scale, by name, for `metake record --scale`. ParameterError for unknown ones."""
    scale = plan(name, {})
    if missing := [study for study in only or ("",) if study not in scale.studies]:
        raise ParameterError(near_misses(missing[0], scale.studies, f"recording of the scale {name!r} (--only)"))
    return {study: scale.studies[study].numbers for study in only or ()}


def _all_cells(name: str, scale: Scale) -> Iterator[tuple[str, Cell]]:
    """Every cell with the recording that it belongs to; what a cell waits for comes first."""
    for place, (models, methods) in enumerate(((scale.models, scale.methods), (scale.further, scale.further_methods))):
        for model, needs in models.items():
            first = _recorded(name, scale, FIRST, model, needs, "")
            yield f"{FIRST}-{_short(model)}", first
            for cell in _runs(scale, model, methods, needs, first.output):
                yield f"comparison-{_short(model)}", cell
            for study, how in scale.studies.items():
                if study == FIRST or place or (how.models and _short(model) not in how.models):
                    continue
                if study == "general_ability" and not scale.tasks:
                    continue
                for seed in how.seeds or (None,):
                    for method in how.methods or (None,):
                        cell = _recorded(name, scale, study, model, needs, first.output, seed, method)
                        yield f"{study}-{_short(model)}", cell


def _common(scale: Scale, model: str) -> list[str]:
    return ["--model", model, "--text", scale.text, "--text-tokens", str(scale.text_tokens)]


def _runs(scale: Scale, model: str, methods: Sequence[str], needs: Needs, first: str) -> Iterator[Cell]:
    """The runs of a model, and before them the trainings that they need."""
    for dataset, source in scale.data.items():
        for seed in scale.seeds:
            for method in methods:
                named = f"{Path(source).stem}-{method.replace('/', '-')}-{seed}"
                editor, after = [], (first,)
                if scale.trained and method in TRAINS:
                    folder = f"{scale.work}/{_short(model)}/train/{named}"
                    words = ["train", method, "--model", model, "--data", source, "--seed", str(seed)]
                    words += ["--holdout", str(scale.edits), "--out", folder]
                    training = Cell(folder, tuple(words), TRAINED, needs, after)
                    yield training
                    editor, after = ["--editor", folder], (training.output,)
                folder = f"{scale.work}/{_short(model)}/run/{named}"
                words = ["run", *_common(scale, model), "--method", method, "--data", source]
                words += ["--edits", str(scale.edits), "--batch", str(scale.batch), "--seed", str(seed), *editor]
                words += ["--generate"] if scale.generate and dataset == "CounterFact" else []
                told = {"dataset": dataset, "method": method, "seed": seed}
                yield Cell(folder, (*words, "--out", folder), RUN, needs, after, told)


def _recorded(
    name: str, scale: Scale, study: str, model: str, needs: Needs, first: str, seed: int | None = None,
    method: str | None = None
) -> Cell:
    """A recording of a model, or of one seed or method of it, in a folder of its own."""
    parts = [study, *([method.replace("/", "-")] if method else []), *([str(seed)] if seed is not None else [])]
    folder = f"{scale.work}/{_short(model)}/{'-'.join(parts)}"
    words = ["record", *_common(scale, model), "--only", study, "--scale", name]
    words += ["--counterfact", scale.counterfact, "--zsre", scale.zsre]
    words += ["--edits", str(scale.edits), "--batch", str(scale.batch)]
    words += ["--seeds", str(seed or 0)] + (["--methods", method] if method else [])
    words += ["--tasks", scale.tasks] if study == "general_ability" else []
    done = RECORD.format(study, _short(model))
    return Cell(folder, (*words, "--out", folder), done, needs, (first,) if first else ())


def collect(grid: Grid, path: str) -> Path:
    """Make one recording of what its cells left, every row with its own cell's provenance; see `report.write_joined`.

    Raises ProvenanceError for a cell that is not finished, ParameterError for cells that are not of one grid.
    """
    from metake import report

    recording = grid.recordings[path]
    for cell in recording.cells:
        if not Path(cell.output).is_file():
            called = " ".join(cell.words)
            raise ProvenanceError(f"{cell.output} is missing: its cell is not finished; run: metake {called}")
    found = [
        _of_run(cell) if cell.done == RUN else _of_record(recording.target, Path(cell.folder))
        for cell in recording.cells
    ]
    return report.write_joined(recording.target, found, Path(path).parent)


def _of_record(target: str, folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    from metake import report

    frame = report.recorded(target, folder)
    return frame, frame.attrs["provenance"]


def _of_run(cell: Cell) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A run's rows as `comparison` gives them, and where they come from."""
    import pandas as pd

    from metake.experiments.studies.comparison import run_rows

    folder, seed = Path(cell.folder), cell.told["seed"]
    summary = json.loads((folder / RUN).read_text(encoding="utf-8"))
    told = summary["provenance"] | {name: summary["config"][name] for name in ("edits", "batch")}
    told |= {"seeds": [seed], "minutes": round(summary["seconds"]["total"] / 60, 1)}
    return pd.DataFrame(run_rows(folder, cell.told["dataset"], cell.told["method"], seed, before=True)), told
