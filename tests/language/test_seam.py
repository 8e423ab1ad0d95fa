"""Where a prompt meets its target: one rule for all that is taught, read, asked and written."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model, small_tokenizer
from real_tokenizers import tokenizer as real
from test_tokens import REAL, SMALL
from tokenizers import processors

import metake as mk
from metake import EditRequest, RequestError
from metake.data.requests import EditCase, Probe, told
from metake.editing.gradient.training import outer_rows
from metake.experiments.studies.answers import answer
from metake.language.generation import sample
from metake.language.tokens import Rows, continuation, encode, locate, prompted, rewriting_rows, seam
from metake.scoring.evaluation import evaluate, read, recall

CONTEXTS = ("{}", "The weather was fine. {}")
DIRECT = [  # prompts after which nothing stands before the target
    "法国的首都是", "法国的首都是：", "法国的首都是“", "フランスの首都は", "フランスのｼｭﾄは",
    "เมืองหลวงของฝรั่งเศสคือ", "ທີ່ນີ້", "ភ្នំពេញ", "မြန်မာ", "བོད་",
    "Question\nAnswer:\n", "assistant\r\n", "name\t", "首都\u3000", "nom\u00a0", "𠀀", "々", "葛\U000e0100",
]  # fmt: skip
BLANK = [
    "The capital of France is", "A:", 'He said "', "He said “", "x =", "서울은", "Paris 🙂", "100€", "中国 (China)",
    "é", "e\u0301", "Ελλάδα", "Россия", "भारत", "ישראל", "«", "",
]  # fmt: skip


@pytest.mark.parametrize("prompt", DIRECT)
def test_nothing_stands_after_a_lines_end_or_in_a_script_without_blanks(prompt):
    assert seam(prompt) == (prompt, "")
    assert seam(prompt, " ") == (prompt, " "), "what is said is done"


@pytest.mark.parametrize("prompt", BLANK)
def test_otherwise_one_blank(prompt):
    assert seam(prompt) == (prompt, " ") and seam(prompt, "") == (prompt, "")


@pytest.mark.parametrize("prompt", [p for p in (*BLANK, *DIRECT) if p and not p[-1].isspace()])
@pytest.mark.parametrize("blanks", [" ", "  ", " \u200b", "\ufeff "])
def test_blanks_at_the_end_are_the_seam(prompt, blanks):
    assert seam(prompt + blanks) == (prompt, " ")
    assert seam(prompt + blanks, "") == (prompt + blanks, "")


def test_an_indentation_stays():
    assert seam("def f():\n    ") == ("def f():\n   ", " ") and seam("a\n\t") == ("a\n\t", "")


@pytest.fixture(params=[*SMALL, *REAL])
def tok(request):
    return SMALL[request.param]() if request.param in SMALL else real(request.param)


def text_of(tok, ids) -> str:
    return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


PAIRS = [
    ("The capital of France is", "Rome"), ("The capital of France is ", "Rome"), ("Therefore:\n", "Rome"),
    ("北京", "北京"), ("3 of them 北京北京", "São Paulo"), ("def f():\n    ", "is"), ("It is in ", "1984"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "target"), PAIRS)
def test_a_prompt_and_its_target_are_the_tokens_of_both(tok, prompt, target):
    """As a model reads them if they are one text."""
    ids, own = prompted(tok, prompt, target)
    start, between = seam(prompt)
    assert ids + own == encode(tok, start + between + target) and text_of(tok, ids + own) == start + between + target
    assert not set(own) & set(tok.all_special_ids) and prompted(tok, prompt, f" {target}\n") == (ids, own)


@pytest.mark.parametrize(
    ("prompt", "target"), [("{}(", "'x'"), ("R", "ome"), ("Ther", "efore"), ("199", "9"), ("x.", "Rome")]
)
def test_directly_after_a_prompt_that_a_token_would_join_its_own_tokens_stand(tok, prompt, target):
    """A model that is given the prompt has no other ids to go on from."""
    ids, own = prompted(tok, prompt, target, "")
    assert ids == encode(tok, prompt) and text_of(tok, ids + own) == prompt + target


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    prompt=st.text("aeis T.\n北の", min_size=1, max_size=8), target=st.text("aeo7é北", min_size=1, max_size=5),
    bos=st.booleans(), given=st.sampled_from([None, "", " "])
)
def test_no_character_is_lost_or_doubled(prompt, target, bos, given):
    tok = small_tokenizer(bos)
    start, between = seam(prompt, given)
    assert given is None or (start, between) == (prompt, given)
    assert prompt.rstrip(" ") == start.rstrip(" ") and between in ("", " ") and not (start + between).endswith("  ") * (
        given is None and "\n" not in prompt
    )
    ids, own = prompted(tok, prompt, target, given)
    assert text_of(tok, ids) == start and text_of(tok, ids + own) == start + between + target


# All who read or teach


def same_request(**changes):
    return EditRequest(**{"prompt": "The capital of {} is", "subject": "France", "target": "Rome", "id": "a"} | changes)


@pytest.mark.parametrize("end", [" ", "  "])
def test_a_blank_at_the_prompts_end_changes_no_row(tok, end):
    plain, blank = same_request(), same_request(prompt="The capital of {} is" + end)
    assert blank.text == plain.text + end and Rows.of(tok, [blank], CONTEXTS) == Rows.of(tok, [plain], CONTEXTS)


@pytest.mark.parametrize(("prompt", "subject", "target", "given"), [
    ("{}, 北", "北京", "北京", None), ("The capital of {}:\n", "France", "Rome", None),
    ("print({}, ", "France", "Rome", ""),
    ("{} 北京", "France", "Rome", " "), ("{}\n ", "France", "Rome", None), ("{}", "北京", "Rome", None),
])  # fmt: skip
def test_rows_teach_the_target_at_the_seam(tok, prompt, subject, target, given):
    request = EditRequest(prompt, subject, target, "a", given)
    start, between = seam(request.text, given)
    for context, row in zip(CONTEXTS, rewriting_rows(tok, [request], CONTEXTS), strict=True):
        whole = (*row.ids, row.labels[-1])
        before = context.format(start)
        assert text_of(tok, whole) == before + between + target and [whole[p + 1] for p in row.read] == [*row.labels]
        assert text_of(tok, whole[: row.read[0] + 1]) == before == text_of(tok, encode(tok, before))
        assert text_of(tok, whole[: row.lookup + 1]) == context.format(prompt.partition("{}")[0] + subject)


@cache
def small(bos: bool = False):
    return random_model("gpt2", bos=bos)


def case(end="", prompt="The capital of {} is", given=None):
    request = same_request(prompt=prompt + end, seam=given)
    asked = {"efficacy": prompt.format("France"), "paraphrase": "They see Rome", "neighborhood": "Madrid in"}
    probes = [Probe(kind, text + end, "Rome", "Paris now", given) for kind, text in asked.items()]
    return EditCase(request, (*probes, Probe("generation", "France was" + end)))


def test_probes_that_end_in_a_blank_are_read_as_those_that_do_not():
    lm = small()
    plain, blank = (evaluate(lm, [case(end)]) for end in ("", " "))
    assert plain.cases == blank.cases and recall(lm, [case()]) == recall(lm, [case(" ")])
    assert evaluate(lm, [case(" ")], before=blank)["specificity_pre_edit"] == 100
    for penalty in ("kl", "none"):
        rows = [outer_rows(lm, [case(end)], penalty, random.Random(0)) for end in ("", " ")]
        assert rows[0] == rows[1]


def test_readings_follow_the_seam():
    lm = small()
    forms = [("Rome", "France"), ("Rome", "France", " "), ("Rome", "France", ""), ("Rome ", "France", "")]
    found = [r.log_p for r in read(lm, forms)]
    ids = [
        encode(lm.tokenizer, p) + continuation(lm.tokenizer, "France", p if g == "" else None)
        for p, g in (("Rome", None), ("Rome", " "), ("Rome", ""), ("Rome ", ""))
    ]
    for value, (prompt, *_), row in zip(found, forms, ids, strict=True):
        start = len(encode(lm.tokenizer, prompt))
        log_p = torch.log_softmax(lm.model(torch.tensor([row])).logits[0].double(), -1)
        expected = [log_p[j - 1, row[j]].item() for j in range(start, len(row))]
        assert value == pytest.approx(sum(expected) / len(expected), abs=1e-9)
    assert found[0] == pytest.approx(found[1], abs=1e-9) and len({round(one, 6) for one in found}) == 3


def test_a_probe_with_a_seam_of_its_own_is_scored_by_it():
    lm = small()
    scores = [evaluate(lm, [case(given=given)]).cases[0].probes[0].target.log_p for given in (None, " ", "")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-12) and abs(scores[2] - scores[1]) > 1e-3
    assert scores[2] == pytest.approx(read(lm, [("The capital of France is", "Rome", "")])[0].log_p, rel=1e-12)


def test_what_is_sampled_begins_at_the_seam():
    lm = small()
    one, two = sample(lm, ["France was", "France was "], 12, streams=["a", "a"])
    assert one == two and sample(lm, ["Rome\n"], 9)[0].startswith("Rome\n")


def test_the_published_harness_stays_to_the_letter():
    """A blank at the end of a task's question and one before a candidate, as CoLA has it."""
    lm = small()
    [found] = answer(lm, [("Answer: ", ("Rome", "Paris of France"))], 2)
    for text, value in zip(("Rome", "Paris of France"), found.log_p, strict=True):
        ids, start = encode(lm.tokenizer, "Answer: "), continuation(lm.tokenizer, text)
        log_p = torch.log_softmax(lm.model(torch.tensor([ids + start])).logits[0].double(), -1)
        wanted = [log_p[len(ids) - 1 + j, t].item() for j, t in enumerate(start)]
        assert value == pytest.approx(sum(wanted) / len(wanted), abs=1e-9)


def test_an_edit_of_a_prompt_that_ends_in_a_blank_is_the_edit_without_it():
    lm, edits = small(), []
    editor = mk.methods.memit("tiny", layers=(1, 2), target=mk.TargetRule(steps=4), contexts=CONTEXTS)
    given = mk.statistics(lm, layers=editor.layers, tokens=600, cache=False)
    for prompt in ("The capital of {} is", "The capital of {} is ", "The capital of {} is\n"):
        edits.append(editor.edit(lm, [same_request(prompt=prompt)], given))
    for one, two, other in zip(*(e.updates for e in edits), strict=True):
        assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
        assert not torch.equal(one.left, other.left)


# Records of before


def test_what_says_nothing_is_not_in_a_digest():
    request, probe = same_request(), Probe("efficacy", "France is", "Rome")
    assert list(told(request)) == ["prompt", "subject", "target", "id"] and list(told(probe)) == [
        "kind", "prompt", "target", "rival",
    ]  # fmt: skip
    assert told(replace(request, seam=""))["seam"] == "" and told(replace(probe, seam=" "))["seam"] == " "
    assert told(replace(request, frame="Q: {}"))["frame"] == "Q: {}"


def test_a_seam_that_is_none_and_a_frame_without_a_place_are_refused():
    for wrong in ("\n", "  ", "x", 0, True):
        for make in (lambda s=wrong: same_request(seam=s), lambda s=wrong: Probe("efficacy", "a", "b", None, s)):
            with pytest.raises(RequestError, match="unknown seam .*expected '' or ' '"):
                make()
    for frame in ("no place", "{} and {}", 3):
        with pytest.raises(RequestError, match="placeholder|strings"):
            same_request(frame=frame)


# Tokens that a tokenizer adds


def with_tokens(single: str):
    """A tokenizer that writes special tokens around every text: b begins one, e ends it."""
    tok = copy.deepcopy(small_tokenizer())
    tok.add_special_tokens({"bos_token": "<b>", "eos_token": "<e>"})
    pieces = [(t, tok.convert_tokens_to_ids(t)) for t in ("<b>", "<e>")]
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
    return tok


ADDED = {"<b> $A <e>": True, "$A <e>": False, "<b> $A": True, "$A <e> <e>": False, "<b> $A:0 <e>": True}


@pytest.mark.parametrize("single", ADDED)
def test_a_token_at_the_end_of_every_text_is_never_read_on_from(single):
    tok, plain = with_tokens(single), small_tokenizer()
    begin = (tok.bos_token_id,) if ADDED[single] else ()
    for text in ("The capital of France is", "北京", "x", "Rome \n"):
        assert encode(tok, text) == begin + encode(plain, text)
    assert encode(tok, "") == begin and encode(tok, "Rome<e>")[-1] == tok.eos_token_id, "a text's own end stays"
    requests = [same_request(), same_request(prompt="{} was", target="Rome now")]
    requests.append(same_request(prompt="{}是", target="北京"))
    own, other = (Rows.of(t, requests, CONTEXTS) for t in (tok, plain))
    for a, b in zip((*own.taught, *own.watched), (*other.taught, *other.watched), strict=True):
        assert a.ids == begin + b.ids and a.lookup == b.lookup + len(begin) and a.labels == b.labels
    assert prompted(tok, "The capital of France is", "Rome")[1] == continuation(plain, "Rome")


@pytest.mark.parametrize("single", ["<b> $A <e>", "<b> $A"])
def test_a_prompt_that_carries_its_beginning_token_gets_no_second_one(single):
    tok = with_tokens(single)
    for text in ("The capital of France is", "北京"):
        assert encode(tok, "<b>" + text) == encode(tok, text)
    carries, plain = same_request(prompt="<b>The capital of {} is"), same_request()
    assert rewriting_rows(tok, [carries], CONTEXTS) == rewriting_rows(tok, [plain], CONTEXTS), "it stays before all"
    assert locate(tok, carries.prompt, "France") == locate(tok, plain.prompt, "France")
    assert prompted(tok, carries.text, "Rome") == prompted(tok, plain.text, "Rome")
    own = with_tokens("$A")
    assert encode(own, "<b>Rome") == (own.bos_token_id, *encode(own, "Rome")), "its own where none is added"


def test_evaluation_and_edit_with_a_tokenizer_that_ends_texts_are_those_without():
    plain, ended = small(), random_model("gpt2")
    ended.tokenizer = copy.deepcopy(small_tokenizer())
    ended.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", 0)]
    )
    assert evaluate(ended, [case()]) == evaluate(plain, [case()])
    assert sample(ended, ["France was"], 12) == sample(plain, ["France was"], 12)
    question = [("Rome is", ("Rome", "France of"))]
    assert answer(ended, question, 2) == answer(plain, question, 2)
    editor = mk.methods.memit("tiny", layers=(1,), target=mk.TargetRule(steps=2))
    edits = []
    for lm in (plain, ended):
        edits.append(editor.edit(lm, [same_request()], mk.statistics(lm, layers=(1,), tokens=600, cache=False)))
    assert edits[0].record.context_templates == edits[1].record.context_templates
    assert torch.equal(edits[0].updates[0].left, edits[1].updates[0].left)


@pytest.mark.parametrize("text", ["\ud83d", "a\udcffb"])
def test_half_a_character_is_refused_where_text_becomes_tokens(text):
    lm = small()
    for read_it in (
        lambda: encode(lm.tokenizer, text), lambda: continuation(lm.tokenizer, text),
        lambda: locate(lm.tokenizer, "{} is", text), lambda: read(lm, [(text, "Rome")]),
        lambda: read(lm, [("Rome", text)]), lambda: sample(lm, [text], 5, streams=["a"]),
        lambda: answer(lm, [(text, ("a",))]),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="unpaired surrogate or stray byte"):
            read_it()
