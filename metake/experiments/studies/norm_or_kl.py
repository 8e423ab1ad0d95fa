"""SMEdit's claims D and E: what training with ‖Δ‖² in the place of the KL divergence costs, and what it gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.flop_counter import FlopCounterMode

from metake import methods
from metake.editing.gradient.training import begin, meta_gradient
from metake.experiments.cases import for_training
from metake.experiments.decision import all_of, interval, undecided, with_interval
from metake.experiments.studies.comparison import labelled
from metake.experiments.studies.frontier import LEVEL, Curves, Variant
from metake.experiments.studies.step_more import FULL, UNTRAINED, label
from metake.language.kernels import OPERATIONS
from metake.language.model import load

EFFICACY = 90.0  # percent, where specificity is compared
MARGIN = 5.0  # points of specificity, or of generalization, that a penalty may lose and still be called as good
NORM, KL = (Variant(2, penalty, "network", FULL) for penalty in ("norm", "kl"))
PAIRS = {
    "norm − KL": (NORM, KL),
    "norm − nothing learned": (NORM, Variant(2, "kl", "nothing", UNTRAINED)),
    "KL − nothing learned": (KL, Variant(2, "kl", "nothing", UNTRAINED)),
}


def operations(
    model: str = "tiny", batches: int = 8, edits: int = 20, steps: Sequence[int] = (1, 2), data: str = "facts",
    seed: int = 0
) -> pd.DataFrame:
    """Operations (multiplications and additions of matrix products, 10⁹) of one training step, counted.

    One row per batch, number of back-propagation steps, and penalty.
    """
    lm, rows = load(model), []
    cases = list(for_training(lm, data))
    for number in range(batches):
        batch = random.Random(f"{seed}/{number}").sample(cases, edits)
        for j in steps:
            for penalty in ("kl", "norm"):
                rule, modules, training = methods.to_train("malmen", model, edits=edits, seed=seed)
                made = begin(lm, replace(rule, steps=j, penalty=penalty), modules, training)
                with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter, lm.scratch(modules):
                    meta_gradient(lm, made, batch, training, random.Random(f"{seed}/{number}/own"))
                rows.append({"batch": number, "steps": j, "penalty": penalty,
                             "operations": counter.get_total_flops() / 1e9})  # fmt: skip
    return pd.DataFrame(rows)


def ratios(counted: pd.DataFrame) -> pd.DataFrame:
    """Norm over KL, a row per number of steps: the mean over batches, and the interval in which 95 % of batches lie if
    they spread as a normal distribution."""
    wide = counted.pivot(index=["steps", "batch"], columns="penalty", values="operations")
    rows = []
    for steps, own in wide.groupby(level="steps"):
        share, mean = own.norm / own.kl, own.mean()
        spread = 1.96 * float(np.std(share, ddof=1)) if len(share) > 1 else float("nan")
        rows.append({"steps": steps, "KL, 10⁹": mean.kl, "norm, 10⁹": mean.norm, "norm / KL": share.mean(),
                     "low": share.mean() - spread, "high": share.mean() + spread})  # fmt: skip
    return labelled(pd.DataFrame(rows), counted)


def cheaper(counted: pd.DataFrame) -> dict[str, Any]:
    """Claim D: holds if, for every number of steps, the norm takes fewer operations, interval over batches and all."""
    found = ratios(counted).rename(columns={"norm / KL": "share"})
    parts = [f"{r.steps} step{'s' * (r.steps > 1)}: {with_interval(r.share, r.low, r.high, 2, '')}"
             for r in found.itertuples()]  # fmt: skip
    decision = all_of(interval(f"{r.steps} steps", 1 - r.share, 1 - r.high, 1 - r.low) for r in found.itertuples())
    return decision.quiet().verdict(f"operations of a training step, norm over KL: {'; '.join(parts)}")


def shown(records: pd.DataFrame) -> pd.DataFrame:
    """The records of norm, KL and nothing learned."""
    names = {label(variant) for pair in PAIRS.values() for variant in pair}
    return labelled(records[records.variant.isin(names)], records)


def compared(records: pd.DataFrame) -> pd.DataFrame:
    """Norm, KL and nothing learned, two steps each: generalization at equal specificity, specificity at equal efficacy.
    A row per pair and comparison."""
    curves = Curves(records)
    pairs = {w: (label(a), label(b)) for w, (a, b) in PAIRS.items() if {label(a), label(b)} <= set(curves.found)}
    found = [
        curves.differences(pairs, LEVEL, ("generalization",)).assign(where=f"at a specificity of {LEVEL:.0f} %"),
        curves.differences(pairs, EFFICACY, ("specificity",), by="efficacy").assign(
            where=f"at an efficacy of {EFFICACY:.0f} %"
        ),
    ]
    return labelled(pd.concat(found, ignore_index=True).sort_values("compared", kind="stable"), records)


def as_good(records: pd.DataFrame) -> dict[str, Any]:
    """Claim E: holds if both differences, norm minus KL, lie above −5 points, intervals and all; does not hold if one
    lies below with all of its interval."""
    found = compared(records)
    own = found[found.compared == "norm − KL"]
    if own.empty:
        return undecided("these records do not hold both").verdict("norm and KL are not both among the records")
    decisions, told = [], []
    for r in own.itertuples():
        reached = r.low == r.low
        decisions.append(
            interval(r.metric, r.difference, r.low, r.high, -MARGIN) if reached
            else undecided(f"{r.metric}: one of the two does not get {r.where}")
        )
        told.append(
            f"{r.metric} {r.where} " + (with_interval(r.difference, r.low, r.high) if reached else "not reached")
        )
    return all_of(decisions).quiet().verdict(f"norm minus KL, in points: {'; '.join(told)}")
