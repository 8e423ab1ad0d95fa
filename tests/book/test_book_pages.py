"""The book's prose and its reference pages: what they name exists, what they show is the code's own,
what they include runs.
"""

import ast
import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from models import stand_in
from sphinx.errors import ExtensionError
from test_layers import ROOMS

import metake as mk
from metake.commands import cli
from metake.data.facts import facts
from metake.editing import recipes
from metake.editing.statistics import statistics
from metake.experiments import contract

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
PAGES = sorted(BOOK.glob("*.md"))


@pytest.fixture(scope="module")
def reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BOOK / "_ext"), *sys.path])
        yield importlib.import_module("metake_reference")


def test_the_landing_page_says_what_each_reading_came_to(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BOOK / "_ext"), *sys.path])
    book = importlib.import_module("metake_book")
    found = book.sentence(book.read_verdicts(ROOT))
    kept = [json.loads(path.read_text("utf-8")) for path in (ROOT / "results/verdicts").glob("does_metake_hold-*.json")]
    assert len(kept) == 3
    for one in kept:
        assert f"{one['title'].removeprefix('MetaKE, ')} {book.SAYS[one['verdict']]}" in found
    changed = [v | {"verdict": "does not hold"} for v in book.read_verdicts(ROOT)]
    assert book.sentence(changed).count("it does not hold") == 3


def listed():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def test_every_page_of_prose_is_in_the_book_once():
    files = listed()
    assert len(files) == len(set(files)) and {f"book/{path.stem}" for path in PAGES} == {
        file for file in files if file.startswith("book/")
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_names_is_there(path):
    """Links to pages, files of the repository in code type, and drawings; what is included is found in the source."""
    text = path.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not link.startswith("#")]
    assert all((path.parent / link).is_file() or (path.parent / f"{link}.md").is_file() for link in links), links
    named = re.findall(r"`((?:metake|tests|tools|results|figures|notebooks|book)/[\w./*-]+)`", text)
    missing = [
        name
        for name in named
        if name not in mk.methods.named() and not (list(ROOT.glob(name)) if "*" in name else (ROOT / name).exists())
    ]
    assert not missing
    for drawing, options in re.findall(r"```\{drawing\} (\w+)\n(.*?)```", text, re.DOTALL):
        assert (BOOK / "drawings" / f"{drawing}.svg").is_file() and len(re.search(r":alt: (.+)", options)[1]) > 80
    for file, options in re.findall(r"```\{literalinclude\} (\S+)\n(.*?)```", text, re.DOTALL):
        name = re.search(r":pyobject: (\S+)", options)[1]
        source = (path.parent / file).read_text("utf-8")
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", source, re.MULTILINE), name


PATH = re.compile(r"(?<![\w/.:-])(?:metake|tests|tools|notebooks|book)/[\w./*-]*[\w*/]")
DOTTED = re.compile(r"(?<![\w/.@-])(?:metake|mk)(?:\.[A-Za-z_]\w*)+")


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module or something in one, a field of a type included."""
    parts, thing = re.sub(r"^mk\b", "metake", dotted).split("."), mk
    for i, part in enumerate(parts[1:], 2):
        if hasattr(thing, "__path__") and importlib.util.find_spec(name := ".".join(parts[:i])):
            thing = importlib.import_module(name)
        elif hasattr(thing, part) or part in getattr(thing, "__dataclass_fields__", ()):
            thing = getattr(thing, part, None)
        else:
            return False
    return True


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_every_path_and_module_in_the_prose_exists(path):
    """In code, in links and in plain words. The change log alone names what was."""
    text = re.sub(r"https?://\S+", "", path.read_text("utf-8"))
    paths = [name for name in PATH.findall(text) if name not in mk.methods.named()]
    assert not [name for name in paths if not list(ROOT.glob(name))]
    assert not [name for name in DOTTED.findall(text) if not resolves(name)]


@pytest.mark.parametrize("path", sorted((ROOT / "metake").rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_docstring_names_by_its_module_exists(path):
    kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text("utf-8"))
    told = "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds))
    assert not [name for name in DOTTED.findall(told) if not resolves(name)]


def test_stale_names_are_seen():
    assert all(map(resolves, ("metake.algebra.solve", "mk.gate", "metake.editing.editor.Editor.step", "metake.solve")))
    assert not any(map(resolves, ("metake.model", "mk.evaluation.read", "metake.algebra.solve.gatee", "mk.Edit.none")))
    assert PATH.findall("`metake/cli.py`, (tests/a/b.py) and tests/editing/.") == [
        "metake/cli.py", "tests/a/b.py", "tests/editing/"
    ]


def test_the_readme_draws_the_package_in_the_order_of_its_imports():
    drawn = re.findall(r"^[├└]── (\S+) +(.+)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "metake").iterdir() if not path.name.startswith("__")}
    names = [name for name, _ in drawn]
    assert sorted(names) == sorted(there) and all(len(comment) > 20 for _, comment in drawn)
    rooms = [name.strip("/").removesuffix(".py") for name in names if name != "recipes.toml"]
    assert rooms == [room for room in reversed(ROOMS) if room != "metake"]


def test_readme_and_library_page_give_the_same_six_files_to_read():
    line = re.compile(r"^(\d)\. (?:\[.+?\]\((\S+)\)|`(\S+)`): (.+)\.$", re.MULTILINE)
    first, second = (
        [(number, link or code, re.sub(r" ?[`$]\w[`$]", "", why)) for number, link, code, why in line.findall(text)]
        for text in ((ROOT / "README.md").read_text("utf-8"), (BOOK / "api.md").read_text("utf-8"))
    )
    assert first == second and "".join(number for number, *_ in first) == "123456"
    assert all((ROOT / file).is_file() for _, file, _ in first)


def test_the_symbols_stand_for_code_that_exists():
    rows = re.findall(r"^\| \$[^|]+\| ([^|]+)\|", (BOOK / "notation.md").read_text("utf-8"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    words = {"keys", "metric", *recipes.recipe("tiny").numbers}
    assert len(rows) > 18
    for name in names:
        thing = mk
        for part in () if name in words else name.split("."):
            fields = getattr(thing, "__dataclass_fields__", {}) | {
                field: None for field in getattr(thing, "_fields", ())
            }
            assert hasattr(thing, part) or part in fields, name
            thing = getattr(thing, part, None)


def test_the_steps_of_the_algorithm_name_code_that_exists():
    text = (BOOK / "method_metake.md").read_text("utf-8")
    rows = re.findall(r"^\| \d \| (.+?) \|$", text, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert names == ["optimize_targets", "Editor._frozen_gate", "gate", "refine", "Editor._write"]
    assert (
        all(callable(getattr(mk, name.partition(".")[0])) for name in names)
        and callable(mk.Editor._frozen_gate)
        and callable(mk.Editor._write)
    )


def test_a_method_and_a_model_are_added_as_the_page_says(monkeypatch):
    """Word for word, on a random model and little text."""
    monkeypatch.setattr(mk, "load", stand_in)
    monkeypatch.setattr(mk, "statistics", partial(statistics, tokens=3000))
    monkeypatch.setattr(mk, "facts", lambda limit: facts(limit=min(limit, 2)))
    monkeypatch.delitem(mk.ARCHITECTURES, "codegen", raising=False)
    blocks = re.findall(r"```python\n(.*?)```", (BOOK / "extend.md").read_text("utf-8"), re.DOTALL)
    method, used, own, slopes, row, closest, asked = blocks
    names: dict = {}
    exec(compile(method, "extend.md", "exec"), names)  # noqa: S102
    assert len(re.search(r"def sparse.*", method, re.DOTALL)[0].splitlines()) <= 8
    exec(compile(used, "extend.md", "exec"), names)  # noqa: S102
    assert names["editor"].refine and names["editor"].post and all(u.dense is not None for u in names["edit"].updates)
    exec(compile(own, "extend.md", "exec"), names)  # noqa: S102
    lm, edit = names["lm"], names["edit"]
    assert (
        edit.record.recipe["metric"] != mk.methods.memit("tiny").metric
        and edit.updates[0].rank == 1
        and edit.updates[0].delta.norm() > 0
    )
    diagonal = 1 / (2000 * names["stats"][edit_layer(edit)].covariance.diagonal()).clamp(min=1e-9)
    right = edit.updates[0].right
    assert (right.sign() != 0).any() and lm.shape(edit.updates[0].module)[1] == right.shape[1] == len(diagonal)
    exec(compile(slopes, "extend.md", "exec"), names)  # noqa: S102
    assert len(names["twice"].networks) == 2 and len(names["twice"].trained["losses"]) == 2
    exec(compile(row, "extend.md", "exec"), names)  # noqa: S102
    assert isinstance(mk.ARCHITECTURES["codegen"], mk.Architecture)
    del mk.ARCHITECTURES["codegen"]  # not by monkeypatch, which would put it back
    exec(compile(closest, "extend.md", "exec"), names)  # noqa: S102
    assert names["editor"].layers == (4, 5, 6)
    monkeypatch.setattr(contract, "load", stand_in)
    monkeypatch.setattr(contract, "ASKED", 1)
    exec(compile(asked, "extend.md", "exec"), names)  # noqa: S102
    assert len(names["report"].results) == len(mk.testing.CHECKS)


def edit_layer(edit):
    return int(re.search(r"\.(\d+)\.", edit.updates[0].module)[1])


# Reference pages


def test_the_library_page_has_every_public_name_once(reference, monkeypatch):
    assert sorted(name for names in reference.groups().values() for name in names) == sorted(mk.__all__)
    monkeypatch.setattr(mk, "__all__", [*mk.__all__, "brand_new"])
    with pytest.raises(ExtensionError, match="brand_new"):
        reference.groups()


@pytest.mark.parametrize("name", mk.__all__)
def test_every_public_name_is_described(reference, name):
    entry = reference.entry(name)
    text = entry.astext()
    assert entry["ids"] and text.startswith(name) and len(text) > len(name) + 30
    if reference.own_docstring(getattr(mk, name)):
        assert reference.own_docstring(getattr(mk, name)).split("\n")[0].replace("`", "")[:60] in text.replace(
            "\n", " "
        )


def test_signatures_are_as_one_would_write_them(reference):
    expected = "attenuation(association: Tensor, noise: float = 1.0) -> Tensor"
    assert reference.signature("attenuation", mk.attenuation) == expected
    assert reference.signature("gate", mk.gate).split("\n")[1:] == [
        "    keys: Tensor,", "    metric: Metric,", "    noise: float = 1.0,", "    at: Tensor | None = None,",
        ") -> Tensor"
    ]
    found = dict((name, line) for name, line, _ in reference.methods_of(mk.LanguageModel))
    assert (
        found["width"] == ".width: int"
        and found["shape"] == ".shape(module: str) -> tuple[int, int]"
        and "<lambda>" not in found["read"]
    )
    assert reference.signature("batches", mk.batches).startswith(
        "batches(requests: "
    ) and "\n    lm: LanguageModel,\n" in reference.signature("refine", mk.refine)


def test_docstrings_keep_their_equations_and_flow_otherwise(reference):
    kinds = [
        type(node).__name__
        for node in reference.described("First line\ngoes on.\n\nM = Q          (eq. 8)\n\nkeys:   rows\nReturns `x`")
    ]
    assert kinds == ["paragraph", "literal_block", "literal_block"]
    assert reference.described("Call `f` now")[0].children[1].astext() == "f"


def test_the_command_page_has_every_option_with_its_meaning(reference):
    found = reference.commands()
    assert list(found) == [name for name, *_ in cli.COMMANDS]
    for parser in found.values():
        rows = reference.options(parser)
        words = {word for row in rows for word in re.findall(r"`(-[-\w]+)`", row[0])}
        assert words == {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        assert all(row[1] and "%(" not in row[1] for row in rows)


def test_the_recipes_page_has_every_number_and_every_source(reference):
    rows = reference.numbers("gpt2-xl")
    assert ["`layers`", "13, 14, 15, 16, 17", "`memit`"] in rows and [
        "`covariance_weight`", "20000.0", "`memit`"
    ] in rows
    used = {row[2].strip("`") for model in ("default", *recipes.models()) for row in reference.numbers(model)}
    assert used <= recipes._table()["sources"].keys()


def test_the_compute_page_reads_the_recordings_and_refuses_damaged_ones(reference, tmp_path):
    there = reference.recordings(ROOT)
    assert [run["name"] for run in there] == sorted(path.stem for path in (ROOT / "results").glob("*.jsonl"))
    assert all(run["minutes"] > 0 and len(reference.recording_row(run)) == 7 for run in there)
    assert all(re.fullmatch(r"(\d{4}-\d\d-\d\d(; )?)+", run["date"]) for run in there)
    there[0] |= {
        "name": "bench-m", "model": "m", "dataset": "counterfact.json sha256:1, facts-zsre sha256:2",
        "statistics": "a.txt, 9 tokens"
    }
    again = ".venv/bin/metake record --only bench --model m --counterfact counterfact.json"
    again += " --text a.txt --text-tokens 9"
    assert reference.stamp.remade("bench-m", there[0]) == again
    (tmp_path / "results").mkdir()
    with pytest.raises(ExtensionError, match="no recorded run"):
        reference.recordings(tmp_path)
    file = tmp_path / "results" / "a-b.jsonl"
    whole = (ROOT / "results" / f"{there[1]['name']}.jsonl").read_text("utf-8")
    head, *rows = whole.splitlines()
    poor = json.loads(head)
    del poor["provenance"]["device"]
    for damaged in (head + "\n", "{", "", "\n".join([json.dumps(poor), *rows])):
        file.write_text(damaged)
        with pytest.raises(ExtensionError, match="damaged or tells too little"):
            reference.recordings(tmp_path)


def test_drawings_take_the_methods_colors_and_speak(reference):
    for path in (BOOK / "drawings").glob("*.svg"):
        svg = reference.drawing(path.read_text("utf-8"), 'what "it" shows')
        assert 'role="img"' in svg and 'aria-label="what &quot;it&quot; shows"' in svg and "{" not in svg
        assert not re.search(r'(fill|stroke)="(black|white|#[0-9a-f]{3,6})"', path.read_text("utf-8")), (
            "a color that one theme hides"
        )
        width = float(re.search(r'viewBox="0 0 (\d+)', svg)[1])
        sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', svg)]
        assert width <= 480 and min(size for size in sizes if size != 11) * 343 / width > 9.5, (
            "readable on a phone; 11 is a subscript"
        )
    with pytest.raises(ExtensionError, match="no method has"):
        reference.drawing("<svg fill='{metakee}'>", "alt")


def test_the_embedded_model_is_as_large_as_its_weights_say(reference):
    card = json.loads((ROOT / "metake" / "data" / "tiny" / "card.json").read_text("utf-8"))
    assert reference.trained_on(ROOT) == f"{card['training']['parameters'] / 1e6:.1f} million parameters"


def test_citation_files_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    page = (BOOK / "data.md").read_text("utf-8")
    assert citation["version"] == mk.__version__ and f"version = {{{mk.__version__}}}" in page
    paper = citation["references"][0]
    assert f"arXiv:{re.search(r'eprint += {(.+?)}', page)[1]}" == paper["identifiers"][0]["value"]
    assert all(person["family-names"] in page for person in paper["authors"])
