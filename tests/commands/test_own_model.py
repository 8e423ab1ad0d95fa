"""A model of one's own on the command line: whose recipe, which layers, and what becomes of its edits."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from models import random_model, stand_in
from same import contents

import metake as mk
from metake.commands import cli
from metake.editing import recipes
from metake.editing.recipes import recipe
from metake.experiments import record, runs
from metake.experiments.borrowed import borrowed, borrowing
from metake.experiments.speed import bench
from metake.experiments.studies import layers
from metake.experiments.studies.layers import layer_sweep, recipe_block, traced
from metake.support.errors import ParameterError, StatisticsError

FACT = ("--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own(monkeypatch):
    """A model that has no recipe."""
    lm = random_model("gpt2")
    lm.name = "my/own"
    monkeypatch.setattr(mk, "load", lambda *_: lm)
    monkeypatch.setattr(runs, "load", lambda *_: lm)
    monkeypatch.setattr(layers, "load", lambda *_: lm)
    return lm


# Recipes


def test_a_recipe_is_borrowed_within_the_block_alone():
    with pytest.raises(ParameterError, match="unknown model of a recipe 'my/own'.*--recipe NAME --layers N"):
        recipe("my/own")
    with borrowed("my/own", "gpt-j-6b"):
        assert recipe("my/own").numbers == recipe("gpt-j-6b").numbers
        with borrowed("my/own", None, (7, 2, 5)):
            one = recipe("my/own")
            assert (one.layers, one.rome_layer, one.blue_layers) == ((2, 5, 7), 5, (2, 7))
            assert one.pmet_steps == recipe("gpt-j-6b").pmet_steps and recipe("tiny").layers == (0, 1, 2)
            assert mk.methods.alphaedit("my/own").layers == (2, 5, 7) and mk.methods.blue("my/own").layers == (2, 7)
            assert mk.methods.rome("my/own").layers == (5,)
        with borrowed("my/own"):
            assert recipe("my/own").model == "gpt-j-6b"
    with borrowed("tiny", "default", [3]):
        assert recipe("tiny").ridge == 10.0 and recipe("tiny").blue_layers == (3,)
    assert recipe("tiny").layers == (0, 1, 2) and not borrowing("tiny")
    with pytest.raises(ParameterError, match="my/own"), borrowed("my/own", None, [3]):
        pass


def test_layers_are_not_for_those_that_edit_other_maps():
    with borrowed("tiny", None, [1]), pytest.raises(ParameterError, match="ultraedit edits the linear maps"):
        mk.methods.method("ultraedit", "tiny")


@pytest.mark.parametrize("words", [
    ("edit", "my/own", *FACT), ("run", "--model", "my/own", "--out", "o", "--edits", "2", "--batch", "2"),
    ("diagnose", "--model", "my/own", "--edits", "2"),
], ids=lambda words: words[0])  # fmt: skip
def test_a_model_without_a_recipe_is_edited_with_another_ones(metake, own, words):
    code, out, err = metake(*words, "--method", "memit", "--text-tokens", "1500")
    assert code == 2 and "--recipe NAME" in err and not contents(Path.cwd())
    out_there = ["--out", "e"] if words[0] == "edit" else []
    code, out, err = metake(
        *words, *out_there, "--method", "memit", "--text-tokens", "1500", "--recipe", "tiny", "--layers", "2", "0"
    )
    assert code == 0, err
    if words[0] == "edit":
        assert mk.Edit.load("e").modules == (own.write_path(0), own.write_path(2))
    if words[0] == "run":
        told = json.loads(open("o/config.json").read())
        assert (told["recipe"], told["layers"]) == ("tiny", [0, 2])
        assert runs.open_run("o")[1][0].modules == (own.write_path(0), own.write_path(2))
        code, _, err = metake(*words, "--method", "memit", "--text-tokens", "1500", "--recipe", "tiny", "--layers", "1")
        assert code == 2 and "holds a run with another layers" in err


def test_stats_need_no_recipe_for_named_layers(metake, own):
    words = ("stats", "--model", "my/own", "--text-tokens", "1500")
    assert metake(*words, "--layers", "2", "--threshold", "0.1")[0] == 0
    code, out, _ = metake(*words, "--recipe", "tiny")
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == ["layer 0", "layer 1", "layer 2"]


def test_bench_and_record_hand_recipe_and_layers_on(metake, monkeypatch):
    seen = []

    def made(**given):
        seen.append((given["recipe"], given["layers"]))
        raise ParameterError("enough")

    monkeypatch.setattr(bench, "bench", made)
    metake("bench", "--recipe", "gpt2-xl", "--layers", "4", "2")
    assert seen == [("gpt2-xl", [4, 2])]
    monkeypatch.setattr(record, "record", lambda *_, **__: [str(mk.methods.blue("my/own").layers)])
    assert metake("record", "--model", "my/own", "--recipe", "gpt2-xl", "--layers", "4", "2")[1] == "(2, 4)\n"
    with borrowed("my/own", "gpt2-xl", [4, 2]):
        assert record._borrowed("my/own") == ["gpt2-xl", "2_4"]
        config = runs.RunConfig("my/own")
    assert (config.recipe, config.layers) == ("gpt2-xl", [2, 4]), "a study's runs say what they were made with"


@pytest.mark.parametrize(("words", "told"), [
    ("run --out a --recipe llama3-7b", "unknown model of a recipe 'llama3-7b'. Did you mean 'llama3-8b'"),
    ("edit tiny --recipe tny --prompt x --subject a --target b", "Did you mean 'tiny'"),
    ("bench --layers one", "argument --layers: expected a whole number ≥ 0, found 'one'"),
    ("diagnose --layer 3", "Did you mean --layers?"), ("record --recipes tiny", "Did you mean --recipe?"),
    ("layers tiny --widht 3", "Did you mean --width?"), ("layer tiny", "Did you mean 'layers'"),
    ("export a --format modle", "Did you mean 'model'"), ("layers --stride 0", "expected a whole number ≥ 1"),
])  # fmt: skip
def test_mistyped_words_are_answered(metake, words, told):
    code, out, err = metake(*words.split())
    assert code == 2 and told in err and err.count("\n") == 1 and not out


def test_layers_that_the_model_lacks_are_refused_before_anything_is_written(metake, own):
    words = ("run", "--model", "my/own", "--recipe", "tiny", "--layers", "1", "9", "--out", "o", "--edits", "2")
    code, _, err = metake(*words, "--text-tokens", "1500")
    assert code == 2 and "layer 9 does not exist: 'my/own' has blocks 0 to 3" in err and not contents(Path.cwd())


# Which layers


@pytest.fixture(scope="module")
def swept(session_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(layers, "load", stand_in)
        return layer_sweep("tiny", "memit", edits=2, width=2, text_tokens=1500)


def test_a_sweep_tries_every_window_from_the_unedited_model(swept):
    assert list(swept.layers) == [(0, 1), (1, 2)] and set(swept.columns) >= {*layers.SCORES, "score", "restored"}
    assert swept.score.between(0, 100).all() and (swept.relative_update > 0).all() and not swept.flaw.any()
    assert swept.restored.isna().all(), "a random model knows nothing"
    told = layers.text(swept)
    assert "nothing to trace" in told and "best: layers" in told and told.endswith(recipe_block(swept))


@pytest.mark.parametrize("like", ["default", "gpt-j-6b", "tiny"])
def test_the_block_can_be_pasted(swept, like, monkeypatch):
    frame = swept.copy()
    frame.attrs |= {"model": "Owner/My-Model.1", "like": like}
    table = dict(recipes._table()) | tomllib.loads(recipe_block(frame))
    monkeypatch.setattr(recipes, "_table", lambda: table)
    best = tuple(frame.loc[frame.score.idxmax()].layers)
    for name in ("Owner/My-Model.1", "some/folder/my-model.1"):
        found = recipe(name)
        assert found.layers == best and found.blue_layers == best and found.rome_layer == best[1]
    assert all(key in table["sources"] for key in found.sources.values())
    same = {k for k in found.numbers if k not in layers.OWN and not k.endswith("_modules")}
    assert {k: found.numbers[k] for k in same} == {k: recipe(like).numbers[k] for k in same}
    assert mk.methods.metake("Owner/My-Model.1").layers == best


@pytest.mark.parametrize(("given", "expected"), [
    ((32, None, None, 0, None), (5, 2, 0, 30)), ((6, None, None, 0, None), (3, 1, 0, 4)),
    ((12, 3, 2, 1, 7), (3, 2, 1, 7)), ((2, None, None, 0, None), (1, 1, 0, 0)),
    ((80, None, None, 0, None), (5, 5, 0, 74)),
])  # fmt: skip
def test_windows(given, expected):
    found = layers._windows(*given)
    width, stride, first, last = expected
    assert found[0] == tuple(range(first, first + width)) and found[-1][-1] == last
    assert all(len(w) == width for w in found) and {b[0] - a[0] for a, b in zip(found, found[1:])} <= {stride}


@pytest.mark.parametrize("wrong", [(6, 7, None, 0, None), (6, 2, None, 5, 4), (6, 2, None, 0, 5), (6, 3, None, 2, 3)])
def test_windows_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ParameterError, match="the model has blocks 0 to 5"):
        layers._windows(*wrong)


def test_a_layer_without_room_does_not_stop_the_sweep(monkeypatch):
    monkeypatch.setattr(layers, "load", stand_in)
    found = layers.statistics

    def some(lm, text, layers, tokens):
        if 0 in layers:
            raise StatisticsError("the null space is empty")
        return found(lm, text, layers, tokens)

    monkeypatch.setattr(layers, "statistics", some)
    frame = layer_sweep("tiny", "memit", edits=2, width=1, last=1, text_tokens=1500)
    assert list(frame.flaw) == ["the null space is empty", ""] and frame.score[0] == 0
    monkeypatch.setattr(layers, "statistics", lambda *_, **__: some(None, "", [0], 0))
    with pytest.raises(StatisticsError, match="nothing could be written at any window.*null space is empty"):
        layer_sweep("tiny", "memit", edits=2, width=1, last=1, text_tokens=1500)


def test_tracing_finds_where_tiny_keeps_its_facts():
    lm, cases = mk.load("tiny"), mk.facts(limit=6)
    low, high, none = traced(lm, cases, [(0, 1, 2), (3, 4), ()])
    assert low > 3 * abs(high) and none == 0
    before = lm.model(torch.tensor([[1, 2, 3]])).logits
    assert traced(lm, cases, [(0, 1, 2)]) == traced(lm, cases, [(0, 1, 2)]) == [pytest.approx(low)]
    assert torch.equal(lm.model(torch.tensor([[1, 2, 3]])).logits, before), "hooks were left"
    assert all(map(torch.isnan, torch.tensor(traced(lm, mk.facts(limit=2, format="zsre"), [(0,)]))))


def test_the_command_prints_the_table_and_the_block(metake, monkeypatch, swept):
    seen = []
    monkeypatch.setattr(layers, "layer_sweep", lambda *given: seen.append(given) or swept)
    words = "layers m --recipe gpt2-xl --method memit --data d --edits 3 --width 2 --stride 4 --first 1 --last 9"
    words += " --text t --text-tokens 5 --dtype float32 --device cpu"
    code, out, err = metake(*words.split())
    assert code == 0 and not err and out == layers.text(swept) + "\n"
    assert seen == [("m", "memit", "d", 3, 2, 4, 1, 9, "gpt2-xl", "t", 5, "float32", "cpu", 1)]
    assert "layers" in [name for name, *_ in cli.COMMANDS]
