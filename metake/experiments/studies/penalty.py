"""How strongly the training of an editor holds on to the model: the weight of its penalty, chosen by a rule.

The rule, fixed before it was applied: of the weights tried, the one with the highest harmonic mean of efficacy,
generalization and specificity (the field's summary score), mean over seeds, on facts that this training has not seen;
of those within one point of it the largest, which keeps most. Everything happens in the half of the subjects that is
for choosing; what the book reports is asked of the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metake import methods
from metake.editing.gradient.training import train
from metake.experiments.cases import part_of, read_cases, select
from metake.experiments.kept import kept
from metake.experiments.studies.comparison import labelled
from metake.experiments.studies.frontier import SCORES, scores
from metake.language.model import load

WEIGHTS = (0.25, 0.5, 1.0, 2.0)
TIE = 1.0  # points of the harmonic mean


def penalty(
    model: str = "tiny", names: Sequence[str] = tuple(methods.TRAINED), weights: Sequence[float] = WEIGHTS,
    seeds: Sequence[int] = (0, 1), held: int = 60, data: str = "facts", out: str | Path | None = None, **training: Any
) -> pd.DataFrame:
    """Train every editor with every weight and seed, but for `held` facts drawn by the seed, which it is asked.

    One row per method, weight, seed and fact: the three scores as shares, edited in batches as it was trained on.
    training: changes of all trainings, as `methods.to_train` takes them. out: folder of what is finished.
    """
    lm, rows = load(model), []
    cases = part_of(read_cases(data), "choosing")
    for name in names:
        for weight in weights:
            for seed in seeds:
                rule, modules, own = methods.to_train(name, model, **{"keep": weight, "seed": seed, **training})
                asked = select(lm, cases, held, seed)

                def make(rule=rule, modules=modules, own=own, asked=asked) -> list[dict[str, Any]]:
                    editor = train(lm, cases, rule, modules, own, [c.request.id for c in asked])
                    return scores(lm, editor, asked, own.edits)

                told = (lm.base(), cases.digest, [c.request.id for c in asked], rule, modules, own)
                rows += [{"method": name, "weight": weight, "seed": seed} | row for row in kept(out, told, make)]
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = {"held": held, "seeds": list(seeds)} | training
    return frame


def choice(records: pd.DataFrame) -> pd.DataFrame:
    """What the rule sees, a row per method and weight: percent, means over facts and seeds; which is chosen."""
    by_seed = 100 * records.groupby(["method", "weight", "seed"], sort=False)[list(SCORES)].mean()
    by_seed["harmonic mean"] = (3 / (1 / by_seed.where(by_seed > 0)).sum(axis=1)).where((by_seed > 0).all(axis=1), 0.0)
    table = by_seed.groupby(["method", "weight"], sort=False).mean().reset_index()
    best = table.groupby("method")["harmonic mean"].transform("max")
    near = table[table["harmonic mean"] >= best - TIE].groupby("method").weight.max()
    table["chosen"] = table.weight == table.method.map(near)
    return labelled(table, records)
