"""Not-a-number is no result: a broken weight, an overflow in the model or in an update is an error that says where."""

import re

import pytest
import torch
from models import cases, random_model
from same import fingerprint

import metake as mk
from metake.editing.keys import KeyReader
from metake.experiments.measured import edited_losses
from metake.experiments.studies.answers import answer
from metake.experiments.theory.hypergradient import Hypergradient
from metake.language.generation import sample
from metake.scoring.evaluation import read
from metake.support.errors import NumericalError, StatisticsError

CASES = cases(("generation", ""))
REQUESTS = [case.request for case in CASES]
CONTEXTS = ("{}", "Therefore. {}")
EDITOR = mk.Editor((1, 2), mk.inverse_covariance(20.0, 1e-3), mk.TargetRule(steps=2), contexts=CONTEXTS)
GRADIENT = mk.GradientEditor(("transformer.h.2.mlp.c_fc",), mk.GradientRule(step=1e-3))
CALLS = {
    "evaluate": lambda lm, given: mk.evaluate(lm, CASES),
    "evaluate with generations": lambda lm, given: mk.evaluate(lm, CASES, generate=True, length=12),
    "recall": lambda lm, given: mk.recall(lm, CASES),
    "read": lambda lm, given: read(lm, [("Rome", "is"), ("Rome is in", "Berlin")]),
    "sample": lambda lm, given: sample(lm, ["I think", "Rome"], 8),
    # so few keys that torch's attention, whose vectors they do not fill, gives zeros where no score is a number
    "sample briefly": lambda lm, given: sample(lm, ["Rome"], 3),
    "answer": lambda lm, given: answer(lm, [("I think that", ("Rome", "Paris"))]),
    "edit": lambda lm, given: EDITOR.edit(lm, REQUESTS, given),
    "targets": lambda lm, given: mk.optimize_targets(lm, REQUESTS, CONTEXTS, 2, mk.TargetRule(steps=1)),
    "gradient edit": lambda lm, given: GRADIENT.edit(lm, REQUESTS),
    "losses of an edit": lambda lm, given: edited_losses(lm, REQUESTS, CONTEXTS, mk.Edit(())),
    "keys": lambda lm, given: KeyReader(lm, REQUESTS, CONTEXTS, 2).read(2),
    "diagnose": lambda lm, given: mk.diagnose(lm, REQUESTS, EDITOR, given),
}
LATER = ("keys", "diagnose")  # what they read does not reach the last blocks


@pytest.fixture(scope="module")
def given():
    return mk.statistics(random_model("gpt2"), layers=(1, 2), tokens=1500, cache=False)


@pytest.mark.parametrize("name, number", [
    ("transformer.h.0.attn.c_attn.weight", float("nan")), ("transformer.h.1.mlp.c_proj.bias", float("inf")),
    ("transformer.h.3.mlp.c_proj.weight", -float("inf")), ("transformer.ln_f.weight", float("nan")),
])  # fmt: skip
@pytest.mark.parametrize("call", CALLS)
def test_a_broken_weight_is_named(call, name, number, given):
    if call in LATER and ("h.3" in name or "ln_f" in name):
        return
    lm = random_model("gpt2")
    lm.model.get_parameter(name).data.view(-1)[3] = number
    before = fingerprint(lm.model)
    with pytest.raises(NumericalError, match="not finite") as caught:
        CALLS[call](lm, given)
    assert re.search(rf"1 of \d+ numbers in {name} are not", str(caught.value))
    assert "\n" not in str(caught.value)
    assert fingerprint(lm.model) == before


def test_the_probe_is_named_without_its_padding():
    lm = random_model("gpt2")
    rome = lm.tokenizer(" Rome")["input_ids"][0]
    lm.model.get_submodule("transformer.wte").register_forward_hook(
        lambda _, ids, out: out.masked_fill((ids[0] == rome)[..., None], float("nan"))
    )
    with pytest.raises(NumericalError, match=r"computes at 'I think that you are there because the Rome is' is"):
        read(lm, [("The capital of France is", "Rome"), ("I think that you are there because the Rome is", "a")])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("call", ["evaluate", "recall", "sample", "answer", "keys", "diagnose", "targets", "edit"])
def test_a_number_on_the_way_that_overflows_says_the_dtype(call, dtype, given):
    """Every weight is finite: what the MLP makes of them is not."""
    lm = random_model("gpt2", dtype)
    lm.model.get_parameter("transformer.h.0.mlp.c_fc.bias").data.fill_(torch.finfo(dtype).max / 2)
    lm.model.get_parameter("transformer.h.0.mlp.c_proj.weight").data.fill_(8)
    with pytest.raises(NumericalError, match=rf"all weights are, so a number on the way exceeds {dtype}; load the mo"):
        CALLS[call](lm, given)


def test_a_plan_whose_losses_are_not_numbers_has_no_hypergradient(given):
    lm = random_model("gpt2", torch.float16)
    editor = mk.Editor((2,), EDITOR.metric, contexts=CONTEXTS)
    at = mk.Targets(2, torch.zeros(1, 32).double(), torch.zeros(1, 32).double())
    found = Hypergradient(lm, REQUESTS[:1], editor, editor.init(lm, given), at)
    assert all(t.isfinite().all() for t in found.gradients(at.value))
    with pytest.raises(NumericalError, match=r"France is.* is not finite: all weights are.*float16"):
        found.gradients(torch.full((1, 32), 1e6).double())


# Applying


def enter(block):
    with block:
        pass


def update(lm, layer, size):
    d_out, d_in = lm.shape(lm.write_path(layer))
    left = torch.zeros(d_out, 1, dtype=torch.float64)
    left[2] = size
    return mk.LayerUpdate(lm.write_path(layer), left, torch.ones(1, d_in, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype, size", [
    (torch.float16, 7.1e4), (torch.float16, float("inf")), (torch.bfloat16, 1e39), (torch.float32, -1e39),
    (torch.float64, float("nan")),
])  # fmt: skip
def test_an_update_that_does_not_fit_the_dtype_changes_nothing(kind, dtype, size):
    lm = random_model(kind, dtype)
    before = fingerprint(lm.model)
    edit = mk.Edit((update(lm, 1, 0.5), update(lm, 2, size)))
    for apply in (edit.apply, lambda lm: lm.add(lm.write_path(2), edit.updates[1]), lambda lm: enter(edit.applied(lm))):
        with pytest.raises(NumericalError) as caught:
            apply(lm)
        assert f"{lm.write_path(2)} is left unchanged" in str(caught.value) and str(dtype) in str(caught.value)
        assert f"largest number would be {abs(size):.3g}, " in str(caught.value)
        assert fingerprint(lm.model) == before
    mk.Edit(edit.updates[:1]).apply(lm)
    assert fingerprint(lm.model) != before


def test_the_largest_number_that_fits_is_written():
    lm = random_model("llama", torch.float16)
    lm.weight(lm.write_path(2)).zero_()
    lm.add(lm.write_path(2), update(lm, 2, 65504.0))
    assert lm.weight(lm.write_path(2)).max() == 65504


@pytest.mark.parametrize("layers", [(1, 2), (2,)])
def test_a_plan_that_overflows_ends_the_edit_with_the_model_as_it_was(layers, given):
    editor = mk.Editor(layers, EDITOR.metric, contexts=CONTEXTS)
    lm = random_model("gpt2", torch.float16)
    before = fingerprint(lm.model)
    far = mk.Targets(2, torch.zeros(2, 32).double(), torch.full((2, 32), 1e9).double())
    with pytest.raises(NumericalError, match=r"mlp\.c_proj is left unchanged.*torch\.float16 does not hold that"):
        editor.step(lm, REQUESTS, editor.init(lm, given), planned=far)
    assert fingerprint(lm.model) == before


# The algebra


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_keys_that_are_not_numbers_do_not_coincide(dtype, number, noise):
    keys = torch.eye(3, 8, dtype=dtype)
    metric, plain = mk.Isotropic(8), torch.eye(3, 8, dtype=dtype)
    past = mk.condition(metric, plain[:1].double())
    keys[1, 4] = number
    for found in (metric, past):
        with pytest.raises(NumericalError, match="KᵀQK is not finite"):
            mk.gate(keys, found, noise)
        with pytest.raises(NumericalError, match="KᵀQK is not finite"):
            mk.gate(plain, found, noise, at=keys)
        with pytest.raises(NumericalError, match="KᵀQK is not finite"):
            mk.solve(keys, plain, found, noise)
        with pytest.raises(NumericalError, match="cannot be remembered.*give finite keys"):
            mk.condition(found, keys)
    with pytest.raises(StatisticsError, match="two of them coincide"):
        mk.gate(plain[[0, 0]], metric, 0.0)


def test_a_gate_that_exceeds_its_dtype_says_which():
    with pytest.raises(NumericalError, match=r"exceeds torch\.float32"):
        mk.gate(torch.full((2, 8), 1e25), mk.Isotropic(8))
    assert mk.gate(torch.eye(2, 8).double() * 1e25, mk.Isotropic(8)).isfinite().all()
