"""The parts of the first hour on a GPU, in the order of their value.

device               how fast it multiplies, copies and starts kernels: what everything else is read beside
bench SIZE           a batch of 100 by AlphaEdit and MetaKE on random weights of a published size, both paths
tests                the tests of tests/gpu, file by file
comparison DATA      the paper's Table 1 on a model at hand: 2,000 edits in batches of 100, method by method

`SCALES["tiny"]` is the same in a minute of a CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import torch

from metake import report
from metake.experiments.cases import read_cases
from metake.experiments.gpu.box import NotHereError, Unit
from metake.experiments.gpu.device import measure, system_report
from metake.experiments.made import made, provenance, settings
from metake.experiments.runs import Unedited
from metake.experiments.speed.beside_paper import beside_paper, line
from metake.experiments.speed.run_time import PLAIN, run_time
from metake.experiments.studies.comparison import METRICS, comparison, summarize
from metake.support.errors import ParameterError, near_misses
from metake.support.machine import default_device

TESTS = Path(__file__).parents[3] / "tests" / "gpu"
DATA = {"CounterFact": "facts", "ZsRE": "facts-zsre"}


@dataclass(frozen=True)
class Scale:
    """How much of everything; `seconds` of a unit are guesses for one H200, or for one core of a CPU."""

    sizes: dict[str, float]  # of the bench: name → seconds of a method
    edits: int
    steps: int
    literal: int
    probe: tuple[float, int, int]  # of `device.measure`
    tests: float  # seconds of a file of tests
    stream: tuple[int, int, int, float]  # edits with files of records, with the embedded facts, batch, seconds
    tokens: int  # of the key statistics
    methods: tuple[str, ...] = ("alphaedit", "metake", "memit", "blue", "sphere")


SCALES = {
    "full": Scale({"gpt2-xl": 60, "llama3-8b": 150, "gpt-j-6b": 110}, 100, 25, 2, (0.1, 16384, 2**32), 60,
                  (2000, 600, 100, 60), 100_000),
    "tiny": Scale({"tiny": 3}, 2, 1, 1, (0.002, 512, 2**22), 15, (2, 2, 1, 3), 3000,
                  ("alphaedit", "metake")),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What was asked for. work: a folder for what is under way, which a later call goes on with; until: as `time.time`
    counts; model: a folder, or "tiny", which is here; counterfact, zsre: files of records; text: of key statistics.
    """

    folder: Path
    work: Path
    until: float
    scale: str = "full"
    model: str = "tiny"
    counterfact: str = ""
    zsre: str = ""
    text: str = "embedded"
    edits: int = 0  # of a comparison, if not the scale's

    def __post_init__(self) -> None:
        for given in (self.counterfact, self.zsre, self.text if self.text != "embedded" else ""):
            if given and not Path(given).is_file():
                raise ParameterError(f"{given!r} is no file; give the path of a file on this machine, or leave it out")
        if self.model != "tiny" and not Path(self.model).is_dir():
            raise ParameterError(
                f"{self.model!r} is no folder; MODEL is a folder with config.json, weights and tokenizer on this "
                "machine, or left out for the embedded model"
            )

    @property
    def size(self) -> Scale:
        return SCALES[self.scale]

    @property
    def data(self) -> dict[str, str]:
        """The files that were given, or else the embedded facts in both formats."""
        given = {"CounterFact": self.counterfact, "ZsRE": self.zsre}
        return {name: file for name, file in given.items() if file} or DATA

    @property
    def asked(self) -> int:
        """Edits of a comparison."""
        return self.edits or self.size.stream[int(self.data == DATA)]

    @property
    def here(self) -> str:
        """A name for this device and this source: what another left half done is not gone on with."""
        name = self.origin.get("accelerator", self.origin["processor"])
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{name} {self.origin['source'][:8]}")

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What holds for the parts without a model of their own."""
        note = {"origin": "random weights", "revision": "", "note": "of published sizes; tokenizer of tiny"}
        digest = read_cases("facts").digest[:16]
        told = {"model": "random weights", "model_origin": note, "dataset": f"facts sha256:{digest}"}
        return told | made(default_device(), "float32")


def units(job: Job, part: str) -> list[Unit]:
    """The units of a part, in order. part: as above, "comparison" alone for both data sets."""
    kind, _, which = part.partition(" ")
    made = {"device": _device, "bench": partial(_bench, size=which), "tests": _tests,
            "comparison": partial(_comparison, names=[which] if which else list(job.data))}  # fmt: skip
    if kind not in made:
        raise ParameterError(near_misses(kind, made, "part"))
    return made[kind](job)


def _device(job: Job) -> list[Unit]:
    def make() -> tuple[pd.DataFrame, dict[str, Any], str]:
        found = measure(default_device(), *job.size.probe)
        rates = dict(zip(found.quantity, found.value, strict=True))
        said = ", ".join(f"{name.partition(', ')[2]} {rates[name]:.3g}" for name in rates if name.startswith("matrix"))
        smi = {"system_report": told} if (told := system_report()) else {}
        name = job.origin.get("accelerator", job.origin["processor"])
        return found, job.origin | smi, f"{name}; TFLOP/s of a product: {said}"

    return [Unit("gpu_device", {}, 20, make)]


def _bench(job: Job, size: str) -> list[Unit]:
    """AlphaEdit first: its solve is the one that the literal path is worst at, and MetaKE's Stage I is its own."""

    def make(method: str) -> tuple[pd.DataFrame, dict[str, Any], str]:
        # the literal path's forms stand among the tests, which need pytest
        small = method != "alphaedit" and job.scale == "tiny"  # its refinement would take as long as the rest
        literal = job.size.literal if find_spec("pytest") and not small else 0
        found = run_time(
            size, [method], edits=job.size.edits, steps=job.size.steps, literal=literal, random_weights=True,
            dtype="float32", evaluate=method == "alphaedit"
        )
        told = found.attrs["settings"]
        found.insert(0, "model", size)
        return found, job.origin | told, line(beside_paper(found))

    seconds = job.size.sizes[size]
    return [
        Unit("gpu_bench", {"model": size, "method": method}, seconds * factor, partial(make, method))
        for method, factor in (("alphaedit", 1.0), (PLAIN, 1.3))
    ]


def _tests(job: Job) -> list[Unit]:
    """A unit for each file, run by a pytest of its own: what breaks there, breaks nothing here."""

    def make(file: Path) -> tuple[pd.DataFrame, dict[str, Any], str]:
        if not find_spec("pytest"):
            raise NotHereError("needs pytest, which is not here")
        job.work.mkdir(parents=True, exist_ok=True)
        told = job.work / f"{file.stem}.xml"
        told.unlink(missing_ok=True)
        # nbval may be there without the kernels that it needs
        left_out = ("-p", "no:cacheprovider", "-p", "no:nbval")
        words = [sys.executable, "-m", "pytest", str(file), "-q", "--tb=short", *left_out]
        try:
            ran = subprocess.run(
                [*words, f"--junitxml={told}"], cwd=TESTS.parents[1], timeout=max(1.0, job.until - time.time()),
                capture_output=True, text=True, check=False,
                env=os.environ | {"METAKE_TEST_DEVICE": default_device().type}
            )
        except subprocess.TimeoutExpired:
            raise NotHereError("time was up before its tests had ended") from None
        if not told.is_file():
            said = (ran.stdout + ran.stderr).strip()[-500:]
            raise RuntimeError(f"pytest ended with {ran.returncode} and wrote no report: {said}")
        found = tests_of(told, file.name)
        counts = found.outcome.value_counts()
        return found, job.origin, ", ".join(f"{counts[name]} {name}" for name in counts.index)

    files = sorted(TESTS.glob("test_*.py"))
    if not files:
        raise ParameterError("no tests in tests/gpu: run from a checkout (git clone), not from an installed package")
    return [Unit("gpu_tests", {"file": file.name}, job.size.tests, partial(make, file)) for file in files]


def tests_of(report_file: Path, file: str) -> pd.DataFrame:
    """A JUnit report as records: file, test, outcome ("passed", "failed", "skipped"), seconds, and the first lines of
    what was said of one that did not pass.
    """
    rows = []
    for case in ElementTree.parse(report_file).getroot().iter("testcase"):
        told = {child.tag: child for child in case if child.tag in ("failure", "error", "skipped")}
        outcome = "skipped" if "skipped" in told else "failed" if told else "passed"
        said = next((f"{child.get('message', '')}\n{child.text or ''}"[:1500] for child in told.values()), "")
        rows.append({"file": file, "test": case.get("name"), "outcome": outcome, "seconds": float(case.get("time", 0)),
                     "said": report.files.portable(said.strip())})  # fmt: skip
    return pd.DataFrame(rows, columns=["file", "test", "outcome", "seconds", "said"])


def _comparison(job: Job, names: Sequence[str]) -> list[Unit]:
    shared: dict[tuple[str, int], Unedited] = {}
    *_, batch, seconds = job.size.stream
    told: dict[str, Any] = {}

    def make(name: str, method: str) -> tuple[pd.DataFrame, dict[str, Any], str]:
        told.update(told or provenance(job.model, job.data, job.text, job.size.tokens))
        start = time.perf_counter()
        found = comparison(
            job.model, [method], {name: job.data[name]}, job.asked, batch, text=job.text, text_tokens=job.size.tokens,
            out=job.work / f"comparison-{Path(job.model).name}-{job.asked}-{batch}-{job.here}", shared=shared
        )
        scores = summarize(found).set_index("method").loc[method, list(METRICS[:3])]
        said = ", ".join(f"{metric} {value:.1f}" for metric, value in scores.items())
        return found, told | settings(found, time.perf_counter() - start), said

    target = f"gpu_comparison-{Path(job.model).name}"
    return [
        Unit(target, {"dataset": name, "method": method}, seconds * (1.5 if method == "metake" else 1.0),
             partial(make, name, method))
        for name in names for method in job.size.methods
    ]  # fmt: skip


def fits(job: Job) -> None:
    """Raise ParameterError if the folder holds recordings of another device, or of a comparison of another length."""
    here = job.origin.get("accelerator", job.origin["processor"])
    for file in sorted(job.folder.glob("gpu_*.jsonl")):
        known = report.recorded(file.stem, job.folder).attrs["provenance"]
        there = known.get("accelerator", known.get("processor"))
        wrong = f"was made on {there}, not {here}" if there != here else ""
        if not wrong and file.stem.startswith("gpu_comparison") and known["edits"] != job.asked:
            wrong = f"holds {known['edits']} edits, not {job.asked}"
        if wrong:
            raise ParameterError(f"{file.name} {wrong}: name another folder with OUT=...")


def on_device(wanted: str) -> None:
    """Raise ParameterError if the best device at hand is not of the type that was asked for."""
    if default_device().type != wanted:
        raise ParameterError(
            f"torch {torch.__version__} finds no device of type {wanted!r} here, only {default_device().type!r}. To "
            "try everything on a CPU in small: make gpu DEVICE=cpu SIZES=tiny"
        )
