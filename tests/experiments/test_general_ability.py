"""General ability along a stream: points are what the edited model answers, scores are counted right,
and the judgment can fall any way.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from same import fingerprint

import metake as mk
from metake import report
from metake.editing.statistics import statistics
from metake.experiments import record
from metake.experiments.studies import answers, revisions
from metake.experiments.studies import general_ability as page
from metake.experiments.studies import items as asking
from metake.scoring import tasks
from metake.support.errors import ParameterError

SETTINGS = {
    "methods": ("memit", "prune"), "edits": 4, "batch": 2, "every": 2, "tests": 3, "names": ("sst2", "mmlu"),
    "text_tokens": 3000
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ability")


@pytest.fixture(scope="module")
def records(folder, session_cache):
    return page.general_ability("tiny", **SETTINGS, out=folder)


def test_every_point_has_the_same_items(records):
    assert list(records.groupby(["method", "edits"], sort=False).groups) == [
        ("pre-edit", 0), ("memit", 2), ("memit", 4), ("prune", 2), ("prune", 4)
    ]
    for _, point in records.groupby(["method", "edits"]):
        assert [(r.task, r.item) for r in point.itertuples()] == [(t, i) for t in ("sst2", "mmlu") for i in range(3)]
        assert point.label.tolist() == records.label[:6].tolist()
    assert (
        set(records.generated) <= {-1, 0, 1, 2, 3}
        and records.probable.between(0, 3).all()
        and (records[records.task == "sst2"].probable <= 1).all()
    )


def test_a_point_is_what_the_edited_model_answers(records):
    """The stream's edits, applied by hand: the same predictions; PRUNE's finish included."""
    lm = mk.load("tiny")
    before = fingerprint(lm.model)
    stream = revisions.plan(lm, mk.facts(), 4, 2, 0)
    editor = mk.methods.prune("tiny")
    state = editor.init(lm, statistics(lm, layers=editor.layers, tokens=3000))
    items = [
        (t, i)
        for t in map(tasks.task, ("sst2", "mmlu"))
        for i in asking.asked(asking.read_items("facts", t.file), t, 3, edited=[c.request.subject for c in stream])
    ]
    with lm.scratch([lm.write_path(layer) for layer in editor.layers]):
        for batch in (stream[:2], stream[2:]):
            edit, state = editor.step(lm, [c.request for c in batch], state)
            edit.apply(lm)
        editor.finish(lm, state).apply(lm)
        found = answers.answer(lm, [(t.prompt(i), t.classes) for t, i in items])
    last = records[(records.method == "prune") & (records.edits == 4)]
    assert last.probable.tolist() == [int(np.argmax(a.log_p)) for a in found]
    assert last.generated.tolist() == [t.read("", a.text) for (t, _), a in zip(items, found, strict=True)]
    assert last.label.tolist() == [t.label(i) for t, i in items]
    assert fingerprint(lm.model) == before


def test_finished_points_are_not_asked_again(records, folder, monkeypatch):
    monkeypatch.setattr(page, "_ask", lambda *_: pytest.fail("asked again"))
    pd.testing.assert_frame_equal(page.general_ability("tiny", **SETTINGS, out=folder), records)
    with pytest.raises(ParameterError, match="another reading"):
        page.general_ability("tiny", **SETTINGS, reading="parity", out=folder)


@pytest.mark.parametrize("change, said", [
    ({"reading": "exact"}, "reading"), ({"every": 3}, "multiple of batch"), ({"tests": 0}, "at least 1"),
    ({"names": ("glue",)}, "task"),
    ({"tests": 1000}, "can be asked"), ({"tasks": "nowhere"}, "neither 'facts'"), ({"methods": ("memt",)}, "memit"),
])  # fmt: skip
def test_bad_settings_are_refused(change, said):
    with pytest.raises(ParameterError, match=said):
        page.general_ability("tiny", **SETTINGS | change)


def test_parity_asks_the_first_items_whomever_they_name(monkeypatch, tmp_path):
    subject = revisions.plan(mk.load("tiny"), mk.facts(), 2, 2, 0)[0].request.subject
    rows = [{"sentence": f"{subject} {i}", "label": i % 2} for i in range(14)] + [
        {"sentence": f"someone {i}", "label": i % 2} for i in range(4)
    ]
    (tmp_path / "cola.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen = []
    monkeypatch.setattr(
        page, "answer",
        lambda lm, questions, length: (
            seen.append([p for p, _ in questions]) or [answers.Answer(" no", (-1.0, -2.0))] * len(questions)
        )
    )
    for reading in tasks.READINGS:
        found = page.general_ability(
            "tiny", (), edits=2, batch=2, every=2, tasks=str(tmp_path), names=["cola"], tests=4, reading=reading
        )
        assert found.generated.tolist() == found.probable.tolist() == [0] * 4
    assert all("someone" in p and p.endswith("Answer:") for p in seen[0]) and all(
        subject in p and p.endswith("Answer: ") for p in seen[1]
    )


@pytest.mark.parametrize(
    "log_p, expected",
    [
        ((-1.0, -2.0), 0), ((-2.0, -1.0), 1), ((-1.0, -1.0), 0), ((-1.0, -3.0, -1.0, -2.0), -1),
        ((-3.0, -3.0, -1.0, -2.0), 2)
    ],
)
def test_ties_are_the_harness_s(log_p, expected):
    assert page._most_probable(log_p) == expected


# -- scores and judgment, on made records
# --------------------------------------------------------------------------------------


def made(
    levels: dict[str, float], before: float = 0.9, names=("sst2", "mmlu"), items: int = 100, points=(50, 100)
) -> pd.DataFrame:
    """Records whose share of right answers is `before`, then the method's level; the rest is invalid."""
    rows = []
    for method, share in ({"pre-edit": before} | levels).items():
        for at in (0,) if method == "pre-edit" else points:
            for name in names:
                classes = len(tasks.TASKS[name].classes)
                for i in range(items):
                    said = i % classes if i < share * items else -1
                    rows.append(
                        {
                            "method": method, "edits": at, "task": name, "item": i, "label": i % classes,
                            "generated": said, "probable": 0
                        }
                    )
    return pd.DataFrame(rows)


def test_scores_count_and_use_the_paper_s_metrics():
    found = page.scores(made({"metake": 0.5}, names=("sst2", "cola")))
    one = found[(found.method == "metake") & (found.edits == 100) & (found.kind == "generated")].set_index("task")
    assert (
        one.loc["sst2", ["items", "correct", "incorrect", "invalid"]].tolist() == [100, 50, 0, 50]
        and one.accuracy["sst2"] == 50
    )
    assert (found[found.kind == "probable"].accuracy == 50).all()
    curve = page.paper_scores(made({"metake": 0.5}, names=("sst2", "mrpc", "cola", "mmlu")))
    last = curve[curve.edits == 100].set_index("task")
    assert last.title.tolist() == [
        "SST-2, accuracy", "MRPC, F1", "CoLA, MCC", "MMLU, accuracy"
    ] and last.guess.tolist() == [50, 50, 0, 25]
    assert (
        last.score["cola"] == pytest.approx(one.MCC["cola"])
        and last.score["mrpc"] == pytest.approx(200 / 3)
        and (last.invalid == 50).all()
    )
    wide = page.table(made({"metake": 0.5, "memit": 0.0}, names=("sst2", "mmlu"))).set_index("method")
    assert (
        wide.index.tolist() == ["pre-edit", "metake", "memit"]
        and wide["mean"].tolist() == [90, 50, 0]
        and wide.invalid.tolist() == [10, 50, 100]
    )


@pytest.mark.parametrize("hits, expected", [(50, False), (58, False), (59, True), (100, True)])
def test_a_task_counts_if_the_model_could_do_it(hits, expected):
    """One-sided 5 % of the binomial with n = 100 and p = 1/2: from 59 on."""
    assert page.able(made({}, hits / 100, ("sst2",))) == (["sst2"] if expected else [])


def test_what_is_read_is_what_the_model_can_do():
    """A model that never keeps to the form is read by probabilities; one that can do nothing is read as the paper
    reads.
    """
    able, unable = made({"metake": 0.8}), made({"metake": 0.0}, before=0.0)
    assert page.readable(able) == page.readable(unable) == "generated"
    likely = unable.assign(probable=unable.label)
    assert (
        page.readable(likely) == "probable"
        and page.able(likely) == []
        and page.able(likely, "probable") == ["sst2", "mmlu"]
    )
    assert (
        page.KINDS["probable"] in page.judge(likely, 200)["decided_by"]
        and page.KINDS["generated"] in page.judge(able, 200)["decided_by"]
    )
    assert page.changes(likely).change.tolist() == [0]


def test_changes_are_differences_of_means_with_intervals():
    found = page.changes(made({"memit": 0.2, "metake": 0.8}), draws=500).set_index("method")
    assert (
        found.change.to_dict() == pytest.approx({"memit": -70, "metake": -10})
        and found.difference["memit"] == pytest.approx(60)
        and np.isnan(found.difference["metake"])
    )
    assert (
        (found.low < found.change).all()
        and (found.change < found.high).all()
        and found.difference_low["memit"] < 60 < found.difference_high["memit"]
    )
    spread = found.high["metake"] - found.low["metake"]
    assert 3 < spread < 12, (
        "two tasks of 100 items, of which a tenth changed: 2 · 1.96 · √(0.1 · 0.9 / 200) is 8 points"
    )
    with pytest.raises(ParameterError, match="no 'metake'"):
        page.changes(made({"memit": 0.2}))
    with pytest.raises(ParameterError, match="above chance in none"):
        page.changes(made({"metake": 0.2}, before=0.2))


@pytest.mark.parametrize("levels, before, holds", [
    ({"memit": 0.2, "alphaedit": 0.9, "metake": 0.9}, 0.9, True),
    ({"memit": 0.2, "alphaedit": 0.88, "metake": 0.9}, 0.9, True),
    ({"memit": 0.2, "alphaedit": 0.9, "metake": 0.6}, 0.9, False),  # far from flat, and below AlphaEdit
    ({"memit": 0.2, "alphaedit": 0.5, "metake": 0.6}, 0.9, False),  # far from flat
    ({"memit": 0.9, "alphaedit": 0.9, "metake": 0.9}, 0.9, None),  # nobody is harmed
    ({"memit": 0.2, "metake": 0.9}, 0.9, None),  # no stable rival was run
    ({"alphaedit": 0.9, "metake": 0.9}, 0.9, None),  # and none that collapses
    # nothing to forget in a task at chance: MMLU alone is left
    ({"memit": 0.2, "alphaedit": 0.3, "metake": 0.3}, 0.3, None),
    ({"memit": 0.0, "alphaedit": 0.2, "metake": 0.2}, 0.2, None),
])  # fmt: skip
def test_the_verdict_follows_the_intervals(levels, before, holds):
    names = ("sst2",) if before == 0.3 else ("sst2", "mmlu")
    found = page.judge(made(levels, before, names), draws=300)
    assert found["holds"] is holds and ("MetaKE changes by" in found["decided_by"] or "none of" in found["decided_by"])


def test_the_drawing_says_what_the_records_say():
    drawn = report.ability_curves(page.paper_scores(made({"memit": 0.2, "metake": 0.8})))
    assert "MEMIT: sst2 20.0, mmlu 20.0" in drawn.alt and "MetaKE: sst2 80.0, mmlu 80.0" in drawn.alt
    assert Counter(line.split()[0] for line in drawn.text.splitlines()[1:]) == Counter(
        ["method", "pre-edit", "MEMIT", "MetaKE"]
    )
    assert "SST-2, accuracy, %" in drawn.svg["light"] and "MMLU, accuracy, %" in drawn.svg["light"]


def test_the_recording_needs_task_data(monkeypatch, tmp_path):
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path)
    asked = {}
    monkeypatch.setattr(record, "provenance", lambda *_: {"model": "tiny"})
    monkeypatch.setattr(
        record, "_parts",
        lambda *words, real=record._parts: {k: v for k, v in real(*words).items() if k == record.TASKED}
    )
    monkeypatch.setattr(record, "general_ability", lambda **settings: asked.update(settings) or made({"metake": 0.8}))
    assert list(record.record("tiny")) == [
        "left out results/general_ability-tiny.jsonl: no task data, name a folder of it with --tasks"
    ]
    with pytest.raises(ParameterError, match="--tasks DIR"):
        list(record.record("tiny", only=[record.TASKED]))
    assert list(record.record("tiny", tasks="some", seeds=(3,))) == ["wrote results/general_ability-tiny.jsonl"]
    assert (
        asked["tasks"] == "some"
        and asked["seed"] == 3
        and asked["edits"] % asked["every"] == asked["every"] % asked["batch"] == 0
    )
    assert list(record.record("tiny")) == ["kept results/general_ability-tiny.jsonl"]
    assert page.judge(report.recorded("general_ability-tiny"))["holds"] is False
