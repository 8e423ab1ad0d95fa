"""`make gpu`: what is finished is kept, nothing is begun that does not fit, and what comes home is a recording."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from metake import report
from metake.experiments import made
from metake.experiments.gpu import box, parts
from metake.experiments.gpu.adopt import adopt
from metake.experiments.gpu.box import DONE, FAILED, KEPT, LEFT_OUT, Unit, carry_out
from metake.experiments.gpu.device import measure
from metake.experiments.speed.beside_paper import beside_paper, line
from metake.experiments.speed.run_time import PLAIN
from metake.support import machine
from metake.support.errors import ParameterError, ProvenanceError

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("gguf", "nltk", "papermill", "ipykernel")  # what the Python of a machine with a GPU may lack
ORIGIN = {"model": "random weights", "commit": "unknown", "source": "s", "date": "2026-11-28", "edits": 100,
          "accelerator": "NVIDIA H200", "dtype": "float32", "device": "cuda"}  # fmt: skip


def later(seconds: float = 1000.0) -> float:
    return time.time() + seconds


def rows(method: str, model: str = "gpt2-xl", seconds: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame([{"model": model, "method": method, "seconds": seconds}])


def unit(method: str, calls: list | None = None, seconds: float = 10.0, model: str = "gpt2-xl", **origin) -> Unit:
    def make():
        if calls is not None:
            calls.append(method)
        return rows(method, model), ORIGIN | origin, "fine"

    return Unit("gpu_bench", {"model": model, "method": method}, seconds, make)


def states(found) -> list[str]:
    return [outcome.state for outcome in found]


def test_what_is_finished_is_kept_and_not_done_again(tmp_path):
    calls = []
    every = [unit("alphaedit", calls), unit("metake", calls), unit("alphaedit", calls, model="llama3-8b")]
    assert states(carry_out(every[:2], tmp_path, later())) == [DONE, DONE]
    assert states(carry_out(every, tmp_path, later())) == [KEPT, KEPT, DONE] and len(calls) == 3
    found = report.recorded("gpu_bench", tmp_path)
    assert found[["model", "method"]].values.tolist() == [
        ["gpt2-xl", "alphaedit"], ["gpt2-xl", "metake"], ["llama3-8b", "alphaedit"]
    ]
    assert sorted(found.made) == [0, 1, 2] and all(part["minutes"] > 0 for part in found.attrs["parts"])
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_bench.jsonl"]


def test_nothing_is_begun_that_does_not_fit_and_what_was_done_corrects_the_guess(tmp_path):
    calls = []
    assert states(carry_out([unit("alphaedit", calls, 50), unit("memit", calls, 5)], tmp_path, later(20))) == [
        LEFT_OUT, DONE
    ], "a smaller one may fit"
    assert calls == ["memit"] and unit("alphaedit", seconds=50).cost(tmp_path) < 1, "it took no time"
    frame, origin = rows("blue"), ORIGIN | {"pace": 3.0}
    box.keep("gpu_bench", frame, origin, tmp_path)
    assert unit("alphaedit", seconds=50).cost(tmp_path) == 150, "the slowest counts"
    (found,) = carry_out([unit("alphaedit", seconds=50)], tmp_path, later(100))
    assert found.state == LEFT_OUT and "takes about 150 s, 100 s are left" in found.line
    assert states(carry_out([unit("alphaedit")], tmp_path, time.time() - 1)) == [LEFT_OUT]


def test_what_raises_is_told_and_the_others_go_on(tmp_path):
    def raising(error):
        def make():
            raise error

        return Unit("gpu_bench", {"model": "gpt2-xl", "method": type(error).__name__}, 1.0, make)

    errors = (RuntimeError("CUDA error\nmore"), torch.OutOfMemoryError("CUDA out of memory"), box.NotHereError("no x"))
    found = list(carry_out([*map(raising, errors), unit("memit")], tmp_path, later()))
    assert states(found) == [FAILED, LEFT_OUT, LEFT_OUT, DONE]
    assert found[0].line.endswith("RuntimeError: CUDA error") and "does not fit into this device's" in found[1].line
    assert list(report.recorded("gpu_bench", tmp_path).method) == ["memit"]
    with pytest.raises(KeyboardInterrupt):
        list(carry_out([raising(KeyboardInterrupt())], tmp_path, later()))


def test_settings_do_not_mix_in_one_folder(tmp_path):
    assert states(carry_out([unit("memit"), unit("blue", edits=50)], tmp_path, later())) == [DONE, FAILED]
    assert list(report.recorded("gpu_bench", tmp_path).method) == ["memit"]


def test_failed_tests_are_run_again(tmp_path):
    outcomes = iter(["failed", "passed"])

    def make():
        frame = pd.DataFrame([{"file": "a.py", "test": "t", "outcome": next(outcomes), "seconds": 0.1, "said": ""}])
        return frame, ORIGIN, "1"

    tests = Unit("gpu_tests", {"file": "a.py"}, 1.0, make)
    assert [states(carry_out([tests], tmp_path, later())) for _ in range(3)] == [[DONE], [DONE], [KEPT]]
    assert list(report.recorded("gpu_tests", tmp_path).outcome) == ["passed"]


# What comes home


@pytest.fixture
def folder(tmp_path) -> Path:
    made_here = tmp_path / "gpu"
    found = carry_out([unit("alphaedit"), unit("metake", source=made.source())], made_here, later())
    assert states(found) == [DONE, DONE]
    box.keep("gpu_device", pd.DataFrame([{"quantity": "copy", "value": 3.0, "unit": "GB/s"}]), ORIGIN, made_here)
    return made_here


def test_what_comes_home_is_a_recording_with_every_rows_provenance(folder, project):
    assert sorted(adopt(folder)) == [
        "wrote results/gpu_bench.jsonl: 2 records", "wrote results/gpu_device.jsonl: 1 records"
    ]
    found = report.recorded("gpu_bench")
    assert list(found.method) == ["alphaedit", "metake"] and found.attrs["label"] == "recorded"
    one, other = found.attrs["parts"]
    assert one["commit"] == "unknown" and other["commit"] == made.commit(), "only of the same source"
    list(adopt(folder))
    assert len(report.recorded("gpu_bench")) == 2
    again = folder.with_name("again")
    list(carry_out([unit("memit"), unit("metake", date="2027-01-01")], again, later()))
    list(adopt(again))
    found = report.recorded("gpu_bench")
    assert sorted(found.method) == ["alphaedit", "memit", "metake"]
    assert found.attrs["parts"][int(found[found.method == "metake"].made.iloc[0])]["date"] == "2027-01-01"


def test_what_does_not_fit_is_refused_and_nothing_is_written(folder, project, tmp_path):
    with pytest.raises(ParameterError, match="holds no recordings"):
        adopt(tmp_path / "nothing")
    list(adopt(folder))
    before = {path.name: path.read_bytes() for path in (project / "results").iterdir()}
    other = folder.with_name("other")
    list(carry_out([unit("memit", accelerator="NVIDIA A100")], other, later()))
    box.keep("gpu_device", pd.DataFrame([{"quantity": "copy", "value": 4.0, "unit": "GB/s"}]), ORIGIN, other)
    with pytest.raises(ParameterError, match="has accelerator 'NVIDIA H200', the new rows 'NVIDIA A100'"):
        adopt(other)
    damaged = other / "gpu_bench.jsonl"
    damaged.write_text(damaged.read_text()[:-20])
    with pytest.raises(ProvenanceError, match="damaged.*make gpu"):
        adopt(other)
    assert {path.name: path.read_bytes() for path in (project / "results").iterdir()} == before


def test_a_batch_stands_beside_the_papers():
    stages = [("targets", 30.0, 600.0), ("keys", 5.0, 100.0), ("evaluation", 9.0, 90.0)]
    records = pd.DataFrame([
        {"model": model, "method": method, "stage": stage, "path": path, "seconds": seconds / scale, "share": 0.5,
         "peak_gib": 40.0}
        for model, scale in (("llama3-8b", 1), ("tiny", 7)) for method in ("alphaedit", PLAIN)
        for stage, *both in stages for path, seconds in zip(("accelerated", "literal"), both, strict=True)
    ])  # fmt: skip
    found = beside_paper(records).set_index(["model", "method"])
    row = found.loc["llama3-8b", "metake"]
    assert (row.here, row.literal, row["literal / here"], row.paper) == (35.0, 700.0, 20.0, 702.51)
    assert row["paper / here"] == pytest.approx(702.51 / 35) and row["GB paper"] == 37.97
    assert found.loc["tiny"].paper.isna().all(), "a size that the paper does not have"
    assert line(beside_paper(records)) == (
        "35.00 s a batch, 700 s on the literal path (20 times), 462.2 s in the paper (13.2 times), Stage I at 50 % of "
        "the matrix product, 40.0 GiB"
    )
    alone = beside_paper(records[records.path == "accelerated"])
    assert alone.literal.isna().all() and "literal" not in line(alone)


# On the machine


def test_the_device_is_measured_and_float32_stays_exact():
    found = measure(torch.device("cpu"), 0.0005, 512, 2**20).set_index("quantity")
    assert (found.value > 0).all() and {"TFLOP/s", "GB/s", "µs", "GiB"} == set(found.unit)
    assert "matrix product, float32 as TF32" in found.index and torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_is_named_with_its_driver(monkeypatch):
    assert machine.accelerator(torch.device("cpu")) == {}
    seen = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 7})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen)
    for text, driver in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build", "550.54.15"), ("", ""),
    ):  # fmt: skip
        monkeypatch.setattr(machine, "_read", lambda _, text=text: text)
        found = machine.accelerator(torch.device("cuda"))
        assert (found["accelerator"], found["driver"], found["float32_products"]) == ("NVIDIA H200", driver, "exact")


def test_what_is_not_there_is_refused_before_anything_runs(tmp_path):
    common = {"folder": tmp_path, "work": tmp_path, "until": later()}
    for wrong, told in (
        ({"counterfact": "no.json"}, "'no.json' is no file"), ({"model": "smollm2-135m"}, "MODEL is a folder")
    ):
        with pytest.raises(ParameterError, match=told):
            parts.Job(**common, **wrong)
    with pytest.raises(ParameterError, match="Did you mean 'bench'"):
        parts.units(parts.Job(**common), "bnech tiny")
    with pytest.raises(ParameterError, match="finds no device of type 'tpu'.*DEVICE=cpu SIZES=tiny"):
        parts.on_device("tpu")
    job = parts.Job(**common)
    box.keep("gpu_comparison-tiny", rows("memit"), job.origin | {"edits": 600}, tmp_path)
    parts.fits(job)
    with pytest.raises(ParameterError, match="gpu_comparison-tiny.jsonl holds 600 edits, not 40: .*OUT="):
        parts.fits(parts.Job(**common, edits=40))
    box.keep("gpu_bench", rows("memit"), ORIGIN, tmp_path)
    with pytest.raises(ParameterError, match="gpu_bench.jsonl was made on NVIDIA H200, not .*OUT="):
        parts.fits(job)


def test_files_that_are_given_are_compared_alone_and_in_full(tmp_path):
    (tmp_path / "zsre.json").write_text("[]")
    common = {"folder": tmp_path, "work": tmp_path, "until": later()}
    assert parts.Job(**common).asked == 600 and list(parts.Job(**common).data) == ["CounterFact", "ZsRE"]
    job = parts.Job(**common, zsre=str(tmp_path / "zsre.json"))
    assert job.asked == 2000 and [unit.whose["dataset"] for unit in parts.units(job, "comparison")] == ["ZsRE"] * 5
    assert parts.units(job, "comparison")[0].recording == "gpu_comparison-tiny"


def test_a_report_of_tests_becomes_records(tmp_path):
    file = tmp_path / "a.xml"
    file.write_text(
        '<testsuites><testsuite><testcase name="fine" time="0.5"/><testcase name="no" time="1"><failure '
        'message="assert 1 == 2">at line 3</failure></testcase><testcase name="later"><skipped message="no peft"/>'
        "</testcase></testsuite></testsuites>"
    )
    found = parts.tests_of(file, "test_a.py").set_index("test")
    assert list(found.outcome) == ["passed", "failed", "skipped"] and found.seconds["fine"] == 0.5
    assert found.said["no"] == "assert 1 == 2\nat line 3" and found.said["later"] == "no peft"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_is_ended_with_all_that_it_started_when_time_is_up(tool, tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    late = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    script.write_text(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {late!r}])\nprint('begun', flush=True)\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(tool, "__file__", str(script))
    log, start = tool.Log(tmp_path / "out"), time.time()
    assert tool.child([], "cpu", start + 2, log) == 0 and time.time() - start < 60
    told = (tmp_path / "out" / "gpu.log").read_text()
    assert "time was up" in told
    time.sleep(max(0.0, start + 5 - time.time()))
    assert not (tmp_path / "late").exists()
    script.write_text("import sys; print('words', sys.argv[1:]); sys.exit(3)")
    assert tool.child(["a"], "cpu", later(), log) == 3 and "words ['a']" in (tmp_path / "out" / "gpu.log").read_text()


def test_the_whole_hour_in_small_without_what_a_gpus_machine_lacks(tmp_path):
    """The command itself, as `make gpu DEVICE=cpu SIZES=tiny` runs it."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n")
    out = tmp_path / "out"
    words = [sys.executable, str(ROOT / "tools" / "gpu.py"), "--device", "cpu", "--sizes", "tiny", "--out", str(out),
             "--work", str(tmp_path / "work"), "--minutes", "30"]  # fmt: skip
    told = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ran = subprocess.run(words, cwd=tmp_path, env=os.environ | told, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in BLOCKED:
        assert f"not here: {name}; it costs" in ran.stdout
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.parent == out and path.stat().st_size < 2**24 for path in files)
    found = {path.stem: report.recorded(path.stem, out) for path in out.glob("*.jsonl")}
    assert set(found) == {"gpu_device", "gpu_bench", "gpu_tests", "gpu_comparison-tiny"}
    assert set(found["gpu_bench"].method) == {"alphaedit", PLAIN} and set(found["gpu_bench"].path) == {
        "accelerated", "literal"
    }
    scores = found["gpu_comparison-tiny"]
    assert set(scores.method) == {"pre-edit", *parts.SCALES["tiny"].methods} and set(scores.dataset) == set(parts.DATA)
    assert not (found["gpu_tests"].outcome == "failed").any() and (found["gpu_tests"].outcome == "passed").sum() > 10
    for frame in found.values():
        head = frame.attrs["provenance"]
        assert {"model", "model_origin", "dataset", "date", "commit", "device", "dtype", "minutes", "versions",
                "processor", "source"} <= head.keys() and head["minutes"] > 0  # fmt: skip
        assert str(tmp_path) not in json.dumps(head)
