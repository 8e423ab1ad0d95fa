"""The metrics, against literal references: one prompt at a time, nothing batched, nothing shared."""

import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest
import reference
import torch
from models import random_model

import metake as mk
from metake.data.facts import facts_records, prose, reference_texts
from metake.data.files import counterfact_cases, zsre_cases
from metake.data.requests import EditCase, Probe
from metake.language.generation import _uniforms, sample
from metake.scoring import evaluation
from metake.scoring.evaluation import CaseScore, Evaluation, ProbeScore, Reading, evaluate, read, recall
from metake.scoring.text_metrics import consistency, fluency, ngram_entropy
from metake.support.errors import ParameterError, RequestError

KINDS = ("gpt2", "gpt_neox", "llama", "qwen3", "phi")
WORDS = [
    "Rome", "Berlin", "Madrid", "French", "English", "Paris of France", "Houston", "Danielle Darrieux", "a word",
    "Boeing 747", "Therefore"
]


def model(kind, seed=0):
    """A random model whose arg-max lies among the tokens of WORDS: some of its answers are right."""
    lm = random_model(kind, seed=seed)
    head = lm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    used = {t for word in WORDS for t in lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]}
    unused = [t for t in range(head.weight.shape[0]) if t not in used]
    head.weight[unused] = 0
    if head.bias is not None:
        head.bias[:] = 0
    return lm


def counterfact_record(i):
    """Probe counts and target lengths differ from record to record."""
    new, true = WORDS[i % len(WORDS)], WORDS[(i + 3) % len(WORDS)]
    subject = ["France", "Danielle Darrieux", "the Boeing 747", "Côte d'Ivoire"][i % 4]
    return {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "I think that {} is the word of", "subject": subject, "target_new": {"str": new},
            "target_true": {"str": true}
        },
        "paraphrase_prompts": [f"{WORDS[k]} and Rome. {subject} is" for k in range(i % 3 + 1)],
        "neighborhood_prompts": [f"The capital of {WORDS[-k]} in" for k in range(1, 4 - i % 3)],
        "generation_prompts": [f"{subject} was", f"The mother tongue of {subject}", f"{subject}"],
        "reference": reference_texts()["Paris"],
    }


def zsre_record(i):
    subject = ["France", "Danielle Darrieux", "Boeing"][i % 3]
    return {
        "subject": subject, "src": f"What is the word that {subject} is?",
        "rephrase": f"Is {subject} the capital?" + " Therefore" * (i % 3),
        "answers": [WORDS[i % len(WORDS)]], "alt": "Paris", "loc": f"nq question: who is {WORDS[(i + 4) % len(WORDS)]}",
        "loc_ans": WORDS[(5 * i + 2) % len(WORDS)],
    }  # fmt: skip


COUNTERFACT = [counterfact_record(i) for i in range(11)]
ZSRE = [zsre_record(i) for i in range(11)]


# References: the records, not the library's probes, say what is asked


def nll(lm, prompt, suffix):
    """Mean negative log-probability of the suffix's tokens, and which of them are the arg-max,
    from one forward alone.
    """
    ids, start = lm.tokenizer(f"{prompt} {suffix}")["input_ids"], len(lm.tokenizer(prompt)["input_ids"])
    assert len(ids) > start
    log_p = torch.log_softmax(lm.model(torch.tensor([ids])).logits[0].double(), -1)
    losses = [-log_p[j - 1, ids[j]].item() for j in range(start, len(ids))]
    return sum(losses) / len(losses), tuple(log_p[j - 1].argmax().item() == ids[j] for j in range(start, len(ids)))


def literal_counterfact(lm, record):
    rewrite = record["requested_rewrite"]
    new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    prompts = {
        "efficacy": [rewrite["prompt"].replace("{}", rewrite["subject"])],
        "generalization": record["paraphrase_prompts"],
        "specificity": record["neighborhood_prompts"],
    }
    row = {}
    for name, texts in prompts.items():
        both = [(nll(lm, text, new), nll(lm, text, true)) for text in texts]
        if name == "specificity":
            row[name] = fmean(t < n for (n, _), (t, _) in both)
            row[f"{name}_accuracy"] = fmean(all(right) for _, (_, right) in both)
        else:
            row[name] = fmean(t > n for (n, _), (t, _) in both)
            row[f"{name}_accuracy"] = fmean(all(right) for (_, right), _ in both)
    return row


def next_token(lm, text):
    return lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]])).logits[0, -1].argmax().item()


def forced(lm, prompt, answer):
    """ZsRE as released: the prompt grows by the answer's tokens, every arg-max is run anew. (expected, found)
    per token.
    """
    tokens = lm.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    found = [next_token(lm, prompt + lm.tokenizer.decode(tokens[:j])) for j in range(len(tokens))]
    return [lm.tokenizer(lm.tokenizer.decode([t]), add_special_tokens=False)["input_ids"][0] for t in tokens], found


def literal_zsre(lm, record):
    answer = record["answers"][0]
    asked = {
        "efficacy": (record["src"], answer), "generalization": (record["rephrase"], answer),
        "specificity": (record["loc"] + "?", record["loc_ans"])
    }
    return {name: fmean(e == f for e, f in zip(*forced(lm, *pair), strict=True)) for name, pair in asked.items()}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_counterfact_equals_one_prompt_at_a_time(kind):
    lm = model(kind)
    expected = [literal_counterfact(lm, record) for record in COUNTERFACT]
    found = evaluate(lm, counterfact_cases(COUNTERFACT))
    assert found.records() == [{"id": str(i)} | row for i, row in enumerate(expected)]
    for name in expected[0]:
        assert found[name] == pytest.approx(100 * fmean(row[name] for row in expected), abs=1e-10)
    assert all(0 < found[name] < 100 for name in ("efficacy", "generalization", "specificity")), (
        "the reference decides nothing"
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_zsre_equals_growing_prefixes(kind):
    lm = model(kind)
    expected = [literal_zsre(lm, record) for record in ZSRE]
    found = evaluate(lm, zsre_cases(ZSRE))
    assert [{name: row[name] for name in expected[0]} for row in found.records()] == expected
    assert any(0 < row[name] < 1 for row in expected for name in row), (
        "no answer is right in part: tokens are not told apart"
    )
    for name in expected[0]:
        assert found[name] == pytest.approx(100 * fmean(row[name] for row in expected), abs=1e-10)
        whole = [row[name] == 1 for row in expected]
        assert found[f"{name}_accuracy"] == pytest.approx(100 * fmean(whole), abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cases", [counterfact_cases(COUNTERFACT), zsre_cases(ZSRE)], ids=["counterfact", "zsre"])
def test_evaluation_equals_the_released_padded_batch_of_a_case(kind, cases):
    """What the bench times as the literal evaluation."""
    lm = model(kind)
    for case, score in zip(cases, evaluate(lm, cases).cases, strict=True):
        for (means, correct), probe in zip(reference.evaluation(lm, case), score.probes, strict=True):
            assert tuple(correct) == probe.target.correct
            assert means == pytest.approx(
                [-r.log_p for r in (probe.target, probe.rival) if r] if means else [], abs=1e-10
            )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_readings_equal_single_forwards_whatever_the_batch(kind):
    lm = model(kind)
    pairs = [
        (p.prompt, text)
        for c in counterfact_cases(COUNTERFACT)
        for p in c.probes
        if p.kind != "generation"
        for text in (p.target, p.rival)
    ]
    assert len({len(lm.tokenizer(f" {t}", add_special_tokens=False)["input_ids"]) for _, t in pairs}) > 2
    whole = read(lm, pairs)
    assert any(any(r.correct) for r in whole)
    for (prompt, text), reading in zip(pairs, whole, strict=True):
        expected, correct = nll(lm, prompt, text)
        assert reading.log_p == pytest.approx(-expected, abs=1e-10)
        assert reading.correct == correct
    for tokens in (1, 60):
        for one, other in zip(whole, read(lm, pairs, tokens), strict=True):
            assert one.correct == other.correct and one.greedy == other.greedy
            assert one.log_p == pytest.approx(other.log_p, abs=1e-12)
    cases = counterfact_cases(COUNTERFACT)
    assert evaluate(lm, cases, tokens=1).records() == evaluate(lm, cases).records()


@torch.no_grad()
def test_case_is_scored_alike_alone_and_among_others():
    lm = model("llama")
    together = evaluate(lm, counterfact_cases(COUNTERFACT)).records()
    assert [evaluate(lm, [case]).records()[0] for case in counterfact_cases(COUNTERFACT)] == together


def one_token_words(lm, count=2):
    words = [
        w
        for w in ("Rome", "Paris", "French", "Berlin", "is", "of")
        if len(lm.tokenizer(f" {w}", add_special_tokens=False)["input_ids"]) == 1
    ]
    assert len(words) >= count
    return words[:count]


@torch.no_grad()
def test_tie_fails_in_both_directions():
    lm = random_model("llama")
    new, true = one_token_words(lm)
    ids = [lm.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in (new, true)]
    lm.model.lm_head.weight[ids] = 0  # both logits are exactly 0, wherever they are read
    record = counterfact_record(0) | {"neighborhood_prompts": ["The capital of Madrid is"]}
    record["requested_rewrite"] |= {"target_new": {"str": new}, "target_true": {"str": true}}
    cases = counterfact_cases([record])

    def scores():
        found = evaluate(lm, cases)
        return [found[name] for name in ("efficacy", "generalization", "specificity")]

    probe = evaluate(lm, cases).cases[0].probes[0]
    assert probe.target.log_p == probe.rival.log_p
    assert scores() == [0, 0, 0]
    bias = lm.model.lm_head.bias = torch.nn.Parameter(torch.zeros(384, dtype=lm.dtype), requires_grad=False)
    bias[ids[0]] = 1e-9
    assert scores() == [100, 100, 0]
    bias[ids[0]] = -1e-9
    assert scores() == [0, 0, 100]


@torch.no_grad()
def test_two_readings_of_specificity():
    """Against the ground truth and against the model's own answers before the edit: a case where they differ."""
    lm, cases = model("llama"), zsre_cases(ZSRE)
    asked = [(record["loc"] + "?", record["loc_ans"]) for record in ZSRE]
    then = [forced(lm, *pair) for pair in asked]
    before = evaluate(lm, cases)
    unchanged = evaluate(lm, cases, before=before)
    assert unchanged["specificity_pre_edit"] == 100 and 0 < unchanged["specificity"] < 100
    generator = torch.Generator().manual_seed(0)
    weight = lm.weight(lm.write_path(3))
    weight += 0.3 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
    now = [forced(lm, *pair) for pair in asked]
    found = evaluate(lm, cases, before=before)
    truth = fmean(fmean(e == f for e, f in zip(*pair, strict=True)) for pair in now)
    kept = fmean(
        fmean(a == b for a, b in zip(new, old, strict=True)) for (_, new), (_, old) in zip(now, then, strict=True)
    )
    assert found["specificity"] == pytest.approx(100 * truth, abs=1e-10)
    assert found["specificity_pre_edit"] == pytest.approx(100 * kept, abs=1e-10)
    assert 0 < kept < 1 and abs(truth - kept) > 0.05
    assert "specificity_pre_edit" not in before.metrics


def scored(kind, score, accuracy=0.0):
    return ProbeScore(kind, score, accuracy, Reading(-1.0, (False,), (0,)), None)


def test_metrics_are_percent_of_the_mean_over_cases_of_the_mean_over_probes():
    few = CaseScore("few", (scored("efficacy", 1.0, 1.0), scored("paraphrase", 1.0), scored("neighborhood", 0.5)))
    many = CaseScore(
        "many",
        (
            scored("efficacy", 0.0), *[scored("paraphrase", 0.0)] * 3, scored("neighborhood", 0.25),
            scored("neighborhood", 0.75)
        ),
    )
    none = CaseScore("none", (scored("efficacy", 0.5),))
    found = Evaluation((few, many, none))
    assert found.metrics == {
        "efficacy": 50.0, "efficacy_accuracy": pytest.approx(100 / 3), "generalization": 50.0,
        "generalization_accuracy": 0.0,
        "specificity": 50.0, "specificity_accuracy": 0.0,
    }  # fmt: skip
    assert found["generalization"] == 50, "25 if all probes were averaged, 33.3 if a case without paraphrases counted"
    assert "generalization" not in found.records()[2]


def test_metric_of_zero_cases_is_an_error():
    lm = model("gpt2")
    with pytest.raises(ParameterError, match="zero cases"):
        evaluate(lm, [])
    only = [
        EditCase(c.request, tuple(p for p in c.probes if p.kind == "efficacy"))
        for c in counterfact_cases(COUNTERFACT[:2])
    ]
    found = evaluate(lm, only, before=evaluate(lm, only))
    assert set(found.metrics) == {"efficacy", "efficacy_accuracy"}
    with pytest.raises(ParameterError, match="'specificity_pre_edit'.*Known: efficacy, efficacy_accuracy"):
        found["specificity_pre_edit"]
    with pytest.raises(ParameterError, match="paraphrase probes"):
        recall(lm, only)


def test_before_of_other_cases_is_refused():
    lm, cases = model("gpt2"), counterfact_cases(COUNTERFACT[:3])
    before = evaluate(lm, cases)
    same_ids = zsre_cases(ZSRE[:3])
    assert [c.request.id for c in same_ids] == [c.request.id for c in cases]
    for others in (cases[:2], cases[::-1], same_ids):
        with pytest.raises(ParameterError, match="other cases"):
            evaluate(lm, others, before=before)


def test_probe_without_a_single_token_is_refused():
    lm, case = random_model("gpt2"), counterfact_cases(COUNTERFACT[:1])[0]
    with pytest.raises(RequestError, match="no tokens"):
        evaluate(lm, [EditCase(case.request, (Probe("efficacy", "", "Rome", "Paris"),))])


@torch.no_grad()
def test_records_are_plain_json():
    lm = model("llama")
    found = evaluate(lm, counterfact_cases(COUNTERFACT[:3]), generate=True, length=20)
    rows = found.records()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert all(
        len(row["generations"]) == 3
        and {"efficacy", "generalization", "specificity", "fluency", "consistency"} <= set(row)
        for row in rows
    )
    assert "generations" not in evaluate(lm, counterfact_cases(COUNTERFACT[:1])).records()[0]


# Generated text


def test_fluency_of_known_texts():
    # The|cat|sat.|The|cat|ran|.  →  6 bigrams, one of them twice; 5 trigrams, all different
    h2 = -(2 / 6 * math.log2(2 / 6) + 4 * (1 / 6) * math.log2(1 / 6))
    assert ngram_entropy("The cat sat. The cat ran.") == pytest.approx(h2 / 3 + 2 / 3 * math.log2(5), abs=1e-12)
    # a b a b a b  →  ab 3, ba 2; aba 2, bab 2
    h2 = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert ngram_entropy("a b a b a b") == pytest.approx(h2 / 3 + 2 / 3, abs=1e-12)
    assert ngram_entropy("a a a a a a") == 0
    assert ngram_entropy("word") == ngram_entropy("") == 0
    assert fluency(["a b a b a b", "a a a a"]) == pytest.approx((h2 / 3 + 2 / 3) / 2, abs=1e-12)


def literal_consistency(texts, references):
    """TF-IDF written out: lower case, words of two letters or more, raw counts, smooth idf, cosine."""

    def words(text):
        return re.findall(r"\b\w\w+\b", text.lower())

    corpus = [set(words(text)) for text in (*reference_texts().values(), *prose())]
    frequency = Counter(word for text in corpus for word in text)
    weight = {word: math.log((1 + len(corpus)) / (1 + n)) + 1 for word, n in frequency.items()}

    def vector(pieces):
        return {w: n * weight[w] for w, n in Counter(words(" ".join(pieces))).items() if w in weight}

    one, other = vector(texts), vector(references)
    return sum(v * other.get(w, 0) for w, v in one.items()) / math.hypot(*one.values()) / math.hypot(*other.values())


def test_consistency_equals_tfidf_written_out():
    paris, rome = reference_texts()["Paris"], reference_texts()["Rome"]
    texts = [paris[: len(paris) // 2], "The river runs through a city where people speak; the city, the CITY!", "zzyzx"]
    expected = literal_consistency(texts, [rome])
    assert 0.05 < expected < 0.95 and consistency(texts, [rome]) == pytest.approx(expected, abs=1e-12)
    assert consistency([rome], [rome]) == pytest.approx(1, abs=1e-12)
    assert consistency([paris], [rome]) == pytest.approx(consistency([rome], [paris]), abs=1e-12)
    assert consistency([paris], [rome]) < 0.9
    assert consistency(["zzyzx"], [rome]) == 0
    assert consistency([rome], []) is None


@torch.no_grad()
def test_generation_metrics_are_made_of_the_generated_texts():
    lm = model("llama")
    found = evaluate(lm, counterfact_cases(COUNTERFACT[:2]), generate=True, length=40)
    for case, record in zip(found.cases, COUNTERFACT, strict=False):
        assert all(
            text.startswith(prompt[:4])
            for text, prompt in zip(case.generations, record["generation_prompts"], strict=True)
        )
        assert case.fluency == pytest.approx(fmean(map(ngram_entropy, case.generations)))
        assert case.consistency == pytest.approx(
            literal_consistency(case.generations, [record["reference"]]), abs=1e-12
        )
    assert found["fluency"] == pytest.approx(100 * fmean(c.fluency for c in found.cases))
    assert found["consistency"] == pytest.approx(100 * fmean(c.consistency for c in found.cases))
    unreferenced = [{k: v for k, v in record.items() if k != "reference"} for record in COUNTERFACT[:2]]
    plain = evaluate(lm, counterfact_cases(unreferenced), generate=True, length=40)
    assert plain["fluency"] == found["fluency"] and "consistency" not in plain.metrics


def literal_sample(lm, prompt, length, seed, stream, top_k=5):
    """Every token from a forward over the whole text so far: no cache, no batch."""
    ids, draws = list(lm.tokenizer(prompt)["input_ids"]), _uniforms(seed, stream, length)
    while len(ids) < length:
        p, token = torch.softmax(lm.model(torch.tensor([ids])).logits[0, -1].double(), -1).topk(top_k)
        bounds = np.cumsum((p / p.sum()).numpy())
        ids.append(token[min(int(np.searchsorted(bounds, draws[len(ids)])), top_k - 1)].item())
    return ids


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
@torch.no_grad()
def test_sampling_equals_a_literal_loop(kind):
    lm, prompts = random_model(kind), ["The", "Danielle Darrieux was", "I think that you", "Rome", "The"]
    streams = ["a", "b", "c", "d", "e"]
    texts = sample(lm, prompts, 16, seed=3, streams=streams)
    expected = [literal_sample(lm, p, 16, 3, s) for p, s in zip(prompts, streams, strict=True)]
    assert all(len(row) == 16 for row in expected) and len(set(map(tuple, expected))) == 5
    decoded = [
        unicodedata.normalize("NFKD", lm.tokenizer.decode(row, skip_special_tokens=True)).replace("\n\n", " ")
        for row in expected
    ]
    assert texts == decoded


@torch.no_grad()
def test_generation_depends_on_the_seed_and_on_nothing_else():
    lm, cases = random_model("gpt2"), counterfact_cases(COUNTERFACT[:4])

    def texts(chosen, **settings):
        return [row["generations"] for row in evaluate(lm, chosen, generate=True, length=24, **settings).records()]

    all_of_them = texts(cases)
    assert texts(cases) == all_of_them
    assert texts(cases[2:3]) == all_of_them[2:3] and texts(cases[::-1]) == all_of_them[::-1]
    assert texts(cases, seed=1) != all_of_them
    twice = counterfact_cases([COUNTERFACT[0] | {"generation_prompts": ["France was"] * 2}])
    assert len(set(texts(twice)[0])) == 2, "the same prompt again is a new draw"
    prompts = [p.prompt for c in cases for p in c.probes if p.kind == "generation"]
    assert sample(lm, prompts, 24, rows=1) == sample(lm, prompts, 24, rows=64)


@torch.no_grad()
def test_generations_are_handed_out_in_one_pass(monkeypatch):
    """Each case takes its own; looking through all of them once for every case is quadratic in their number."""
    passes = []

    class Texts(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    monkeypatch.setattr(evaluation, "sample", lambda lm, prompts, *_, **__: Texts(f"after {p}" for p in prompts))
    records = [COUNTERFACT[0], COUNTERFACT[1] | {"generation_prompts": []}, COUNTERFACT[2]]
    found = evaluation._generate(None, counterfact_cases(records), 20, 0)
    assert found == [tuple(f"after {p}" for p in record["generation_prompts"]) for record in records]
    assert len(passes) == 1


def test_generation_without_prompts_is_refused():
    lm = random_model("gpt2")
    with pytest.raises(ParameterError, match="no generation prompts"):
        evaluate(lm, zsre_cases(ZSRE[:2]), generate=True)
    mixed = counterfact_cases([COUNTERFACT[0], COUNTERFACT[1] | {"generation_prompts": []}])
    found = evaluate(lm, mixed, generate=True, length=20)
    assert found.cases[1].fluency is None and found["fluency"] == 100 * found.cases[0].fluency


@torch.no_grad()
def test_recall_is_what_greedy_decoding_gives():
    """On the embedded model, which knows the facts; with a wrong second word after half of the truths."""
    lm, cases = mk.load("tiny"), mk.facts(limit=8)
    for i, case in enumerate(cases):
        if i % 2:
            cases[i] = EditCase(
                case.request,
                tuple(replace(p, rival=f"{p.rival} Boeing" if p.kind == "efficacy" else p.rival) for p in case.probes),
            )

    def greedy(probe):
        text, length = probe.prompt, len(f"{probe.prompt} {probe.rival}")
        while len(text) < length:
            text += lm.tokenizer.decode([next_token(lm, text)])
        return text == f"{probe.prompt} {probe.rival}"

    expected = {
        name: fmean(greedy(p) for c in cases for p in c.probes if p.kind == kind)
        for name, kind in (("plain", "efficacy"), ("paraphrase", "paraphrase"))
    }
    assert expected["plain"] == 0.5 and expected["paraphrase"] > 0.8
    assert recall(lm, cases) == expected
    records = facts_records("zsre")[:4]
    assert recall(lm, zsre_cases(records, target="alt")) == {"plain": 1, "paraphrase": 1}
    assert recall(lm, zsre_cases(records))["plain"] == 0, "the counterfactual is not what it says"


@torch.no_grad()
def test_evaluation_leaves_the_model_as_it_was():
    lm, cases = random_model("gpt2"), counterfact_cases(COUNTERFACT[:2])
    ids = torch.tensor([[5, 6, 7]])
    before = lm.model(ids).logits
    evaluate(lm, cases, generate=True, length=16)
    assert torch.equal(lm.model(ids).logits, before) and before.shape[:2] == (1, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_evaluation_prints_one_line():
    found = mk.evaluate(random_model("gpt2"), counterfact_cases(COUNTERFACT[:2]))
    assert re.fullmatch(r"2 cases: efficacy \d+\.\d\d, .*specificity_accuracy \d+\.\d\d", str(found))
