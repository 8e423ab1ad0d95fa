"""Where the look-aheads lead from one plan: only what is looked through differs, and what is told is the edits' own."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from models import stand_in

from metake.experiments.studies import look_aheads as module
from metake.experiments.studies import study as studies
from metake.methods import METHODS


def test_only_what_is_looked_through_differs():
    found = module.editors("tiny")
    full = METHODS["metake/whole"]("tiny")
    assert list(found) == [module.NONE, module.LAST, module.FROZEN, module.WHOLE] and found[module.WHOLE] == full
    assert found[module.NONE] == replace(full, refine=None)
    rules = {name: editor.refine for name, editor in found.items() if editor.refine}
    assert {replace(rule, look_ahead="whole", gates="exact") for rule in rules.values()} == {full.refine}
    assert len(set(rules.values())) == 3


@pytest.fixture(scope="module")
def records():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "load", lambda *_: stand_in())
        return module.look_aheads(data={"F": "facts"}, edits=3, text_tokens=3000)


def test_the_whole_look_ahead_leaves_the_lowest_loss_of_the_edited_model(records):
    found = module.summary(records).set_index("look-ahead")
    assert found.edited[module.WHOLE] <= found.edited[module.FROZEN] + 1e-3 < found.edited[module.NONE]
    assert (found.own.drop(module.NONE) < 1).all() and found.own.isna()[module.NONE]
    assert found.fell[module.WHOLE] > 60 and found.moved[module.NONE] < 1e-9
    own = records[records.method == module.WHOLE]
    assert found.efficacy[module.WHOLE] == pytest.approx(100 * own.efficacy.mean())
    assert set(module.differences(records).method) == {module.LAST, module.NONE}


def test_operations_are_counted(monkeypatch):
    monkeypatch.setattr(module, "load", lambda *_: stand_in())
    found = module.operations(edits=2).set_index("look-ahead")["steps of Stage I"]
    assert 1 < found[module.LAST] < found[module.FROZEN] <= found[module.WHOLE]
    assert isinstance(found, pd.Series) and module.NONE not in found.index
