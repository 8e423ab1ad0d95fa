"""The exercises of the book: each has a folded solution that runs where the page runs, and says what it printed.

On pages of prose a solution is a block that is run here; on notebook pages a cell, which nbval runs with its page.
"""

import ast
import contextlib
import io
import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

import metake as mk
from metake.experiments.theory import real_layer

ROOT = Path(__file__).resolve().parents[2]
TAUGHT = ("Understand", "Theory")  # parts of _toc.yml whose pages have exercises
ASKED = re.compile(r"^\*\*(\d)\.\*\* (.+)$", re.MULTILINE)
FOLDED = re.compile(r"^`{4}\{dropdown\} Solution (\d)\n(.*?)^`{4}$", re.DOTALL | re.MULTILINE)
STATEMENTS = 5  # of a solution on a notebook page, beside its imports


def pages(suffix):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    files = [ROOT / c["file"] for part in toc["parts"] if part["caption"] in TAUGHT for c in part["chapters"]]
    return [path for file in files if (path := file.with_suffix(suffix)).is_file()]


prose = pytest.mark.parametrize("path", pages(".md"), ids=lambda path: path.stem)
theory = pytest.mark.parametrize("path", pages(".ipynb"), ids=lambda path: path.stem)


def asked(text):
    """The numbers and words of the exercises after their heading."""
    return ASKED.findall(text.split("## Exercises\n")[1])


def solutions(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if "solution" in cell["metadata"].get("tags", ())]


@pytest.fixture(scope="module")
def one_model():
    """`tiny` and its statistics are read once for all pages."""
    model, kept = cache(mk.load), {}

    def statistics(lm):
        return kept[id(lm)] if id(lm) in kept else kept.setdefault(id(lm), read(lm))

    with pytest.MonkeyPatch.context() as patch:
        read = mk.statistics
        patch.setattr(mk, "load", model)
        patch.setattr(real_layer, "load", model)
        patch.setattr(mk, "statistics", statistics)
        yield


@prose
def test_solutions_print_what_stands_below_them(path, one_model):
    text, names = path.read_text("utf-8"), {}
    found = FOLDED.findall(text)
    assert 2 <= len(found) <= 3 and [n for n, _ in found] == [n for n, _ in asked(text)] == [*"123"[: len(found)]]
    for number, solution in found:
        ((code, said, why),) = re.findall(r"\A```python\n(.*?)```\n```text\n(.+?)```\n(.+)\Z", solution, re.DOTALL)
        assert len(why) > 60, f"solution {number} does not say why"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{path.stem}, solution {number}", "exec"), names)  # noqa: S102
        assert printed.getvalue() == said, f"solution {number}"


@theory
def test_a_page_of_theory_has_its_exercises_in_order(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    kept = solutions(path)
    assert 2 <= len(kept) <= 3 and [n for n, _ in asked(text)] == [*"123"[: len(kept)]]
    assert all(len(words) > 60 for _, words in asked(text))
    for cell in kept:
        before = cells[cells.index(cell) - 1]
        number = before["cell_type"] == "markdown" and ASKED.findall("".join(before["source"]))[0][0]
        assert number and cell["metadata"]["mystnb"]["code_prompt_show"] == f"Solution {number}"


@theory
def test_a_solution_is_short_says_why_and_ends_with_its_answer(path):
    """A page holds no logic; a solution may hold five statements of public calls, and shows what it printed."""
    for cell in solutions(path):
        source = "".join(cell["source"])
        body = [node for node in ast.parse(source).body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert "hide-cell" in cell["metadata"]["tags"] and source.startswith("# ")
        assert len(body) <= STATEMENTS and ast.unparse(body[-1]).startswith("print(")
        private = [n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and n.attr[0] == "_"]
        assert not private
        (output,) = cell["outputs"]
        assert output["name"] == "stdout" and re.search(r"\d|True|False|none", "".join(output["text"]))
