"""One batch by several editors from one unedited model: the ablation and the realized residual."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from same import fingerprint

import metake as mk
from metake.algebra.solve import association, attenuation
from metake.editing.keys import KeyReader
from metake.editing.targets import TargetRule
from metake.experiments.studies import ablation, realized_residual
from metake.experiments.studies import study as module
from metake.methods import ABLATIONS, alphaedit, blue, memit, metake, method
from metake.support.errors import ParameterError

RULE = TargetRule(steps=4, step_size=0.5, clamp=2.0)
CONTEXTS = ("{}", "So. {}")
DATA = {"F": "facts"}


@pytest.fixture(scope="module")
def editors():
    full = metake("tiny", target=RULE, contexts=CONTEXTS)
    return {
        "memit": memit("tiny", target=RULE, contexts=CONTEXTS),
        "alphaedit": alphaedit("tiny", target=RULE, contexts=CONTEXTS), "metake": full
    } | {name: change(full) for name, change in ABLATIONS.items()}


@pytest.fixture(scope="module")
def records(editors):
    return module.study("tiny", editors, DATA, edits=4)


def own(records: pd.DataFrame, method: str) -> pd.DataFrame:
    return records[records.method == method].set_index("id")


def test_scores_are_those_of_the_edit_alone(records, editors):
    """Sharing Stage I, and following other editors, changes nothing."""
    lm = mk.load("tiny")
    cases = module.select(lm, module.read_cases("facts"), 4, 0)
    before = fingerprint(lm.model)
    for name in ("memit", "metake"):
        edit = editors[name].edit(lm, [c.request for c in cases], mk.statistics(lm, layers=editors[name].layers))
        with edit.applied(lm):
            expected = mk.evaluate(lm, cases).records()
        found = own(records, name)
        for row in expected:
            assert found.loc[row["id"], ["efficacy", "generalization", "specificity"]].tolist() == [
                row[k] for k in ("efficacy", "generalization", "specificity")
            ]
    assert fingerprint(lm.model) == before


def test_what_is_measured_of_each_plan(records, editors):
    lm, editor = mk.load("tiny"), editors["alphaedit"]
    cases = module.select(lm, module.read_cases("facts"), 4, 0)
    requests, layer = [c.request for c in cases], editor.layers[-1]
    state = editor.init(lm, mk.statistics(lm, layers=editor.layers))
    edit, _ = editor.step(lm, requests, state)
    found = own(records, "alphaedit").loc[[c.request.id for c in cases]]
    keys = KeyReader(lm, requests, CONTEXTS, layer).read(layer)
    gamma = association(keys.keys, state.metrics[layer])
    assert found.gamma.to_numpy() == pytest.approx(gamma.numpy()) and found.beta.to_numpy() == pytest.approx(
        attenuation(gamma).numpy()
    )
    planned = edit.updates[0].left.T * len(editor.layers)
    assert found.planned.to_numpy() == pytest.approx(planned.norm(dim=1).numpy())
    with edit.applied(lm):
        after = KeyReader(lm, requests, CONTEXTS, layer).read(layer)
    change = after.current - keys.current
    assert found.whole.to_numpy() == pytest.approx(((change * planned).sum(1) / planned.square().sum(1)).numpy())
    written, share = after.keys @ edit.updates[-1].delta.T, edit.updates[-1].left.T
    assert found.beta_layer.to_numpy() == pytest.approx(((written * share).sum(1) / share.square().sum(1)).numpy())


def test_only_a_refined_plan_has_moved(records):
    for name in ("memit", "alphaedit", "without bi-level", "stop-gradient"):
        found = own(records, name)
        assert (
            (found.moved < 1e-12).all()
            and np.allclose(found.beta_layer, found.beta_initial)
            and np.allclose(found.whole, found.whole_initial)
        )
    for name in ("metake", "key-only gate"):
        assert (own(records, name).moved > 1e-5).all()
    assert not np.allclose(own(records, "metake").moved, own(records, "key-only gate").moved, rtol=1e-3)
    assert np.allclose(own(records, "stop-gradient").whole, own(records, "alphaedit").whole), (
        "its only gradient is the anchor's, at rest"
    )


def test_editors_without_one_plan_a_request_are_refused():
    with pytest.raises(ParameterError, match="one plan a request"):
        module.study("tiny", {"blue": blue("tiny", target=RULE, contexts=CONTEXTS)}, DATA, edits=2)


def frame(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["metric", "method", "difference", "low", "high"]).assign(dataset="F")


@pytest.mark.parametrize("rows, holds", [
    ([("efficacy", "a", 3.0, 1.0, 5.0), ("generalization", "a", 0.0, -1.0, 1.0), ("efficacy", "b", 2.0, 0.5, 4.0)],
    True),
    ([("efficacy", "a", 3.0, 1.0, 5.0), ("efficacy", "b", 0.0, -1.0, 1.0)], None),
    ([("efficacy", "a", 3.0, 1.0, 5.0), ("generalization", "a", -3.0, -5.0, -1.0)], False),
    ([("efficacy", "a", 3.0, 1.0, 5.0), ("specificity", "a", -3.0, -5.0, -1.0)], True),
])  # fmt: skip
def test_the_verdict_on_the_ablation_follows_the_intervals(rows, holds):
    found = ablation.judge(frame(rows))
    assert found["holds"] is holds and "ablations" in found["decided_by"]


def test_the_ablation_compares_all_parts_of_each_reading(monkeypatch):
    asked = {}

    def study(model, editors, **settings):
        asked.update(editors)
        rows = [
            {"dataset": "F", "seed": 0, "method": name, "id": i, "efficacy": 0.1 * place, "generalization": 0.0,
             "specificity": 0.0, "planned": 1.0, "moved": 0.01 * place, "whole": 1.0}
            for place, name in enumerate(editors) for i in range(3)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    monkeypatch.setattr(ablation, "study", study)
    found = ablation.ablation("tiny", ("metake/literal", "metake"), edits=3)
    assert list(asked) == [(r, m) for r in ("metake/literal", "metake") for m in ("metake", *ABLATIONS)]
    for reading in ("metake/literal", "metake"):
        full = method(reading, "tiny").refine
        assert asked[reading, "metake"].refine == full and asked[reading, "without bi-level"].refine is None
        assert asked[reading, "stop-gradient"].refine == replace(full, feedback=False)
    assert (found.reading == ["metake/literal"] * 12 + ["metake"] * 12).all()
    assert list(ablation.by_name(found).method.unique()) == [
        "metake/literal", "without bi-level", "key-only gate (literal)", "stop-gradient (literal)", "metake",
        "key-only gate", "stop-gradient",
    ]  # fmt: skip
    each = ablation.all_differences(found).query("metric == 'efficacy'").set_index("method").difference
    assert each.to_dict() == pytest.approx({
        "without bi-level (literal)": -10, "key-only gate (literal)": -20, "stop-gradient (literal)": -30,
        "without bi-level": -10, "key-only gate": -20, "stop-gradient": -30,
    })  # fmt: skip
    with pytest.raises(ParameterError, match="memit has no outer level to ablate; name readings of MetaKE: metake/lit"):
        ablation.ablation("tiny", ("metake", "memit"))
    assert ablation.moved(ablation.by_name(found)).set_index("method")["moved, %"]["metake"] == 4


def made(shift: float) -> pd.DataFrame:
    """26 requests whose β̂ rises with γ; `shift`: MetaKE's in the last reading."""
    rows = []
    for name, gain in (("alphaedit", 0.0), ("metake", shift)):
        for i in range(26):
            readings = dict.fromkeys(realized_residual.READINGS, i / 26) | {"whole_initial": i / 26 + gain}
            rows.append(
                {"dataset": "F", "seed": 0, "method": name, "id": str(i), "percentile": 100 * (i + 1) / 26} | readings
            )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("shift, holds", [(0.2, True), (0.0, False), (0.005, False), (-0.2, False)])
def test_the_verdict_on_the_realized_share_follows_the_rise(shift, holds):
    found = realized_residual.judge(realized_residual.gains(made(shift)))
    assert found["holds"] is holds and ("all layers, initial plan" in found["decided_by"]) == (shift > 0)


def test_every_reading_of_metake_is_compared_with_alphaedit():
    records = made(0.2)
    found = realized_residual.all_gains(
        pd.concat([records, records[records.method == "metake"].assign(method="metake/whole", whole_initial=0.0)])
    )
    assert found.method.value_counts().to_dict() == dict.fromkeys(("metake", "metake/whole"), 4)
    last = found[found.reading == "all layers, initial plan"].set_index("method")
    assert last.difference["metake"] == pytest.approx(0.2) and last["its own"]["metake/whole"] == 0.0
    assert last.difference["metake/whole"] == pytest.approx(-25 / 52), "minus the mean of AlphaEdit's"
    assert (last["its own"] - last.alphaedit - last.difference).abs().max() < 1e-12


def test_bins_are_quantiles_of_gamma():
    bins = realized_residual.binned(made(0.1).sample(frac=1, random_state=0), 13)
    one = bins[(bins.method == "metake") & (bins.reading == "whole_initial")]
    assert list(one.bin) == list(range(1, 14)) and (one.requests == 2).all() and one["mean"].is_monotonic_increasing
    assert one["mean"].iloc[0] == pytest.approx((0 + 1 / 26) / 2 + 0.1) and one.error.iloc[0] == pytest.approx(1 / 52)


def test_percentiles_are_within_a_method(records, editors):
    found = realized_residual.realized_residual("tiny", ("memit", "alphaedit"), data=DATA, edits=3)
    for _, group in found.groupby("method"):
        assert sorted(group.percentile) == pytest.approx([100 / 3, 200 / 3, 100])
        assert group.sort_values("gamma").percentile.is_monotonic_increasing
