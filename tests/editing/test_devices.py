"""What an editor brings along goes to where its model is."""

from __future__ import annotations

import pytest
import torch

import metake as mk
from metake.editing.gradient.slopes import Slopes


@pytest.mark.parametrize("method", ["mend", "malmen", "smedit"])
def test_a_trained_editor_follows_its_model_to_its_device(method):
    """`meta` is a device without numbers, but with one place: what meets there must be there."""
    lm, editor = mk.load("tiny"), mk.methods.method(method, "tiny")
    state, (where, *_) = editor.init(lm), editor.places(lm).values()
    d_out, d_in = lm.shape(editor.modules[0])
    slopes = Slopes(torch.zeros(3, d_in, device="meta"), torch.zeros(3, d_out, device="meta"))
    found = editor._corrected(where, 0, slopes, state, {})
    assert {found.rows.device.type, found.step.device.type, found.ridge.device.type} == {"meta"}
