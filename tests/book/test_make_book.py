"""`make book` as it stands in the Makefile, on pages that take no time: side by side, interrupted, gone on with."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, on a machine with much else to do
PAGE = f"""
import os, time
from pathlib import Path

def wait(*names):
    end = time.time() + {PATIENCE}
    while not all((Path("../met") / name).exists() for name in names):
        assert time.time() < end, names
        time.sleep(0.05)

(Path("../met") / "{{name}}").write_text(f"{{{{os.getpid()}}}} {{{{os.environ['OMP_NUM_THREADS']}}}}")
wait({{others}})
"""
PAGES = {"one": ["two"], "two": ["one"], "slow": ["word"]}  # page → what it waits for; none gives the word
RAN = Path("_build/notebooks-run")


@pytest.fixture
def checkout(tmp_path):
    """A folder with this Makefile, pages of one cell each, papermill, and a program in the place of jupyter-book."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("notebooks", "met", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name, others in PAGES.items():
        cell = nbformat.v4.new_code_cell(PAGE.format(name=name, others=", ".join(map(repr, others))))
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / f"{name}.ipynb")
    (tmp_path / ".venv/bin/papermill").symlink_to(Path(sys.executable).with_name("papermill"))
    (tmp_path / ".venv/bin/jupyter-book").symlink_to(shutil.which("true"))
    database = subprocess.run(["make", "-pn"], cwd=tmp_path, capture_output=True, text=True).stdout
    (stamp,) = (line.split()[-1] for line in database.splitlines() if line.startswith("STAMP := "))
    (tmp_path / stamp).touch()
    return tmp_path


def make(folder: Path) -> subprocess.Popen:
    """`make book` in a process group of its own, as a terminal starts it."""
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        return subprocess.Popen(
            ["make", "book", f"CORES={len(PAGES)}"], cwd=folder, start_new_session=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    finally:
        signal.signal(signal.SIGINT, heard)


def wait(met, what: str) -> None:
    end = time.time() + PATIENCE
    while not met():
        assert time.time() < end, what
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_pages_run_side_by_side_and_ctrl_c_leaves_whole_pages_only(checkout):
    first = make(checkout)
    finished = [checkout / RAN / f"{name}.ipynb" for name in ("one", "two")]
    try:
        wait(lambda: all(file.exists() for file in [*finished, checkout / "met/slow"]) or first.poll(), "side by side")
        assert first.poll() is None, first.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGINT)
        first.communicate(timeout=PATIENCE)
    pid, threads = map(int, (checkout / "met/slow").read_text().split())
    assert threads == 1 and first.returncode
    wait(lambda: not runs(pid), "the kernel's end")
    assert all(file.exists() for file in finished) and not (checkout / RAN / "slow.ipynb").exists()

    (checkout / "met/word").touch()
    second = make(checkout)
    said, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    assert [line for line in said.splitlines() if line.startswith("running ")] == ["running notebooks/slow.ipynb"]
    assert said.endswith(f"The book: {checkout}/_build/html/index.html\n")
    assert sorted(file.name for file in (checkout / RAN).iterdir()) == sorted(f"{name}.ipynb" for name in PAGES)
