"""What runs are asked besides the family's metrics: several facts of one record, free answers, stress."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import pytest
from models import stand_in

import metake as mk
from metake.commands import cli
from metake.data.files import packaged
from metake.experiments import asking, runs
from metake.experiments.cases import read_cases
from metake.experiments.runs import RunConfig, open_run, reevaluate, run
from metake.experiments.studies import finished
from metake.scoring import evaluation

CONFIG = RunConfig(method="ultraedit", edits=2, batch=2)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    for module in (runs, finished):
        monkeypatch.setattr(module, "load", lambda *_, **__: stand_in())


def hops(id, subject, place, fruit):
    rewrites = [
        {"prompt": "{} lives in", "subject": subject, "target_new": {"str": place}, "question": f"Where is {subject}?"},
        {"prompt": "The fruit of {} is", "subject": place, "target_new": {"str": fruit}, "question": f"{place} has?"},
    ]
    return {
        "case_id": id, "requested_rewrite": rewrites, "questions": [f"What grows where {subject} lives?"],
        "new_answer": fruit, "new_answer_alias": [f"{fruit}s"], "new_single_hops": []
    }


def hopping(folder):
    """Two records of two edits each, and one that would edit a fact again."""
    records = [hops("a", "Ada", "Rome", "fig"), hops("b", "Bo", "Paris", "plum"), hops("c", "Bo", "Paris", "fig")]
    (folder / "hops.json").write_text(json.dumps(records))
    return replace(CONFIG, data=str(folder / "hops.json"))


def test_several_hops_of_one_record_edit_several_facts(tmp_path):
    config = hopping(tmp_path)
    found, (_, edits) = run(config, tmp_path / "run"), open_run(tmp_path / "run")
    done = [id for edit in edits for id in edit.record.requests]
    assert len(edits) == 2 and len(done) == 4 and all(f"{id}/1" in done for id in done[::2])
    assert [row["id"] for row in found.records()] == done[::2] and "portability_several_hops" in found.metrics
    assert {row["efficacy"] is not None for row in found.records()} == {True}
    assert finished.finished(tmp_path / "run").edit.modules == edits[0].modules
    assert reevaluate(tmp_path / "run").metrics == found.metrics
    with pytest.raises(mk.ParameterError, match="only 2 usable cases.*second request about the same prompt"):
        run(replace(config, edits=3), tmp_path / "more")


# What follows from the embedded facts


def test_what_follows_from_the_embedded_facts_follows():
    """Against the table of facts itself: every question's answer, and that no edit of the set touches it."""
    found, table = read_cases("facts-portability"), tomllib.loads(packaged("facts.toml"))["relation"]
    truths, relations = {}, {}
    for relation in table:
        for true, subjects in relation["objects"].items():
            for subject in subjects:
                truths.setdefault((subject.removeprefix("the "), relation["id"]), []).append(true)
        questions = relation["question"], relation["rephrased_question"]
        for text in (relation["prompt"], *relation["paraphrases"], *questions):
            relations[text.partition("{}")[0], text.partition("{}")[2]] = relation["id"]
    probes = [(case, p) for case in found for p in case.probes if p.kind == "portability"]
    assert len(probes) >= 200 and len({p.prompt for _, p in probes}) == len(probes)
    edited = {(c.request.subject.removeprefix("the "), relations[tuple(c.request.prompt.split("{}"))]) for c in found}
    for case, probe in probes:
        new, relation = case.request.target.removeprefix("the "), asks(probe.prompt, relations)
        assert truths[new, relation] == [probe.target] != [probe.rival] and probe.sort == "new_object"
        assert case.request.subject.removeprefix("the ") in probe.prompt and (new, relation) not in edited
        assert probe.target.lower() not in probe.prompt.lower(), "the question gives its answer away"
        own = relations[tuple(case.request.prompt.split("{}"))]
        [true] = truths[case.request.subject.removeprefix("the "), own]
        assert truths.get((true.removeprefix("the "), relation), [None]) == [probe.rival]


def asks(prompt, relations):
    fits = [(len(a + b), id) for (a, b), id in relations.items() if prompt.startswith(a) and prompt.endswith(b)]
    return max(fits)[1]


# Asked again


OWN = [
    {"prompt": "The home of {} is", "subject": "Ada", "target": "Rome", "id": "a",
     "portability": [{"prompt": "Her city is", "target": "Rome", "sort": "alias"},
                     {"prompt": "Her land is", "target": "France"}]},
    {"prompt": "{} plays the", "subject": "Ada", "target": "French", "id": "b"},
    {"prompt": "The home of {} is", "subject": "Boeing", "target": "Paris", "id": "c", "true": "Berlin"},
]  # fmt: skip


@pytest.fixture
def asked_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "FREE", 4)
    monkeypatch.setattr(asking, "FREE", 4)
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, OWN)))
    run(replace(CONFIG, edits=3, batch=1, data=str(tmp_path / "own.jsonl")), tmp_path / "run")
    return tmp_path / "run"


def edited(folder):
    """The run's model after its edits, and its cases."""
    config, lm, cases, edits = runs.reopened(folder)
    for edit in edits:
        edit.apply(lm)
    return lm, cases


def test_a_run_is_asked_again_and_its_answers_are_kept(asked_run):
    found = asking.ask(asked_run, ["free", "portability", "prefix", "subject"])
    lm, cases = edited(asked_run)
    metrics, values = mk.evaluate(lm, cases, free=True).metrics, found.set_index(["ask", "group", "metric"]).percent
    for name in ("efficacy", "efficacy_exact", "efficacy_contained", "portability", "portability_exact"):
        assert values["free", "all", name] == metrics[name]
    assert values["portability", "alias", "portability_accuracy"] == metrics["portability_alias_accuracy"]
    assert {*found[found.ask == "portability"].group} == {"all", "alias"}
    assert {*found[found.ask == "subject"].group} == {"shared", "its own"} and (
        found[(found.ask == "subject") & (found.group == "shared")].cases == 2
    ).all()
    assert values["prefix", 0, "efficacy"] == metrics["efficacy"]
    kept = [json.loads(line) for line in (asked_run / "asked.jsonl").read_text().splitlines()]
    first = found.iloc[0].to_dict()
    assert len(kept) == len(found) and kept[0] == first | {"percent": pytest.approx(first["percent"])}
    assert "alias" in asking.text(found) and "efficacy_exact" in asking.text(found)


def test_a_prefix_is_so_many_tokens_before_the_prompt_and_what_does_not_fit_is_left_out(asked_run, caplog):
    lm, cases = edited(asked_run)
    own = [case._replace(probes=case.probes[:1]) for case in cases]
    texts = {n: [asking.unrelated(lm, n, f"0/{case.request.id}") for case in own] for n in (0, 16)}
    assert texts[0] == [""] * 3 and len({*texts[16]}) > 1
    assert all(12 <= len(lm.tokenizer(text)["input_ids"]) <= 20 for text in texts[16])
    after = [case.after(text) for case, text in zip(own, texts[16], strict=True)]
    found = asking.ask(asked_run, ["prefix"]).set_index(["group", "metric"])
    assert found.percent[16, "efficacy"] == mk.evaluate(lm, after)["efficacy"]
    assert {n for n, _ in found.index} == {0, 16, 50} and "window of 128 tokens after a prefix of 200" in caplog.text


def test_retention_asks_edits_again_after_later_ones_by_age(asked_run):
    found = asking.ask(asked_run, ["retention"]).set_index(["group", "metric"])
    _, lm, cases, edits = runs.reopened(asked_run)
    by_age = {}
    for number, edit in enumerate(edits):
        edit.apply(lm)
        for age, case in enumerate(cases[number::-1]):
            score = mk.evaluate(lm, [case._replace(probes=case.probes[:1])])["efficacy"]
            by_age.setdefault(age, []).append(score)
    assert {age: found.percent[age, "efficacy"] for age in by_age} == pytest.approx(
        {age: sum(scores) / len(scores) for age, scores in by_age.items()}
    )
    assert found.cases[:, "efficacy_exact"].to_dict() == {0: 3, 1: 2, 2: 1}


def test_a_question_for_which_there_is_no_case_is_an_error(tmp_path, capsys):
    folder = tmp_path / "plain"
    run(replace(CONFIG, method="ft_l"), folder)
    for name, said in (
        ("portability", "asks nothing that follows from its edits.*MQuAKE"), ("retention", "this run has one batch"),
        ("subject", "no two edits of this run share a subject"), ("fre", "unknown question to a run 'fre'.*'free'"),
    ):
        with pytest.raises(mk.ParameterError, match=said):
            asking.ask(folder, [name])
    assert not (folder / "asked.jsonl").exists()
    assert cli.main(["eval", str(folder), "--ask", "free"]) == 0
    out = capsys.readouterr().out
    assert "specificity_contained" in out and f"wrote {folder}/asked.jsonl" in out
