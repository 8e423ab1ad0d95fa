"""The table of methods: every name builds on every model, with the published numbers, and each edit teaches its
fact.
"""

from __future__ import annotations

import copy
import tomllib
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

import pytest
from models import random_model
from transformers.pytorch_utils import Conv1D

import metake as mk
from metake import methods
from metake.algebra.geometry import inverse_covariance, isotropic, null_space
from metake.algebra.postprocess import cap_spectrum, keep_largest, soften_principal
from metake.data.requests import Cases
from metake.editing.editor import Editor, even, root, whole
from metake.editing.outer import Refinement
from metake.editing.recipes import models, recipe, source
from metake.editing.record import describe
from metake.experiments.speed import run_time
from metake.experiments.studies import gamma_beforehand, hidden_states, kl_strength, realized_residual
from metake.methods import (
    ABLATIONS,
    DIFFERENCES,
    FINE_TUNING,
    GRADIENT,
    GRADIENT_DIFFERENCES,
    METHODS,
    OPERATORS,
    TRAINED,
    method,
    named,
    to_train,
)
from metake.support.errors import ParameterError

KINDS = {
    name: size["kind"]
    for name, size in tomllib.loads(files("metake").joinpath("data", "sizes.toml").read_text(encoding="utf-8")).items()
}

# What the released configurations say, typed off once more: layers, ROME's layer and BLUE's; v_lr, v_num_grad_steps,
# clamp_norm_factor, v_weight_decay; mom2_update_weight; L2 of AlphaEdit and of BLUE; ROME's v_lr, steps, clamp, decay
# and
# mom2_adjustment; PMET's v_lr, steps, kl_factor, clamp and mom2_update_weight. kl_factor is 0.0625 unless PMET says
# otherwise.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2-xl": {
        "layers": (13, 14, 15, 16, 17), "rome_layer": 17, "blue": (13, 17), "target": (0.5, 20, 0.75, 0.5),
        "weight": 20000, "ridge": 10, "blue_ridge": 80,
        "rome": (0.5, 20, 4.0, 0.5), "adjusted": True, "pmet": (0.5, 20, 0.0625, 2.0, 10000),
    },
    "gpt-j-6b": {
        "layers": (3, 4, 5, 6, 7, 8), "rome_layer": 5, "blue": (3, 8), "target": (0.5, 25, 0.75, 0.5), "weight": 15000,
        "ridge": 10, "blue_ridge": 95,
        "rome": (0.5, 20, 4.0, 0.5), "adjusted": True, "pmet": (0.2, 30, 1.0, 0.75, 6000),
    },
    "llama3-8b": {
        "layers": (4, 5, 6, 7, 8), "rome_layer": 5, "blue": (4, 8), "target": (0.1, 25, 0.75, 0.5), "weight": 15000,
        "ridge": 10, "blue_ridge": 1,
        "rome": (0.5, 25, 4.0, 1e-3), "adjusted": False, "pmet": (0.1, 25, 0.0625, 0.75, 15000),
    },
    "phi-1.5": {"layers": (4, 5, 6, 7, 8), "rome_layer": 5, "blue": (4, 8), "target": (0.1, 25, 0.75, 0.5),
    "weight": 15000, "ridge": 10},
    "qwen2.5-7b": {"layers": (4, 5, 6, 7, 8), "rome_layer": 5, "blue": (4, 8), "target": (0.5, 25, 4.0, 1e-3),
    "weight": 15000, "ridge": 10, "adjusted": False},
    "qwen3-4b-thinking": {"layers": (4, 5, 6, 7, 8), "rome_layer": 5, "blue": (4, 8), "target": (0.5, 25, 0.75, 1e-3),
    "weight": 15000, "ridge": 10, "adjusted": False},
}  # fmt: skip
HUB = {
    "gpt2-xl": "openai-community/gpt2-xl", "gpt-j-6b": "EleutherAI/gpt-j-6B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct", "phi-1.5": "microsoft/phi-1_5",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct", "qwen3-4b-thinking": "Qwen/Qwen3-4B-Thinking-2507",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
}  # fmt: skip
CLOSED = [name for name in named() if name.partition("/")[0] not in GRADIENT | FINE_TUNING]


def numbers(editor: Editor) -> tuple[float, int, float, float]:
    rule = editor.target
    return rule.step_size, rule.steps, rule.clamp, rule.decay


@pytest.mark.parametrize("model", PUBLISHED)
def test_numbers_are_the_published_ones(model: str):
    said = PUBLISHED[model]
    for name in ("memit", "memit_seq", "rect", "prune"):
        editor = method(name, model)
        assert (
            editor.layers == said["layers"]
            and numbers(editor) == said["target"]
            and editor.metric == inverse_covariance(said["weight"])
        )
        assert (editor.target.kl_weight, editor.target.stop_below, editor.seed) == (0.0625, 0.05, 0)
    for name in ("alphaedit", "sphere", "metake", "metake/sphere"):
        editor = method(name, model)
        assert (
            editor.layers == said["layers"]
            and numbers(editor) == said["target"]
            and editor.metric == null_space(0.02, said["ridge"])
        )
    blue = method("blue", model)
    assert (
        blue.layers == said["blue"]
        and numbers(blue) == said["target"]
        and blue.metric == null_space(0.02, said.get("blue_ridge", blue.metric.ridge))
    )
    rome = method("rome", model)
    assert rome.layers == (said["rome_layer"],) == method("emmet", model).layers and numbers(rome) == said.get(
        "rome", numbers(rome)
    )
    assert rome.metric == {True: inverse_covariance(1.0), False: isotropic(), None: rome.metric}[said.get("adjusted")]
    pmet = method("pmet", model)
    found = (pmet.target.step_size, pmet.target.steps, pmet.target.kl_weight, pmet.target.clamp, pmet.metric.weight)
    assert found == said.get("pmet", found) and pmet.layers == said["layers"] and pmet.target.decay == said["target"][3]
    assert method("sphere", model).post == (soften_principal(0.5, 0.5),) and method("rect", model).post == (
        keep_largest(0.4, 1e-8),
    )


def test_methods_are_the_combinations_that_their_papers_describe():
    """All parts of every method, but its numbers; what a part is not named for is the family's default."""
    plain = {
        "site": "block", "relax": None, "allocation": even, "remember": False, "noise": 1.0, "refine": False,
        "own": False, "post": (), "together": None, "plain": False, "flat": False, "contexts": 6
    }
    said = {
        "memit": {}, "memit_seq": {"remember": True}, "emmet": {"noise": 0.0}, "prune": {"post": (cap_spectrum,)},
        "rect": {"post": (keep_largest,)},
        "rome": {"site": "mlp", "allocation": whole, "noise": 0.0, "together": 1, "plain": True, "flat": True,
        "contexts": 21},
        "pmet": {"site": "mlp+attention", "relax": 0.1, "allocation": root}, "alphaedit": {"remember": True},
        "sphere": {"remember": True, "post": (soften_principal,)},
        "blue": {"remember": True, "own": True, "allocation": whole}, "metake": {"remember": True, "refine": True},
        "metake_v1": {"refine": True}, "metake/whole": {"remember": True, "refine": True},
    }  # fmt: skip
    said |= {name: said[name.rpartition("/")[2]] | {"refine": True} for name in OPERATORS}
    assert said.keys() == {**METHODS, **OPERATORS}.keys()
    for name, parts in said.items():
        e = method(name, "gpt-j-6b")
        rule = e.context_rule
        found = {
            "site": e.target.site, "relax": e.target.relax, "allocation": e.allocation, "remember": e.remember,
            "noise": e.noise, "refine": e.refine is not None, "own": e.own_targets,
            "post": tuple(map(type, e.post)), "together": e.together, "plain": e.plain, "flat": rule.flat,
            "contexts": 1 + 5 * len(rule.lengths) * rule.each,
        }  # fmt: skip
        assert found == plain | parts, name
    assert method("rome", "tiny").context_rule.lengths == (5, 10) and method("memit", "tiny").context_rule.lengths == (
        10,
    )
    assert [p.when for n in ("rect", "prune", "sphere") for p in method(n, "tiny").post] == [
        "batch", "sequence", "layer"
    ]
    assert {recipe(m).refine_steps for m in models()} == {15}, "the paper's number of outer steps"


@pytest.mark.parametrize("model", models())
def test_every_name_builds_on_every_model(model: str):
    assert set(models()) >= {*PUBLISHED, "smollm2-135m", "tiny"}
    built = {name: method(name, model) for name in CLOSED}
    assert all(isinstance(editor, Editor) for editor in built.values())
    same = [(a, b) for a in built for b in built if a < b and built[a] == built[b]]
    allowed = (
        {("alphaedit", "alphaedit/paper")} if recipe(model).threshold == 1e-2 and recipe(model).ridge == 1 else set()
    )
    stored_as_used = recipe(model).sphere_stored_side == "key"  # then SPHERE's code does what its paper says
    assert set(same) <= allowed | ({("sphere", "sphere/stored")} if stored_as_used else set()), (
        "two names for one editor"
    )
    for name in CLOSED:
        changed = method(name, model, seed=7, layers=(1,), contexts=("{}", "So. {}"))
        assert changed == replace(built[name], seed=7, layers=(1,), contexts=("{}", "So. {}"))


@pytest.mark.parametrize("model", HUB)
def test_a_model_goes_by_its_name_its_hub_name_and_the_end_of_a_path(model: str):
    ways = (model, model.upper(), HUB[model], f"/models/{HUB[model].partition('/')[2]}")
    assert {recipe(way).model for way in ways} == {model}
    assert all(method("metake", way) == method("metake", model) for way in ways)


@pytest.mark.parametrize("model", models())
def test_every_number_has_a_source_that_exists(model: str):
    table = tomllib.loads(files("metake").joinpath("recipes.toml").read_text(encoding="utf-8"))
    found = recipe(model)
    assert found.numbers.keys() == found.sources.keys() == table["default"].keys(), (
        "a model's number that no method reads, or a misspelled one"
    )
    for name, key in found.sources.items():
        assert len(source(key)) > 20, name
    assert set(table["sources"]) == {
        v[1] for m in (*models(), "default") for k, v in table[m].items() if k != "names"
    } | {"metake_open"}, "a source that nothing cites"


@pytest.mark.parametrize("model", sorted(KINDS.keys() & models()))
def test_spheres_code_softens_the_output_side_only_where_weights_are_stored_transposed(model: str):
    lm = random_model(KINDS[model])
    assert recipe(model).sphere_stored_side == ("output" if isinstance(lm.write(0), Conv1D) else "key")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_changes_one_part_of_its_method(name: str):
    family, difference = name.partition("/")[0], DIFFERENCES[name]
    usual, other = METHODS[family]("gpt2-xl"), difference.make("gpt2-xl")
    assert [f.name for f in fields(Editor) if getattr(usual, f.name) != getattr(other, f.name)] == [
        {"alphaedit": "metric", "pmet": "target", "metake": "refine"}.get(family, "post")
    ]
    assert difference.default in ("paper", "code", "ours") and len({difference.paper, difference.code, ""}) == 3
    assert {difference.usual, difference.option} == {difference.paper, difference.code}
    assert difference.usual == (difference.paper if difference.default == "paper" else difference.code)


@pytest.mark.parametrize("name", GRADIENT_DIFFERENCES)
def test_a_difference_of_the_gradient_family_changes_one_part_of_its_rule(name: str):
    difference, usual, other = GRADIENT_DIFFERENCES[name], method(name.partition("/")[0], "tiny"), method(name, "tiny")
    part = {"mend/added": "added", "malmen/living": "living", "malmen/micro-batch": "micro"}[name]
    assert replace(other.rule, **{part: getattr(usual.rule, part)}) == usual.rule != other.rule
    assert other.modules == usual.modules and other.trained == usual.trained and len(
        {difference.paper, difference.code, ""}
    ) == 3


def test_the_refinement_goes_on_any_base_and_its_ablations_change_it_alone():
    for base in ("memit", "blue", "sphere"):
        made, plain = method(f"metake/{base}", "tiny"), method(base, "tiny")
        assert isinstance(made.refine, Refinement) and replace(made, refine=None) == plain
    assert [
        replace(change(method("metake", "tiny")), refine=None) == method("alphaedit", "tiny")
        for change in ABLATIONS.values()
    ] == [True] * 3


def test_an_unknown_name_or_part_is_answered_with_the_near_ones():
    for wrong, near in (
        ("mmit", "memit"), ("metake/blu", "metake/blue"), ("rect/orignal", "rect/original"), ("Rome", "rome")
    ):
        with pytest.raises(ParameterError, match=f"unknown method '{wrong}'. Did you mean .*'{near}'"):
            method(wrong, "tiny")
    for name in ("rect", "metake", "metake/whole", "metake/literal"):
        with pytest.raises(ParameterError, match="unknown part of an editor 'postprocess'.*'post'"):
            method(name, "tiny", postprocess=())
    with pytest.raises(ParameterError, match="unknown model of a recipe 'gpt2-xxl'.*'gpt2-xl'"):
        method("rome", "gpt2-xxl")
    assert named().keys() == {*METHODS, *GRADIENT, *FINE_TUNING, *OPERATORS, *DIFFERENCES, *GRADIENT_DIFFERENCES}
    assert methods.METHODS is mk.METHODS


def test_the_gradient_family_differs_where_its_papers_do():
    ultraedit, rules = method("ultraedit", "llama3-8b"), {name: to_train(name, "gpt-j-6b")[0] for name in TRAINED}
    assert ultraedit.rule.living and ultraedit.rule.coefficient == "normalized" and ultraedit.rule.step == 1e-6
    assert ultraedit.modules[:5] == tuple(f"model.layers.{i}.mlp.gate_proj" for i in range(11, 16))
    assert len(ultraedit.modules) == 12 and ultraedit.modules[-1] == "model.layers.24.mlp.up_proj"
    assert {name: (r.solve, r.tokens, r.steps, r.penalty, r.inside) for name, r in rules.items()} == {
        "malmen": ("least squares", "answer", 1, "kl", False), "mend": ("sum", "all", 1, "kl", True),
        "smedit": ("least squares", "answer", 2, "norm", False),
    }  # fmt: skip
    assert to_train("malmen", "gpt-j-6b")[1] == tuple(f"transformer.h.{i}.mlp.fc_out" for i in range(22, 28))
    assert method("ultraedit", "tiny", seed=3).seed == 3


def test_the_literal_reading_is_that_of_the_equations_whatever_the_rule_chose():
    found = method("metake/literal", "tiny").refine
    assert found == Refinement(
        found.steps, step_size=0.1, optimizer="adam", anchor_norm="sum", prompts="contexts",
        locality_direction="post_pre", locality_position="subject", look_ahead="last", keep="last",
    )  # fmt: skip
    assert all(method(f"metake/literal/{base}", "tiny").refine == found for base in ("memit", "blue", "sphere"))


def test_what_is_not_trained_or_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("metake.editing.gradient.trained.SHIPPED", tmp_path)  # whoever trained one has it there
    with pytest.raises(ParameterError, match="no trained editor of malmen for 'smollm2-135m'; make one with: metake t"):
        method("malmen", "smollm2-135m")
    with pytest.raises(ParameterError, match="unknown method that is trained 'malmem'.*'malmen'"):
        to_train("malmem", "tiny")
    with pytest.raises(ParameterError, match="nobody has said which linear maps of 'phi-1.5' mend edits"):
        to_train("mend", "phi-1.5")


def test_parts_of_the_gradient_family_are_answered_with_the_near_ones():
    for name in GRADIENT:
        with pytest.raises(ParameterError, match="unknown part of an editor 'rules'.*'rule'"):
            method(name, "tiny", rules=())


def test_two_trained_editors_are_told_apart_in_records():
    """By their networks' parameters: what a study keeps of the one is not taken for the other's."""
    one = method("malmen", "tiny")
    other = replace(one, networks=copy.deepcopy(one.networks))
    assert describe(one) == describe(other) and one.digest == other.digest
    other.networks[0][0].step.data += 1e-9
    other = replace(one, networks=other.networks)
    assert describe(one) != describe(other) and one.digest != other.digest


@pytest.mark.parametrize("study", [
    lambda: realized_residual.realized_residual(methods_=("ultraedit",)),
    lambda: kl_strength.kl_strength(methods_=("ultraedit",)),
    lambda: gamma_beforehand.gamma_beforehand(methods_=("alphaedit", "ultraedit"), edits=4),
    lambda: hidden_states.hidden_states(methods_=("alphaedit", "ultraedit")),
    lambda: run_time.stream(method="mend"),
])  # fmt: skip
def test_who_looks_at_planned_residuals_refuses_a_method_without_them(study, monkeypatch):
    """In one line, before anything is edited."""
    monkeypatch.setattr(Editor, "step", lambda *_, **__: pytest.fail("a method was run"))
    with pytest.raises(ParameterError, match="plans no residuals.*choose a method that plans"):
        study()


@pytest.fixture(scope="module")
def tiny(session_cache):
    """The embedded model, three facts that it knows otherwise, and key statistics of the layers that any method
    edits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        lm = mk.load("tiny")
        layers = sorted({layer for name in CLOSED for layer in method(name, "tiny").layers})
        known = mk.facts(limit=3)
        asked = [c._replace(probes=tuple(p for p in c.probes if p.kind == "efficacy")) for c in known]
        return lm, Cases(asked, known.format, known.source), mk.statistics(lm, layers=layers, tokens=3000)


def margins(found: mk.Evaluation) -> list[float]:
    """By how much the new answer is likelier than the old one, per fact, in nats."""
    probes = [next(p for p in case.probes if p.kind == "efficacy") for case in found.cases]
    return [p.target.log_p - p.rival.log_p for p in probes]


@pytest.mark.parametrize("name", CLOSED)
def test_known_facts_of_the_tiny_model_really_change(tiny, name: str):
    """All towards the new answer; whether it wins is what the pages measure. How much of a plan is realized differs by
    method.
    """
    lm, cases, statistics = tiny
    before = margins(mk.evaluate(lm, cases))
    edit = method(name, "tiny").edit(lm, [c.request for c in cases], statistics)
    with edit.applied(lm):
        after = margins(mk.evaluate(lm, cases))
    assert max(before) < -5, "the model does not know these facts otherwise: the test is too easy"
    assert all(b > a + 0.1 for a, b in zip(before, after, strict=True)), f"{before} became {after}"
