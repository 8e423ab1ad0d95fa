"""Pages and tests under other instruction sets and orders of summation than this machine's own: what differs.

    python tools/processors.py [SETTING ...] [-- words for pytest]

Without names all settings run, one after the other, two threads in all each; without words: tests and notebooks. A page
differs if it prints another digit or another verdict than the committed one. One machine cannot be every processor: the
settings change how its libraries add up, which is what processors do differently.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "own": {},
    "threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    # torch's own loops without vector instructions; of attention in bfloat16 it takes those that oneDNN has
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "mkl": {"MKL_CBWR": "COMPATIBLE"},  # matrix products in the order that every processor can take
    "onednn": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "all": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
WORDS = ["tests", "notebooks", "--ignore", "tests/browser", "--nbval"]


def failures(setting: str, words: list[str]) -> tuple[list[str], int]:
    """What fails under a setting, by name, and how many ran."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.xml"
        own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | SETTINGS[setting]
        processes = str(2 // int(own["OMP_NUM_THREADS"]))  # threads that wait for another process's are slow
        command = [sys.executable, "-m", "pytest", *words, "-q", "-n", processes, "--dist", "loadfile"]
        command.append(f"--junitxml={told}")
        done = subprocess.run(command, cwd=ROOT, env=os.environ | own, stdout=subprocess.PIPE, text=True)
        if not told.is_file():
            raise SystemExit(f"{setting}: pytest ended with {done.returncode} and no test:\n{done.stdout[-2000:]}")
        cases = list(xml.parse(told).iter("testcase"))
    wrong = [case for case in cases if any(case.find(how) is not None for how in ("failure", "error"))]
    return [f"{case.get('classname')}::{case.get('name')}" for case in wrong], len(cases)


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, words = arguments[:cut] or list(SETTINGS), arguments[cut + 1 :] or WORDS
    if unknown := [name for name in names if name not in SETTINGS]:
        raise SystemExit(f"no setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    differs = False
    for name in names:
        wrong, count = failures(name, words)
        told = " ".join(f"{k}={v}" for k, v in SETTINGS[name].items()) or "nothing changed"
        print(f"{name} ({told}): {len(wrong)} of {count} differ", *(f"  {one}" for one in wrong), sep="\n", flush=True)
        differs |= bool(wrong)
    return int(differs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
