"""The other files that users have: one small record of each layout, written here, and what is read from it."""

import json

import pytest
from test_requests import easyedit, kinds, mend, rome, written

from metake.data import files
from metake.data.files import dataset
from metake.data.requests import EditRequest, Probe
from metake.support.errors import ParameterError, RequestError


def rewrite(subject, new, prompt="{} lives in", question="Where does {} live?"):
    return {
        "prompt": prompt, "relation_id": "P1", "subject": subject, "question": question.replace("{}", subject),
        "target_new": {"str": new, "id": "Q1"}, "target_true": {"str": "Oslo", "id": "Q2"}
    }


def mquake(id=4, **changes):
    return {
        "case_id": id, "requested_rewrite": [
            rewrite("Ada Lind", "Tiro"), rewrite("Tiro", "the plum", "The fruit of {} is", "Which fruit has {}?")
        ],
        "questions": ["Which fruit has Ada Lind's home?", "Ada Lind's town grows what?"],
        "answer": "the fig", "answer_alias": [], "new_answer": "the plum", "new_answer_alias": ["plums"],
        "single_hops": [],
        "new_single_hops": [
            {"question": "Where does Ada Lind live?", "cloze": "", "answer": "Tiro", "answer_alias": []},
            {"question": "Which color has a plum?", "cloze": "", "answer": "blue", "answer_alias": ["bluish"]},
        ],
        "orig": {}, **changes
    }  # fmt: skip


def knowedit(**changes):
    return {
        "subject": "Ada Lind", "prompt": "The home of Ada Lind is", "target_new": "Tiro", "ground_truth": ["Oslo"],
        "rephrase": "Ada Lind dwells in",
        "portability": {
            "Subject_Aliasing": [{"prompt": "The home of A. Lind is", "ground_truth": [["Tiro", "Old Tiro"]]}],
            "Reasoning": [
                {"prompt": "Ada Lind's home grows", "ground_truth": [["plums"], ["figs"]]},
                {"prompt": "never asked", "ground_truth": [[""]]},
            ],
        },
        "locality": {"Relation_Specificity": [{"prompt": "Ada Lind plays the", "ground_truth": [[3]]}]}, **changes
    }


def query(prompt, relation, subject, *answers, phrase=None):
    return {
        "prompt": prompt, "answers": [{"value": a, "aliases": [f"{a}!"]} for a in answers], "query_type": "regular",
        "subject_id": subject, "relation": relation, "target_ids": [], "phrase": phrase
    }


def ripple(name, id, home, *, aliased=(), relation="HOME"):
    tests = [query(f"The home of {a} is", "HOME", id, home, phrase=f"The home of {a} is") for a in aliased]
    own = [query(f"The home of {id}friend is", "HOME", f"{id}f", "Oslo")]
    return {
        "example_type": "popular",
        "edit": {"prompt": f"The home of {name} is {home}.", "subject_id": id, "relation": relation, "target_id": "Q9"},
        "Subject_Aliasing": [{"test_queries": tests, "test_condition": "OR", "condition_queries": []}] * bool(tests),
        "Relation_Specificity": [{"test_queries": own, "test_condition": "OR", "condition_queries": []}],
        "Logical_Generalization": [],
        "Compositionality_I": [
            {"test_queries": [query("The fruit of", "FRUIT", "Q3", "plum"), query("No answer", "FRUIT", "Q3")]}
        ],
        "Compositionality_II": [], "Forgetfulness": [],
    }


def bizsre():
    english, chinese = mend(), mend(
        src="热文档是什么语言？", subject="热文档", alt="荷兰语", rephrase="热文档用什么写的？", loc="谁写了乌鸦？",
        loc_ans="坡"
    )
    for side, question in ((english, "Where is it spoken?"), (chinese, "在哪里说？")):
        side["portability"] = {"Recalled Relation": "x", "New Question": question, "New Answer": "NL"}
    return {"en": english, "zh": chinese}


def asked(case):
    return [(p.kind, p.sort, p.prompt, p.target, p.aliases) for p in case.probes if p.sort]


def test_several_edits_of_one_record_are_one_case_and_all_are_asked(tmp_path):
    [case] = found = dataset(written(tmp_path, [mquake()]))
    assert found.format == "mquake" and case.requests == (
        EditRequest("{} lives in", "Ada Lind", "Tiro", "4"),
        EditRequest("The fruit of {} is", "Tiro", "the plum", "4/1"),
    )  # fmt: skip
    assert kinds(case, "efficacy") == [
        Probe("efficacy", "Ada Lind lives in", "Tiro"), Probe("efficacy", "The fruit of Tiro is", "the plum")
    ]
    assert [(p.prompt, p.target) for p in kinds(case, "paraphrase")] == [
        ("Where does Ada Lind live?", "Tiro"), ("Which fruit has Tiro?", "the plum")
    ]
    assert asked(case) == [
        ("portability", "several_hops", question, "the plum", ("plums",)) for question in mquake()["questions"]
    ] + [("portability", "one_hop", "Which color has a plum?", "blue", ("bluish",))], "the edited hop is asked already"
    assert found.digest != dataset(written(tmp_path, [mquake(requested_rewrite=[rewrite("Ada Lind", "Tiro")])])).digest


def test_knowedits_questions_have_their_sorts_and_none_is_asked_without_an_answer(tmp_path):
    [case] = dataset(written(tmp_path, [knowedit()]))
    assert case.request == EditRequest("The home of {} is", "Ada Lind", "Tiro", "0")
    assert [p.prompt for p in kinds(case, "paraphrase")] == ["Ada Lind dwells in"]
    assert asked(case) == [
        ("portability", "alias", "The home of A. Lind is", "Tiro", ("Old Tiro",)),
        ("portability", "one_hop", "Ada Lind's home grows", "plums", ("figs",)),
        ("neighborhood", "other_relation", "Ada Lind plays the", "3", ()),
    ]
    assert {p.rival for p in case.probes} == {None}


def test_rippleedits_sentences_are_taken_apart_by_what_their_relation_has_in_common(tmp_path):
    records = [
        ripple("Ada Lind", "Q1", "Tiro", aliased=["A. Lind"]), ripple("This Is Bo", "Q2", "New Oslo, D.C."),
        ripple("Cy", "Q4", "Rome"), ripple("Dee", "Q5", "Rome", relation="UNSEEN"),
    ]  # fmt: skip
    found = dataset(written(tmp_path, records))
    assert [(c.request.prompt, c.request.subject, c.request.target) for c in found] == [
        ("The home of {} is", "Ada Lind", "Tiro"), ("The home of {} is", "This Is Bo", "New Oslo, D.C."),
        ("The home of {} is", "Cy", "Rome"),
    ]  # fmt: skip
    assert found.skipped == {"subject not told by other sentences of its relation": 1} and found.skipped_ids == ("3",)
    assert asked(found[0]) == [
        ("portability", "alias", "The home of A. Lind is", "Tiro", ("Tiro!",)),
        ("portability", "new_object", "The fruit of", "plum", ("plum!",)),
        ("neighborhood", "other_relation", "The home of Q1friend is", "Oslo", ("Oslo!",)),
    ]
    assert len(dataset(written(tmp_path, records[:2]))) == 0, "two subjects tell too little"


@pytest.mark.parametrize(("layout", "subject", "target", "other"), [
    (None, "Hot Doc", "Dutch", "荷兰语"), ("bizsre-zh", "热文档", "荷兰语", "Dutch")
])  # fmt: skip
def test_bizsre_is_edited_in_one_language_and_asked_in_both(tmp_path, layout, subject, target, other):
    [case] = dataset(written(tmp_path, [bizsre()]), layout)
    assert (case.request.subject, case.request.target) == (subject, target)
    sorts = [(p.kind, p.sort) for p in case.probes]
    assert [sorts.count(("portability", sort)) for sort in ("one_hop", "other_language")] == [1, 3]
    assert sorts.count(("neighborhood", "")) == sorts.count(("neighborhood", "other_language")) == 1
    assert {p.target for p in case.probes if p.sort == "other_language" and p.kind == "portability"} == {other, "NL"}


def test_wikibigedit_asks_what_a_record_has(tmp_path):
    whole = {
        "tag": "new", "subject": "Ada Lind", "update": "Where does Ada Lind live?", "ans": "Tiro",
        "rephrase": "What is Ada Lind's home?", "personas": "Ahoy, where dwells Ada Lind?", "loc": "Who is Bo?",
        "loc_ans": "a cat", "mhop": "What grows at Ada Lind's?", "mhop_ans": "plums",
    }  # fmt: skip
    bare = {name: whole[name] for name in ("subject", "update", "ans", "rephrase")}
    one, other = dataset(written(tmp_path, [whole, bare | {"personas": None}]))
    assert [p.kind for p in one.probes] == ["efficacy", *["paraphrase"] * 2, "neighborhood", "portability"]
    assert [p.kind for p in other.probes] == ["efficacy", "paraphrase"] and one.request.prompt == "Where does {} live?"


def test_lines_of_ones_own_need_three_fields(tmp_path):
    file = tmp_path / "own.jsonl"
    least = {"prompt": "The home of {} is", "subject": "Ada Lind", "target": "Tiro"}
    more = least | {
        "id": "b", "true": "Oslo", "seam": "", "paraphrases": ["Ada Lind dwells in"], "generation": ["Ada Lind"],
        "neighborhood": [{"prompt": "The home of Bo is", "target": "Oslo"}],
        "portability": [{"prompt": "What grows there?", "target": "plums", "sort": "one_hop", "aliases": ["a plum"]}],
    }
    file.write_text("\n".join(map(json.dumps, (least, more, least | {"portability": [{"prompt": "x"}]}))))
    one, other = found = dataset(file)
    assert found.format == "lines" and one.probes == (Probe("efficacy", "The home of Ada Lind is", "Tiro"),)
    assert other.probes[1:] == (
        Probe("paraphrase", "Ada Lind dwells in", "Tiro", "Oslo", ""),
        Probe("neighborhood", "The home of Bo is", "Oslo", "Tiro", ""),
        Probe("portability", "What grows there?", "plums", None, "", "one_hop", ("a plum",)),
        Probe("generation", "Ada Lind"),
    )  # fmt: skip
    assert other.request.id == "b" and found.skipped == {"malformed: 'portability.target' missing": 1}
    bad = least | {"portability": [{"prompt": "x", "target": "y", "sort": "one hop"}]}
    file.write_text("\n".join(map(json.dumps, (least, bad))))
    assert dataset(file).skipped == {"sort is 'one hop'": 1}


@pytest.mark.parametrize(("records", "format"), [
    ([rome()], "counterfact"), ([easyedit()], "counterfact"), ([mend()], "zsre"), ([knowedit()], "knowedit"),
    ([mquake()], "mquake"), ([knowedit(rephrase_prompt="Ada")], "knowedit"),
])  # fmt: skip
def test_the_first_record_tells_the_layout(tmp_path, records, format):
    assert dataset(written(tmp_path, records)).format == format


@pytest.mark.parametrize(("read", "content", "said"), [
    (dataset, [mquake(requested_rewrite=rewrite("a", "b"))], "record 0: 'requested_rewrite' is .*; expected a list of"),
    (dataset, [mquake(new_answer=None)], "'new_answer' missing; expected a string or a whole number; .*MQuAKE"),
    (dataset, [knowedit(locality={"Relation_Specificity": "x"})], "'locality.Relation_Specificity' is 'x'; expected a"),
    (dataset, [{"question": "?"}], "record 0: 'prompt' missing; .*plain JSON Lines"),
    (dataset, [rome(paraphrase_prompts=3)], "'paraphrase_prompts' is 3; expected a list of strings"),
    (files.counterfact, [mquake()], r"looks like a MQuAKE file: use dataset\(\.\.\.\)"),
    (files.zsre, [bizsre()], r"'src' missing; .*looks like a Bi-ZsRE file: use dataset\("),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused_naming_the_first_wrong_field(tmp_path, read, content, said):
    with pytest.raises(RequestError, match=said):
        read(written(tmp_path, content))


def test_what_is_wrong_in_a_record_is_named_and_an_unknown_layout_answered(tmp_path):
    odd = [mquake(5, requested_rewrite=[]), mquake(6, questions=["a", 3]), ["none"], mquake(7, new_answer=" ")]
    found = dataset(written(tmp_path, [mquake(), *odd]))
    assert found.skipped == {
        "no edit": 1, "malformed: 'questions' is ['a', 3]": 1, "malformed: is list": 1, "empty portability probe": 1
    } and found.skipped_ids == ("5", "6", "3", "7")
    with pytest.raises(ParameterError, match="unknown layout 'mquak'. Did you mean .*'mquake'"):
        dataset(written(tmp_path, [mquake()]), "mquak")


def test_an_easyedit_zsre_file_has_a_question_one_hop_further(tmp_path):
    further = {"Recalled Relation": "x", "New Question": "Where is it spoken?", "New Answer": "in Athens"}
    [case] = files.zsre(written(tmp_path, [mend(portability=further)]))
    assert asked(case) == [("portability", "one_hop", "Where is it spoken?", "in Athens", ())]
    assert files.zsre_cases([mend()]).digest == files.zsre_cases([mend(portability=None)]).digest
