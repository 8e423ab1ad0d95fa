"""Many adversaries against the promises: `make torture` (or `python tools/torture.py --only kills fuzz --scale 0.1`).

kills       200 runs' worth of SIGKILL at random moments, and every file operation of every other way of writing, killed
            or refused by the disk
fuzz        50,000 damaged files, over every reader
sequences   300 sequences of actions on a model
contract    every method on every architecture (the tests try every method on four, in turn)
mutations   every mistake of tests/mutants.py, each noticed by the test or the page that it names

What passed is written into the book's checklists with its date and counts. Ends with 1 if anything did not.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import crashes  # noqa: E402
import fuzz as fuzzed  # noqa: E402
import mutants  # noqa: E402
import pytest  # noqa: E402
import test_sequences  # noqa: E402
import torch  # noqa: E402
from faults import ERRORS, forked  # noqa: E402
from hypothesis import settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

from metake.experiments.runs import run  # noqa: E402

BOOK = ROOT / "book" / "checklists.md"


def kills(folder: Path, scale: float) -> str:
    """Raises AssertionError for a run that does not end as the undisturbed one, or a file that is torn."""
    wanted, done = round(200 * scale), 0
    with pytest.MonkeyPatch.context() as patch:
        config = crashes.prepared(folder, patch)
        run(config, folder / "undisturbed")
        expected = crashes.outcome(folder / "undisturbed")
        for out, told in crashes.killed_runs(config, folder, wanted, seed=int(time.time())):
            assert crashes.outcome(out) == expected, told
            done += len(told.split(", "))
    struck = 0
    for name, scenario in crashes.SCENARIOS.items():
        own = folder / name
        own.mkdir()
        operations, before, after = crashes.operations(scenario, own / "undisturbed")
        for at in range(1, len(operations) + 1):
            for what in ("killed", *ERRORS):
                crashes.strike(scenario, own / f"{what}{at}", at, what, before, after)
                struck += 1
    return f"{done} kills of a run of six batches, {struck} of other writing"


def fuzz(folder: Path, scale: float) -> str:
    """Raises AssertionError for a file that is answered with anything but a MetakeError or what can be used."""
    count, seed, found = round(50_000 * scale), int(time.time()), folder / "found"

    def act() -> None:
        found.write_text("\n".join(fuzzed.fuzz(folder / "files", count, seed)))

    found.touch()
    code = forked(act)
    assert code == 0 and not found.read_text(), f"seed {seed}, ended with {code}:\n{found.read_text()}"
    return f"{count:,} damaged files of {len(fuzzed.READERS)} kinds"


def sequences(folder: Path, scale: float) -> str:
    """Raises what the state machine finds."""
    count = round(300 * scale)
    many = settings(test_sequences.FEW, max_examples=count, stateful_step_count=50, derandomize=False)
    run_state_machine_as_test(test_sequences.Actions, settings=many)
    return f"{count} sequences of up to 50 actions"


def contract(_: Path, scale: float) -> str:
    """Raises AssertionError if a method breaks its contract on any architecture."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", str(ROOT / "tests" / "test_contract.py")]
    every = {"METAKE_EVERY_PAIR": "1"} if scale >= 1 else {}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | every, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    count, where = re.search(r"(\d+) passed", done.stdout)[1], "all" if every else "some"
    return f"{count} promises of every method on {where} architectures"


def mutations(folder: Path, scale: float) -> str:
    """Raises AssertionError naming every mistake that nothing noticed."""
    root, missed = mutants.checkout(folder), []
    chosen = mutants.MUTATIONS[:: max(1, round(1 / scale))]
    for mutation in chosen:
        with mutants.made(mutation, root):
            code, said = mutants.run_tests(root, mutation.test)
        print(f"  {'noticed' if code == 1 else 'MISSED'}: {mutation.what}", flush=True)
        missed += [] if code == 1 else [mutation.what]
    for mutation in mutants.PAGES if scale >= 1 else ():
        with mutants.made(mutation, root):
            code, said = mutants.compared(root, mutation.test)
        missed += [] if code == 1 else [mutation.what]
    assert not missed, f"nothing noticed: {', '.join(missed)}"
    return f"{len(chosen) + len(mutants.PAGES) * (scale >= 1)} mistakes, each noticed"


PARTS: dict[str, Callable[[Path, float], str]] = {
    "kills": kills, "fuzz": fuzz, "sequences": sequences, "contract": contract, "mutations": mutations
}


def torture(only: list[str], scale: float) -> Iterator[tuple[str, str]]:
    """Each part with what it did; the first that fails raises."""
    for name in only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            said = PARTS[name](Path(folder).resolve(), scale)
        print(f"{name}: {said} ({(time.perf_counter() - start) / 60:.0f} minutes)", flush=True)
        yield name, said


def note(name: str, said: str) -> None:
    """Put a part's result into its row of the book's checklists."""
    text = BOOK.read_text("utf-8")
    row, count = re.subn(rf"(?m)^\| {name} \|.*$", f"| {name} | {said} | {date.today()} |", text)
    if count != 1:
        raise SystemExit(f"{BOOK} has no row of {name}")
    BOOK.write_text(row, "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="a share of everything; below 1 nothing is written")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for part, outcome in torture(chosen.only, chosen.scale):
            if chosen.scale >= 1:
                note(part, outcome)
    except AssertionError as failure:
        sys.exit(f"FAILED: {failure}")
