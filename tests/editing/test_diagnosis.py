"""γ, β and the feasible interval before any edit, against the d×d formulas written out."""

import pytest
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
