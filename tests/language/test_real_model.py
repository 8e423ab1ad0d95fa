"""One real fact, edited end to end in a real model: 135 million parameters, real tokenizer, real text statistics."""

from __future__ import annotations

import pytest
import torch

import metake as mk
from metake.scoring.evaluation import read

pytestmark = pytest.mark.real_model
REQUEST = mk.EditRequest("The {} is located in the city of", "Eiffel Tower", "Rome", "eiffel")
LAYERS = (7, 8)


@pytest.fixture(scope="module")
def lm() -> mk.LanguageModel:
    return mk.load("smollm2-135m")


def probability(lm: mk.LanguageModel, prompt: str, answer: str) -> float:
    return torch.tensor(read(lm, [(prompt, answer)])[0].log_p).exp().item()


def test_a_real_fact_moves_and_its_neighbors_stay(lm, tmp_path):
    statistics = mk.statistics(lm, layers=LAYERS, tokens=15_000, cache=False)
    assert all(0 < rank < statistics[7].dim for rank in statistics.null_ranks(2e-2).values())
    editor = mk.methods.metake("smollm2-135m", layers=LAYERS, contexts=("{}", "Therefore, I think so. {}"))
    diagnosis = mk.diagnose(lm, [REQUEST], editor, statistics)[0]
    assert 0.2 < diagnosis.attenuation < 1
    neighbor = "The capital of Germany is", "Berlin"
    before = {answer: probability(lm, REQUEST.text, answer) for answer in ("Rome", "Paris")}, probability(lm, *neighbor)
    assert before[0]["Paris"] > 0.5 > before[0]["Rome"]

    edit = editor.edit(lm, [REQUEST], statistics)
    edit.save(tmp_path / "edit")
    with mk.Edit.load(tmp_path / "edit").applied(lm):
        assert probability(lm, REQUEST.text, "Rome") > 0.5 > probability(lm, REQUEST.text, "Paris")
        assert probability(lm, *neighbor) > before[1] / 2
    assert {lm.digest(module) for module in edit.modules} == set(edit.record.weights.values()), (
        "not restored bit for bit"
    )
    assert probability(lm, REQUEST.text, "Paris") == before[0]["Paris"]
