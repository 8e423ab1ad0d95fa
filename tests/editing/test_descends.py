"""The refinement lowers what it minimizes: on the embedded model, on every base, for requests of either format."""

from __future__ import annotations

from dataclasses import replace

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
@pytest.mark.parametrize("name", ["metake", "metake/memit", "metake/blue", "metake/sphere", "metake/whole"])
def test_its_own_loss_falls_for_nineteen_requests_of_twenty(tiny, name, style):
    """Theorem 3's conclusion, and the first half of the rule that chose the reading."""
    lm, given = tiny
    editor = method(name, "tiny")
    editor = replace(editor, target=replace(editor.target, steps=12))
    requests = [case.request for case in mk.facts(format=style)[100:120]]
    told = editor.edit(lm, requests, given).record.refinement
    assert told["requests"] == 20 and told["fell"] >= 19 and told["after"] < told["before"]
