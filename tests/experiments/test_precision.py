"""What 16-bit weights lose of a sequence, against the arithmetic itself."""

import pandas as pd
import pytest
import torch

from metake.experiments.studies import precision as module
from metake.language.model import MASTERED, load


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return module.precision(edits=2, batch=1, text_tokens=1500, out=tmp_path_factory.mktemp("precision"))


def test_rows_say_what_rounding_took_of_the_same_sequence(records):
    once = records.groupby("dtype", sort=False)[["norm", "lost", "restored"]].first()
    assert list(once.index) == list(module.DTYPES) and len(records) == 3 * 2 and once.restored.all()
    full, half, held = (once.lost[dtype] for dtype in module.DTYPES)
    assert full < 1e-3 < held < half < 10, "percent; copies are rounded once, plain weights at every edit"
    assert once.norm.max() / once.norm.min() < 1.1
    assert list(records.attrs["settings"]) == ["edits", "batch", "seeds", "dataset"]


def test_the_computing_weight_is_the_rounded_copy():
    lm = load("tiny", MASTERED)
    path = lm.write_path(0)
    lm.weight(path).add_(1e-6)
    assert torch.equal(module._computing(lm, [path])[path], lm.weight(path).bfloat16().double())


def test_the_table_names_each_precision_and_a_model_that_did_not_come_back(records):
    broken = records.assign(restored=records.dtype != "bfloat16")
    shown = module.table(broken)
    assert list(shown.precision) == ["float32", "bfloat16", "bfloat16, summed in float32"]
    assert list(shown["taken back"]) == ["bit for bit", "no", "bit for bit"]
    assert shown.efficacy.between(0, 100).all() and shown.shape[1] == 7


def test_what_is_finished_is_kept(records, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_sequence", lambda *given: [{"dtype": given[1], "id": "0"}])
    pd.testing.assert_frame_equal(
        module.precision(edits=1, out=tmp_path), module.precision(edits=1, out=tmp_path)
    )
    monkeypatch.setattr(module, "_sequence", lambda *given: pytest.fail("made again"))
    assert len(module.precision(edits=1, out=tmp_path)) == 3
