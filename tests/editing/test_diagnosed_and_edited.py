"""What is diagnosed before an edit is what the edit then does, method by method, read off the edited model."""

from dataclasses import replace

import pytest
import reference
import torch
from models import random_model

import metake as mk
from metake.data.requests import EditRequest
from metake.support.errors import StatisticsError

REQUESTS = [
    EditRequest("The capital of {} is", "France", "Rome", "a"),
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "b"),
    EditRequest("{} flies to", "The Boeing 747", "Houston", "c"),
]
SAME_SUBJECT = [REQUESTS[0], EditRequest("The language of {} is", "France", "English", "d")]
METHODS = ["rome", "emmet", "pmet", "memit", "alphaedit", "memit/blue"]


def made(name, contexts):
    changes = {} if name == "alphaedit" else {"metric": mk.inverse_covariance(20.0, 1e-3)}
    if name == "alphaedit":
        changes = {"metric": mk.null_space(0.05, 0.5)}
    if "blue" in name:
        return mk.Editor((2,), mk.inverse_covariance(20.0, 1e-3), contexts=contexts, own_targets=True)
    return mk.methods.method(name, "tiny", layers=(2,), contexts=contexts, **changes)


def outputs(lm, requests, site):
    """What the target's site puts out at the subject's last token of the plain prompt, by a full forward pass."""
    found = (reference.at_lookup(lm, r.prompt, r.subject, 2) for r in requests)
    return torch.stack([one.mlp if site != "block" else one.block for one in found])


@pytest.fixture(scope="module")
def setting():
    lm = random_model("llama")
    return lm, mk.statistics(lm, layers=(2,), tokens=3000, cache=False)


@pytest.mark.parametrize("requests", [REQUESTS[:1], REQUESTS], ids=["one", "three"])
@pytest.mark.parametrize("name", METHODS)
def test_the_share_that_is_diagnosed_is_the_one_that_is_written(name, requests, setting):
    """On plain prompts, where an average key is the plain one: h moves by R B, whose diagonal is diagnosed."""
    lm, statistics = setting
    editor = replace(made(name, ("{}",)), target=replace(made(name, ("{}",)).target, steps=3))
    told = mk.diagnose(lm, requests, editor, statistics)
    planned = mk.optimize_targets(lm, requests, ("{}",), 2, editor.target)
    assert [d.anchor for d in told] == pytest.approx(outputs(lm, requests, editor.target.site).norm(dim=1).tolist())
    for group in editor.reading.groups(len(requests)):
        own = [requests[i] for i in group]
        before = outputs(lm, own, editor.target.site)
        with editor.edit(lm, own, statistics).applied(lm):
            moved = outputs(lm, own, editor.target.site) - before
        B = torch.linalg.lstsq(planned.planned[list(group)].T, moved.T).solution  # ΔK = R B
        assert B.diagonal().tolist() == pytest.approx([told[i].in_batch for i in group], abs=1e-7)
        if len(own) == 1:
            assert B.item() == pytest.approx(told[group[0]].attenuation, abs=1e-7)


@pytest.mark.parametrize("contexts", [("{}",), ("{}", "Therefore. {}", "Because you are there. {}")])
def test_requests_about_one_subject_are_diagnosed_where_they_are_edited(contexts, setting):
    """ROME solves them one by one, so that equal keys do not meet; EMMET does not, and both calls say so."""
    lm, statistics = setting
    for d in mk.diagnose(lm, SAME_SUBJECT, made("rome", contexts), statistics):
        assert d.in_batch == pytest.approx(1, abs=1e-9) and d.attenuation == pytest.approx(1) and d.feasible
    assert made("rome", contexts).edit(lm, SAME_SUBJECT, statistics).record.requests == ("a", "d")
    same_key = [replace(r, prompt="{} is " + word) for r, word in zip(SAME_SUBJECT, ("in", "near"), strict=True)]
    for call in (mk.diagnose, lambda lm, asked, editor, given: editor.edit(lm, asked, given)):
        with pytest.raises(StatisticsError, match="two of them coincide"):
            call(lm, same_key, made("emmet", ("{}",)), statistics)
    assert all(d.in_batch == pytest.approx(1) for d in mk.diagnose(lm, same_key, made("rome", ("{}",)), statistics))
