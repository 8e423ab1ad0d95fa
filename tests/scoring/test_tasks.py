"""The six tasks of general ability: prompts, answers, scores, data; the small ones made from the embedded facts;
a model's answers.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from models import random_model
from safetensors.torch import load_file
from sklearn.metrics import f1_score, matthews_corrcoef

from metake.data import fact_tasks
from metake.data.facts import facts_records, rendered_sentences
from metake.experiments.studies.answers import answer
from metake.experiments.studies.harness import harness
from metake.experiments.studies.items import MEASURES, RESERVED, asked, measures, read_items
from metake.language.model import load
from metake.language.tokens import continuation, encode
from metake.scoring import tasks
from metake.scoring.evaluation import read
from metake.scoring.tasks import INVALID, TASKS, task
from metake.support.errors import ParameterError, RequestError

ITEMS = {
    "sst2": {"sentence": "a fine film . ", "label": 1},
    "mrpc": {"sentence1": "A.", "sentence2": "B.", "label": 0},
    "cola": {"sentence": "They sang.", "label": 1},
    "rte": {"sentence1": "A.", "sentence2": "B.", "label": 1},
    "nli": {"sentence1": "A.", "sentence2": "B.", "label": "entailment"},
    "mmlu": {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2},
}
PROMPTS = {
    "sst2": "Review :a fine film . \nSentiment :",
    "mrpc": "Are the sentences paraphrases of each other.\nSentence 1: A.\nSentence 2: B.\nAnswer:",
    "cola": "Is this sentence linguistically acceptable?\nSentence: They sang.\nAnswer: ",
    "rte": "A.\nquestion: B. True or False?\nanswer:",
    "nli": "A. entails the B. True or False? Answer:",
    "mmlu": "Question: Which?\n(A) w\n(B) x\n(C) y\n(D) z\nAnswer:",
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_harness_s_and_differ_in_one_blank(name):
    assert TASKS[name].prompt(ITEMS[name], "parity") == PROMPTS[name]
    assert TASKS[name].prompt(ITEMS[name]) == PROMPTS[name].rstrip(" ")
    with pytest.raises(ParameterError, match=f"an item of {TASKS[name].name} lacks"):
        TASKS[name].prompt({"idx": 1})


def test_only_rte_s_labels_are_inverted_in_parity():
    """GLUE's 0 is entailment; the harness takes the answer "True" for 1 all the same."""
    parity = {name: t.label(ITEMS[name], "parity") for name, t in TASKS.items()}
    assert parity == {"sst2": 1, "mrpc": 0, "cola": 1, "rte": 1, "nli": 1, "mmlu": 2}
    assert {name: t.label(ITEMS[name]) for name, t in TASKS.items()} == parity | {"rte": 0}
    assert TASKS["rte"].classes == ("False", "True") == TASKS["nli"].classes
    assert TASKS["sst2"].label({"label": "1"}) == 1 and TASKS["nli"].label({"label": "not_entailment"}) == 0


@pytest.mark.parametrize(
    "name, label", [("sst2", 2), ("sst2", None), ("sst2", True), ("mmlu", 4), ("nli", "neutral"), ("rte", -1)]
)
def test_a_label_that_is_none_is_refused(name, label):
    with pytest.raises(ParameterError, match=f"{TASKS[name].name} has the label"):
        TASKS[name].label({"label": label, "answer": label})


@pytest.mark.parametrize("name, written, parity, corrected", [
    ("sst2", " Positive.", 1, 1), ("sst2", " negative, not positive", 1, 0), ("sst2", " good", INVALID, INVALID),
    ("sst2", " a nonnegative", 0, INVALID),
    ("mrpc", " I do not know", 0, INVALID), ("mrpc", " No, yes", 1, 0), ("cola", "Yes", 1, 1),
    ("cola", " Answer: no", 0, 0),
    ("rte", " true or false", 0, 1), ("nli", " true or false", 1, 1), ("nli", " untrue", 1, INVALID),
    ("rte", "\nanswer: True", 1, 1),
    ("mmlu", " A\n", 0, 0), ("mmlu", " (B) x", INVALID, 1), ("mmlu", " a banana\nB", 0, 0),
    ("mmlu", " Ba\n", 0, INVALID), ("mmlu", " D", INVALID, 3), ("mmlu", "", INVALID, INVALID),
])  # fmt: skip
def test_how_an_answer_is_read(name, written, parity, corrected):
    prompt = PROMPTS[name]
    assert TASKS[name].read(prompt, written, "parity") == parity and TASKS[name].read(prompt, written) == corrected


def test_the_harness_reads_after_the_last_cue_of_the_whole_text():
    assert TASKS["nli"].read(PROMPTS["nli"], " False. C entails the D True or False? Answer: True", "parity") == 1
    assert TASKS["nli"].read(PROMPTS["nli"], " False. C entails the D True or False? Answer: True") == 0


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_are_scikit_learn_s(classes):
    generator = np.random.default_rng(classes)
    for low in (-1, 0):
        labels, predictions = generator.integers(0, classes, 60), generator.integers(low, classes, 60)
        found = measures(labels, predictions, classes)
        expected = {
            "accuracy": (labels == predictions).mean(), "F1": f1_score(labels, predictions, average="weighted"),
            "MCC": matthews_corrcoef(labels, predictions)
        }
        assert {k: v[0] for k, v in found.items()} == pytest.approx({k: 100 * v for k, v in expected.items()})
    for predictions in (np.zeros(60, int), np.full(60, INVALID), labels):
        assert measures(labels, predictions, classes)["MCC"][0] == pytest.approx(
            100 * matthews_corrcoef(labels, predictions)
        )


def test_measures_of_a_draw_are_those_of_the_repeated_items():
    labels, predictions, counts = (
        np.array([0, 1, 1, 0]), np.array([0, 1, -1, 1]), np.array([[1, 1, 1, 1], [2, 0, 1, 3]])
    )
    found = measures(labels, predictions, 2, counts)
    for i, count in enumerate(counts):
        again = measures(labels.repeat(count), predictions.repeat(count), 2)
        assert all(found[k][i] == pytest.approx(again[k][0]) for k in MEASURES)


def test_the_first_items_are_kept_for_examples():
    items = [{"sentence": f"{i} said Ada Lovelace" if i == 12 else f"{i}", "label": i % 2} for i in range(20)]
    assert [i["sentence"] for i in asked(items, TASKS["sst2"], 3)] == [
        "10", "11", "12 said Ada Lovelace"
    ] and RESERVED == 10
    assert [i["sentence"] for i in asked(items, TASKS["sst2"], 3, edited=["Ada", "Ada Lovelace"])] == ["10", "11", "13"]
    assert (
        len(asked(items, TASKS["sst2"], 3, edited=["Ad"])) == 3
        and asked(items, TASKS["sst2"], 3, "parity", ["Ada Lovelace"])[2] == items[12]
    )
    with pytest.raises(ParameterError, match="10 can be asked, of 20"):
        asked(items, TASKS["sst2"], 11)


def test_a_file_gives_its_items(tmp_path):
    items = [ITEMS["sst2"] | {"sentence": "one\u2028line"}, ITEMS["sst2"]]
    (tmp_path / "sst2.jsonl").write_text("\n".join(json.dumps(i, ensure_ascii=False) for i in items), "utf-8")
    assert read_items(tmp_path, "SST-2") == items


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_is_not_opened_and_can_be_converted(tmp_path, capfd):
    (tmp_path / "sst2.pkl").write_bytes(pickle.dumps([Harmful()]))
    with pytest.raises(ParameterError, match="can run what its author wants.*python -c '(.*)' < .*pkl > ") as told:
        read_items(tmp_path, "sst2")
    assert not capfd.readouterr().out
    (tmp_path / "sst2.pkl").write_bytes(pickle.dumps([ITEMS["sst2"]]))
    command = re.search("convert it: python (.*)", str(told.value))[1]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert read_items(tmp_path, "sst2") == [ITEMS["sst2"]]


@pytest.mark.parametrize("raw, said", [
    (b"", "holds no items"), (b"[]", "holds list, expected dict"), (b'{"sentence": "x"}', "has the label None"),
    (b"{", "is damaged"), (b"\xff", "is damaged"), (b'{"sentence": "x", "label": "\xc2\xb2"}', "is damaged"),
])  # fmt: skip
def test_a_file_that_is_none_is_refused(raw, said, tmp_path):
    (tmp_path / "sst2.jsonl").write_bytes(raw)
    with pytest.raises(ParameterError, match=said):
        read_items(tmp_path, "sst2")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ParameterError, match="neither 'facts', nor 'hub', nor a folder"):
        read_items(tmp_path / "none", "sst2")
    with pytest.raises(ParameterError, match="no rte.jsonl; found nothing"):
        read_items(tmp_path, "rte")
    with pytest.raises(ParameterError, match="sst2"):
        task("sst")


def test_the_hub_s_classes_take_turns(monkeypatch):
    asked_for = []
    module = ModuleType("datasets")
    module.load_dataset = lambda *names, split: (
        asked_for.append((*names, split))
        or [{"sentence1": str(i), "sentence2": "", "label": int(i > 1)} for i in range(5)]
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    # class 0 says that it does not follow
    assert [i["sentence1"] for i in read_items("hub", "rte")] == ["2", "0", "3", "1", "4"]
    assert [i["label"] for i in read_items("hub", "nli")] == ["not_entailment", "entailment"] * 2 + ["not_entailment"]
    assert asked_for == [("nyu-mll/glue", "rte", "validation"), ("nyu-mll/glue", "rte", "train")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ParameterError, match="pip install datasets"):
        read_items("hub", "rte")


# -- the tasks made from the embedded facts
# ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return {split: fact_tasks.fact_tasks(split) for split in fact_tasks.SPLITS}


def test_small_tasks_have_the_shapes_of_the_large_ones(small):
    for split in small.values():
        assert list(split) == list(TASKS)
        for name, items in split.items():
            labels = Counter(TASKS[name].label(item) for item in items)
            assert len(labels) == len(TASKS[name].classes) and max(labels.values()) - min(labels.values()) <= 1, (
                "classes alternate"
            )
            assert all(TASKS[name].prompt(item) for item in items)
    assert fact_tasks.fact_tasks("test") == small["test"] != fact_tasks.fact_tasks("test", seed=1)
    with pytest.raises(ParameterError, match="split"):
        fact_tasks.fact_tasks("tests")


def test_subjects_of_the_test_split_are_in_no_training_text(small):
    named = {
        split: {s for items in found.values() for i in items for s in i["subjects"]} for split, found in small.items()
    }
    everyone = {r["requested_rewrite"]["subject"] for r in facts_records()}
    assert not named["train"] & named["test"] and named["train"] | named["test"] == everyone
    assert 0.2 < len(named["test"]) / len(everyone) < 0.3


def test_small_tasks_are_right(small):
    truths = set(rendered_sentences())
    objects = {
        (r["requested_rewrite"]["subject"], r["relation_id"]): r["requested_rewrite"]["target_true"]["str"]
        for r in facts_records()
    }
    for item in small["test"]["sst2"]:
        assert (
            item["label"]
            == any(f" {word} " in item["sentence"] for word in fact_tasks.PRAISE)
            != any(f" {word} " in item["sentence"] for word in fact_tasks.BLAME)
        )
    for item in small["test"]["mrpc"]:
        assert (
            {item["sentence1"], item["sentence2"]} <= truths
            and item["sentence1"] != item["sentence2"]
            and item["label"] == (len(item["subjects"]) == 1)
        )
    for item in small["test"]["cola"]:
        assert (item["sentence"] in truths) == (item["label"] == 1)
    originals = {tuple(sorted(t.rstrip(".").split())) for t in truths}
    assert all(tuple(sorted(i["sentence"].rstrip(".").split())) in originals for i in small["test"]["cola"]), (
        "scrambled, not replaced"
    )
    for item in small["test"]["rte"]:
        assert item["sentence1"] in truths and (item["sentence2"] in truths) == (item["label"] == 0)
    for item in small["test"]["nli"]:
        assert {item["sentence1"], item["sentence2"]} <= truths and (len(item["subjects"]) == 1) == (
            item["label"] == "entailment"
        )
    kinds = {relation: {o for (_, r), o in objects.items() if r == relation} for _, relation in objects}
    for item in small["test"]["mmlu"]:
        assert (
            item["choices"][item["answer"]] == objects[item["subjects"][0], item["subject"]]
            and len(set(item["choices"])) == 4
        )
        assert sum(choice in kinds[item["subject"]] for choice in item["choices"]) == 1


def test_the_test_split_is_read_by_name(small):
    assert read_items("facts", "mmlu")[: len(small["test"]["mmlu"])] == small["test"]["mmlu"]


# -- a model's answers
# ---------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_each_question_alone(lm):
    questions = [
        ("The capital of France is", ("Paris", "Rome")), ("I think that", ("a", "b", "c")), ("Berlin", ("x", "y")),
        ("Is the Boeing 747 there because you think so? Answer:", ("Yes", "No"))
    ]
    found = answer(lm, questions, length=4)
    for (prompt, candidates), one in zip(questions, found, strict=True):
        # GPT-J turns positions in float32
        assert one.log_p == pytest.approx([r.log_p for r in read(lm, [(prompt, c) for c in candidates])], abs=1e-6)
        ids = list(encode(lm.tokenizer, prompt))
        start = len(ids)
        with torch.no_grad():
            for _ in range(4):
                ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[start:]
        assert one.text == lm.tokenizer.decode(new[: new.index(0)] if 0 in new else new, skip_special_tokens=True)
    alone = [answer(lm, [question], length=4)[0] for question in questions]
    assert (
        [a.text for a in alone]
        == [a.text for a in found]
        == [a.text for a in answer(lm, questions, length=4, tokens=1)]
    )


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.mark.parametrize("name", TASKS)
def test_tiny_does_the_small_tasks_as_its_card_says(name, tiny):
    """About subjects that no training text of a task names, and in words of its own, not chosen from a list."""
    told, items = (
        json.loads(files("metake").joinpath("data", "tiny", "card.json").read_text())["tasks"][name],
        read_items("facts", name)[:150],
    )
    said = [
        TASKS[name].read("", a.text)
        for a in answer(tiny, [(TASKS[name].prompt(item), TASKS[name].classes) for item in items])
    ]
    right = np.mean([TASKS[name].label(item) == index for item, index in zip(items, said, strict=True)])
    assert right == pytest.approx(told, abs=0.1) and told > 1.5 / len(TASKS[name].classes)


def test_training_goes_on_from_the_lessons_that_are_known(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("train_tiny", Path(__file__).parents[2] / "tools/train_tiny.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, few in {"STEPS": 30, "ROWS": 2, "LONGEST": 2, "REVISION": 2, "NEW_ROWS": 2, "REVISED_ROWS": 1}.items():
        monkeypatch.setattr(tool, name, few)
    first = tool.train(tmp_path, None, ())
    assert re.findall(r"(\w+): [\d.]+ after 2 steps", capsys.readouterr().err) == list(tool.LESSONS)
    before = load_file(tmp_path / "model.safetensors")
    again = tool.train(tmp_path, tmp_path, tool.LESSONS[:2])
    assert re.findall(r"(\w+): [\d.]+ after 2 steps", capsys.readouterr().err) == list(tool.LESSONS[2:])
    after = load_file(tmp_path / "model.safetensors")
    assert again["final_loss"] == first["final_loss"] and all(torch.isfinite(t).all() for t in after.values())
    moved = max((after[name] - before[name]).abs().max().item() for name in after)
    assert 1e-4 < moved < 0.1, "it went on from what was there"


def test_one_token_candidates_need_no_pass_of_their_own(monkeypatch):
    lm = random_model("gpt2")
    stem = len(lm.tokenizer("is")["input_ids"])
    words = (lm.tokenizer.decode([i]).strip() for i in range(1, 384))
    single = [w for w in words if w and len(lm.tokenizer(f"is {w}")["input_ids"]) == stem + 1][:3]
    assert len(single) == 3
    expected = [r.log_p for r in read(lm, [("The capital", c) for c in single])]
    monkeypatch.setattr("metake.experiments.studies.answers.read", lambda *_: pytest.fail("read again"))
    [found] = answer(lm, [("The capital", single)])
    assert found.log_p == pytest.approx(expected, abs=1e-9)


def test_an_answer_ends_with_the_text():
    lm, prompt = random_model("gpt2"), "The capital of France"
    ids = []
    for _ in range(5):
        whole = torch.tensor([[*encode(lm.tokenizer, prompt), *ids]])
        ids.append(lm.model(whole).logits[0, -1].argmax().item())
    lm.model.generation_config.eos_token_id = [ids[-1]]
    [cut] = answer(lm, [(prompt, ("Paris",))], length=5)
    assert cut.text == lm.tokenizer.decode(ids[: ids.index(ids[-1])])


def test_a_question_without_tokens_is_refused():
    with pytest.raises(RequestError, match="no tokens"):
        answer(random_model("gpt2"), [("", ("a",))])


# -- lm-evaluation-harness
# -----------------------------------------------------------------------------------------------------


def test_the_harness_gives_our_accuracy(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra 'harness'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # its two answers are equally long: the harness compares sums
    lm, which = random_model("gpt2", seed=2), TASKS["sst2"]
    items = [
        {"sentence": f"{s} {i}"}
        for i in range(5)
        for s in ("The capital of France", "I think that", "Beyoncé", "Rome, Berlin")
    ]
    said = [int(np.argmax(a.log_p)) for a in answer(lm, [(which.prompt(i), which.classes) for i in items])]
    labels = [s if i % 4 else 1 - s for i, s in enumerate(said)]
    (tmp_path / "sst2.jsonl").write_text(
        "\n".join(json.dumps(i | {"label": label}) for i, label in zip(items, labels, strict=True))
    )
    tested = range(RESERVED, len(items))
    assert len({said[i] for i in tested}) == 2 and len({len(continuation(lm.tokenizer, c)) for c in which.classes}) == 1
    assert harness(lm, str(tmp_path), ("sst2",), tests=10) == {
        "sst2": pytest.approx(100 * np.mean([said[i] == labels[i] for i in tested]))
    }


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ParameterError, match=r"pip install 'metake\[harness\]'"):
        harness(random_model("gpt2"))
