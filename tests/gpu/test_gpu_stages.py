"""What comes before, in and after an edit is the same on a GPU: diagnosis, hypergradient, samples, adapters, and runs
that go on on another device.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from devices import CONTEXTS, GPU, MARKS, TOKENS, assert_same, cases, changes, edited, requests, short, statistics
from models import random_model, text_statistics
from reference import double_inside  # noqa: F401 (a fixture)

import metake as mk
from metake.editing.editor import Editor
from metake.editing.outer import Refinement
from metake.editing.targets import TargetRule, optimize_targets
from metake.experiments.runs import RunConfig, reevaluate, run
from metake.experiments.theory.hypergradient import Hypergradient
from metake.language.generation import sample

pytestmark = MARKS
DEVICES = ("cpu", GPU)
PAIRS = [("cpu", GPU), (GPU, "cpu")][: 1 if GPU == "cpu" else 2]  # where the CPU stands for both, once is enough
CONFIG = RunConfig("tiny", "alphaedit", edits=3, batch=1, text_tokens=TOKENS, changes=dict(changes()))


def test_a_diagnosis_agrees():
    found = []
    for device in DEVICES:
        lm = mk.load("tiny", device=device)
        found.append(mk.diagnose(lm, requests(), short("alphaedit"), statistics(lm)))
    for one, other in zip(*found, strict=True):
        assert one.id == other.id and one.feasible == other.feasible
        assert one[1:7] == pytest.approx(other[1:7], rel=1e-6)


@pytest.mark.usefixtures("double_inside")
@pytest.mark.parametrize("gates", ["exact", "frozen"][: 1 if GPU == "cpu" else 2])
def test_the_whole_look_ahead_and_its_hypergradient_agree(gates):
    rule, found = Refinement(look_ahead="whole", gates=gates, prompts="contexts"), []
    for device in DEVICES:
        lm = random_model("llama")
        given = text_statistics(lm, (0, 1))
        lm.model.to(device)
        target = TargetRule(steps=3, stop_below=0.0)
        editor = Editor((0, 1), mk.null_space(2e-2, 0.3), target, refine=rule, contexts=CONTEXTS)
        state = editor.init(lm, given)
        planned = optimize_targets(lm, requests(2), CONTEXTS, 1, target)
        exact = Hypergradient(lm, requests(2), editor, state, planned).gradients(planned.value)
        found.append((exact.exact, exact.proxy, exact.gate, exact.losses))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_samples_do_not_depend_on_the_device():
    prompts = [c.request.text for c in cases(2)]
    one, other = (sample(mk.load("tiny", device=device), prompts, 16, seed=3) for device in DEVICES)
    assert one == other and all(len(text) > len(prompt) for text, prompt in zip(one, prompts, strict=True))


def test_fluency_and_consistency_agree():
    pytest.importorskip("nltk")
    one, other = (mk.evaluate(mk.load("tiny", device=d), cases(1), generate=True, length=16).metrics for d in DEVICES)
    assert one == pytest.approx(other) and one["fluency"] > 0


def test_an_adapter_gives_the_logits_of_the_edited_model(tmp_path):
    peft = pytest.importorskip("peft")
    lm, edit = edited(GPU, "alphaedit")
    edit.to_peft(tmp_path / "lora")
    ids = torch.tensor([list(range(1, 9))], device=lm.device)
    with torch.no_grad(), edit.applied(lm):
        merged = lm.model(ids).logits.clone()
    with torch.no_grad():
        before = lm.model(ids).logits.clone()
        adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path / "lora").to(lm.device)
        assert_same(adapted(ids).logits, merged, 1e-9)
    assert (merged - before).abs().max() > 1e-4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of each device, made once: its folder and its evaluation."""
    made = {}

    def of(device: str):
        if device not in made:
            folder = tmp_path_factory.mktemp(device) / "run"
            made[device] = folder, run(CONFIG, folder, device)
        return made[device]

    return of


@pytest.mark.parametrize("first, second", PAIRS)
@pytest.mark.parametrize("finished", [1, 2])
def test_a_run_goes_on_on_another_device(tmp_path, whole, first, second, finished):
    folder, expected = whole(first)
    shutil.copytree(folder, tmp_path / "cut")
    for file in ("summary.json", "cases.jsonl", "before.jsonl"):
        (tmp_path / "cut" / file).unlink()
    for batch in range(finished, 3):
        shutil.rmtree(tmp_path / "cut" / "batches" / f"{batch:04d}")
    resumed = run(CONFIG, tmp_path / "cut", second)
    assert resumed.metrics == pytest.approx(expected.metrics)
    assert len(list((tmp_path / "cut" / "batches").iterdir())) == 3


@pytest.mark.parametrize("first, second", PAIRS)
def test_a_run_of_one_device_is_evaluated_on_the_other(whole, first, second):
    folder, expected = whole(first)
    assert reevaluate(folder, second).metrics == pytest.approx(expected.metrics)
