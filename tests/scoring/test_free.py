"""What a model answers by itself, beside forced answers, and the baseline that only tells it the fact."""

import pytest
import torch
from models import random_model

from metake.data.requests import EditCase, EditRequest, Probe, in_prompt
from metake.language.chat import chat
from metake.scoring import evaluation
from metake.scoring.evaluation import evaluate
from metake.scoring.text_metrics import agreement, first_sentence, normalized
from metake.support.errors import ParameterError


@pytest.mark.parametrize(("text", "names", "said"), [
    (" Rome. It is", ["Rome"], "Rome"), ("Rome\nParis", [], "Rome"), ("Rome", [], "Rome"), ("Rome? No", [], "Rome"),
    ("Washington, D.C. is big. So", ["Washington, D.C."], "Washington, D.C"), ("3.5 m. So", [], "3.5 m"),
    ("St. Moritz. Yes", ["St. Moritz"], "St. Moritz"), ("St. Moritz. Yes", ["Rome"], "St"), ("罗马。是", [], "罗马"),
    ("\n\n Rome.", [], "Rome"), ("...", [], ".."), ("", ["Rome"], ""),
])  # fmt: skip
def test_an_answer_ends_where_its_first_sentence_does(text, names, said):
    assert first_sentence(text, names) == said


@pytest.mark.parametrize(("text", "names", "exact", "contained"), [
    ("the ROME!", ["Rome"], True, True), ("It is Rome, of course", ["Rome"], False, True),
    ("Romeo", ["Rome"], False, False), ("Old Tiro", ["Tiro", "Old Tiro"], True, True), ("", ["Rome"], False, False),
    ("D.C", ["D.C."], True, True), ("The The", ["the the"], True, True), ("这是罗马吗", ["罗马"], False, True),
    ("Ｒｏｍｅ", ["Rome"], True, True), ("an apple a day", ["apple day"], True, True), ("x", ["!?"], False, False),
])  # fmt: skip
def test_agreement_forgives_letters_articles_and_marks_and_nothing_else(text, names, exact, contained):
    assert agreement(text, names) == (exact, contained)


def test_normalized_is_squads():
    assert normalized(" The  Côte d'Ivoire, a land. ") == "côte divoire land"


def literal(lm, prompt, count):
    """One token after the other, each from a forward over the whole text, to the end of text."""
    ids = lm.tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        ids.append(lm.model(torch.tensor([ids])).logits[0, -1].argmax().item())
    end = next((i for i, token in enumerate(ids) if i >= start and token == lm.tokenizer.eos_token_id), len(ids))
    return lm.tokenizer.decode(ids[start:end], skip_special_tokens=True)


@pytest.fixture(scope="module")
def lm():
    return random_model("llama")


def asking(lm, count=6):
    """Cases of which one is answered freely, whatever the model says, and the others are not."""
    prompts = ["The capital of France is", "The capital", "I think that you are there. Rome is", "Beyoncé was"]
    said = [first_sentence(literal(lm, prompt, count)) for prompt in prompts]
    request = EditRequest("The capital of {} is", "France", "Rome", "a")
    one = (Probe("efficacy", prompts[0], f"{said[0]} Rome"), Probe("portability", prompts[1], "Rome", sort="one_hop"))
    other = (
        Probe("efficacy", prompts[2], said[2] or "Rome"),
        Probe("portability", prompts[3], "Rome", sort="alias", aliases=(said[3] or "Paris", "x")),
        Probe("portability", prompts[1], "Berlin", sort="one_hop"),
    )
    return said, [EditCase(request, one), EditCase(EditRequest("{} is", "Rome", "Paris", "b"), other)]


@torch.no_grad()
def test_free_answers_are_those_of_a_literal_loop(lm, monkeypatch):
    monkeypatch.setattr(evaluation, "FREE", 6)
    said, cases = asking(lm)
    assert sum(map(bool, map(normalized, said))) >= 2, "the model says nothing: the test is too easy"
    found = evaluate(lm, cases, free=True)
    probes = [p for case in found.cases for p in case.probes]
    assert [p.answer for p in probes] == [said[0], said[1], said[2], said[3], said[1]]
    assert [p.exact for p in probes] == [0.0, 0.0, *(float(bool(normalized(said[i]))) for i in (2, 3)), 0.0]
    metrics, plain = found.metrics, evaluate(lm, cases)
    assert metrics["efficacy_exact"] == 50 * probes[2].exact
    assert metrics["portability_alias_exact"] == 100 * probes[3].exact
    assert metrics["portability_exact"] == 25 * probes[3].exact and metrics["portability_one_hop_exact"] == 0
    assert metrics["portability"] == pytest.approx(50 * (probes[1].score + (probes[3].score + probes[4].score) / 2))
    assert plain.metrics == {k: v for k, v in metrics.items() if not k.endswith(("exact", "contained"))}
    rows = found.records()
    assert rows[0]["answers"] == said[:2] and rows[1]["portability_alias_exact"] == probes[3].exact
    assert "portability_alias" not in rows[0] and "answers" not in plain.records()[0]
    assert evaluate(lm, cases, free=True, tokens=1).records() == rows, "the micro-batch changes an answer"


# In the prompt


def cases():
    probes = (Probe("efficacy", "The capital of France is", "Rome"), Probe("portability", "It lies in", "Italy"))
    more = (EditRequest("{} lies in", "Rome", "Gaul", "a/1"),)
    return [
        EditCase(EditRequest("The capital of {} is", "France", "Rome", "a"), probes, more),
        EditCase(EditRequest("Who wrote {}?", "Ulysses", "Bo.", "b"), (Probe("paraphrase", "Ulysses is by", "Bo."),)),
    ]


def test_the_facts_are_told_before_every_question_and_the_requests_stay():
    told = "The capital of France is Rome. Rome lies in Gaul. "
    one, other = in_prompt(cases())
    assert [p.prompt for p in one.probes] == [f"{told}The capital of France is", f"{told}It lies in"]
    assert other.probes[0].prompt == "Who wrote Ulysses? Bo. Ulysses is by"
    assert [c.requests for c in (one, other)] == [c.requests for c in cases()]
    one, other = in_prompt(cases(), beside=1)
    assert one.probes[1].prompt == f"Who wrote Ulysses? Bo. {told}It lies in"
    assert other.probes[0].prompt == f"{told}Who wrote Ulysses? Bo. Ulysses is by"
    for beside in (-1, 2):
        with pytest.raises(ParameterError, match=f"{beside} facts beside .* at most 1"):
            in_prompt(cases(), beside)


def test_the_fact_stands_within_a_chats_turn(monkeypatch):
    lm = random_model("gpt2")
    monkeypatch.setattr(lm.tokenizer, "chat_template", (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ), raising=False)  # fmt: skip
    one, _ = in_prompt(chat(lm, cases()))
    assert one.probes[1].prompt == "<user>The capital of France is Rome. Rome lies in Gaul. It lies in</s><assistant>"
    assert one.more[0].frame == one.request.frame == "<user>{}</s><assistant>"
