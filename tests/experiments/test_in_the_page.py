"""The page that edits a model in the browser: its recorded plans are the library's, and what it is given is the model.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import metake as mk
from metake.experiments import for_browser, in_the_page
from metake.language.tokens import continuation
from metake.support.errors import ParameterError, ProvenanceError

FILE = Path(__file__).resolve().parents[2] / "results" / "edit_in_the_page.safetensors"
ENOUGH = 0.02  # of a plan's length: what is kept is rounded to 1/127 of its largest coordinate


@pytest.fixture(scope="module")
def lm():
    return mk.load(in_the_page.MODEL)


@pytest.fixture(scope="module")
def statistics(lm):
    """From the ordinary cache, where pages and the build of the book leave them."""
    return mk.statistics(lm, layers=in_the_page.editor("memit").layers)


@pytest.fixture(scope="module")
def plans():
    return in_the_page.Plans.load(FILE)


def test_a_recorded_plan_is_made_again_by_the_library(lm, statistics, plans):
    place = 1
    again = next(in_the_page.plan(lm, statistics, plans.requests[place : place + 1]))
    for name in ("weights", "contexts", "steps", "refine_steps", "seed", "model", "dtype", "statistics"):
        assert again.source[name] == plans.source[name], name
    for method, strengths in (("rome", (1.0,)), ("memit", (1.0,)), ("metake", in_the_page.STRENGTHS)):
        for strength in strengths:
            there, here = plans.planned(place, method, strength), again.planned(0, method, strength)
            assert (there - here).norm() < ENOUGH * here.norm()
    moved = [again.kept[in_the_page.plan_name("metake", s)].vectors for s in in_the_page.STRENGTHS]
    recorded = [plans.kept[in_the_page.plan_name("metake", s)].vectors[place] for s in in_the_page.STRENGTHS]
    for mine, theirs in zip(moved, recorded, strict=True):
        assert (mine - theirs).norm() < ENOUGH * mine.norm() > 0


def test_the_grid_asks_for_new_answers_that_can_be_told_apart(lm, plans):
    grid = in_the_page.pairs(lm.tokenizer)
    assert len({r.id for r in grid}) == len(grid) == 18 * in_the_page.SUBJECTS * in_the_page.OBJECTS
    assert len({r.id.split("|")[0] for r in grid[:18]}) == 18, "it goes round the relations"
    assert plans.requests == tuple(grid[: len(plans.requests)]) and len(plans.requests) >= 24
    truth = {(r["subject"], r["prompt"]): r["target_true"]["str"] for r in rewrites()}
    for request in grid:
        both = request.target, truth[request.subject, request.prompt]
        assert len({continuation(lm.tokenizer, answer)[0] for answer in both}) == 2


def rewrites():
    from metake.data.facts import facts_records

    return [record["requested_rewrite"] for record in facts_records()]


def test_plans_come_back_as_they_were_saved_and_go_on_only_from_their_own(plans, tmp_path):
    plans.save(file := tmp_path / "plans.safetensors")
    again = in_the_page.Plans.load(file)
    assert again.requests == plans.requests and again.source == plans.source
    assert all(torch.equal(again.kept[n].steps, k.steps) for n, k in plans.kept.items())
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ProvenanceError, match="record them again"):
        in_the_page.Plans.load(file)


def test_plans_of_another_model_are_not_gone_on_with(lm, statistics, plans):
    other = replace(plans, source=dict(plans.source) | {"seed": 1})
    with pytest.raises(ProvenanceError, match="start anew"):
        next(in_the_page.plan(lm, statistics, plans.requests, known=other))


@pytest.mark.parametrize(("asked", "said"), [(("metake", 0.7), "λ in"), (("memet", 1.0), "memit")])
def test_a_plan_that_is_not_there_is_refused(plans, asked, said):
    with pytest.raises(ParameterError, match=said):
        plans.planned(0, *asked)


def test_the_browser_gets_the_model_the_tokens_and_the_metrics(lm, statistics, plans):
    scripts = for_browser.scripts(lm, statistics, plans)
    assert scripts == for_browser.scripts(lm, statistics, plans), "the same each time"
    assert {name: len(text) for name, text in scripts.items()}["model"] < 8e6 > len(scripts["covariance"])
    told, tensors = parsed(scripts["model"])
    assert [told["tokens"].index(t) for t in told["tokens"]] == list(range(len(lm.tokenizer)))
    assert sum(len(s) for one in told["relations"] for s in one["objects"].values()) == len(mk.facts())
    for layer in range(lm.depth):
        theirs = lm.weight(lm.write_path(layer)).float().numpy()
        assert np.abs(tensors[f"{layer}.write.weight"] - theirs).max() < 1e-3 * np.abs(theirs).max()
    for layer, one in statistics.items():
        values, vectors = one._eigh
        side = next(tensors[n] for n in (f"{layer}.null", f"{layer}.kept") if n in tensors).astype(np.float64)
        null = f"{layer}.null" in tensors
        projector = side.T @ side if null else np.eye(one.dim) - side.T @ side
        own = vectors[:, values < 2e-2]
        assert np.abs(projector - (own @ own.T).numpy()).max() < 2e-3
    assert set(parsed(scripts["covariance"])[1]) == {f"{layer}.factor" for layer in statistics}


def parsed(script: str):
    """Header and tensors of a part, as the page reads them."""
    name, rest = re.fullmatch(rf'{for_browser.CALL}\("(\w+)",(.*),"[\w+/=]*"\);\n', script, re.S).groups()
    raw, told = base64.b64decode(script[script.rindex(',"') + 2 : -4]), json.loads(rest)
    kinds = {"f16": "<f2", "i8": "i1", "f32": "<f4"}
    tensors = {
        label: np.frombuffer(raw, kinds[kind], int(np.prod(shape)), start).reshape(shape)
        for label, kind, shape, start in told["tensors"]
    }
    return told, tensors
