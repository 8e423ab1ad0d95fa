"""Fine-tuning as a baseline: torch's own optimizer on a model's own weights, by the interface of every editor."""

from dataclasses import replace

import pytest
import torch
from models import random_model
from same import fingerprint

import metake as mk
from metake import EditRequest
from metake.editing.gradient import editor as gradient
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.experiments.borrowed import borrowed
from metake.methods import method
from metake.support.errors import ParameterError

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("{} was born in", "Danielle Darrieux", "Berlin now", "b"),
    EditRequest("I fly the {}", "Boeing 747", "English", "c"),
]
RULE = GradientRule("adam", tokens="all", steps=4, step=3e-3)


def literal(lm, layers, steps, step, limit):
    """The published baseline written out: a copy of the model, its parameters in an Adam, the bound after each step."""
    weights = [lm.model.get_submodule(lm.write_path(i)).weight for i in layers]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, step)
    for _ in range(steps):
        optimizer.zero_grad()
        for r in REQUESTS:
            prompt, whole = (lm.tokenizer(t)["input_ids"] for t in (r.text, f"{r.text} {r.target}"))
            logits = lm.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            own = [-logits[j - 1, whole[j]] for j in range(len(prompt), len(whole))]
            (sum(own) / len(own)).backward()
        optimizer.step()
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True) if limit else ():
                w.copy_(old + (w - old).clamp(-limit, limit))
    return [(w.detach() - old) for w, old in zip(weights, before, strict=True)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("limit", [None, 5e-3])
def test_an_edit_is_what_torchs_own_optimizer_makes_of_the_weights(kind, limit):
    lm, layers = random_model(kind), (1, 2)
    before = fingerprint(lm.model)
    edit = GradientEditor(layers, RULE, limit=limit).edit(lm, REQUESTS)
    assert fingerprint(lm.model) == before and edit.modules == tuple(map(lm.write_path, layers))
    conv = kind == "gpt2"  # stored transposed
    for update, delta in zip(edit.updates, literal(random_model(kind), layers, 4, 3e-3, limit), strict=True):
        assert torch.allclose(update.delta, delta.T if conv else delta, atol=1e-9) and update.delta.abs().max() > 4e-3
        assert update.rank == 0 and update.delta.abs().max() <= (limit or 1) + 1e-15
    assert edit.record.recipe["limit"] == limit and edit.record.recipe["modules"] == list(edit.modules)
    losses = edit.record.trace["a"]["nll"]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_it_stops_once_the_targets_are_learned(monkeypatch):
    lm = random_model("gpt2")
    monkeypatch.setattr(gradient, "LEARNED", 1e9)
    edit = GradientEditor((1,), RULE).edit(lm, REQUESTS)
    assert not edit.updates[0].delta.any() and len(edit.record.trace["a"]["nll"]) == 2


def test_a_sequence_saves_loads_and_undoes_as_any_other(tmp_path):
    lm, editor = random_model("gpt2"), GradientEditor((1, 2), replace(RULE, steps=2))
    before, state = fingerprint(lm.model), editor.init(lm)
    with lm.scratch(editor.paths(lm)):
        for batch in (REQUESTS[:2], REQUESTS[2:]):
            edit, state = editor.step(lm, batch, state)
            edit.apply(lm)
        assert state.edits == 3 and editor.finish(lm, state) is None
    edit.save(tmp_path / "edit")
    again = mk.Edit.load(tmp_path / "edit")
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(edit.updates, again.updates, strict=True))
    assert fingerprint(lm.model) == before and not editor.edit(lm, []).updates[0].delta.any()


def test_the_methods_take_their_numbers_from_the_recipes():
    plain, bounded = method("ft", "tiny"), method("ft_l", "gpt-j-6b", seed=3)
    assert plain.modules == method("memit", "tiny").layers and plain.rule.steps == method("memit", "tiny").target.steps
    assert (plain.rule.solve, plain.rule.tokens, plain.rule.step, plain.limit) == ("adam", "all", 5e-4, None)
    assert bounded.limit == 5e-5 and bounded.seed == 3 and method("ft_l", "gpt2-xl").limit == 5e-4
    assert plain.digest != replace(plain, limit=1.0).digest and plain.layers == ()
    with borrowed("tiny", None, [1]):
        assert method("ft", "tiny").modules == (1,)
    with pytest.raises(ParameterError, match="ft plans no residuals"):
        mk.methods.planning("ft", "tiny")
