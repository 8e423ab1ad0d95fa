"""Rows that share their beginnings give what whole rows give, activations and gradients,
wherever the forward starts.
"""

from __future__ import annotations

import pytest
import torch
from models import random_model
from reference import double_inside  # noqa: F401 (a fixture)

from metake.language.capture import Places
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import pad

pytestmark = pytest.mark.usefixtures("double_inside")
ONE, OTHER = (5, 17, 300, 41, 9), (8, 2, 64)
ROWS = [(*ONE, 77, 3), (12, 250, 33), (*OTHER, 27, 90, 1, 4), (*ONE, 6), (*OTHER, 19)]
CUTS = {"shared": [5, 0, 3, 5, 3], "none": [0] * 5, "all of one": [5, 2, 3, 5, 3], "to the last token": [6, 2, 6, 5, 3]}
LAST = torch.tensor([len(row) - 1 for row in ROWS])


@pytest.fixture(params=CUTS)
def cuts(request) -> list[int]:
    return CUTS[request.param]


def assert_close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def whole_states(lm, layer: int) -> torch.Tensor:
    return lm.read(pad(ROWS, lm.device), states=[layer])[1][layer]


def split(states: torch.Tensor, cuts: list[int]) -> Split:
    """The activations of whole rows as beginnings, in order of first appearance, and rests."""
    heads = {ROWS[i][:cut]: states[i, :cut] for i, cut in enumerate(cuts) if cut}
    rest = [states[i, cut : len(row)] for i, (row, cut) in enumerate(zip(ROWS, cuts, strict=True))]
    padded = torch.nn.utils.rnn.pad_sequence
    return Split(padded(list(heads.values()), batch_first=True) if heads else None, padded(rest, batch_first=True))


def test_keys_and_states_are_those_of_whole_rows(lm, cuts):
    run, batch = Prefixed(lm, ROWS, cuts), pad(ROWS, lm.device)
    (keys, states), expected = run.read([0, 2], [1, 2]), lm.read(batch, [0, 2], [1, 2])
    for found, whole in (
        (found[i], whole[i]) for found, whole in zip((keys, states), expected, strict=True) for i in found
    ):
        for i, (row, cut) in enumerate(zip(ROWS, cuts, strict=True)):
            assert_close(found.tail[i, : len(row) - cut], whole[i, cut : len(row)])
            if cut:
                assert_close(found.head[run.of[i], :cut], whole[i, :cut])
    assert (run.head is None) == (not any(cuts))


@pytest.mark.parametrize("after", [-1, 0, 2, 3])
def test_logits_and_gradients_are_those_of_whole_rows_from_any_block(lm, cuts, after):
    run, batch, rows = Prefixed(lm, ROWS, cuts), pad(ROWS, lm.device), torch.arange(len(ROWS))
    push = torch.randn(lm.width, dtype=lm.dtype).requires_grad_()  # moves every position, those of the beginnings too
    states, start = None, Split(None, None)
    if after >= 0:
        states = whole_states(lm, after)
        start = Split(*(t if t is None else t + push for t in split(states, cuts)))
    found = run.logits(after, start, Places.of(rows, LAST - torch.tensor(cuts), run.tail.ids.shape[1]))
    with lm.resumed(after, states if states is None else states + push):
        expected = lm.logits(batch, rows, LAST)
    assert_close(found, expected)
    if after >= 0:
        ours, theirs = (torch.autograd.grad(logits.square().sum(), push)[0] for logits in (found, expected))
        assert ours.norm() > 0
        assert_close(ours, theirs)


def test_a_beginning_runs_once():
    lm, seen = random_model("llama"), []
    lm.block(0).register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    Prefixed(lm, ROWS, CUTS["shared"]).read([], [0])
    assert seen == [(2, 5), (5, 4)], "two beginnings of at most 5 tokens, five rests of at most 4"
