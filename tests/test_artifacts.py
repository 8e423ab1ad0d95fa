"""What each release has written opens forever, with equal numbers: edit, run, statistics, adapter, recording."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import metake as mk
from metake.algebra.update import Edit
from metake.editing import statistics as key_statistics
from metake.editing.editor import Editor
from metake.experiments import runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import freeze  # noqa: E402

PLACE = Path(__file__).parent / "artifacts"
VERSIONS = sorted(folder.name for folder in PLACE.iterdir())


@pytest.fixture(params=VERSIONS)
def opened(request, tmp_path, monkeypatch):
    """A copy of a release's files, as the working directory."""
    folder = shutil.copytree(PLACE / request.param, tmp_path / "artifacts")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("METAKE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(runs, "load", lambda *_: freeze.base("tiny"))
    return folder


def test_a_release_s_files_are_few_and_each_release_has_its_own():
    for version in VERSIONS:
        assert sum(p.stat().st_size for p in (PLACE / version).rglob("*") if p.is_file()) < 300_000
    assert mk.__version__ in VERSIONS, "freeze what this version writes: python tools/freeze.py"


def test_the_numbers_are_the_same(opened):
    expected, found = json.loads(Path("numbers.json").read_text("utf-8")), freeze.numbers()
    assert found.keys() == expected.keys()
    for name in ("edit", "batches", "requests", "layer", "count"):
        assert found[name] == expected[name], name
    assert found["metrics"].items() >= expected["metrics"].items(), "a later version may tell more"
    for name in ("plain", "edited", "spectrum", "sum"):
        assert found[name] == pytest.approx(expected[name], abs=2e-5, rel=1e-9), name
    assert expected["plain"] != pytest.approx(expected["edited"], abs=1e-3)
    assert str(found["recorded"]) == str(expected["recorded"])  # NaN is not equal to itself


def test_a_finished_run_goes_on_without_computing_anything(opened, monkeypatch):
    for place, name in ((key_statistics, "stream"), (Editor, "step")):
        monkeypatch.setattr(place, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    before = {p: p.read_bytes() for p in Path("run/batches").rglob("*") if p.is_file()}
    expected = json.loads(Path("numbers.json").read_text("utf-8"))["metrics"]
    assert len(before) == 6 and runs.run(freeze.CONFIG, "run").metrics.items() >= expected.items()
    assert before == {p: p.read_bytes() for p in before}


def test_the_adapter_attached_is_the_edit_applied(opened):
    from peft import PeftModel

    lm = freeze.base()
    with Edit.load("edit").applied(lm):
        edited = freeze.logits(lm)
    assert freeze.logits(lm, PeftModel.from_pretrained(lm.model, "adapter")) == pytest.approx(edited, abs=2e-5)
