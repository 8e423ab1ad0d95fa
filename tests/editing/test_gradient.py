"""The gradient family: slopes, networks and updates against literal forms, the meta-gradient against differences, and
what every editor promises.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import reference
import torch
from editors import RULES, maps, untrained
from models import CONFIGS, random_model
from reference import double_inside  # noqa: F401 (a fixture)
from same import contents, fingerprint
from transformers.pytorch_utils import Conv1D

from metake import EditCase, EditRequest, NumericalError, ParameterError, Probe, ProvenanceError
from metake.algebra.geometry import Isotropic
from metake.algebra.solve import gate, solve
from metake.editing.gradient import stored, training
from metake.editing.gradient.editor import PLAIN, GradientEditor, corrected
from metake.editing.gradient.network import Moments, Network
from metake.editing.gradient.rule import Corrected, GradientRule, factors
from metake.editing.gradient.slopes import Passes, Slopes
from metake.editing.gradient.training import Training, meta_gradient, train
from metake.language.tokens import encode, rewriting_rows

CASES = [
    EditCase(EditRequest("The capital of {} is", "France", "Rome", "a"), (
        Probe("paraphrase", "France's capital is", "Rome"),
        Probe("neighborhood", "The capital of Spain is", "Madrid"))),
    EditCase(EditRequest("{} was born in", "Danielle Darrieux", "Berlin now", "b"), (
        Probe("paraphrase", "The birth of Danielle Darrieux was in", "Berlin now"),
        Probe("neighborhood", "Beyoncé was born in", "Houston"))),
    EditCase(EditRequest("I fly the {}", "Boeing 747", "English", "c"), (
        Probe("paraphrase", "They fly the Boeing 747", "English"),
        Probe("neighborhood", "I fly the Airbus", "French"))),
]  # fmt: skip
REQUESTS = [case.request for case in CASES]
LATER = [EditRequest("The mother tongue of {} is", "Beyoncé", "French", "d")]
every = pytest.mark.parametrize("kind", CONFIGS)
some = pytest.mark.parametrize("kind", ["gpt2", "llama"])
named = pytest.mark.parametrize("name", RULES)
exact = pytest.mark.usefixtures("double_inside")


@cache
def editor(name: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple:
    lm = random_model(kind, dtype)
    rule = RULES[name]
    if rule.living:
        return lm, GradientEditor(maps(lm), rule)
    made = untrained(lm, rule)
    for network in (n for step in made.networks for n in step):
        network.see(torch.randn(20, network.table.shape[1]))
    return lm, made


# Slopes


@exact
@some
def test_slopes_give_the_gradient_of_the_weight(kind):
    """gᵀK is the weight's own gradient, whatever its storage, in the last block too, for both halves of the loss."""
    lm, paths = random_model(kind), maps(random_model(kind))
    rows = training.outer_rows(lm, CASES, "kl", random.Random(0))
    passes = Passes(lm, rows, "all")
    passes.losses()
    with lm.scratch(paths):  # away from where the drift is zero
        for path in paths:
            lm.write_weight(path, lm.weight(path) * 1.1)
        losses, found = passes.slopes(paths, drift=0.7)
        weights = {path: lm.model.get_submodule(path).weight for path in paths}
        for weight in weights.values():
            weight.requires_grad_()
        part = Passes(lm, rows, "all")
        part.parts = passes.parts
        share = torch.tensor([1.0, 0.7], dtype=torch.float64)
        total = sum((part._losses(p, lm.logits_at(p.batch, p.bucket.places)) @ share).sum() for p in part.parts)
        own = torch.autograd.grad(total, list(weights.values()))
        for weight in weights.values():
            weight.requires_grad_(False)
    assert total.item() == pytest.approx(losses[:, 0].sum().item() + 0.7 * losses[:, 1].sum().item())
    for path, gradient in zip(paths, own, strict=True):
        stored_as = gradient.T if isinstance(lm.model.get_submodule(path), Conv1D) else gradient
        torch.testing.assert_close(found[path].gradients.T @ found[path].keys, stored_as, rtol=1e-10, atol=1e-13)


@exact
@some
@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_slopes_of_a_batch_are_those_of_its_requests(kind, tokens):
    lm = random_model(kind)

    def read(requests):
        return Passes(lm, rewriting_rows(lm.tokenizer, requests, PLAIN), tokens).slopes(maps(lm))

    losses, whole = read(REQUESTS)
    single = [read([request]) for request in REQUESTS]
    torch.testing.assert_close(losses, torch.cat([s[0] for s in single]))
    for path in maps(lm):
        for part in ("keys", "gradients"):
            joined = torch.cat([getattr(s[1][path], part) for s in single])
            torch.testing.assert_close(getattr(whole[path], part), joined, rtol=1e-12, atol=1e-14)
    targets = sum(len(reference.target_ids(lm, r)) for r in REQUESTS)
    assert len(whole[maps(lm)[0]].keys) == targets if tokens == "answer" else len(whole[maps(lm)[0]].keys) > targets


def test_nothing_of_a_pass_stays_behind():
    lm = random_model("gpt2")
    before = fingerprint(lm.model)
    Passes(lm, rewriting_rows(lm.tokenizer, REQUESTS, PLAIN)).slopes(maps(lm))
    assert fingerprint(lm.model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())


# Moments and networks


@pytest.mark.parametrize("cuts", [(40,), (1, 39), (13, 1, 26), (0, 40)])
def test_moments_of_parts_are_those_of_all(cuts):
    rows = torch.randn(sum(cuts), 5, dtype=torch.float64) * 3 + 7
    moments = Moments.of(rows[:0])
    for part in rows.split(list(cuts)):
        moments = moments.joined(Moments.of(part).table)
    expected = (rows.numpy() - rows.numpy().mean(0)) / (rows.numpy().std(0, ddof=1) + 1e-7)
    np.testing.assert_allclose(moments.normalized(rows).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_one_row_has_no_spread_and_gives_numbers():
    assert torch.isfinite(Moments.of(torch.randn(1, 4)).normalized(torch.randn(3, 4))).all()
    assert torch.isfinite(Moments.of(torch.randn(0, 4)).normalized(torch.randn(3, 4))).all()


@pytest.mark.parametrize("inside", [True, False])
def test_a_network_begins_as_the_identity_and_can_leave_it(inside):
    """Its blocks pass the gradient at exactly 0: with an ordinary rectifier nothing but the step would ever learn."""
    network = Network(7, 2, 3, 2, 1e-3, inside, 0, torch.float64)
    rows = torch.randn(9, 7, dtype=torch.float64)
    network.see(rows)
    assert torch.equal(network(rows, 1), network.moments.normalized(rows))
    network(rows, 1).square().sum().backward()
    for learns in (network.up, network.bias):
        assert all(p.grad.abs().sum() > 0 for p in learns)


# Updates


@pytest.mark.parametrize("tokens, width", [(5, 30), (40, 12)])
def test_the_update_is_the_normal_equation_of_malmen(tokens, width):
    """Solved with as many equations as tokens or as inputs: the same, and so are the published gradients."""
    draw = torch.Generator().manual_seed(tokens)
    keys, d, outer = (torch.randn(*size, generator=draw, dtype=torch.float64)
                      for size in ((tokens, width), (tokens, 6), (6, width)))  # fmt: skip
    log_ridge = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    d.requires_grad_()
    ridge = log_ridge.exp()
    delta = d.T @ gate(keys, Isotropic(width, ridge))
    literal = reference.malmen(keys, d, ridge.item())
    torch.testing.assert_close(delta, literal, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(solve(keys, d, Isotropic(width, ridge.item())).gate, gate(keys, Isotropic(width, ridge)))
    found = torch.autograd.grad((outer * delta).sum(), (d, log_ridge))
    inverse = torch.linalg.inv(keys.T @ keys + ridge * torch.eye(width, dtype=torch.float64)).detach()
    torch.testing.assert_close(found[0], keys @ inverse @ outer.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        found[1], -ridge.detach() * ((inverse @ outer.T) * literal.T).sum(), rtol=1e-10, atol=1e-12
    )


@exact
@some
@named
def test_an_edit_is_its_literal_form(name, kind):
    """Token by token, step by step, with the weight's whole gradient by ordinary means."""
    lm, made = editor(name, kind)
    edit = made.edit(lm, REQUESTS)
    expected = reference.gradient_steps(lm, REQUESTS, made)
    for update in edit.updates:
        scale = expected[update.module].norm()
        assert (update.delta - expected[update.module]).norm() <= 1e-9 * scale and scale > 0


def test_the_published_sign_of_mend_climbs():
    lm = random_model("gpt2")
    made = untrained(lm, RULES["mend"], step=1e-3)
    slopes = Passes(lm, rewriting_rows(lm.tokenizer, REQUESTS, PLAIN), "all").slopes(maps(lm))[1]
    for path, (shape, _) in made.places(lm).items():
        made.networks[0][shape].see(slopes[path].rows)

    def change(sign: float) -> float:
        for network in made.networks[0]:
            network.step.data.abs_().mul_(sign)
        trace = made.edit(lm, REQUESTS).record.trace
        return sum(t["nll"][-1] - t["nll"][0] for t in trace.values())

    assert change(1.0) < 0 < change(-1.0)


# Training


def outer_loss(lm, made: GradientEditor, passes: Passes, inner: Passes, keep: float, frozen: list | None = None):
    """The outer loss at the networks as they are, by its definition; frozen: slopes that stay as they are."""
    with torch.no_grad(), lm.scratch(made.modules):
        total = {path: torch.zeros_like(lm.weight(path)) for path in made.modules}
        places = made.places(lm)
        for j, networks in enumerate(made.networks):
            slopes = frozen[j] if frozen else inner.slopes(made.modules)[1]
            for path in made.modules:
                shape, place = places[path]
                left, right = factors(made.rule, slopes[path], corrected(networks[shape], slopes[path], place))
                total[path] += left @ right
                lm.write_weight(path, lm.weight(path) + left @ right)
        losses = passes.losses()
        norm = sum(t.square().sum() for t in total.values())
        return (losses[:, 0].sum() + keep * (losses[:, 1].sum() if made.rule.penalty == "kl" else norm)).item()


def directional(made: GradientEditor, parameters: list, loss) -> tuple[float, float]:
    """⟨gradient, direction⟩ along the gradient itself, by the gradient and by central differences of the loss."""
    directions = [p.grad / p.grad.norm() for p in parameters]
    size, ends = 1e-5, []
    for sign in (1, -1):
        for p, d in zip(parameters, directions, strict=True):
            p.data += sign * size * d
        ends.append(loss())
        for p, d in zip(parameters, directions, strict=True):
            p.data -= sign * size * d
    return sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True)), (
        ends[0] - ends[1]) / (2 * size)  # fmt: skip


@exact
@some
@pytest.mark.parametrize("name", ["malmen", "mend", "norm"])
def test_the_meta_gradient_is_that_of_the_outer_loss(name, kind):
    rule = replace(RULES["malmen"], penalty="norm") if name == "norm" else RULES[name]
    lm, keep = random_model(kind), 0.5
    made = untrained(lm, rule, wild=0.1, step=0.02)
    draw = random.Random(1)
    passes = Passes(lm, training.outer_rows(lm, CASES, rule.penalty, random.Random(1)), "all")
    inner = Passes(lm, rewriting_rows(lm.tokenizer, REQUESTS, PLAIN), rule.tokens)
    passes.losses()
    meta_gradient(lm, made, CASES, Training(keep=keep), draw)
    groups = [g for network in made.networks[0]
              for g in (list(network.down), list(network.up), list(network.bias), list(network.scale),
                        list(network.shift), [network.step], [network.log_ridge])]  # fmt: skip
    seen = 0
    for parameters in groups:
        learns = [p for p in parameters if p.grad is not None and p.grad.norm() > 0]
        if learns:
            told, measured = directional(made, learns, lambda: outer_loss(lm, made, passes, inner, keep))
            assert told == pytest.approx(measured, rel=2e-6, abs=1e-9)
            seen += 1
    assert seen >= (12 if name == "mend" else 14)  # of two shapes; a sum has no ridge


@exact
@some
def test_of_two_steps_the_first_is_first_order(kind):
    """Exact where the slopes are held fixed, and for the last step; live, the first moves the second's slopes."""
    rule, keep = replace(RULES["smedit"], tokens="answer"), 0.3
    lm = random_model(kind)
    made = untrained(lm, rule, wild=0.05, step=0.3)
    passes = Passes(lm, training.outer_rows(lm, CASES, rule.penalty, random.Random(1)), "all")
    inner = Passes(lm, rewriting_rows(lm.tokenizer, REQUESTS, PLAIN), rule.tokens)
    passes.losses()
    meta_gradient(lm, made, CASES, Training(keep=keep), random.Random(1))
    frozen = []
    with torch.no_grad(), lm.scratch(made.modules):
        for networks in made.networks:
            frozen.append(inner.slopes(made.modules)[1])
            for path in made.modules:
                shape, place = made.places(lm)[path]
                left, right = factors(rule, frozen[-1][path], corrected(networks[shape], frozen[-1][path], place))
                lm.write_weight(path, lm.weight(path) + left @ right)
    steps = [[network.step for network in networks] for networks in made.networks]
    for own in steps:
        told, measured = directional(made, own, lambda: outer_loss(lm, made, passes, inner, keep, frozen))
        assert told == pytest.approx(measured, rel=1e-5)
    told, measured = directional(made, steps[1], lambda: outer_loss(lm, made, passes, inner, keep))
    assert told == pytest.approx(measured, rel=1e-5)
    told, measured = directional(made, steps[0], lambda: outer_loss(lm, made, passes, inner, keep))
    assert abs(told / measured - 1) > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["malmen", "mend", "smedit"])
def test_training_leaves_the_model_as_it_was(name, dtype):
    lm = random_model("llama", dtype)
    before = fingerprint(lm.model)
    made = train(lm, CASES, RULES[name], maps(lm), Training(2, 2, rank=3, step=1e-4))
    assert fingerprint(lm.model) == before and not any(p.requires_grad for p in lm.model.parameters())
    assert len(made.trained["losses"]) == 2 and made.trained["ids"] == ["a", "b", "c"]
    assert all(torch.isfinite(t).all() for step in made.networks for n in step for t in n.state_dict().values())


def test_training_learns():
    lm = random_model("gpt2")
    made = train(lm, CASES, RULES["malmen"], maps(lm), Training(3, 25, rank=3, step=1e-3, step_rate=5e-3, keep=0.1))
    losses = [step["after"] for step in made.trained["losses"]]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_what_is_kept_for_evaluation_never_enters_training(monkeypatch):
    lm, seen = random_model("gpt2"), set()
    right = training.meta_gradient

    def watched(lm, made, batch, keep, draw):
        seen.update(case.request.id for case in batch)
        return right(lm, made, batch, keep, draw)

    monkeypatch.setattr(training, "meta_gradient", watched)
    made = train(lm, CASES, RULES["malmen"], maps(lm), Training(1, 8, rank=2), exclude=["b"])
    assert seen == {"a", "c"} == set(made.trained["ids"])
    with pytest.raises(ParameterError, match="only 1 of 3 can be trained on: 2 are kept"):
        train(lm, CASES, RULES["malmen"], maps(lm), Training(2, 1), exclude=["a", "b"])
    with pytest.raises(ParameterError, match="lack a paraphrase"):
        train(lm, [EditCase(r, ()) for r in REQUESTS], RULES["malmen"], maps(lm), Training(2, 1))


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """After an interruption the parameters are those of an undisturbed training, bit for bit."""
    lm, settings = random_model("gpt2"), Training(2, 5, rank=3, every=2)
    whole = train(lm, CASES, RULES["smedit"], maps(lm), settings, out=tmp_path / "whole")
    right, calls = training.meta_gradient, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(training, "meta_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(lm, CASES, RULES["smedit"], maps(lm), settings, out=tmp_path / "parts")
    assert not (tmp_path / "parts" / "record.json").exists()
    with pytest.raises(ParameterError, match="a training with another training"):
        train(lm, CASES, RULES["smedit"], maps(lm), replace(settings, rate=1.0), out=tmp_path / "parts")
    monkeypatch.setattr(training, "meta_gradient", right)
    parts = train(lm, CASES, RULES["smedit"], maps(lm), settings, out=tmp_path / "parts")
    assert parts.digest == whole.digest and parts.trained["losses"] == whole.trained["losses"]
    before = contents(tmp_path / "parts")
    assert train(lm, CASES, RULES["smedit"], maps(lm), settings, out=tmp_path / "parts").digest == parts.digest
    with pytest.raises(ParameterError, match="holds an editor with another training"):
        train(lm, CASES, RULES["smedit"], maps(lm), replace(settings, steps=6), out=tmp_path / "parts")
    assert contents(tmp_path / "parts") == before


def test_a_training_that_breaks_says_so():
    lm = random_model("gpt2")
    before = fingerprint(lm.model)
    with pytest.raises(NumericalError, match="not finite"):
        train(lm, CASES, RULES["mend"], maps(lm), Training(2, 3, rank=3, step=1e200))
    assert fingerprint(lm.model) == before


# What every editor promises


@named
def test_the_record_tells_how_much_of_the_residuals_is_realized(name):
    lm, made = editor(name, "gpt2")
    layers = made.edit(lm, REQUESTS).record.layers
    assert set(layers) == set(maps(lm))
    for told in layers.values():
        assert told["relative_update"] > 0
        assert name == "mend" or -1e-9 <= told["spectrum_min"] <= told["spectrum_max"] < 1


@pytest.mark.parametrize("name", ["malmen", "mend", "smedit"])
def test_a_trained_editor_is_saved_whole_and_belongs_to_its_model(name, tmp_path):
    lm = random_model("gpt2")
    made = train(lm, CASES, RULES[name], maps(lm), Training(2, 1, rank=3), out=tmp_path / "made")
    again = stored.read(tmp_path / "made")
    assert again.digest == made.digest and again.rule == made.rule and again.modules == made.modules
    one, other = made.edit(lm, REQUESTS), again.edit(lm, REQUESTS)
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(one.updates, other.updates, strict=True))
    with pytest.raises(ProvenanceError, match="was trained on"):
        again.edit(random_model("gpt2", seed=1), REQUESTS)
    before = contents(tmp_path / "made")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "mine.txt").write_text("mine")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".mine.lock").write_text("mine")
    for strange in ("strange", "locked"):
        with pytest.raises(ParameterError, match="holds no trained editor"):
            stored.save(made, tmp_path / strange)
    (tmp_path / "begun" / ".checkpoint.0123456789ab.partial").mkdir(parents=True)  # killed in its first checkpoint
    assert stored.read(stored.save(made, tmp_path / "begun")).digest == made.digest
    for file, text in (("editor.safetensors", b"x"), ("record.json", b"{")):
        (tmp_path / "made" / file).write_bytes(text)
        with pytest.raises(ProvenanceError, match="damaged"):
            stored.read(tmp_path / "made")
        (tmp_path / "made" / file).write_bytes(before[file])
    record = json.loads(before["record.json"])
    for modules in ([], {}, "", "ab", None):
        (tmp_path / "made" / "record.json").write_text(json.dumps(record | {"modules": modules}))
        with pytest.raises(ProvenanceError, match="names no linear maps"):
            stored.read(tmp_path / "made")
    with pytest.raises(ProvenanceError, match="holds no trained editor"):
        stored.read(tmp_path)


def test_moments_that_live_on_are_state_and_change_the_next_edit():
    lm, made = editor("ultraedit", "gpt2")
    state = made.init(lm)
    edit, after = made.step(lm, REQUESTS, state)
    again, _ = made.step(lm, REQUESTS, state)
    assert all(torch.equal(a.delta, b.delta) for a, b in zip(edit.updates, again.updates, strict=True))
    assert not made.step(lm, LATER, state)[0].updates[0].delta.equal(made.step(lm, LATER, after)[0].updates[0].delta)
    resumed = state.after(edit, after.keys, len(REQUESTS))
    for i, moments in after.metrics.items():
        assert torch.equal(resumed.metrics[i].table, moments.table)
    counts = {i: int(m.table[0, 0]) for i, m in after.metrics.items()}
    tokens = sum(len(reference.target_ids(lm, r)) for r in REQUESTS)
    assert counts == {0: 2 * tokens, 1: tokens}  # two weights of one shape, one of another


@pytest.mark.parametrize("change", [{"solve": "least square"}, {"tokens": "some"}, {"penalty": "l2"}, {"steps": 0}])
def test_a_rule_refuses_what_it_does_not_know(change):
    with pytest.raises(ParameterError):
        GradientRule(**change)


def test_a_number_and_a_tensor_ridge_agree():
    slopes = Slopes(torch.randn(4, 6).double(), torch.randn(4, 3).double())
    rows = torch.randn(4, 9).double()
    one = factors(GradientRule(), slopes, Corrected(rows, 0.1, 2.0))
    other = factors(GradientRule(), slopes, Corrected(rows, torch.tensor(0.1), torch.tensor(2.0).double()))
    torch.testing.assert_close(one[1], other[1])


# Published differences


def ruled(made: GradientEditor, **changes) -> GradientEditor:
    return replace(made, rule=replace(made.rule, **changes))


@exact
@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_added_is_the_other_sign(name):
    lm, made = editor(name, "gpt2")
    for usual, other in zip(*(e.edit(lm, REQUESTS).updates for e in (made, ruled(made, added=True))), strict=True):
        torch.testing.assert_close(other.delta, -usual.delta)


@exact
def test_normalization_that_goes_on_is_that_of_training_and_all_edits_together():
    lm, made = editor("malmen", "llama")
    usual, living = made.edit(lm, LATER), ruled(made, living=True)
    state = living.init(lm)
    assert all(m.table.equal(made.networks[0][i].table) for i, m in state.metrics.items())
    edit, after = living.step(lm, REQUESTS, state)
    with edit.applied(lm):
        found = living.step(lm, LATER, after)[0]
        slopes = Passes(lm, rewriting_rows(lm.tokenizer, LATER, PLAIN), made.rule.tokens).slopes(made.modules)[1]
        rows: dict[int, list] = {}
        for path, (shape, _) in made.places(lm).items():
            rows.setdefault(shape, []).append(slopes[path].rows)
        grown = replace(made, networks=copy.deepcopy(made.networks))
        for shape, own in rows.items():
            grown.networks[0][shape].table.copy_(after.metrics[shape].joined(Moments.of(torch.cat(own)).table).table)
        expected = grown.edit(lm, LATER)
    for a, b, c in zip(found.updates, expected.updates, usual.updates, strict=True):
        torch.testing.assert_close(a.delta, b.delta, rtol=1e-9, atol=1e-15)
        assert (a.delta - c.delta).norm() > 1e-3 * c.delta.norm()


def test_each_step_of_a_living_normalization_counts():
    lm, made = editor("ultraedit", "gpt2")
    once, twice = (ruled(made, steps=j).step(lm, REQUESTS, made.init(lm))[1].metrics[0].table[0, 0] for j in (1, 2))
    assert twice == 2 * once


@exact
def test_a_last_shorter_micro_batch_has_larger_gradients():
    assert GradientRule(micro=2).shares(5) == [1, 1, 1, 1, 2] and GradientRule().shares(2) == [1, 1]
    assert GradientRule(micro=4).shares(3) == pytest.approx([4 / 3] * 3)
    lm, made = editor("mend", "gpt2")
    made = ruled(made, micro=2)
    found = made.edit(lm, REQUESTS)
    rows = rewriting_rows(lm.tokenizer, REQUESTS, PLAIN)
    own = [row._replace(weight=row.weight * (2 if row.request == 2 else 1)) for row in rows]
    slopes = Passes(lm, own, made.rule.tokens).slopes(made.modules)[1]
    for update in found.updates:
        shape, place = made.places(lm)[update.module]
        left, right = factors(
            made.rule, slopes[update.module], corrected(made.networks[0][shape], slopes[update.module], place)
        )
        torch.testing.assert_close(update.delta, (left @ right).detach(), rtol=1e-9, atol=1e-15)
    plain = ruled(made, micro=0).edit(lm, REQUESTS).record.trace
    assert {i: t["nll"][0] for i, t in found.record.trace.items()} == pytest.approx(
        {i: t["nll"][0] for i, t in plain.items()}
    )
    with pytest.raises(ParameterError, match="micro must not be below 0; found -1"):
        GradientRule(micro=-1)


@pytest.mark.parametrize("outer, count, weight", [("both", 6, 0.5), ("prompt", 3, 1.0), ("paraphrase", 3, 1.0)])
def test_the_outer_loss_asks_for_what_it_is_told(outer, count, weight):
    lm = random_model("gpt2")
    rows = training.outer_rows(lm, CASES, "norm", random.Random(0), outer)
    assert len(rows) == count and {row.request for row in rows} == {0, 1, 2}
    assert all(row.weight * len(row.labels) == pytest.approx(weight) for row in rows)
    prompts = {tuple(encode(lm.tokenizer, r.prompt.format(r.subject))) for r in REQUESTS}
    asked = {tuple(row.ids[: row.read[0] + 1]) for row in rows}
    assert (prompts <= asked) == (outer != "paraphrase") and (asked <= prompts) == (outer == "prompt")
