"""Where subjects end and targets are read, by decoding back, on small and on real tokenizers."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SENTENCES, random_model, small_tokenizer
from real_tokenizers import tokenizer as real
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from metake import EditRequest, RequestError
from metake.editing.objective import Bucket
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import (
    Rows,
    buckets,
    continuation,
    continued,
    encode,
    in_context,
    locality_rows,
    locate,
    pad,
    rewriting_rows,
    shared_beginnings,
)

CONTEXTS = ("{}", "The weather was fine. {}", "Therefore, 3 of them. {}")
SUBJECTS = [
    "France", "Danielle Darrieux", "Beyoncé", "Côte d'Ivoire", "Boeing 747", "747", "Jean-Paul Sartre",
    "São Tomé e Príncipe", "北京", "U.S. Steel", "co-op 2-b"
]
TEMPLATES = [
    "The mother tongue of {} is", "{} was born in", "I think that you are there because of {}",
    "In 1999, “{}” (the first)", "{}", "No:{}, yes"
]
TARGETS = ["Rome", "  New York\n", "1984", "São Paulo", "U.S.", "北京", "-5 °C", "d'Ivoire"]


def word_marker() -> PreTrainedTokenizerFast:
    """As of LLaMA-2 and Mistral: no space in the text, a mark before every word, the first included, and a BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    characters = sorted(
        {c for text in (*SENTENCES, *SUBJECTS, *TEMPLATES, *TARGETS, *CONTEXTS) for c in text.replace(" ", "")}
    )
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<unk>", "<s>"], initial_alphabet=characters)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


SMALL = {"small": small_tokenizer, "small-bos": lambda: small_tokenizer(True), "marker-bos": word_marker}
REAL = [pytest.param(name, marks=pytest.mark.real_model) for name in ("gpt2", "llama3", "smollm2")]


@pytest.fixture(params=[*SMALL, *REAL])
def tok(request):
    return SMALL[request.param]() if request.param in SMALL else real(request.param)


def text_of(tok, ids) -> str:
    return tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def starts_with_bos(tok) -> bool:
    return encode(tok, "x")[0] == tok.bos_token_id


def test_the_fixture_has_both_kinds():
    assert [starts_with_bos(make()) for make in SMALL.values()] == [False, True, True]


@pytest.mark.real_model
def test_the_real_tokenizers_differ_in_what_matters():
    assert [starts_with_bos(real(name)) for name in ("gpt2", "llama3", "smollm2")] == [False, True, False]
    assert [len(continuation(real(name), "1984")) for name in ("gpt2", "llama3", "smollm2")] == [1, 3, 5], (
        "one token; a blank and three digits a token; digits apart"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_lookup_is_the_subjects_last_token(tok, template):
    for subject in SUBJECTS:
        ids, lookup = locate(tok, template, subject)
        assert ids == tuple(tok(template.format(subject))["input_ids"])
        assert text_of(tok, ids) == template.format(subject)
        upto = template.partition("{}")[0] + subject
        assert text_of(tok, ids[: lookup + 1]) == upto
        before = text_of(tok, ids[:lookup])
        assert before != upto and (upto.startswith(before) or "\N{REPLACEMENT CHARACTER}" in before), (
            "no later than the last token"
        )
        assert lookup == len(tok(upto, add_special_tokens=False)["input_ids"]) - 1 + starts_with_bos(tok), (
            "BOS is counted"
        )


@pytest.mark.parametrize(("name", "template", "subject", "token"), [
    ("small", "{}fore is a word", "There", "refo"),
    ("small-bos", "The {}é sings", "Beyonc", "cé"),
    *(pytest.param(name, template, subject, token, marks=pytest.mark.real_model) for name, template, subject, token in [
        ("gpt2", "The {}ese language", "Japan", " Japanese"),
        ("gpt2", "He is {}ing home", "walk", " walking"),
        ("gpt2", "A Boeing {}7 flies", "74", " 747"),
        ("gpt2", "a {}ish word", "Engl", " English"),
        ("gpt2", "{}é sings", "Beyonc", "cé"),
        ("gpt2", "{}, a band", "R.E.M.", ".,"),
        ("llama3", "In {}land, the", "Green", " Greenland"),
        ("llama3", "A Boeing {}7 flies", "74", "747"),
        ("llama3", "{}é sings", "Beyonc", "oncé"),
        ("smollm2", "The {}s of Rome", "king", " kings"),
    ]),
])  # fmt: skip
def test_a_subject_that_ends_inside_a_token_is_refused(name, template, subject, token):
    tok = SMALL[name]() if name in SMALL else real(name)
    with pytest.raises(RequestError) as caught:
        locate(tok, template, subject)
    assert f"{subject!r} in {template!r} ends inside the token {token!r}" in str(caught.value) and "put a space" in str(
        caught.value
    )
    for rows in (Rows.of, rewriting_rows):
        with pytest.raises(RequestError, match="ends inside the token"):
            rows(
                tok, [EditRequest("{} is", "Rome", "x", "fine"), EditRequest(template, subject, "x", "torn")], CONTEXTS
            )


@pytest.mark.real_model
def test_digits_are_torn_only_where_a_token_joins_them():
    ids, lookup = locate(real("smollm2"), "A Boeing {}7 flies", "74")
    assert text_of(real("smollm2"), ids[: lookup + 1]) == "A Boeing 74"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    prefix=st.text("aeioThnIr ,.7é", max_size=8), subject=st.text("aeioThnr 7é'", min_size=1, max_size=8),
    suffix=st.text("aeiosThnr ,.7é", max_size=8), bos=st.booleans()
)
def test_a_located_subject_decodes_back_whatever_surrounds_it(prefix, subject, suffix, bos):
    tok = small_tokenizer(bos)
    try:
        ids, lookup = locate(tok, prefix + "{}" + suffix, subject)
    except RequestError:
        joined = tok(prefix + subject + suffix, return_offsets_mapping=True)["offset_mapping"]
        assert any(start < len(prefix + subject) < end for start, end in joined), (
            "refused only if a token reaches over the end"
        )
    else:
        assert text_of(tok, ids[: lookup + 1]) == prefix + subject


@pytest.mark.parametrize("template", ["no place", "{} and {}"])
def test_a_template_without_one_place_is_refused(template):
    with pytest.raises(RequestError, match="exactly one '{}'"):
        locate(small_tokenizer(), template, "Rome")


def test_a_target_continues_after_exactly_one_space_and_no_bos(tok):
    for target in TARGETS:
        ids = continuation(tok, target)
        assert text_of(tok, encode(tok, "The city of") + ids) == f"The city of {target.strip()}"
        assert not set(ids) & set(tok.all_special_ids)
        assert ids == continuation(tok, f" {target} "), "surrounding space plays no part"
    for blank in ("", " \n"):
        with pytest.raises(RequestError, match="target is empty"):
            continuation(tok, blank)


REQUESTS = [
    EditRequest(t, s, o, str(i)) for i, (t, s, o) in enumerate(zip(TEMPLATES, SUBJECTS[1:], TARGETS, strict=False))
]


def test_prompts_end_with_the_subject(tok):
    rows = Rows.of(tok, REQUESTS, CONTEXTS).prompts()
    assert len(rows) == len(REQUESTS) * len(CONTEXTS)
    for ids, (request, context) in zip(rows, ((r, c) for r in REQUESTS for c in CONTEXTS), strict=True):
        assert text_of(tok, ids) == context.format(request.prompt).partition("{}")[0] + request.subject


def test_a_batch_is_the_rows_of_its_requests(tok):
    """The plain rows are those of the plain prompt alone; some of its requests are a batch of their own."""
    batch = Rows.of(tok, REQUESTS, CONTEXTS)
    assert Rows.of(tok, batch, ("{}",)) is batch and len(batch) == len(REQUESTS)
    assert batch.rewriting() == rewriting_rows(tok, REQUESTS, CONTEXTS)
    assert batch.rewriting(plain=True) == rewriting_rows(tok, REQUESTS, CONTEXTS[:1])
    for some in ([2], [3, 0], [], range(len(REQUESTS))):
        assert batch.pick(some) == Rows.of(tok, [REQUESTS[i] for i in some], CONTEXTS)
    empty = Rows.of(tok, [], CONTEXTS)
    assert not len(empty) and not empty.prompts() and not empty.rewriting() and not empty.locality()


def test_a_batch_asks_for_each_text_once(tok):
    asked = []

    def count(text, **options):
        asked.append((text, *options.items()))
        return tok(text, **options)

    shared = [EditRequest(t, s, "Rome", f"{t}{s}") for t in TEMPLATES[:3] for s in SUBJECTS[1:4]]
    rows = Rows.of(count, shared, CONTEXTS)
    assert len(asked) == len(set(asked)) < 2 * len(shared) * (len(CONTEXTS) + 1)
    assert rows.rewriting() == rewriting_rows(tok, shared, CONTEXTS)


def test_labels_are_read_where_the_model_predicts_them(tok):
    rows = rewriting_rows(tok, REQUESTS, CONTEXTS)
    weights = [0.0] * len(REQUESTS)
    for row, (i, request, context) in zip(
        rows, ((i, r, c) for i, r in enumerate(REQUESTS) for c in CONTEXTS), strict=True
    ):
        prompt = in_context(context, request.prompt)
        whole = (*row.ids, row.labels[-1])
        assert row.request == i and text_of(tok, whole) == f"{prompt.format(request.subject)} {request.target}"
        assert [whole[p + 1] for p in row.read] == list(row.labels)
        assert text_of(tok, whole[: row.read[0] + 1]) == prompt.format(request.subject), (
            "the first label follows the prompt"
        )
        assert text_of(tok, whole[: row.lookup + 1]) == prompt.partition("{}")[0] + request.subject
        weights[i] += row.weight * len(row.read)
    assert weights == pytest.approx([1.0] * len(REQUESTS))


@pytest.mark.parametrize("position", ["subject", "final"])
def test_locality_rows_watch_the_subject_or_the_end(tok, position):
    batch = Rows.of(tok, REQUESTS, CONTEXTS)
    assert batch.locality("final") == locality_rows(tok, REQUESTS)
    for i, (row, request) in enumerate(zip(batch.locality(position), REQUESTS, strict=True)):
        assert (row.request, row.labels, row.weight) == (i, (), 1.0)
        assert text_of(tok, row.ids[: row.lookup + 1]) == request.subject
        assert (
            text_of(tok, row.ids[: row.read[0] + 1])
            == text_of(tok, row.ids)
            == (request.subject if position == "subject" else f"{request.subject} is a")
        )
        assert len(row.read) == 1


@pytest.mark.parametrize("cut", [False, True], ids=["whole rows", "after a beginning"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_at_the_labels_is_the_models_own(kind, cut):
    lm = random_model(kind)
    rows = rewriting_rows(lm.tokenizer, REQUESTS, CONTEXTS)
    expected = torch.zeros(len(REQUESTS), dtype=lm.dtype)
    for row in rows:
        whole = torch.tensor([[*row.ids, row.labels[-1]]])
        labels = torch.full_like(whole, -100)
        labels[0, -len(row.labels) :] = whole[0, -len(row.labels) :]
        expected[row.request] += lm.model(whole, labels=labels).loss / len(CONTEXTS)
    cuts = [row.lookup if cut else 0 for row in rows]
    bucket, run = Bucket(rows, cuts, lm.device), Prefixed(lm, [row.ids for row in rows], cuts)
    found, drift = bucket.losses(run.logits(-1, Split(None, None), bucket.places), len(REQUESTS))
    torch.testing.assert_close(found, expected)
    assert not drift.any()


# Rectangles

rows_of_tokens = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(rows_of_tokens, st.randoms(use_true_random=False), st.booleans())
def test_padding_keeps_every_row_and_counts_its_own_tokens(rows, random, continues):
    past = [random.randrange(9) if continues else 0 for _ in rows]
    batch = continued(rows, past, "cpu") if continues else pad(rows, "cpu")
    width, before = batch.ids.shape[1], max(past)
    assert batch.mask.bool()[:, -1].any() and batch.mask.bool()[:, 0].any(), "no column is all padding"
    for i, (row, past_of_row) in enumerate(zip(rows, past, strict=True)):
        assert batch.ids[i, : len(row)].tolist() == row
        assert batch.positions[i, : len(row)].tolist() == list(range(past_of_row, past_of_row + len(row)))
        assert batch.mask[i].tolist() == [0] * (before - past_of_row) + [1] * (past_of_row + len(row)) + [0] * (
            width - len(row)
        )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 2), max_size=7), max_size=12), st.data(), st.integers(1, 4), st.integers(0, 12))
def test_beginnings_are_cut_where_others_have_the_same_and_it_saves_enough(rows, data, least, start):
    limits = [data.draw(st.integers(0, len(row))) for row in rows]
    everywhere, cuts = shared_beginnings(rows, limits, 0, least), shared_beginnings(rows, limits, start, least)
    for i, (row, cut) in enumerate(zip(rows, everywhere, strict=True)):
        assert cut == 0 or least <= cut <= limits[i]
        users = [j for j in range(len(rows)) if rows[j][:cut] == row[:cut] and everywhere[j] == cut]
        assert cut == 0 or len(users) > 1, "a beginning that nobody shares"
        agreeing = [
            j
            for j in range(len(rows))
            if j != i and min(limits[i], limits[j]) >= least and rows[j][:least] == row[:least]
        ]
        assert bool(cut) == bool(agreeing), "a beginning that is shared is not run twice"
        assert cuts[i] == (cut if cut * (len(users) - 1) >= start else 0), (
            "but where another pass would cost more, it is"
        )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), max_size=25), st.integers(1, 120), st.booleans(),
    st.sampled_from([0, 3, 12])
)
def test_buckets_partition_the_rows_within_the_budget(sizes, budget, pairs, start):
    given_sizes = sizes if pairs else [a + b for a, b in sizes]
    groups = list(buckets(given_sizes, budget, start))

    def sizes_of(group):
        return [sizes[i] if pairs else (given_sizes[i],) for i in group]

    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        rows = [([0] * (a + b), b) for a, b in (sizes[i] for i in group)]
        padded = (
            continued([r[before:] for r, before in rows], [before for _, before in rows], "cpu").mask
            if pairs
            else pad([r for r, _ in rows], "cpu").ids
        )
        assert padded.numel() <= budget or len(group) == 1
    firsts = [[size[0] for size in sizes_of(group)] for group in groups]
    assert all(min(a) >= max(b) for a, b in pairwise(firsts)), "rows of similar size run together"
    for a, b in pairwise(groups):
        if sizes_of(a)[-1][0] == sizes_of(b)[0][0]:  # of one width: only the budget parts them
            widest = map(max, zip(*sizes_of([*a, b[0]]), strict=True))
            assert sum(widest) * (len(a) + 1) > budget, "no group closes early"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(0, 40))
def test_buckets_compute_as_little_as_any_partition_into_runs(sizes, start):
    order = sorted(sizes, reverse=True)

    def cost(groups):
        return sum(max(group) * len(group) + start for group in groups)

    runs = (
        pairwise([0, *inner, len(order)])
        for count in range(len(order))
        for inner in combinations(range(1, len(order)), count)
    )
    least = min(cost([order[a:b] for a, b in run]) for run in runs)
    assert cost([[sizes[i] for i in group] for group in buckets(sizes, 10_000, start)]) == least
