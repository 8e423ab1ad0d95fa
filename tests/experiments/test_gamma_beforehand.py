"""γ read before an edit: what is read is the diagnosis, predictions are of held-out requests,
and the judgment can fall either way.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from models import stand_in
from same import fingerprint
from sklearn.metrics import roc_auc_score

import metake as mk
from metake import report
from metake.editing.statistics import statistics
from metake.experiments import former, record, runs
from metake.experiments.cases import select
from metake.experiments.studies import comparison, finished, predictors
from metake.experiments.studies import gamma_beforehand as module
from metake.language.tokens import continuation, encode
from metake.support.errors import ProvenanceError

SETTINGS = {"methods_": ("memit", "alphaedit"), "data": {"F": "facts"}, "edits": 5, "batch": 3, "text_tokens": 3000}
EFFICACY, GENERALIZATION = predictors.FAILS

# What is read of a run


@pytest.fixture(scope="module")
def model():
    return stand_in()


@pytest.fixture(autouse=True)
def _one_model(monkeypatch, model):
    for place in (runs, finished):
        monkeypatch.setattr(place, "load", lambda *_: model)


@pytest.fixture(scope="module")
def run(tmp_path_factory, session_cache, model):
    """Records, and the folder of the runs that they were read from."""
    out = tmp_path_factory.mktemp("gamma")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        for place in (runs, finished):
            patch.setattr(place, "load", lambda *_: model)
        before = fingerprint(model.model)
        found = module.gamma_beforehand(**SETTINGS, out=out)
        assert fingerprint(model.model) == before
    return found, out


def test_what_is_read_is_the_diagnosis_before_and_the_evaluation_after(run, model):
    found, out = run
    assert found.groupby("method").size().to_dict() == {"memit": 5, "alphaedit": 5} and set(found.dataset) == {"F"}
    cases = select(model, mk.facts(), 5, 0)
    for method in SETTINGS["methods_"]:
        own, editor = found[found.method == method], mk.methods.method(method, "tiny", seed=0)
        given = statistics(model, layers=editor.layers, tokens=3000)
        expected = [
            d for part in (cases[:3], cases[3:]) for d in mk.diagnose(model, [c.request for c in part], editor, given)
        ]
        assert own.id.to_list() == [d.id for d in expected]
        for column, name in (
            {"gamma": "association", "beta": "attenuation"} | {n: n for n in ("in_batch", "anchor", "lower", "upper")}
        ).items():
            assert own[column].to_numpy() == pytest.approx([getattr(d, name) for d in expected], rel=1e-9)
        for file, columns in (("cases.jsonl", ["efficacy", "generalization"]), ("before.jsonl", ["efficacy"])):
            scores = [json.loads(line) for line in (out / f"facts-{method}-0" / file).read_text().splitlines()]
            shown = own[columns] if file == "cases.jsonl" else own[["before"]].set_axis(columns, axis=1)
            assert shown.to_dict("records") == [{k: row[k] for k in columns} for row in scores]


def test_the_simple_baselines_are_what_they_say(run, model):
    found, _ = run
    own = found[found.method == "memit"].set_index("id")
    for case in select(model, mk.facts(), 5, 0):
        prompt, target = encode(model.tokenizer, case.request.text), continuation(model.tokenizer, case.request.target)
        with torch.no_grad():
            log_p = torch.log_softmax(model.model(torch.tensor([prompt + target])).logits[0], -1)
        steps = [log_p[len(prompt) - 1 + k, token].item() for k, token in enumerate(target)]
        row = own.loc[case.request.id]
        assert (
            row.target_log_p == pytest.approx(np.mean(steps))
            and row.subject_tokens == len(continuation(model.tokenizer, case.request.subject)) > 0
        )
    assert (own.key_norm > 0).all() and own.key_norm.nunique() == 5


def test_beta_and_the_interval_say_what_gamma_says(run):
    found, _ = run
    assert (found.beta / (1 - found.beta)).to_numpy() == pytest.approx(found.gamma.to_numpy())
    assert (found.upper / found.lower).to_numpy() == pytest.approx(found.gamma.to_numpy()), "τ = ε"
    assert (found.feasible == (found.gamma >= 1)).all()
    looked = predictors.features(found)
    assert np.exp(looked.log_gamma).to_numpy() == pytest.approx(found.gamma.to_numpy())
    assert (1 / (1 + np.exp(-looked.logit_in_batch))).to_numpy() == pytest.approx(found.in_batch.to_numpy())
    assert {c for columns in predictors.PREDICTORS.values() for c in columns} <= set(looked) and looked.notna().all(
        axis=None
    )


def test_runs_that_are_there_are_read(run, monkeypatch):
    found, out = run
    monkeypatch.setattr(comparison, "run", lambda *_, **__: pytest.fail("a finished run was made again"))
    pd.testing.assert_frame_equal(module.gamma_beforehand(**SETTINGS, out=out), found, check_exact=True)
    one = module.from_run(out / "facts-alphaedit-0")
    pd.testing.assert_frame_equal(
        one, found[found.method == "alphaedit"].drop(columns="dataset").reset_index(drop=True), check_exact=True
    )


def test_a_run_of_other_statistics_is_refused(run, monkeypatch):
    monkeypatch.setattr(
        former, "statistics", lambda lm, text, layers, tokens: statistics(lm, text, layers=layers, tokens=2500)
    )
    with pytest.raises(ProvenanceError, match="other key statistics than embedded"):
        module.from_run(run[1] / "facts-memit-0")


# Prediction


def made(weights, count=200, seed=0, rate=0.0, method="memit"):
    """Requests whose log odds of failing are `weights` of the named quantities, standardized, plus `rate`."""
    generator = np.random.default_rng(seed)
    gamma, log_p, length, norm = (
        np.exp(generator.standard_normal(count)), generator.standard_normal(count), generator.integers(1, 9, count),
        np.exp(0.1 * generator.standard_normal(count))
    )
    known = {"gamma": np.log(gamma), "target": log_p, "length": (length - 4.5) / 2.3}
    fails = generator.random(count) < 1 / (1 + np.exp(-rate - sum(w * known[k] for k, w in weights.items())))
    columns = {
        "gamma": gamma, "beta": gamma / (1 + gamma), "in_batch": 0.9 * gamma / (1 + gamma),
        "anchor": np.exp(generator.standard_normal(count)), "target_log_p": log_p, "subject_tokens": length,
        "key_norm": norm
    }
    came = {"before": 0.0, "efficacy": 1.0 - fails, "generalization": generator.choice([0.0, 0.5, 1.0], count)}
    return pd.DataFrame(
        {"dataset": "F", "method": method, "seed": 0, "id": [str(i) for i in range(count)]} | columns | came
    )


@pytest.fixture(scope="module")
def mixed():
    """Requests that γ decides under MEMIT, of which AlphaEdit fails on next to none; and what is predicted of them."""
    records = pd.concat([made({"gamma": -2.0}), made({}, rate=-6.0, method="alphaedit")])
    return records, predictors.predicted(records)


def test_what_decides_is_found_and_what_does_not_is_chance(mixed):
    found = predictors.assessed(mixed[1])
    found = found[(found.outcome == EFFICACY) & (found.method == "memit")].set_index("predictor")
    assert found.loc[predictors.GAMMA, "low"] > 0.7 and found.loc[predictors.GAMMA, "skill"] > 0.15
    for name in ("target probability", "subject length", "key norm"):
        assert found.loc[name, "low"] < 0.5 < found.loc[name, "high"] or found.loc[name, "high"] < 0.6
        assert found.loc[name, "skill"] < 0.05 and found.loc[name, "above_low"] > 0
    assert found.loc["whole diagnosis", "auroc"] == pytest.approx(found.loc[predictors.GAMMA, "auroc"], abs=0.05)
    assert tuple(found.loc[predictors.BASE, ["auroc", "skill"]]) == (0.5, 0.0)
    records = made({"gamma": -2.0})
    assert found.loc[predictors.RAW, "auroc"] == pytest.approx(roc_auc_score(records.efficacy < 1, -records.gamma)), (
        "over all pairs: nothing is fitted"
    )
    assert found.best.sum() == 1 and found[found.best].auroc.item() == found.loc[list(predictors.BASELINES)].auroc.max()


def test_a_request_is_judged_by_classifiers_that_have_not_seen_it():
    generator = np.random.default_rng(0)
    values, fails = generator.standard_normal((120, 40)), generator.random(120) < 0.5
    held_out = predictors._cross_fitted(values, fails, 0)
    seen = predictors.LogisticRegression().fit(values, fails).decision_function(values)
    assert roc_auc_score(fails, seen) > 0.8, "it would learn the noise by heart"
    assert predictors.concordance(held_out["score"], fails, held_out["fold"], np.ones((1, 120))).item() < 0.65
    assert np.bincount(held_out["fold"]).tolist() == [24] * 5
    base = predictors._cross_fitted(np.empty((120, 0)), fails, 0)
    for fold in range(5):
        assert base["probability"][base["fold"] == fold] == pytest.approx(fails[base["fold"] != fold].mean())


def test_the_probabilities_are_calibrated():
    records = made({"gamma": -2.0}, count=600).assign(generalization=1.0)
    predictions = predictors.predicted(records)
    curve = predictors.reliability(predictions)
    own = curve[curve.outcome == EFFICACY]
    assert (
        own.requests.tolist() == [150] * 4
        and own.predicted.is_monotonic_increasing
        and own.predicted.iloc[-1] - own.predicted.iloc[0] > 0.6
    )
    assert ((own.low < own.predicted) & (own.predicted < own.high)).sum() >= 3 and (
        own.predicted - own.observed
    ).abs().max() < 0.1
    mine = predictions[(predictions.predictor == predictors.GAMMA) & (predictions.outcome == EFFICACY)]
    found = predictors.assessed(predictions)
    assert predictors.predicted(predictions) is predictions
    assert predictors.assessed(predictors.predicted(found)) is found
    row = found[(found.predictor == predictors.GAMMA) & (found.outcome == EFFICACY)].iloc[0]
    assert row.brier == pytest.approx(np.square(mine.probability - mine.fails).mean())
    assert row.fail == (records.efficacy < 1).sum() and row.edits == 600


def test_wilsons_interval():
    frame = pd.DataFrame(
        {
            "dataset": "F", "method": "memit", "outcome": EFFICACY, "predictor": predictors.GAMMA,
            "probability": np.linspace(0.1, 0.2, 10), "fails": [True] * 3 + [False] * 7
        }
    )
    found = predictors.reliability(frame, bins=1).iloc[0]
    assert (found.observed, found.requests) == (0.3, 10) and (found.low, found.high) == pytest.approx(
        (0.1078, 0.6032), abs=1e-3
    )


def test_auroc_is_sklearns_within_a_fold_and_bootstrap_counts_are_repetitions():
    generator = np.random.default_rng(0)
    scores, fails = generator.integers(0, 6, 60).astype(float), generator.random(60) < 0.4
    one = np.zeros(60, int)
    assert predictors.concordance(scores, fails, one, np.ones((1, 60))).item() == pytest.approx(
        roc_auc_score(fails, scores)
    ), "with ties"
    counts = generator.multinomial(60, np.full(60, 1 / 60), 3)
    repeated = [roc_auc_score(np.repeat(fails, c), np.repeat(scores, c)) for c in counts]
    assert predictors.concordance(scores, fails, one, counts).tolist() == pytest.approx(repeated)
    folds = np.arange(60) % 2
    halves = [
        (roc_auc_score(fails[folds == k], scores[folds == k]), fails[folds == k].sum() * (~fails[folds == k]).sum())
        for k in (0, 1)
    ]
    expected = sum(a * n for a, n in halves) / sum(n for _, n in halves)
    found = predictors.concordance(scores + 100 * folds, fails, folds, np.ones((1, 60))).item()
    assert found == pytest.approx(expected), "folds are not compared with each other"


def test_failures_are_counted_and_too_few_are_not_judged(mixed):
    records, predictions = mixed
    counts = predictors.failures(records).set_index(["method", "outcome"])
    assert counts.loc[("memit", EFFICACY), "fail"] == (records[records.method == "memit"].efficacy < 1).sum()
    assert (
        counts.loc[("memit", GENERALIZATION), "fail"] == (records[records.method == "memit"].generalization < 0.5).sum()
    )
    assert counts.loc[("memit", EFFICACY), "enough"] and not counts.loc[("alphaedit", EFFICACY), "enough"]
    found = predictors.assessed(predictions).set_index(["method", "outcome"])
    few = found.loc[[("alphaedit", EFFICACY)]]
    assert (
        len(few) == 1
        and few.auroc.isna().all()
        and few.fail.item() == counts.loc[("alphaedit", EFFICACY), "fail"]
        and len(found) == 1 + 3 * len(predictors.PREDICTORS)
    )
    assert set(predictors.against_best(found.reset_index()).set_index(["method", "outcome"]).index) == {
        ("memit", EFFICACY), ("memit", GENERALIZATION), ("alphaedit", GENERALIZATION)
    }
    # a request of two seeds counts once
    pd.testing.assert_frame_equal(
        predictors.failures(pd.concat([records, records.assign(seed=1)])), predictors.failures(records)
    )


def judged(records):
    return predictors.judge(predictors.assessed(predictors.predicted(records)))


@pytest.mark.parametrize(
    ("weights", "holds"), [({"gamma": -2.5}, True), ({"target": -2.5}, False), ({"gamma": -1.0, "target": -1.0}, None)]
)
def test_the_verdict_follows_what_decides(weights, holds):
    verdict = judged(made(weights, count=300).assign(generalization=1.0))
    assert verdict["holds"] is holds and "(1 of 2 data sets, methods and outcomes)" in verdict["decided_by"]


def test_without_failures_nothing_is_decided():
    records = made({}, rate=-9.0).assign(generalization=1.0)
    verdict = judged(records)
    assert verdict["holds"] is None and "MEMIT on F: efficacy fails in 0 of 200" in verdict["decided_by"]


# Drawings and recording


def test_drawings_hold_their_numbers_and_name_what_is_too_few(project, mixed):
    records, predictions = mixed
    counts = predictors.failures(records)
    found, curves = predictors.assessed(predictions), predictors.reliability(predictions)
    shown = report.gamma_auroc(found)
    row = found[(found.method == "memit") & (found.outcome == EFFICACY) & (found.predictor == predictors.GAMMA)].iloc[0]
    assert (
        f"{row.auroc:.2f} [{row.low:.2f}, {row.high:.2f}]" in str(shown)
        and f"MEMIT, {predictors.GAMMA}: {row.auroc:.2f}" in shown.alt
    )
    few = counts[(counts.method == "alphaedit") & (counts.outcome == EFFICACY)].fail.item()
    curve = report.gamma_calibration(curves)
    assert (
        all(f"AlphaEdit: {few} of 200, too one-sided" in figure.svg["light"] for figure in (shown, curve))
        and f">{predictors.BASE}<" not in shown.svg["light"]
    )
    assert f"{curves.observed.iloc[0]:.3f}" in str(curve)
    told = predictors.against_best(found)
    assert len(told) == 3 and set(told["best baseline"]) <= set(predictors.BASELINES)


def test_nothing_to_judge_can_be_drawn(project):
    records = made({}, rate=-9.0).assign(generalization=1.0)
    predictions = predictors.predicted(records)
    failures, calibration = predictors.assessed(predictions), predictors.reliability(predictions)
    for figure in (report.gamma_auroc(failures), report.gamma_calibration(calibration)):
        assert (
            "Nowhere enough edits fail" in figure.alt
            and "MEMIT: 0 of 200, too one-sided" in figure.svg["light"]
            and EFFICACY in str(figure)
        )


def test_the_recording_reads_the_comparisons_runs(monkeypatch, project, run):
    asked = {}
    monkeypatch.setattr(record, "provenance", lambda *_: {"model": "tiny"})
    monkeypatch.setattr(record, "gamma_beforehand", lambda **settings: asked.update(gamma=settings) or run[0])
    monkeypatch.setattr(
        record, "comparison", lambda **settings: asked.update(comparison=settings) or pd.DataFrame({"id": ["1"]})
    )
    lines = list(record.record("tiny", only=["comparison", "gamma"], edits=7, batch=5, seeds=(2, 3)))
    assert "wrote results/gamma-tiny.jsonl" in lines
    assert asked["gamma"] == {k: v for k, v in asked["comparison"].items() if k != "methods"}
    again = report.recorded("gamma-tiny")
    pd.testing.assert_frame_equal(again, run[0], check_dtype=False)
    assert again.attrs["provenance"]["edits"] == 5 and again.attrs["provenance"]["batch"] == 3
