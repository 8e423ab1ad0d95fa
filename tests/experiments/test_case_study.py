"""The case study: equal random numbers for every method, nothing left in the model, and markup that a model's text
cannot break.
"""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from models import random_model
from same import fingerprint

import metake as mk
from metake import report
from metake.algebra.update import Edit, LayerUpdate
from metake.editing.targets import optimize_targets
from metake.experiments import runs
from metake.experiments.cases import select
from metake.experiments.studies import case_study
from metake.report.studies.generations import whole_words
from metake.support.errors import ParameterError

SETTINGS = {"methods": ("memit", "alphaedit"), "edits": 3, "shown": 1, "text_tokens": 3000, "length": 90}


@pytest.fixture
def lm(monkeypatch):
    lm = random_model("gpt2")
    lm.name, lm.origin = "tiny", {"origin": "test", "revision": "", "note": ""}
    monkeypatch.setattr(case_study, "load", lambda *_: lm)
    return lm


def test_every_method_starts_from_the_unedited_model(lm):
    before = fingerprint(lm.model)
    found = case_study.case_study(**SETTINGS)
    assert fingerprint(lm.model) == before and found.attrs["restored_exactly"] is True
    assert found.groupby("method").size().to_dict() == {"pre-edit": 6, "memit": 6, "alphaedit": 6}
    turned = case_study.case_study(**SETTINGS | {"methods": ("alphaedit", "memit")})
    for method in ("pre-edit", "memit", "alphaedit"):
        one, other = (f[f.method == method].reset_index(drop=True) for f in (found, turned))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert found[found.shown].id.unique().tolist() == [found.id.iloc[0]] and found.shown.sum() == 6


def test_rows_are_what_the_edited_model_gives(lm):
    found = case_study.case_study(**SETTINGS)
    cases = select(lm, mk.facts(), 3, 0)
    editor = mk.methods.memit("tiny", seed=0)
    edit = editor.edit(lm, [c.request for c in cases], mk.statistics(lm, layers=editor.layers, tokens=3000))
    with edit.applied(lm):
        scores = mk.evaluate(lm, cases).cases
    own = found[(found.method == "memit") & (found.asked == case_study.EDITED)]
    assert own.id.tolist() == [c.request.id for c in cases] and own.prompt.tolist() == [c.request.text for c in cases]
    for row, case, score in zip(own.itertuples(), cases, scores, strict=True):
        asked = score.probes[0]
        assert (row.p_target, row.p_old) == pytest.approx(
            (torch.tensor(asked.target.log_p).exp().item(), torch.tensor(asked.rival.log_p).exp().item()), rel=1e-5
        )
        assert row.success == bool(asked.score) and (row.target, row.old) == (case.request.target, case.probes[0].rival)
    open_prompts = found[(found.method == "memit") & (found.asked == case_study.OPEN)].prompt.tolist()
    assert open_prompts == [next(p.prompt for p in c.probes if p.kind == "generation") for c in cases]


def test_what_finished_methods_wrote_is_kept(lm, monkeypatch, tmp_path):
    """Another method joins without the others running again; another setting is another file."""
    first = case_study.case_study(**SETTINGS, out=tmp_path)
    pd.testing.assert_frame_equal(first, case_study.case_study(**SETTINGS), check_exact=True)
    written = []
    monkeypatch.setattr(
        case_study, "_written", lambda lm, method, cases, *_: written.append(method) or [dict.fromkeys(first, method)]
    )
    more = case_study.case_study(**SETTINGS | {"methods": ("memit", "rect", "alphaedit")}, out=tmp_path)
    assert written == ["rect"] and more[more.method != "rect"].text.tolist() == first.text.tolist()
    case_study.case_study(**SETTINGS | {"length": 91}, out=tmp_path)
    assert written == ["rect", "pre-edit", "memit", "alphaedit"]


def test_methods_that_plan_alike_share_stage_one(lm, monkeypatch):
    planned = []
    monkeypatch.setattr(
        runs, "optimize_targets",
        lambda lm, requests, *rest: planned.append(len(requests)) or optimize_targets(lm, requests, *rest)
    )
    case_study.case_study(**SETTINGS | {"methods": ("memit", "alphaedit", "sphere")})
    assert planned == [3]


def test_texts_differ_by_the_edit_alone(lm, monkeypatch):
    """A method that changes nothing writes what the unedited model writes."""
    path = lm.write_path(0)
    rows, columns = lm.shape(path)
    zero = Edit((LayerUpdate(path, torch.zeros(rows, 1, dtype=lm.dtype), torch.zeros(1, columns, dtype=lm.dtype)),))
    still = SimpleNamespace(
        layers=(0,), init=lambda *_: None, plan_key=lambda _: None, step=lambda *_: (zero, None),
        finished=lambda lm, edit, _: edit
    )
    monkeypatch.setattr(case_study.known, "method", lambda *_, **__: still)
    found = case_study.case_study(**SETTINGS | {"methods": ("memit",)})
    texts = {
        m: g[["id", "asked", "text", "p_target", "entropy"]].reset_index(drop=True) for m, g in found.groupby("method")
    }
    pd.testing.assert_frame_equal(texts["memit"], texts["pre-edit"], check_exact=True)
    assert found.text.nunique() == 6 and not found.text.str.startswith(tuple(found.prompt)).any()
    table = case_study.by_prompt(found)
    assert table.groupby("asked").size().to_dict() == {case_study.EDITED: 2, case_study.OPEN: 2} and set(
        table.cases
    ) == {3}
    other = case_study.case_study(**SETTINGS | {"methods": (), "seed": 0, "length": 100})
    longer = other.set_index(["id", "asked"]).text
    assert all(
        longer[r.id, r.asked].startswith(r.text.rstrip("�")) for r in found[found.method == "pre-edit"].itertuples()
    ), "a longer text begins with the shorter"


@pytest.mark.parametrize("change", [{"shown": 4}, {"shown": 0}, {"data": "facts-zsre"}, {"length": 10}])
def test_what_cannot_be_shown_is_refused(lm, change):
    with pytest.raises(ParameterError, match="shown must be|no generation prompts|longest prompt"):
        case_study.case_study(**SETTINGS | change)


# Counting


@pytest.mark.parametrize(("answer", "text", "there"), [
    ("Bulgaria", "a citizen of Bulgaria.", True), ("Bulgaria", "a Bulgarian runner", False),
    ("soccer", "Soccer, he said", True), ("C++", "wrote C++ code", True),
    ("São Tomé", "in Sa\u0303o Tome\u0301, where", True), ("Rome", "Jerome", False), ("Rome", "", False),
])  # fmt: skip
def test_an_object_appears_as_a_whole_word(answer, text, there):
    assert case_study.appears(answer, text) is there


def test_the_prompt_does_not_count():
    assert case_study.continuation_of("Paris is São", "Paris is Sa\u0303o Paulo") == " Paulo"
    assert case_study.continuation_of("Paris is", "paris  is in") == "paris  is in"


def test_wilson_interval():
    assert case_study.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # a textbook value
    assert case_study.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4) and case_study.wilson(10, 10)[1] == 1
    with pytest.raises(ParameterError):
        case_study.wilson(3, 2)


def counted(**hits):
    """Twenty cases of each method, so many of which name the target."""
    rows = [
        {
            "method": m, "asked": case_study.EDITED, "appears": i < n, "old_appears": i % 2 == 0, "success": True,
            "entropy": 5.0
        }
        for m, n in hits.items()
        for i in range(20)
    ]
    return case_study.summarize(pd.DataFrame(rows))


@pytest.mark.parametrize(("hits", "holds"), [
    ({"memit": 1, "alphaedit": 2, "blue": 3, "sphere": 4, "metake": 19}, True),
    ({"memit": 19, "alphaedit": 2, "metake": 1}, False),
    ({"memit": 1, "alphaedit": 17, "blue": 3, "sphere": 4, "metake": 19}, None),
    ({"memit": 1, "alphaedit": 2, "blue": 3, "metake": 19}, None),
    ({"memit": 1, "alphaedit": 2, "blue": 3, "sphere": 4, "rome": 20, "metake": 19}, True),
])  # fmt: skip
def test_the_claim_is_judged_by_the_intervals(hits, holds):
    found = counted(**hits)
    verdict = case_study.judge(found)
    assert verdict["holds"] is holds and "MetaKE" in verdict["decided_by"] and "20 cases" in verdict["decided_by"]
    assert found.set_index("method").target["metake"] == 5 * hits["metake"] and set(found.old_object) == {50}
    assert ("SPHERE was not run" in verdict["decided_by"]) == ("sphere" not in hits)
    with pytest.raises(ParameterError, match="compares"):
        case_study.judge(found[found.method == "metake"])


# Showing


NASTY = '<script>alert("x")</script> & Rome\n\n\x1b[31m New Rome is not Rome\'s <b>Paris</b>'


def written(**changes):
    row = {
        "method": "metake", "id": "1", "shown": True, "asked": case_study.EDITED,
        "prompt": 'The "capital" of <France> is', "text": NASTY, "target": "Rome", "old": "New Rome"
    }
    row |= {"p_target": 0.91234, "p_old": 0.01, "success": True, "appears": True, "old_appears": True, "entropy": 4.2}
    return pd.DataFrame(
        [
            row | {"method": "pre-edit", "success": False}, row | changes,
            row | {"id": "2", "shown": False, "prompt": "hidden"}
        ]
    )


def test_generated_markup_is_text():
    shown = report.generations(written())
    body = shown.html.partition("</style>")[2]
    assert set(re.findall(r"</?(\w+)", body)) <= {
        "div", "section", "p", "strong", "mark", "u", "dl", "dt", "dd", "small", "span"
    }
    assert (
        "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; <mark>Rome</mark>" in body
        and "\x1b" not in body
        and "⏎" in body
    )
    assert (
        "The &quot;capital&quot; of &lt;France&gt; is" in body
        and "&lt;b&gt;Paris&lt;/b&gt;" in body
        and "hidden" not in body
    )
    assert "<u>New Rome</u> is not <mark>Rome</mark>" in body, "the longer object is not taken for the shorter"
    assert (
        body.count("<div") == body.count("</div>")
        and body.count("<mark>") == body.count("</mark>")
        and "recomputed here" in body
    )


def test_the_plain_face_says_the_same():
    text = report.generations(written()).text
    assert (
        "‹New Rome› is not «Rome»" in text
        and "MetaKE: edit succeeded: p(new) 0.912, p(old) 0.010" in text
        and "pre-edit: not edited" in text
    )
    assert "hidden" in report.generations(written(), everything=True).text and all(
        len(line) <= 104 and line.isprintable() for line in text.splitlines()
    )
    assert (
        text == report.generations(written()).text and "edit failed" in report.generations(written(success=False)).text
    )


def test_a_recording_is_shown_as_one():
    records = written()
    records.attrs |= {"label": "recorded", "provenance": {"model": "smollm2-135m"}}
    shown = report.generations(records)
    assert "[recorded]" in shown.text and "(smollm2-135m)" in shown.html
    with pytest.raises(ParameterError, match="no column p_old"):
        report.generations(records.drop(columns="p_old"))


def test_words_that_are_no_pattern():
    assert [m[0] for m in whole_words("a.b", "(x)").finditer("a.b axb (x) A.B")] == ["a.b", "(x)", "A.B"]


def test_shares_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("METAKE_FIGURES", str(tmp_path))
    figure = report.target_shares(counted(memit=0, metake=20))
    assert "MetaKE: new 100 [84, 100], old 50" in figure.alt and (tmp_path / "case_study.csv").is_file()
