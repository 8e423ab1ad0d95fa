"""Hidden states before and after edits: distances are those of the formula, states those of the model,
and the judgment can fall either way.
"""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from models import stand_in
from same import fingerprint
from scipy.linalg import sqrtm

from metake import report
from metake.algebra.update import Edit
from metake.experiments import record, runs
from metake.experiments.cases import read_cases
from metake.experiments.studies import comparison, finished, hidden_states
from metake.language.tokens import locate
from metake.report.studies import hidden_states as drawing
from metake.support.errors import ParameterError, ProvenanceError

METHODS = ("alphaedit", "metake")
SETTINGS = {
    "methods_": METHODS, "data": {"F": "facts"}, "edits": 3, "held_out": 4, "text_tokens": 3000, "perplexity": 5.0,
    "draws": 20
}

# Distances


def drawn(mean, covariance, count=50, seed=0):
    """States whose sample mean and covariance are exactly these."""
    states = np.random.default_rng(seed).standard_normal((count, len(mean)))
    states -= states.mean(0)
    white = states @ np.linalg.inv(np.linalg.cholesky(np.cov(states, rowvar=False)).T)
    values, vectors = np.linalg.eigh(covariance)
    return mean + white * np.sqrt(values) @ vectors.T


def rotation(dim, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def test_the_distance_is_exact_for_commuting_covariances():
    basis, one, other = rotation(6), np.array([4.0, 3, 2, 1, 0.5, 0.1]), np.array([1.0, 3, 5, 0.2, 0.5, 2])
    means = np.zeros(6), np.array([1.0, -2, 0, 0, 3, 0])
    before, after = (
        drawn(m, basis * v @ basis.T, seed=k) for k, (m, v) in enumerate(zip(means, (one, other), strict=True))
    )
    shift, frechet = hidden_states.apart(before, after)
    assert shift == pytest.approx(np.sqrt(14)) and frechet**2 == pytest.approx(
        14 + np.square(np.sqrt(one) - np.sqrt(other)).sum()
    )
    for delta in (0.25, 1.0):  # shrinking leaves commuting covariances commuting
        shrunk = [(1 - delta) * v + delta * v.mean() for v in (one, other)]
        assert hidden_states.apart(before, after, delta)[1] ** 2 == pytest.approx(
            14 + np.square(np.sqrt(shrunk[0]) - np.sqrt(shrunk[1])).sum()
        )


def test_the_distance_is_the_formula_and_knows_no_basis():
    generator = np.random.default_rng(3)
    before, after = (
        generator.standard_normal((8, 30)), 2 + generator.standard_normal((8, 30)) * np.geomspace(3, 0.3, 30)
    )
    covariances = []
    for states in (before, after):
        sample = np.cov(states, rowvar=False)
        covariances.append(0.7 * sample + 0.3 * np.trace(sample) / 30 * np.eye(30))
    cross = np.trace(sqrtm(sqrtm(covariances[0]) @ covariances[1] @ sqrtm(covariances[0]))).real
    expected = np.square(after.mean(0) - before.mean(0)).sum() + np.trace(covariances[0] + covariances[1]) - 2 * cross
    found = hidden_states.apart(before, after, 0.3)
    assert found[1] ** 2 == pytest.approx(expected, rel=1e-8)
    assert hidden_states.apart(after, before, 0.3) == pytest.approx(found), "symmetric"
    turned = rotation(30)
    assert hidden_states.apart(before @ turned, after @ turned, 0.3) == pytest.approx(found)
    small = hidden_states._coordinates(before, after)
    assert small[0].shape == (8, 15) and hidden_states.apart(*small, 0.3, 30) == pytest.approx(found), (
        "in the subspace that holds all states"
    )


def test_states_that_stay_or_move_together():
    states = np.random.default_rng(0).standard_normal((6, 20))
    assert hidden_states.apart(states, states, 0.2) == pytest.approx((0, 0), abs=1e-6)
    assert hidden_states.apart(states, states + 0.5, 0.2) == pytest.approx((np.sqrt(5), np.sqrt(5)))
    assert hidden_states.scale(states) ** 2 == pytest.approx(np.trace(np.cov(states, rowvar=False)))


def made(factor, count=30, dim=12, seed=0):
    """States that AlphaEdit moves by a common step and noise, and MetaKE by `factor` of each."""
    generator = np.random.default_rng(seed)
    before, moves = generator.standard_normal((count, dim)), 0.5 + 0.5 * generator.standard_normal((count, dim))
    after = {
        "memit": before + 0.1 * generator.standard_normal((count, dim)), "alphaedit": before + moves,
        "metake": before + factor * moves
    }
    return hidden_states.States(tuple(map(str, range(count))), np.arange(count) < count // 2, before, after)


def measured(states):
    rows = [
        row
        for group in (hidden_states.EDITED, hidden_states.HELD_OUT)
        for row in hidden_states._measured(states, group, 100, 0)
    ]
    return pd.DataFrame(rows).assign(dataset="F")


@pytest.mark.parametrize(("factor", "holds"), [(0.5, True), (1.0, False), (0.99, False), (2.0, False)])
def test_the_verdict_follows_the_distances(factor, holds):
    found = measured(made(factor))
    ratios = hidden_states.ratios(found)
    verdict = hidden_states.judge(ratios)
    assert verdict["holds"] is holds and "edited" in verdict["decided_by"] and "held out" in verdict["decided_by"]
    own = ratios[(ratios.method == "alphaedit") & (ratios.measure == "mean shift")]
    assert own.value.to_list() == pytest.approx([factor] * 2) and own.low.to_list() == pytest.approx([factor] * 2), (
        "the mean shift is linear: the same on every draw"
    )
    assert "chance" not in ratios and set(ratios.method) == {"memit", "alphaedit"}
    one, other = (found[(found.kind == "distance") & (found.method == m)].value.to_numpy() for m in METHODS)
    assert ratios[ratios.method == "alphaedit"].value.to_numpy() == pytest.approx(other / one)


def test_every_reading_of_metake_is_measured_against_the_others():
    states = made(0.5)
    states.after["metake/whole"] = states.before + 2 * (states.after["alphaedit"] - states.before)
    found = measured(states)
    for reading, factor, holds in (("metake", 0.5, True), ("metake/whole", 2.0, False)):
        own = hidden_states.ratios(found, reading)
        shift = own[(own.method == "alphaedit") & (own.measure == "mean shift")]
        assert shift.value.to_list() == pytest.approx([factor] * 2) and hidden_states.judge(own)["holds"] is holds
        assert set(own.method) == {"memit", "alphaedit", "metake", "metake/whole"} - {reading}
    del states.after["metake"], states.after["metake/whole"]
    assert hidden_states.judge(hidden_states.ratios(measured(states)))["holds"] is None


def test_uncertain_distances_decide_nothing():
    rows = [
        ("F", "edited", "Fréchet", "alphaedit", 0.8, 0.6, 1.1),
        ("F", "held out", "Fréchet", "alphaedit", 0.97, 0.9, 1.05),
    ]
    ratios = pd.DataFrame(rows, columns=["dataset", "group", "measure", "method", "value", "low", "high"])
    assert hidden_states.judge(ratios)["holds"] is None and hidden_states.judge(ratios[:0])["holds"] is None
    assert hidden_states.judge(ratios.assign(high=0.9))["holds"] is True
    assert hidden_states.judge(pd.concat([ratios.assign(high=0.9), ratios.assign(dataset="G")]))["holds"] is None, (
        "on every data set"
    )


def test_intervals_and_chance_tell_a_shift_from_noise():
    found = measured(made(0.5, count=60))
    distances = hidden_states.distances(found).set_index(["method", "group", "measure"])
    assert ((distances.low <= distances.value) & (distances.value <= distances.high)).all()
    for group in (hidden_states.EDITED, hidden_states.HELD_OUT):
        common, noise = distances.loc["alphaedit", group, "mean shift"], distances.loc["memit", group, "mean shift"]
        assert common.low > common.chance and noise.value < 1.2 * noise.chance
        states = made(0.5, count=60)
        rows = states.edited if group == hidden_states.EDITED else ~states.edited
        step = np.linalg.norm((states.after["alphaedit"] - states.before)[rows].mean(0)) / hidden_states.scale(
            states.before[rows]
        )
        assert common.value == pytest.approx(step)


# States


@pytest.fixture(scope="module")
def model():
    return stand_in()


@pytest.fixture(autouse=True)
def _one_model(monkeypatch, model):
    for module in (runs, finished, hidden_states):
        monkeypatch.setattr(module, "load", lambda *_: model)


@pytest.fixture(scope="module")
def run(tmp_path_factory, session_cache, model):
    """What is found, and the folder of the runs that it was read from."""
    out = tmp_path_factory.mktemp("states")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        for module in (runs, finished, hidden_states):
            patch.setattr(module, "load", lambda *_: model)
        before = fingerprint(model.model)
        found = hidden_states.hidden_states(**SETTINGS, out=out)
        assert fingerprint(model.model) == before
    return found, out


def by_hand(lm, request, layer):
    """A block's output at the subject's last token, from transformers' own list of hidden states."""
    ids, lookup = locate(lm.tokenizer, request.prompt, request.subject)
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0, lookup].numpy()


def test_states_are_the_models_before_and_after_the_runs_edit(run, model):
    _, out = run
    folders = [out / f"facts-{m}-0" for m in METHODS]
    states = hidden_states.read_states(folders, 4)
    layer = hidden_states.methods.method("metake", "tiny").layers[-1]
    assert layer < model.depth - 1, "transformers norms the last block's"
    known = {c.request.id: c.request for c in read_cases("facts")}
    requests = [known[i] for i in states.ids]
    assert [r.id for r in requests[:3]] == list(
        Edit.load(folders[0] / "batches" / "0000").record.requests
    ) and states.edited.tolist() == [True] * 3 + [False] * 4
    assert not {r.subject for r in requests[:3]} & {r.subject for r in requests[3:]}
    assert states.before == pytest.approx(np.array([by_hand(model, r, layer) for r in requests]), abs=1e-9)
    with Edit.load(folders[1] / "batches" / "0000").applied(model):
        assert states.after["metake"] == pytest.approx(np.array([by_hand(model, r, layer) for r in requests]), abs=1e-9)
    assert not np.allclose(states.after["metake"], states.before, atol=1e-4)


def test_every_method_is_on_one_map(run):
    found, _ = run
    points = hidden_states.points(found)
    assert (
        points.groupby("method").size().to_dict() == dict.fromkeys(("pre-edit", *METHODS), 7)
        and (points[points.method == "pre-edit"].moved == 0).all()
    )
    assert points.groupby("group").size().to_dict() == {"edited": 9, "held out": 12} and points[["x", "y"]].notna().all(
        axis=None
    )
    distances = hidden_states.distances(found)
    assert set(zip(distances.method, distances.group, distances.measure, strict=True)) == {
        (m, g, k) for m in METHODS for g in ("edited", "held out") for k in hidden_states.MEASURES
    }
    assert (distances.value > 0).all() and list(hidden_states.ratios(found).method.unique()) == ["alphaedit"]
    mean, moved = (
        distances[distances.measure == "mean shift"].set_index(["method", "group"]).value,
        points.groupby(["method", "group"]).moved.mean(),
    )
    assert (mean <= moved[mean.index] + 1e-9).all(), "a mean moves at most as far as its members do on average"
    assert (distances[distances.measure == "Fréchet"].set_index(["method", "group"]).value >= mean - 1e-9).all()


def test_runs_that_are_there_are_read_and_give_the_same(run, monkeypatch):
    found, out = run
    monkeypatch.setattr(comparison, "run", lambda *_, **__: pytest.fail("a finished run was made again"))
    pd.testing.assert_frame_equal(hidden_states.hidden_states(**SETTINGS, out=out), found, check_exact=True)
    plain = hidden_states.hidden_states(**SETTINGS, out=out, maps=False)
    assert hidden_states.points(found).size and set(plain.kind) == {"distance", "ratio"}
    pd.testing.assert_frame_equal(hidden_states.ratios(plain), hidden_states.ratios(found), check_exact=True)


def test_a_run_of_other_data_or_another_model_is_refused(run, monkeypatch):
    _, out = run
    folder = out / "facts-metake-0"
    config, lm, cases, edit = finished.finished(folder)
    assert (config.method, len(cases), edit.record.requests) == ("metake", 3, tuple(c.request.id for c in cases))
    monkeypatch.setattr(runs, "read_cases", lambda name: read_cases(name)[5:])
    with pytest.raises(ProvenanceError, match="holds 3 edits, not those of the 3 cases"):
        finished.finished(folder)
    monkeypatch.undo()
    first = edit.updates[0]
    with lm.scratch([first.module]):
        lm.add(first.module, first)
        with pytest.raises(ProvenanceError, match="SHA-256"):
            finished.finished(folder, lm)


def test_settings_that_make_no_map_are_refused():
    for change in ({"held_out": 2}, {"edits": 1}, {"perplexity": 30.0}):
        with pytest.raises(ParameterError, match="more states than its perplexity"):
            hidden_states.hidden_states(**SETTINGS | change)


# Drawings and recording


def test_drawings_hold_their_numbers(run, project):
    found, _ = run
    points, distances = hidden_states.points(found), hidden_states.distances(found)
    maps = report.state_maps(points)
    assert (
        "AlphaEdit" in str(maps)
        and "MetaKE" in maps.alt
        and len(pd.read_csv(next(project.rglob("hidden_states.csv")))) == len(points)
    )
    median = points[(points.method == "metake") & (points.group == "edited")].moved.median()
    assert f"{median:.3f}" in str(maps) and f"{median:.3g}" in maps.alt
    shown = report.state_distances(distances)
    row = distances[
        (distances.method == "metake") & (distances.group == "edited") & (distances.measure == "Fréchet")
    ].iloc[0]
    assert f"{row.value:.3f}" in str(shown) and "Fréchet" in shown.alt
    assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}] ({row.chance:.3f})" in str(
        report.table(hidden_states.side_by_side(distances))
    )
    ratio = hidden_states.ratios(found).iloc[0]
    assert f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" in str(
        report.table(hidden_states.side_by_side(hidden_states.ratios(found)))
    )
    assert re.search(r"mean shift, edited facts, \S+ times as long", maps.svg["light"])
    with pytest.raises(ParameterError, match="no column moved"):
        report.state_maps(points.drop(columns="moved"))


def test_mean_shifts_are_magnified_alike_and_stay_on_the_map():
    shifts = pd.DataFrame({"x": [0.3, 0.0], "y": [0.4, -0.01]})
    assert drawing._magnified(shifts, 100.0) == 50 and drawing._magnified(shifts, 1.0) == 1
    assert drawing._magnified(10 * shifts, 100.0) == 5


def test_the_recording_reads_the_comparisons_runs(monkeypatch, project, run):
    asked = {}
    monkeypatch.setattr(record, "provenance", lambda *_: {"model": "tiny"})
    monkeypatch.setattr(record, "hidden_states", lambda **settings: asked.update(hidden_states=settings) or run[0])
    monkeypatch.setattr(
        record, "comparison", lambda **settings: asked.update(comparison=settings) or pd.DataFrame({"id": ["1"]})
    )
    lines = list(record.record("tiny", only=["comparison", "hidden_states"], edits=7, batch=5, seeds=(2, 3)))
    assert "wrote results/hidden_states-tiny.jsonl" in lines
    same = ("model", "data", "edits", "batch", "text", "text_tokens", "out")
    assert [asked["hidden_states"][k] for k in same] == [asked["comparison"][k] for k in same] and asked[
        "hidden_states"
    ]["seed"] == 2
    again = report.recorded("hidden_states-tiny")
    for part in (hidden_states.points, hidden_states.distances, hidden_states.ratios):
        pd.testing.assert_frame_equal(part(again), part(run[0]), check_dtype=False)
    assert again.attrs["provenance"]["held_out"] == 4 and hidden_states.ratios(again).attrs["label"] == "recorded"


def test_what_cannot_be_one_run_stands_in_folders_apart(monkeypatch, project):
    """Runs of the recordings by folder: another size, or other subjects, is another run of the same name."""
    folders = []
    monkeypatch.setattr(record, "provenance", lambda *_: {"model": "tiny"})
    monkeypatch.setattr(record, "comparison", lambda **s: folders.append(s["out"]) or pd.DataFrame({"id": ["1"]}))
    for name, edits, batch in (("comparison", 7, 5), ("comparison", 7, 7), ("comparison", 6, 5), ("sequences", 7, 5)):
        list(record.record("tiny", only=[name], edits=edits, batch=batch))
    assert len(set(folders)) == 4 and all(f.is_relative_to(project / "runs") for f in folders)
