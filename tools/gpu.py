"""The first hour on a GPU as one command, in a box of time: `make gpu`.

    python tools/gpu.py [--device cuda|cpu] [--sizes full|tiny] [--minutes 12] [--out DIR] [--work DIR]
                        [--model FOLDER] [--counterfact FILE] [--zsre FILE] [--text FILE] [--edits N] [--only PART ...]
    python tools/gpu.py --take DIR      what another machine made, into results/: `make gpu-import FOLDER=DIR`

Every part runs in a process of its own, with this Python and nothing installed: what one breaks or leaves in memory
does not reach the next. What is finished is kept in DIR at once, five files that can be copied off by hand; a call
after an interruption goes on. Exit status: 0, also when time was up; 1 if something failed; 2 if nothing could begin.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "safetensors", "numpy", "pandas", "matplotlib", "seaborn", "psutil", "tqdm",
          "lazy_loader", "huggingface_hub", "tokenizers")  # fmt: skip
COSTS = {
    "pytest": "the tests and the literal path", "hypothesis": "nothing", "peft": "the test of the exported adapter",
    "nltk": "fluency and consistency, which no part here asks for",
    "gguf": "fetching smollm2-135m, which needs a network anyway; a model's folder is given by path",
    "papermill": "the pages of the book", "ipykernel": "the pages of the book",
}  # fmt: skip
ORDER = {
    "full": (["device"], ["bench gpt2-xl"], ["bench llama3-8b"], ["tests"], ["bench gpt-j-6b"], ["comparison"]),
    "tiny": (["device", "bench tiny", "comparison"], ["tests"]),  # as many processes as must be
}
"""By value: the smallest size tells whether anything runs at all, the largest is the goal, and the tests come before
what takes minutes and says less."""
REFUSED, FAILED = 2, 1


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=("full", "tiny"), default="full")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--work", type=Path, help="for what is under way; default: _build/gpu")
    parser.add_argument("--model", default="tiny", help="a folder; default: the embedded model")
    parser.add_argument("--counterfact", default="")
    parser.add_argument("--zsre", default="")
    parser.add_argument("--text", default="embedded", help="of the key statistics, one document a line")
    parser.add_argument("--edits", type=int, default=0, help="of a comparison; default: 2000, or 600 of the facts")
    parser.add_argument("--only", nargs="+", default=(), choices=("bench", "tests", "comparison"), metavar="PART",
                        help="of bench, tests, comparison; the device is always looked at")
    parser.add_argument("--take", type=Path, metavar="DIR", help="write DIR's recordings to results/")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # a child's
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.minutes <= 0 or args.edits < 0:
        parser.error("--minutes must be positive and --edits not negative")
    return args


def missing() -> list[str]:
    """A line for each package that is not here, with what that costs."""
    return [f"not here: {name}; it costs {cost}" for name, cost in COSTS.items() if not find_spec(name)]


def environment(device: str) -> dict[str, str]:
    """Of the children: this checkout, no bars, no network, and no GPU where the CPU was asked for."""
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    }  # fmt: skip
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


class Log:
    """What is said goes to the terminal and to gpu.log."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "gpu.log"

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def child(words: list[str], device: str, until: float, log: Log) -> int:
    """Run a part; when time is up it is ended, with all that it has started. Its exit status, 0 if it was ended."""
    ran = subprocess.Popen(
        [sys.executable, __file__, *words], env=environment(device), cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    up = threading.Event()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(ran.pid, signal.SIGKILL)  # its pytest too
            up.set()

    timer = threading.Timer(max(0.0, until - time.time()), end)
    timer.start()
    try:
        for line in ran.stdout:
            log(line.rstrip())
        status = ran.wait()
    except BaseException:
        end()
        ran.wait()
        raise
    finally:
        timer.cancel()
    if up.is_set():
        log("left out: time was up; what was under way is gone on with by the next call")
        return 0
    return status


def first_hour(args: argparse.Namespace) -> int:
    """All parts, one after the other, until time is up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or a part would outlive it
    until, log = time.time() + 60 * args.minutes, Log(args.out)
    if gone := [name for name in NEEDED if not find_spec(name)]:
        log(f"refused: needs the package{'s' * (len(gone) > 1)} {', '.join(gone)}, not found by {sys.executable}")
        return REFUSED
    for line in missing():
        log(line)
    own = ["--out", args.out, "--work", args.work or ROOT / "_build" / "gpu"]
    given = [word for name in ("device", "sizes", "model", "counterfact", "zsre", "text", "edits")
             if (value := getattr(args, name)) for word in (f"--{name}", value)]  # fmt: skip
    common = [str(word) for word in (*own, *given, "--until", until)]
    failed = False
    for names in ORDER[args.sizes]:
        names = [n for n in names if n == "device" or not args.only or n.partition(" ")[0] in args.only]
        if not names:
            continue
        name = ", ".join(names)
        if time.time() >= until:
            log(f"left out: {name}; time was up")
            continue
        status = child([*common, "--part", *names], args.device, until, log)
        if status == REFUSED and "device" in names:
            return REFUSED
        if status not in (0, FAILED):
            log(f"failed: {name} ended with {status}")
        failed |= status != 0
    files = sorted(args.out.glob("gpu_*.jsonl"))
    log(f"in {args.out}: {', '.join(file.name for file in files) or 'nothing yet'}, gpu.log")
    log(f"take it along, then: make gpu-import FOLDER={args.out}")
    return FAILED if failed else 0


def part(args: argparse.Namespace) -> int:
    """Some parts, in this process."""
    from metake.experiments.gpu import parts
    from metake.experiments.gpu.box import FAILED as FELL
    from metake.experiments.gpu.box import carry_out

    args.out.mkdir(parents=True, exist_ok=True)
    parts.on_device(args.device)
    job = parts.Job(args.out, args.work, args.until, args.sizes, args.model, args.counterfact, args.zsre, args.text,
                    args.edits)  # fmt: skip
    parts.fits(job)
    states = []
    for outcome in carry_out((unit for name in args.part for unit in parts.units(job, name)), args.out, args.until):
        print(f"{outcome.state}: {outcome.line}", flush=True)
        states.append(outcome.state)
    return FAILED if FELL in states else 0


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    for name in ("out", "work", "take"):
        if path := getattr(args, name):
            setattr(args, name, path.absolute())  # the children work in the checkout
    for name in ("model", "counterfact", "zsre", "text"):
        if (value := getattr(args, name)) and Path(value).exists():
            setattr(args, name, str(Path(value).absolute()))
    if not (args.part or args.take):
        return first_hour(args)
    sys.path.insert(0, str(ROOT))
    from metake.support.errors import MetakeError

    try:
        if args.part:
            return part(args)
        from metake.experiments.gpu.adopt import adopt

        for line in adopt(args.take):
            print(line)
    except MetakeError as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
