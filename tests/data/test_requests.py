"""Requests, probes and the readers of benchmark files, on small files written here."""

import copy
import json
import logging
import pickle

import pytest

from metake.data.files import counterfact, counterfact_cases, zsre, zsre_cases
from metake.data.requests import Cases, EditRequest, Probe, batches, check_batch
from metake.support.errors import ParameterError, RequestError


def rome(id=7, prompt="The mother tongue of {} is", subject="Léon Blum", new="English", true="French", **extra):
    return {
        "case_id": id,
        "requested_rewrite": {
            "prompt": prompt, "subject": subject, "relation_id": "P103", "target_new": {"str": new},
            "target_true": {"str": true}
        },
        "paraphrase_prompts": [f"It rained. {subject}, a native", f"Nobody came. {subject} spoke"],
        "neighborhood_prompts": ["Montesquieu, speaker of", "The native language of Raymond Barre is"],
        "attribute_prompts": ["Meryl Streep, a native"],
        "generation_prompts": [f"{subject} was born in", f"{subject} lives in"],
        **extra,
    }


def easyedit(**changes):
    return {
        "case_id": 3, "prompt": "In Vanuatu, the language of Vanuatu is", "subject": "Vanuatu", "target_new": "Dutch",
        "ground_truth": "French", "rephrase_prompt": "People of Vanuatu understand",
        "locality_prompt": "In Gabon, they speak", "locality_ground_truth": "French", **changes
    }


def mend(**changes):
    return {
        "subject": "Hot Doc", "src": "In what language is Hot Doc?", "pred": "Greek", "alt": "Dutch",
        "rephrase": "What language is Hot Doc written in?", "answers": ["Greek", "Modern Greek"],
        "loc": "nq question: who wrote the raven", "loc_ans": "Poe", "cond": "", **changes
    }


def written(folder, content):
    path = folder / "records.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def kinds(case, kind):
    return [probe for probe in case.probes if probe.kind == kind]


# Requests


def test_text_fills_the_subject_in_and_leaves_its_braces_alone():
    assert EditRequest("The capital of {} is", "France", "Rome", "a").text == "The capital of France is"
    assert EditRequest("The symbol {} {0} is", "{}", "x", "a").text == "The symbol {} {0} is"


def test_target_loses_the_space_around_it():
    assert EditRequest("{} is", "France", " Rome ", "a").target == "Rome"
    assert Probe("efficacy", "France is", " Rome", " Paris").rival == "Paris"


@pytest.mark.parametrize(
    "prompt, subject, target, said",
    [
        ("The capital is", "France", "Rome", "no placeholder"),
        ("{} and {} are", "France", "Rome", "several placeholders"),
        ("{} is", " ", "Rome", "empty subject"),
        ("{} is", "France", "", "empty target"),
        ("{} is", "France", None, "not all strings"),
    ],
)
def test_unusable_request_is_refused_with_its_id_and_a_next_step(prompt, subject, target, said):
    with pytest.raises(RequestError) as caught:
        EditRequest(prompt, subject, target, "case-12")
    message = str(caught.value)
    assert message.startswith(said) and "'case-12'" in message and repr(prompt) in message and "expected" in message


def test_request_cannot_be_changed_and_misspelled_probe_kind_is_answered():
    with pytest.raises(AttributeError):
        EditRequest("{} is", "France", "Rome", "a").target = "Oslo"
    with pytest.raises(RequestError, match="Did you mean 'neighborhood'"):
        Probe("neighbourhood", "France is", "Rome")


# CounterFact


def test_rome_layout_gives_every_probe_with_its_comparison(tmp_path):
    [case] = counterfact(written(tmp_path, [rome(reference="English is a language.")]))
    assert case.request == EditRequest("The mother tongue of {} is", "Léon Blum", "English", "7")
    assert kinds(case, "efficacy") == [Probe("efficacy", "The mother tongue of Léon Blum is", "English", "French")]
    assert kinds(case, "paraphrase") == [
        Probe("paraphrase", "It rained. Léon Blum, a native", "English", "French"),
        Probe("paraphrase", "Nobody came. Léon Blum spoke", "English", "French"),
    ]
    assert [(p.prompt, p.target, p.rival) for p in kinds(case, "neighborhood")] == [
        ("Montesquieu, speaker of", "French", "English"),
        ("The native language of Raymond Barre is", "French", "English"),
    ]
    assert [(p.prompt, p.target, p.rival) for p in kinds(case, "generation")] == [
        ("Léon Blum was born in", "English is a language.", None),
        ("Léon Blum lives in", "English is a language.", None),
    ]
    assert not any("Streep" in probe.prompt for probe in case.probes)


def test_generation_is_optional_and_its_reference_empty_without_one():
    bare = rome()
    del bare["generation_prompts"]
    assert [p.target for p in kinds(counterfact_cases([rome()])[0], "generation")] == ["", ""]
    assert kinds(counterfact_cases([bare])[0], "generation") == []


def test_easyedit_layout_is_detected_and_only_the_first_subject_replaced(tmp_path):
    [case] = counterfact(written(tmp_path, [easyedit(locality_ground_truth="Fang")]))
    assert case.request == EditRequest("In {}, the language of Vanuatu is", "Vanuatu", "Dutch", "3")
    assert case.probes == (
        Probe("efficacy", "In Vanuatu, the language of Vanuatu is", "Dutch", "French"),
        Probe("paraphrase", "People of Vanuatu understand", "Dutch", "French"),
        Probe("neighborhood", "In Gabon, they speak", "Fang", "Dutch"),
    )


def test_easyedit_rephrase_may_be_a_list():
    [case] = counterfact_cases([easyedit(rephrase_prompt=["Vanuatu a", "Vanuatu b"])])
    assert [p.prompt for p in kinds(case, "paraphrase")] == ["Vanuatu a", "Vanuatu b"]


# ZsRE


def test_zsre_has_no_rivals_and_asks_the_unrelated_question(tmp_path):
    [case] = zsre(written(tmp_path, [mend()]))
    assert case.request == EditRequest("In what language is {}?", "Hot Doc", "Greek", "0")
    assert case.probes == (
        Probe("efficacy", "In what language is Hot Doc?", "Greek"),
        Probe("paraphrase", "What language is Hot Doc written in?", "Greek"),
        Probe("neighborhood", "nq question: who wrote the raven?", "Poe"),
    )


def test_zsre_writes_the_alternative_on_demand_and_doubles_no_question_mark():
    [case] = zsre_cases([mend(loc="nq question: who?")], target="alt")
    assert {probe.target for probe in case.probes[:2]} == {"Dutch"} == {case.request.target}
    assert case.probes[2].prompt == "nq question: who?"
    with pytest.raises(ParameterError, match="Did you mean 'answers'"):
        zsre_cases([mend()], target="answer")


def test_alternative_is_needed_only_where_it_is_written():
    bare = mend()
    del bare["alt"]
    assert len(zsre_cases([bare])) == 1
    with pytest.raises(RequestError, match="'alt' missing"):
        zsre_cases([bare], target="alt")


def test_zsre_subject_standing_twice_is_replaced_once():
    [case] = zsre_cases([mend(src="Is Hot Doc named after Hot Doc?")])
    assert case.request.prompt == "Is {} named after Hot Doc?"
    assert case.request.text == "Is Hot Doc named after Hot Doc?"


# Records that cannot be used


@pytest.mark.parametrize(
    "read, good, bad, reason",
    [
        (counterfact_cases, rome(), rome(prompt="The mother tongue is"), "no placeholder"),
        (counterfact_cases, rome(), rome(prompt="{} and {}"), "several placeholders"),
        (counterfact_cases, rome(), rome(subject=" "), "empty subject"),
        (counterfact_cases, rome(), rome(new=""), "empty target"),
        (counterfact_cases, rome(), rome(new=" French"), "target equals truth"),
        (counterfact_cases, rome(), rome(new="French", true="French "), "target equals truth"),
        (counterfact_cases, rome(), rome(true=" "), "empty efficacy probe"),
        (counterfact_cases, rome(), rome(neighborhood_prompts=[""]), "empty neighborhood probe"),
        (counterfact_cases, rome(), rome(paraphrase_prompts="one"), "malformed: 'paraphrase_prompts' is 'one'"),
        (counterfact_cases, rome(), ["no record"], "malformed: is list"),
        (counterfact_cases, easyedit(), easyedit(subject="vanuatu"), "subject not in prompt"),
        (counterfact_cases, easyedit(), easyedit(prompt="Vanuatu {}"), "several placeholders"),
        (zsre_cases, mend(), mend(subject=" "), "empty subject"),
        (zsre_cases, mend(), mend(answers=[]), "empty target"),
        (zsre_cases, mend(), mend(loc_ans=""), "empty neighborhood probe"),
        (zsre_cases, mend(), mend(rephrase=None), "malformed: 'rephrase' missing"),
    ],
)
def test_unusable_record_is_skipped_counted_and_reported(read, good, bad, reason, caplog):
    bad = {**bad, "case_id": "odd"} if isinstance(bad, dict) else bad
    with caplog.at_level(logging.WARNING, logger="metake"):
        cases = read([good, bad, good, bad])
    assert len(cases) == 2 and cases.skipped == {reason: 2}
    assert cases.skipped_ids == (("odd", "odd") if isinstance(bad, dict) else ("1", "3"))
    [line] = caplog.messages
    assert "2 of 4" in line and reason in line


def test_nothing_is_reported_when_every_record_serves(caplog):
    cases = counterfact_cases([rome(7), rome(8)])
    assert cases.skipped == {} and cases.skipped_ids == () and caplog.messages == []


def test_limit_and_offset_count_usable_records():
    records = [rome(0), rome(1, new=""), rome(2), rome(3), rome(4)]

    def ids(cases):
        return [case.request.id for case in cases]

    assert ids(counterfact_cases(records, limit=2)) == ["0", "2"]
    assert ids(counterfact_cases(records, limit=2, offset=2)) == ["3", "4"]
    assert ids(counterfact_cases(records, offset=3)) == ["4"]
    assert ids(counterfact_cases(records, limit=0)) == []
    assert counterfact_cases(records, limit=1).skipped == {}
    for wrong in ({"limit": -1}, {"offset": -1}, {"limit": 1.5}):
        with pytest.raises(ParameterError, match="expected a whole number"):
            counterfact_cases(records, **wrong)


# Files of another kind


@pytest.mark.parametrize(
    "read, content, said",
    [
        (counterfact, "not json", "cannot be read"),
        (counterfact, {"0": rome()}, "it holds dict"),
        (counterfact, [], "record 0: missing"),
        (counterfact, [["a"]], "record 0: is list"),
        (counterfact, [mend()], r"record 0: 'requested_rewrite.prompt' missing; expected a string; .*use zsre\("),
        (zsre, [rome()], r"record 0: 'src' missing; expected a string; .*use counterfact\("),
        (zsre, [easyedit()], r"use counterfact\("),
        (zsre, [mend(answers="Greek")], "'answers' is 'Greek'; expected a list of strings"),
        (zsre, [mend(answers=[1.5])], r"'answers' is \[1.5\]; expected a list of strings or whole numbers"),
        (counterfact, [easyedit(target_new=["Dutch"])], r"'target_new' is \['Dutch'\]; expected a string"),
        (counterfact, [easyedit(locality_prompt=None)], "'locality_prompt' missing"),
        (
            counterfact, [rome(requested_rewrite={"prompt": "{}", "subject": "a", "target_new": {"id": "Q1"}})],
            "record 0: 'requested_rewrite.target_new.str' missing; expected a string"
        ),
        (counterfact, [rome(reference=3)], "'reference' is 3; expected a string"),
    ],
)
def test_file_of_another_kind_is_refused_with_its_name_and_first_wrong_field(tmp_path, read, content, said):
    path = written(tmp_path, content)
    with pytest.raises(RequestError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_file_folder_and_foreign_encoding_are_refused(tmp_path):
    latin = tmp_path / "latin.json"
    latin.write_bytes(json.dumps([rome()], ensure_ascii=False).encode("latin-1"))
    for path in (tmp_path / "absent.json", tmp_path, latin):
        with pytest.raises(RequestError, match="cannot be read"):
            counterfact(path)


def test_byte_order_mark_is_no_obstacle(tmp_path):
    path = tmp_path / "mark.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([rome()], ensure_ascii=False).encode("utf-8"))
    assert counterfact(path)[0].request.subject == "Léon Blum"


# Cases


def test_cases_know_their_source_and_slices_stay_cases(tmp_path):
    path = written(tmp_path, [rome(0), rome(1, new=""), rome(2)])
    cases = counterfact(str(path))
    assert (cases.format, cases.source) == ("counterfact", str(path))
    part = cases[1:]
    assert isinstance(part, Cases) and [case.request.id for case in part] == ["2"]
    assert (part.format, part.source, part.skipped, part.skipped_ids) == (
        "counterfact", str(path), {"empty target": 1}, ("1",)
    )
    assert "2 of counterfact" in repr(cases)
    for twin in (copy.copy(cases), pickle.loads(pickle.dumps(cases))):
        assert twin == cases and twin.skipped == cases.skipped and twin.digest == cases.digest


def test_digest_follows_the_content_and_nothing_else(tmp_path):
    cases = counterfact(written(tmp_path, [rome(0), rome(1)]))
    assert cases.digest == counterfact_cases([rome(0), rome(1)]).digest and len(cases.digest) == 64
    others = [
        [rome(0)], [rome(1), rome(0)], [rome(0), rome(1, new="Dutch")], [rome(0), rome(1, reference="a")],
        [rome(0), rome(1, neighborhood_prompts=["a"])]
    ]
    assert len({cases.digest, cases[:1].digest, *(counterfact_cases(other).digest for other in others)}) == 6


# Batches


def test_batch_with_a_duplicate_or_a_contradiction_names_both():
    first, other = EditRequest("{} is in", "Rome", "Italy", "a1"), EditRequest("{} is in", "Oslo", "Italy", "a2")
    check_batch([])
    check_batch([first, other, EditRequest("{} lies in", "Rome", "Spain", "a3")])
    with pytest.raises(RequestError, match="'b7' is a duplicate of request 'a1'"):
        check_batch([first, other, EditRequest("{} is in", "Rome", " Italy", "b7")])
    with pytest.raises(RequestError, match="'b8' contradicts request 'a1'.*'Spain' and 'Italy'"):
        check_batch(iter([first, other, EditRequest("{} is in", "Rome", "Spain", "b8")]))
    with pytest.raises(RequestError, match="duplicate"):
        check_batch([first, first])


def test_batches_are_consecutive_and_complete():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches(iter("ab"), 9)) == [["a", "b"]] and list(batches([], 3)) == []
    assert all(isinstance(batch, Cases) for batch in batches(counterfact_cases([rome(0), rome(1)]), 1))
    for size in (0, -1, 2.0, True):
        with pytest.raises(ParameterError, match="size"):
            batches([1], size)


def test_space_around_the_subject_is_dropped():
    assert EditRequest("The capital of {} is", " France ", "Rome", "a").text == "The capital of France is"


def test_two_requests_with_one_id_are_refused():
    requests = [EditRequest("{} is in", "Rome", "Spain", "a"), EditRequest("{} was in", "Paris", "Spain", "a")]
    with pytest.raises(RequestError, match="'Paris was in' and 'Rome is in' both have the id 'a'"):
        check_batch(requests)
