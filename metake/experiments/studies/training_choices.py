"""What the training of an editor leaves open: how strongly it holds on to the model, and which prompts it asks for.

How strongly: the weight of its penalty, chosen by a rule.

The rule: of the weights that keep at least 55 % specificity, the one with the highest harmonic mean of efficacy,
generalization and specificity (the field's summary score), mean over seeds, on facts that this training has not seen;
of those within one point of it the largest, which keeps most. Everything happens in the half of the subjects that is
for choosing; what the book reports is asked of the other half. The floor came second: without it the rule took for
MALMEN the smallest weight tried, which keeps 53 % (65.6 against 62.0 of the next), since a harmonic mean rewards who
writes more. It is the lowest specificity that was asked of any of the three before they were built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metake.editing.gradient.trained import TRAINED, to_train
from metake.editing.gradient.training import OUTER, train
from metake.experiments.cases import for_training, select
from metake.experiments.kept import kept
from metake.experiments.studies.comparison import harmonic_mean, labelled
from metake.experiments.studies.frontier import SCORES, scores
from metake.language.model import load

WEIGHTS = (0.25, 0.5, 1.0, 2.0)
TIE, FLOOR = 1.0, 55.0  # points of the harmonic mean; percent of specificity


def penalty(
    model: str = "tiny", names: Sequence[str] = tuple(TRAINED), weights: Sequence[float] = WEIGHTS,
    seeds: Sequence[int] = (0, 1), held: int = 60, data: str = "facts", out: str | Path | None = None, **training: Any
) -> pd.DataFrame:
    """Train every editor with every weight and seed, but for `held` facts drawn by the seed, which it is asked.

    One row per method, weight, seed and fact: the three scores as shares, edited in batches as it was trained on.
    training: changes of all trainings, as `to_train` takes them. out: folder of what is finished.
    """
    asked = [({"method": name, "weight": weight}, {"keep": weight}) for name in names for weight in weights]
    return _asked(model, asked, seeds, held, data, out, training)


def outer_prompts(
    model: str = "tiny", names: Sequence[str] = ("mend",), seeds: Sequence[int] = (0, 1), held: int = 60,
    data: str = "facts", out: str | Path | None = None, **training: Any
) -> pd.DataFrame:
    """The same with what the outer loss asks for: a paraphrase (MEND's code), the edited prompt (EasyEdit's), or both
    (ours). A column "outer" in the place of the weight."""
    asked = [({"method": name, "outer": outer}, {"outer": outer}) for name in names for outer in OUTER]
    return _asked(model, asked, seeds, held, data, out, training)


def _asked(
    model: str, variants: Sequence[tuple[dict[str, Any], dict[str, Any]]], seeds: Sequence[int], held: int, data: str,
    out: str | Path | None, training: dict[str, Any]
) -> pd.DataFrame:
    """variants: columns of the rows, with the method, and what they change of its training."""
    lm, rows = load(model), []
    cases = for_training(lm, data)
    for columns, changes in variants:
        for seed in seeds:
            rule, modules, own = to_train(columns["method"], model, **{**changes, "seed": seed, **training})
            left_out = select(lm, cases, held, seed)

            def make(rule=rule, modules=modules, own=own, left_out=left_out) -> list[dict[str, Any]]:
                editor = train(lm, cases, rule, modules, own, [c.request.id for c in left_out])
                return scores(lm, editor, left_out, own.edits)

            told = (lm.base(), cases.digest, [c.request.id for c in left_out], rule, modules, own)
            rows += [{**columns, "seed": seed} | row for row in kept(out, told, make)]
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = {"held": held, "seeds": list(seeds)} | training
    return frame


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent, means over facts and seeds, a row per method and what was varied, with their harmonic mean."""
    varied = ["method", "weight" if "weight" in records else "outer"]
    by_seed = 100 * records.groupby([*varied, "seed"], sort=False)[list(SCORES)].mean()
    by_seed["harmonic mean"] = harmonic_mean(by_seed)
    return labelled(by_seed.groupby(varied, sort=False).mean().reset_index(), records)


def choice(records: pd.DataFrame) -> pd.DataFrame:
    """What the rule sees, a row per method and weight, and which is chosen."""
    table = summarize(records)
    allowed = table["harmonic mean"].where(table.specificity >= FLOOR, -1.0)
    near = table[allowed >= allowed.groupby(table.method).transform("max") - TIE].groupby("method").weight.max()
    return table.assign(chosen=table.weight == table.method.map(near))
