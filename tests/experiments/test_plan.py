"""What a plan says is what a run takes: bytes within 15 %, operations as torch counts them, a target that holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from metake.commands.cli import main
from metake.experiments.speed.plan import plan, shape_of
from metake.experiments.speed.sizes import random_model
from metake.language.model import MASTERED
from metake.support.errors import MetakeError

SIZES = {
    "llama": {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256
    },
    "gpt2": {"vocab_size": 4096, "n_embd": 640, "n_layer": 6, "n_head": 8, "n_positions": 256},
}
METHODS, LAYERS, EDITS, BATCH = {"llama": "alphaedit", "gpt2": "memit"}, [1, 2], 8, 4
RUN = """
import ctypes, gc, json, sys
from dataclasses import replace
import psutil
from transformers import AutoModelForCausalLM
import metake as mk
from metake.algebra.geometry import KeyStatistics
from metake.experiments.speed.sizes import random_contexts, random_statistics
from metake.language import assets
from metake.language.model import LanguageModel
sys.path.insert(0, sys.argv[1])
import test_plan
from metake.experiments.borrowed import borrowed

def statistics(lm, layers, projected):
    one, found = random_statistics(lm, layers, 0.02)[layers[0]], {}
    for layer in layers:
        found[layer] = KeyStatistics(one.moment.clone(), one.count)
        if projected:
            vars(found[layer])["_eigh"] = tuple(t.clone() for t in one._eigh)
    return found

contexts, cases = random_contexts(), mk.facts(limit=test_plan.EDITS)
tokenizer, told = assets.read_tokenizer(assets.resolve("tiny").path), {}
for kind in test_plan.SIZES:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back
    before = psutil.Process().memory_info().rss
    open("/proc/self/clear_refs", "w").write("5")  # the highest memory counts from here on
    lm = LanguageModel(AutoModelForCausalLM.from_config(test_plan.config(kind)), tokenizer, "default")
    with borrowed("default", None, test_plan.LAYERS):
        editor = mk.methods.method(test_plan.METHODS[kind], "default", contexts=contexts)
    editor = replace(editor, target=replace(editor.target, steps=2, stop_below=0.0))
    state = editor.init(lm, statistics(lm, test_plan.LAYERS, kind == "llama"))
    with lm.scratch(editor.paths(lm)):
        for batch in mk.batches([c.request for c in cases], test_plan.BATCH):
            edit, state = editor.step(lm, batch, state)
            edit.apply(lm, check=False)
    most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    told[kind] = int(most.split()[1]) * 1024 - before
    del lm, state, edit
print(json.dumps(told))
"""


def config(kind: str):
    return AutoConfig.for_model(kind, **SIZES[kind], bos_token_id=0, eos_token_id=0, pad_token_id=0)


def planned(kind: str, **changes):
    given = {"edits": EDITS, "batch": BATCH, "layers": LAYERS, "on_cpu": True, "config": config(kind)} | changes
    return plan("default", METHODS[kind], **given)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the highest memory cannot be reset here")
def test_the_peak_is_what_a_run_takes_within_15_percent():
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(Path(__file__).parent)], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    )
    assert not ran.returncode, ran.stderr
    for kind, took in json.loads(ran.stdout.splitlines()[-1]).items():
        assert planned(kind).peak == pytest.approx(took, rel=0.15), (kind, planned(kind), took)


def test_shapes_are_read_off_a_configuration_alone(tmp_path):
    found = shape_of(config("gpt2"))
    assert found[3:7] == (640, 2560, 6, 4096) and found.head == 640 * 4096 and found.cached == 2 * 640
    assert 6 * found.block < found.weights < 6 * found.block + 2 * 640 * 4096
    LlamaConfig(**SIZES["llama"]).save_pretrained(tmp_path)
    assert plan(str(tmp_path), "alphaedit", 4, 2, recipe="default", layers=[1]).shape == shape_of(config("llama"))


def test_the_largest_model_of_the_paper_fits_into_45_gigabytes_with_small_micro_batches():
    whole = plan("llama3-8b", "alphaedit", 2000, 100)
    small = plan("llama3-8b", "alphaedit", 2000, 100, memory=45e9)
    assert small.peak <= 45e9 < whole.peak and 1 < small.micro_batch < whole.micro_batch
    assert whole.held["weights"] == pytest.approx(4 * 8.03e9, rel=0.01) and whole.history == 1900
    assert whole.host == 5 * 2 * 8 * 14336**2 and small.reads["targets"] > whole.reads["targets"]


def test_more_edits_and_larger_batches_take_more_and_a_method_without_memory_does_not():
    few, many = planned("llama"), planned("llama", edits=800)
    assert many.held["history"] > 50 * few.held["history"] and planned("gpt2").held["history"] == 0
    assert planned("llama", edits=40, batch=40).flops["targets"] == pytest.approx(10 * few.flops["targets"], rel=0.3)
    spent = few.seconds(1e9, 1e9)
    assert spent.keys() == few.flops.keys() and spent["targets"] >= few.flops["targets"] / 1e9


def test_the_command_prints_it_and_refuses_what_it_does_not_know(capsys):
    words = "plan llama3-8b --method metake --rate 50 --bandwidth 3000 --memory 45"
    assert not main(words.split())
    out = capsys.readouterr().out
    assert "peak" in out and "as given" in out and "refinement" in out and "key statistics, beside it" in out
    assert main(["plan", "llama3-9b"]) == 2 and "llama3-8b" in capsys.readouterr().err
    for bad in ({"method": "mend"}, {"edits": 1}, {"layers": [9]}, {"dtype": "float31"}):
        with pytest.raises(MetakeError):
            plan("tiny", **{"method": "alphaedit", "edits": 10, "batch": 2} | bad)


def test_float32_copies_of_the_edited_matrices_are_planned_for():
    plain, copied = (plan("gpt2-xl", edits=100, dtype=dtype).held for dtype in ("bfloat16", MASTERED))
    edited = 5 * 1600 * 6400
    assert copied["weights"] - plain["weights"] == 4 * edited
    assert copied["originals of the edited weights"] == 2 * plain["originals of the edited weights"] == 8 * edited
    assert random_model("tiny", MASTERED).masters == {} and random_model("tiny", "bfloat16").masters is None
