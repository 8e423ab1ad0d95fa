"""A run by several processes, as torchrun starts them, is the run of one; killed in the middle, it goes on."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from models import stand_in
from torch import distributed

from metake.commands.cli import main
from metake.experiments import runs
from metake.experiments.processes import divided, first, gathered, place
from metake.support.errors import NumericalError

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["run", "--method", "alphaedit", "--edits", "5", "--batch", "2", "--text-tokens", "3000", "--out"]


def start(count, work):
    """So many processes with what torchrun gives them; each ends with what `work` returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(count):
        if not (pid := os.fork()):
            code = 99
            try:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port
                }
                code = work()
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def end(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def edits(folder):
    return [
        {u.module: u.delta for u in edit.updates} for edit in runs.open_run(folder)[1]
    ]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(runs, "load", stand_in)


def test_two_processes_make_the_run_of_one_also_after_a_kill(quick, tmp_path, capfd):
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert main([*WORDS, str(alone)]) == 0
    capfd.readouterr()
    pids = start(2, lambda: main([*WORDS, str(two)]))
    for _ in range(3000):
        time.sleep(0.01)
        if (two / "batches/0001").is_dir():
            break
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert end(pids) == [-9, -9] and not (two / "summary.json").exists()
    kept = (two / "batches/0000/record.json").stat().st_mtime_ns
    capfd.readouterr()
    assert end(start(2, lambda: main([*WORDS, str(two)]))) == [0, 0]
    assert capfd.readouterr().out.count("wrote ") == 1, "one of them tells"
    assert (two / "batches/0000/record.json").stat().st_mtime_ns == kept
    for one, other in zip(edits(alone), edits(two), strict=True):
        for module, delta in one.items():
            assert (other[module] - delta).norm() <= 1e-9 * delta.norm() and delta.norm() > 0
    for name in ("before.jsonl", "cases.jsonl"):
        own, others = ([json.loads(line) for line in (f / name).read_text().splitlines()] for f in (alone, two))
        assert [row["id"] for row in own] == [row["id"] for row in others] and own == others
    told = [json.loads((f / "summary.json").read_text()) for f in (alone, two)]
    assert told[0]["after"] == told[1]["after"] and told[0]["before"] == told[1]["before"]
    shutil.rmtree(two / "batches/0002")  # and one goes on with what two have made
    (two / "summary.json").unlink()
    assert main([*WORDS, str(two)]) == 0


def work(folder: Path) -> int:
    distributed.init_process_group("gloo")
    own, count = place()
    made = divided(list(range(5)), lambda mine: [(own, 10 * i) for i in mine])
    assert made == [(i % 2, 10 * i) for i in range(5)]
    assert divided([7], lambda mine: [own]) == [0] and divided([], lambda mine: [1 / 0]) == []
    assert first(lambda: own) == 0 and gathered(lambda: torch.tensor(own)) == [0, 1] and count == 2
    try:
        gathered(lambda: (_ for _ in ()).throw(NumericalError("in the second")) if own else None)
    except NumericalError as error:
        (folder / f"{own}").write_text(str(error))
    return 0


def test_each_does_its_part_and_an_error_of_one_is_told_by_all(tmp_path):
    assert place() == (0, 1) and divided([3, 4], lambda mine: mine) == [3, 4] and first(lambda: 5) == 5
    assert end(start(2, lambda: work(tmp_path))) == [0, 0]
    assert {(tmp_path / f"{i}").read_text() for i in range(2)} == {"in the second"}
