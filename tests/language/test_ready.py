"""What the caller does around a call, and to the model, changes no number, and is found again as it was."""

import contextlib
import copy
import threading

import pytest
import torch
from models import cases, random_model
from same import fingerprint
from torch import nn

import metake as mk
from metake.editing.gradient.network import Network
from metake.editing.keys import KeyReader
from metake.experiments.measured import edited_losses
from metake.experiments.studies.answers import answer
from metake.experiments.theory.hypergradient import Hypergradient
from metake.language.generation import sample
from metake.support.errors import ParameterError

CASES = cases(("neighborhood", "There "))
REQUESTS = [case.request for case in CASES]
LAYERS, CONTEXTS = (1, 2), ("{}", "Therefore. {}")
EDITOR = mk.Editor(
    LAYERS, mk.inverse_covariance(20.0, 1e-3), mk.TargetRule(steps=3), refine=mk.Refinement(steps=2), contexts=CONTEXTS,
    remember=True,
)
GRADIENT = mk.GradientEditor(("transformer.h.2.mlp.c_fc",), mk.GradientRule(step=1e-3))


def planned(lm, given):
    return mk.optimize_targets(lm, REQUESTS, CONTEXTS, 2, EDITOR.target)


def hypergradient(lm, given):
    state, initial = EDITOR.init(lm, given), mk.Targets(2, torch.ones(1, 32).double(), torch.ones(1, 32).double())
    found = Hypergradient(lm, REQUESTS[:1], EDITOR, state, initial)
    return [*found.gradients(initial.value), found.after(initial.value), *found.evaluate(initial.value)]


def trained(lm, given):
    made = mk.train(
        lm, CASES, mk.GradientRule(), GRADIENT.modules, mk.Training(edits=2, steps=2, rank=2, blocks=1)
    )
    assert all(isinstance(n, Network) for step in made.networks for n in step)
    return [p.detach() for step in made.networks for n in step for p in n.parameters()]


def factors(edit):
    return [t for u in edit.updates for t in (u.left, u.right)]


# Everything that runs a model, by whether it differentiates; each gives numbers or texts
DIFFERENTIATES = {
    "edit": lambda lm, given: factors(EDITOR.edit(lm, REQUESTS, given)),
    "step": lambda lm, given: factors(EDITOR.step(lm, REQUESTS, EDITOR.init(lm, given))[0]),
    "targets": lambda lm, given: [planned(lm, given).value],
    "refine": lambda lm, given: [
        mk.refine(lm, REQUESTS, CONTEXTS, mk.Targets(2, torch.ones(2, 32).double(), torch.ones(2, 32).double()),
                  torch.full((2, 128), 0.1, dtype=torch.float64), mk.Refinement(steps=2)).value
    ],
    "gradient edit": lambda lm, given: factors(GRADIENT.edit(lm, REQUESTS)),
    "train": trained,
    "hypergradient": hypergradient,
}  # fmt: skip
READS = {
    "init": lambda lm, given: list(vars(EDITOR.init(lm, given).metrics[1]).values())[1:],
    "contexts": lambda lm, given: mk.Editor((1,), mk.null_space(0.02)).init(lm, given).contexts,
    "evaluate": lambda lm, given: [repr(mk.evaluate(lm, CASES).cases)],
    "recall": lambda lm, given: [repr(mk.recall(lm, CASES))],
    "sample": lambda lm, given: sample(lm, ["I think", "Rome"], 12),
    "answer": lambda lm, given: [repr(answer(lm, [("I think that", ("Rome", "Paris"))])[0].log_p)],
    "statistics": lambda lm, given: [
        s.moment for s in mk.statistics(lm, layers=LAYERS, tokens=400, cache=False).values()
    ],
    "diagnose": lambda lm, given: [repr(mk.diagnose(lm, REQUESTS, EDITOR, given))],
    "keys": lambda lm, given: list(KeyReader(lm, REQUESTS, CONTEXTS, 2).read(1)),
    "losses of an edit": lambda lm, given: [edited_losses(lm, REQUESTS, CONTEXTS, mk.Edit(()))],
}
CALLS = DIFFERENTIATES | READS


def same(one, other):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def model(**changes):
    """A model whose dropout matters once it is on."""
    lm = random_model("gpt2", **changes)
    for module in lm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return lm


@pytest.fixture(scope="module")
def given():
    return mk.statistics(random_model("gpt2", torch.float32), layers=LAYERS, tokens=1500, cache=False)


@pytest.fixture(scope="module")
def expected(given):
    lm = model(dtype=torch.float32)
    return {name: call(lm, given) for name, call in CALLS.items()}


def training(lm):
    lm.model.train()


def partly_training(lm):
    lm.model.train()
    lm.block(1).eval()


def learning(lm):
    lm.model.requires_grad_(True)
    for i, parameter in enumerate(lm.model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if i % 3 > 1 else None


def checkpointing(lm):
    lm.model.train()
    lm.model.requires_grad_(True)
    lm.model.gradient_checkpointing_enable()


@contextlib.contextmanager
def bfloat16_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


SITUATIONS = {
    "no_grad": (None, torch.no_grad), "autocast": (None, lambda: torch.autocast("cpu", torch.bfloat16)),
    "training": (training, contextlib.nullcontext), "partly training": (partly_training, torch.no_grad),
    "learning": (learning, contextlib.nullcontext), "checkpointing": (checkpointing, contextlib.nullcontext),
    "default dtype": (None, bfloat16_default),
}  # fmt: skip


def state(lm):
    """All that a call must leave: flags of modules and parameters, gradients, weights, attributes of the model."""
    flags = [m.training for m in lm.model.modules()], [p.requires_grad for p in lm.model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in lm.model.parameters()]
    return flags, [g is None or g.sum().item() for g in grads], fingerprint(lm.model), sorted(vars(lm.model))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_the_caller_does_around_a_call_changes_no_number(situation, name, given, expected):
    prepare, around = SITUATIONS[situation]
    lm = model(dtype=torch.float32)
    if prepare:
        prepare(lm)
    before = state(lm)
    with around():
        grad = torch.is_grad_enabled()
        found = CALLS[name](lm, given)
        assert torch.is_grad_enabled() == grad
    assert same(found, expected[name])
    assert state(lm) == before


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_is_refused_where_gradients_are_needed_and_does_no_harm_elsewhere(name, given, expected):
    lm = model(dtype=torch.float32)
    before = state(lm)
    with torch.inference_mode():
        if name in READS:
            assert same(CALLS[name](lm, given), expected[name])
        else:
            with pytest.raises(ParameterError, match=r"inference_mode.*load the model and call this outside of it"):
                CALLS[name](lm, given)
    assert state(lm) == before


def test_what_is_made_in_inference_mode_can_be_differentiated_later(given):
    """Statistics and states hold ordinary tensors, so that an edit that looks ahead through its metrics can follow."""
    lm, whole = model(dtype=torch.float32), mk.Refinement(steps=1, look_ahead="whole")
    editor = mk.Editor(LAYERS, EDITOR.metric, EDITOR.target, refine=whole, contexts=CONTEXTS)
    with torch.inference_mode():
        inside = editor.init(lm, mk.statistics(lm, layers=LAYERS, tokens=1500, cache=False))
    assert same(factors(editor.step(lm, REQUESTS, inside)[0]), factors(editor.edit(lm, REQUESTS, given)))


def test_a_model_that_was_loaded_in_inference_mode_can_be_read_and_says_why_it_cannot_be_edited(given, expected):
    with torch.inference_mode():
        lm = random_model("gpt2", torch.float32)
    assert same(READS["evaluate"](lm, given), expected["evaluate"])
    with pytest.raises(ParameterError, match="load the model and call this outside"):
        EDITOR.edit(lm, REQUESTS, given)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_model_is_put_back_after_an_error(error):
    lm = model()
    checkpointing(lm)
    before = state(lm)
    with pytest.raises(error), torch.no_grad(), lm.ready(gradients=True):
        assert torch.is_grad_enabled() and not any(m.training for m in lm.model.modules())
        assert not any(p.requires_grad for p in lm.model.parameters())
        raise error
    assert state(lm) == before and torch.is_grad_enabled()


def test_nothing_is_left_on_the_users_parameters(given):
    """No gradient is computed for a parameter that the user is training: neither kept nor added to."""
    lm = model(dtype=torch.float32)
    lm.model.requires_grad_(True)
    for call in CALLS.values():
        call(lm, given)
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())


# One thread at a time


def elsewhere(call):
    """What a call gives, or raises, in another thread."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("name", CALLS)
def test_a_model_in_use_is_refused_to_other_threads(name, given, expected):
    lm = model(dtype=torch.float32)
    edit = mk.Edit((mk.LayerUpdate(lm.write_path(1), torch.zeros(32, 1), torch.zeros(1, 128)),))
    uses = (lm.ready(), lm.scratch([lm.write_path(1)]), edit.applied(lm))
    for use in uses if name in ("evaluate", "targets") else uses[:1]:
        with use:
            refused = elsewhere(lambda: CALLS[name](lm, given))
            assert isinstance(refused, ParameterError) and "another thread uses this model" in str(refused)
            assert isinstance(elsewhere(lambda: edit.apply(lm)), ParameterError)
            twin = mk.LanguageModel(lm.model, lm.tokenizer, "another name of it")
            assert isinstance(elsewhere(lambda: CALLS[name](twin, given)), ParameterError)
            assert same(CALLS[name](lm, given), expected[name])  # its own thread goes on
    assert same(elsewhere(lambda: CALLS[name](lm, given)), expected[name])


def test_threads_that_race_are_right_or_refused(given, expected):
    lm = model(dtype=torch.float32)
    before, found = state(lm), []

    def race(name):
        for _ in range(4):
            try:
                found.append(same(CALLS[name](lm, given), expected[name]))
            except ParameterError as error:
                found.append("another thread" in str(error))

    threads = [threading.Thread(target=race, args=(name,)) for name in ("evaluate", "edit", "sample", "diagnose")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and all(found)
    assert state(lm) == before


def test_a_copy_of_a_model_in_use_is_free():
    lm = model()
    with lm.scratch([lm.write_path(1)]):
        twin = copy.deepcopy(lm)
    assert isinstance(elsewhere(lambda: sample(twin, ["Rome"], 4)), list)
    assert isinstance(elsewhere(lambda: sample(lm, ["Rome"], 4)), list)


def test_a_generator_that_is_left_lets_the_model_go(given):
    lm = model(dtype=torch.float32)

    def stream():
        with lm.scratch([lm.write_path(1)]):
            yield mk.evaluate(lm, CASES)
            yield None

    started = stream()
    next(started)
    assert isinstance(elsewhere(lambda: mk.recall(lm, CASES)), ParameterError)
    started.close()
    assert isinstance(elsewhere(lambda: mk.recall(lm, CASES)), dict)


@pytest.mark.parametrize("situation", [training, learning])
def test_an_applied_edit_can_be_evaluated_whatever_its_model_is_doing(situation, given):
    lm = model(dtype=torch.float32)
    edit = EDITOR.edit(lm, REQUESTS, given)
    with edit.applied(lm):
        expected = READS["evaluate"](lm, given)
    situation(lm)
    before = state(lm)
    with edit.applied(lm), torch.inference_mode():
        assert READS["evaluate"](lm, given) == expected
        assert [m.training for m in lm.model.modules()] == before[0][0]
    assert state(lm) == before


def test_wrong_arguments_are_still_a_type_error():
    with pytest.raises(TypeError, match="'cases'"):
        mk.evaluate(model())
    with pytest.raises(TypeError, match="unexpected"):
        mk.recall(model(), CASES, loud=True)
