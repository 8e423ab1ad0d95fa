"""Sampling is a function of seed, prompt and position, whatever runs beside it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models import CONFIGS, random_model
from reference import double_inside  # noqa: F401 (a fixture)

from metake.language import generation
from metake.language.generation import CONTEXT_WORDS, ContextRule, context_templates, sample
from metake.language.model import LanguageModel

pytestmark = pytest.mark.usefixtures("double_inside")
PROMPTS = ("The", "Therefore", "The capital of France is", "I", "Rome, Berlin", "You", "The Boeing 747 flies")


@cache
def small(kind: str) -> LanguageModel:
    return random_model(kind, spread=0.3)


@torch.no_grad()
def literal(lm: LanguageModel, prompt: str, length: int, top_k: int, seed: int, stream: str | None = None) -> list[int]:
    """One sequence, one full forward a token: the k largest probabilities, renormalized,
    one inverted uniform number.
    """
    ids = lm.tokenizer(prompt)["input_ids"]
    draws = generation._uniforms(seed, prompt if stream is None else stream, length)
    while len(ids) < length:
        probabilities = torch.softmax(lm.model(torch.tensor([ids])).logits[0, -1], -1)
        best = sorted(enumerate(probabilities.tolist()), key=lambda pair: -pair[1])[:top_k]
        threshold = draws[len(ids)] * sum(p for _, p in best)
        for token, p in best:
            threshold -= p
            if threshold <= 0:
                break
        ids.append(token)
    return ids


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_and_batched_sampling_is_literal_sampling(kind: str):
    lm = small(kind)
    found = sample(lm, PROMPTS, 9, seed=3)
    assert found == [lm.tokenizer.decode(literal(lm, p, 9, 5, 3), skip_special_tokens=True) for p in PROMPTS]
    assert all(text.startswith(p) and text != p for text, p in zip(found, PROMPTS, strict=True))


def test_batches_and_order_do_not_matter():
    lm = small("llama")
    whole = sample(lm, PROMPTS, 12)
    assert whole == sample(lm, PROMPTS, 12, rows=1) == sample(lm, PROMPTS, 12, rows=2)
    assert whole[::-1] == sample(lm, PROMPTS[::-1], 12)
    assert whole == [sample(lm, [p], 12)[0] for p in PROMPTS]


def test_the_seed_decides_and_the_global_generator_plays_no_part():
    lm = small("gpt2")
    torch.manual_seed(1)
    first, state = sample(lm, PROMPTS, 12, seed=7), torch.get_rng_state()
    torch.manual_seed(2)
    assert first == sample(lm, PROMPTS, 12, seed=7)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    others = [sample(lm, PROMPTS, 12, seed=s) for s in range(5)]
    assert all(len({texts[i] for texts in others}) == 5 for i in range(len(PROMPTS)))


def test_equal_prompts_share_a_stream_unless_named_apart():
    lm = small("gpt2")
    one, two = sample(lm, ["The", "The"], 12)
    assert one == two
    one, two = sample(lm, ["The", "The"], 12, streams=["a", "b"])
    assert one != two and [one] == sample(lm, ["The"], 12, streams=["a"])


def test_a_longer_text_begins_with_the_shorter_one():
    lm = small("phi")
    for short, long in zip(sample(lm, PROMPTS, 8), sample(lm, PROMPTS, 14), strict=True):
        assert long.startswith(short) and len(long) > len(short)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_length_counts_all_tokens_prompt_and_bos_included(kind: str):
    lm = small(kind)
    ids = lm.tokenizer("The capital")["input_ids"]
    draws = [generation._uniforms(0, "x", 10)] * 2
    for length in (len(ids), len(ids) + 1, 10):
        assert generation._continue(lm, [ids, ids], draws, length, 5).shape == (2, length)
    assert sample(lm, ["The capital"], len(ids)) == sample(lm, ["The capital"], 1) == ["The capital"]


def test_one_candidate_is_greedy_whatever_the_seed():
    lm = small("gpt2")
    greedy = sample(lm, PROMPTS, 10, top_k=1, seed=1)
    assert greedy == sample(lm, PROMPTS, 10, top_k=1, seed=2) != sample(lm, PROMPTS, 10, top_k=2, seed=1)


def test_tokens_are_drawn_with_their_renormalized_probabilities():
    lm, count = small("gpt2"), 4000
    ids = lm.tokenizer("The")["input_ids"]
    with torch.no_grad():
        best = torch.softmax(lm.model(torch.tensor([ids])).logits[0, -1], -1).topk(5)
    drawn = generation._continue(lm, [ids] * count, [generation._uniforms(0, str(i), 2) for i in range(count)], 2, 5)[
        :, 1
    ]
    share = (drawn[:, None] == best.indices).double().mean(0)
    expected = best.values / best.values.sum()
    assert share.sum() == 1
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_context_templates():
    lm = small("gpt2")
    found = context_templates(lm)
    assert found == context_templates(lm) and len(found) == 6 and found[0] == "{}"
    assert found[1:] == tuple(text + ". {}" for text in sample(lm, CONTEXT_WORDS, 10))
    assert not set(found[1:]) & set(context_templates(lm, seed=1)[1:])
    assert all(
        len(short) < len(long)
        for short, long in zip(context_templates(lm, ContextRule((5,)))[1:], found[1:], strict=True)
    )


def test_braces_in_sampled_texts_become_spaces():
    """A model whose head wants nothing but braces."""
    lm = random_model("phi")
    for brace in "{}":
        lm.model.lm_head.bias.data[lm.tokenizer.convert_tokens_to_ids(brace)] = 1e3
    assert set(
        "".join(t.removeprefix(w) for t, w in zip(sample(lm, CONTEXT_WORDS, 10), CONTEXT_WORDS, strict=True))
    ) == set("{}")
    found = context_templates(lm)
    assert [t.removeprefix(w).strip() for t, w in zip(found[1:], CONTEXT_WORDS, strict=True)] == [". {}"] * 5
    assert all(t.count("{") == t.count("}") == 1 and t.format("x").endswith(". x") for t in found[1:])
