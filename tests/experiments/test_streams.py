"""Long streams: facts are revised as promised, points are what an evaluation at that moment gives,
and the judgment can fall either way.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from models import random_model
from same import fingerprint

import metake as mk
from metake import report
from metake.data.requests import check_batch
from metake.editing.statistics import statistics
from metake.experiments import record, runs
from metake.experiments.cases import select
from metake.experiments.studies import revisions, streams
from metake.scoring.evaluation import CaseScore, ProbeScore, Reading
from metake.support.errors import ParameterError, ProvenanceError

SETTINGS = {"methods": ("memit", "prune"), "edits": 6, "batch": 2, "every": 2, "sample": 3, "text_tokens": 3000}


def probes(case, kind):
    return [p for p in case.probes if p.kind == kind]


# Revising facts


def test_a_revised_fact_gets_an_object_that_it_never_had():
    cases = mk.facts(limit=200)
    once = revisions.revised(cases, 0)
    twice = revisions.revised(once, 0)
    objects = {}
    for case in cases:
        objects.setdefault(case.request.prompt, set()).update({case.request.target, probes(case, "efficacy")[0].rival})
    assert len(once) == len(twice) == 200
    for first, second, third in zip(cases, once, twice, strict=True):
        true = probes(first, "efficacy")[0].rival
        assert len({true, first.request.target, second.request.target, third.request.target}) == 4
        assert (
            second.request.target in objects[first.request.prompt]
            and second.request.text == third.request.text == first.request.text
        )
        assert (second.request.id, third.request.id) == (f"{first.request.id}+1", f"{first.request.id}+2")
        for case, rivals in (
            (second, {true, first.request.target}), (third, {true, first.request.target, second.request.target})
        ):
            for kind in ("efficacy", "paraphrase"):
                asked = probes(case, kind)
                assert {p.target for p in asked} == {case.request.target}, "only the newest target is asked for"
                assert {(p.prompt, p.rival) for p in asked} == {
                    (p.prompt, r) for p in probes(first, kind) for r in rivals
                }
            assert [(p.prompt, p.target) for p in probes(case, "neighborhood")] == [
                (p.prompt, p.target) for p in probes(first, "neighborhood")
            ]
            assert {p.rival for p in probes(case, "neighborhood")} == {case.request.target}
            assert {p.target for p in probes(case, "generation")} == {""}, "the reference told of another object"
    assert once == revisions.revised(cases, 0) != revisions.revised(cases, 1)


def test_what_cannot_be_revised_is_passed_over_or_refused():
    cases = mk.facts(limit=200)
    prompt = cases[0].request.prompt
    alone = [c for c in cases if c.request.prompt == prompt][:1]
    others = [c for c in cases if c.request.prompt != prompt]
    assert [c.request.id for c in revisions.revised(alone + others, 0)] == [f"{c.request.id}+1" for c in others]
    with pytest.raises(ParameterError, match="none of 1 facts has another object"):
        revisions.revised(alone, 0)
    with pytest.raises(ParameterError, match="does not say what was true"):
        revisions.revised(mk.facts(limit=20, format="zsre"), 0)


def test_a_stream_goes_on_by_revising_and_leaves_neighbors_and_the_first_batch_alone():
    lm, cases = random_model("gpt2"), mk.facts()
    stream = revisions.plan(lm, cases, 1000, 20, 0)
    facts = {c.request.text for c in stream}
    assert len(stream) == 1000 and len(facts) == int(0.75 * len(cases)) and len({c.request.id for c in stream}) == 1000
    assert [c.request for c in stream[: len(facts)]] == [c.request for c in select(lm, cases, len(facts), 0)]
    times = Counter(c.request.text for c in stream)
    assert all(times[c.request.text] == 1 for c in stream[:20]) and all(
        times[c.request.text] >= 2 for c in stream[20 : len(facts)]
    )
    subjects = {c.request.subject for c in stream}
    asked = [p.prompt for c in stream for p in probes(c, "neighborhood")]
    assert len(asked) > 500 and not any(s in prompt for prompt in asked for s in subjects)
    assert all(len(probes(c, "paraphrase")) >= 2 for c in stream)
    for start in range(0, 1000, 20):
        check_batch([c.request for c in stream[start : start + 20]])
    same, other = (revisions.plan(lm, cases, 1000, 20, seed).digest for seed in (0, 1))
    assert stream.digest == same != other
    short = revisions.plan(lm, cases, 30, 20, 0)
    assert [c.request for c in short] == [c.request for c in stream[:30]]


# The stream itself


@pytest.fixture
def lm(monkeypatch):
    lm = random_model("gpt2")
    lm.name, lm.origin = "tiny", {"origin": "test", "revision": "", "note": ""}
    monkeypatch.setattr(streams, "load", lambda *_: lm)
    return lm


def by_hand(lm, method):
    """Every point of SETTINGS' stream, evaluated at once on all facts in force."""
    stream = revisions.plan(lm, mk.facts(), 6, 2, 0)
    editor = mk.methods.method(method, "tiny", seed=0)
    given = statistics(lm, layers=editor.layers, tokens=3000)
    found = {}
    with lm.scratch([lm.write_path(i) for i in editor.layers]):
        for number, (_, state) in enumerate(runs.edit_sequence(lm, editor, [c.request for c in stream], given, 2), 1):
            last = editor.finish(lm, state)
            with lm.scratch([lm.write_path(i) for i in editor.layers]):
                if last:
                    last.apply(lm)
                found[2 * number] = {r["id"]: r for r in mk.evaluate(lm, stream[: 2 * number]).records()}
    return stream, found


@pytest.mark.parametrize("method", ["memit", "prune"])
def test_points_are_evaluations_of_the_model_as_it_is_there(lm, method):
    before = fingerprint(lm.model)
    found = streams.streams(**SETTINGS | {"methods": (method,)})
    assert fingerprint(lm.model) == before
    stream, expected = by_hand(lm, method)
    ids = [c.request.id for c in stream]
    own = found[found.method == method]
    assert own.groupby(["edits", "group"]).size().to_dict() == {
        (n, g): min(n, 3) if g == streams.IN_FORCE else 2 for n in (2, 4, 6) for g in streams.GROUPS
    }
    for row in own.to_dict("records"):
        scores = expected[row["edits"]][row["id"]]
        assert all(row[m] == pytest.approx(scores[m], abs=1e-4) for m in streams.METRICS if m in scores)
    for n in (2, 4, 6):
        there = {g: list(rows.id) for g, rows in own[own.edits == n].groupby("group")}
        assert (
            there[streams.FIRST] == ids[:2]
            and there[streams.LATEST] == ids[n - 2 : n]
            and set(there[streams.IN_FORCE]) <= set(ids[:n])
        )
    unedited = found[found.method == "pre-edit"]
    assert set(unedited.edits) == {0} and list(unedited.id) == list(own[own.edits == 6].id)
    assert found.attrs["settings"]["distinct"] == 6


def test_a_revised_fact_counts_once_and_for_its_newest_target(lm, monkeypatch):
    few = mk.facts(relation="capital")[:8]
    monkeypatch.setattr(streams, "read_cases", lambda _: few)
    stream = revisions.plan(lm, few, 10, 2, 0)
    assert len({c.request.text for c in stream}) == 6 and stream[6].request.id.endswith("+1")
    asked = []
    monkeypatch.setattr(
        streams, "evaluate", lambda lm, cases: asked.append([c.request.id for c in cases]) or mk.evaluate(lm, cases)
    )
    rows = streams._measure(lm, stream, 2, 100, 0)
    drawn = [r for r in rows if r["group"] == streams.IN_FORCE]
    assert len(drawn) == 6 and len({r["id"] for r in drawn}) == 6 and not any("+" in r["id"] for r in rows)
    newest = {c.request.text: c.request.id for c in stream}
    assert sorted(asked[0]) == sorted(newest.values())


def test_a_revised_fact_must_beat_every_object_that_it_had(lm, monkeypatch):
    """An unedited model, which holds the true objects only, is credited with nothing; half a victory is none."""
    case = revisions.revised(revisions.revised(mk.facts(limit=200), 0), 0)[0]
    reading = Reading(0.0, (), ())

    def scored(wins):
        found = [
            ProbeScore(p.kind, wins(p), 0.0, reading, None) for p in case.probes if p.kind != "generation"
        ]
        return streams._scores(case, CaseScore(case.request.id, tuple(found)))

    one = sorted({p.rival for p in probes(case, "efficacy")})[0]
    assert scored(lambda p: 1.0) == dict.fromkeys(streams.METRICS, 1.0)
    assert scored(lambda p: float(p.rival != one)) == {"efficacy": 0.0, "generalization": 0.0, "specificity": 1.0}
    first = probes(case, "paraphrase")[0].prompt
    assert scored(lambda p: float(p.rival != one or p.prompt == first))["generalization"] == 0.5
    half = [p.prompt for p in probes(case, "neighborhood")][0]
    again = sum(p.prompt == half for p in probes(case, "neighborhood")) / len(probes(case, "neighborhood"))
    assert scored(lambda p: float(p.prompt != half))["specificity"] == pytest.approx(1 - again, abs=1e-4)


def test_what_is_evaluated_is_kept_and_not_done_again(lm, monkeypatch, tmp_path):
    whole = streams.streams(**SETTINGS, out=tmp_path)
    monkeypatch.setattr(streams, "edit_sequence", lambda *_: pytest.fail("a finished stream was edited again"))
    pd.testing.assert_frame_equal(streams.streams(**SETTINGS, out=tmp_path), whole, check_exact=True)
    monkeypatch.undo()
    monkeypatch.setattr(streams, "load", lambda *_: lm)
    (tmp_path / "prune" / "000004.json").unlink()
    (tmp_path / "prune" / "000006.json").unlink()
    measured = []
    measure = streams._measure
    monkeypatch.setattr(
        streams, "_measure", lambda lm, done, *rest: measured.append(len(done)) or measure(lm, done, *rest)
    )
    pd.testing.assert_frame_equal(streams.streams(**SETTINGS, out=tmp_path), whole, check_exact=True)
    assert measured == [4, 6]
    for change in ({"batch": 1}, {"seed": 1}, {"text_tokens": 2500}):
        with pytest.raises(ParameterError, match=f"another .*{next(iter(change))}"):
            streams.streams(**SETTINGS | change, out=tmp_path)
    (tmp_path / "memit" / "000002.json").write_text("[{")
    with pytest.raises(ProvenanceError, match="damaged"):
        streams.streams(**SETTINGS, out=tmp_path)


@pytest.mark.parametrize("change", [{"every": 3}, {"batch": 0}, {"sample": 0}, {"edits": 0}])
def test_settings_that_make_no_stream_are_refused(change):
    with pytest.raises(ParameterError, match="multiple of batch"):
        streams.streams(**SETTINGS | change)


# The judgment


def curves(shifts, slopes=None, facts=60, points=(100, 200, 300, 400), seed=0, asked=0.8):
    """Shares of each method: a fact's own level, the method's shift, and its slope per 100 edits."""
    generator, rows = np.random.default_rng(seed), []
    level, there = generator.uniform(0.3, 0.5, facts), generator.random((facts, len(points))) < asked
    for method, shift in shifts.items():
        for i in range(facts):
            for j, edits in enumerate(points):
                value = (
                    level[i]
                    + shift
                    + (slopes or {}).get(method, 0) * (edits / 100 - 2.5)
                    + 0.05 * generator.standard_normal()
                )
                rows += [
                    {"method": method, "edits": edits, "group": streams.IN_FORCE, "id": str(i)}
                    | dict.fromkeys(streams.METRICS, value)
                ] * bool(there[i, j])
    frame = pd.DataFrame(rows)
    frame.loc[frame.id.astype(int) % 3 == 0, "specificity"] = np.nan  # facts without neighbors left
    return pd.concat(
        [frame, frame.assign(group=streams.FIRST, efficacy=0.0), frame.head(3).assign(method="pre-edit", edits=0)],
        ignore_index=True,
    )


def test_differences_find_level_and_slope():
    found = streams.differences(curves({"memit": 0.0, "alphaedit": 0.1, "metake": 0.2}, {"memit": -0.04}))
    for row in found.itertuples():
        truth = {"level": {"memit": 20, "alphaedit": 10}, "slope": {"memit": 4, "alphaedit": 0}}[row.quantity][
            row.method
        ]
        assert abs(row.difference - truth) < 1.5 and row.low < row.difference < row.high and row.low < truth < row.high
    assert found.groupby("quantity").size().to_dict() == {"level": 8, "slope": 8}
    pair = streams.differences(curves({"memit": 0.0, "metake": 0.2}))
    assert set(pair.method) == {"memit"}
    with pytest.raises(ParameterError, match="two points"):
        streams.differences(curves({"memit": 0.0, "metake": 0.2}, points=(100,)))
    with pytest.raises(ParameterError, match="a method to compare it with"):
        streams.differences(curves({"rect": 0.0, "metake": 0.2}))


def test_differences_are_paired_and_more_rivals_widen_them():
    records = curves({"memit": 0.0, "alphaedit": 0.0, "blue": 0.0, "metake": 0.05})
    every, one = streams.differences(records), streams.differences(records, rivals=("memit",))
    width = [
        (t.high - t.low)[(t.method == "memit") & (t.metric == "all three") & (t.quantity == "level")].iloc[0]
        for t in (every, one)
    ]
    assert width[0] > 1.1 * width[1], "three intervals together need more room than one alone"
    assert width[1] < 3, "not paired: the facts' own levels show"
    exact = records[records.method != "metake"]
    same = pd.concat([exact, exact[exact.method == "memit"].assign(method="metake")])
    none = streams.differences(same, rivals=("memit",))
    assert (none[["difference", "low", "high"]].abs() < 1e-9).all(axis=None)


@pytest.mark.parametrize(("metake", "holds"), [(0.2, True), (0.05, False), (0.1, None)])
def test_streams_are_judged_against_every_named_method(metake, holds):
    others = {"memit": 0.0, "alphaedit": 0.1, "blue": 0.0, "sphere": 0.05}
    found = streams.judge(streams.differences(curves(others | {"prune": 0.9, "metake": metake})))
    assert found["holds"] is holds and "MEMIT" in found["decided_by"] and "PRUNE" not in found["decided_by"]


def test_a_claim_against_all_needs_all():
    found = streams.judge(streams.differences(curves({"memit": 0.0, "alphaedit": 0.0, "blue": 0.0, "metake": 0.3})))
    assert found["holds"] is None and "SPHERE was not run" in found["decided_by"]


def test_summary_and_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("METAKE_FIGURES", str(tmp_path))
    records = curves({"memit": 0.0, "metake": 0.2})
    found = streams.summarize(records).set_index("method")
    own = records[(records.method == "metake") & (records.group == streams.IN_FORCE)].groupby("edits").efficacy.mean()
    assert found["efficacy, mean"]["metake"] == pytest.approx(100 * own.mean()) and found["efficacy, end"][
        "metake"
    ] == pytest.approx(100 * own[400])
    assert found[f"efficacy, {streams.FIRST}"]["metake"] == 0
    records.attrs["settings"] = {"distinct": 250}
    figure = report.stream_curves(records)
    assert (
        "up to 400" in figure.alt
        and "facts are edited again" in figure.svg["light"]
        and (tmp_path / "long_streams.csv").is_file()
    )
    assert "edited again" not in report.stream_curves(curves({"memit": 0.0, "metake": 0.2})).svg["light"]
    with pytest.raises(ParameterError, match="no column group"):
        report.stream_curves(records.drop(columns="group"))


def test_points_on_disk_are_plain(lm, tmp_path):
    streams.streams(**SETTINGS | {"methods": ("metake/memit",), "edits": 2}, out=tmp_path)
    rows = json.loads((tmp_path / "metake-memit" / "000002.json").read_text())
    assert {r["group"] for r in rows} == set(streams.GROUPS) and all(
        set(r) == {"group", "id", *streams.METRICS} for r in rows
    )


@pytest.mark.parametrize("edits, length, every", [(100, 1000, 100), (20, 200, 20), (25, 250, 40)])
def test_a_recorded_stream_is_ten_times_as_long_and_looked_at_between_batches(edits, length, every, monkeypatch):
    asked = {}
    monkeypatch.setattr(record, "streams", lambda **settings: asked.update(settings))
    for model, methods in (("tiny", record.STREAMED), ("smollm2-135m", record.COMPARED)):
        record._parts({"model": model}, {"CounterFact": "facts"}, edits, 100, (3,), Path("runs"), "")["streams"]()
        assert (asked["edits"], asked["every"], asked["seed"], asked["methods"]) == (
            length, every, 3, methods
        ) and every % asked["batch"] == 0
    assert set(record.COMPARED) == {"metake", *streams.NAMED}


def test_the_recording_is_made_where_it_is_named(monkeypatch, tmp_path):
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path)
    asked = {}

    def short(**settings):
        asked.update(settings)
        frame = curves({"memit": 0.0, "metake": 0.2})
        frame.attrs["settings"] = {"edits": settings["edits"], "dataset": "facts sha256:0"}
        return frame

    monkeypatch.setattr(record, "streams", short)
    monkeypatch.setattr(record, "provenance", lambda *_: {"model": "tiny", "dataset": "facts, facts-zsre"})
    lines = list(record.record("tiny", only=["streams"]))
    assert [line for line in lines if line.startswith("wrote")] == ["wrote results/streams-tiny.jsonl"] and all(
        line.startswith(("wrote", "left out")) for line in lines
    )
    found = report.recorded("streams-tiny")
    assert (
        found.attrs["provenance"]["dataset"] == "facts sha256:0"
        and found.attrs["provenance"]["edits"] == asked["edits"] == 1000
    )
    assert {"memit", "alphaedit", "blue", "sphere", "metake"} <= set(asked["methods"]) and "streams" in record.LONG
    assert streams.differences(found).method.unique().tolist() == ["memit"]


def test_some_methods_are_recorded_again_and_merged(monkeypatch, tmp_path):
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path)
    asked = []

    def short(**settings):
        asked.append(tuple(settings["methods"]))
        frame = curves(dict.fromkeys(settings["methods"], 0.2 * len(asked)))
        frame.attrs["settings"] = {"edits": settings["edits"], "dataset": "facts sha256:0"}
        return frame

    monkeypatch.setattr(record, "streams", short)
    monkeypatch.setattr(record, "provenance", lambda *_: {"model": "tiny", "dataset": "facts, facts-zsre"})
    list(record.record("tiny", only=["streams"], methods=["memit", "metake"]))
    first = report.recorded("streams-tiny")
    list(record.record("tiny", only=["streams"], methods=["metake/whole", "metake"]))
    found = report.recorded("streams-tiny")
    assert asked == [("memit", "metake"), ("metake/whole", "metake")]
    assert set(found.method) == {"memit", "metake", "metake/whole", "pre-edit"} and len(found.attrs["parts"]) == 2
    kept = found[found.method == "memit"].drop(columns="made").reset_index(drop=True)
    assert kept.equals(first[first.method == "memit"].reset_index(drop=True))


def test_what_cannot_be_recorded_for_some_methods_is_refused():
    with pytest.raises(ParameterError, match="unknown method 'metake/hole'. Did you mean 'metake/whole'"):
        next(record.record("tiny", only=["streams"], methods=["metake/hole"]))
    for only, found in ((["proxy"], "proxy"), (["hidden_states"], "hidden_states"), (None, "every recording")):
        with pytest.raises(ParameterError, match=f"for some of them: --only comparison .*; found {found}"):
            next(record.record("tiny", only=only, methods=["metake"]))


def test_the_families_are_drawn_apart_with_two_that_plan_beside_the_other():
    records = curves({name: 0.1 for name in ("memit", "alphaedit", "metake", "mend", "ultraedit")})
    records.attrs["settings"] = {"distinct": 5}
    planning, gradients = streams.closed_forms(records), streams.gradient_family(records)
    assert set(planning.method) - {"pre-edit"} == {"memit", "alphaedit", "metake"}
    assert set(gradients.method) - {"pre-edit"} == {"alphaedit", "metake", "mend", "ultraedit"}
    assert planning.attrs == gradients.attrs == records.attrs
