"""γ, β and the feasible interval before any edit, against the d×d formulas written out."""

from dataclasses import replace

import pytest
import reference
import torch
from models import random_model
from same import fingerprint

import metake as mk
from metake.data.requests import EditRequest
from metake.editing.keys import KeyReader
from metake.support.errors import ParameterError, RequestError

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "b"),
    EditRequest("{} flies to", "The Boeing 747", "Houston", "c"),
    EditRequest("I think that {} is in", "Côte d'Ivoire", "Madrid", "d"),
]
CONTEXTS = ("{}", "Therefore. {}", "Because you are there. {}")
LAYERS = (1, 2)


def editor(kind, **changes):
    metric = {"memit": mk.inverse_covariance(20.0, 1e-3), "alphaedit": mk.null_space(0.02, 0.5)}[kind]
    return mk.Editor(LAYERS, metric, contexts=CONTEXTS, remember=kind == "alphaedit", **changes)


def setting(kind="gpt2"):
    lm = random_model(kind)
    return lm, mk.statistics(lm, layers=LAYERS, tokens=3000)


def literal(lm, statistics, kind, past=None):
    """Per request: γ with the inverse formed as a d×d matrix, and the norm of its present representation."""
    keys, anchor, _ = KeyReader(lm, REQUESTS, CONTEXTS, 2).read(2)
    covariance, eye = statistics[2].moment / statistics[2].count, torch.eye(keys.shape[1], dtype=torch.float64)
    if kind == "memit":
        metric = torch.linalg.inv(20.0 * covariance + 1e-3 * eye)
    else:
        values, vectors = torch.linalg.eigh(covariance)
        null = vectors[:, values < 0.02]
        projector = null @ null.T
        history = torch.zeros_like(eye) if past is None else past.T @ past
        metric = torch.linalg.solve(projector @ history @ projector + 0.5 * eye, projector)
    alone = [(k @ metric @ k).item() for k in keys]
    together = keys @ metric @ keys.T
    own = (torch.linalg.inv(torch.eye(len(keys), dtype=torch.float64) + together) @ together).diagonal().tolist()
    return alone, own, anchor.norm(dim=1).tolist()


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["memit", "alphaedit"])
def test_diagnosis_equals_the_formulas(kind, model):
    lm, statistics = setting(model)
    found = mk.diagnose(lm, REQUESTS, editor(kind), statistics, tau=0.2, epsilon=0.3)
    assert [d.id for d in found] == ["a", "b", "c", "d"]
    for d, gamma, own, norm in zip(found, *literal(lm, statistics, kind), strict=True):
        assert d.association == pytest.approx(gamma, rel=1e-8) and gamma > 1e-3
        assert d.attenuation == pytest.approx(gamma / (1 + gamma), rel=1e-8)
        assert d.in_batch == pytest.approx(own, rel=1e-8)
        assert d.anchor == pytest.approx(norm, rel=1e-12)
        assert d.lower == pytest.approx(0.2 * norm * (1 + gamma) / gamma, rel=1e-8)
        assert d.upper == pytest.approx(0.3 * norm * (1 + gamma), rel=1e-8)


def tiny_editor(name, lm, **changes):
    """A method with its own parts, on two layers of the random model (ROME and EMMET: on one)."""
    layers = (2,) if name in ("rome", "emmet") else LAYERS
    return mk.methods.method(name, "tiny", layers=layers, contexts=CONTEXTS, **changes)


def mlp_output(lm, request, layer):
    """What the written module puts out at the subject's last token of the plain prompt, by a full forward pass."""
    return reference.at_lookup(lm, request.prompt, request.subject, layer).mlp


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_rome_is_diagnosed_as_it_writes(model):
    """γ = k̄ᵀQk*, k̄ a flat average, k* of the plain prompt; exact for each request alone; h is the MLP's output."""
    lm, statistics = setting(model)
    method = tiny_editor("rome", lm, metric=mk.inverse_covariance(20.0, 1e-3))
    found = mk.diagnose(lm, REQUESTS, method, statistics, tau=0.2, epsilon=0.3)
    metric = torch.linalg.inv(20.0 * statistics[2].covariance + 1e-3 * torch.eye(statistics[2].dim).double())
    for d, request in zip(found, REQUESTS, strict=True):
        rows = [reference.at_lookup(lm, t, request.subject, 2).key for t in reference.templates(request, CONTEXTS)]
        gamma = (sum(rows) / len(rows)) @ metric @ rows[0]
        assert d.association == pytest.approx(gamma.item(), rel=1e-8)
        assert d.attenuation == pytest.approx(1, abs=1e-12) and d.in_batch == pytest.approx(1, abs=1e-9)
        norm = mlp_output(lm, request, 2).norm().item()
        assert d.anchor == pytest.approx(norm, rel=1e-10) and d.lower == pytest.approx(0.2 * norm)
        assert d.upper == float("inf") and d.feasible
    edit = method.edit(lm, REQUESTS, statistics)
    assert edit.record.layers["2"]["spectrum_min"] == pytest.approx(min(d.in_batch for d in found), abs=1e-9)


def test_emmet_is_diagnosed_as_it_writes():
    """Exact for the whole batch, at the averaged keys; h is the block's output."""
    lm, statistics = setting()
    method = tiny_editor("emmet", lm, metric=mk.inverse_covariance(20.0, 1e-3))
    found = mk.diagnose(lm, REQUESTS, method, statistics, tau=0.2, epsilon=0.3)
    for d, gamma, norm in zip(found, *literal(lm, statistics, "memit")[::2], strict=True):
        assert d.association == pytest.approx(gamma, rel=1e-8) and d.attenuation == pytest.approx(1, abs=1e-12)
        assert d.in_batch == pytest.approx(1, abs=1e-9) and d.anchor == pytest.approx(norm, rel=1e-12)
        assert d.lower == pytest.approx(0.2 * norm) and d.upper == float("inf") and d.feasible


def test_pmet_is_diagnosed_at_the_output_it_writes():
    """h is the MLP's own output, the norm that Stage I plans from; γ, β and B are those of its gate."""
    lm, statistics = setting("llama")
    method = tiny_editor("pmet", lm, metric=mk.inverse_covariance(20.0, 1e-3))
    found = mk.diagnose(lm, REQUESTS, method, statistics)
    planned = mk.optimize_targets(lm, REQUESTS, CONTEXTS, 2, replace(method.target, steps=1))
    for d, request, anchor, gamma, own in zip(
        found, REQUESTS, planned.anchor, *literal(lm, statistics, "memit")[:2], strict=True
    ):
        assert d.anchor == pytest.approx(mlp_output(lm, request, 2).norm().item(), rel=1e-10)
        assert d.anchor == pytest.approx(anchor.norm().item(), rel=1e-10)
        assert d.association == pytest.approx(gamma, rel=1e-8) and d.in_batch == pytest.approx(own, rel=1e-8)
    block = mk.diagnose(lm, REQUESTS, replace(method, target=mk.TargetRule()), statistics)
    assert all(abs(one.anchor - other.anchor) > 1e-2 for one, other in zip(found, block, strict=True))


@pytest.mark.parametrize("noise", [0.1, 1.0, 4.0])
def test_requests_that_are_solved_apart_do_not_meet(noise):
    """With one request at a time, what a batch realizes is what each realizes alone, β = γ/(ν+γ)."""
    lm, statistics = setting()
    together, apart = (
        mk.diagnose(lm, REQUESTS, editor("memit", noise=noise, together=k), statistics) for k in (None, 1)
    )
    for d, other in zip(apart, together, strict=True):
        beta = d.association / (noise + d.association)
        assert d.in_batch == pytest.approx(beta, rel=1e-10) and d.attenuation == pytest.approx(beta, rel=1e-12)
        assert d.in_batch > other.in_batch and d.upper == pytest.approx(0.25 * d.anchor / (1 - beta), rel=1e-8)


def test_norms_may_be_given_in_the_units_of_the_model():
    lm, statistics = setting()
    share, units = (mk.diagnose(lm, REQUESTS, editor("memit"), statistics, 0.2, 0.3, relative=r) for r in (True, False))
    for one, other in zip(share, units, strict=True):
        assert other.lower == pytest.approx(0.2 / other.attenuation) and other.upper == pytest.approx(
            0.3 * (1 + other.association)
        )
        assert one.lower == pytest.approx(other.lower * one.anchor) and one.feasible == other.feasible


def test_interval_is_empty_exactly_below_the_threshold():
    """Theorem 1: some plan satisfies both iff β ≥ τ/(τ+ε). Thresholds just on either side of every request's β."""
    lm, statistics = setting()
    betas = [d.attenuation for d in mk.diagnose(lm, REQUESTS, editor("alphaedit"), statistics)]
    assert max(betas) - min(betas) > 1e-3
    for i, beta in enumerate(betas):
        for nudge, feasible in ((1 - 1e-9, True), (1 + 1e-9, False)):
            share = beta * nudge  # τ/(τ+ε) with τ + ε = 1
            found = mk.diagnose(lm, REQUESTS, editor("alphaedit"), statistics, share, 1 - share)
            assert found[i].feasible is feasible and (found[i].lower <= found[i].upper) is feasible
            assert [d.feasible for d in found] == [b >= share for b in betas]


def test_past_edits_lower_the_association():
    """The keys that a sequence remembers count: γ falls, most for a request that was edited itself."""
    lm, statistics = setting()
    method = editor("alphaedit")
    state = method.init(lm, statistics)
    fresh = mk.diagnose(lm, REQUESTS, method, state)
    assert fresh == mk.diagnose(lm, REQUESTS, method, statistics)
    _, later = method.step(lm, REQUESTS[:1], state)
    past, *_ = KeyReader(lm, REQUESTS[:1], CONTEXTS, 2).read(2)
    found = mk.diagnose(lm, REQUESTS, method, later)
    for d, gamma in zip(found, literal(lm, statistics, "alphaedit", later.keys[2])[0], strict=True):
        assert d.association == pytest.approx(gamma, rel=1e-7)
    assert all(now.association < then.association for now, then in zip(found, fresh, strict=True))
    ratios = [now.association / then.association for now, then in zip(found, fresh, strict=True)]
    assert ratios[0] == min(ratios) and later.metrics[2].past_metric.shape == past.shape


def test_nothing_is_edited_or_optimized(monkeypatch):
    lm, statistics = setting()
    before = fingerprint(lm.model)
    monkeypatch.setattr(mk.LanguageModel, "write_weight", lambda *_: pytest.fail("a weight was written"))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("something was optimized"))
    mk.diagnose(lm, REQUESTS, mk.methods.metake("tiny", layers=LAYERS), statistics)
    assert fingerprint(lm.model) == before


@pytest.mark.parametrize("value", [0, -0.25, float("nan")])
@pytest.mark.parametrize("name", ["tau", "epsilon"])
def test_norms_must_be_positive(name, value):
    lm, statistics = setting()
    with pytest.raises(ParameterError, match=f"tau and epsilon must be > 0; found .*{name}={value}"):
        mk.diagnose(lm, REQUESTS, editor("memit"), statistics, **{name: value})
    with pytest.raises(ParameterError, match="must be > 0"):
        mk.feasible_interval(torch.ones(2), **{"tau": 1.0, "epsilon": 1.0, name: value})


def test_requests_are_checked():
    lm, statistics = setting()
    with pytest.raises(RequestError, match="duplicate"):
        mk.diagnose(lm, [REQUESTS[0], REQUESTS[0]], editor("memit"), statistics)
    with pytest.raises(RequestError, match="ends inside the token"):
        mk.diagnose(lm, [EditRequest("It is {}fore so", "There", "Rome", "torn")], editor("memit"), statistics)
    assert mk.diagnose(lm, [], editor("memit"), statistics) == []


def test_table_has_one_line_a_request():
    lm, statistics = setting()
    text = str(mk.diagnose(lm, REQUESTS, editor("alphaedit"), statistics))
    assert len(text.splitlines()) == 5 and text.splitlines()[0].split()[:4] == ["id", "γ", "β", "B_ii"]
    assert all(line.startswith(r.id) for line, r in zip(text.splitlines()[1:], REQUESTS, strict=True))
    assert len({len(line) for line in text.splitlines()}) == 1, "columns are not aligned"
