"""Files of one's own: a reader changes no prompt, and says what it could not use."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_requests import easyedit, kinds, mend, rome, written

from metake.data.files import counterfact, counterfact_cases, zsre, zsre_cases
from metake.data.requests import EditRequest, Probe
from metake.support.errors import RequestError


def in_rome(prefix, subject, suffix):
    return rome(prompt=prefix + "{}" + suffix, subject=subject), prefix + subject + suffix, counterfact_cases


def in_easyedit(prefix, subject, suffix):
    text = prefix + subject.strip() + suffix
    return easyedit(prompt=text, subject=subject), text, counterfact_cases


def in_mend(prefix, subject, suffix):
    text = prefix + subject.strip() + suffix
    return mend(src=text, subject=subject), text, zsre_cases


LAYOUTS = pytest.mark.parametrize("layout", [in_rome, in_easyedit, in_mend])
letters = st.text("aBé e\u0301ß 的ก็ั가\u200d\u200b \t{}'-?.1_", max_size=7)


@LAYOUTS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(prefix=letters, subject=letters, suffix=letters)
def test_the_text_of_every_request_is_the_files(layout, prefix, subject, suffix):
    """Or the record is skipped; the first stands only for a file that is read at all."""
    record, text, read = layout(prefix, subject, suffix)
    first, *_ = layout("Who wrote ", "Blue Jay", " first?")
    cases = read([first, record])
    assert len(cases) + sum(cases.skipped.values()) == 2 and len(cases.skipped_ids) == 2 - len(cases)
    for case in cases[1:]:
        assert case.request.text == text == kinds(case, "efficacy")[0].prompt
        assert case.request.subject == subject.strip() != "" and case.request.prompt.count("{}") == 1


@pytest.mark.parametrize("blanks", ["{} ", " {}", "\t{}\n", "\u00a0{}", "{}\u3000"])
@LAYOUTS
def test_blanks_around_a_subject_are_not_taken_from_the_prompt(layout, blanks):
    record, text, read = layout("Who wrote ", blanks.format("Blue Jay"), " first?")
    [case] = read([record])
    assert case.request.text == text and case.request.subject == "Blue Jay" and "Blue Jayfirst" not in text


@pytest.mark.parametrize(("text", "subject", "prompt"), [
    ("Is Romeo set near Rome?", "Rome", "Is Romeo set near {}?"),
    ("Is Syndrome near Rome", "Rome", "Is Syndrome near {}"),
    ("romeRome Rome's Rome", "Rome", "romeRome {}'s Rome"),
    ("Boeing 7470 or 747?", "747", "Boeing 7470 or {}?"),
    ("Is Rome_2 as Rome?", "Rome", "Is Rome_2 as {}?"),
    ("Did Beyonce\u0301 meet Beyonce?", "Beyonce", "Did Beyonce\u0301 meet {}?"),  # a mark belongs to its letter
    ("Rome\u200dx Rome", "Rome", "Rome\u200dx {}"),
    ("(Rome)", "Rome", "({})"),
    ("法国的首都是", "法国", "{}的首都是"),
    ("ใครเขียนโรมก่อน", "โรม", "ใครเขียน{}ก่อน"),
    ("로마는 어디", "로마", "{}는 어디"),
    ("ローマRomeローマ", "Rome", "ローマ{}ローマ"),
    ("What does { } in C mean?", "C", "What does { } in {} mean?"),
])  # fmt: skip
def test_the_subject_is_a_whole_word(text, subject, prompt):
    [case] = zsre_cases([mend(src=text, subject=subject)])
    assert case.request.prompt == prompt and case.request.text == text


@pytest.mark.parametrize(("text", "subject"), [
    ("Is Romeo a Syndrome?", "Rome"), ("Who is O'Romeo", "Rome"), ("Beyonce\u0301?", "Beyonce"), ("747s", "74"),
    ("กิน", "ก"), ("xRomе", "Rom"),
])  # fmt: skip
def test_a_subject_inside_other_words_is_skipped_and_counted(text, subject):
    good = mend()
    for cases in (
        zsre_cases([good, mend(src=text, subject=subject)]),
        counterfact_cases([easyedit(), easyedit(prompt=text, subject=subject)]),
    ):
        assert len(cases) == 1 and cases.skipped == {"subject only inside other words": 1}


def test_braces_of_a_prompts_own_are_skipped_or_kept_never_filled():
    cases = zsre_cases([mend(), mend(src="What is {} in Python?", subject="Python")])
    assert cases.skipped == {"several placeholders": 1}
    [case] = zsre_cases([mend(src="What does {} print?", subject="{}")])
    assert case.request.text == "What does {} print?" and case.request.subject == "{}"


def test_an_unrelated_question_keeps_its_own_question_mark():
    for asked in ("who? ", "谁写的？", "who wrote it?"):
        assert kinds(zsre_cases([mend(loc=asked)])[0], "neighborhood")[0].prompt == asked
    assert kinds(zsre_cases([mend(loc="who ")])[0], "neighborhood")[0].prompt == "who?"


# Names and numbers


@pytest.mark.parametrize("missing", [None, float("nan"), "", "  "])
def test_a_record_without_an_id_is_named_by_its_place(tmp_path, missing):
    records = [rome(missing, subject=subject) for subject in ("Rome", "Paris", "Oslo")]
    assert [c.request.id for c in counterfact(written(tmp_path, records))] == ["0", "1", "2"]
    assert [c.request.id for c in counterfact_cases([easyedit(case_id=missing), easyedit(case_id=0)])] == ["0", "0"]
    assert counterfact_cases([rome("a"), rome(missing, new="")]).skipped_ids == ("1",)


def test_whole_numbers_are_text():
    [case] = counterfact_cases([rome(prompt="{} begins in", subject=1984, new=1985, true=1984)])
    assert case.request == EditRequest("{} begins in", "1984", "1985", "7") and case.request.text == "1984 begins in"
    assert kinds(case, "efficacy") == [Probe("efficacy", "1984 begins in", "1985", "1984")]
    [case] = counterfact_cases([easyedit(target_new=3, ground_truth=4, locality_ground_truth=5)])
    assert [(p.target, p.rival) for p in case.probes] == [("3", "4"), ("3", "4"), ("5", "3")]
    [case] = zsre_cases([mend(answers=[1999], loc_ans=2000)])
    assert [p.target for p in case.probes] == ["1999", "1999", "2000"]
    assert zsre_cases([mend(alt=-7)], target="alt")[0].request.target == "-7"
    assert counterfact_cases([rome(new=5, true="5"), rome()]).skipped == {"target equals truth": 1}
    for no_name in (True, 1.5, None, ["a"]):
        cases = counterfact_cases([easyedit(), easyedit(target_new=no_name)])
        assert len(cases) == 1 and "'target_new'" in next(iter(cases.skipped))


# The seam, in a file


@LAYOUTS
def test_a_record_says_what_stands_between_prompt_and_target(layout):
    record, _, read = layout("print(", "x", ", ")
    for seam in ("", " ", None):
        request, *probes = [item for case in read([record | {"seam": seam}]) for item in (case.request, *case.probes)]
        assert {p.seam for p in (request, *probes) if getattr(p, "kind", "") != "generation"} == {seam}
    assert read([record]).digest == read([record | {"seam": None}]).digest != read([record | {"seam": ""}]).digest
    cases = read([record, record | {"seam": "\n"}, record | {"seam": 3}])
    assert len(cases) == 1 and sorted(cases.skipped) == [
        "malformed: 'seam' is 3", "unknown seam '\\n'",
    ]  # fmt: skip


# Characters that are none


HALVES = ["\ud83d", "a\udcff b", "\ude00\ud83d", "\ud83d\ude00"]


@pytest.mark.parametrize("half", HALVES)
@LAYOUTS
def test_a_record_with_half_a_character_is_skipped_counted_and_named(tmp_path, caplog, layout, half):
    good, _, _ = layout("Who wrote ", "Blue Jay", " first?")
    bad, _, _ = layout("Who wrote ", f"Blue {half}x", " first?")
    read = zsre if layout is in_mend else counterfact
    file = tmp_path / "records.json"
    file.write_text(json.dumps([good | {"case_id": "fine"}, bad | {"case_id": "odd"}]))  # as \ud83d
    if half == HALVES[-1]:  # a pair is one character
        assert len(read(file)) == 2
        return
    cases = read(file)
    assert [c.request.id for c in cases] == ["fine"] and cases.skipped_ids == ("odd",) and "odd" in caplog.text
    assert cases.skipped == {"text with an unpaired surrogate or stray byte": 1}


@pytest.mark.parametrize("half", HALVES)
def test_half_a_character_is_refused_wherever_it_stands(half):
    whole = ["The {} is", "sky", "blue", "a"]
    for place in range(4):
        with pytest.raises(RequestError, match="unpaired surrogate or stray byte; found .*expected Unicode") as told:
            EditRequest(*whole[:place], whole[place] + half, *whole[place + 1 :])
        str(told.value).encode()  # can be printed
    for fields in ((half, "a", "b"), ("a", half, "b"), ("a", "b", half)):
        with pytest.raises(RequestError, match="unpaired surrogate"):
            Probe("efficacy", *fields)
    assert EditRequest("The {} is", "🙂", unicodedata.normalize("NFD", "é"), "a").text == "The 🙂 is"


# JSON Lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", ""])
def test_one_record_a_line_is_read_as_a_list_is(tmp_path, name, end):
    records = [rome(0), rome(1, subject="Zoë\u2028Čapek"), rome(2, new="")]  # U+2028 is no end of a line of JSON
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / name).write_bytes(((end or "\n").join(lines) + end).encode())
    found = counterfact(tmp_path / name)
    assert found.digest == counterfact_cases(records).digest and found.skipped == {"empty target": 1}
    assert found.source == str(tmp_path / name) and len(counterfact(tmp_path / name, limit=1, offset=1)) == 1


def test_a_file_of_lines_may_have_one_and_begin_with_a_mark(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(mend()).encode())
    assert zsre(file).digest == zsre_cases([mend()]).digest
    file.write_text(json.dumps([mend(), mend()]))
    assert len(zsre(file)) == 2, "a list under the name of lines"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1}\n{"b": ', r"line 2 column 7.*expected one JSON list of records, or one record a line"),
        ("[1]\n[2]", "record 0: is list"), ("\n", "record 0: missing"), (json.dumps(mend()) + "\nnot json", "line 2"),
    ],
)  # fmt: skip
def test_lines_that_are_no_records_are_refused(tmp_path, content, said):
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(RequestError, match=said):
        zsre(file)
