"""An edit of every family of the table does what its record and its look-ahead say, through its block's own scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import random_model, text_statistics
from same import fingerprint

from metake import EditRequest, TargetRule
from metake.editing.downstream import Downstream
from metake.editing.gradient.slopes import Passes
from metake.editing.keys import KeyReader
from metake.editing.outer import LastLayer, Refinement
from metake.editing.plant import SITES, planted, score
from metake.editing.targets import Targets, optimize_targets
from metake.experiments.measured import edited_losses
from metake.language.capture import hidden, rewrap
from metake.language.tokens import Rows, rewriting_rows
from metake.methods import method

KINDS = ["gpt2", "bloom", "falcon", "granite", "mpt", "opt"]  # what the others do, these do too
REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("{} was born in", "Danielle Darrieux", "Berlin", "b"),
]
CONTEXTS = ("{}", "I think that {}")
RULE = TargetRule(steps=3, step_size=0.3, stop_below=0.0)
every = pytest.mark.parametrize("kind", KINDS)


def close(found, expected, tolerance=1e-5):
    assert torch.isfinite(found).all() and expected.norm() > 1e-6
    assert (found - expected).norm() <= tolerance * expected.norm(), ((found - expected).norm(), expected.norm())


@every
@pytest.mark.parametrize(("name", "site"), [("emmet", "block"), ("rome", "mlp")])
def test_an_exact_write_lands_where_it_was_planned(kind, name, site):
    lm = random_model(kind)
    editor = method(name, "tiny", layers=(1,), target=replace(RULE, site=site), contexts=CONTEXTS, noise=0.0)
    before, request = fingerprint(lm.model), REQUESTS[:1]
    target = optimize_targets(lm, request, CONTEXTS, 1, editor.target)
    edit = editor.edit(lm, request, text_statistics(lm, (1,)))
    assert fingerprint(lm.model) == before
    contexts = CONTEXTS if name == "emmet" else ("{}",)  # ROME's residual is to be found at the plain prompt
    with edit.applied(lm):
        rows = KeyReader(lm, request, contexts, 1, site=site)
        found = rows.read(1)
    moved = lm.scale ** (site == "block") * found.keys @ edit.updates[0].delta.T
    close(moved, target.planned)
    if name == "rome":
        close(found.current, target.value)
    layer = edit.record.layers["1"]
    assert layer["realized"] == pytest.approx(layer["planned"]) == target.planned.norm().item()
    assert fingerprint(lm.model) == before


@every
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)], ids=str)
def test_the_look_ahead_is_the_edited_model(kind, layers):
    lm = random_model(kind)
    editor = method("memit", "tiny", layers=layers, target=RULE, contexts=CONTEXTS)
    state, rule = editor.init(lm, text_statistics(lm, layers)), Refinement(locality_position="final")
    initial = optimize_targets(lm, REQUESTS, CONTEXTS, layers[-1], RULE)
    value = initial.value + 0.3 * torch.randn(initial.value.shape, dtype=torch.float64)
    plan = Targets(initial.layer, initial.anchor, value - initial.anchor, initial.trace)
    edit, _ = editor.step(lm, REQUESTS, state, plan)
    expected = edited_losses(lm, REQUESTS, CONTEXTS, edit, rule)
    whole = Downstream(lm, REQUESTS, CONTEXTS, initial, editor.stage_two(lm, state), replace(rule, look_ahead="whole"))
    with torch.no_grad():
        close(whole.task(value), expected)
        if len(layers) == 1:
            reader = editor.reading.reader(lm, Rows.of(lm.tokenizer, REQUESTS, CONTEXTS), 1)
            gate = editor._frozen_gate(reader, state, 1)
            close(LastLayer(lm, REQUESTS, CONTEXTS, initial, gate, rule).task(value), expected)


@every
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_vector_enters_where_its_module_returns_it(kind, site):
    lm = random_model(kind)
    rows = Rows.of(lm.tokenizer, REQUESTS[:1], ("{}",))
    (part,), anchor = planted(lm, rows, 1, site, 1000)
    vectors = torch.randn(len(SITES[site]), 1, lm.width, dtype=torch.float64)
    found, (row,) = score(lm, part, vectors, 1, site), rows.taught
    modules = [{"block": lm.block, "write": lm.write, "attention": lm.attention}[name](1) for name in SITES[site]]
    seen, handles = {}, []
    for module, vector in zip(modules, vectors[:, 0], strict=True):

        def push(module, _, out, vector=vector):
            flat = hidden(out).reshape(1, -1, lm.width).clone()
            seen[module] = flat[0, row.lookup].clone()
            flat[0, row.lookup] += vector
            return rewrap(out, flat.view_as(hidden(out)))

        handles.append(module.register_forward_hook(push))
    expected = lm.model(torch.tensor([row.ids]), use_cache=False).logits[0, list(row.read)]
    for handle in handles:
        handle.remove()
    close(found[: len(row.read)], expected)
    if site != "mlp+attention":  # there, what the attention returned has moved what the MLP does
        close(anchor[0, 0], seen[modules[0]])
    else:
        close(anchor[1, 0], seen[modules[1]])


@every
def test_slopes_are_the_gradients_of_the_weights(kind):
    lm = random_model(kind)
    paths = (lm.write_path(1), lm.write_path(3))
    passes = Passes(lm, rewriting_rows(lm.tokenizer, REQUESTS, ("{}",)), "all")
    losses, slopes = passes.slopes(paths)
    weights = [lm.model.get_submodule(path).weight for path in paths]
    for weight in weights:
        weight.requires_grad_(True)
    part = passes.parts[0]
    loss = passes._losses(part, lm.logits_at(part.batch, part.bucket.places))[:, 0].sum()
    gradients = torch.autograd.grad(loss, weights)
    assert losses[:, 0].min() > 0
    for path, gradient in zip(paths, gradients, strict=True):
        found = slopes[path].gradients.T @ slopes[path].keys
        close(found, gradient if gradient.shape == found.shape and kind != "gpt2" else gradient.T)
