"""The experiments find what they claim to find, would notice if it were otherwise, and repeat themselves exactly."""

import json
import re
import zlib
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
import torch
from models import stand_in

import metake as mk
from metake.algebra.update import Edit
from metake.data.facts import facts
from metake.editing.editor import Editor
from metake.editing.statistics import statistics
from metake.experiments import runs
from metake.experiments.cases import select
from metake.experiments.studies import comparison, dispersion, operators, quickstart
from metake.experiments.studies.whose import READINGS
from metake.experiments.theory import attenuation
from metake.support.errors import ParameterError


@pytest.fixture(autouse=True)
def _random_base(monkeypatch):
    for module in (attenuation, dispersion, quickstart, runs):
        monkeypatch.setattr(module, "load", stand_in)
    monkeypatch.setattr(attenuation, "statistics", partial(statistics, tokens=3000))


# Attenuation


def test_attenuation_holds_in_every_instance_and_all_are_different():
    found = attenuation.attenuation_check(trials=96)
    assert len(found) == 96 and found.error.max() < 1e-9 and found.remainder_error.max() < 1e-9
    single = found[found.n == 1]
    assert (single.measured - single.beta).abs().max() < 1e-9 and (
        single.beta - single.gamma / (1 + single.gamma)
    ).abs().max() < 1e-12
    assert (
        single[["gamma", "beta", "measured", "remainder_error"]].notna().all(axis=None)
        and found[found.n > 1].gamma.isna().all()
    )
    assert (
        set(found.method) == {"memit", "alphaedit"}
        and set(found.dim) == {4, 16, 64}
        and set(found.past) == {0, 1, 2}
        and {1, 4, 8} <= set(found.n)
    )
    assert single.gamma.max() / single.gamma.min() > 1e4 and single.beta.min() < 0.05 and single.beta.max() > 0.95
    assert attenuation.judge(found)["holds"] is True


@pytest.mark.parametrize("wrong", ["factor", "noise", "history"])
def test_attenuation_would_find_a_wrong_gate(monkeypatch, wrong):
    right = attenuation.gate
    gates = {
        "factor": lambda keys, metric, noise=1.0: 1.001 * right(keys, metric, noise),
        "noise": lambda keys, metric, noise=1.0: right(keys, metric, 1.001 * noise),
        "history": lambda keys, metric, noise=1.0: right(keys, getattr(metric, "base", metric), noise),
    }
    monkeypatch.setattr(attenuation, "gate", gates[wrong])
    found = attenuation.attenuation_check(trials=48)
    assert found.error.max() > 1e-4 and attenuation.judge(found)["holds"] is False
    assert wrong != "history" or found[found.past == 0].error.max() < 1e-9


def test_attenuation_check_repeats_itself():
    one, other, third = (attenuation.attenuation_check(trials=12, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert not np.allclose(one.gamma.dropna(), third.gamma.dropna())


def test_attenuation_on_a_real_layer():
    singles, spectra = attenuation.attenuation_on_model(requests=6)
    assert list(singles.method.value_counts().sort_index()) == [6, 6] and len(spectra) == 12
    assert (singles.measured - singles.beta).abs().max() < 1e-10 and singles.beta.between(1e-4, 1 - 1e-4).all()
    assert (singles.in_batch < singles.beta).all(), "others in the batch take their share"
    for method, group in spectra.groupby("method"):
        assert group.eigenvalue.between(0, 1, inclusive="left").all() and group.eigenvalue.is_monotonic_decreasing
        assert group.eigenvalue.sum() == pytest.approx(singles[singles.method == method].in_batch.sum(), rel=1e-10), (
            "the trace of B"
        )
    editor = mk.methods.alphaedit("tiny", seed=0)
    lm, requests = stand_in(), [c.request for c in mk.facts(limit=6)]
    expected = mk.diagnose(lm, requests, editor, statistics(lm, layers=editor.layers, tokens=3000))
    assert singles[singles.method == "alphaedit"].gamma.tolist() == pytest.approx(
        [d.association for d in expected], rel=1e-12
    )


# Dispersion


def test_dispersion_is_the_diagnosis_of_every_request():
    found = dispersion.association_dispersion(requests=5, text_tokens=3000)
    assert found.groupby(["dataset", "method"]).size().to_dict() == {
        (d, m): 5 for d in ("CounterFact format", "ZsRE format") for m in ("memit", "alphaedit")
    }
    lm, editor = stand_in(), mk.methods.memit("tiny", seed=0)
    cases = select(lm, mk.facts(format="zsre"), 5, 0)
    expected = mk.diagnose(lm, [c.request for c in cases], editor, statistics(lm, layers=editor.layers, tokens=3000))
    rows = found[(found.dataset == "ZsRE format") & (found.method == "memit")]
    assert rows.gamma.tolist() == [d.association for d in expected] and rows.request.tolist() == [
        d.id for d in expected
    ]
    assert rows.beta.tolist() == [d.attenuation for d in expected] and rows.gamma.nunique() == 5


def spread(widths, count=200, seed=0):
    """γ of log-normal spread by data set."""
    generator = np.random.default_rng(seed)
    return pd.concat(
        [
            pd.DataFrame(
                {"dataset": name, "method": "alphaedit", "gamma": np.exp(width * generator.standard_normal(count))}
            )
            for name, width in widths.items()
        ]
    )


def test_percentile_ratios_and_their_intervals():
    records = spread({"wide": 1.2, "narrow": 0.4})
    found = dispersion.percentile_ratios(records)
    for row in found.itertuples():
        gamma = records[records.dataset == row.dataset].gamma
        assert (row.P5, row.P95) == (
            np.percentile(gamma, 5), np.percentile(gamma, 95)
        ) and row.ratio == row.P95 / row.P5
        assert row.low < row.ratio < row.high and row.requests == 200
    truth = {"wide": np.exp(2 * 1.6449 * 1.2), "narrow": np.exp(2 * 1.6449 * 0.4)}
    assert all(row.low < truth[row.dataset] < row.high for row in found.itertuples()), (
        "the interval misses what the sample was drawn from"
    )
    few = dispersion.percentile_ratios(spread({"wide": 1.2}, count=30)).iloc[0]
    assert np.log(few.high / few.low) > 1.5 * np.log(found.high[0] / found.low[0]), "fewer requests, wider interval"


def test_bootstrap_repeats_itself_and_has_no_units():
    records = spread({"wide": 1.2, "narrow": 0.4})
    one = dispersion.percentile_ratios(records)
    pd.testing.assert_frame_equal(one, dispersion.percentile_ratios(records), check_exact=True)
    assert (dispersion.percentile_ratios(records, seed=1)[["low", "high"]] != one[["low", "high"]]).all(axis=None)
    scaled = dispersion.percentile_ratios(records.assign(gamma=8 * records.gamma))
    assert (scaled[["ratio", "low", "high"]] == one[["ratio", "low", "high"]]).all(axis=None)


@pytest.mark.parametrize(("widths", "holds"), [((1.2, 0.4), True), ((0.4, 1.2), False), ((0.8, 0.8), None)])
def test_dispersion_is_judged_by_the_intervals(widths, holds):
    verdict = dispersion.judge(
        dispersion.percentile_ratios(spread(dict(zip(("zsre", "counterfact"), widths, strict=True)))), "zsre",
        "counterfact"
    )
    assert verdict["holds"] is holds and "on zsre" in verdict["decided_by"]


# Comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory, session_cache):
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(runs, "load", stand_in)
        return out, comparison.comparison(
            methods=("memit", "alphaedit"), edits=3, batch=2, seeds=(0, 1), text_tokens=3000, out=out
        )


def test_comparison_has_every_case_of_every_method_and_of_none(compared):
    found = compared[1]
    expected = {
        (d, m, s): 3
        for d in ("CounterFact format", "ZsRE format")
        for m in ("pre-edit", "memit", "alphaedit")
        for s in (0, 1)
    }
    assert found.groupby(["dataset", "method", "seed"]).size().to_dict() == expected
    assert found[["id", "efficacy", "generalization", "specificity"]].notna().all(axis=None)
    assert (found.specificity_pre_edit.isna() == (found.method == "pre-edit")).all()
    for (dataset, seed), group in found.groupby(["dataset", "seed"]):
        ids = [list(rows.id) for _, rows in group.groupby("method")]
        assert ids[0] == ids[1] == ids[2] and len(set(ids[0])) == 3
        cases = select(stand_in(), mk.facts(format="zsre" if "ZsRE" in dataset else "counterfact"), 3, seed)
        assert group[group.method == "pre-edit"].specificity.tolist() == [
            r["specificity"] for r in mk.evaluate(stand_in(), cases).records()
        ]
    assert [(r["dataset"], r["method"], r["seed"]) for r in found.attrs["runs"]] == [
        (d, m, s) for d in ("CounterFact format", "ZsRE format") for s in (0, 1) for m in ("memit", "alphaedit")
    ]


def test_runs_on_one_half_of_the_subjects_share_none_with_the_other(tmp_path):
    """And their folders are not taken for runs on all of them."""
    settings = {"methods": ("memit",), "edits": 3, "batch": 3, "text_tokens": 3000, "data": {"d": "facts"}}
    parts = {
        part: comparison.comparison(**settings, part=part, out=tmp_path / part) for part in ("choosing", "testing")
    }
    subjects = {c.request.id: c.request.subject for c in mk.facts()}
    for part, found in parts.items():
        places = {zlib.crc32(subjects[id].encode()) % 2 for id in found.id}
        assert places == {("choosing", "testing").index(part)}
    with pytest.raises(ParameterError, match="a run with another part"):
        comparison.comparison(**settings, part="choosing", out=tmp_path / "testing")
    with pytest.raises(ParameterError, match="part of the subjects"):
        comparison.comparison(**settings, part="tested", out=tmp_path / "new")


def test_summary_is_the_mean_over_cases_then_seeds(compared):
    found = comparison.summarize(compared[1])
    assert list(found.method) == ["pre-edit", "memit", "alphaedit"] * 2
    for row in found.itertuples():
        for metric in ("efficacy", "generalization", "specificity"):
            side = "before" if row.method == "pre-edit" else "after"
            told = [
                r[side][metric]
                for r in compared[1].attrs["runs"]
                if r["dataset"] == row.dataset and r["method"] in (row.method, "memit" if side == "before" else None)
            ]
            assert (
                len(told) == 2
                and getattr(row, metric) == pytest.approx(fmean(told))
                and getattr(row, f"{metric}_sd") == pytest.approx(np.std(told, ddof=1))
            )


def test_comparison_uses_finished_runs_and_no_others(compared, monkeypatch):
    out, before = compared
    monkeypatch.setattr(Editor, "step", lambda *_: pytest.fail("a finished run was repeated"))
    monkeypatch.setattr(comparison, "run", lambda *_: pytest.fail("a finished run was repeated"))
    settings = {"methods": ("memit",), "edits": 3, "batch": 2, "text_tokens": 3000, "out": out}
    again = comparison.comparison(**settings)
    assert json.loads(again.to_json(orient="records")) == json.loads(
        before[(before.seed == 0) & (before.method != "alphaedit")].to_json(orient="records")
    )
    with pytest.raises(ParameterError, match="another batch"):
        comparison.comparison(**settings | {"batch": 3})


def paired(differences, noise=0.0, seed=0):
    """Cases of two methods that differ by the given efficacies, in different order."""
    generator = np.random.default_rng(seed)
    rows = [
        {"dataset": "d", "seed": s, "id": f"{s}/{i}"} | dict.fromkeys(comparison.METRICS[:3], generator.random())
        for s in (0, 1)
        for i in range(len(differences))
    ]
    other = [row | {"method": "alphaedit"} for row in rows]
    one = [
        row
        | {"method": "metake"}
        | {
            m: row[m] + differences[int(row["id"][2:])] + noise * generator.standard_normal()
            for m in comparison.METRICS[:3]
        }
        for row in rows
    ]
    return pd.DataFrame(other + one[::-1])


def test_differences_are_paired_by_case():
    found = comparison.paired_differences(paired([0.1] * 10)).iloc[0]
    assert (
        found.difference == pytest.approx(10) and found.low == pytest.approx(10) and found.high == pytest.approx(10)
    ), "not paired: the cases' own spread shows"
    assert found.cases == 20
    shares = [0.0, 0.1, 0.2, 0.3] * 5
    one, other = comparison.paired_differences(paired(shares)), comparison.paired_differences(paired(shares))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert one.difference[0] == pytest.approx(15) and 10 < one.low[0] < 15 < one.high[0] < 20


def test_every_method_over_a_base_is_its_own_paired_difference():
    records = paired([0.1, 0.3] * 10)
    found = comparison.over(pd.concat([records, records[records.method == "metake"].assign(method="metake/whole")]))
    expected = comparison.paired_differences(records)
    assert list(found.method.unique()) == ["metake", "metake/whole"]
    for _, own in found.groupby("method"):
        pd.testing.assert_frame_equal(own.drop(columns="method").reset_index(drop=True), expected)


def test_a_case_that_two_seeds_drew_counts_once():
    """Its mean: the interval is as wide as that of the distinct cases."""
    shares = [0.0, 0.1, 0.2, 0.3] * 5
    twice = paired(shares)
    twice["id"] = twice.id.str[2:]
    found = comparison.paired_differences(twice)
    assert set(found.cases) == {20}
    once = comparison.paired_differences(twice[twice.seed == 0])
    pd.testing.assert_frame_equal(found, once)


@pytest.mark.parametrize(("shift", "holds"), [(0.1, True), (-0.1, False), (0.0, None)])
def test_comparison_is_judged_by_the_intervals(shift, holds):
    verdict = comparison.judge(comparison.paired_differences(paired([shift] * 40, noise=0.1)))
    assert verdict["holds"] is holds and "efficacy d" in verdict["decided_by"]


def test_differences_from_every_method_say_from_which():
    records = pd.concat(
        [paired([0.1] * 6), paired([0.3] * 6).query("method == 'alphaedit'").assign(method="memit", efficacy=0.0)]
    )
    records.attrs |= {"label": "recorded", "provenance": {"model": "m"}, "runs": "not passed on"}
    found = comparison.differences(records)
    assert list(found.method) == ["alphaedit"] * 3 + ["memit"] * 3 and found.attrs == {
        "label": "recorded", "provenance": {"model": "m"}
    }
    pd.testing.assert_frame_equal(
        found[found.method == "alphaedit"].drop(columns="method"), comparison.paired_differences(records)
    )
    assert found[found.method == "memit"].difference.iloc[0] == pytest.approx(
        100 * records[records.method == "metake"].efficacy.mean()
    )
    noisy = paired([0.0, 0.1, 0.2] * 5, noise=0.05)
    wide, narrow = (comparison.differences(noisy, level=level) for level in (0.99, 0.5))
    assert (wide.low < narrow.low).all() and (wide.high > narrow.high).all()
    with pytest.raises(ParameterError, match="nothing to compare MetaKE with"):
        comparison.differences(records[records.method == "metake"])


def test_a_setting_says_what_was_done(compared):
    told = comparison.setting(compared[1]).set_index("what").here
    assert (
        told["editing"] == "3 edits in 2 consecutive batches of 2; the weights accumulate"
        and told["seeds"] == "0, 1"
        and told["key statistics"] == "embedded, 3,000 tokens"
    )
    recorded = pd.DataFrame({"seed": [0]})
    recorded.attrs |= {
        "label": "recorded",
        "provenance": {"model": "m", "statistics": "t.txt, 9 tokens", "dataset": "a.json", "edits": 4, "batch": 9},
    }
    told = comparison.setting(recorded)
    assert (
        list(told.here)[:4] == ["m", "t.txt, 9 tokens", "a.json", "4 edits in one batch"]
        and told.attrs["label"] == "recorded"
    )


# MetaKE on other operators


def refined(shifts, spread=0.1):
    """Records of every base and its refined twin, which differ by the given shares, half of the cases more and half
    less.
    """
    parts = []
    for seed, (base_name, shift) in enumerate(shifts.items()):
        found = paired([shift + spread, shift - spread] * 20, seed=seed)
        parts.append(
            found.assign(method=found.method.map({"alphaedit": base_name, "metake": operators.PAIRS[base_name]}))
        )
    return pd.concat(parts)


@pytest.mark.parametrize(
    ("shifts", "holds"),
    [((0.1, 0.1, 0.1), True), ((0.1, -0.1, 0.1), False), ((0.1, 0.0, 0.1), None), ((0.0, 0.0, 0.0), None)],
)
def test_the_refinement_is_judged_on_each_base(shifts, holds):
    records = refined(dict(zip(("memit", "blue", "sphere"), shifts, strict=True)))
    verdict, found = operators.judge(records), operators.by_base(records)
    assert verdict["holds"] is holds and verdict["decided_by"].count("on ") >= 3
    assert list(found.helps) == [{0.1: "yes", 0.0: "open", -0.1: "no"}[s] for s in shifts]


def test_many_intervals_together_have_the_confidence_of_one():
    """Eight intervals, each beside zero at 95 %: that is little, and the wider ones include it."""
    records = refined(dict.fromkeys(operators.PAIRS, -0.025))
    assert (operators.differences(records).high < 0).all() and operators.judge(records)["holds"] is None
    assert operators.judge(refined(dict.fromkeys(operators.PAIRS, -0.05)))["holds"] is False


def test_operators_are_compared_with_their_own_stand_in():
    found = operators.differences(refined({"memit": 0.1, "sphere": -0.2}))
    assert dict(found.groupby("method").difference.mean().round(6)) == {"memit": 10, "sphere": -20}
    with pytest.raises(ParameterError, match="no base together with its refined twin"):
        operators.differences(paired([0.1] * 3).query("method == 'metake'"))
    assert set(operators.PAIRS) == {"alphaedit", "memit", "blue", "sphere"}
    with pytest.raises(ParameterError, match="no base together with its refined twin"):
        operators.differences(refined({"memit": 0.1}), "metake/whole")


def test_each_reading_is_compared_with_the_bases_that_it_refines():
    records = refined(dict.fromkeys(operators.PAIRS, 0.0))
    others = [
        own.assign(method=twin, efficacy=own.efficacy + shift)
        for reading, shift in (("metake/literal", -0.2), ("metake/whole", 0.3))
        for base, twin in operators.pairs(reading).items()
        for own in [records[records.method == base]]
    ]
    every = pd.concat([records, *others])
    assert operators.readings(every) == ["metake/literal", "metake", "metake/whole"]
    found = operators.all_differences(every).query("metric == 'efficacy'").groupby("method").difference.mean()
    assert len(found) == 4 + 4 + 3 and set(found.round(6)) == {-20, 0, 30}
    assert found["metake/whole/sphere"] == pytest.approx(30) and "metake/whole/blue" not in found
    told = operators.by_base(every).set_index("method").helps
    assert told["metake/whole"] == "yes" and told["metake/literal/blue"] == "no" and told["metake/memit"] == "open"
    assert [operators.judge(every, r)["holds"] for r in operators.readings(every)] == [False, None, True]
    assert operators.twins(["blue"], READINGS) == ["blue", "metake/literal/blue", "metake/blue"]


def test_operators_bring_the_outer_loss_of_every_refined_request(tmp_path):
    found = operators.operators(
        "tiny", operators.twins(["memit"]), edits=3, batch=2, text_tokens=3000,
        data={"CounterFact format": "facts"}, out=tmp_path
    )
    assert (found.outer_first.notna() == (found.method == "metake/memit")).all() and len(found) == 9
    told = [Edit.load(f).record.trace for f in sorted((tmp_path / "facts-metake-memit-0" / "batches").iterdir())]
    first = {id: sum(t["refine"][0].values()) for batch in told for id, t in batch.items()}
    own = found[found.method == "metake/memit"].set_index("id")
    assert own.outer_first.to_dict() == pytest.approx(first)
    told = operators.look_ahead(found)
    assert (
        list(told.method) == ["metake/memit"]
        and told.before[0] == pytest.approx(fmean(first.values()))
        and told.fell_for[0] == (own.outer_last < own.outer_first).sum()
    )
    with pytest.raises(ParameterError, match="no outer losses"):
        operators.look_ahead(found[found.method == "memit"])
    with pytest.raises(ParameterError, match="no outer losses"):
        operators.look_ahead(found.drop(columns="outer_first"))


# What the documents say


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "book/methods.md"])
def test_the_code_in_the_documents_runs(page, monkeypatch, tmp_path):
    """Word for word, on a smaller model and fewer facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mk, "load", stand_in)
    monkeypatch.setattr(mk, "statistics", partial(statistics, tokens=3000))
    monkeypatch.setattr(mk, "facts", lambda limit: facts(limit=min(limit, 4)))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # noqa: S102
    assert len(blocks) >= 2 and isinstance(names["editor"], Editor) and names["editor"].refine and names["editor"].post
    code = re.search(r"def sparse.*?\n\n", "\n".join(blocks), re.DOTALL)[0]
    assert len(code.splitlines()) <= 8


def test_the_methods_page_names_what_there_is():
    text = (ROOT / "book" / "methods.md").read_text("utf-8")
    first, others = text.split("## Names with a slash")
    assert re.findall(r"^\| `([\w/]+)` \|", first, re.MULTILINE) == [*mk.METHODS, *mk.methods.GRADIENT]
    differences = [*mk.methods.DIFFERENCES, *mk.methods.GRADIENT_DIFFERENCES]
    assert re.findall(r"^\| `([\w/-]+)` \|", others, re.MULTILINE)[: len(differences)] == differences
    readme = (ROOT / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in readme for name in (*mk.METHODS, *mk.methods.OPERATORS)) and all(
        f"`{name}`" in text for name in mk.methods.OPERATORS
    )


# Quick start


def test_quickstart_reads_before_during_and_after(monkeypatch):
    """On the embedded model, as the page shows it."""
    monkeypatch.setattr(quickstart, "load", mk.load)
    found = (
        quickstart.quickstart(text_tokens=3000)
        .assign(words=lambda rows: rows.probe + " " + rows.answer)
        .set_index("words", drop=False)
    )
    lm = mk.load("tiny")
    ids, start = (
        lm.tokenizer("The capital of France is Rome")["input_ids"],
        len(lm.tokenizer("The capital of France is")["input_ids"]),
    )
    log_p = torch.log_softmax(lm.model(torch.tensor([ids])).logits[0], -1)
    expected = np.exp(fmean(log_p[j - 1, ids[j]].item() for j in range(start, len(ids))))
    assert found.before["edited prompt Rome"] == pytest.approx(expected, rel=1e-5)
    assert found.before["edited prompt Rome"] < 0.1 < 0.9 < found.after["edited prompt Rome"]
    assert found.before["edited prompt Paris"] > 0.9 > 0.1 > found.after["edited prompt Paris"]
    assert list(found.probe) == ["edited prompt"] * 2 + ["paraphrase"] * 2 + ["another subject"] * 2
    assert (found.restored == found.before).all() and found.attrs["restored_exactly"] is True
    assert found.attrs["seconds"] > 0 and found.attrs["provenance"]["model"] == "tiny"


def test_next_words_are_the_most_probable():
    lm = stand_in()
    words = quickstart.next_words(lm, "The capital of France is", 4)
    p = torch.softmax(
        lm.model(torch.tensor([lm.tokenizer("The capital of France is")["input_ids"]])).logits[0, -1], -1
    ).sort(descending=True)
    assert [w for w, _ in words] == [lm.tokenizer.decode(i) for i in p.indices[:4]]
    assert [q for _, q in words] == pytest.approx(p.values[:4].tolist(), rel=1e-12)
