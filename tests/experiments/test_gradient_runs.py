"""Runs of the gradient family: resumable, without key statistics, and their trained editors are told apart."""

from __future__ import annotations

import json

import pytest

from metake.editing import statistics
from metake.experiments import saved
from metake.experiments.runs import RunConfig, reevaluate, run
from metake.support.errors import ParameterError

CONFIG = RunConfig(method="ultraedit", edits=7, batch=3, seed=1, changes={})


@pytest.fixture(autouse=True)
def _no_statistics(monkeypatch):
    monkeypatch.setattr(statistics, "documents", lambda *_: pytest.fail("a text was read for key statistics"))


def scores(folder) -> list[str]:
    return (folder / "cases.jsonl").read_text().splitlines()


def test_a_run_goes_on_with_the_moments_that_live_on(tmp_path, monkeypatch):
    """Of an edit, all edits before it are remembered: resumed, they must be what they were."""
    whole = run(CONFIG, tmp_path / "whole")
    right, calls = saved.save_tensors, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(saved, "save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "batches").glob("[0-9]*"))) == 1
    monkeypatch.setattr(saved, "save_tensors", right)
    assert run(CONFIG, tmp_path / "parts").metrics == whole.metrics
    assert scores(tmp_path / "parts") == scores(tmp_path / "whole")
    for number in range(3):
        place = f"batches/{number:04d}/edit.safetensors"
        assert (tmp_path / "parts" / place).read_bytes() == (tmp_path / "whole" / place).read_bytes()
    assert reevaluate(tmp_path / "parts").metrics == whole.metrics
    with pytest.raises(ParameterError, match="another changes"):
        run(RunConfig(method="ultraedit", edits=7, batch=3, seed=1, changes={"modules": []}), tmp_path / "parts")
    told = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert {"slopes", "solve"} <= set(told["seconds"])
