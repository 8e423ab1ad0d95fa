"""The book's pages as commands: one notebook, other parameters, a folder of its own.

    NAME.ipynb         the page as it ran            parameters.json    with what
    figures/           drawings, and the CSV behind each
    verdicts/          what it found

The notebooks stand in the checkout, not in the wheel. What runs one is imported when one runs.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metake.experiments.parameters import KINDS, own_word
from metake.support import errors
from metake.support.errors import MetakeError, ParameterError, near_misses

QUIET = ["--log-level=ERROR"]  # a kernel's remarks on its own transport


def folder() -> Path:
    """Where the notebooks are. Raises ParameterError if this package was not installed from a checkout."""
    found = Path(__file__).parents[2] / "notebooks"
    if not found.is_dir():
        raise ParameterError(
            "the pages' notebooks are not in the installed package; clone the repository and install from it: "
            "pip install -e ."
        )
    return found


def titles() -> dict[str, str]:
    """Every page by the name of its notebook, with its title."""
    return {
        path.stem: next(_cells(path, "markdown")).partition("\n")[0].lstrip("# ")
        for path in sorted(folder().glob("*.ipynb"))
    }


def defaults(name: str) -> dict[str, Any]:
    """A page's parameters with their default values. Raises ParameterError, with near matches, for an unknown page."""
    known = [path.stem for path in folder().glob("*.ipynb")]
    if name not in known:
        raise ParameterError(near_misses(name, known, "page"))
    source = next(_cells(folder() / f"{name}.ipynb", "code", "parameters"))
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
    }


def figure(
    name: str, out: str | os.PathLike | None = None, model: str | None = None, given: Mapping[str, str] | None = None
) -> tuple[Path, list[dict[str, str]]]:
    """Run a page with other parameters into the folder `out` (default: runs/NAME); gives the folder and the verdicts.

    given: parameter → text, read as the default's type; lists by commas. The same parameters again renew the folder.
    Raises ParameterError, before anything runs, for a name or a type that the page does not have,
    or a folder that holds something else; and whatever the page says of a value in one sentence,
    leaving no new folder behind.
    """
    usual = defaults(name)
    words = {**({"model": model} if model is not None else {}), **(given or {})}
    changed = {own: _value(own, text, usual[own]) for word, text in words.items() for own in [own_word(word, usual)]}
    out = Path(out or f"runs/{name}").absolute()

    import papermill  # what was mistyped has been answered by now
    from papermill.exceptions import PapermillExecutionError

    from metake.support.storage import remove

    new = _free(out, {"page": name, "parameters": {**usual, **changed}})
    try:
        with _environment(
            METAKE_FIGURES=out / "figures", METAKE_VERDICTS=out / "verdicts", MPLBACKEND="agg", TQDM_DISABLE="1",
            PYTHONWARNINGS="ignore"
        ):
            papermill.execute_notebook(
                folder() / f"{name}.ipynb", out / f"{name}.ipynb", changed, kernel_name="python3",
                extra_arguments=QUIET, progress_bar=sys.stderr.isatty()
            )
    except PapermillExecutionError as error:
        kind = getattr(errors, error.ename, None)
        if kind and new:
            remove(out)
        raise (kind or MetakeError)(
            error.evalue
            if kind
            else f"the page {name} failed: {error.ename}: {error.evalue}. See the traceback in {out / name}.ipynb"
        ) from None
    return out, [json.loads(path.read_text("utf-8")) for path in sorted((out / "verdicts").glob("*.json"))]


def _cells(path: Path, kind: str, tag: str | None = None) -> Iterator[str]:
    """The sources of a notebook's cells, one by one: what stands in the first waits for no drawing of megabytes."""
    text, decode = path.read_text(encoding="utf-8"), json.JSONDecoder().raw_decode
    at = text.index("[", text.index('"cells"')) + 1
    while begin := re.compile(r"[\s,]*(?={)").match(text, at):
        cell, at = decode(text, begin.end())
        if cell["cell_type"] == kind and (tag is None or tag in cell["metadata"].get("tags", ())):
            yield "".join(cell["source"])


def _value(name: str, text: str, usual: Any) -> Any:
    """The text as a value of the default's type."""
    if isinstance(usual, list):
        return [_value(name, part.strip(" '\""), usual[0]) for part in text.strip("[] ").split(",")]
    try:
        return {"true": True, "false": False}[text.lower()] if isinstance(usual, bool) else type(usual)(text)
    except (ValueError, KeyError):
        raise ParameterError(f"{name} must be {KINDS[type(usual)]}, such as {usual}; found {text!r}") from None


def _free(out: Path, run: dict[str, Any]) -> bool:
    """Note in the folder what it is for; whether it is new. Refuses one that holds something else."""
    from metake.support.storage import contents, read_json, write_file

    note, new = out / "parameters.json", not out.exists()
    if not new and (not out.is_dir() or contents(out)):
        try:
            there = read_json(note)
        except (OSError, ValueError):
            raise ParameterError(f"{out} exists and holds no page's run; name another folder with --out") from None
        if there != run:
            raise ParameterError(
                f"{out} holds a run of {there.get('page')} with other parameters; name another folder with --out, "
                "or remove it"
            )
    write_file(note, json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    return new


@contextlib.contextmanager
def _environment(**values: Any) -> Iterator[None]:
    """Variables that a kernel inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
