"""Keys and states: cut rows, shared padding and resumed forwards give what full forwards of single prompts give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import reference
import torch
from models import CONFIGS, random_model
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)

from metake.editing.keys import KeyReader
from metake.language.model import LanguageModel

pytestmark = pytest.mark.usefixtures("double_inside", "as_in_large_batches")
MORE = (*CONTEXTS, "You know. {}", "Rome, Berlin and French. {}")


@contextmanager
def edited_step_by_step(lm: LanguageModel) -> Iterator:
    """A function that adds a random update to the weight of a layer; all are taken back in the end."""
    kept = {layer: reference.weight(lm, layer).detach().clone() for layer in range(lm.depth)}

    def edit(layer: int) -> None:
        draw = torch.Generator().manual_seed(layer)
        weight = reference.weight(lm, layer)
        weight.data += 0.1 * torch.randn(weight.shape, dtype=weight.dtype, generator=draw)

    try:
        yield edit
    finally:
        for layer, weight in kept.items():
            reference.weight(lm, layer).data.copy_(weight)


@contextmanager
def blocks_run(lm: LanguageModel) -> Iterator[list[int]]:
    """Layers whose attention was computed, in order."""
    seen: list[int] = []
    handles = [
        lm.model.get_submodule(lm.architecture.attention.format(i)).register_forward_hook(
            lambda *_, i=i: seen.append(i)
        )
        for i in range(lm.depth)
    ]
    yield seen
    for handle in handles:
        handle.remove()


def assert_literal(lm: LanguageModel, found, layer: int, last: int, contexts=CONTEXTS, requests=REQUESTS) -> None:
    keys, state, *_ = found
    assert keys.dtype == state.dtype == torch.float64
    assert (keys.T - reference.keys(lm, requests, contexts, layer)).abs().max() <= 1e-12
    assert (state.T - reference.states(lm, requests, last)).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", CONFIGS)
def test_keys_while_lower_layers_are_edited(kind: str, monkeypatch):
    """Every read equals full forwards through the edited model, and computes only the blocks the last edit reaches:
    once for the beginnings that rows share, once for the rows."""
    lm = random_model(kind)
    monkeypatch.setattr("metake.language.model.start_cost", lambda _: 10**6)  # one bucket: blocks are counted
    before = reference.keys(lm, REQUESTS, CONTEXTS, 3)
    with reference.unchanged(lm), edited_step_by_step(lm) as edit:
        reader = KeyReader(lm, REQUESTS, CONTEXTS, last=3)
        for layer, computed in ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (3, [1, 2, 3])):
            with blocks_run(lm) as run:
                found = reader.read(layer)
            assert run == 2 * computed
            assert_literal(lm, found, layer, last=3)
            edit(layer)
        assert (found[0].T - before).abs().max() > 1e-2  # the edits below were seen


@pytest.mark.parametrize(
    "layers, tokens", [((2,), 30), ((0,), 1), ((1, 2), 1), ((0, 1, 3), 30), ((0, 1, 3), 10**6)], ids=str
)
def test_any_layers_any_micro_batch(layers: tuple[int, ...], tokens: int):
    """Also when a micro-batch holds no plain prompt, whose states are read beside the keys."""
    lm = random_model("llama")
    with edited_step_by_step(lm) as edit:
        reader = KeyReader(lm, REQUESTS, MORE, layers[-1], tokens)
        for layer in layers:
            assert_literal(lm, reader.read(layer), layer, layers[-1], MORE)
            edit(layer)


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_a_reader_may_look_at_the_last_layer_first_and_then_start_below(kind: str):
    """As the editor does: the refinement's gate, then Stage II from the first layer."""
    lm = random_model(kind)
    with edited_step_by_step(lm) as edit:
        reader = KeyReader(lm, REQUESTS, CONTEXTS, last=3)
        for layer in (3, 1, 3):
            assert_literal(lm, reader.read(layer), layer, last=3)
            edit(layer)


def test_keys_are_averaged_within_a_type_of_context_then_over_types():
    lm = random_model("gpt2")
    plain, whole = (KeyReader(lm, REQUESTS, c, 1).read(1)[0] for c in (MORE[:1], MORE))
    others = torch.stack([KeyReader(lm, REQUESTS, [c], 1).read(1)[0] for c in MORE[1:]])
    assert (whole - (plain / 2 + others.sum(0) / 8)).abs().max() < 1e-12
    assert_literal(lm, (plain, KeyReader(lm, REQUESTS, MORE[:1], 1).read(1)[1]), 1, 1, MORE[:1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_flat_means_the_plain_key_and_what_the_mlp_puts_out(kind: str):
    """ROME's and PMET's reads: k̄ over all contexts alike, the plain prompt's k, and the written module's output with
    its bias.
    """
    lm = random_model(kind)
    with edited_step_by_step(lm) as edit:
        reader = KeyReader(lm, REQUESTS, MORE, last=2, flat=True, site="mlp")
        for layer in (0, 1, 2):
            found = reader.read(layer)
            rows = [
                [reference.at_lookup(lm, t, r.subject, layer).key for t in reference.templates(r, MORE)]
                for r in REQUESTS
            ]
            assert (found.keys - torch.stack([sum(row) / len(MORE) for row in rows])).abs().max() <= 1e-12
            assert (found.plain - torch.stack([row[0] for row in rows])).abs().max() <= 1e-12
            assert (found.current.T - reference.states(lm, REQUESTS, 2, "mlp")).abs().max() <= 1e-12
            edit(layer)
        assert (found.current.T - reference.states(lm, REQUESTS, 2, "mlp")).abs().max() > 1e-3, (
            "an output does not follow its weight"
        )


@pytest.mark.parametrize("tokens", [1, 8192])
def test_current_values_of_another_layer_than_the_last(tokens: int):
    """BLUE: each layer's own, on the model that the layers before have changed; MetaKE's gate is read there before."""
    lm = random_model("qwen3")
    with edited_step_by_step(lm) as edit:
        reader = KeyReader(lm, REQUESTS, CONTEXTS, last=3, tokens=tokens)
        for layer in (0, 2, 3):
            for found in (reader.read(layer), reader.read(layer, layer)):
                assert (found.keys.T - reference.keys(lm, REQUESTS, CONTEXTS, layer)).abs().max() <= 1e-12
            assert (found.current.T - reference.states(lm, REQUESTS, layer)).abs().max() <= 1e-12
            edit(layer)


def test_what_follows_the_subject_plays_no_part():
    """Rows are cut there: a prompt that goes on differently has the same key, one that begins differently has not."""
    lm = random_model("qwen3")
    one, other, third = (
        KeyReader(lm, [type(REQUESTS[0])(p, "Rome", "a", "x")], CONTEXTS, 2).read(2)
        for p in ("The {} is", "The {}, and that of", "Of {} is")
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert (one[0] - third[0]).abs().max() > 1e-3


def test_zero_requests():
    keys, state, _ = KeyReader(random_model("gpt2"), [], CONTEXTS, 2).read(1)
    assert keys.shape == (0, 128) and state.shape == (0, 32)
