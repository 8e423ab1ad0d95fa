"""Necessity, convergence, dominance: the statements hold where they should, and each check would find a wrong one."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.linalg import matrix_norm

from metake.editing.bilevel import refine
from metake.editing.outer import Refinement
from metake.experiments.theory import (
    adversary,
    convergence,
    dominance,
    dominance_search,
    gate_lemmas,
    inner,
    landscapes,
    necessity,
    necessity_edges,
)
from metake.experiments.theory.real_layer import prepare

quick = settings(max_examples=25, deadline=None, derandomize=True)
knobs = st.lists(st.floats(0, 1), min_size=necessity.KNOBS, max_size=necessity.KNOBS).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)
seeds = st.integers(0, 10**6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def layer(session_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        return prepare("tiny", 2, text_tokens=3000)


# The search


def test_ascent_finds_the_top_from_the_best_start_and_passes_over_what_is_not_finite():
    found = adversary.ascend(
        lambda p: torch.where(p[:, 0] > 5, torch.nan, 3 - (p - 1).square().sum(1)),
        torch.tensor([[9.0, 0], [0, 0], [-1, 2]], dtype=torch.float64), 400
    )
    assert (
        found.score == pytest.approx(3, abs=1e-4)
        and (found.point - 1).abs().max() < 0.02
        and found.trace == sorted(found.trace)
    )


def test_climb_stays_in_the_box_and_improves():
    found = adversary.climb(
        lambda p: -(p - 0.9).square().sum().item() if p.max() <= 1 and p.min() >= 0 else float("inf"),
        torch.zeros(3, dtype=torch.float64), 200, generator(0)
    )
    assert found.score > -1e-3 and found.trace == sorted(found.trace)


# The outer objective, as a function


def test_the_objective_is_what_refine_descends(layer):
    rule = convergence.outer_rule("relative", steps=4, step_size=20.0)
    outer = layer.outer(rule)
    value, losses = outer.initial, []
    for _ in range(rule.steps):
        loss, slope = outer.evaluate(value)
        losses.append(loss.item())
        value = value - rule.step_size * slope
    found = refine(layer.lm, layer.requests, layer.state.contexts, layer.targets, layer.gate, rule)
    assert (found.value - value).abs().max() < 1e-9 * value.abs().max()
    assert [sum(sum(t["refine"][i].values()) for t in found.trace) for i in range(rule.steps)] == pytest.approx(
        losses, rel=1e-10
    )


@pytest.mark.parametrize(
    "change", [{}, {"edit_weight": 2.0, "locality_weight": 0.5, "anchor_weight": 3.0}, {"anchor_norm": "relative"}],
    ids=str
)
def test_its_gradient_is_its_own(layer, change):
    outer = layer.outer(replace(Refinement(prompts="plain"), **change))
    away = torch.randn(outer.initial.shape, dtype=torch.float64, generator=generator(1))
    point, way = outer.initial + 0.3 * away, away.roll(1, 1)
    slope = (outer.evaluate(point + 1e-4 * way)[0] - outer.evaluate(point - 1e-4 * way)[0]) / 2e-4
    assert slope.item() == pytest.approx((outer.evaluate(point)[1] * way).sum().item(), rel=1e-6)


# Necessity


@quick
@given(st.sampled_from(necessity.KINDS), seeds, knobs, st.integers(2, 7), st.integers(1, 3), st.integers(1, 3))
def test_implicit_gradient(kind, seed, x, dim, n, layers):
    problem = necessity._problem(kind, generator(seed), x, dim=dim, n=n, layers=layers)
    found = necessity.departures(problem)
    assert all(found[name] <= found[f"{name}_error"] <= 1e-6 for name in ("unsolved", "implicit", "through"))
    if found["coupling"] > 1e-6:
        better = necessity.improvement(problem)
        assert (
            better["step"] > 0 and better["slope"] == pytest.approx(1, abs=1e-4) and better["isolated gradient"] < 1e-9
        )


@pytest.mark.parametrize(
    ("wrong", "seen"), [("factor", "unsolved"), ("history", "unsolved"), ("sign", "implicit"), ("share", "through")]
)
def test_necessity_would_find_a_mistake(monkeypatch, wrong, seen):
    right, found = inner.gate, inner.coupling
    if wrong in ("factor", "history"):
        gates = {"factor": lambda k, m: 1.001 * right(k, m), "history": lambda k, m: right(k, getattr(m, "base", m))}
        monkeypatch.setattr(inner, "gate", gates[wrong])
    else:
        monkeypatch.setattr(
            necessity, "coupling",
            lambda p, v, u=None: ((-1 if wrong == "sign" else 1.001) * found(p, v, u)[0], *found(p, v, u)[1:])
        )
    instances = necessity.necessity_check(18)
    assert instances[seen].max() > 1e-5
    search, real = (
        pd.DataFrame({"implicit": [0.0], "through": [0.0], "slope": [0.0]}),
        pd.DataFrame({"id": [0], "anchor": "sum", "before": 1.0, "after": 0.9, "rounding": 1e-12}),
    )
    assert necessity.judge(instances, search, real)["holds"] is False


def test_isolation_is_right_in_the_special_cases_only():
    found = necessity_edges.decoupled(3)
    assert (
        (found.coupling[1:] < 1e-9).all()
        and (found.steepest[1:] < 1e-6).all()
        and found.coupling[0] > 1e-3
        and found.steepest[0] > 1e-3
    )
    assert found.gain[3] > 0.1, "out of reach, yet not zero"
    dropped = necessity_edges.edges(3).found
    assert dropped[0] > 0.01 and 0 < dropped[1] < 1 and dropped[2] > 100 and dropped[3] > 0
    assert list(necessity_edges.readings(3).survives) == [True, False, True]


def test_corollary_on_the_model(layer):
    found = necessity.corollary_on_model(layer)
    assert found.isolated.max() == 0 and found.coupling.min() > 0 and (found.slope - 1).abs().max() < 1e-4
    assert (found.after < found.before).groupby([found.id, found.anchor]).any().all()
    plane = necessity.plane(layer, points=3)
    centre = plane[(plane.down == 0) & (plane.along == 0)].loss.item()
    assert (
        centre == pytest.approx(found[(found.id == found.id[0])].before.iloc[0], rel=1e-10)
        and (plane[(plane.down < 0) & (plane.along == 0)].loss > centre).all()
    )


# Convergence


@quick
@given(seeds, st.integers(1, 12), st.floats(0.01, 1.99), st.integers(1, 25))
def test_descent_and_rate(seed, dim, product, steps):
    landscape, start = landscapes._draw(generator(seed), dim)
    size = product / landscape.smoothness
    _, losses, slopes = landscapes._iterate(landscape, start, size, steps)
    squared = slopes.square().sum(1)[:-1]
    assert (
        (losses[1:] - losses[:-1] + size * (1 - product / 2) * squared) <= 1e-12 * (losses[:-1].abs() + size * squared)
    ).all()
    if product <= 1:
        assert squared.min() <= 2 * (losses[0] - landscape.lowest) / (size * steps) * (1 + 1e-12)


@quick
@given(seeds, st.integers(1, 8))
def test_the_smoothness_of_a_landscape_is_a_bound(seed, dim):
    landscape, start = landscapes._draw(generator(seed), dim)
    assert (
        matrix_norm(torch.autograd.functional.hessian(landscape, start), 2) <= landscape.smoothness * (1 + 1e-12)
        and landscape(start) >= landscape.lowest
    )


def test_the_readings_that_fail_are_found_to_fail():
    found = landscapes.convergence_search(steps=120).set_index("reading")
    assert (found[found.claimed][["T = 1", "T = 3"]] <= 1 + 1e-9).all(axis=None) and (
        found[found.claimed]["T = 1"] > 0.98
    ).all()
    assert (found[~found.claimed][["T = 1", "T = 3"]].max(axis=1) > 1.1).all()


class _Parabola:
    """F = ½ vᵀ diag(1, 3) v, as an outer objective."""

    initial = torch.tensor([[1.0, 1.0]], dtype=torch.float64)

    def evaluate(self, value):
        scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
        return (scale * value.square()).sum() / 2, scale * value


def test_curvature_and_descent_on_a_parabola():
    outer = _Parabola()
    found = convergence.curvature(outer, outer.initial, 25)
    assert found.low == pytest.approx(3, rel=1e-6) and found.low <= found.high < 3 + 1e-6
    rows = pd.concat(
        pd.DataFrame(convergence.descend(outer, f / found.high, 8, found)).assign(
            anchor="sum", factor=f, step_size=f / found.high
        )
        for f in (0.5, 1.0, 1.9, 2.2)
    )
    runs = convergence.rates(rows)
    assert runs["times L"].tolist() == pytest.approx([0.5, 1, 1.9, 2.2], rel=1e-5)
    assert list(runs.covered) == [True, True, True, False] and list(runs.rated) == [True, True, False, False]
    assert (runs.nearest > -runs.error)[runs.covered].all() and list(runs["steps up"] > 0) == [False] * 3 + [True]
    cheated = convergence.rates(rows.assign(low=rows.low / 2, high=rows.high / 2))
    assert (cheated.nearest < -1e-3).any(), "a smoothness that is too small must show"


@pytest.mark.parametrize("negative", [False, True])
def test_the_interval_of_the_curvature_holds_it_where_few_steps_are_made(negative):
    """Of 300 eigenvalues whose top is close together, 8 steps do not find the largest; the upper end lies above it."""
    values = torch.linspace(0, 1, 300, dtype=torch.float64).pow(0.2) * (-1 if negative else 1)
    basis = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=generator(0)))[0]
    hessian = (basis * values) @ basis.T

    class Quadratic:
        def evaluate(self, value):
            return (value @ hessian @ value.T).sum() / 2, value @ hessian

    for seed in range(5):
        few, many = (
            convergence.curvature(Quadratic(), torch.zeros(1, 300, dtype=torch.float64), k, seed) for k in (8, 40)
        )
        assert few.low < 1 < few.high and few.low < many.low < 1 + 1e-6 and many.high < few.high


def test_a_step_within_rounding_is_neither_violation_nor_proof():
    """What another order of summation changes, at the size that is bounded, leaves the verdict as it is."""
    outer = _Parabola()
    exact = pd.DataFrame(convergence.descend(outer, 1 / 3, 8, convergence.Curvature(3.0, 3.0), terms=100))
    exact = exact.assign(anchor="sum", factor=1.0, step_size=1 / 3)
    kept = convergence.falls(exact)
    for seed in range(20):
        noise = torch.rand(len(exact), dtype=torch.float64, generator=generator(seed)).numpy() * 2 - 1
        moved = convergence.rates(exact.assign(loss=exact.loss + noise * exact.rounding / 2))
        assert (moved.nearest >= -moved.error).all() and len(convergence.falls(exact)) == len(kept) > 3


def test_convergence_on_the_model(layer):
    iterates = convergence.descents(layer, factors=(1.0, 2.5), steps=6)
    runs = convergence.rates(iterates)
    assert len(runs) == 6 and (runs.nearest > runs.error)[runs.covered].all() and runs.covered.sum() == 4
    literal = runs[(runs.anchor == "sum") & ~runs.covered]
    assert literal["steps up"].item() == 6, "the literal anchor's parabola breaks beyond 2/L"
    stressed = convergence.stress(layer, iterates, trials=4)
    along = convergence.floor(layer, iterates, steps=8)
    worst = stressed.iloc[0]
    assert worst["smallest fall"] >= worst.bound and (worst["L here / L"] > 1 or worst["smallest fall"] >= 0.5)
    assert along["look-ahead"].iloc[-1] < 0.3 * along.whole.iloc[-1]
    instances, search = landscapes.convergence_check(24), landscapes.convergence_search(steps=20)
    found = convergence.judge(instances, search, runs, stressed, along)
    assert found["holds"] is True and (found["margin"] > 1 or "within its error" in found["decided_by"])
    within = runs.assign(nearest=runs.error / 2)
    unknown = convergence.judge(instances, search, within, stressed, along)
    assert unknown["holds"] is None and unknown["margin"] < 1 and "within its error" in unknown["decided_by"]
    for wrong in ((instances.assign(shortfall=1e-3), search, runs, stressed, along),
                  (instances, search.assign(claimed=True), runs, stressed, along),
                  (instances, search, runs.assign(nearest=runs.nearest - 0.3), stressed, along),
                  (instances, search, runs, stressed.assign(bound=0.9), along),
                  (instances, search, runs, stressed, along.assign(whole=100.0))):  # fmt: skip
        missed = convergence.judge(*wrong)
        assert missed["holds"] is False and missed["margin"] > 1
    assert (convergence.with_adam(layer).loss.diff() > 0).any()


# Dominance


@quick
@given(seeds, st.integers(1, 10), st.integers(1, 3), st.floats(0.001, 0.999))
def test_lemmas_3_and_4(seed, dim, n, share):
    one, last, ridge = gate_lemmas._draw(generator(seed), dim, n)
    change = torch.randn(dim, dim, dtype=torch.float64, generator=generator(seed + 1))
    change = share * ridge * change / matrix_norm(change, 2)
    granted = gate_lemmas.lemma3_rounding(one[1], ridge, change)
    ratios = gate_lemmas.lemma3(gate_lemmas._metric, one[1], ridge, change)
    assert max(r.item() for r in ratios) <= 1 + granted <= 1 + gate_lemmas.SLACK
    found = gate_lemmas._pair(one, last, ridge)
    granted = gate_lemmas.lemma4_rounding(one, last, ridge, found)
    assert all(found["gates apart"] / found[name] <= 1 + granted[name] for name in gate_lemmas.BOUNDS)


@quick
@given(seeds, st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_theorem_3(seed, x):
    found = dominance.channels(generator(seed), torch.tensor(x, dtype=torch.float64))
    g, proxy = found["g"], found["proxy"]
    tail, gap = found["tail"].norm() / found["last"].norm(), matrix_norm(found["jacobian"] - torch.eye(len(proxy)), 2)
    q = tail * (1 + gap) + gap
    assert (g - found["last"] - found["tail"]).norm() <= 1e-10 * g.norm() and (g - proxy).norm() <= q * proxy.norm() * (
        1 + 1e-9
    )
    assert g @ proxy >= (1 - q) * proxy.square().sum() - 1e-9 * proxy.square().sum()
    assert q >= 1 or found["after"] < found["before"]


def test_the_search_reaches_the_bounds_and_breaks_the_reading_without_the_product():
    found = dominance_search.dominance_search(restarts=3, steps=80)
    assert found[found.claimed].largest.between(0.9, 1 + 1e-9).all() and found[~found.claimed].largest.item() > 1.2
    assert found.survives.equals(found.claimed)


@pytest.mark.parametrize("wrong", ["gate", "metric", "certified"])
def test_dominance_would_find_a_mistake(monkeypatch, wrong):
    if wrong == "gate":
        right = gate_lemmas.gate
        monkeypatch.setattr(gate_lemmas, "gate", lambda keys, metric: right(keys, metric) * (1 + keys.norm()))
    if wrong == "metric":
        right = gate_lemmas._metric
        monkeypatch.setattr(gate_lemmas, "_metric", lambda c, ridge: right(c, 0.5 * ridge))
    lemmas, instances = dominance.lemmas_check(60), dominance.theorem_check(30)
    if wrong == "certified":
        instances.loc[instances.q.idxmin(), "fall"] = -1e3
    drifts = pd.DataFrame({"delta": [2.0], "ridge": [1.0]})
    drifts.attrs["model"] = "tiny"
    real = pd.DataFrame({"proxy": ["one G", "Algorithm 1"], "q": 1.0, "error": 0.5, "rounding": 1e-12})
    search = pd.DataFrame({"claimed": [True], "largest": [1.0], "spare": [0.0]})
    assert dominance.judge(lemmas, instances, search, drifts, real)["holds"] is False


def test_dominance_edges_fail():
    found = dominance.edges(dominance.theorem_check(60)).found
    assert abs(found[0]) < 1e-12 and found[1] < 0 and found[2] > 1 and found[3] > 0


def test_dominance_on_the_model():
    layer = prepare("tiny", 1, "metake_v1", text_tokens=3000)
    drifts, real = dominance.drift_on_model(layer), dominance.theorem_on_model(layer).set_index("proxy")
    assert (
        list(drifts.layer) == list(layer.editor.layers[:-1])
        and (drifts["gates apart"] <= drifts[["no condition", "mean value"]].min(axis=1)).all()
    )
    assert (drifts["gates apart"] <= drifts.gates).all() and (drifts["any basis"] <= drifts.delta).all()
    assert real.error["one G"] <= real.q["one G"] and real.mismatch["one G"] <= real.gap["one G"] + 1e-12
    whole, value = layer.downstream(Refinement(prompts="plain"), 0)
    g = whole.gradients(value)
    assert real.error["Algorithm 1"] == pytest.approx(
        ((g.down - g.proxy_down).norm() / g.proxy_down.norm()).item(), rel=1e-10
    )
    assert (g.proxy_down - layer.outer(Refinement(prompts="plain")).evaluate(value)[1]).norm() < 1e-12
