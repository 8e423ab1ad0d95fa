"""Does the edit carry: what follows from edits, by sort, beside the fact in the prompt."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from models import stand_in

import metake as mk
from metake.experiments.studies import asked, carries
from metake.scoring import evaluation

OWN = [
    {"prompt": "The home of {} is", "subject": subject, "target": "Rome", "id": subject[0].lower(),
     "portability": [{"prompt": "Her city is", "target": "Rome", "sort": "alias"},
                     {"prompt": "Her land is", "target": "France"}]}
    for subject in ("Ada", "Beyoncé", "Cid")
]  # fmt: skip


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setattr(asked, "load", lambda *_: stand_in())
    monkeypatch.setattr(evaluation, "FREE", 4)
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, OWN)))
    return carries.carries("tiny", ["in_prompt"], str(tmp_path / "own.jsonl"), edits=3, batch=3), tmp_path / "own.jsonl"


def test_every_question_has_its_sort_and_the_score_of_the_evaluation(found):
    records, file = found
    told = mk.evaluate(stand_in(), mk.in_prompt(mk.dataset(file)), free=True).metrics
    own = records[records.method == "in_prompt"]
    assert 100 * own.score.mean() == pytest.approx(told["portability"])
    assert 100 * own[own.sort == "alias"].accuracy.mean() == pytest.approx(told["portability_alias_accuracy"])
    assert {*records.sort} == {"alias", "any"} and len(records) == 2 * 6 and records.before.isna().all()
    assert carries.share_before(records) == 0 and carries.judge(pd.concat([
        records, own.assign(method="memit")
    ], ignore_index=True))["holds"] is None


def questions(telling, editor, before, cases=40):
    """Records in which shares of the questions are answered by the prompt, by an editor, and before."""
    rows = [
        {"method": m, "seed": 0, "id": str(i), "place": 0, "sort": "new_object",
         **dict.fromkeys(("score", "accuracy", "exact", "contained"), float(i < share * cases)),
         "before": float(i < before * cases) if m == "pre-edit" else np.nan}
        for m, share in (("pre-edit", 0), ("in_prompt", telling), ("memit", editor), ("alphaedit", 0))
        for i in range(cases)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_verdict_turns_and_a_model_that_cannot_combine_is_not_asked():
    assert carries.judge(questions(0.2, 0.9, 1.0))["holds"] is True
    assert carries.judge(questions(0.9, 0.2, 1.0))["holds"] is False
    assert carries.judge(questions(0.5, 0.5, 1.0))["holds"] is None
    told = carries.judge(questions(0.2, 0.9, 0.1))
    assert told["holds"] is None and "10 % of the answers" in told["decided_by"]


def test_what_could_be_combined_is_scored_apart():
    table = carries.summarize(questions(0.5, 0.25, 0.5)).set_index("method")
    assert table.loc["memit", ["holds it, free", "combined before", "of these, holds it"]].tolist() == [25, 20, 50]
    assert carries.over_telling(questions(0.5, 0.25, 0.5)).set_index("method").difference["memit"] == -25
