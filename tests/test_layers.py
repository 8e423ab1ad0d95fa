"""The house rules that a reader of the source relies on: imports go down only, nothing is long, nothing is hidden."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import metake
from metake import METHODS

ROOT = Path(metake.__file__).parent
# Rooms in the order of imports: each may import itself and what stands before it. `report` never runs a model.
ROOMS = "support data algebra language report scoring editing methods experiments testing metake commands".split()
ENTRIES = 15  # of the package's own folder: what a newcomer sees
# Lines of at most WIDTH: of a file; of a function's body and of a method's recipe, docstrings not counted.
FILE, FUNCTION, METHOD, WIDTH = 320, 50, 8, 120
MUTABLE = ("dict", "list", "set", "defaultdict", "Counter", "deque", "OrderedDict")
CHANGES = {
    "append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard",
    "appendleft"
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "metake"


SOURCES = {module_of(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
MODULES = {f"metake.{module}" for module in SOURCES}


def room(module: str) -> str:
    """Its first part; `python -m metake` is a command."""
    return "commands" if module == "__main__" else module.partition(".")[0]


def imports(source: str) -> Iterator[str]:
    """The package's own modules that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names = [
                full if full in MODULES else node.module
                for name, full in inside.items()
            ]
        else:
            continue
        yield from (name.removeprefix("metake.") for name in names if name.split(".")[0] == "metake")


def top_packages(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [
        n.module for n in nodes if isinstance(n, ast.ImportFrom)
    ]
    return {name.split(".")[0] for name in names}


def length(node: ast.FunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    first = node.body[1:] if ast.get_docstring(node) else node.body
    return node.end_lineno - first[0].lineno + 1 if first else 0


def mutable(value: ast.expr | None) -> bool:
    made = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in MUTABLE
    return made or isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def flaws(source: str, module: str) -> Iterator[str]:
    """What the house does not have."""
    tree = ast.parse(source)
    constants = {
        t.id
        for n in tree.body
        if isinstance(n, ast.Assign | ast.AnnAssign) and mutable(n.value)
        for t in getattr(n, "targets", [getattr(n, "target", None)])
    }
    yield from (
        f"mutable module state {name}" for name in constants if not name.strip("_").isupper() and name != "__all__"
    )
    if "cuda" in source.lower() and module != "support.machine":
        yield "the word cuda"
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                if length(node) > FUNCTION:
                    yield f"function {node.name} of {length(node)} lines"
                if any(mutable(d) for d in (*node.args.defaults, *node.args.kw_defaults)):
                    yield f"mutable default of {node.name}"
                decorators = {ast.unparse(d).partition("(")[0].split(".")[-1] for d in node.decorator_list}
                if decorators & {"cache", "lru_cache"} and ast.unparse(node.args):
                    yield f"a cache that grows: {node.name}"
            case ast.ClassDef() if any(isinstance(n, ast.Assign) and mutable(n.value) for n in node.body):
                yield f"mutable state of class {node.name}"
            case ast.Assert():
                yield "assert"
            case ast.Global():
                yield "global"
            case ast.ExceptHandler(type=None):
                yield "bare except"
            case ast.Call(func=ast.Name(id="print")) if module != "commands.cli":
                yield "print"
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=attr)) if (
                attr in CHANGES and name.isupper()
            ):
                yield f"{name} is changed"
            case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), ctx=ast.Store() | ast.Del()) if (
                name.isupper()
            ):
                yield f"{name} is changed"
            case ast.AugAssign(target=ast.Name(id=name) | ast.Attribute(attr=name)) if name.isupper():
                yield f"{name} is changed"


@pytest.mark.parametrize("source", [
    "assert x", "def f():\n    global x", "try:\n    pass\nexcept:\n    pass", "print(1)", "x = 'cuda'", "x = {}",
    "x: dict = dict()", "class A:\n    x = []", "def f(x=[]): pass",
    "import functools\n@functools.lru_cache(9)\ndef f(x): pass", "def f():\n    TABLE['a'] = 1",
    "def f():\n    other.TABLE.update(a=1)", "def f():\n    del TABLE[0]",
    "def f():\n" + 51 * "    x\n",
])  # fmt: skip
def test_the_rules_see_what_they_are_for(source):
    assert len(list(flaws(source, "solve"))) == 1
    assert not list(
        flaws(
            "from functools import cache\nTABLE = {1: []}\n@cache\ndef f():\n    'print assert'\n    return "
            "dict(TABLE)\n", "solve"
        )
    )


def test_every_module_is_in_a_room():
    assert {room(module) for module in SOURCES} == set(ROOMS), "name a new room in ROOMS, after what it imports"
    seen = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(seen) <= ENTRIES, sorted(seen)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_only(module):
    below = ROOMS[: ROOMS.index(room(module)) + 1]
    up = [name for name in imports(SOURCES[module]) if room(name) not in below]
    assert not up, f"{module} imports {up}, whose rooms do not stand before its own in ROOMS"


def test_no_imports_go_in_a_circle():
    graph = {module: {name for name in imports(source) if name != module} for module, source in SOURCES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(SOURCES)  # a circle raises, and names itself


@pytest.mark.parametrize("name", [name for name in ROOMS if (ROOT / name).is_dir()])
def test_a_room_says_what_lives_there(name):
    told = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8")))
    (first,) = re.findall(r"Read first: `([\w/]+\.py)`", told)
    assert (ROOT / name / first).is_file()
    said = set(re.findall(r"`(\w+)`", "".join(re.findall(r"Imports [^.]*", told)))) - {name}
    used = {room(m) for module in SOURCES if room(module) == name for m in imports(SOURCES[module])} - {name}
    assert used <= said or "every room" in told, f"{name} also imports {sorted(used - said)}"


def test_the_import_graph_was_seen():
    edges = {(module, name) for module in SOURCES for name in imports(SOURCES[module])}
    assert {
        ("algebra.solve", "algebra.geometry"), ("language.model", "language.capture"),
        ("language.model", "language.assets"), ("editing.editor", "editing.bilevel"), ("report.figure", "report.files"),
        ("__main__", "commands.cli")
    } <= edges
    assert ("language.model", "metake") not in edges and len(edges) > 80


def test_the_mathematics_needs_torch_alone_and_reports_need_no_model():
    own = {"__future__", "collections", "dataclasses", "functools", "typing", "metake"}
    assert (top_packages(SOURCES["algebra.geometry"]) | top_packages(SOURCES["algebra.solve"])) - own == {"torch"}
    assert not top_packages(SOURCES["algebra.update"]) & {"transformers", "numpy", "pandas"}
    assert not {"torch", "transformers"} & {
        p for m in SOURCES if m.startswith("report") for p in top_packages(SOURCES[m])
    }


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_short_and_hides_nothing(module):
    assert len(SOURCES[module].splitlines()) <= FILE
    assert not list(flaws(SOURCES[module], module))


def test_lines_fit_the_width():
    scripts = {"test_built_pages.py", "train_tiny.py"}  # they hold JavaScript and the lines of a model's card
    sources = [path for folder in ("metake", "tests", "tools", "book") for path in (ROOT.parent / folder).rglob("*.py")]
    sources = [path for path in sources if path.name not in scripts]
    wide = [
        f"{path.name}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert len(sources) > 150 and not wide


def test_a_method_is_a_few_lines():
    tree = ast.parse(SOURCES["methods"])
    lengths = {n.name: length(n) for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert max(lengths[made.__name__] for made in METHODS.values()) <= METHOD


def test_nothing_is_written_twice():
    windows = Counter()
    for source in SOURCES.values():
        lines = [
            line
            for raw in source.splitlines()
            if (line := raw.strip()) and not line.startswith(("#", "import ", "from "))
        ]
        windows.update("\n".join(lines[i : i + 6]) for i in range(len(lines) - 5))
    repeated = {window: count for window, count in windows.items() if count > 1}
    assert sum(repeated.values()) < 0.01 * windows.total(), "\n\n".join(repeated)
