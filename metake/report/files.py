"""What pages read and write on disk: figures, recorded runs, the paper's own numbers. Every write is all or nothing."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pandas as pd

from metake.support.errors import ParameterError, near_misses
from metake.support.storage import held, parse_json, reading, write_file

DEFAULT = "tiny"


def project_root() -> Path:
    """The nearest folder at or above the working directory that has a _config.yml; the working directory if none
    has.
    """
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "_config.yml").is_file()), here)


def figures_dir() -> Path:
    """Where figures go: METAKE_FIGURES, else a folder of the run's own in _build/figures; relative to the project's
    root.

    The committed figures/ change only through `make notebooks`, which names it: a run by hand leaves them alone,
    and runs of other parameters too.
    """
    return own_folder("METAKE_FIGURES", "figures")


def own_folder(variable: str, kind: str) -> Path:
    """The folder that an environment variable names, else _build/<kind>/<run>, the run as a page's `accept` tells
    it.
    """
    return project_root() / (os.environ.get(variable) or f"_build/{kind}/{os.environ.get('METAKE_RUN', '')}")


def artifact_name(name: str, model: str = DEFAULT) -> str:
    """`name` for the default model, `name-model` for another, so that two models do not overwrite each other.

    A model given as a folder counts by its last part: no path of a machine becomes a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ParameterError(f"{name!r} cannot name a file; expected letters, digits, '.', '_' and '-'")
    if model == DEFAULT:
        return name
    return f"{name}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', portable(model)).strip('-.')}"


def portable(value: Any) -> Any:
    """A value without paths of this machine: a path counts by its last part; lists and dictionaries throughout."""
    if isinstance(value, Mapping):
        return {key: portable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [portable(v) for v in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        return value
    path = PureWindowsPath(value) if re.match(r"[A-Za-z]:[\\/]", value) else PurePosixPath(value)
    return path.name if path.is_absolute() or path.parts[:1] in (("~",), ("..",)) else value


def write_recorded(
    name: str, records: pd.DataFrame | Sequence[Mapping[str, Any]], provenance: Mapping[str, Any],
    folder: Path | None = None
) -> Path:
    """Write results/<name>.jsonl: the provenance, the number of records and their columns, then one tidy record per
    line, as a list: names on every line would be two thirds of the file; numbers to ten significant digits, more than
    two machines agree in. folder: another one than the project's."""
    path, frame = results_file(name, folder), pd.DataFrame(records)
    rows = [
        [None if v is pd.NA or v != v else float(f"{v:.10g}") if isinstance(v, float) else v for v in row.values()]
        for row in frame.to_dict("records")
    ]
    lines = [{"provenance": portable(provenance), "records": len(rows), "columns": list(frame.columns)}, *rows]
    compact = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    try:
        text = "".join(json.dumps(line, **compact) + "\n" for line in lines)
    except (TypeError, ValueError) as error:
        raise ParameterError(
            f"the records of {name!r} cannot be written as JSON lines ({error}); expected text, numbers, true "
            "or false, finite or missing"
        ) from error
    write_file(path, text)
    return path


SAME = ("model", "model_digest", "dataset", "statistics", "dtype", "edits", "batch", "seeds", "accelerator")
"""Of a recording's provenance: what compared rows must have in common; "seeds" where rows have none of their own."""
OWN = ("model", "dataset", "reading", "method", "seed", "file")
"""Columns that tell whose a row is, where records have them: new rows take the place of older ones that agree there."""


def parts_of(found: pd.DataFrame) -> list[dict[str, Any]]:
    """The provenances of a recording, from which its rows' `made` counts; one where all were made together."""
    return found.attrs.get("parts", [found.attrs["provenance"]])


def check_same(
    name: str, records: pd.DataFrame, provenance: Mapping[str, Any], folder: Path | None = None
) -> pd.DataFrame:
    """The recording that these records are to be merged with.

    Raises ParameterError if it is of another model, of other records or of other settings, or made on another device.
    """
    old, new = recorded(name, folder), portable(provenance)
    first, seeded = parts_of(old)[0], "seed" in old and "seed" in records
    for key in SAME:
        if key in first and not (key == "seeds" and seeded) and first[key] != new.get(key):
            raise ParameterError(
                f"{name}.jsonl has {key} {first[key]!r}, the new rows {new.get(key)!r}: rows of one recording are "
                "compared with each other. Ask for the same, or make all again (metake record: without --methods; "
                "make gpu: into another folder)"
            )
    return old


def merge_recorded(
    name: str, records: pd.DataFrame, provenance: Mapping[str, Any], folder: Path | None = None
) -> Path:
    """Write results/<name>.jsonl with these records in place of the older ones of the same methods (of the same seeds,
    where every row has its own; see `OWN`); the others stay. folder: another one than the project's.

    Every row keeps its own provenance: `made` is its place in the list "parts" of the first line.
    Raises ParameterError as `check_same`.
    """
    with held(results_file(name, folder)):  # no rows of another process come and go in between
        return _merge(name, records, provenance, folder)


def _merge(name: str, records: pd.DataFrame, provenance: Mapping[str, Any], folder: Path | None) -> Path:
    old, new = check_same(name, records, provenance, folder), portable(provenance)
    parts = parts_of(old)
    own = [name for name in OWN if name in old and name in records]
    kept = old[~pd.MultiIndex.from_frame(old[own]).isin(pd.MultiIndex.from_frame(records[own]))]
    rows = pd.concat([kept if "made" in kept else kept.assign(made=0), records.assign(made=len(parts))])
    used = sorted(set(rows.made))
    rows["made"] = rows.made.map({place: i for i, place in enumerate(used)})
    parts = [[*parts, new][place] for place in used]
    joined = _joined(parts, rows)
    if "metake" in set(records.get("method", ())) and "metake" in new:
        joined["metake"] = new["metake"]
    return write_recorded(name, rows, joined, folder)


def _joined(parts: list[dict[str, Any]], rows: pd.DataFrame) -> dict[str, Any]:
    """The provenance of rows that were made apart, with that of each part."""
    joined = parts[0] | {
        key: "; ".join(dict.fromkeys(str(part.get(key)) for part in parts)) for key in ("date", "commit")
    }
    if "seed" in rows and "seeds" in joined and rows.seed.notna().all():
        joined["seeds"] = sorted({int(seed) for seed in rows.seed})
    if all("minutes" in part for part in parts):
        joined["minutes"] = round(sum(part["minutes"] for part in parts), 1)
    return joined | ({"parts": parts} if len(parts) > 1 else {})


def write_joined(
    name: str, found: Sequence[tuple[pd.DataFrame, Mapping[str, Any]]], folder: Path | None = None
) -> Path:
    """Write results/<name>.jsonl of records that were made side by side, each part with its own provenance. Rows that
    several parts bring, such as those of the unedited model, stand once: the first. folder: see `write_recorded`.

    Raises ParameterError for parts of several models, statistics, dtypes or lengths; data sets and devices may differ,
    and each part says its own.
    """
    parts = [dict(portable(told)) for _, told in found]
    for key in (key for key in SAME if key not in ("dataset", "seeds", "accelerator")):
        if len(several := list(dict.fromkeys(str(part.get(key)) for part in parts))) > 1:
            raise ParameterError(
                f"{name}.jsonl would be made of parts with several values of {key}: {', '.join(several)}; rows of one "
                "recording are compared with each other: make the parts of one of them again"
            )
    seen: set[tuple[Any, ...]] = set()
    frames = []
    for place, (frame, _) in enumerate(found):
        own = [column for column in OWN if column in frame]
        whose = pd.MultiIndex.from_frame(frame[own]) if own else pd.MultiIndex.from_tuples([(name,)] * len(frame))
        frames.append(frame[~whose.isin(list(seen))].assign(made=place))
        seen |= set(whose)
    rows = pd.concat(frames, ignore_index=True)
    joined = _joined(parts, rows) | {"dataset": ", ".join(dict.fromkeys(str(part.get("dataset")) for part in parts))}
    return write_recorded(name, rows if len(parts) > 1 else rows.drop(columns="made"), joined, folder)


def recorded(name: str, folder: Path | None = None) -> pd.DataFrame:
    """The records of results/<name>.jsonl, with `.attrs["provenance"]`. folder: another one than the project's.

    Raises  ParameterError if there is no such file, naming the command that makes it; ProvenanceError if it is damaged.
    """
    path = results_file(name, folder)
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "nothing"
        raise ParameterError(
            f"nothing is recorded as results/{path.name}; recorded so far: {there}. Make it with: {_command(name)}"
        )
    again = f"restore it from git, or remove it and make it again with: {_command(name)}"
    with reading(f"results/{path.name}", "no recording", again):
        text = path.read_text(encoding="utf-8")
        header, *rows = (parse_json(line, object) for line in text.splitlines())
        if not text.endswith("\n"):
            raise ValueError("its last line is not finished")
        if not isinstance(header, dict) or not isinstance(header.get("provenance"), dict):
            raise ValueError("its first line holds no provenance")
        if header.get("records", len(rows)) != len(rows):
            raise ValueError(f"{header['records']} records were written, {len(rows)} are there")
        frame, provenance = pd.DataFrame(_named(rows, header.get("columns"))), dict(header["provenance"])
        if any(isinstance(told, list | dict) for column in OWN if column in frame for told in frame[column]):
            raise ValueError("it does not tell whose its rows are")
    if "parts" in provenance:  # merged: see `merge_recorded`
        frame.attrs["parts"] = provenance.pop("parts")
    frame.attrs |= {"provenance": provenance, "label": "recorded"}
    return frame


def _named(rows: list[Any], columns: list[str] | None) -> list[dict[str, Any]]:
    """Records by column; those of older files bring their names on every line. Raises ValueError for others."""
    if columns is not None and all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        rows = [dict(zip(columns, row, strict=True)) for row in rows]
    if any(not isinstance(row, dict) or row.keys() != rows[0].keys() for row in rows):
        raise ValueError("its records do not have the same columns")
    return rows


def _command(name: str) -> str:
    part, _, model = name.partition("-")
    if part.startswith("gpu_"):
        return "make gpu, on a machine with a GPU; then make gpu-import FOLDER=runs/gpu"
    return (
        f"metake record --only {part}"
        + " --tasks DIR" * (part == "general_ability")
        + f" --model {model}" * bool(model)
    )


def results_file(name: str, folder: str | Path | None = None) -> Path:
    """In the project at hand, or, for a page run from elsewhere, in the checkout that this package runs from."""
    if folder:
        return Path(folder) / f"{artifact_name(name)}.jsonl"
    root, checkout = project_root(), Path(__file__).parents[2]
    root = root if (root / "_config.yml").is_file() or not (checkout / "_config.yml").is_file() else checkout
    return root / "results" / f"{artifact_name(name)}.jsonl"


def paper(name: str) -> pd.DataFrame:
    """A table of the paper as far as its numbers survive in the texts at hand: "table2", "table3", …, "protocol".

    Columns as in the paper plus `where` (the place in the paper) and `label` ("reported"); `.attrs["note"]` says what
    is missing or inferred. These are the paper's numbers, never ours.
    """
    tables = tomllib.loads((resources.files("metake") / "data" / "paper.toml").read_text(encoding="utf-8"))
    if name not in tables:
        raise ParameterError(near_misses(name, tables, "table of the paper"))
    found = tables[name]
    frame = pd.DataFrame(found["rows"], columns=found["columns"])
    if "where" not in frame:
        frame["where"] = found["where"]
    frame["label"] = "reported"
    frame.attrs |= {"label": "reported", "title": found["title"], "note": found.get("note", "")}
    return frame
