"""Killed, or refused by the disk, at any moment: what was there stays or the new is there, and going on gives the same.

`make torture` does the same with ten times as many moments.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pandas as pd
import pytest
from crashes import SCENARIOS, killed_runs, operations, outcome, prepared, strike
from faults import forked, leftovers

from metake import report
from metake.editing import statistics as key_statistics
from metake.experiments.runs import run
from metake.language import assets
from metake.support.errors import MetakeError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_is_interrupted_old_or_new_is_whole(name, tmp_path):
    scenario = SCENARIOS[name]
    done, before, after = operations(scenario, tmp_path / "undisturbed")
    assert len(done) > 3 and (before != after or name == "statistics")
    for at in range(1, len(done) + 1):
        strike(scenario, tmp_path / f"killed{at}", at, "killed", before, after)
    for at in range(1, len(done) + 1, 3):
        for what in ("disk full", "forbidden"):
            strike(scenario, tmp_path / f"{what}{at}", at, what, before, after)


def test_a_run_killed_anywhere_and_resumed_is_the_undisturbed_one(tmp_path, monkeypatch):
    config = prepared(tmp_path, monkeypatch)
    run(config, tmp_path / "undisturbed")
    expected, kills = outcome(tmp_path / "undisturbed"), 0
    assert len([name for name in expected if name.endswith("edit.safetensors")]) == 6
    for folder, told in killed_runs(config, tmp_path, 20, seed=0):
        assert outcome(folder) == expected, told
        kills += len(told.split(", "))
    assert kills >= 20


@pytest.mark.parametrize("name", ["file", "edit", "edit over another"])
def test_the_disk_has_the_content_before_the_name_and_the_name_before_the_call_returns(name, tmp_path):
    done, *_ = operations(SCENARIOS[name], tmp_path / "folder")
    named = next(i for i, one in enumerate(done) if one.startswith(("os.rename a", "exchange a")))
    parts = done[:named], done[named:]
    before, after = ([one.split()[1] for one in part if one.startswith("fsync")] for part in parts)
    written = {one.split()[1] for one in done[:named] if one.startswith(("write", "tensors"))}
    assert written <= set(before) and before[-1].endswith(".partial"), "a folder after what is in it"
    assert after == ["folder"], "the name itself"


# -- two at once


def at_once(act, count: int = 2) -> list[int]:
    """Processes that begin together: the codes with which they end."""
    ready, go = os.pipe(), os.pipe()
    children = []
    for _ in range(count):
        if not (child := os.fork()):
            os.write(ready[1], b".")
            os.read(go[0], 1)
            os._exit(forked(act))
        children.append(child)
    for _ in children:
        os.read(ready[0], 1)
    os.write(go[1], b"." * count)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for end in (*ready, *go):
        os.close(end)
    return codes


def noted(file, act):
    """`act`, which leaves a line in a file each time it begins; one write of one line is never torn."""

    def noting(*given, **more):
        with open(file, "a") as lines:
            lines.write(f"{os.getpid()}\n")
        return act(*given, **more)

    return noting


def test_of_two_runs_in_one_folder_one_is_refused_in_a_line(tmp_path, monkeypatch):
    config = prepared(tmp_path, monkeypatch)

    def act():
        try:
            run(config, tmp_path / "both")
        except MetakeError as refused:
            (tmp_path / "refused").write_text(str(refused))

    run(replace(config, edits=1), tmp_path / "warm")  # statistics are there: the two meet in the run
    run(config, tmp_path / "alone")
    assert at_once(act) == [0, 0]
    assert outcome(tmp_path / "both") == outcome(tmp_path / "alone") and not leftovers(tmp_path)
    assert re.fullmatch(r"another process is at work in .*both; wait for its end, or name another one",
                        (tmp_path / "refused").read_text())  # fmt: skip


@pytest.mark.parametrize("what", ["statistics", "fetch"])
def test_of_two_that_need_the_same_one_waits_and_reads_it(what, tmp_path, monkeypatch):
    place, name = {"statistics": (key_statistics, "stream"), "fetch": (assets, "_seal")}[what]
    monkeypatch.setattr(place, name, noted(tmp_path / "done", getattr(place, name)))
    scenario, folder = SCENARIOS[what], tmp_path / "cache"
    _, _, after = operations(scenario, tmp_path / "alone")
    (tmp_path / "done").unlink()

    def act():
        scenario.act(folder)
        assert scenario.read(folder) == after

    assert at_once(act, 3) == [0, 0, 0]
    assert len((tmp_path / "done").read_text().splitlines()) == 1 and not leftovers(folder)


def test_of_two_that_merge_rows_none_is_lost(tmp_path):
    """Each reads the recording, adds its own row and writes it."""
    SCENARIOS["recording"].prepare(tmp_path)

    def merge(method):
        frame = pd.DataFrame([{"method": method, "score": 3.0}])
        report.merge_recorded("crash", frame, {"model": "tiny", "date": "", "commit": ""}, tmp_path)

    assert at_once(lambda: [merge(f"{os.getpid()}-{i}") for i in range(5)], 3) == [0, 0, 0]
    assert len(report.recorded("crash", tmp_path)) == 2 + 15
