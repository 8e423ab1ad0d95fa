"""What an editor of the gradient family writes at other sizes of its step, and comparisons at equal specificity.

A larger step η raises efficacy and costs specificity, whatever is learned. So editors are not compared at their own η:
each is asked at several multiples of it, and read off where its specificity falls to one and the same level.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from metake.data.requests import Cases, EditCase
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.editing.gradient.training import Training, train
from metake.experiments.studies.comparison import METRICS
from metake.language.model import LanguageModel
from metake.scoring.evaluation import evaluate
from metake.support.errors import NumericalError

SCORES = METRICS[:3]
FACTORS = (0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)
LEVEL = 80.0  # percent of specificity at which editors are compared, fixed before anything was recorded


class Variant(NamedTuple):
    """An editor to train: back-propagation steps J, the penalty, what learns, and on how many batches.

    learns: "network", all of it; "step", only η and λ, the networks stay the identity; "nothing": only the moments of
    what passes by are taken, the normalization that every member needs.
    """

    steps: int
    penalty: str
    learns: str
    batches: int

    def made(self, lm: LanguageModel, cases: Cases, rule: GradientRule, modules: Sequence[str], training: Training,
             exclude: Sequence[str] = ()) -> GradientEditor:  # fmt: skip
        """The editor of this variant, by a rule and a training that say all the rest."""
        rates = {"network": {}, "step": {"rate": 0.0}, "nothing": {"rate": 0.0, "step_rate": 0.0}}[self.learns]
        own = replace(training, steps=self.batches, **rates)
        return train(lm, cases, replace(rule, steps=self.steps, penalty=self.penalty), modules, own, exclude)


def scaled(editor: GradientEditor, factor: float) -> GradientEditor:
    """The editor with every step η times `factor`."""
    networks = copy.deepcopy(editor.networks)
    with torch.no_grad():
        for network in (n for step in networks for n in step):
            network.step.mul_(factor)
    return replace(editor, networks=networks, rule=replace(editor.rule, step=factor * editor.rule.step))


def scores(lm: LanguageModel, editor: GradientEditor, cases: Sequence[EditCase], batch: int) -> list[dict[str, Any]]:
    """The three scores of each case, as shares: edited in batches of `batch`, each on the unedited model and asked
    alone. A batch whose edit breaks the model counts as failed: 0 in all of them."""
    rows = []
    for start in range(0, len(cases), batch):
        own = list(cases[start : start + batch])
        try:
            with editor.edit(lm, [case.request for case in own]).applied(lm):
                found = evaluate(lm, own).records()
        except NumericalError:
            found = [{"id": case.request.id} | dict.fromkeys(SCORES, 0.0) for case in own]
        rows += [{name: row[name] for name in ("id", *SCORES)} for row in found]
    return rows


def swept(lm: LanguageModel, editor: GradientEditor, cases: Sequence[EditCase], batch: int,
          factors: Sequence[float] = FACTORS) -> list[dict[str, Any]]:  # fmt: skip
    """`scores` at every multiple of the editor's step: rows of factor, id, and the three."""
    return [{"factor": f} | row for f in factors for row in scores(lm, scaled(editor, f), cases, batch)]


class Curves:
    """Scores of variants over the factor, (seeds, factors, cases, 3) each, and what they are at equal specificity.

    records: columns variant, seed, factor, id, and the three scores. Every variant has the same seeds and cases.
    """

    def __init__(self, records: pd.DataFrame):
        self.found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, own in records.groupby("variant", sort=False):
            own = own.sort_values(["seed", "factor", "id"])
            factors, seeds = np.sort(own.factor.unique()), own.seed.nunique()
            table = own[list(SCORES)].to_numpy().reshape(seeds, len(factors), -1, len(SCORES))
            self.found[str(name)] = (factors, table)

    def mean(self, name: str) -> pd.DataFrame:
        """A row per factor: the three scores in percent."""
        factors, table = self.found[name]
        return pd.DataFrame(100 * table.mean((0, 2)), columns=list(SCORES)).assign(factor=factors)

    def at(self, name: str, level: float, metric: str, by: str = "specificity",
           drawn: tuple[np.ndarray, np.ndarray] | None = None) -> float:  # fmt: skip
        """A score, in percent, where `by` falls (rises) to the level as the step grows; NaN if it never crosses it.

        drawn: seeds and, for each, cases to take instead of all.
        """
        _, table = self.found[name]
        if drawn is not None:
            table = table[drawn[0][:, None, None], np.arange(table.shape[1])[None, :, None], drawn[1][:, None, :]]
        means = 100 * table.mean((0, 2))
        path, wanted = (means[:, SCORES.index(one)] for one in (by, metric))
        sign = -1 if by == "specificity" else 1
        rising = np.maximum.accumulate(sign * path)  # a step that is larger and yet keeps more says nothing of size
        if not rising[0] <= sign * level <= rising[-1]:
            return float("nan")
        return float(np.interp(sign * level, *_steps(rising, wanted)))

    def difference(self, one: str, other: str, level: float = LEVEL, metric: str = "generalization",
                   by: str = "specificity", draws: int = 400, seed: int = 0) -> tuple[float, float, float]:  # fmt: skip
        """`one` minus `other` at equal `by`, in points, with a 95 % bootstrap interval over seeds and their cases, the
        same for both. NaN where one of the two does not reach the level."""
        seeds, cases = self.found[one][1].shape[0], self.found[one][1].shape[2]
        estimate = self.at(one, level, metric, by) - self.at(other, level, metric, by)
        generator, found = np.random.default_rng(seed), []
        for _ in range(draws):
            drawn = generator.integers(0, seeds, seeds), generator.integers(0, cases, (seeds, cases))
            found.append(self.at(one, level, metric, by, drawn) - self.at(other, level, metric, by, drawn))
        there = np.array(found)[~np.isnan(found)]
        if estimate != estimate or len(there) < draws / 2:
            return estimate, float("nan"), float("nan")
        return estimate, *np.percentile(there, [2.5, 97.5])

    def differences(self, pairs: Mapping[str, tuple[str, str]], level: float = LEVEL,
                    metrics: Sequence[str] = SCORES[:2], by: str = "specificity") -> pd.DataFrame:  # fmt: skip
        """A row per pair and score: what is compared, the difference in points, its interval, and both sides."""
        rows = []
        for what, (one, other) in pairs.items():
            for metric in metrics:
                sides = [self.at(name, level, metric, by) for name in (one, other)]
                estimate, low, high = self.difference(one, other, level, metric, by)
                rows.append({"compared": what, "metric": metric, "first": sides[0], "second": sides[1],
                             "difference": estimate, "low": low, "high": high})  # fmt: skip
        return pd.DataFrame(rows, columns=["compared", "metric", "first", "second", "difference", "low", "high"])


def _steps(rising: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the path moves: of points that stand still the first, which the smaller step reached."""
    moves = np.concatenate([[True], np.diff(rising) > 0])
    return rising[moves], wanted[moves]
