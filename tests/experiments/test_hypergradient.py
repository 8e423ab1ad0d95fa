"""The exact hypergradient is the derivative of the literal edit: finite differences of d×d solves,
written weights and full forwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import reference
import torch
from models import CONFIGS, random_model, text_statistics
from reference import CONTEXTS, REQUESTS, double_inside  # noqa: F401 (a fixture)
from torch import Tensor

from metake.algebra.geometry import inverse_covariance, null_space
from metake.algebra.postprocess import soften_principal
from metake.data.facts import facts
from metake.editing import downstream
from metake.editing.bilevel import refine
from metake.editing.downstream import Downstream
from metake.editing.editor import Editor, root, whole
from metake.editing.outer import LastLayer, Refinement
from metake.editing.targets import TargetRule, Targets, optimize_targets
from metake.experiments.theory import proxy_fidelity as page
from metake.experiments.theory import proxy_theorem as theorem
from metake.experiments.theory.hypergradient import Fidelity, Hypergradient, fidelity
from metake.language.model import LanguageModel
from metake.methods import OPERATORS, blue, pmet, rect, rome
from metake.support.errors import NumericalError, ParameterError

pytestmark = pytest.mark.usefixtures("double_inside")
LAYERS, PAST = (0, 1, 2), REQUESTS[3:]
STAGE_ONE = TargetRule(steps=4, step_size=0.3, stop_below=0.0)
RIDGE, THRESHOLD = 0.3, 2e-2
EDITOR = Editor(LAYERS, null_space(THRESHOLD, RIDGE), STAGE_ONE, refine=Refinement(), contexts=CONTEXTS, remember=True)


class Edit(NamedTuple):
    """One batch after another was edited and remembered, away from v_init so that every loss has a gradient."""

    lm: LanguageModel
    requests: tuple
    editor: Editor
    downstream: Hypergradient
    initial: Targets
    value: Tensor
    literal: object


def edit(kind: str, count: int = 1, editor: Editor = EDITOR, bos: bool | None = None) -> Edit:
    lm, requests = random_model(kind, bos=bos), REQUESTS[:count]
    statistics = text_statistics(lm, editor.layers)
    state = editor.init(lm, statistics)
    if editor.remember:
        first, state = replace(editor, refine=None).step(lm, PAST, state)
        first.apply(lm)
    initial = optimize_targets(lm, requests, CONTEXTS, editor.layers[-1], STAGE_ONE)
    nudge = torch.randn(count, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value = initial.value + 0.1 * nudge
    spaces = {i: reference.projector(statistics[i].covariance, THRESHOLD) for i in editor.layers}
    past = {
        i: state.keys[i].T if editor.remember else torch.zeros(len(spaces[i]), 0, dtype=torch.float64)
        for i in editor.layers
    }

    def solved(layer: int, K: Tensor, R: Tensor) -> Tensor:
        return reference.alphaedit_paper(K, R, spaces[layer], RIDGE, past[layer])

    return Edit(lm, requests, editor, Hypergradient(lm, requests, editor, state, initial), initial, value, solved)


def objective(e: Edit, **changes) -> Downstream:
    """The same objective with another rule."""
    rule, stage = replace(e.editor.refine, **changes), e.editor.stage_two(e.lm, e.downstream.state)
    return Downstream(e.lm, e.requests, CONTEXTS, e.initial, stage, rule)


def deltas(e: Edit, value: Tensor) -> dict[int, Tensor]:
    """Stage II as published, towards rows V."""
    return reference.stage_two(e.lm, e.requests, CONTEXTS, e.editor.layers, value.T, e.literal)[0]


@torch.no_grad()
def outer(e: Edit, value: Tensor, written: dict[int, Tensor]) -> Tensor:
    """L_edit, L_loc and L_reg, (n, 3), on a model whose weights are replaced."""
    rule = e.editor.refine
    edited = {
        e.lm.write_path(i) + ".weight": reference.weight(e.lm, i) + reference.stored(e.lm, i, d)
        for i, d in written.items()
    }
    contexts = CONTEXTS if rule.prompts == "contexts" else ("{}",)
    before = [reference.drift(e.lm, r, {}, rule.locality_position) for r in e.requests]
    return torch.stack(
        [
            reference.outer_loss(e.lm, r, contexts, edited, b, v, v0, rule)
            for r, b, v, v0 in zip(e.requests, before, value, e.initial.value, strict=True)
        ]
    )


def weights(e: Edit) -> Tensor:
    rule = e.editor.refine
    return torch.tensor([rule.edit_weight, rule.locality_weight, rule.anchor_weight], dtype=torch.float64)


def slope(function, value: Tensor, directions: Tensor, step: float = 2e-4) -> Tensor:
    """Central differences along each direction, (directions,), of fourth order."""
    at = lambda d, s: function(value + s * step * d)  # noqa: E731
    return torch.stack([(8 * (at(d, 1) - at(d, -1)) - (at(d, 2) - at(d, -2))) / (12 * step) for d in directions])


def directions(value: Tensor, count: int = 2) -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(count, value.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=1
    ).view(count, *value.shape)


def assert_is_the_slope(found: Tensor, function, value: Tensor, along: Tensor | None = None) -> None:
    along = directions(value) if along is None else along
    measured, expected = slope(function, value, along), (along * found).flatten(1).sum(1)
    assert (measured - expected).abs().max() <= 1e-7 * found.norm(), (measured, expected)
    assert found.norm() > 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_is_the_slope_of_the_literal_edit(kind: str):
    e = edit(kind)
    with reference.unchanged(e.lm):
        found = e.downstream.gradients(e.value)
        assert (e.downstream.after(e.value) - found.losses).abs().max() <= 1e-12
    written, total = deltas(e, e.value), weights(e)
    assert (outer(e, e.value, written) - found.losses).abs().max() <= 1e-10
    assert_is_the_slope(found.exact, lambda v: (outer(e, v, deltas(e, v)) @ total).sum(), e.value)
    assert_is_the_slope(
        found.last, lambda v: (outer(e, v, written | {LAYERS[-1]: deltas(e, v)[LAYERS[-1]]})[:, :2]).sum(), e.value
    )
    assert (found.pull - 2 * (e.value - e.initial.value)).abs().max() <= 1e-12
    report = found.fidelity()
    assert report.leakage > 0.05 and report.gap > 1e-3 and report.down_cosine < 0.999, (
        "too easy an edit: the parts must differ"
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("change", [
    {"prompts": "plain"}, {"locality_position": "final", "locality_direction": "pre_post"},
    {"anchor_norm": "relative", "anchor_weight": 3.0},
    {"edit_weight": 0.5, "locality_weight": 4.0},
], ids=str)  # fmt: skip
def test_the_losses_are_those_of_the_refinement(kind: str, change: dict):
    e = edit(kind, editor=replace(EDITOR, refine=replace(EDITOR.refine, **change)))
    found, total = e.downstream.gradients(e.value), weights(e)
    assert (outer(e, e.value, deltas(e, e.value)) * total - found.losses).abs().max() <= 1e-10
    assert_is_the_slope(found.exact, lambda v: (outer(e, v, deltas(e, v)) @ total).sum(), e.value)


@pytest.mark.parametrize("kind", ["gptj", "qwen3"])
def test_a_batch_has_one_gradient(kind: str):
    e = edit(kind, count=3, bos=True)
    found = e.downstream.gradients(e.value)
    assert found.exact.shape == found.last.shape == found.proxy.shape == (3, 32) and found.gate.shape == (
        3, e.downstream.state.metrics[0].dim
    )
    assert_is_the_slope(found.exact, lambda v: outer(e, v, deltas(e, v)).sum(), e.value)


@pytest.mark.parametrize("change", [
    {"layers": (0, 2), "allocation": whole}, {"allocation": root, "remember": False},
    {"layers": (1, 2), "metric": inverse_covariance(2.0, 0.1), "remember": False},
], ids=["whole", "root", "memit"])  # fmt: skip
def test_other_layers_allocations_and_metrics(change: dict):
    """Against the differences of its own losses, which the editor's own machinery is compared with below."""
    e = edit("phi", editor=replace(EDITOR, **change))
    found = e.downstream.gradients(e.value)
    assert_is_the_slope(found.exact, lambda v: e.downstream.after(v).sum(), e.value)
    assert_is_the_editors_edit(e)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "qwen3"])
def test_the_edit_is_the_editors(kind: str):
    assert_is_the_editors_edit(edit(kind, count=2))


def assert_is_the_editors_edit(e: Edit) -> None:
    """The same factors as `Editor.step` writes towards the same V, and the same losses on the model it has edited."""
    planned = replace(e.initial, planned=e.value - e.initial.anchor, trace=tuple({} for _ in e.requests))
    done, _ = replace(e.editor, refine=None).step(e.lm, e.requests, e.downstream.state, planned)
    with torch.no_grad():
        written, _ = e.downstream.write(e.value)
    with done.applied(e.lm), torch.no_grad():
        edited = outer(e, e.value, {})
    assert (edited[:, 0] - e.downstream.after(e.value)[:, 0]).abs().max() <= 1e-10
    for update, (residuals, structural) in zip(done.updates, written, strict=True):
        assert (update.left - residuals.T).abs().max() <= 1e-10 * update.left.abs().max()
        assert (update.right - structural).abs().max() <= 1e-10 * update.right.abs().max()


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "qwen3"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_proxy_is_the_refinements_own_gradient(kind: str, count: int):
    e = edit(kind, count)
    found = e.downstream.gradients(e.value)
    _, expected = LastLayer(e.lm, e.requests, CONTEXTS, e.initial, found.gate, e.editor.refine).evaluate(e.value)
    assert (found.proxy - expected).norm() <= 1e-10 * expected.norm() > 0
    assert (
        torch.equal(found.proxy, found.proxy_down + found.pull)
        and (found.through(2 * found.gate) - found.proxy - found.proxy_down).abs().max() <= 1e-12
    )


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "qwen3"])
def test_with_one_layer_proxy_and_exact_gradient_are_one(kind: str):
    e = edit(kind, editor=replace(EDITOR, layers=(1,)))
    found = e.downstream.gradients(e.value)
    report = found.fidelity()
    assert (found.down - found.proxy_down).norm() <= 1e-11 * found.down.norm() > 0 and (
        found.last - found.down
    ).abs().max() == 0
    assert report.leakage == 0 and report.gap <= 1e-11 and report.bound <= 1e-10 and report.cosine > 1 - 1e-12
    assert_is_the_slope(found.exact, lambda v: outer(e, v, deltas(e, v)).sum(), e.value)


def test_the_key_only_gate_ignores_the_projector_and_the_past():
    e = edit("gpt2")
    K = reference.keys(e.lm, e.requests, CONTEXTS, LAYERS[-1])
    assert (e.downstream.frozen_gate("key_only") - reference.gate_key_only(K, RIDGE)).norm() <= 1e-10
    assert (e.downstream.frozen_gate("structural") - e.downstream.gate).abs().max() == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("change", [{}, {"prompts": "plain"}, {"gates": "frozen"}], ids=str)
def test_micro_batches_do_not_change_the_objective(kind: str, change: dict):
    e = edit(kind, 3)
    (loss, slope), *others = (objective(e, tokens=t, **change).evaluate(e.value) for t in (10**6, 1, 40))
    assert slope.norm() > 1e-3
    for found, own in others:
        assert (found - loss).abs() <= 1e-10 and (own - slope).norm() <= 1e-10 * slope.norm()


@pytest.mark.parametrize("prompts", ["contexts", "plain"])
def test_frozen_gates_are_those_of_the_edit_towards_the_first_plan(prompts: str):
    """The literal edit with every M as it was on the way to V_init."""
    e = edit("gptj", 2, replace(EDITOR, refine=replace(EDITOR.refine, gates="frozen", prompts=prompts)))
    M: dict[int, Tensor] = {}

    def kept(layer: int, K: Tensor, R: Tensor) -> Tensor:
        M[layer] = e.literal(layer, K, reference.eye(K.shape[1]))
        return R @ M[layer]

    deltas(e._replace(literal=kept), e.initial.value)
    frozen = e._replace(literal=lambda layer, K, R: R @ M[layer])
    loss, found = e.downstream.evaluate(e.value)
    assert (outer(e, e.value, deltas(frozen, e.value)).sum() - loss).abs() <= 1e-10
    assert_is_the_slope(found, lambda v: outer(e, v, deltas(frozen, v)).sum(), e.value)
    assert (found - objective(e, gates="exact").evaluate(e.value)[1]).norm() > 1e-3 * found.norm()
    if prompts == "plain":
        assert sum(len(part.run.of) for part in e.downstream.parts) == 2 * len(e.requests), "no row for keys is run"


@pytest.mark.parametrize("side", ["key", "output"])
def test_what_is_done_to_an_update_is_looked_through(side: str):
    post = (soften_principal(0.5, 0.7, side),)
    e = edit("qwen3", 2, replace(EDITOR, post=post))
    loss, found = e.downstream.evaluate(e.value)
    assert_is_the_slope(found, lambda v: e.downstream.after(v).sum(), e.value)
    assert_is_the_editors_edit(e)
    assert (loss - objective(e._replace(editor=EDITOR)).evaluate(e.value)[0]).abs() > 1e-3


def test_the_gradient_keeps_a_block_s_ends_and_not_its_inside(monkeypatch):
    """Numbers kept for the backward pass: per position and edited layer d of the state, d_in of the key and each
    request's response, beside what single requests need; without the second computation it would be many times more."""
    e = edit("llama", 3)
    whole = objective(e, tokens=64)

    def kept() -> int:
        found: dict[int, int] = {}
        value = e.value.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes() // 8) or t,
            lambda t: t,
        ):
            whole.write(value)
        return sum(found.values())

    runs = [(part.run.tail.ids, part.run.head.ids if part.run.head else None) for part in whole.parts + whole.plain]
    positions = sum(ids.numel() for run in runs for ids in run if ids is not None)
    numbers = 32 + e.downstream.state.metrics[0].dim + len(e.requests)
    frugal = kept()
    assert frugal <= 1.5 * len(LAYERS) * positions * numbers
    monkeypatch.setattr(downstream, "checkpoint", lambda function, *given, **_: function(*given))
    assert kept() > 3 * frugal


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_a_refinement_lowers_the_loss_of_the_whole_edit(kind: str):
    e = edit(kind, 3)
    rule = replace(EDITOR.refine, steps=4, step_size=0.5, optimizer="sgd")
    stage = e.editor.stage_two(e.lm, e.downstream.state)
    with reference.unchanged(e.lm):
        found = refine(e.lm, e.requests, CONTEXTS, e.initial, stage, rule)
    ends = [t["refined"] for t in found.trace]
    assert sum(end["after"] for end in ends) < sum(end["before"] for end in ends) - 1e-3
    for name, value in (("before", e.initial.value), ("after", found.value)):
        told = sum(end[name] for end in ends)
        assert told == pytest.approx(e.downstream.after(value).sum().item(), rel=1e-9)


def test_what_cannot_be_looked_through_whole_is_refused():
    e = edit("gpt2")
    for make in (blue, pmet, rome, OPERATORS["metake/blue"]):
        with pytest.raises(ParameterError, match="one shared target.*take look_ahead='last'"):
            Hypergradient(e.lm, e.requests, make("tiny"), e.downstream.state, e.initial)
    with pytest.raises(ParameterError, match="something linear .*; found keep_largest"):
        Hypergradient(e.lm, e.requests, rect("tiny"), e.downstream.state, e.initial)
    two = edit("gpt2", 2)
    for together in (None, 2):
        Hypergradient(two.lm, two.requests, replace(EDITOR, together=together), two.downstream.state, two.initial)
    with pytest.raises(ParameterError, match="solves these 2 requests apart"):
        Hypergradient(two.lm, two.requests, replace(EDITOR, together=1), two.downstream.state, two.initial)


def test_a_target_that_is_not_finite_is_an_error():
    e = edit("gpt2")
    with reference.unchanged(e.lm), pytest.raises(NumericalError, match="1 of 1 targets are not finite"):
        e.downstream.gradients(e.value * torch.inf)


# Theorem 2's quantities


def parts(*values: float) -> tuple[Tensor, ...]:
    """g_down, g_L, ĝ_down and ∇L_reg along the first axis, then ‖G‖ and ‖M‖."""
    vectors = torch.zeros(4, 3, dtype=torch.float64)
    vectors[:, 0] = torch.tensor(values[:4], dtype=torch.float64)
    return *vectors, *torch.tensor(values[4:], dtype=torch.float64)


def test_the_quantities_of_the_theorem():
    found = fidelity(*parts(3.0, 2.0, 1.6, -0.4, 4.0, 0.5))
    expected = {
        "leakage": 0.5, "gap": 0.2, "strength": 0.8, "compatibility": 0.75, "bound": 0.5 + 1.5 * 0.25, "cosine": 1.0,
        "down_cosine": 1.0
    }
    assert {name: getattr(found, name).item() for name in expected} == pytest.approx(expected, rel=1e-12)
    assert found.ratio.item() == pytest.approx(0.875 / 0.75) and found.threshold.item() == pytest.approx(
        0.8 * 0.25 / 1.5
    )


@pytest.mark.parametrize("values, undefined", [
    ((1.0, 0.0, 1.0, 0.0, 1.0, 1.0), {"leakage", "bound", "ratio"}),
    ((1.0, 1.0, 0.0, 1.0, 0.0, 1.0), {"gap", "strength", "compatibility", "bound", "ratio", "down_cosine"}),
    ((1.0, 1.0, 0.0, 1.0, 1.0, 1.0), {"compatibility", "bound", "ratio", "down_cosine"}),
])  # fmt: skip
def test_a_zero_denominator_is_undefined_and_not_certified(values, undefined):
    found = fidelity(*parts(*values))
    assert {
        name for name in (*found._fields, "ratio") if getattr(found, name).isnan()
    } == undefined and not found.ratio < 1


# The page


def test_no_random_case_contradicts_the_theorem():
    cases = theorem.random_cases(8000)
    assert theorem.violations(cases) == 0 and set(cases.dim) == set(theorem.DIMS) and len(cases) == 8000
    certified = cases.ratio < 1
    assert (
        certified.sum() > 1000
        and (~certified & (cases.alignment > 0)).sum() > 300
        and (~certified & (cases.alignment < 0)).sum() > 300
    )
    assert (cases.off / cases.bound).max() > 0.999, "the bound is nearly reached"
    assert not theorem.random_cases(400, seed=1).ratio.equals(theorem.random_cases(400).ratio)


@pytest.mark.parametrize("wrong", ["bound", "compatibility", "leakage"])
def test_a_wrong_theorem_would_be_found(monkeypatch, wrong: str):
    def corrupted(*args) -> Fidelity:
        right = fidelity(*args)
        values = {
            "bound": 0.9 * right.bound, "compatibility": 1.2 * right.compatibility, "leakage": 0.9 * right.leakage
        }
        return right._replace(**{wrong: values[wrong]})

    monkeypatch.setattr(theorem, "fidelity", corrupted)
    cases, searched = theorem.random_cases(8000), theorem.adversary(50, 100)
    assert theorem.violations(cases) > 10 and theorem.judge_theorem(cases, searched, cases[:0])["holds"] is False
    if wrong != "leakage":
        assert theorem.violations(searched) > 0 and searched.found[0] < 0.95


def test_the_adversary_reaches_the_edge_and_no_further():
    found = theorem.adversary(100, 200)
    assert (
        1 - 1e-12 <= found.found[0] == found.ratio[0] < 1.01
        and abs(found.alignment[0]) < 1e-12
        and found.allowed.tolist() == [1, 0]
    )
    assert -1e-12 <= found.found[1] < 1e-5 and theorem.violations(found) == 0


def test_certificates_count_what_they_say():
    counted = theorem.certificates(theorem.random_cases(8000)).set_index("certificate")
    true, weak = counted[~counted.index.str.startswith("without")], counted[counted.index.str.startswith("without")]
    assert (
        (true.of_them_not_descending == 0).all()
        and (true.least_alignment > 0).all()
        and true.certified.iloc[0] == true.certified.iloc[1] > true.certified.iloc[2] > 0
    )
    assert (weak.of_them_not_descending > 20).all() and (weak.least_alignment < 0).all() and len(weak) == 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory, session_cache):
    def base(*_):
        lm = random_model("gpt2")
        lm.name, lm.origin = "tiny", {"origin": "test", "revision": "", "note": ""}
        return lm

    out = tmp_path_factory.mktemp("proxy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(page, "load", base)
        found = page.proxy_fidelity(edits=2, text_tokens=3000, out=out)
        patch.setattr(page, "_edits", lambda *_: pytest.fail("finished edits are kept"))
        again = page.proxy_fidelity(edits=2, text_tokens=3000, out=out)
    assert again.equals(found) and again.attrs == found.attrs and found.attrs["settings"]["edits"] == 2
    return found


def test_what_is_measured_belongs_together(measured):
    assert (
        list(measured.point) == [*page.POINTS] * 2
        and measured.request.nunique() == 2
        and set(measured.request) <= {c.request.id for c in facts()}
    )
    assert theorem.violations(measured) == 0 and (measured.none == 0).all() and (measured.exact > 0).all()
    start = measured[measured.point == "v_init"]
    assert (
        (start.anchor == 0).all()
        and (start.compatibility == 1).all()
        and (start.pull_share == 0).all()
        and (start.cosine - start.down_cosine).abs().max() < 1e-12
    )
    assert (measured.equal_proxy > 0).equals(measured.proxy > 0) and measured[
        ["exact", "proxy", "key_only"]
    ].nunique().min() == 6
    assert (measured.compatibility[measured.point == "refined by plain descent"] < 0.1).all(), "there it has converged"


def test_summaries_and_verdicts(measured):
    summary, steps = page.fidelity_summary(measured), page.descent(measured)
    assert (summary.certified + summary.not_certified + summary.undefined == 2).all() and list(summary.point) == [
        *page.POINTS
    ]
    assert (
        len(steps) == 18
        and (steps.low <= steps["median"]).all()
        and (steps["median"] <= steps.high).all()
        and (steps.share[steps.direction == "exact"] == 1).all()
    )
    real = measured.copy()
    real.attrs["label"] = "recorded"
    assert page.fidelity_summary(real).attrs["label"] == page.descent(real).attrs["label"] == "recorded"
    undefined = page.fidelity_summary(measured.assign(ratio=torch.inf))
    assert (undefined.undefined == 2).all() and (undefined.not_certified + undefined.certified == 0).all()
    good, bad = measured.assign(cosine=0.5, proxy=1.0), measured.assign(cosine=-0.5)
    plain = measured.point == "refined by plain descent"
    mixed = good.assign(proxy=good.proxy.mask(plain, 1e-12))
    assert [page.judge_alignment(r)["holds"] for r in (good, bad, mixed)] == [True, False, None], (
        "a reduction of rounding errors is none"
    )
    assert [
        page.judge_dominance(measured.assign(leakage=x))["holds"] for x in (0.5, 1.5, measured.anchor.gt(0) + 0.5)
    ] == [True, False, None]
