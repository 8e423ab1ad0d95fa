"""Every command that the README, the book or the line under a figure prints: whole, understood by the program that it
names, and, one of each kind, run as it is printed, on a small random model.
"""

import importlib
import json
import re
import shlex
from functools import partial
from itertools import takewhile
from pathlib import Path

import click
import papermill
import papermill.cli
import pytest
import yaml
from models import stand_in

import metake as mk
from metake.commands import cli, pages
from metake.data.facts import facts_records
from metake.editing.statistics import statistics
from metake.experiments import asking, contract, former, runs
from metake.experiments.studies import layers, quickstart, study, text_needed

ROOT = Path(__file__).resolve().parents[2]
PROSE = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FENCED = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = ("metake", "papermill", "make", "python", "python3", "snakemake", "pip", "mkdir", "cd", "git")
INLINE = re.compile(rf"`((?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})(?: [^`]+)?)`")
STANDS_FOR = {
    "MODEL": "tiny", "FILE": "facts", "DIR": "folder", "RUN": "folder", "NAME": "memit", "…": "memit",
    "my/model": "tiny"
}
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b(?!=)|…|<\w")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


class Refused(Exception):
    """What a parser says of words that it does not take."""


def text(path):
    if path.suffix == ".md":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def lines(block):
    """The commands of a block, as lists of words."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace(";", " && "), comments=True)
        while words:
            one = [*takewhile(lambda word: word != "&&", words)]
            words = words[len(one) + 1 :]
            yield one


def fenced():
    return [(path.name, one) for path in (*PROSE, *NOTEBOOKS) for b in FENCED.findall(text(path)) for one in lines(b)]


def inline():
    return [(path.name, one) for path in (*PROSE, *NOTEBOOKS) for line in INLINE.findall(text(path))
            for one in lines(line)]  # fmt: skip


@pytest.fixture(scope="module")
def furniture():
    """What stands under the figures and tables, and at the end of the pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        made, stamp = importlib.import_module("furniture"), importlib.import_module("stamp")
    pages_of = [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    own = [made.papermill(page, stamp.parameters(stamp.defaults(ROOT, page))) for page in pages_of]
    own += [stamp.record_command(ROOT, file.stem) for file in (ROOT / "results").glob("*.jsonl")]
    return [("furniture", one) for block in own for one in lines(block)]


def understood(words, whole=True):
    """Fails for words that the program does not take; whole: nothing that it needs is left out."""
    program, rest = Path(words[0]).name, words[1:]
    if not rest and not whole:
        return
    if program == "metake":
        if rest[-1] == "--help":
            rest = rest[:-1]
            whole = False
        if not rest or not whole and len(rest) == 1:
            assert not rest or rest[0] in [name for name, *_ in cli.COMMANDS]
            return
        try:
            given = cli._parser().parse_args(rest)
        except Refused as refused:
            assert not whole and "are required" in str(refused), refused
            return
        if given.command == "figure" and given.name:
            assert {parameter for parameter, _ in given.p} <= known(given.name)
    elif program == "papermill":
        if rest[0] == "--help-notebook":
            assert (ROOT / rest[1]).is_file()
            return
        given = papermill.cli.papermill.make_context("papermill", list(rest)).params
        assert (ROOT / given["notebook_path"]).is_file()
        asked = {name for name, _ in given["parameters"]}
        asked |= {name for entry in given["parameters_yaml"] for name in yaml.safe_load(entry)}
        assert asked <= known(Path(given["notebook_path"]).stem)
    elif program == "make":
        for word in rest:
            name, value, _ = word.partition("=")
            target = re.search(rf"^{re.escape(word)}:", MAKEFILE, re.MULTILINE)
            assert f"$({name})" in MAKEFILE if value else target or re.fullmatch(r"-j\d*", word), word
    elif program in ("python", "python3"):
        assert not rest or (ROOT / rest[0]).is_file() or rest[0] == "-m"
    elif program == "snakemake":
        assert "--profile" not in rest or (ROOT / rest[rest.index("--profile") + 1]).is_dir()
    else:
        assert program in PROGRAMS, program


def known(page):
    return {*pages.defaults(page), "n_edits"}


@pytest.fixture
def own_words(monkeypatch):
    def error(_, message):
        raise Refused(message)

    monkeypatch.setattr(cli.Parser, "error", error)


def test_the_collection_is_not_empty(furniture):
    assert len(fenced()) > 40 and len(inline()) > 20 and len(furniture) > 60


def test_printed_blocks_are_whole_and_understood(own_words):
    installed = ("metake", "papermill", "snakemake", "pip")
    for place, words in fenced():
        assert not PLACEHOLDER.search(" ".join(words)), (place, words)
        assert Path(words[0]).name not in installed or words[0].startswith(".venv/bin/"), (place, words)
        understood([STANDS_FOR.get(word, word) for word in words])


def test_commands_in_sentences_are_understood(own_words):
    for _, words in inline():
        understood([STANDS_FOR.get(word, word) for word in words], whole=False)


def test_what_stands_under_a_figure_is_whole_and_understood(furniture, own_words):
    for place, words in furniture:
        assert not PLACEHOLDER.search(" ".join(words)), (place, words)
        understood(words)


@pytest.mark.parametrize("wrong", [
    "metake run --modle tiny", "metake figure attenuation -p trails=3", "make bok", "make book COERS=2",
    "papermill notebooks/attenuation.ipynb a.ipynb -p trails 3", "python tools/record.py", "mkae book",
])  # fmt: skip
def test_a_mistyped_command_is_noticed(wrong, own_words):
    with pytest.raises((AssertionError, click.exceptions.ClickException, mk.MetakeError)):
        understood(shlex.split(wrong))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The library on a small random model under every name, with little text, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for module in (mk, runs, asking, contract, layers):
        monkeypatch.setattr(module, "load", stand_in, raising=False)
    for module in (mk, former, layers):
        monkeypatch.setattr(module, "statistics", partial(statistics, tokens=1500))


def printed(command):
    """The first printed command of a kind, without the program."""
    kind = command.split()
    found = [words[1:] for _, words in (*fenced(), *inline()) if [Path(words[0]).name, *words[1:]][: len(kind)] == kind]
    longest = max(found, key=len)
    return [STANDS_FOR.get(word, word) for word in longest]


@pytest.mark.parametrize(("kind", "says"), [
    ("metake plan", "keys remembered"), ("metake methods", "metake"), ("metake figure --list", "attenuation"),
])  # fmt: skip
def test_a_command_that_only_tells_runs_as_printed(metake, kind, says):
    code, out, err = metake(*printed(kind))
    assert code == 0 and not err and says in out.lower()


def test_an_edit_runs_as_printed(metake, small):
    code, out, err = metake(*printed("metake edit"), "--method", "memit", "--text-tokens", "1500")
    assert code == 0 and not err and "wrote runs/first" in out


def test_a_run_is_made_as_printed(metake, small):
    words = printed("metake run --model")
    sizes = ("--edits", "2", "--batch", "1", "--text-tokens", "1500", "--layers", "0", "1")
    code, out, err = metake(*words, "--method", "memit", *sizes)
    assert code == 0 and "wrote runs/mine" in out, err
    code, out, err = metake("eval", "runs/mine", *printed("metake eval RUN --ask free")[2:])
    assert code == 0 and "free" in out, err


def test_a_page_runs_as_printed(metake, monkeypatch, tmp_path):
    """Up to the kernel, which test_pages.py starts once."""
    asked = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda page, out, given, **_: asked.append((page.stem, given)))
    for _, words in fenced():
        if words[:2] == [".venv/bin/metake", "figure"]:
            (folder := tmp_path / str(len(asked))).mkdir()
            monkeypatch.chdir(folder)
            assert metake(*words[1:])[0] == 0
    assert ("attenuation", {"seed": 1}) in asked and len(asked) > 4


def test_a_method_is_trained_as_printed(metake, small):
    sizes = ("--steps", "1", "--edits", "2", "--holdout", "2")
    code, out, err = metake(*printed("metake train malmen"), *sizes)
    assert code == 0 and "wrote folder" in out, err


def test_a_model_is_checked_and_its_layers_told_as_printed(metake, small):
    code, out, err = metake(*printed("metake check"), "--layers", "0", "1")
    failed = [line.split("  ")[0] for line in out.splitlines() if line.startswith("fail")]
    assert code == len(failed) and len(failed) <= 1, out + err  # an edit need not take in a random model
    assert "pass       exactly restored" in out and Path("check.json").is_file()
    code, out, err = metake(*printed("metake layers"), "--edits", "2", "--width", "1", "--last", "1")
    assert code == 0 and "layers" in out, err


def test_a_bench_is_made_as_printed(metake, small):
    small_sizes = ("--model", "tiny", "--edits", "2", "--steps", "1", "--literal", "1")
    code, out, err = metake(*printed("metake bench"), *small_sizes)
    assert code == 0 and not err and "literal" in out and Path("runs/bench.json").is_file()


@pytest.mark.parametrize(("name", "methods"), [
    ("quickstart", ()), ("realized", ("--methods", "memit")), ("sequences", ("--methods", "memit")), ("text", ()),
    ("ablation", ()),
])  # fmt: skip
def test_a_recording_is_made_as_printed(metake, small, monkeypatch, name, methods):
    """On data files of the printed names; what it leaves prints the command that made it."""
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    stamp = importlib.import_module("stamp")
    for module in (quickstart, study, text_needed):
        monkeypatch.setattr(module, "load", stand_in)
    [words] = lines(stamp.record_command(ROOT, f"{name}-smollm2-135m"))
    for option, content in (
        ("--counterfact", json.dumps(facts_records())), ("--zsre", json.dumps(facts_records("zsre"))),
        ("--text", (ROOT / "tests" / "models.py").read_text("utf-8")),
    ):  # fmt: skip
        if option in words:
            Path(words[words.index(option) + 1]).write_text(content, "utf-8")
    sizes = ["--edits", "4", "--batch", "2", "--text-tokens", "1500", "--model", "tiny"]
    code, out, err = metake(*words[1:], *sizes, "--layers", "0", "1", *methods)
    assert code == 0 and f"wrote results/{name}-tiny.jsonl" in out, err
    again = shlex.split(stamp.record_command(Path(), f"{name}-tiny"))
    given, made = (vars(cli._parser().parse_args(line[1:])) for line in ([*words, *sizes], again))
    same = ["model", "only", "counterfact", "zsre", "text", "text_tokens", *["edits"] * (name in stamp.SIZED)]
    assert [made[one] for one in same] == [given[one] for one in same]
