"""One formula and the published differences: the checks hold, would notice if they did not,
and say what the code says.
"""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from models import stand_in

import metake as mk
from metake import methods, report
from metake.algebra.postprocess import keep_largest
from metake.algebra.update import total
from metake.editing.statistics import statistics
from metake.experiments import runs
from metake.experiments.decision import Decision
from metake.experiments.speed.literal import load_reference
from metake.experiments.studies import differences, parts
from metake.experiments.theory import one_formula, sequential, solves
from metake.support.errors import ParameterError

REMEMBER = ("memit_seq", "alphaedit", "blue", "metake", "metake/whole")  # and do nothing afterwards


@pytest.fixture(autouse=True)
def _random_base(monkeypatch):
    for module in (parts, sequential, differences, runs):
        monkeypatch.setattr(module, "load", stand_in)
    for module in (parts, sequential, differences):
        monkeypatch.setattr(module, "statistics", partial(statistics, tokens=3000))


# The published forms


def test_every_method_equals_its_published_forms():
    found = one_formula.formula_check(trials=12)
    assert set(found.method) == set(methods.METHODS) and found.groupby("method").form.nunique()["alphaedit"] == 3
    assert (found.groupby(["method", "form"]).size() == 12).all() and set(found.dim) == {4, 16, 64}
    assert (
        found.ratio.max() < 0.5
        and (found.n[found.method == "rome"] == 1).all()
        and found.n.max() > 64
        and found.past.max() > 32
    )
    assert found.groupby("method").error.median().max() < 1e-11 and found[found.kappa < 100].error.max() < 1e-12
    assert one_formula.by_form(found)["all explained by rounding"].all()
    pd.testing.assert_frame_equal(found, one_formula.formula_check(trials=12), check_exact=True)
    assert one_formula.judge(found, found.assign(stage="end"))["holds"] is True


def test_named_differences_equal_their_published_forms_too():
    found = one_formula.formula_check(trials=6, names=tuple(methods.DIFFERENCES))
    assert len(found) == 6 * (1 + 1 + 1 + 3 + 3 + 1) and found.ratio.max() < 0.5


def test_the_published_post_processes_bite():
    """Otherwise the comparison would be of the solve alone."""
    reference, generator, bitten = (
        load_reference(), torch.Generator().manual_seed(0), dict.fromkeys(("rect", "prune", "sphere"), 0)
    )
    for _ in range(20):
        for method in bitten:
            editor, case = methods.method(method, "tiny"), solves.draw(generator, 8, 4)
            solved = solves.published(reference, method, editor, case)
            plain = solves.published(
                reference, "memit" if method != "sphere" else "alphaedit",
                methods.method("memit" if method != "sphere" else "alphaedit", "tiny"), case
            )
            bitten[method] += not any(
                torch.allclose(a, b, rtol=1e-6) for a, b in zip(solved.values(), plain.values(), strict=True)
            )
    assert bitten["rect"] == bitten["sphere"] == 20 and bitten["prune"] >= 3


@pytest.mark.parametrize("wrong", ["factor", "noise", "history", "post"])
def test_a_wrong_formula_is_found(monkeypatch, wrong):
    right = solves.gate
    gates = {
        "factor": lambda keys, metric, noise=1.0, at=None: (1 + 1e-6) * right(keys, metric, noise, at),
        "noise": lambda keys, metric, noise=1.0, at=None: right(keys, metric, 1.001 * noise, at),
        "history": lambda keys, metric, noise=1.0, at=None: right(keys, getattr(metric, "base", metric), noise, at),
        "post": right,
    }
    monkeypatch.setattr(solves, "gate", gates[wrong])
    if wrong == "post":
        monkeypatch.setattr(keep_largest, "__call__", lambda self, update, weight: update)
    found = one_formula.formula_check(trials=6)
    verdict = one_formula.judge(found, one_formula.search(2)[:0])
    assert verdict["holds"] is False and verdict["margin"] > 1 and "times rounding" in verdict["decided_by"]
    noticed = set(found[found.ratio > 1].method)
    expected = {
        "factor": set(methods.METHODS), "noise": set(methods.METHODS) - {"rome", "emmet"},
        "history": {*REMEMBER, "sphere"}, "post": {"rect"}
    }
    assert noticed == expected[wrong]


def test_an_uncompared_method_and_a_nan_leave_it_open():
    found = one_formula.formula_check(trials=3, names=("memit",))
    nothing = found[:0].assign(stage=[])
    assert (
        one_formula.judge(found, nothing)["holds"] is None
        and "alphaedit" in one_formula.judge(found, nothing)["decided_by"]
    )
    assert one_formula.judge(found, nothing, names=("memit",))["holds"] is True
    assert one_formula.judge(found.assign(ratio=np.nan), nothing, names=("memit",))["holds"] is None
    with pytest.raises(ParameterError, match="no published form of 'other' is known"):
        solves.published(load_reference(), "other", methods.memit("tiny"), solves.draw(torch.Generator(), 4, 2))


def test_the_search_goes_up_and_is_repeatable():
    found = one_formula.search(40)
    assert list(found.method.unique()) == ["rome", "memit", "memit_seq", "emmet", "alphaedit", "metake_v1"]
    sides = found.pivot(index="method", columns="stage", values="ratio")
    assert (
        (sides.end >= sides.start).all()
        and (sides.end > sides.start).sum() >= 4
        and sides.end.max() < 1
    )
    pd.testing.assert_frame_equal(found, one_formula.search(40), check_exact=True)


def test_the_search_finds_what_a_random_draw_does_not(monkeypatch):
    """A flaw that shows only where two keys nearly coincide."""
    right = solves.gate

    def flawed(keys, metric, noise=1.0, at=None):
        close = (
            len(keys) > 1
            and torch.cdist(keys, keys).add(torch.eye(len(keys)).to(keys) * 1e9).min() < 1e-2 * keys.norm()
        )
        return right(keys, metric, noise, at) * (1 + 1e-3 * close)

    monkeypatch.setattr(solves, "gate", flawed)
    found = one_formula.search(150).set_index(["method", "stage"]).ratio
    assert found["memit", "start"] < 1 < found["memit", "end"]


def test_the_check_notices_a_slightly_wrong_key():
    assert (one_formula.sensitivity(20).noticed >= 18).all()
    assert (one_formula.sensitivity(20, size=0.0).noticed == 0).all()


# The edges


def test_coinciding_keys_are_refused_and_distinct_ones_agree():
    found = one_formula.coinciding_keys(distances=(0.0, 1e-9, 1e-2))
    assert found.library.tolist() == ["refuses", "refuses", "same update"] and found[
        "d×d form writes the plan"
    ].tolist()[::2] == [False, True]
    assert found["size of its update"].isna().tolist() == [True, False, False]


def test_a_projector_that_is_none_parts_the_forms():
    found = one_formula.not_idempotent(sizes=(1e-6, 1e-3)).set_index("projector")
    assert (found["released code − paper"] == "rounding").all(), "a symmetric P is enough for these two"
    apart = found["projected keys − paper"]
    assert apart["as computed"] == apart["as the library keeps it"] == "rounding"
    orders = [
        float(apart[name]) for name in ("rounded to single precision", "disturbed by 1e-06", "disturbed by 1e-03")
    ]
    assert orders == sorted(orders) and orders[0] <= 1e-6 and orders[2] >= 1e-4


# One by one


def test_one_by_one_is_the_batch_with_memory_and_the_residual_read_again():
    found = sequential.sequential_check(trials=5)
    assert (
        sequential.judge(found)["holds"] is True
        and "0 of 25 with it planned once" in sequential.judge(found)["decided_by"]
    )
    table = sequential.by_method(found).set_index("method")
    assert set(table.index[table["read again"] < sequential.SAME]) == set(REMEMBER)
    assert (table["planned once"] > 1e-3).all() and set(table.index[table["unrelated keys"] > sequential.SAME]) == {
        "rect", "sphere"
    }


def test_without_memory_the_statement_fails(monkeypatch):
    monkeypatch.setattr(sequential, "condition", lambda metric, keys: metric)
    assert sequential.judge(sequential.sequential_check(trials=3))["holds"] is False
    assert sequential.judge(sequential.sequential_check(trials=1, names=("memit",)))["holds"] is None


def test_on_a_real_layer_only_fixed_targets_and_keys_agree():
    found = (
        sequential.sequential_on_model(names=("memit", "alphaedit"), requests=2)
        .set_index(["method", "keys", "targets"])
        .difference
    )
    assert found["alphaedit", "plain prompt", "kept"] < 1e-9 < 1e-6 < found["alphaedit", "averaged", "planned anew"]
    assert found["memit", "plain prompt", "kept"] > 1e-9 and found["alphaedit", "averaged", "kept"] > 1e-9


def test_the_parts_taken_together_are_the_pipelines_batch():
    lm, asked = stand_in(), [case.request for case in mk.facts(limit=3)]
    editor = methods.alphaedit("tiny", layers=(2,))
    given = statistics(lm, layers=(2,), tokens=3000)
    state = editor.init(lm, given)
    targets = mk.optimize_targets(lm, asked, state.contexts, 2, editor.target)
    torch.testing.assert_close(
        sequential._parts(lm, editor, state, asked, targets, 3), editor.edit(lm, asked, given).updates[0].delta,
        rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("values", "holds", "margin"), [
    ((True, True), True, 2.0), ((True, None), None, 3.0), ((None, False), False, 3.0)
])  # fmt: skip
def test_judgments_add_up(values, holds, margin):
    told = [Decision(v, 2.0 + i, "rounding").verdict(str(v)) for i, v in enumerate(values)]
    assert sequential.together(*told) == Decision(holds, margin, "rounding").verdict("; ".join(map(str, values)))


# The parts


def test_parts_say_what_the_editors_are():
    plan, write = parts.parts().set_index("method"), parts.parts(side=parts.written).set_index("method")
    assert list(plan.index) == list(write.index) == list(methods.METHODS)
    assert plan["share of the residual"].to_dict() == {
        m: "all" if m in ("rome", "emmet", "blue") else "1/√(layers left)" if m == "pmet" else "1/(layers left)"
        for m in plan.index
    }
    assert (
        set(plan.index[plan["refined by"].notna()]) == {"metake", "metake/whole", "metake_v1"}
        and plan.target["blue"].endswith("each layer's own")
        and plan.layers["blue"] == "0, 2"
    )
    assert set(write.index[write.remembers.notna()]) == {*REMEMBER, "sphere"} and set(
        write.index[write.afterwards.notna()]
    ) == {"prune", "rect", "sphere"}
    assert (
        write["metric Q"]["memit"] == "(λC)⁻¹, λ = 2000"
        and write["metric Q"]["emmet"] == "C⁻¹"
        and "below 0.02" in write["metric Q"]["alphaedit"]
    )
    assert (
        "exact" in write.write["rome"]
        and "plain prompt" in write.write["rome"]
        and write["solved together"]["rome"] == "one request"
    )
    assert "λ = 20000" in parts.parts("gpt2-xl", ("memit",), parts.written)["metric Q"][0], "another model's numbers"
    assert parts.metric_in_words(
        methods.rome("llama3-8b").metric
    ) == "I" and "added a second time" in parts.post_in_words(methods.method("prune/added-twice", "tiny").post[0])


def test_the_gradient_familys_parts_are_those_of_its_editors():
    found = parts.parts(names=tuple(methods.GRADIENT), side=parts.gradients).set_index("method")
    assert found["metric Q"]["ultraedit"] == "I" and found["metric Q"]["smedit"] == "I/λ, λ learned"
    assert "nothing is solved" in found["metric Q"]["mend"] and found["rows of R"]["mend"].startswith("−η g")
    assert "k·k" in found["rows of R"]["malmen"] and found["normalized by"].to_dict() == {
        "ultraedit": "all edits so far", "malmen": "the training", "mend": "the training", "smedit": "the training"
    }
    assert found["k, g read"]["smedit"].startswith("2 times") and found.learned["smedit"] == "with ‖Δ‖²"
    assert pd.isna(found.learned["ultraedit"])
    added = parts.parts(names=("mend/added",), side=parts.gradients)["rows of R"][0]
    assert added == found["rows of R"]["mend"].removeprefix("−")


def test_kept_is_what_the_state_holds():
    found = parts.kept().set_index("method")
    assert (found.edits == 4).all() and set(found.index[found["keys remembered a layer"] == 4]) == {*REMEMBER, "sphere"}
    assert (found["keys remembered a layer"].drop([*REMEMBER, "sphere"]) == 0).all()
    assert found["copies of weights"].to_dict() == {m: 3 * (m == "prune") for m in found.index} and list(
        found.index[found["acts at the end"]]
    ) == ["prune"]


# The differences


def test_the_table_is_that_of_the_code():
    found = differences.table().set_index("option")
    assert list(found.index) == list(differences.NAMED) and found.changes.notna().all()
    assert (
        found.changes["prune/added-twice"] == "post.add_twice: False → True"
        and found.changes["alphaedit/paper"] == "metric.threshold: 0.02 → 0.01"
    )
    assert "metric.ridge: 10.0 → 1.0" in differences.table("gpt2-xl").set_index("option").changes["alphaedit/paper"]
    assert (found.default == [d.default for d in differences.NAMED.values()]).all()
    # of a model that nobody has trained an editor for, the trained ones' differences are left out
    assert list(differences.table("gpt2-xl").option) == list(methods.DIFFERENCES)


def test_effects_are_those_of_whole_runs(tmp_path):
    options = ("rect/original", "prune/added-twice")
    records, changes = differences.effects(options=options, edits=3, batch=2)
    assert records.groupby("method").size().to_dict() == dict.fromkeys(
        ("rect", "rect/original", "prune", "prune/added-twice"), 3
    )
    deltas = {}
    for name in ("prune", "prune/added-twice"):
        folder = tmp_path / name.replace("/", "-")
        expected = runs.run(runs.RunConfig("tiny", name, "facts", 3, 2, text_tokens=3000), folder)
        assert records[records.method == name].efficacy.tolist() == [row["efficacy"] for row in expected.records()]
        deltas[name] = total(runs.open_run(folder)[1]).updates
    distance = sum((a.delta - b.delta).square().sum() for a, b in zip(*deltas.values(), strict=True)).sqrt().item()
    norms = [sum(u.delta.square().sum() for u in updates).sqrt().item() for updates in deltas.values()]
    assert changes.set_index("option").loc["prune/added-twice"][["change", "size"]].tolist() == pytest.approx(
        [distance / norms[0], norms[1] / norms[0]], rel=1e-6
    )
    found = differences.beside(records, options)
    assert (
        len(found) == 6
        and (found.option - found.default - found.difference).abs().max() < 1e-9
        and (found.low <= found.high).all()
    )


@pytest.mark.parametrize(("change", "holds"), [((0.2, 0.02), True), ((0.2, 0.0), None), ((0.0, 1e-12), False)])
def test_differences_are_judged_by_the_updates(change, holds):
    verdict = differences.judge(pd.DataFrame({"option": ["rect/original", "sphere/stored"], "change": change}))
    assert verdict["holds"] is holds and "rect/original" in verdict["decided_by"]


def test_both_readings_of_specificity_are_shown():
    rows = [
        ("ZsRE format", "pre-edit", 0.25, None), ("ZsRE format", "metake", 0.2, 0.9),
        ("CounterFact format", "metake", 1.0, 1.0)
    ]
    records = pd.DataFrame(rows, columns=["dataset", "method", "specificity", "specificity_pre_edit"]).assign(seed=0)
    records.attrs["label"] = "recorded"
    found = differences.specificities(records)
    assert found.to_numpy().tolist() == [["pre-edit", 25.0, 100.0], ["metake", 20.0, 90.0]] and found.attrs == {
        "label": "recorded"
    }


def test_the_ceiling_of_an_answer_with_one_token_too_many():
    found = differences.ceiling().set_index("tokens of the answer")
    assert found["best possible"]["1"] == 50 and found["best possible"]["2"] == pytest.approx(200 / 3)
    alone = found.drop("all")
    assert found.questions["all"] == alone.questions.sum() and found["best possible"]["all"] == pytest.approx(
        np.average(alone["best possible"], weights=alone.questions)
    )


# The figures


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METAKE_FIGURES", raising=False)
    return tmp_path / "_build" / "figures"


def test_figures_tell_the_same_twice_and_in_words(project):
    records = one_formula.formula_check(trials=3)
    searched = one_formula.search(3)
    one, other = (report.agreement(records, searched) for _ in range(2))
    assert one._repr_mimebundle_() == other._repr_mimebundle_() and one.svg["light"] != one.svg["dark"]
    assert (
        "stays within rounding in 6 solves" in one.alt
        and len(pd.read_csv(project / "one_formula.csv")) == len(records) + 6
    )
    wrong = report.agreement(records.assign(ratio=records.ratio.where(records.method != "memit", 1e6)))
    assert "MEMIT: 3 comparisons, not all explained" in wrong.alt and "no" in str(wrong).splitlines()[3]
    rows = [
        ("rect/original", "efficacy", 50.0, 25.0, -25.0, -40.0, -10.0),
        ("rect/original", "specificity", 99.0, 99.0, 0.0, 0.0, 0.0),
    ]
    sides = pd.DataFrame(rows, columns=["method", "metric", "default", "option", "difference", "low", "high"])
    shown = report.option_effects(sides)
    assert (
        "RECT (original), efficacy: 50.0 and 25.0" in shown.alt
        and "excludes zero in 1 of 2" in shown.alt
        and "−25.0" in shown.svg["light"]
    )


def test_token_by_token_counts_what_is_likelier_at_each_place(monkeypatch):
    from metake.data.requests import EditCase, EditRequest, Probe

    lm = mk.load("tiny")
    probe = Probe("efficacy", "The capital of France is", "Rome and Paris", "Paris")
    found = differences._shared(lm, probe)
    start = lm.tokenizer("The capital of France is").input_ids
    first = lm.model(torch.tensor([start])).logits[0, -1]
    ours, other = (lm.tokenizer(f" {text}").input_ids[0] for text in ("Rome", "Paris"))
    assert found == {"tokens": 1, "token by token": float(first[ours] > first[other])}
    cases = [EditCase(EditRequest("The capital of {} is", "France", "Rome", "0"), (probe,))]
    monkeypatch.setattr(differences, "read_cases", lambda _: cases)
    monkeypatch.setattr(differences, "select", lambda lm, cases, *_: cases)
    records = differences.by_token(edits=1)
    assert len(records) == 1 and records["kind"].tolist() == ["efficacy"]
    table = differences.definitions(records.assign(tokens=[3]))
    assert table["shorter answer"].tolist() == ["more"] and table.probes.tolist() == [1]


def test_both_definitions_agree_for_answers_of_one_token(monkeypatch):
    monkeypatch.setattr(differences, "load", mk.load)  # whose tokenizer knows whole words
    records = differences.by_token(edits=6)
    single = records[records.tokens == 1]
    assert len(single) and (single["token by token"] == single["mean log-probability"]).all()
