"""Key statistics: streamed as a plain loop would, cached by content, refused when damaged or of another model."""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from models import random_model
from same import contents

import metake.algebra.update
from metake import KeyStatistics, ParameterError, StatisticsError, statistics
from metake.editing.statistics import ENOUGH, Statistics, documents
from metake.language.tokens import encode
from metake.scoring.tasks import TASKS, lessons

LINES = [
    f"On day {i} the capital of country {i * 7 % 60} was moved to Rome, Berlin or Madrid, {'and then ' * (i % 5)}back."
    for i in range(12)
]


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return str(path)


def same(a: Statistics, b: Statistics) -> bool:
    return (
        a.digest == b.digest
        and a.keys() == b.keys()
        and all(a[i].count == b[i].count and torch.equal(a[i].moment, b[i].moment) for i in a)
    )


def test_streaming_with_padding_equals_a_plain_loop(lm, text):
    found = statistics(lm, text, layers=[2, 0], cache=False)
    terms = {0: [], 2: []}
    for i in terms:
        lm.write(i).register_forward_hook(lambda _, args, __, i=i: terms[i].append(args[0][0].T @ args[0][0]))
    rows = [encode(lm.tokenizer, line)[:128] for line in LINES]
    for row in rows:
        lm.model(torch.tensor([row]))
    assert list(found) == [0, 2] and found.source["tokens"] == sum(map(len, rows)) == found[0].count == found[2].count
    assert lm.name != "random-llama" or all(row[0] == lm.tokenizer.bos_token_id for row in rows), (
        "special tokens included"
    )
    for i, given in terms.items():
        lost = 1e-5 if lm.name == "random-gptj" else 1e-10  # its attention is computed in 32 bits
        torch.testing.assert_close(found[i].moment, sum(given), rtol=lost, atol=lost)


def test_all_layers_take_one_pass_that_stops_at_the_last(text):
    lm, calls = random_model("gpt2"), []
    for i, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    statistics(lm, text, layers=[0, 1, 2], cache=False)
    batches = calls.count(0)
    assert batches < len(LINES) and (calls.count(1), calls.count(2), calls.count(3)) == (batches, 0, 0)


def test_tokens_context_and_seed_choose_the_text(text):
    lm = random_model("llama")
    few, cut = statistics(lm, text, [1], tokens=200, cache=False), statistics(lm, text, [1], context=9, cache=False)
    assert few[1].count == 200 and cut[1].count == 9 * len(LINES)
    assert same(few, statistics(lm, text, [1, 1], tokens=200, cache=False))
    assert not torch.equal(few[1].moment, statistics(lm, text, [1], tokens=200, seed=2, cache=False)[1].moment)


# Cache


def test_a_second_call_does_no_forward(text, empty_cache, monkeypatch):
    lm = random_model("gpt2")
    first = statistics(lm, text, [1, 2])
    assert [f.split("/")[0] for f in contents(empty_cache)] == ["statistics"] * 2
    monkeypatch.setattr(lm, "read", None)
    assert same(statistics(lm, text, (2, 1)), first)
    with pytest.raises(TypeError):
        statistics(lm, text, [1, 2], cache=False)


def test_whatever_the_statistics_depend_on_is_in_the_digest(text, tmp_path):
    lm = random_model("gpt2")
    digests = {"as is": statistics(lm, text, [1], cache=False).digest}
    digests["layers"] = statistics(lm, text, [0, 1], cache=False).digest
    digests["tokens"] = statistics(lm, text, [1], tokens=300, cache=False).digest
    digests["context"] = statistics(lm, text, [1], context=30, cache=False).digest
    digests["seed"] = statistics(lm, text, [1], tokens=300, seed=2, cache=False).digest
    digests["model"] = statistics(random_model("gpt2", seed=1), text, [1], cache=False).digest
    digests["dtype"] = statistics(random_model("gpt2", torch.float32), text, [1], cache=False).digest
    digests["BOS"] = statistics(random_model("gpt2", bos=True), text, [1], cache=False).digest
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*LINES[:-1], LINES[-1].replace("Rome", "Bern")]), encoding="utf-8")
    digests["text"] = statistics(lm, str(other), [1], cache=False).digest
    for name in ("wpe.weight", "wte.weight", "h.1.mlp.c_fc.bias", "h.0.attn.c_attn.weight"):
        changed = random_model("gpt2")
        changed.model.transformer.state_dict()[name][-1] += 1
        digests[name] = statistics(changed, text, [1], cache=False).digest
    changed = random_model("gpt2")
    changed.model.config.layer_norm_epsilon = 1e-3
    digests["configuration"] = statistics(changed, text, [1], cache=False).digest
    assert len(set(digests.values())) == len(digests), digests
    changed = random_model("gpt2")
    changed.weight(changed.write_path(2)).add_(1)
    changed.model.config._name_or_path = "elsewhere"
    assert statistics(changed, text, [1], cache=False).digest == digests["as is"], (
        "later blocks and the folder's name play no part"
    )


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[-100:]
    elif how == "empty":
        data.clear()
    elif how == "a flipped byte":
        data[-1000] ^= 1
    elif how == "another count":
        at = data.index(b'\\"1\\": ') + 7
        data[at] = ord("9") if data[at] != ord("9") else ord("8")
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "a flipped byte", "another count", "other model"])
def test_a_damaged_cache_is_refused_and_computed_again(text, empty_cache, caplog, how):
    lm = random_model("llama")
    first = statistics(lm, text, [1])
    path = empty_cache / "statistics" / f"{first.digest}.safetensors"
    whole = path.read_bytes()
    if how == "other model":
        other = statistics(random_model("llama", seed=1), text, [1])
        (empty_cache / "statistics" / f"{other.digest}.safetensors").replace(path)
        assert same(Statistics.load(path), other), "it is a good file: only its digest tells"
    else:
        damage(path, how)
        assert path.read_bytes() != whole
        with pytest.raises(StatisticsError, match="damaged.*compute them again"):
            Statistics.load(path)
    with pytest.raises(StatisticsError, match="another model or text" if how == "other model" else "damaged"):
        Statistics.load(path, first.digest)
    with caplog.at_level(logging.WARNING, "metake"):
        assert same(statistics(lm, text, [1]), first)
    assert path.name in caplog.text
    assert same(Statistics.load(path, first.digest), first) and [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    path = tmp_path / "s.safetensors"
    one = KeyStatistics.empty(2)
    one.update(torch.randn(9, 2))
    Statistics({3: one}, "digest", {"text": "embedded"}).save(path)
    whole, unnoticed = path.read_bytes(), []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            Statistics.load(path)
            unnoticed.append(at)
        except StatisticsError:
            pass
    assert not unnoticed


def test_other_files_are_no_statistics(tmp_path):
    (tmp_path / "text").write_text("no statistics")
    metake.support.storage.save_tensors({"a": torch.ones(1)}, tmp_path / "tensors")
    for name in ("missing", "text", "tensors", "."):
        with pytest.raises(StatisticsError, match="holds no key statistics"):
            Statistics.load(tmp_path / name)


def test_saved_and_loaded_they_are_equal(text, tmp_path):
    found = statistics(random_model("qwen3"), text, [1, 2], cache=False)
    found.save(tmp_path / "deep" / "s")
    again = Statistics.load(tmp_path / "deep" / "s", found.digest)
    assert same(found, again) and again.source == found.source == {
        "text": "text.txt", "tokens": found[1].count, "model": "random-qwen3"
    }
    threshold = found[1].spectrum[20].item() * (1 + 1e-9)
    assert again.null_ranks(threshold) == found.null_ranks(threshold) and again.null_ranks(threshold)[1] == 21
    again[1].update(torch.ones(1, 48))
    assert again[1].spectrum[-1] != found[1].spectrum[-1], "the loaded spectrum follows later keys"


# Text


def test_a_text_file_has_one_document_a_line(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" = Title = \n\n Valkyria Chronicles ( 3 ) , <unk> outside Japan , is a game 's 1 @,@ 000 "
        "@-@ page sequel ; it cost $ 5 @.@ 5 . \nToo short.\n"
                    + "An ordinary line (with brackets), a colon: and 5.5 %; it isn't changed.\n",
                    encoding="utf-8")  # fmt: skip
    assert documents(str(path)) == [
        "Valkyria Chronicles (3), outside Japan, is a game's 1,000-page sequel; it cost $ 5.5.",
        "An ordinary line (with brackets), a colon: and 5.5%; it isn't changed.",
    ]


def test_the_embedded_text_is_the_default():
    assert documents() == documents("embedded") and len(documents()) > 1000


def test_the_tasks_texts_are_added_by_name():
    taught = documents("embedded+tasks")[len(documents()) :]
    assert documents("embedded+tasks")[: len(documents())] == documents()
    for name, pairs in lessons().items():
        own = [prompt + answer for prompt, answer in pairs if prompt + answer in taught]
        assert len(pairs) / 4 < len(own) < len(pairs) / 2 and {text.split()[-1] for text in own} == set(
            TASKS[name].classes
        ), "of every task, with every answer"


@pytest.mark.parametrize(("name", "content", "said"), [
    ("missing.txt", None, "neither 'embedded' or 'embedded.tasks', nor 'hub:owner/name.*, nor a file"),
    ("short.txt", b"only\nshort\nlines", "no line of 40 or more characters"),
    ("latin.txt", "São Paulo".encode("latin-1") * 9, "is not UTF-8"),
])  # fmt: skip
def test_a_text_that_cannot_be_used_is_refused(tmp_path, empty_cache, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=said) as caught:
        statistics(random_model("llama"), str(tmp_path / name), [1])
    assert name in str(caught.value) and not empty_cache.exists()


@pytest.mark.parametrize("changes", [{"tokens": 47}, {"tokens": 0}, {"context": 3}])
def test_too_little_text_is_refused(text, empty_cache, changes):
    with pytest.raises(
        StatisticsError, match=r"\d+ tokens of text cannot span 48 key dimensions; give a text of at least 48"
    ):
        statistics(random_model("llama"), text, [1], **changes)
    assert not empty_cache.exists()
    assert statistics(random_model("llama"), text, [1], tokens=48, cache=False)[1].count == 48


def test_no_layers_have_no_statistics_and_no_text_is_read(monkeypatch):
    """Of a method that needs none."""
    monkeypatch.setattr("metake.editing.statistics.documents", lambda *_: pytest.fail("the text was read"))
    assert statistics(random_model("llama"), "embedded", []) == {}


def test_a_model_without_a_recipe_must_name_its_layers(text):
    with pytest.raises(ParameterError, match="unknown model of a recipe 'random-llama'"):
        statistics(random_model("llama"), text)


def test_hub_text_needs_the_package_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ParameterError, match="text from the hub needs the package 'datasets': pip install datasets"):
        documents("hub:owner/name")


def test_hub_text_is_streamed(monkeypatch):
    calls = []

    def load_dataset(*given, **options):
        calls.append((given, options))
        return iter([{"text": line} for line in LINES])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert documents("hub:owner/name:20220301.en") == LINES == documents("hub:owner/name")
    assert calls == [(("owner/name", c), {"split": "train", "streaming": True}) for c in ("20220301.en", None)]


def test_of_a_text_of_ones_own_fifty_tokens_for_each_dimension_are_read_unless_others_are_asked_for(tmp_path):
    lm = random_model("gpt2")
    width = lm.shape(lm.write_path(0))[1]
    long = tmp_path / "long.txt"
    long.write_text("\n".join(f"{line} Once {i} more." for i in range(400) for line in LINES), encoding="utf-8")
    usual, whole = statistics(lm, str(long), [0]), statistics(lm, str(long), [0], tokens=math.inf)
    assert usual[0].count == ENOUGH * width == 50 * width < whole[0].count
    assert same(usual, statistics(lm, str(long), [0], tokens=50 * width)) and usual.digest != whole.digest
    assert same(whole, statistics(lm, str(long), [0], tokens=10**9)) is False  # another number, the same content
    assert torch.equal(whole[0].moment, statistics(lm, str(long), [0], tokens=10**9)[0].moment)
    texts = sum(len(encode(lm.tokenizer, text)[:128]) for text in documents("embedded"))
    assert statistics(lm, layers=[0])[0].count == texts, "the embedded text is read whole"
