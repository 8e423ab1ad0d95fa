"""The house rules that a reader of the source relies on: imports go down only, nothing is long, nothing is hidden."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import metake
from metake import METHODS

ROOT = Path(metake.__file__).parent
# Each module may import only what stands before it. `report` stands low: it reads results, never a model.
ORDER = """
errors arguments storage machine kernels geometry solve update postprocess recipes progress
report.style report.files report.shown report.hover report.figure report.plots report.requirement report.comparison report.operators report.generations report.streams report.family report.interactive report.proxy report.bilevel_theory report.realized report.sweeps report.readings report.ability report.hidden_states report.gamma report
capture requests tokens facts fact_tasks tasks assets model generation objective prefixes keys text_metrics
plant targets bilevel statistics
editor methods diagnosis hypergradient
evaluation answers harness runs
experiments.parameters experiments.kept experiments.attenuation experiments.geometry_of_beta experiments.quickstart experiments.dispersion experiments.comparison experiments.operators
experiments.sizes experiments.literal experiments.bench experiments.run_time experiments.streams experiments.case_study experiments.parts experiments.solves experiments.one_formula experiments.sequential experiments.differences experiments.adversary experiments.real_layer experiments.inner experiments.necessity experiments.landscapes experiments.convergence experiments.dominance experiments.editing_requirement experiments.shared_strength experiments.spectral_suppression experiments.static_trap experiments.trap_edges experiments.proxy_fidelity experiments.study experiments.ablation experiments.realized_residual experiments.kl_strength experiments.sensitivity experiments.readings experiments.open_readings experiments.general_ability experiments.finished experiments.hidden_states experiments.gamma_beforehand experiments.record experiments pages
metake options cli __main__
""".split()
FILE, FUNCTION, METHOD = 300, 40, 8  # lines: of a file; of a function and of a method's recipe, docstring not counted
MUTABLE = ("dict", "list", "set", "defaultdict", "Counter", "deque", "OrderedDict")
CHANGES = {"append", "add", "update", "setdefault", "pop", "popitem", "clear", "extend", "insert", "remove", "discard", "appendleft"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "metake"


SOURCES = {module_of(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def imports(source: str) -> Iterator[str]:
    """The package's own modules that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names = [full if full.removeprefix("metake.") in ORDER else node.module for name, full in inside.items() if full != "metake.__version__"]
        else:
            continue
        yield from (name.removeprefix("metake.") for name in names if name.split(".")[0] == "metake")


def top_packages(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def length(node: ast.FunctionDef) -> int:
    lines = node.end_lineno - node.lineno + 1
    return lines - (node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0)


def mutable(value: ast.expr | None) -> bool:
    made = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in MUTABLE
    return made or isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def flaws(source: str, module: str) -> Iterator[str]:
    """What the house does not have."""
    tree = ast.parse(source)
    constants = {t.id for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and mutable(n.value) for t in getattr(n, "targets", [getattr(n, "target", None)])}
    yield from (f"mutable module state {name}" for name in constants if not name.strip("_").isupper() and name != "__all__")
    if "cuda" in source.lower() and module != "machine":
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
            case ast.Call(func=ast.Name(id="print")) if module != "cli":
                yield "print"
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=attr)) if attr in CHANGES and name.isupper():
                yield f"{name} is changed"
            case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), ctx=ast.Store() | ast.Del()) if name.isupper():
                yield f"{name} is changed"
            case ast.AugAssign(target=ast.Name(id=name) | ast.Attribute(attr=name)) if name.isupper():
                yield f"{name} is changed"


@pytest.mark.parametrize("source", [
    "assert x", "def f():\n    global x", "try:\n    pass\nexcept:\n    pass", "print(1)", "x = 'cuda'", "x = {}", "x: dict = dict()", "class A:\n    x = []", "def f(x=[]): pass",
    "import functools\n@functools.lru_cache(9)\ndef f(x): pass", "def f():\n    TABLE['a'] = 1", "def f():\n    other.TABLE.update(a=1)", "def f():\n    del TABLE[0]",
    "def f():\n" + 40 * "    x\n",
])  # fmt: skip
def test_the_rules_see_what_they_are_for(source):
    assert len(list(flaws(source, "solve"))) == 1
    assert not list(flaws("from functools import cache\nTABLE = {1: []}\n@cache\ndef f():\n    'print assert'\n    return dict(TABLE)\n", "solve"))


def test_every_module_has_its_place():
    assert sorted(SOURCES) == sorted(ORDER), "add a new module to ORDER, after the last that it imports"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_only(module):
    below = ORDER[: ORDER.index(module)]
    up = [name for name in imports(SOURCES[module]) if name not in below]
    assert not up, f"{module} imports {up}, which do not stand before it in ORDER"


def test_the_import_graph_was_seen():
    edges = {(module, name) for module in SOURCES for name in imports(SOURCES[module])}
    assert {("solve", "geometry"), ("model", "capture"), ("model", "assets"), ("editor", "bilevel"), ("cli", "metake"), ("report.figure", "report.files"), ("metake", "methods")} <= edges
    assert ("model", "metake") not in edges and len(edges) > 80


def test_the_mathematics_needs_torch_alone_and_reports_need_no_model():
    own = {"__future__", "collections", "dataclasses", "functools", "typing", "metake"}
    assert (top_packages(SOURCES["geometry"]) | top_packages(SOURCES["solve"])) - own == {"torch"}
    assert not top_packages(SOURCES["update"]) & {"transformers", "numpy", "pandas"}
    assert not {"torch", "transformers"} & {p for m in SOURCES if m.startswith("report") for p in top_packages(SOURCES[m])}


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_short_and_hides_nothing(module):
    assert len(SOURCES[module].splitlines()) <= FILE
    assert not list(flaws(SOURCES[module], module))


def test_a_method_is_a_few_lines():
    tree = ast.parse(SOURCES["methods"])
    lengths = {n.name: length(n) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in METHODS}
    assert lengths.keys() == METHODS.keys() and max(lengths.values()) <= METHOD


def test_nothing_is_written_twice():
    windows = Counter()
    for source in SOURCES.values():
        lines = [line for raw in source.splitlines() if (line := raw.strip()) and not line.startswith(("#", "import ", "from "))]
        windows.update("\n".join(lines[i : i + 6]) for i in range(len(lines) - 5))
    repeated = {window: count for window, count in windows.items() if count > 1}
    assert sum(repeated.values()) < 0.01 * windows.total(), "\n\n".join(repeated)
