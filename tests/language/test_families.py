"""Families whose blocks differ: flat or tuple outputs, sums in place, a residual handed along, a scale. What is read
and continued of them is what the plain model computes, to float32, in which their norms and attention compute.
"""

from __future__ import annotations

import pytest
import torch
from models import CONFIGS, MORE, random_model
from same import fingerprint

from metake import ARCHITECTURES, LayerUpdate
from metake.language.capture import Places, hidden
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import pad

ROWS = [(5, 17, 300, 41, 9, 77), (12, 250, 33), (5, 17, 300, 41, 8, 19, 27), (3, 2)]
CUTS = [4, 0, 4, 1]
VARIANTS = [(kind, {}) for kind in MORE] + [
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}), ("falcon", {"parallel_attn": False}),
    ("falcon", {"alibi": True}), ("stablelm", {"use_parallel_residual": True}), ("opt", {"word_embed_proj_dim": 16}),
    ("gpt_neox", {"use_parallel_residual": False}), ("cohere", {"use_qk_norm": True}), ("phi3", {"sliding_window": 3}),
]  # fmt: skip
every = pytest.mark.parametrize(("kind", "changes"), VARIANTS, ids=str)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def plain(lm, row, layer):
    """Key, block output and logits at every position of one row, by hooks of our own on the model alone."""
    seen = {}
    handles = [
        lm.write(layer).register_forward_hook(lambda _, args, __: seen.update(key=args[0].view(len(row), -1))),
        lm.block(layer).register_forward_hook(lambda _, __, out: seen.update(state=hidden(out)[0])),
    ]
    logits = lm.model(torch.tensor([row]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return seen["key"], seen["state"], logits


def test_every_row_of_the_table_is_tried():
    assert (CONFIGS | MORE).keys() == ARCHITECTURES.keys()


@every
def test_padded_and_continued_rows_are_plain_ones(kind, changes):
    lm = random_model(kind, **changes)
    expected, run = [plain(lm, row, 2) for row in ROWS], Prefixed(lm, ROWS, CUTS)
    with torch.no_grad():
        keys, states = lm.read(pad(ROWS, lm.device), [2], [2])
        own_keys, own_states = run.read([2], [2])
        places = Places.of(torch.arange(4), torch.tensor([len(r) - 1 - c for r, c in zip(ROWS, CUTS, strict=True)]),
                           run.tail.ids.shape[1])  # fmt: skip
        below = run.read([], [0])[1][0]
        logits = [run.logits(-1, Split(None, None), places), run.logits(0, below, places)]
    for i, (row, cut, (key, state, last)) in enumerate(zip(ROWS, CUTS, expected, strict=True)):
        close(keys[2][i, : len(row)], key)
        close(states[2][i, : len(row)], state)
        close(own_keys[2].tail[i, : len(row) - cut], key[cut:])
        close(own_states[2].tail[i, : len(row) - cut], state[cut:])
        for found in logits:
            close(found[i], last[-1])


@every
def test_an_update_moves_the_block_by_what_is_written_times_its_scale(kind, changes):
    lm, batch = random_model(kind, **changes), pad(ROWS, torch.device("cpu"))
    path, before = lm.write_path(1), fingerprint(lm.model)
    update = LayerUpdate(path, torch.randn(lm.width, 2).double(), torch.randn(2, lm.shape(path)[1]).double())
    with torch.no_grad():
        keys, old = lm.read(batch, [1], [1])
        with lm.scratch([path]):
            lm.add(path, update)
            new = lm.read(batch, [1], [1])[1]
    assert lm.scale == (0.22 if kind == "granite" else 1.0)
    close((new[1] - old[1])[batch.mask.bool()], (lm.scale * keys[1] @ update.delta.T)[batch.mask.bool()], 1e-9)
    assert fingerprint(lm.model) == before
