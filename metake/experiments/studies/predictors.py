"""Which edits fail, foretold by classifiers that have not seen them: how good γ is, beside simple baselines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from metake.experiments.decision import all_of, any_of, for_and_against, interval, opposite, undecided
from metake.experiments.studies.comparison import labelled
from metake.report.style import style

FAILS = {"efficacy fails": ("efficacy", 1.0), "generalization below ½": ("generalization", 0.5)}
"""A failed edit: a metric of the case below a level. In ZsRE's format efficacy 1 needs every token of the answer."""
GAMMA, RAW, BASE = "γ (β, interval)", "low γ, nothing fitted", "base rate"
PREDICTORS: dict[str, tuple[str, ...]] = {
    GAMMA: ("log_gamma",),
    RAW: ("log_gamma",),
    "whole diagnosis": ("log_gamma", "logit_in_batch", "log_anchor"),
    "target probability": ("target_log_p",),
    "subject length": ("subject_tokens",),
    "key norm": ("log_key_norm",),
    "all three baselines": ("target_log_p", "subject_tokens", "log_key_norm"),
    "baselines and γ": ("log_gamma", "target_log_p", "subject_tokens", "log_key_norm"),
    BASE: (),
}
"""What a classifier may look at; RAW: −log γ itself as the score, the lower the riskier. β and the feasible interval
are functions of γ alone: β = γ/(1+γ), upper/lower = (ε/τ) γ."""
BASELINES = ("target probability", "subject length", "key norm", "all three baselines")
NOTHING = {"fold": -1, "score": np.nan, "probability": np.nan}  # predicted
FOLDS, LEAST = 5, 10  # LEAST: failures, and successes, below which nothing is fitted: two for each fold's test


def features(records: pd.DataFrame) -> pd.DataFrame:
    """What classifiers look at, from `gamma_beforehand`'s records: logarithms, of shares their log odds."""
    share = records.in_batch.clip(1e-12, 1 - 1e-12)
    return pd.DataFrame({
        "log_gamma": np.log(records.gamma), "logit_in_batch": np.log(share / (1 - share)),
        "log_anchor": np.log(records.anchor),
        "target_log_p": records.target_log_p, "subject_tokens": records.subject_tokens.astype(float),
        "log_key_norm": np.log(records.key_norm),
    })  # fmt: skip


def failures(records: pd.DataFrame) -> pd.DataFrame:
    """How many edits fail, per data set and method; `enough` to fit a classifier are `LEAST` of either outcome."""
    rows = []
    for (dataset, method), group in records.groupby(["dataset", "method"], sort=False):
        group = group.drop_duplicates("id")
        for fails, (metric, level) in FAILS.items():
            known = group[metric].dropna()
            count, right = int((known < level).sum()), int((group.before >= 1).sum())
            row = {"dataset": dataset, "method": method, "outcome": fails, "edits": len(known), "fail": count}
            rows.append(row | {"right before the edit": right, "enough": min(count, len(known) - count) >= LEAST})
    return labelled(pd.DataFrame(rows), records)


def predicted(records: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Held-out predictions: every request is judged by classifiers that were fitted to others (stratified folds).

    Logistic regression on standardized features; its score is calibrated by Platt's sigmoid, fitted within the training
    folds (with some hundred records, isotonic regression would overfit).
    One row per data set, method, outcome, predictor and request: fold, fails, score (log odds, not calibrated),
    probability (calibrated). A request of several seeds counts once.
    Where there is not enough to fit, the requests stand there once, under γ, with nothing predicted.
    What is predicted already passes through.
    """
    if "score" in records or "auroc" in records:
        return records
    rows = []
    for cell in failures(records).itertuples():
        metric, level = FAILS[cell.outcome]
        own = records[(records.dataset == cell.dataset) & (records.method == cell.method)]
        own = own.drop_duplicates("id").dropna(subset=metric)
        fails = (own[metric] < level).to_numpy()
        told = {"dataset": cell.dataset, "method": cell.method, "outcome": cell.outcome}
        for name in PREDICTORS if cell.enough else [GAMMA]:
            found = _held_out(name, own, fails, seed) if cell.enough else NOTHING
            rows.append(pd.DataFrame(told | {"predictor": name, "id": own.id.to_numpy(), "fails": fails} | found))
    return labelled(pd.concat(rows, ignore_index=True), records)


def _held_out(name: str, records: pd.DataFrame, fails: np.ndarray, seed: int) -> dict[str, Any]:
    values = features(records)[list(PREDICTORS[name])].to_numpy()
    return NOTHING | {"fold": 0, "score": -values[:, 0]} if name == RAW else _cross_fitted(values, fails, seed)


def _cross_fitted(values: np.ndarray, fails: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """fold, score and probability of every request; without features the share of failures among the others."""
    found = {"fold": np.zeros(len(fails), int), "score": np.zeros(len(fails)), "probability": np.zeros(len(fails))}
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (train, test) in enumerate(folds.split(values, fails)):
        found["fold"][test], found["probability"][test] = number, fails[train].mean()
        if values.shape[1]:
            logistic = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
            calibrated = CalibratedClassifierCV(logistic, method="sigmoid", cv=folds, ensemble=False)
            calibrated.fit(values[train], fails[train])
            found["score"][test] = calibrated.calibrated_classifiers_[0].estimator.decision_function(values[test])
            found["probability"][test] = calibrated.predict_proba(values[test])[:, 1]
    return found


def concordance(scores: np.ndarray, fails: np.ndarray, folds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AUROC: the share of pairs of a failed and a successful edit in which the failed one scores higher, ties one half.

    Pairs within a fold only: scores of different folds are of different classifiers. counts: (draws, n) how often each
    request is drawn; one value a draw.
    """
    right, pairs = np.zeros(len(counts)), np.zeros(len(counts))
    for fold in np.unique(folds):
        bad, good = np.flatnonzero((folds == fold) & fails), np.flatnonzero((folds == fold) & ~fails)
        order = (np.sign(scores[bad][:, None] - scores[good]) + 1) / 2
        right += ((counts[:, bad] @ order) * counts[:, good]).sum(1)
        pairs += counts[:, bad].sum(1) * counts[:, good].sum(1)
    return right / pairs


def assessed(predictions: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How good each predictor is on held-out requests: one row per data set, method, outcome and predictor.

    auroc, low, high: `concordance`, with a 95 % bootstrap interval over requests; brier: mean (p − fails)²; skill:
    1 − brier / base rate's.
    above, above_low, above_high: γ's AUROC, nothing fitted, minus this predictor's on the same draws, for all data
    sets, methods and outcomes jointly at 95 % (Bonferroni); best: it is the baseline of the highest AUROC, which γ is
    held against. Where too few edits fail for a prediction there is one row with the counts.
    What is assessed already passes through.
    """
    if "auroc" in predictions:
        return predictions
    rows, place = [], ["dataset", "method", "outcome"]
    tail = 2.5 / max(1, predictions[predictions.score.notna()].groupby(place).ngroups)
    for where, cell in predictions.groupby(place, sort=False):
        fails = cell[cell.predictor == GAMMA].fails.to_numpy(bool)
        told = dict(zip(place, where, strict=True)) | {"edits": len(fails), "fail": int(fails.sum())}
        if cell.score.isna().any():
            rows.append(told | {"predictor": GAMMA, "best": False})
        else:
            rows += [told | row for row in _compared(cell, fails, tail, draws, seed)]
    columns = [
        *place, "predictor", "edits", "fail", "auroc", "low", "high", "brier", "skill", "above", "above_low",
        "above_high", "best"
    ]
    return labelled(pd.DataFrame(rows, columns=columns), predictions)


def _compared(cell: pd.DataFrame, fails: np.ndarray, tail: float, draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """Every predictor of one data set, method and outcome, on the same draws; tail: percent, of the joint interval."""
    count = len(fails)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    counts, by = np.vstack([np.ones(count), drawn]), dict(list(cell.groupby("predictor", sort=False)))
    areas = {name: concordance(own.score.to_numpy(), fails, own.fold.to_numpy(), counts) for name, own in by.items()}
    briers = {name: float(np.square(own.probability - fails).mean()) for name, own in by.items()}
    best = max(BASELINES, key=lambda name: areas[name][0])
    for name in by:
        low, high = np.nanpercentile(areas[name][1:], [2.5, 97.5])
        above = areas[RAW] - areas[name]
        above_low, above_high = np.nanpercentile(above[1:], [tail, 100 - tail])
        yield {
            "predictor": name, "auroc": areas[name][0], "low": low, "high": high, "brier": briers[name],
            "skill": 1 - briers[name] / briers[BASE], "above": above[0], "above_low": above_low,
            "above_high": above_high, "best": name == best
        }


def reliability(predictions: pd.DataFrame, predictor: str = GAMMA, bins: int = 4) -> pd.DataFrame:
    """Calibration curve: in quantile bins of the predicted probability, its mean and the share that fails, with
    Wilson's 95 % interval. Where nothing is predicted, one row with bin 0 and the share that fails."""
    rows, place = [], ["dataset", "method", "outcome"]
    for where, own in predictions[predictions.predictor == predictor].groupby(place, sort=False):
        bin_of = (own.probability.rank(method="first").sub(1) * bins // len(own)).fillna(-1).astype(int)
        for number, group in own.groupby(bin_of):
            n, share = len(group), group.fails.astype(float).mean()
            middle = (share + 1.92 / n) / (1 + 3.84 / n)
            reach = 1.96 * np.sqrt(share * (1 - share) / n + 0.96 / n**2) / (1 + 3.84 / n)
            told = dict(zip(place, where, strict=True)) | {"bin": number + 1, "requests": n}
            told |= {"predicted": group.probability.mean(), "observed": share}
            rows.append(told | {"low": middle - reach, "high": middle + reach})
    columns = [*place, "bin", "requests", "predicted", "observed", "low", "high"]
    return labelled(pd.DataFrame(rows, columns=columns), predictions)


def against_best(found: pd.DataFrame) -> pd.DataFrame:
    """γ beside the best baseline, one row per data set, method and outcome with enough failures.

    auroc, low, high: of γ with nothing fitted, which no split of the requests can push below chance; brier, skill:
    of the probabilities that are fitted to it.
    """
    place, known = ["dataset", "method", "outcome"], found[found.auroc.notna()]
    gamma, fitted, best = (
        known[which].set_index(place) for which in (known.predictor == RAW, known.predictor == GAMMA, known.best)
    )
    best = best.rename(columns={"predictor": "best baseline", "auroc": "its auroc"})
    told = gamma[["edits", "fail", "auroc", "low", "high"]].join(fitted[["brier", "skill"]])
    told = told.join(best[["best baseline", "its auroc", "above", "above_low", "above_high"]])
    return labelled(told.reset_index(), found)


def judge(found: pd.DataFrame, least: float = 0.6) -> dict[str, Any]:
    """γ tells beforehand which edits fail, and better than simple baselines. found: `assessed`.

    Holds if its AUROC, nothing fitted, is above the best baseline's wherever enough edits fail, interval and all; does
    not hold if nowhere, and somewhere below it, or everywhere of no use (its AUROC below `least`, interval and all);
    inconclusive otherwise, and if nowhere enough edits fail.
    """
    told = against_best(found)
    if told.empty:
        said = "; ".join(
            f"{style(r.method).name} on {r.dataset}: {r.outcome} in {r.fail} of {r.edits}" for r in found.itertuples()
        )
        return undecided("").verdict(f"nowhere {LEAST} edits fail and {LEAST} succeed: {said}")
    above, below = told.above_low > 0, told.above_high < 0
    ahead = [interval("γ minus the best baseline", r.above, r.above_low, r.above_high) for r in told.itertuples()]
    useful = [interval("AUROC of γ", r.auroc, r.low, r.high, least) for r in told.itertuples()]
    refuted = any_of([any_of(map(opposite, ahead)), all_of(map(opposite, useful))])
    decided = for_and_against(all_of(ahead), undecided("") if above.any() else refuted)
    cells = len(found.drop_duplicates(["dataset", "method", "outcome"]))
    span = f"{told.auroc.median():.2f} (from {told.auroc.min():.2f} to {told.auroc.max():.2f})"
    said = (
        f"AUROC of γ as it is, median where enough edits fail ({len(told)} of {cells} data sets, methods and "
        f"outcomes): {span}; the best baseline's: {told['its auroc'].median():.2f}"
    )
    return decided.quiet().verdict(
        f"{said}; γ is above it in {above.sum()} of {len(told)}, below in {below.sum()}, intervals excluding zero"
    )
