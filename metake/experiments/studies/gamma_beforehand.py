"""Beyond the paper: what the association γ, read before any edit, says about which edits will fail."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from metake import methods
from metake.data.requests import batches
from metake.editing.diagnosis import diagnose
from metake.editing.keys import KeyReader
from metake.editing.statistics import statistics
from metake.experiments.decision import all_of, any_of, for_and_against, interval, opposite, undecided
from metake.experiments.studies.comparison import PRIMARY, case_rows, comparison, labelled
from metake.experiments.studies.finished import finished
from metake.language.tokens import continuation
from metake.report.style import style
from metake.scoring.evaluation import read
from metake.support.errors import ProvenanceError

FAILS = {"efficacy fails": ("efficacy", 1.0), "generalization below ½": ("generalization", 0.5)}
"""What counts as a failed edit: a metric of the case below a level. In ZsRE's format efficacy 1 needs every token of
the answer.
"""

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
are functions of γ alone: β = γ/(1+γ), upper/lower = (ε/τ) γ.
"""
BASELINES = ("target probability", "subject length", "key norm", "all three baselines")
FOLDS, LEAST = 5, 10  # LEAST: failures, and successes, below which nothing is fitted: two for each fold's test


def gamma_beforehand(
    model: str = "tiny",
    methods_: Sequence[str] = PRIMARY,
    data: dict[str, str] | None = None,
    edits: int = 40,
    batch: int | None = None,
    seeds: Sequence[int] = (0,),
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """`from_run` of every run of a `comparison`, with the data set's name: those already in the folder `out` are read,
    the others made. batch: None for all edits in one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        made = comparison(
            model, list(methods_), data, edits, batch or edits, seeds, text, text_tokens, out=folder
        ).attrs["runs"]
        frame = pd.concat(
            [from_run(folder / run["folder"]).assign(dataset=run["dataset"]) for run in made], ignore_index=True
        )
    frame.attrs["runs"] = made
    return frame[["dataset", *frame.columns.drop("dataset")]]


def from_run(folder: str | Path) -> pd.DataFrame:
    """A finished run, request by request: what could be read before any edit, and what came of it.

    gamma, beta, in_batch, anchor, lower, upper, feasible   see `diagnosis.RequestDiagnosis`;
    under the run's own metric, on
                                                            the unedited model, in_batch among the requests of its batch
    target_log_p     mean log-probability of the target's tokens after the prompt, before the edit
    subject_tokens, key_norm   length of the subject; ‖k‖ at the last edited layer
    before           efficacy before the edit; efficacy, generalization: after the last batch

    Raises ProvenanceError if the run was made on another model, data, or key statistics.
    """
    config, lm, cases, edit = finished(folder)
    editor = methods.method(
        config.method, config.model, seed=config.seed, **config.changes | {"contexts": edit.record.context_templates}
    )
    given = statistics(lm, config.text, layers=editor.layers, tokens=config.text_tokens)
    if given.digest != edit.record.statistics_digest.partition("+")[0]:
        raise ProvenanceError(
            f"{folder} was made with other key statistics than {config.text} gives now: repeat the run in "
            "another folder"
        )
    state, requests = editor.init(lm, given), [case.request for case in cases]
    diagnosed = [found for group in batches(requests, config.batch) for found in diagnose(lm, group, editor, state)]
    norms = (
        KeyReader(lm, requests, editor.contexts, editor.layers[-1]).read(editor.layers[-1]).keys.norm(dim=1).tolist()
    )
    readings = read(lm, [(request.text, request.target) for request in requests])
    rows, scores = (
        [], zip(case_rows(Path(folder) / "before.jsonl"), case_rows(Path(folder) / "cases.jsonl"), strict=True)
    )
    for request, found, norm, reading, (before, after) in zip(
        requests, diagnosed, norms, readings, scores, strict=True
    ):
        told = {"gamma": found.association, "beta": found.attenuation} | {
            name: getattr(found, name) for name in ("in_batch", "anchor", "lower", "upper", "feasible")
        }
        simple = {
            "target_log_p": reading.log_p, "subject_tokens": len(continuation(lm.tokenizer, request.subject)),
            "key_norm": norm
        }
        came = {
            "before": before["efficacy"], "efficacy": after["efficacy"], "generalization": after.get("generalization")
        }
        rows.append({"method": config.method, "seed": config.seed, "id": request.id} | told | simple | came)
    return pd.DataFrame(rows)


def features(records: pd.DataFrame) -> pd.DataFrame:
    """What the classifiers look at, from the records of `from_run`: logarithms of what is positive,
    log odds of shares.
    """
    share = records.in_batch.clip(1e-12, 1 - 1e-12)
    return pd.DataFrame({
        "log_gamma": np.log(records.gamma), "logit_in_batch": np.log(share / (1 - share)),
        "log_anchor": np.log(records.anchor),
        "target_log_p": records.target_log_p, "subject_tokens": records.subject_tokens.astype(float),
        "log_key_norm": np.log(records.key_norm),
    })  # fmt: skip


def failures(records: pd.DataFrame) -> pd.DataFrame:
    """How many edits fail, per data set and method, and whether that is enough to fit a classifier
    (`LEAST` of both kinds).
    """
    rows = []
    for (dataset, method), group in records.groupby(["dataset", "method"], sort=False):
        group = group.drop_duplicates("id")
        for fails, (metric, level) in FAILS.items():
            known = group[metric].dropna()
            count = int((known < level).sum())
            enough = min(count, len(known) - count) >= LEAST
            rows.append(
                {
                    "dataset": dataset, "method": method, "outcome": fails, "edits": len(known), "fail": count,
                    "right before the edit": int((group.before >= 1).sum()), "enough": enough
                }
            )
    return labelled(pd.DataFrame(rows), records)


def predicted(records: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Held-out predictions: every request is judged by classifiers that were fitted to other requests
    (stratified folds).

    Logistic regression on standardized features; its score is calibrated by Platt's sigmoid,
    fitted within the training folds (with some hundred records, isotonic regression would overfit).
    One row per data set, method, outcome, predictor and
    request: fold, fails, score (log odds, not calibrated), probability (calibrated). A request of several seeds counts
    once.
    Where there is not enough to fit, the requests stand there once, under γ, with nothing predicted.
    What is predicted already passes through.
    """
    if "score" in records or "auroc" in records:
        return records
    rows = []
    for cell in failures(records).itertuples():
        metric, level = FAILS[cell.outcome]
        own = (
            records[(records.dataset == cell.dataset) & (records.method == cell.method)]
            .drop_duplicates("id")
            .dropna(subset=metric)
        )
        fails, found = (own[metric] < level).to_numpy(), features(own)
        nothing = {"fold": -1, "score": np.nan, "probability": np.nan}
        for name, columns in PREDICTORS.items() if cell.enough else [(GAMMA, ())]:
            values = found[list(columns)].to_numpy()
            held_out = (
                nothing
                if not cell.enough
                else nothing | {"fold": 0, "score": -values[:, 0]}
                if name == RAW
                else _cross_fitted(values, fails, seed)
            )
            told = {
                "dataset": cell.dataset, "method": cell.method, "outcome": cell.outcome, "predictor": name,
                "id": own.id.to_numpy(), "fails": fails
            }
            rows.append(pd.DataFrame(told | held_out))
    return labelled(pd.concat(rows, ignore_index=True), records)


def _cross_fitted(values: np.ndarray, fails: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """fold, score and probability of every request; without features the share of failures among the others."""
    found = {"fold": np.zeros(len(fails), int), "score": np.zeros(len(fails)), "probability": np.zeros(len(fails))}
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (train, test) in enumerate(folds.split(values, fails)):
        found["fold"][test], found["probability"][test] = number, fails[train].mean()
        if values.shape[1]:
            logistic = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky"))
            calibrated = CalibratedClassifierCV(logistic, method="sigmoid", cv=folds, ensemble=False).fit(
                values[train], fails[train]
            )
            found["score"][test] = calibrated.calibrated_classifiers_[0].estimator.decision_function(values[test])
            found["probability"][test] = calibrated.predict_proba(values[test])[:, 1]
    return found


def concordance(scores: np.ndarray, fails: np.ndarray, folds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """AUROC: share of pairs of a failed and a successful edit in which the failed one has the higher score,
    ties one half.

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
    above, above_low, above_high: γ's AUROC, nothing fitted, minus this predictor's on the same draws,
    for all data sets, methods and outcomes jointly at 95 % (Bonferroni); best: it is the baseline of the highest
    AUROC, which γ is held against. Where too few edits fail for a prediction there is one row with the counts.
    What is assessed already passes through.
    """
    if "auroc" in predictions:
        return predictions
    rows = []
    cells = predictions.groupby(["dataset", "method", "outcome"], sort=False)
    tail = 2.5 / max(1, predictions[predictions.score.notna()].groupby(["dataset", "method", "outcome"]).ngroups)
    for (dataset, method, outcome), cell in cells:
        fails = cell[cell.predictor == GAMMA].fails.to_numpy(bool)
        place = {
            "dataset": dataset, "method": method, "outcome": outcome, "edits": len(fails), "fail": int(fails.sum())
        }
        if cell.score.isna().any():
            rows.append(place | {"predictor": GAMMA, "best": False})
            continue
        counts = np.vstack(
            [
                np.ones(len(fails)),
                np.random.default_rng(seed).multinomial(len(fails), np.full(len(fails), 1 / len(fails)), draws),
            ]
        )
        by = {name: own for name, own in cell.groupby("predictor", sort=False)}
        areas = {
            name: concordance(own.score.to_numpy(), fails, own.fold.to_numpy(), counts) for name, own in by.items()
        }
        briers = {name: float(np.square(own.probability - fails).mean()) for name, own in by.items()}
        best = max(BASELINES, key=lambda name: areas[name][0])
        for name in by:
            (low, high), above = np.nanpercentile(areas[name][1:], [2.5, 97.5]), areas[RAW] - areas[name]
            above_low, above_high = np.nanpercentile(above[1:], [tail, 100 - tail])
            told = {
                "predictor": name, "auroc": areas[name][0], "low": low, "high": high, "brier": briers[name],
                "skill": 1 - briers[name] / briers[BASE]
            }
            rows.append(
                place
                | told
                | {"above": above[0], "above_low": above_low, "above_high": above_high, "best": name == best}
            )
    columns = [
        "dataset", "method", "outcome", "predictor", "edits", "fail", "auroc", "low", "high", "brier", "skill", "above",
        "above_low", "above_high", "best"
    ]
    return labelled(pd.DataFrame(rows, columns=columns), predictions)


def reliability(predictions: pd.DataFrame, predictor: str = GAMMA, bins: int = 4) -> pd.DataFrame:
    """Calibration curve: in quantile bins of the predicted probability, its mean and the share that fails,
    with Wilson's 95 % interval.

    Where nothing is predicted, one row with bin 0 and the share that fails.
    """
    rows = []
    for (dataset, method, outcome), own in predictions[predictions.predictor == predictor].groupby(
        ["dataset", "method", "outcome"], sort=False
    ):
        place = (own.probability.rank(method="first").sub(1) * bins // len(own)).fillna(-1).astype(int)
        for number, group in own.groupby(place):
            n, share = len(group), group.fails.astype(float).mean()
            middle, reach = (
                (share + 1.92 / n) / (1 + 3.84 / n),
                1.96 * np.sqrt(share * (1 - share) / n + 0.96 / n**2) / (1 + 3.84 / n),
            )
            told = {"dataset": dataset, "method": method, "outcome": outcome, "bin": number + 1, "requests": n}
            rows.append(
                told
                | {
                    "predicted": group.probability.mean(), "observed": share, "low": middle - reach,
                    "high": middle + reach
                }
            )
    return labelled(
        pd.DataFrame(
            rows, columns=["dataset", "method", "outcome", "bin", "requests", "predicted", "observed", "low", "high"]
        ),
        predictions,
    )


def against_best(found: pd.DataFrame) -> pd.DataFrame:
    """γ beside the best baseline, one row per data set, method and outcome with enough failures.

    auroc, low, high: of γ with nothing fitted, which no split of the requests can push below chance; brier, skill:
    of the probabilities that are fitted to it.
    """
    place = ["dataset", "method", "outcome"]
    gamma, fitted, best = (
        found[is_it & found.auroc.notna()].set_index(place)
        for is_it in (found.predictor == RAW, found.predictor == GAMMA, found.best)
    )
    told = (
        gamma[["edits", "fail", "auroc", "low", "high"]]
        .join(fitted[["brier", "skill"]])
        .join(
            best[["predictor", "auroc", "above", "above_low", "above_high"]].rename(
                columns={"predictor": "best baseline", "auroc": "its auroc"}
            )
        )
    )
    return labelled(told.reset_index(), found)


def judge(found: pd.DataFrame, least: float = 0.6) -> dict[str, Any]:
    """γ tells beforehand which edits fail, and better than simple baselines: holds if its AUROC, nothing fitted,
    is above the best baseline's wherever enough edits fail, interval and all; does not hold if nowhere,
    and somewhere below it, or everywhere of no use (its AUROC below `least`, interval and all);
    inconclusive otherwise, and if nowhere enough edits fail. found: `assessed`.
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
        f"outcomes): {span}; the best baseline's: "
        f"{told['its auroc'].median():.2f}"
    )
    return decided.quiet().verdict(
        f"{said}; γ is above it in {above.sum()} of {len(told)}, below in {below.sum()}, intervals excluding zero"
    )
