"""How much text the gate needs: statistics of a growing text, what P and C become, edits with each, the verdicts."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from models import stand_in

import metake as mk
from metake import report
from metake.algebra.geometry import InverseCovariance, NullSpace
from metake.editing.statistics import token_rows
from metake.editing.texts import documents
from metake.experiments.studies import text_needed as module
from metake.support.errors import ParameterError, StatisticsError

SETTINGS = {"multiples": (1, 2, 5, 9), "edits": 2, "text_tokens": 1500}
PLANNED = {"target": mk.TargetRule(steps=2, step_size=0.5), "contexts": ("{}", "So. {}"), "layers": (1, 2)}


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        made = module.methods.method
        patch.setattr(module, "load", stand_in)
        patch.setattr(module.methods, "method", lambda name, model: made(name, model, **PLANNED))
        yield patch


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def records(patched, out):
    return module.text_needed(**SETTINGS, out=out)


def test_amounts_are_beginnings_of_one_text(records):
    lm = stand_in()
    rows = token_rows(lm, documents("embedded"), 1500)
    assert sorted(records.multiple.unique()) == [1, 2, 5, 12], "9 are more than half of the text"
    amounts = records.groupby("multiple").tokens.first()
    assert amounts[12] == 1500 and amounts[5] == 640 and all(m * 128 <= amounts[m] < m * 128 + 128 for m in (1, 2))
    grown = list(module.growing(lm, rows, [1, 2], [128, 1500]))
    whole = mk.statistics(lm, layers=[1, 2], tokens=1500, cache=False)
    for layer in (1, 2):
        torch.testing.assert_close(grown[-1][layer].moment, whole[layer].moment)
    count, taken = grown[0][1].count, []
    while sum(map(len, taken)) < count:
        taken.append(rows[len(taken)])
    torch.testing.assert_close(grown[0][2].moment, module.stream(lm, taken, [2], 900)[2].moment)


def test_what_p_and_c_become(records):
    lm = stand_in()
    rows = token_rows(lm, documents("embedded"), 1500)
    few, whole = module.growing(lm, rows, [1, 2], [128, 1500])
    threshold = mk.methods.method("alphaedit", "tiny").metric.threshold
    own = records[records.layer.notna()].set_index(["multiple", "method", "layer"])
    used, found = whole[2].covariance, own.loc[1, "alphaedit", 2]
    thin = [torch.linalg.eigh(s[2].covariance) for s in (few, whole)]
    few_basis, whole_basis = (vectors[:, values < threshold] for values, vectors in thin)
    assert found["rank"] == few_basis.shape[1] == NullSpace(few[2], threshold=threshold).rank
    cosines = torch.linalg.svdvals(few_basis.T @ whole_basis).clamp(-1, 1)
    assert found.angle == pytest.approx(cosines.arccos().rad2deg().mean().item(), abs=1e-4)
    assert found.largest == pytest.approx(cosines.arccos().rad2deg().max().item(), abs=1e-4)
    left = torch.trace(few_basis @ few_basis.T @ used) / torch.trace(used)
    assert found.open == pytest.approx(100 * left.item())
    apart = (few[2].covariance - used).norm() / used.norm()
    assert own.loc[1, "memit", 2].distance == pytest.approx(100 * apart.item())
    last = own.loc[12]
    assert last.turned.max() < 1e-3 and last.largest.max() < 1e-3 and last.distance.max() < 1e-9


def test_scores_are_those_of_an_edit_with_these_statistics(records):
    lm = stand_in()
    cases = module.select(lm, module.read_cases("facts"), 2, 0)
    given = {n: mk.statistics(lm, layers=[1, 2], tokens=tokens) for n, tokens in ((5, 640), (12, 1500))}
    for multiple, method in product((5, 12), module.METHODS):
        edit = module.methods.method(method, "tiny").edit(lm, [c.request for c in cases], given[multiple])
        with edit.applied(lm):
            expected = mk.evaluate(lm, cases)
        own = records[(records.multiple == multiple) & (records.method == method)].set_index("id")
        for row, case in zip(expected.records(), expected.cases, strict=True):
            assert own.log_p[row["id"]] == pytest.approx(module.likelihood(case)["log_p"])
            assert own.loc[row["id"], list(module.SCORES)].tolist() == [row[s] for s in module.SCORES]


def test_what_is_finished_is_read_again(records, patched, out):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stream", "evaluate"):
            patch.setattr(module, name, None)
        again = module.text_needed(**SETTINGS, out=out)
    pd.testing.assert_frame_equal(again, records, check_like=True)


def test_statistics_that_are_refused_write_nothing(patched, monkeypatch):
    usual = InverseCovariance.__init__

    def refusing(self, statistics, *args, **named):
        if module.KeyStatistics is type(statistics) and statistics.count < 300:
            raise StatisticsError("singular")
        usual(self, statistics, *args, **named)

    monkeypatch.setattr(InverseCovariance, "__init__", refusing)
    lm, found = stand_in(), module.text_needed(**SETTINGS | {"multiples": (1, 5)})
    own = found[(found.multiple == 1) & (found.method == "memit")]
    assert own.refused.all() and own[own.layer.notna()].turned.isna().all()
    before = mk.evaluate(lm, module.select(lm, module.read_cases("facts"), 2, 0))
    assert own[own.id.notna()].log_p.tolist() == pytest.approx([module.likelihood(c)["log_p"] for c in before.cases])
    assert not found[found.multiple == 5].refused.any()
    table = module.scores(found).set_index(["multiple", "method"])
    assert table.refused[1, "memit"] and not table.refused[1, "alphaedit"]


def test_a_text_that_cannot_be_compared_is_refused(patched):
    with pytest.raises(ParameterError, match="200 tokens of text are less than twice 1 for each of 128 dimensions"):
        module.text_needed(text_tokens=200, edits=2)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0])
def test_principal_angles(degrees):
    turn = np.deg2rad(degrees)
    one = torch.eye(4, dtype=torch.float64)[:, :2]
    other = torch.tensor([[1.0, 0, 0], [0, np.cos(turn), 0], [0, np.sin(turn), 0], [0, 0, 1.0]], dtype=torch.float64)
    assert module.principal_angles(one, other).tolist() == pytest.approx([0, degrees], abs=1e-5)
    assert module.principal_angles(other, one).tolist() == pytest.approx([0, degrees], abs=1e-5)


def made(lost: dict[int, float], requests: int = 60, spread: float = 0.0) -> pd.DataFrame:
    """Records of both methods of which `lost` of efficacy is missing at some amounts."""
    draw, rows = np.random.default_rng(0), []
    for method, multiple, i in product(module.METHODS, (1, 5, 10, 50, 99), range(requests)):
        noise = spread * draw.standard_normal()
        short = lost.get(multiple, 0) if method == "memit" else 0
        rows.append({"multiple": multiple, "tokens": 100 * multiple, "method": method, "id": str(i), "layer": None,
                     "efficacy": 1 - short + noise, "generalization": 0.5, "specificity": 0.5, "log_p": 0.0,
                     "refused": False})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("records", "holds"), [
    (made({1: 0.3}), True), (made({1: 0.3, 5: 0.2}), True), (made({}), False), (made({1: 0.3, 10: 0.2}), False),
    (made({1: 0.05}), False), (made({1: 0.3}, requests=20), None), (made({1: 0.3}, spread=0.5), None),
])  # fmt: skip
def test_ten_are_needed_if_ten_are_enough_and_some_smaller_amount_is_not(records, holds):
    found = module.judge(module.differences(records), "memit")
    assert found["holds"] is holds and found["margin"] >= 0
    if holds:
        assert "1 tokens for each dimension: efficacy -30.0" in found["decided_by"]


@pytest.mark.parametrize(("records", "holds"), [
    (made({1: 0.9}), True), (made({50: 0.2}), False), (made({}, requests=20), None),
    (made({50: 0.1}, spread=0.3), None),
])  # fmt: skip
def test_the_default_is_enough_if_neither_method_changes(records, holds, monkeypatch):
    assert module.judge_default(module.differences(records))["holds"] is holds


def test_the_figure_draws_every_amount(records, project):
    drawn = report.text_curves(module.curves(records), module.MARKS)
    assert "MEMIT, 12 tokens: efficacy" in drawn.alt and len(drawn.data) == 8
    assert module.wide(module.differences(records)).shape == (6, 5)
