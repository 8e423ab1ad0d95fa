"""Train the editors that ship with the package, on one half of the subjects of the embedded facts, or of files:

    python tools/train_editors.py [--model tiny] [--data facts ...] [--steps N] [--edits N] [--keep W]
        [malmen mend smedit]

The other half is what the book asks them. --edits: facts a step of the optimizer; MEND, which is trained one edit at a
time, sums so many gradients. For tiny ten minutes of one core, for SmolLM2-135M with 200 steps of 10 an hour and a
half; interrupted, it goes on; the same parameters each time on one machine. Editors of other models than tiny stay out
of git; `metake record --only trained_editors` finds them here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import metake as mk
from metake.editing.gradient.trained import SHIPPED_RANK
from metake.editing.gradient.training import train
from metake.experiments.cases import for_training

FOLDER = Path(__file__).resolve().parents[1] / "metake" / "data" / "editors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(mk.methods.TRAINED), metavar="METHOD")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", nargs="+", default=["facts"])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--edits", type=int, default=None)
    parser.add_argument("--keep", type=float, default=None, help="weight of the penalty; default: tiny's")
    asked = parser.parse_args()
    lm = mk.load(asked.model)
    cases = [c for data in asked.data for c in for_training(lm, data)]
    for name in asked.names:
        alone = mk.methods.TRAINED[name][1].edits == 1
        numbers = {"steps": asked.steps, "accumulate" if alone else "edits": asked.edits, "keep": asked.keep}
        changes = {key: value for key, value in numbers.items() if value is not None}
        rule, modules, training = mk.methods.to_train(name, asked.model, rank=SHIPPED_RANK, **changes)
        editor = train(lm, cases, rule, modules, training, out=FOLDER / f"{asked.model}-{name}")
        losses = [one["after"] for one in editor.trained["losses"]]
        first, last = (sum(ten) / len(ten) for ten in (losses[:10], losses[-10:]))
        print(f"{name}: −log p of the target after edits {first:.2f} in its first ten steps, {last:.2f} in the last")


if __name__ == "__main__":
    main()
