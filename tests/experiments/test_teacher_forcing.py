"""What teacher forcing hides: the same runs as the comparison, asked freely, and the baselines that edit nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from models import stand_in

import metake as mk
from metake.data.requests import in_prompt
from metake.experiments import record, runs
from metake.experiments.studies import asked, comparison, finished
from metake.experiments.studies import teacher_forcing as forcing
from metake.scoring import evaluation

METHODS = ["ultraedit", "in_prompt", "in_prompt/beside"]
OWN = [
    {"prompt": "The home of {} is", "subject": subject, "target": new, "true": old, "id": subject[0].lower(),
     "paraphrases": [f"{subject} lives in"],
     "neighborhood": [{"prompt": "The Boeing 747 flies to", "target": "Berlin"}]}
    for subject, new, old in (("Ada", "Rome", "Paris"), ("Beyoncé", "Paris", "Berlin"), ("Cid", "Madrid", "Rome"))
]  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    for module in (runs, finished, asked):
        monkeypatch.setattr(module, "load", lambda *_, **__: stand_in())
    monkeypatch.setattr(evaluation, "FREE", 4)
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, OWN)))
    return {"methods": METHODS, "data": {"Own": str(tmp_path / "own.jsonl")}, "edits": 3, "batch": 2}


def shares(records, method):
    own = records[records.method == method].set_index("id").sort_index()
    return own.drop(columns=["dataset", "method", "seed"]).dropna(axis=1, how="all")


def test_forced_scores_are_the_comparisons_and_free_ones_those_of_the_edited_model(small, tmp_path):
    found = forcing.teacher_forcing(**small, out=tmp_path / "runs")
    plain = comparison.comparison(**small | {"methods": METHODS[:1]}, out=tmp_path / "runs")
    for method in ("pre-edit", "ultraedit"):
        same = [name for name in shares(plain, method)]
        pd.testing.assert_frame_equal(shares(found, method)[same], shares(plain, method), atol=1e-4, rtol=0)
    done = finished.finished(tmp_path / "runs/own-ultraedit-0")
    with done.edit.applied(done.lm):
        row = {r["id"]: r for r in mk.evaluate(done.lm, done.cases, free=True).records()}["a"]
    assert shares(found, "ultraedit").loc["a", "efficacy_contained"] == row["efficacy_contained"]
    told = mk.evaluate(done.lm, in_prompt(done.cases, 1), free=True).metrics
    assert 100 * shares(found, "in_prompt/beside").efficacy.mean() == pytest.approx(told["efficacy"], abs=0.01)
    said = {(s["method"], s["id"]): s["answer"] for s in json.loads(found.attrs["said"])}
    assert said["ultraedit", "a"] == row["answers"][0]


def test_in_memory_it_is_the_same_and_nothing_is_asked_twice(small, tmp_path, monkeypatch):
    lm = stand_in()
    monkeypatch.setattr(asked, "load", lambda *_: lm)
    kept = forcing.teacher_forcing(**small, out=tmp_path / "runs")
    weights = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    direct = forcing.teacher_forcing(**small)
    assert all(tensor.equal(weights[name]) for name, tensor in lm.model.state_dict().items())
    for method in ("pre-edit", *METHODS):
        names = [name for name in shares(direct, method) if name in shares(kept, method)]
        pd.testing.assert_frame_equal(shares(direct, method)[names], shares(kept, method)[names], atol=1e-3, rtol=0)
    assert "specificity_pre_edit" in shares(direct, "ultraedit")
    monkeypatch.setattr(forcing, "evaluate", None)
    again = forcing.teacher_forcing(**small, out=tmp_path / "runs")
    pd.testing.assert_frame_equal(again, kept)
    assert again.attrs["settings"] == {"edits": 3, "batch": 2, "seeds": [0], "part": "all"}


def answers(forced, free, methods=("alphaedit", "metake"), cases=40):
    """Records in which shares of the cases succeed: by method, forced and free."""
    rows = [
        {"dataset": d, "method": m, "seed": 0, "id": str(i)}
        | {f"{kind}{s}": float(i < share[m] * cases) for kind in forcing.ASKED
           for s, share in (("", forced), ("_accuracy", forced), ("_contained", free), ("_exact", free))}
        for d in ("CounterFact", "ZsRE") for m in methods for i in range(cases)
    ]  # fmt: skip
    found = pd.DataFrame(rows)
    own = ("dataset", "method", "seed", "id")
    found.attrs["said"] = json.dumps([{k: r[k] for k in own} | dict.fromkeys(forcing.SAID, "a") for r in rows])
    return found


def test_verdicts_turn_with_the_answers():
    all_of_it, half = {"alphaedit": 1.0, "metake": 1.0}, {"alphaedit": 0.5, "metake": 0.5}
    assert forcing.judge_hidden(answers(all_of_it, half))["holds"] is True
    assert forcing.judge_hidden(answers(half, all_of_it))["holds"] is False
    assert forcing.judge_hidden(answers(half, half))["holds"] is None
    assert forcing.judge_hidden(answers(all_of_it, {"alphaedit": 0.5, "metake": 1.0}))["holds"] is None
    better = {"alphaedit": 0.3, "metake": 0.9}
    assert forcing.judge(answers(half, better))["holds"] is True  # whatever the forced scores say
    assert forcing.judge(answers(better, dict(zip(better, (0.9, 0.3), strict=True))))["holds"] is False
    assert forcing.judge(answers(better, half))["holds"] is None


def test_what_is_shown_has_the_numbers_and_begins_with_what_forcing_hid():
    found = answers({"alphaedit": 1.0, "metake": 0.5}, {"alphaedit": 0.25, "metake": 0.0})
    told = forcing.summarize(found).set_index(["asked", "dataset", "method"])
    assert told.loc[("efficacy", "ZsRE", "alphaedit"), ["score, forced", "holds it, free"]].tolist() == [100, 25]
    lost = forcing.lost(found).set_index(["dataset", "metric", "method"])
    assert lost.loc[("ZsRE", "efficacy", "metake"), "difference"] == 50
    assert list(forcing.examples(found, ["alphaedit"], 1)["forced score"]) == [1.0]


def test_a_recording_of_it_takes_the_sequences_runs_and_any_name_of_a_method():
    data = {"CounterFact": "c", "ZsRE": "z"}
    parts = record._parts({"model": "m"}, data, 100, 100, (0,), Path("runs"), "")
    ours, sequences = (parts[name].keywords for name in ("asking", "sequences"))
    assert isinstance(parts["asking"], partial) and parts["asking"].func is forcing.teacher_forcing
    assert {k: v for k, v in ours.items() if k != "methods"} == {k: v for k, v in sequences.items() if k != "methods"}
    assert {*sequences["methods"], *asked.IN_PROMPT} < {*ours["methods"]} and "asking" in record.LONG
    record._check_methods(["in_prompt", "ft"], ["asking"])
    with pytest.raises(mk.ParameterError, match="Did you mean 'in_prompt'"):
        record._check_methods(["in_promt"], ["asking"])
    with pytest.raises(mk.ParameterError, match="in_prompt"):  # not an editor
        record._check_methods(["in_prompt"], ["asking", "comparison"])
