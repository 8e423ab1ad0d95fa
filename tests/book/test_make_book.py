"""`make book` as it stands in the Makefile, on pages that take no time: side by side, interrupted, gone on with."""

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.connect import LocalPortCache

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

OWN = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
"""The environment without what `make test`, which runs this, hands down to a make of its own."""


@pytest.fixture
def checkout(tmp_path):
    """A folder with this Makefile, pages of one cell each, and a program that does nothing in jupyter-book's place."""
    for name in ("notebooks", "met", "tools", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-grid.txt", "pyproject.toml", "tools/run_page.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, others in PAGES.items():
        cell = nbformat.v4.new_code_cell(PAGE.format(name=name, others=", ".join(map(repr, others))))
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / f"{name}.ipynb")
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv/bin/jupyter-book").symlink_to(shutil.which("true"))
    database = subprocess.run(["make", "-pn"], cwd=tmp_path, env=OWN, capture_output=True, text=True).stdout
    (stamp,) = (line.split()[-1] for line in database.splitlines() if line.startswith("STAMP := "))
    (tmp_path / stamp).touch()
    return tmp_path


def make(folder: Path) -> subprocess.Popen:
    """`make book` in a process group of its own, as a terminal starts it."""
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        return subprocess.Popen(
            ["make", "book", f"CORES={len(PAGES)}"], cwd=folder, env=OWN, start_new_session=True, encoding="utf-8",
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


def test_a_kernel_whose_port_was_taken_is_started_again(tmp_path, monkeypatch):
    taken, ask, asked = socket.socket(), LocalPortCache.find_available_port, []
    taken.bind(("127.0.0.1", 0))
    taken.listen()

    def first_one_that_is_taken(self, ip):
        asked.append(ip)
        return taken.getsockname()[1] if len(asked) == 1 else ask(self, ip)

    monkeypatch.setattr(LocalPortCache, "find_available_port", first_one_that_is_taken)
    monkeypatch.syspath_prepend(ROOT / "tools")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("6 * 7")]), tmp_path / "page.ipynb")
    with taken:
        importlib.import_module("run_page").run(tmp_path / "page.ipynb", tmp_path / "out.ipynb")
    (output,) = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    assert output.data["text/plain"] == "42" and len(asked) >= 10  # five ports a start; another test may take one too
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "page.ipynb")
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        importlib.import_module("run_page").run(tmp_path / "page.ipynb", tmp_path / "out.ipynb")
