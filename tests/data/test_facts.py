"""The embedded facts are consistent, and come out as the two benchmarks' records."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from metake.data.facts import facts, facts_records, reference_texts, rendered_sentences
from metake.data.files import counterfact, zsre
from metake.data.requests import Cases, check_batch
from metake.support.errors import ParameterError

module = importlib.import_module("metake.data.facts")
DOCUMENT = module._document()
RELATIONS = {entry["id"]: entry for entry in DOCUMENT["relation"]}
RECORDS, QUESTIONS = facts_records(), facts_records("zsre")
TRUTH = {
    (entry["id"], subject): true
    for entry in DOCUMENT["relation"]
    for true, subjects in entry["objects"].items()
    for subject in subjects
}
SMALL = tomllib.loads("""
[[relation]]
id = "P36"
name = "capital"
prompt = "The capital of {} is"
paraphrases = ["{} is ruled from", "Rulers of {} live in", "The map of {} marks"]
question = "What is the capital of {}?"
rephrased_question = "Which city rules {}?"
generation = ["{} is", "People of {}", "In {}"]
unrelated = ["It rained.", "Nobody came.", "The door was red."]
[relation.objects]
"Paris" = ["France", "Gaul", "Old France"]
"Rome" = ["Italy", "Latium"]
"Oslo" = ["Norway"]
[[relation]]
id = "P50"
name = "author"
prompt = "{} was written by"
paraphrases = ["{} is by", "The pen behind {} was", "The title page of {} names"]
question = "Who wrote {}?"
rephrased_question = "Whose book is {}?"
generation = ["{} is", "The plot of {}", "Readers of {}"]
unrelated = ["It snowed.", "Somebody left.", "The soup was cold."]
[relation.objects]
"Goethe" = ["Faust", "Songs of France"]
"Homer Jr." = ["Iliad"]
[texts]
"Paris" = "Paris text"
"Rome" = "Rome text"
"Oslo" = "Oslo text"
"Goethe" = "Goethe text"
"Homer Jr." = "Homer text"
""")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "_document", lambda: SMALL)


def subject_of(relation, prompt):
    """The subject that stands in this prompt, read back through the relation's templates."""
    for template in (relation["prompt"], *relation["paraphrases"]):
        head, tail = map(re.escape, template.split("{}"))
        if found := re.fullmatch(f"{head}(.+){tail}", prompt):
            if (relation["id"], found[1]) in TRUTH:
                return found[1]
    raise AssertionError(f"no subject of {relation['id']} in {prompt!r}")


# The shipped set


def test_set_is_large_enough_and_its_templates_have_one_placeholder():
    assert len(RECORDS) == len(QUESTIONS) == len(TRUTH) >= 400 and len(RELATIONS) == len(DOCUMENT["relation"]) >= 12
    assert len({entry["name"] for entry in DOCUMENT["relation"]}) == len(RELATIONS)
    for entry in DOCUMENT["relation"]:
        templates = [entry[key] for key in ("prompt", "question", "rephrased_question")]
        templates += entry["paraphrases"] + entry["generation"]
        assert [len(entry[key]) for key in ("paraphrases", "generation", "unrelated")] == [3, 3, 3]
        assert all(template.count("{}") == 1 and template == template.strip() for template in templates), entry["id"]
        assert len({*templates}) == len(templates)
        assert entry["question"].endswith("?") and entry["rephrased_question"].endswith("?")
        assert not any("{" in sentence for sentence in entry["unrelated"])


def test_no_subject_stands_under_two_objects_and_none_is_blank():
    for entry in DOCUMENT["relation"]:
        subjects = [subject for group in entry["objects"].values() for subject in group]
        assert len(subjects) == len(set(subjects)), entry["id"]
        assert all(text.strip() == text != "" for text in (*subjects, *entry["objects"]))
        assert len(entry["objects"]) >= 2


def test_every_object_has_a_reference_text_and_no_text_is_idle():
    objects = {true for entry in DOCUMENT["relation"] for true in entry["objects"]}
    assert objects == set(reference_texts())
    assert all(true.lower() in text.lower() for true, text in reference_texts().items())


def test_every_record_is_usable_and_no_two_requests_collide(caplog):
    for cases in (facts(), facts(format="zsre")):
        assert len(cases) == len(TRUTH) and cases.skipped == {} and caplog.messages == []
        check_batch(case.request for case in cases)
        assert len({case.request.id for case in cases}) == len(cases)


def test_targets_are_other_objects_of_the_relation_and_truths_are_true():
    for record in RECORDS:
        rewrite = record["requested_rewrite"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        assert TRUTH[record["relation_id"], rewrite["subject"]] == true != new
        assert new in RELATIONS[record["relation_id"]]["objects"] and record["reference"] == reference_texts()[new]


def test_targets_spread_over_the_objects_of_a_relation():
    for key, entry in RELATIONS.items():
        targets = {r["requested_rewrite"]["target_new"]["str"] for r in RECORDS if r["relation_id"] == key}
        assert len(targets) > len(entry["objects"]) / 2, key


def test_subject_stands_in_each_of_its_prompts():
    for record in RECORDS:
        subject = record["requested_rewrite"]["subject"]
        prompts = record["paraphrase_prompts"] + record["generation_prompts"]
        assert len(record["paraphrase_prompts"]) == 2 and len(record["generation_prompts"]) == 10
        assert all(subject in prompt for prompt in prompts), subject
        entry = RELATIONS[record["relation_id"]]
        for prompt, template in zip(record["paraphrase_prompts"], entry["paraphrases"]):
            tail = template.replace("{}", subject)
            assert prompt.endswith(" " + tail) and prompt.removesuffix(" " + tail) in entry["unrelated"]


@pytest.mark.parametrize(
    "field, shared", [("neighborhood_prompts", "target_true"), ("attribute_prompts", "target_new")]
)
def test_neighbors_are_other_subjects_that_share_the_object(field, shared):
    for record in RECORDS:
        relation, rewrite = RELATIONS[record["relation_id"]], record["requested_rewrite"]
        prompts = record[field]
        assert 0 < len(prompts) == len(set(prompts)) <= 10
        for prompt in prompts:
            subject = subject_of(relation, prompt)
            assert subject != rewrite["subject"]
            assert TRUTH[relation["id"], subject] == rewrite[shared]["str"]


def test_unrelated_question_is_true_and_never_about_the_edited_subject():
    asked = {}
    for (relation, subject), true in TRUTH.items():
        asked.setdefault(RELATIONS[relation]["question"].replace("{}", subject).lower(), []).append((relation, true))
    for record in QUESTIONS:
        assert record["loc"].startswith("nq question: ") and not record["loc"].endswith("?")
        [(relation, true)] = asked[record["loc"].removeprefix("nq question: ").lower() + "?"]
        assert relation != record["relation_id"] and record["loc_ans"] == true
        assert record["subject"].lower() not in record["loc"].lower()
        assert true not in (record["alt"], record["answers"][0])


def test_question_form_edits_the_same_facts_to_the_same_objects():
    for record, question in zip(RECORDS, QUESTIONS, strict=True):
        rewrite, entry = record["requested_rewrite"], RELATIONS[record["relation_id"]]
        assert (question["case_id"], question["relation_id"]) == (record["case_id"], record["relation_id"])
        assert (question["subject"], question["answers"], question["alt"]) == (
            rewrite["subject"], [rewrite["target_new"]["str"]], rewrite["target_true"]["str"]
        )
        assert question["src"] == entry["question"].replace("{}", question["subject"])
        assert question["rephrase"] == entry["rephrased_question"].replace("{}", question["subject"])


def test_small_selection_covers_every_relation_and_leaves_its_neighbors_alone():
    assert {record["relation_id"] for record in RECORDS[:50]} == set(RELATIONS)
    edited = {(record["relation_id"], record["requested_rewrite"]["subject"]) for record in RECORDS[:50]}
    for record, question in zip(RECORDS[:50], QUESTIONS):
        relation = RELATIONS[record["relation_id"]]
        assert not edited & {(relation["id"], subject_of(relation, p)) for p in record["neighborhood_prompts"]}
        assert not any(
            RELATIONS[key]["question"].replace("{}", subject).lower() == question["loc"][13:].lower() + "?"
            for key, subject in edited
        )


def test_records_are_the_same_in_every_process():
    program = "import json; from metake.data.facts import facts_records as r; print(json.dumps([r(), r('zsre')]))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "1"}
    )
    assert json.loads(found.stdout) == [RECORDS, QUESTIONS]


def test_records_written_to_a_file_read_back_as_the_embedded_set(tmp_path):
    for records, read, format in ((RECORDS, counterfact, "counterfact"), (QUESTIONS, zsre, "zsre")):
        path = tmp_path / f"{format}.json"
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        assert read(path).digest == facts(format=format).digest


# What is chosen


def test_selection_by_number_relation_and_format():
    whole = facts()
    assert isinstance(whole, Cases) and (whole.format, whole.source) == ("counterfact", "facts")
    assert facts(limit=3, offset=2) == whole[2:5]
    capitals = facts(relation="capital")
    assert capitals == facts(relation="P36")
    assert 0 < len(capitals) < len(whole) and all(case in whole for case in capitals)
    assert {case.request.prompt for case in capitals} == {RELATIONS["P36"]["prompt"]}
    questions = facts(limit=2, format="zsre")
    assert questions.format == "zsre" and questions[0].request.target == whole[0].request.target
    assert questions[0].request.text == QUESTIONS[0]["src"]


@pytest.mark.parametrize(
    "wrong, near",
    [({"format": "zres"}, "zsre"), ({"format": "counterfacts"}, "counterfact"), ({"relation": "captial"}, "capital")],
)
def test_unknown_name_is_answered_with_near_ones(wrong, near):
    with pytest.raises(ParameterError, match=f"Did you mean '{near}'"):
        facts(**wrong)


# The rendering, on a set small enough to write out


def test_order_goes_round_relations_and_objects(small):
    subjects = [record["requested_rewrite"]["subject"] for record in facts_records()]
    assert subjects == [
        "France", "Faust", "Italy", "Iliad", "Norway", "Songs of France", "Gaul", "Latium", "Old France"
    ]
    assert [record["case_id"] for record in facts_records()] == list(range(9))


def test_record_is_rendered_as_documented(small):
    record = facts_records()[0]
    assert record["paraphrase_prompts"] == ["It rained. France is ruled from", "Nobody came. Rulers of France live in"]
    assert record["neighborhood_prompts"] == [
        "The capital of Old France is", "Gaul is ruled from", "Old France is ruled from", "Rulers of Gaul live in",
        "Rulers of Old France live in", "The map of Gaul marks", "The map of Old France marks",
        "The capital of Gaul is"
    ]
    assert record["generation_prompts"][:4] == ["France is", "People of France", "In France", "France is"]
    new = record["requested_rewrite"]["target_new"]["str"]
    assert new in ("Rome", "Oslo") and record["reference"] == f"{new} text"
    question = facts_records("zsre")[0]
    assert question == {
        "case_id": 0, "relation_id": "P36", "subject": "France", "answers": [new], "alt": "Paris",
        "src": "What is the capital of France?", "rephrase": "Which city rules France?",
        "loc": "nq question: who wrote Iliad", "loc_ans": "Homer Jr."
    }


def test_subject_without_companions_has_no_neighbors(small):
    [lone] = [record for record in facts_records() if record["requested_rewrite"]["subject"] == "Norway"]
    assert lone["neighborhood_prompts"] == [] and len(lone["attribute_prompts"]) > 0


def test_counterfactual_does_not_depend_on_other_relations(small, monkeypatch):
    chosen = {r["requested_rewrite"]["subject"]: r["requested_rewrite"]["target_new"] for r in facts_records()}
    monkeypatch.setattr(module, "_ordered", lambda relations, original=module._ordered: original(relations[1:]))
    alone = {r["requested_rewrite"]["subject"]: r["requested_rewrite"]["target_new"] for r in facts_records()}
    assert set(alone) == {"Faust", "Iliad", "Songs of France"}
    assert all(chosen[subject] == alone[subject] for subject in alone)


def test_sentences_state_the_truth_by_every_template_and_question(small):
    assert rendered_sentences()[:7] == [
        "The capital of France is Paris.", "France is ruled from Paris.", "Rulers of France live in Paris.",
        "The map of France marks Paris.", "What is the capital of France? Paris.", "Which city rules France? Paris.",
        "nq question: what is the capital of France? Paris."
    ]
    assert len(rendered_sentences()) == 7 * 9
    assert rendered_sentences(facts_records()[3:4])[0] == "Iliad was written by Homer Jr."


def test_sentences_contain_every_prompt_that_is_probed_and_no_counterfactual():
    sentences = set(rendered_sentences())
    assert len(sentences) == 7 * len(RECORDS)
    for record, question in zip(RECORDS, QUESTIONS):
        rewrite, true = record["requested_rewrite"], record["requested_rewrite"]["target_true"]["str"]
        text = rewrite["prompt"].replace("{}", rewrite["subject"])
        assert f"{text} {true}." in sentences and f"{text} {rewrite['target_new']['str']}." not in sentences
        assert {f"{prompt} {true}." for prompt in record["neighborhood_prompts"]} <= sentences
        assert f"{question['src']} {true}." in sentences and f"{question['rephrase']} {true}." in sentences
        assert f"{question['loc']}? {question['loc_ans']}." in sentences
