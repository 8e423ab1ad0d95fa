"""Train the editors that ship with the package, on one half of the embedded facts' subjects:
python tools/train_editors.py [malmen mend smedit]

The other half is what the book asks them. Ten minutes of one core; the same parameters each time on one machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import metake as mk
from metake.editing.gradient.training import train
from metake.experiments.cases import part_of, read_cases
from metake.experiments.record import SHIPPED_RANK

FOLDER = Path(__file__).resolve().parents[1] / "metake" / "data" / "editors"


def main(names: list[str]) -> None:
    lm, cases = mk.load("tiny"), part_of(read_cases("facts"), "choosing")
    for name in names or list(mk.methods.TRAINED):
        rule, modules, training = mk.methods.to_train(name, "tiny", rank=SHIPPED_RANK)
        editor = train(lm, cases, rule, modules, training, out=FOLDER / f"tiny-{name}")
        first, last = (editor.trained["losses"][i]["after"] for i in (0, -1))
        print(f"{name}: −log p of the target after the edits {first:.2f} at first, {last:.2f} at last")


if __name__ == "__main__":
    main(sys.argv[1:])
