"""The pages as committed: outputs recorded, in order and clean, no logic of their own, and the verdicts that they show.

nbval passes a notebook whose outputs were cleared; these tests do not.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOCAL_PATH = re.compile(r"(?:/home|/Users|/root|/tmp|/var/folders)/\w|[A-Z]:\\\\Users|" + re.escape(str(ROOT)))
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip"}
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.AsyncFor, ast.While)

VERDICTS = sorted((ROOT / "results" / "verdicts").glob("*.json"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return set(cell["metadata"].get("tags", []))


def source(cell):
    return "".join(cell["source"])


def outputs(path):
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def modules(node):
    """The dotted names an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_notebook_is_a_page():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert NOTEBOOKS, "no notebooks: nothing was tested"
    assert {f"notebooks/{path.stem}" for path in NOTEBOOKS} == {file for file in files if file.startswith("notebooks/")}


@every_notebook
def test_outputs_are_recorded_in_order(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        "not run top to bottom in one kernel"
    )
    assert any(cell["outputs"] and not tags(cell) & NOT_COMPARED for cell in cells), "nothing for nbval to compare"
    silent = [
        source(cell) for cell in cells if not cell["outputs"] and isinstance(ast.parse(source(cell)).body[-1], ast.Expr)
    ]
    assert not silent, f"these cells show something, and no output is recorded: {silent}"


@every_notebook
def test_outputs_are_clean(path):
    kinds = [output["output_type"] for output in outputs(path)]
    assert "error" not in kinds, "a traceback is recorded"
    streams = [output["name"] for output in outputs(path) if output["output_type"] == "stream"]
    assert "stderr" not in streams, "library chatter is recorded"
    data = [kind for output in outputs(path) for kind in output.get("data", {})]
    assert not [kind for kind in data if "widget" in kind], (
        "a widget is recorded: the page would load scripts from the network"
    )
    local = [match for output in outputs(path) for match in LOCAL_PATH.findall(json.dumps(output))]
    assert not local, f"a path of somebody's machine is recorded: {local}"


@every_notebook
def test_papermill_left_no_stamp(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert "papermill" not in notebook["metadata"] and not any("papermill" in c["metadata"] for c in notebook["cells"])
    assert not any("injected-parameters" in tags(cell) for cell in code_cells(path)), (
        "a papermill run was committed over its source"
    )
    assert not any("execution" in cell["metadata"] for cell in code_cells(path)), (
        "run times are recorded: use `make notebooks`"
    )


@every_notebook
def test_one_parameters_cell_of_plain_values(path):
    cells = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    assert len(cells) == 1, f"{len(cells)} cells are tagged 'parameters', expected one"
    statements = ast.parse(source(cells[0])).body
    assert statements and all(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in statements)
    for node in statements:
        ast.literal_eval(node.value)


@every_notebook
def test_page_holds_no_logic(path):
    nodes = [node for cell in code_cells(path) for node in ast.walk(ast.parse(source(cell)))]
    assert not [type(node).__name__ for node in nodes if isinstance(node, LOGIC)], "logic belongs into the library"
    imported = [name for node in nodes for name in modules(node)]
    assert not [name for name in imported if name.split(".")[0] == "torch"], "a page does not import torch"


@pytest.mark.parametrize("path", VERDICTS, ids=lambda path: path.stem)
def test_verdict_is_the_one_its_page_shows(path):
    verdict = json.loads(path.read_text("utf-8"))
    shown = [
        output.get("data", {}).get("text/plain", "")
        for output in outputs(ROOT / "notebooks" / f"{verdict['page']}.ipynb")
    ]
    text = "\n".join("".join(lines) for lines in shown)
    missing = [field for field in ("claim", "verdict", "decided_by") if verdict[field] not in text]
    assert not missing, (
        f"{path.name} was not written by the recorded run of its page: {missing} differ; use `make notebooks`"
    )


@pytest.mark.parametrize("path", VERDICTS, ids=lambda path: path.stem)
def test_no_verdict_stands_within_its_own_error_without_saying_so(path):
    found = json.loads(path.read_text("utf-8"))
    assert found["margin"] >= 0 and found["error"]
    if found["margin"] < 1 and found["verdict"] != "inconclusive":
        assert re.search(r"within (its error|rounding)", found["decided_by"])
