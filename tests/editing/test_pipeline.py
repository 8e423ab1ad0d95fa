"""Sequences of batches of every closed-form editor are the literal algorithm: Stage I one request at a time, a replaced
weight in the refinement, d×d solves and full rereads in Stage II, past keys that later batches remember, and whatever a
method does to an update, to a batch, or to the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import pytest
import reference
import torch
from models import random_model, text_statistics
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)
from test_targets import PULLED
from torch import Tensor

from metake.algebra.geometry import KeyStatistics, inverse_covariance, null_space
from metake.editing.editor import Editor
from metake.editing.outer import Refinement
from metake.editing.targets import TargetRule
from metake.language.model import LanguageModel
from metake.methods import DIFFERENCES, METHODS, OPERATORS, method
from metake.support.errors import NumericalError

pytestmark = pytest.mark.usefixtures("double_inside", "as_in_large_batches")
LAYERS = (0, 1, 2)
RULE = TargetRule(steps=4, step_size=0.3, stop_below=5.5)
MEMIT = Editor(LAYERS, inverse_covariance(0.05), RULE, contexts=CONTEXTS)
ALPHAEDIT = replace(MEMIT, metric=null_space(3e-2, 0.5), remember=True)
LOOK_AHEAD = Refinement(steps=3, step_size=0.05)
Solve = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # K, R, C, Kₚ → Δ


def memit(K: Tensor, R: Tensor, C: Tensor, _: Tensor) -> Tensor:
    return reference.memit(K, R, 0.05 * C, 1.0)


def memit_seq(K: Tensor, R: Tensor, C: Tensor, Kp: Tensor) -> Tensor:
    return reference.memit(K, R, 0.05 * C, 1.0, Kp)


def alphaedit(K: Tensor, R: Tensor, C: Tensor, Kp: Tensor, threshold: float = 3e-2, ridge: float = 0.5) -> Tensor:
    return reference.alphaedit_code(K, R, reference.projector(C, threshold), ridge, Kp)


def v1(K: Tensor, R: Tensor, C: Tensor, _: Tensor) -> Tensor:
    return R @ reference.gate_v1(K, 0.05 * C, 0.01)


def emmet(K: Tensor, R: Tensor, C: Tensor, _: Tensor) -> Tensor:
    return reference.emmet(K, R, C, 0.0)


class Published(NamedTuple):
    """What a paper or its code does in the shared loop, with the numbers of these tests."""

    solve: Solve
    gate: Solve | None = None  # of the refinement; R is then the identity
    share: Callable[[int], float] = lambda left: 1 / left
    of: str = "block"  # whose output the residual is missing from
    own: bool = False  # BLUE's loop
    each: Callable[[Tensor, Tensor], Tensor] = lambda delta, _: delta  # before a layer is written, with its weight
    # the finished updates, with the weight that the batch found
    batch: Callable[[Tensor, Tensor], Tensor] = lambda delta, _: delta
    end: Callable[[Tensor, Tensor], Tensor] = lambda weight, _: weight  # the weight after the last batch, and the first


def key_only(K: Tensor, R: Tensor, *_: Tensor) -> Tensor:
    return R @ reference.gate_key_only(K, 0.5)


soft = partial(reference.sphere, ratio=0.5, strength=0.5)
PUBLISHED = {
    "memit": Published(memit),
    "memit_seq": Published(memit_seq),
    "emmet": Published(emmet),
    "pmet": Published(lambda K, R, C, _: reference.pmet(K, R, C, 0.05), share=lambda left: left**-0.5, of="mlp"),
    "prune": Published(memit, end=reference.prune),
    "rect": Published(memit, batch=reference.rect_code),
    "alphaedit": Published(alphaedit),
    "blue": Published(alphaedit, own=True),
    "sphere": Published(alphaedit, each=soft),
    "metake": Published(alphaedit, alphaedit),
    "metake/whole": Published(alphaedit, alphaedit),
    "metake/literal": Published(alphaedit, alphaedit),
    "metake_v1": Published(v1, v1),
    "prune/added-twice": Published(memit, end=partial(reference.prune, twice=True)),
    "rect/original": Published(memit, batch=reference.rect_original),
    "sphere/stored": Published(alphaedit, each=partial(soft, transposed=True)),
    "alphaedit/paper": Published(
        lambda K, R, C, Kp: reference.alphaedit_paper(K, R, reference.projector(C, 1e-2), 1.0, Kp)
    ),
    "key-only gate": Published(alphaedit, key_only),
    "one layer, exact": Published(
        lambda K, R, C, _: reference.emmet(K, R, 0.05 * C, 0.0), lambda K, R, C, _: reference.emmet(K, R, 0.05 * C, 0.0)
    ),
    "whole residual": Published(memit, share=lambda _: 1.0),
}
PUBLISHED["pmet/unweighted"] = PUBLISHED["pmet"]
# whatever looks ahead, it does so through its base's gate
PUBLISHED |= {n: base._replace(gate=base.solve) for n in OPERATORS for base in [PUBLISHED[n.rpartition("/")[2]]]}
# what makes PMET's rules act
PULL = {"steps": 7, "step_size": 1.0, "kl_weight": 4.0, "clamp": 8.0, "stop_below": 0.0, "drift_below": 0.7}
# residuals long enough for changes that PRUNE caps
CAP = {"steps": 6, "step_size": 1.0, "clamp": 8.0, "stop_below": 0.0}
OTHERS = {
    "key-only gate": replace(ALPHAEDIT, refine=replace(LOOK_AHEAD, gate="key_only")),
    "one layer, exact": replace(MEMIT, layers=(1,), noise=0.0, refine=LOOK_AHEAD),
    "whole residual": replace(MEMIT, allocation=lambda index, count: 1.0),
}


def editor(name: str) -> Editor:
    """A method as its function builds it, with numbers for a random model; a difference keeps the numbers that it is
    about.
    """
    if name in OTHERS:
        return OTHERS[name]
    found, family = method(name, "tiny"), name.partition("/")[0]
    numbers = {"rome": CAP, "prune": CAP, "pmet": PULL}.get(
        family, {"steps": 4, "step_size": 0.3, "stop_below": 5.5, "clamp": 0.75}
    )
    changes: dict = {"contexts": CONTEXTS, "target": replace(found.target, **numbers)}
    if family not in ("rome", "emmet"):
        changes["layers"] = (0, 2) if found.own_targets else LAYERS
        metric = (
            null_space(3e-2, 0.5)
            if isinstance(found.metric, null_space)
            else inverse_covariance(0.05, 0.01 if name == "metake_v1" else 0.0)
        )
        changes["metric"] = found.metric if name == "alphaedit/paper" else metric
    own = found.refine and {"look_ahead": found.refine.look_ahead, "keep": found.refine.keep}
    refine = found.refine and replace(LOOK_AHEAD, **own)
    return replace(method(name, "tiny", **changes), refine=refine)


def asked(name: str) -> list[Sequence]:
    requests = PULLED[2:] if name.startswith("pmet") else REQUESTS
    return [requests[:2], requests[2:]]


@cache
def small(kind: str) -> tuple[LanguageModel, dict[int, KeyStatistics]]:
    lm = random_model(kind)
    return lm, text_statistics(lm, LAYERS)


def literal_batch(
    lm: LanguageModel, name: str, requests: Sequence, given: Editor, C: dict[int, Tensor], past: dict[int, Tensor]
) -> reference.Batch:
    """Δ and K per layer of one batch."""
    rule, layers = given.target, given.layers
    if name == "rome":
        return reference.rome_one_by_one(lm, requests, CONTEXTS, layers[0], rule, C[layers[0]])
    how = PUBLISHED[name]

    def update(layer: int, K: Tensor, R: Tensor) -> Tensor:
        return how.each(how.solve(K, R, C[layer], past[layer]), reference.plain_weight(lm, layer))

    def targets(layer: int) -> Tensor:
        planned = [reference.stage_one(lm, r, CONTEXTS, layer, rule) for r in requests]
        H, delta = (torch.stack(part, 1) for part in list(zip(*planned, strict=True))[:2])
        if how.gate is None:
            return H + delta
        K = reference.keys(lm, requests, CONTEXTS, layer)
        M = how.gate(K, reference.eye(K.shape[1]), C[layer], past[layer])  # the gate is what writes the identity
        if given.refine.look_ahead == "whole":
            edited = reference.all_layers(lm, requests, CONTEXTS, layers, update)
        else:
            edited = reference.last_layer(lm, layer, H, M)
        return reference.refinement(lm, requests, CONTEXTS, H + delta, edited, given.refine)[0]

    if how.own:
        deltas, keys = reference.blue(lm, requests, CONTEXTS, layers, targets, update)
    else:
        deltas, keys = reference.stage_two(
            lm, requests, CONTEXTS, layers, targets(layers[-1]), update, how.share, how.of
        )
    return {layer: how.batch(delta, reference.plain_weight(lm, layer)) for layer, delta in deltas.items()}, keys


def compare(name: str, kind: str) -> None:
    """Two batches and the end of the sequence, on a model that the literal updates edit."""
    (lm, statistics), given = small(kind), editor(name)
    state, C = given.init(lm, statistics), {layer: statistics[layer].covariance for layer in given.layers}
    past = {layer: torch.zeros(statistics[layer].dim, 0, dtype=torch.float64) for layer in given.layers}
    first = {layer: reference.plain_weight(lm, layer) for layer in given.layers}
    with reference.kept(lm, given.layers):
        for requests in asked(name):
            with reference.unchanged(lm):
                edit, state = given.step(lm, requests, state)
            deltas, keys = literal_batch(lm, name, requests, given, C, past)
            assert edit.modules == tuple(lm.write_path(layer) for layer in given.layers)
            for update, layer in zip(edit.updates, given.layers, strict=True):
                assert (update.delta - deltas[layer]).norm() <= 1e-9 * deltas[layer].norm() > 0
                assert update.rank == (0 if update.dense is not None else len(requests))
                reference.write(lm, layer, deltas[layer])
            past = {layer: torch.cat([past[layer], keys[layer]], 1) for layer in given.layers}
        assert state.edits == sum(map(len, asked(name)))
        compare_end(lm, name, given, state, first)


def compare_end(lm: LanguageModel, name: str, given: Editor, state, first: dict[int, Tensor]) -> None:
    last = given.finish(lm, state)
    wanted = (
        {layer: PUBLISHED[name].end(reference.plain_weight(lm, layer), first[layer]) for layer in given.layers}
        if name in PUBLISHED
        else {}
    )
    if last is None:
        assert all(torch.equal(reference.plain_weight(lm, layer), weight) for layer, weight in wanted.items()), (
            "the literal form ends with something"
        )
        return
    changed = False
    with last.applied(lm, check=False):
        for layer in given.layers:
            assert (reference.plain_weight(lm, layer) - wanted[layer]).norm() <= 1e-9 * (
                wanted[layer] - first[layer]
            ).norm()
    for layer in given.layers:
        changed |= bool((reference.plain_weight(lm, layer) - wanted[layer]).norm() > 1e-3 * first[layer].norm())
    assert changed, "nothing was capped: the test is too easy"


NAMES = [*METHODS, *OPERATORS, *DIFFERENCES, *OTHERS]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "alphaedit/paper"])
def test_a_sequence_is_the_literal_algorithm(name: str):
    compare(name, "qwen3")


@pytest.mark.parametrize("name, kind", [
    ("alphaedit", "gpt2"), ("alphaedit/paper", "gpt2"), ("metake", "gpt2"), ("pmet", "gpt2"), ("rome", "gpt2"),
    ("blue", "gpt2"), ("rect", "gpt2"), ("prune", "gpt2"),
    ("sphere", "gpt2"), ("sphere/stored", "gpt2"), ("metake", "gptj"), ("pmet", "gptj"), ("rome", "gptj"),
    ("alphaedit/paper", "gptj"), ("emmet", "phi"), ("rome", "phi"),
    ("metake", "llama"), ("rome", "llama"), ("pmet", "gpt_neox"),
])  # fmt: skip
def test_a_sequence_is_the_literal_algorithm_on_other_architectures(name: str, kind: str):
    """Conv1D stores weights transposed; parallel blocks and biases of the written module are seen by ROME and PMET."""
    compare(name, kind)


def whole(name: str, kind: str = "gpt2") -> Tensor:
    """Everything that a sequence of two batches adds to the weights."""
    (lm, statistics), given = small(kind), editor(name)
    state, total = given.init(lm, statistics), 0
    with reference.kept(lm, given.layers):
        for requests in asked(name):
            edit, state = given.step(lm, requests, state)
            edit.apply(lm)
            total = total + torch.cat([u.delta.flatten() for u in edit.updates])
        last = given.finish(lm, state)
    return total + torch.cat([u.delta.flatten() for u in last.updates]) if last else total


def test_the_parts_that_differ_give_different_updates():
    lm, statistics = small("qwen3")
    # `editor` makes the same of all readings what the literal one differs in
    names = [n for n in NAMES if n not in DIFFERENCES and "/literal" not in n and editor(n).layers == LAYERS]
    first = {
        name: torch.cat(
            [
                u.delta.flatten()
                for u in editor(name).step(lm, REQUESTS[:3], editor(name).init(lm, statistics))[0].updates
            ]
        )
        for name in names
    }
    assert torch.equal(first.pop("memit_seq"), first["memit"])  # a first batch has nothing to remember
    assert len(first) >= 12
    for name, delta in first.items():
        assert all(
            (delta - other).norm() > 1e-4 * delta.norm() for other_name, other in first.items() if other_name != name
        )


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_published_difference_changes_the_result(name: str):
    found, usual = whole(name), whole(name.partition("/")[0])
    assert (found - usual).norm() > 1e-2 * usual.norm()


@pytest.mark.parametrize("name", NAMES)
def test_zero_requests_give_a_zero_update(name: str):
    (lm, statistics), given = small("gpt2"), editor(name)
    before = given.init(lm, statistics)
    with reference.unchanged(lm):
        edit, after = given.step(lm, [], before)
    assert [tuple(u.delta.shape) for u in edit.updates] == [(32, 128)] * len(given.layers)
    assert all(not u.delta.any() and u.rank == 0 for u in edit.updates)
    assert after is before and given.finish(lm, after) is None


def test_an_error_in_the_middle_of_stage_two_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch):
    lm, statistics = small("gpt2")
    written = []

    def fail(*_):
        written.append(not torch.equal(before, lm.weight(lm.write_path(0))))
        if len(written) == 2:
            raise NumericalError("a fault")
        return 0.5

    before = lm.weight(lm.write_path(0)).clone()
    with reference.unchanged(lm), pytest.raises(NumericalError, match="a fault"):
        replace(ALPHAEDIT, allocation=fail).edit(lm, REQUESTS[:2], statistics)
    assert written == [False, True]  # the first layer had been written when the fault came


@pytest.mark.parametrize("name", ["metake", "metake/blue", "rome"])
def test_one_edit_tokenizes_each_text_once(name: str):
    """Keys, targets, gate and refinement of a hundred requests read the same token rows."""
    lm, asked = random_model("gpt2"), []
    tokenizer = lm.tokenizer

    def count(text: str, **options: object) -> object:
        asked.append((text, options.get("add_special_tokens", True)))
        return tokenizer(text, **options)

    requests = [replace(REQUESTS[i % 4], subject=f"Rome {i}", id=str(i)) for i in range(100 if name != "rome" else 8)]
    editor = method(name, "tiny", layers=LAYERS[1:2] if name == "rome" else LAYERS[:2], contexts=CONTEXTS)
    editor = replace(editor, target=replace(editor.target, steps=1), metric=inverse_covariance(0.05))
    editor = replace(editor, refine=editor.refine and replace(editor.refine, steps=1))
    state = editor.init(lm, text_statistics(lm, editor.layers))
    lm.tokenizer = count
    editor.step(lm, requests, state)
    assert len(asked) == len(set(asked)) and len(asked) >= len(requests) * (len(CONTEXTS) + 1)
