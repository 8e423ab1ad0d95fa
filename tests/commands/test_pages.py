"""The pages as commands: what a user mistypes is answered in one sentence, and runs keep out of each other's way."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from metake import report
from metake.commands import pages
from metake.commands.cli import main
from metake.experiments.parameters import accept, own_word
from metake.support.errors import MetakeError, ParameterError

NOTEBOOKS = sorted(path.stem for path in pages.folder().glob("*.ipynb"))
# one edit, given by name; and none, nor a model: keys drawn in the plane
WITHOUT_EDITS = {"quickstart", "geometry_of_beta"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAKE_RUN", "")


@pytest.fixture
def asked(capsys):
    """Run `metake figure ...`; gives exit code, standard output and standard error."""

    def call(*words):
        code = main(["figure", *words])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for papermill: keeps what it was asked for and what a kernel would inherit;
    writes what a page writes.
    """
    calls = []

    def execute(source, target, parameters, **_):
        found = {name: os.environ.get(name) for name in ("METAKE_FIGURES", "METAKE_VERDICTS")}
        calls.append((Path(source).name, Path(target), parameters, found))
        Path(target).write_text("{}")
        verdict = Path(found["METAKE_VERDICTS"]) / f"{Path(source).stem}.json"
        verdict.parent.mkdir(exist_ok=True)
        verdict.write_text(json.dumps({"verdict": "holds", "claim": "c", "decided_by": f"{parameters}"}))

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return calls


def failing(ename, evalue):
    def execute(source, target, parameters, **_):
        Path(target).write_text("{}")
        raise PapermillExecutionError(1, 2, "source", ename, evalue, [])

    return execute


# What is refused before anything runs


@pytest.mark.parametrize(("words", "said"), {
    "atenuation": "unknown page 'atenuation'. Did you mean 'attenuation'",
    "ablation -p edit=3": "unknown parameter of this page 'edit'. Did you mean 'edits'? Known: edits, model, seeds.",
    "ablation -p edits=many": "edits must be a whole number, such as 12; found 'many'",
    "ablation -p edits=2.5": "edits must be a whole number",
    "ablation -p seeds=0,x": "seeds must be a whole number, such as 0; found 'x'",
    "ablation -p n_edits=x": "edits must be a whole number",
    "ablation -p edits": "expected name=value, found 'edits'",
    "quickstart -p n_edits=3": "unknown parameter of this page 'n_edits'",
    "ablation --modle tiny": "no option '--modle'. Did you mean --model?",
    "ablation --out here": "here exists and holds no page's run; name another folder with --out",
}.items())  # fmt: skip
def test_what_is_mistyped_is_answered_in_one_sentence(asked, kernel, tmp_path, words, said):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    code, out, err = asked(*words.split())
    assert code == 2 and not out and err.count("\n") == 1 and said in err
    assert not kernel and [p.name for p in tmp_path.rglob("*")] == ["here", "mine.txt"]


def test_pages_are_listed_with_their_titles(asked):
    code, out, _ = asked("--list")
    lines = [re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines()]
    assert (
        code == 0
        and [name for name, _ in lines] == NOTEBOOKS
        and all(title and not title.startswith("#") for _, title in lines)
    )


def test_without_a_checkout_the_error_says_where_the_pages_are(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "__file__", str(tmp_path / "site-packages" / "metake" / "commands" / "pages.py"))
    with pytest.raises(ParameterError, match="not in the installed package; clone the repository"):
        pages.titles()


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_every_page_has_a_model_and_takes_the_common_word_for_its_edits(page):
    usual = pages.defaults(page)
    assert usual.get("model") == (None if page == "geometry_of_beta" else "tiny")
    if page in WITHOUT_EDITS:
        with pytest.raises(ParameterError, match="unknown parameter of this page 'n_edits'"):
            own_word("n_edits", usual)
    else:
        own = own_word("n_edits", usual)
        assert own in ("edits", "requests", "pool") and type(usual[own]) is int


# What runs


def test_a_page_runs_with_typed_values_in_a_folder_of_its_own(asked, kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("METAKE_FIGURES", "mine")
    code, out, _ = asked(
        "main_comparison", "--model", "m/x", "--out", "a", "-p", "n_edits=50", "-p", "seeds=0, 2", "-p",
        "methods=[memit, 'blue']"
    )
    values = {"model": "m/x", "edits": 50, "seeds": [0, 2], "methods": ["memit", "blue"]}
    assert code == 0 and out == f"holds: c\ndecided by: {values}\nwrote a\n"
    folder = tmp_path / "a"
    assert kernel == [
        (
            "main_comparison.ipynb", folder / "main_comparison.ipynb", values,
            {"METAKE_FIGURES": str(folder / "figures"), "METAKE_VERDICTS": str(folder / "verdicts")}
        )
    ]
    assert (
        os.environ["METAKE_FIGURES"] == "mine"
        and "METAKE_VERDICTS" not in os.environ
        or os.environ["METAKE_VERDICTS"] != str(folder / "verdicts")
    )
    assert (
        json.loads((folder / "parameters.json").read_text())["parameters"] == pages.defaults("main_comparison") | values
    )


def test_the_same_run_renews_its_folder_and_another_is_refused(asked, kernel):
    assert (
        asked("ablation")[0] == asked("ablation")[0] == 0
        and kernel[0] == kernel[1]
        and kernel[0][1].parent.name == "ablation"
    )
    for words in (("ablation", "-p", "edits=3"), ("convergence", "--out", "runs/ablation")):
        code, _, err = asked(*words)
        assert code == 2 and "holds a run of ablation with other parameters; name another folder with --out" in err
    assert len(kernel) == 2


def test_what_a_page_says_of_a_value_is_the_answer(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(
        papermill, "execute_notebook",
        failing("ParameterError", "edits must be a whole number from 2 to 600; found 1")
    )
    assert asked("ablation", "-p", "edits=1") == (
        2, "", "metake: error: edits must be a whole number from 2 to 600; found 1\n"
    )
    assert not list((tmp_path / "runs").iterdir())


def test_a_page_that_breaks_leaves_its_traceback_and_says_where(monkeypatch, tmp_path):
    monkeypatch.setattr(papermill, "execute_notebook", failing("KeyError", "'gamma'"))
    with pytest.raises(
        MetakeError, match=r"the page ablation failed: KeyError: 'gamma'. See the traceback in .*ablation\.ipynb"
    ):
        pages.figure("ablation", "a")
    assert (tmp_path / "a" / "ablation.ipynb").is_file()


def test_runs_by_hand_do_not_overwrite_each_other(monkeypatch):
    monkeypatch.delenv("METAKE_FIGURES", raising=False)
    folders = []
    for edits in (3, 4, 3):
        accept({"edits": edits, "model": "tiny"}, edits=(int, 2, 9), model=str)
        folders.append(report.figures_dir())
    assert folders[0] == folders[2] != folders[1] and folders[0].parent == folders[1].parent
    monkeypatch.setenv("METAKE_FIGURES", "figures")
    assert report.figures_dir().name == "figures", "a folder that is named is the folder"


@pytest.mark.parametrize(("given", "said"), [
    ({"edits": 3, "edit": 2}, "unknown parameter of this page 'edit'. Did you mean 'edits'"),
    ({"edits": "3"}, "edits must be a whole number from 2 to 9; found '3'"),
    ({"edits": True}, "edits must be a whole number from 2 to 9; found True"),
    ({"edits": 1}, "edits must be a whole number from 2 to 9; found 1"),
    ({"n_edits": 10}, "edits must be a whole number from 2 to 9; found 10"),
    ({"edits": 3, "seeds": 0}, "seeds must be a list; found 0 (for papermill: -y 'seeds: [0, 1]')"),
    ({"edits": 3, "seeds": [0, "1"]}, "seeds must be one or more whole numbers; found [0, '1']"),
    ({"edits": 3, "seeds": []}, "seeds must be one or more whole numbers"),
    ({"edits": 3, "model": 5}, "model must be a text; found 5"),
    ({"edits": 3, "methods": ["memti"]}, "unknown methods 'memti'. Did you mean 'memit'"),
    ({"edits": 3, "methods": []}, "methods must name at least one of: memit, rome"),
])  # fmt: skip
def test_a_page_refuses_what_it_does_not_take(given, said):
    usual = {"edits": 3, "model": "tiny", "seeds": [0], "methods": ["memit"]}
    with pytest.raises(ParameterError) as refused:
        accept(usual | given, edits=(int, 2, 9), model=str, seeds=list, methods=["memit", "rome"])
    assert said in str(refused.value)


def test_the_common_word_becomes_the_pages_own():
    for own in ("edits", "requests"):
        namespace = {own: 3, "n_edits": 5}
        assert accept(namespace, **{own: (int, 2, 9)}) == namespace == {own: 5}


def test_papermill_as_a_user_runs_it(tmp_path):
    """From another folder, with the issue's own words; then with a value out of range, which the first cells refuse."""
    kept = {k: v for k, v in os.environ.items() if k not in ("METAKE_FIGURES", "METAKE_VERDICTS", "METAKE_RUN")} | {
        "OMP_NUM_THREADS": "1"
    }
    small = "-p n_edits 3 -p trials 8 -p restarts 8 -p steps 10".split()
    call = [
        sys.executable, "-m", "papermill", str(pages.folder() / "attenuation.ipynb"), "out.ipynb", "--no-progress-bar",
        "-k", "python3"
    ]
    done = subprocess.run([*call, *small], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (drawn,) = tmp_path.glob("_build/figures/*/attenuation.csv")
    assert drawn.read_text().count("\n") > 3 and list(tmp_path.glob("_build/verdicts/*/attenuation.json"))
    wrong = subprocess.run(
        [*call, *small, "-p", "trials", "1"], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=600
    )
    assert wrong.returncode and wrong.stderr.rstrip().splitlines()[-1].endswith(
        "ParameterError: trials must be a whole number from 8 to 100000; found 1"
    )
    assert list(tmp_path.glob("_build/figures/*/attenuation.csv")) == [drawn]
