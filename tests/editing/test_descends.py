"""The refinement lowers what it minimizes, on the embedded model, for requests of either format."""

from __future__ import annotations

import pytest

import metake as mk
from metake.methods import method


@pytest.fixture(scope="module")
def tiny(session_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        lm = mk.load("tiny")
        return lm, mk.statistics(lm, layers=[0, 1, 2])


@pytest.mark.parametrize("style", ["counterfact", "zsre"])
@pytest.mark.parametrize("name", ["metake", "metake/whole"])
def test_its_own_loss_falls_for_most_requests_and_in_the_mean(tiny, name, style):
    """What it promises exactly is that the batch's loss does not rise: the best plan is kept."""
    lm, given = tiny
    requests = [case.request for case in mk.facts(format=style)[100:112]]
    told = method(name, "tiny", contexts=("{}", "Because. {}")).edit(lm, requests, given).record.refinement
    assert told["requests"] == 12 and told["fell"] >= 9 and told["after"] < 0.99 * told["before"]
