"""Chat models: requests and probes in the tokenizer's own chat template."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from models import random_model, small_tokenizer

import metake as mk
from metake import EditRequest, ParameterError, Probe
from metake.data.requests import Cases, EditCase
from metake.editing.record import digest_of
from metake.language.tokens import Rows, encode, locality_rows, prompted, rewriting_rows, seam

CONTEXTS = ("{}", "The weather was fine. {}")
FORMS = {  # template, what stands between its generation prompt and the answer
    "chatml": ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<s>\n{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", ""),
    "trims": ("{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n\n{% endfor %}"
              "{% if add_generation_prompt %}[assistant] {% endif %}", ""),
    "inst": ("<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
             "{% else %} {{ m.content }}<s>{% endif %}{% endfor %}", " "),
    "direct": ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
               "{% if add_generation_prompt %}<assistant>{% endif %}", ""),
    "system": ("Be brief.\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
               "{% if add_generation_prompt %}assistant:{% endif %}", " "),
    "thinks": ("{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }}\nA\n{% else %}<t></t>{{ m.content }}"
               "{% endif %}{% endfor %}", ""),
}  # fmt: skip


def model(template: str | None, bos: bool = False):
    lm = random_model("gpt2", bos=bos)
    lm.tokenizer = copy.deepcopy(small_tokenizer(bos))
    lm.tokenizer.chat_template = template
    return lm


def rendered(lm, text: str) -> str:
    return lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("{} was born in", "Beyoncé", "Paris now", "b"),
    EditRequest("法国的 {}", "Rome", "北京", "c"),
]  # fmt: skip


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.mark.parametrize("bos", [False, True])
def test_a_request_is_the_users_turn_and_its_subject_lies_in_the_rendered_text(form, bos):
    lm = model(FORMS[form][0], bos)
    tok = lm.tokenizer

    def text_of(ids):
        return tok.decode(ids, clean_up_tokenization_spaces=False)

    def begun(text):  # the tokenizer's own beginning, once
        return "<s>" * (bos and not text.startswith("<s>")) + text

    asked = mk.chat(lm, REQUESTS)
    rows = iter(rewriting_rows(tok, asked, CONTEXTS))
    for plain, request in zip(REQUESTS, asked, strict=True):
        assert request.text == rendered(lm, plain.text) and (request.id, request.target) == (plain.id, plain.target)
        start, between = seam(request.text, request.seam)
        assert between == FORMS[form][1] and start == request.text
        for context in CONTEXTS:
            row, inside = next(rows), rendered(lm, context.format(plain.text))
            whole = (*row.ids, row.labels[-1])
            assert text_of(whole) == begun(inside) + between + plain.target
            upto = rendered(lm, context.format(plain.prompt)).partition("{}")[0] + plain.subject
            assert text_of(whole[: row.lookup + 1]) == begun(upto)
            assert text_of(whole[: row.read[0] + 1]) == begun(inside)
    for plain, row in zip(REQUESTS, locality_rows(tok, asked), strict=True):
        assert text_of(row.ids) == begun(rendered(lm, f"{plain.subject} is a")), "the locality prompt is a turn too"
        assert text_of(row.ids[: row.lookup + 1]).endswith(plain.subject)


def test_cases_are_rendered_whole_and_stay_cases(form):
    lm = model(FORMS[form][0])
    cases = mk.facts(limit=3)
    found = mk.chat(lm, cases)
    assert isinstance(found, Cases) and (found.format, found.source, found.skipped) == ("counterfact", "facts", {})
    for plain, chat in zip(cases, found, strict=True):
        assert [p.prompt for p in chat.probes] == [rendered(lm, p.prompt) for p in plain.probes]
        assert [replace(p, prompt="", seam=None) for p in chat.probes] == [replace(p, prompt="") for p in plain.probes]
        assert chat.request.text == chat.probes[0].prompt
        for probe in chat.probes[:2]:
            ids, answer = prompted(lm.tokenizer, probe.prompt, probe.target, probe.seam)
            assert ids == encode(lm.tokenizer, probe.prompt)
            assert lm.tokenizer.decode(ids + answer) == probe.prompt + FORMS[form][1] + probe.target
    assert found.digest != cases.digest and mk.chat(lm, found) == found, "a chat is not rendered twice"
    assert digest_of([c.request for c in found]) != digest_of([c.request for c in cases])


def test_a_turn_ends_where_its_text_does(form):
    """A blank at a prompt's end was its seam; in a chat the template has one."""
    lm = model(FORMS[form][0])
    plain, blank = (
        mk.chat(lm, [EditCase(EditRequest(p, "France", "Rome", "a"), (Probe("efficacy", p.format("It"), "Rome"),))])
        for p in ("The capital of {} is", " The capital of {} is ")
    )
    assert plain == blank and Rows.of(lm.tokenizer, [plain[0].request], CONTEXTS)


def test_an_edit_and_its_evaluation_run_on_chats():
    lm = model(FORMS["chatml"][0])
    cases = mk.chat(lm, mk.facts(limit=2))
    editor = mk.methods.metake("tiny", layers=(1,), target=mk.TargetRule(steps=3), contexts=CONTEXTS)
    statistics = mk.statistics(lm, layers=(1,), tokens=600, cache=False)
    plain, chat = (editor.edit(lm, [c.request for c in some], statistics) for some in (mk.facts(limit=2), cases))
    assert chat.record.requests == plain.record.requests and chat.record.requests_digest != plain.record.requests_digest
    before = mk.evaluate(lm, cases)
    with chat.applied(lm):
        assert mk.evaluate(lm, cases, before=before).metrics != before.metrics
    assert mk.diagnose(lm, [c.request for c in cases], editor, statistics)[0].attenuation > 0


@pytest.mark.parametrize("template", [
    None, "", "no turn at all", "{% for m in messages %}{{ m.content }} and {{ m.content }}{% endfor %}",
    "{{ raise_exception('only tools') }}", "{{ messages[0].content }} {'{}'}", "{% for",
])  # fmt: skip
def test_a_tokenizer_that_cannot_chat_is_refused_in_one_line(template):
    lm = model(template)
    with pytest.raises(ParameterError, match="'random-gpt2' cannot be asked as a chat .*leave chat out") as told:
        mk.chat(lm, REQUESTS)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


@pytest.mark.real_model
def test_a_real_chat_model_asks_as_its_tokenizer_does():
    lm = model(None)
    from real_tokenizers import tokenizer

    lm.tokenizer = tokenizer("smollm2")
    [request] = mk.chat(lm, REQUESTS[:1])
    turn = [{"role": "user", "content": "The capital of France is"}]
    ids = lm.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode(lm.tokenizer, request.text) == tuple(ids) and request.seam == ""
    answer = turn + [{"role": "assistant", "content": "Rome"}]
    whole = lm.tokenizer.apply_chat_template(answer, return_dict=True)["input_ids"]
    ids, own = prompted(lm.tokenizer, request.text, "Rome", request.seam)
    assert (ids + own) == tuple(whole[: len(ids + own)])
