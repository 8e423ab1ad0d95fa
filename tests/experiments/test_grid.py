"""The paper's grid: what its cells are, that an engine runs them, and that a killed one is gone on with."""

import importlib.util
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from fork_server import ForkServer
from models import stand_in

from metake import report
from metake.commands.cli import _parser, main
from metake.experiments import grid, made, record, runs, scales
from metake.experiments.grid import Grid, collect
from metake.experiments.scales import SCALES
from metake.experiments.speed import bench, run_time
from metake.experiments.studies import quickstart, study
from metake.experiments.studies.comparison import comparison, summarize
from metake.methods import GRADIENT, METHODS
from metake.support.errors import ParameterError, ProvenanceError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
engine = pytest.mark.skipif(
    not importlib.util.find_spec("snakemake_executor_plugin_slurm"),
    reason="Snakemake and its SLURM plugin are not installed: pip install -r requirements-grid.txt",
)
# of two batches each
EIGHT = {"seeds": [0, 1], "methods": ["memit", "ultraedit"], "edits": 2, "batch": 1, "generate": False}


@pytest.fixture
def quick(monkeypatch):
    """Runs on a model of a few thousand parameters."""
    for module in (runs, made, quickstart):
        monkeypatch.setattr(module, "load", stand_in)


# What the cells are


def test_the_papers_grid_is_the_papers():
    found = Grid.of("paper", {})
    kinds = Counter(cell.words[0] for cell in found.cells.values())
    # Table 1: 11 methods, 3 models, 2 data sets, 3 seeds; Table 4: 4 methods, 2 models
    assert kinds["run"] == 11 * 3 * 2 * 3 + 4 * 2 * 2 * 3
    assert kinds["train"] == 2 * 3 * 2 * 3
    shown = {study.shows for study in found.scale.studies.values()}
    assert shown - {""} == {f"Table {i}" for i in (2, 3)} | {f"Figure {i}" for i in (1, 4, 5, 6, 7, 9)} | {
        "Figures 3 and 8", "Tables 5 and 6"
    }
    made_here = {recording.target.partition("-")[0] for recording in found.recordings.values()}
    assert made_here == {"comparison", *found.scale.studies}
    assert all(path == f"results/{one.target}.jsonl" and one.cells for path, one in found.recordings.items())


@pytest.mark.parametrize("name", SCALES)
def test_cells_are_commands_in_folders_of_their_own_and_in_an_order(name):
    found, parser = Grid.of(name, {}), _parser()
    folders = [cell.folder for cell in found.cells.values()]
    assert len(set(folders)) == len(folders)
    assert not any(one != other and other.startswith(one + "/") for one in folders for other in folders)
    for cell in found.cells.values():
        args = parser.parse_args(cell.words)
        assert args.command in ("run", "train", "record") and args.out == cell.folder
        assert set(cell.after) <= set(found.cells)
        if args.command == "run" and args.method in grid.TRAINS and found.scale.trained:
            assert args.editor and f"{args.editor}/{grid.TRAINED}" in cell.after
    order = list(TopologicalSorter({output: cell.after for output, cell in found.cells.items()}).static_order())
    first = {parser.parse_args(found.cells[output].words).only[0] for output in order[: len(found.scale.models)]}
    assert first == {scales.FIRST}
    used = {cell.output for one in found.recordings.values() for cell in one.cells}
    used |= {output for cell in found.cells.values() for output in cell.after}
    assert used == set(found.cells), "a cell that nothing is made of"


@pytest.mark.parametrize("name", SCALES)
def test_the_numbers_of_a_scale_are_settings_of_what_makes_the_recording(name):
    parts = record._parts({"model": "m"}, {"CounterFact": "c", "ZsRE": "z"}, 4, 2, (0,), Path("r"), "t")
    further = {*inspect.signature(study.study).parameters, *inspect.signature(bench.bench).parameters}
    for part, how in SCALES[name].studies.items():
        own = inspect.signature(parts[part].func).parameters
        assert set(how.numbers) <= {*own} | (further if "settings" in own else set()), part
        assert not how.methods or part in record.OF_METHODS
        assert set(how.methods) <= {*METHODS, *GRADIENT}
    assert set(scales.TIMED) <= {*METHODS, *run_time.VARIANTS}


def test_a_grid_takes_other_data_models_and_seeds_and_refuses_what_it_does_not_know():
    found = Grid.of("paper", {"models": ["/data/gpt2-xl"], "further": [], "seeds": [7], "zsre": "/d/my zsre.json"})
    assert list(found.scale.models) == ["/data/gpt2-xl"]
    assert found.scale.models["/data/gpt2-xl"] == SCALES["paper"].models["openai-community/gpt2-xl"]
    cell = found.cells["runs/grid/paper/gpt2-xl/run/my zsre-memit-7/summary.json"]
    assert _parser().parse_args(cell.words).data == "/d/my zsre.json"
    assert not any("general_ability" in path for path in Grid.of("paper", {"tasks": ""}).recordings)
    for given, said in (
        ({"seed": [0]}, "unknown setting of the grid 'seed'. Did you mean 'seeds'"),
        ({"seeds": 3}, r"seeds of the grid is such as \(0, 1, 2\); found 3"),
        ({"edits": "many"}, "edits of the grid is such as 2000; found 'many'"),
        ({"generate": 1}, "generate of the grid is such as True; found 1"),
    ):
        with pytest.raises(ParameterError, match=said):
            Grid.of("paper", given)
    with pytest.raises(ParameterError, match="unknown scale 'papers'. Did you mean 'paper'"):
        Grid.of("papers", {})
    with pytest.raises(ParameterError, match="recording of the scale 'tiny'"):
        next(record.record("tiny", only=["case_study"], scale="tiny"))


# What they leave becomes a recording


def test_the_runs_of_a_grid_are_collected_as_the_comparison_itself(quick, project):
    given = EIGHT | {"seeds": [1], "methods": ["ultraedit"]}
    found = Grid.of("tiny", given)
    path, one = next(item for item in found.recordings.items() if item[1].target == "comparison-tiny")
    with pytest.raises(ProvenanceError, match="ultraedit-1/summary.json is missing.*run: metake run --model tiny"):
        collect(found, path)
    for cell in one.cells:
        assert main(list(cell.words)) == 0
    assert collect(found, path) == Path(path)
    again = report.recorded(one.target, Path(path).parent)
    tokens = found.scale.text_tokens
    expected = comparison("tiny", given["methods"], found.scale.data, 2, 1, (1,), text_tokens=tokens)
    expected = expected.sort_values(["dataset", "method", "id"], ignore_index=True)
    columns = [c for c in expected if expected[c].notna().any()]
    rows = again.sort_values(["dataset", "method", "id"], ignore_index=True)
    assert rows[columns].round(6).equals(expected[columns].round(6))
    assert summarize(again).method.tolist() == ["pre-edit", "ultraedit"] * 2
    told = again.attrs["provenance"]
    assert (told["model"], told["edits"], told["batch"], told["seeds"]) == ("tiny", 2, 1, [1])
    assert "facts sha256:" in told["dataset"] and "facts-zsre sha256:" in told["dataset"]
    assert len(again.attrs["parts"]) == 2 and set(again.made) == {0, 1}
    assert not (project / "results").exists(), "a rehearsal must leave the committed recordings alone"


def test_parts_of_several_models_are_no_recording(project):
    import pandas as pd

    frame = pd.DataFrame({"method": ["memit", "pre-edit"], "id": ["1", "1"], "efficacy": [1.0, 0.0]})
    told = {"model": "m", "edits": 3, "date": "d", "commit": "c", "dataset": "one", "accelerator": "A"}
    other = frame.replace("memit", "rome")
    path = report.write_joined("x", [(frame, told), (other, told | {"dataset": "two", "accelerator": "B"})])
    found = report.recorded("x")
    assert path.is_file() and list(found.method) == ["memit", "pre-edit", "rome"] and list(found.made) == [0, 0, 1]
    assert found.attrs["provenance"]["dataset"] == "one, two"
    assert [part["accelerator"] for part in found.attrs["parts"]] == ["A", "B"]
    with pytest.raises(ParameterError, match="several values of edits: 3, 4"):
        report.write_joined("x", [(frame, told), (other, told | {"edits": 4})])


# The engine


def snakemake(*words, directory, wait=True, **environment):
    """Snakemake in the checkout's Snakefile, in another directory."""
    call = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(directory)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        [*call, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        start_new_session=True,
    )
    return (process, process.communicate(timeout=300)[0]) if wait else process


@engine
def test_the_whole_of_the_papers_grid_is_planned(tmp_path):
    process, said = snakemake(
        "--profile", ROOT / "profiles/slurm", "paper", "--dry-run", "--quiet", "rules", directory=tmp_path
    )
    assert process.returncode == 0, said
    found = Grid.of("paper", {})
    counts = {words[0]: int(words[1]) for line in said.splitlines() if len(words := line.split()) == 2
              and words[1].isdigit()}  # fmt: skip
    assert counts == {
        "cell": len(found.cells), "recording_paper": len(found.recordings), "paper": 1,
        "total": len(found.cells) + len(found.recordings) + 1
    }
    assert len(found.cells) > 300 and not list(tmp_path.glob("runs")) and not list(tmp_path.glob("results"))


@engine
def test_eight_cells_killed_in_the_middle_go_on(quick, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    server = ForkServer(folder, main)
    try:
        words = ["--profile", ROOT / "profiles/local", "--cores", 1, "--quiet", "rules", "--config"]
        words += [f"{name}={json.dumps(value)}" for name, value in EIGHT.items()] + [f"python={server.python}", "--"]
        path = "runs/grid/tiny/results/comparison-tiny.jsonl"
        cells = Grid.of("tiny", EIGHT).recordings[path].cells
        assert len(cells) == 8
        engine = snakemake(*words, path, directory=tmp_path, wait=False)
        finished = []
        for _ in range(3000):
            time.sleep(0.02)
            finished = [cell for cell in cells if (tmp_path / cell.output).is_file()]
            begun = [cell for cell in cells if (tmp_path / cell.folder / "batches/0000").is_dir()]
            # on one core: where the next has begun, the engine has noted the end of the last
            if finished and len(begun) > len(finished) or engine.poll() is not None:
                break
        assert engine.poll() is None, engine.communicate()[0]
        os.killpg(engine.pid, signal.SIGKILL)
        engine.communicate()
        assert server.kill_workers() and 0 < len(finished) < 8
        # a batch is finished under its own name; one being written, `.0001.….partial`, is rightly made again
        kept = [file for cell in cells for file in (tmp_path / cell.folder / "batches").glob("[0-9]*/edit*")]
        kept = {file: file.stat().st_mtime_ns for file in kept}
        left = {cell.output: (tmp_path / cell.output).stat().st_mtime_ns for cell in finished}
        assert len(kept) > len(finished), "nothing was under way"
        shutil.rmtree(tmp_path / ".snakemake/locks")  # as `snakemake --unlock` does
        process, said = snakemake(*words, path, directory=tmp_path)
        assert process.returncode == 0, said + "".join(file.read_text() for file in tmp_path.rglob("*.log"))
    finally:
        server.close()
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "a batch that was finished was made again"
    assert {file: (tmp_path / file).stat().st_mtime_ns for file in left} == left, "a finished cell was run again"
    rows = report.recorded("comparison-tiny", (tmp_path / path).parent)
    assert Counter(rows.method) == {"pre-edit": 8, "memit": 8, "ultraedit": 8} and len(rows.attrs["parts"]) == 8


FAKE = """#!/bin/sh
name=$(basename "$0")
if [ $name = sbatch ]; then for word; do printf '%s\\n' "$word"; done > "{asked}"; exit 1; fi
case "$name $*" in sacctmgr*|sshare*|*Account*) echo lab;; esac
"""


@engine
def test_the_command_line_for_slurm_word_by_word(tmp_path):
    asked, programs = tmp_path / "asked", tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "sacctmgr", "sshare", "sacct", "squeue", "scontrol", "sinfo"):
        (programs / name).write_text(FAKE.format(asked=asked))
        (programs / name).chmod(0o755)
    output = "runs/grid/paper/gpt2-xl/quickstart/quickstart-gpt2-xl.jsonl"
    process, _ = snakemake(
        "--profile", ROOT / "profiles/slurm", "--retries", 0, "--latency-wait", 1, "--quiet", "rules",
        "--slurm-init-seconds-before-status-checks", 1, "--config", "counterfact=/d/my facts.json", "--", output,
        directory=tmp_path, PATH=f"{programs}:{os.environ['PATH']}"
    )
    words = asked.read_text().splitlines()
    name, log, comment = words[2], words[4], words[7]
    assert process.returncode == 1  # as this sbatch takes no job
    assert words == [
        "--parsable", "--job-name", name, "--output", log, "--export=ALL", "--comment", comment, "-A", "lab",
        "-p", "gpu", "-t", "720", "--mem", "32000", "--cpus-per-task=4", "-D", str(tmp_path), "--gpus=1", words[-1]
    ]  # one process on one GPU: with ntasks-per-gpu it would run once for each of them
    assert output.replace("/", "_") in log.replace("/", "_") + comment
    wrapped = words[-1].removeprefix("--wrap=")
    assert wrapped.startswith(f"{sys.executable} -m snakemake --snakefile '{ROOT}/Snakefile' --target-jobs ")
    assert "'cell:folder=runs/grid/paper/gpt2-xl/quickstart,done=quickstart-gpt2-xl.jsonl'" in wrapped
    assert "--executor slurm-jobstep" in wrapped and "counterfact=/d/my facts.json" in wrapped
    assert shutil.which("sh") and subprocess.run(["sh", "-n", "-c", wrapped]).returncode == 0
