"""What the pages show: equal on every run, readable as text, accessible as markup, and safe against overwriting."""

import inspect
import json
import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from metake import report
from metake.report.files import portable
from metake.support.errors import ParameterError, ProvenanceError

SUFFIXES = {"light.svg", "dark.svg", "png", "csv"}
FACTS = {"model": "smollm2-135m", "model_digest": "sha256:" + "ab" * 32, "dataset": "facts", "seed": 0, "n": 2,
"date": "2026-11-21",
         "commit": "0123456789abcdef", "device": "cpu", "versions": {"torch": "2.13.0"}, "seconds": 3.14}  # fmt: skip


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty project with a notebook folder, in which the test runs."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.delenv("METAKE_FIGURES", raising=False)
    monkeypatch.delenv("METAKE_VERDICTS", raising=False)
    return tmp_path


def gammas(count=30):
    values = np.geomspace(0.01, 20, count)
    return pd.concat(
        [
            pd.DataFrame({"method": m, "gamma": s * values, "measured": s * values / (1 + s * values)})
            for m, s in (("alphaedit", 1), ("memit", 0.1))
        ],
        ignore_index=True,
    )


def spectra():
    return pd.DataFrame({"method": "memit", "index": [1, 2, 3], "eigenvalue": [0.9, 0.5, 0.125]})


def requests():
    return pd.concat([gammas(40).assign(dataset="counterfact"), gammas(700).assign(dataset="zsre")], ignore_index=True)


def cases(seeds=(0, 1)):
    rows = [{"dataset": d, "method": m, "seed": s, "id": i, "efficacy": e, "generalization": 0.5,
    "specificity": (i + s) % 2}
            for d in ("CounterFact", "ZsRE") for m,
            e in (("metake", 0.875), ("pre-edit", 0.25)) for s in seeds for i in range(4)]  # fmt: skip
    return pd.DataFrame(rows)


def probes():
    rows = [
        ("edited prompt", "The capital of France is", "Rome", 0.0004, 0.96, 0.0004),
        ("another subject", "The capital of Italy is", "Rome", 0.998, 0.997, 0.998),
    ]
    return pd.DataFrame(rows, columns=["probe", "prompt", "answer", "before", "after", "restored"])


def intervals():
    rows = [
        (d, m, o, 10, x, x - 3, x + 3)
        for d in ("CounterFact", "ZsRE")
        for m in ("efficacy", "generalization")
        for o, x in (("sphere", -4.0), ("memit", 12.0), ("alphaedit", 0.04))
    ]
    return pd.DataFrame(rows, columns=["dataset", "metric", "method", "cases", "difference", "low", "high"])


def timings():
    rows = [
        (m, s, p, x * y)
        for m, x in (("alphaedit", 0.02), ("metake", 0.05))
        for s in ("targets", "keys", "solve")
        for p, y in (("accelerated", 1), ("literal", 9))
    ]
    return pd.DataFrame(rows, columns=["method", "stage", "path", "seconds_per_edit"])


FIGURES = {
    "attenuation": lambda **k: report.attenuation_curve(gammas(), spectra(), **k),
    "association_dispersion": lambda **k: report.dispersion(requests(), **k),
    "comparison": lambda **k: report.comparison_dots(cases(), **k),
    "differences": lambda **k: report.forest(intervals(), "MetaKE − the other", **k),
    "operators": lambda **k: report.refined_minus_base(intervals(), **k),
    "tradeoff": lambda **k: report.tradeoff(cases(), **k),
    "run_time": lambda **k: report.stage_bars(timings(), **k),
    "quickstart": lambda **k: report.before_after(probes(), **k),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def face(shown, kind):
    return shown._repr_mimebundle_()[kind]


@every_figure
def test_same_records_give_the_same_bytes(name, project):
    first, before = FIGURES[name](), files(project / "_build" / "figures")
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "pink"}):  # a user's settings do not matter
        second = FIGURES[name]()
    assert files(project / "_build" / "figures") == before
    assert first._repr_mimebundle_() == second._repr_mimebundle_()
    assert set(before) == {f"{name}.{suffix}" for suffix in SUFFIXES}, "and no temporary file is left"


@every_figure
def test_light_and_dark_differ_and_name_nothing_twice(name, project):
    figure = FIGURES[name]()
    light, dark = figure.svg["light"], figure.svg["dark"]
    assert "#1f2328" in light and "#e6edf3" in dark and "#1f2328" not in dark and "#000000" not in light + dark
    html = face(figure, "text/html")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(#|href="#)([^")]+)', html)) <= set(ids)
    assert html.count('role="img"') == html.count("<svg ") == html.count(f'aria-label="{figure.alt}"') == 1
    assert len(figure.alt) > 40
    drawn = html[html.index("<svg ") : html.index("</svg>")]
    assert "#1f2328" not in drawn and "currentColor" in drawn, "a page shows it in the color of its text"
    assert '<style type="text/css">*{' not in html, "a figure's style would apply to the whole page"
    assert not re.search(rf"{re.escape(str(project))}|20\d\d-\d\d|[Mm]atplotlib v", html + str(figure)), (
        "a path, a date or a version"
    )


@pytest.mark.parametrize(
    ("model", "suffix"),
    [
        ("tiny", ""), ("smollm2-135m", "-smollm2-135m"), ("openai-community/gpt2-xl", "-openai-community-gpt2-xl"),
        ("/home/me/models/mine", "-mine"), ("../mine", "-mine")
    ],
)
def test_models_do_not_overwrite_each_other(model, suffix, project):
    figure = report.before_after(probes(), model=model)
    assert set(files(project / "_build" / "figures")) == {f"quickstart{suffix}.{end}" for end in SUFFIXES}
    assert "/home" not in face(figure, "text/html")


def test_a_recorded_figure_has_a_name_of_its_own_and_says_so(project):
    report.write_recorded("quickstart-smollm2-135m", probes(), FACTS)
    figure = report.before_after(report.recorded("quickstart-smollm2-135m"), model="tiny")
    assert figure.name == "quickstart-recorded-smollm2-135m"
    assert (
        "recorded</span> (smollm2-135m, facts, 2026-11-21, 0123456789, cpu)" in figure.html
        and "[recorded]" in figure.text
    )


def test_the_text_of_a_figure_holds_its_numbers():
    quickstart, attenuation = FIGURES["quickstart"](), FIGURES["attenuation"]()
    assert "0.960" in str(quickstart) and "0.000" in str(quickstart)
    assert re.search(r"CounterFact +MetaKE +87.50 +0.00 +50.00", str(FIGURES["comparison"]()))
    many = requests()
    dispersion = str(report.dispersion(many))
    gamma = many[(many.dataset == "zsre") & (many.method == "alphaedit")].gamma
    assert f"{gamma.quantile(0.95) / gamma.quantile(0.05):.3f}"[:5] in dispersion and len(dispersion.splitlines()) == 6
    assert "0.125" in str(attenuation) and "below 1e-9" in attenuation.alt
    assert len(str(report.Figure(lambda axes: None, many, "many", "Many records.")).splitlines()) < 40
    long = str(report.Figure(lambda axes: None, gammas(), "long", "Long.", summary=gammas()))
    assert len(long.splitlines()) <= 43 and "20 more rows" in long


def test_the_csv_holds_every_record(project):
    report.dispersion(requests())
    pd.testing.assert_frame_equal(
        pd.read_csv(project / "_build" / "figures" / "association_dispersion.csv"), requests(), rtol=1e-9
    )


def test_dots_agree_however_the_records_come():
    by_run = 100 * cases().groupby(["dataset", "method", "seed"])[["efficacy", "generalization", "specificity"]].mean()
    grouped = by_run.groupby(["dataset", "method"])
    by_method = pd.concat([grouped.mean(), grouped.std().add_suffix("_sd")], axis=1).reset_index()
    texts = {str(report.comparison_dots(records)) for records in (cases(), by_run.reset_index(), by_method)}
    assert len(texts) == 1
    assert " sd" not in str(report.comparison_dots(cases(seeds=[0])))


def test_records_that_cannot_be_drawn_are_refused():
    with pytest.raises(ParameterError, match="no column after; found probe"):
        report.before_after(probes().drop(columns="after"))
    with pytest.raises(ParameterError, match="no records"):
        report.dispersion(requests()[:0])
    with pytest.raises(ParameterError, match="must be positive"):
        report.dispersion(requests().assign(gamma=0.0))
    with pytest.raises(ParameterError, match="cannot name a file"):
        report.before_after(probes(), name="../quickstart")


def test_figures_go_where_the_project_says(project, monkeypatch):
    assert report.figures_dir() == project / "_build" / "figures" and report.project_root() == project
    monkeypatch.setenv("METAKE_FIGURES", "runs/figures")
    assert report.figures_dir() == project / "runs" / "figures"
    monkeypatch.setenv("METAKE_FIGURES", str(project / "elsewhere"))
    report.before_after(probes())
    assert len(files(project / "elsewhere")) == 4


def luminance(color):
    return float(
        np.array([0.2126, 0.7152, 0.0722])
        @ [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(color)]
    )


def test_methods_look_different_and_stay_readable():
    looks = report.METHOD_STYLE.values()
    for part in ("color", "marker", "name"):
        assert len({getattr(s, part) for s in looks}) == len(looks)
    for style in [*looks, report.style("something new")]:
        assert (
            1.05 / (luminance(style.color) + 0.05) > 3
            and (luminance(style.color) + 0.05) / (luminance("#121212") + 0.05) > 3
        )
    assert (
        report.style("something new") == report.style("something new")
        and report.style("something new").name == "something new"
    )


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def oklab(color, seen):
    """A color as an eye of this vision sees it, in a space where distances are what one notices (Ottosson 2020)."""
    linear = np.clip(
        seen @ [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(color)], 0, 1
    )
    cones = np.cbrt(
        np.array(
            [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
        )
        @ linear
    )
    return (
        np.array(
            [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
        )
        @ cones
    )


@pytest.mark.parametrize("vision", VISION)
def test_methods_are_told_apart_by_every_eye(vision):
    seen = {name: oklab(s.color, VISION[vision]) for name, s in report.METHOD_STYLE.items()}
    names = list(seen)
    near = {(a, b): np.linalg.norm(seen[a] - seen[b]) for i, a in enumerate(names) for b in names[:i]}
    assert min(near.values()) > 0.02, min(near, key=near.get)  # a just noticeable difference; markers differ besides


def test_every_method_has_a_look_and_its_place():
    from metake import methods
    from metake.experiments.studies.asked import IN_PROMPT

    assert methods.named().keys() | {"pre-edit", *IN_PROMPT} == report.METHOD_STYLE.keys()
    first, *others = report.METHOD_STYLE
    assert first == "pre-edit" and set(others[: len(methods.METHODS)]) == set(methods.METHODS), (
        "the methods first, then what derives from them"
    )


def test_a_color_chosen_before_drawing_follows_the_theme():
    color = report.plots._soft(0.9)
    figure = report.Figure(lambda axes: axes.plot([0, 1], [0, 1], color=color), gammas(), "soft", "A soft line.")
    found = {theme: re.findall(r"stroke: (#\w+); stroke-opacity: 0.9", svg) for theme, svg in figure.svg.items()}
    assert found == {"light": ["#1f2328"], "dark": ["#e6edf3"]}


def svg_texts(figure):
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg["light"])


def test_dots_mark_the_highest_and_the_unedited_model_does_not_compete():
    records = pd.DataFrame(
        {"dataset": "d", "method": ["pre-edit", "memit", "metake", "alphaedit"], "efficacy": [99.0, 80.04, 12.0, 80.0]}
    )
    figure = report.comparison_dots(records, ["efficacy"])
    bold = [
        text
        for style, text in re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', figure.svg["light"])
        if "font-weight: 700" in style
    ]
    assert sorted(bold) == ["80.0", "80.0", "d"] and "highest MEMIT and AlphaEdit with 80.0" in figure.alt
    missing = report.comparison_dots(records.assign(efficacy=[99.0, np.nan, 12.0, 80.0]), ["efficacy"])
    assert "–" in svg_texts(missing) and "highest AlphaEdit with 80.0" in missing.alt


def test_a_comparison_of_every_name_stays_narrow():
    names = list(report.METHOD_STYLE)
    many = pd.concat([cases().assign(method=name, efficacy=i / len(names)) for i, name in enumerate(names)])
    figure = report.comparison_dots(many)
    width = float(re.search(r'width="([\d.]+)pt"', figure.svg["light"])[1])
    assert width < 6.1 * 72 and [t for t in svg_texts(figure) if t == "MetaKE on SPHERE"] == ["MetaKE on SPHERE"] * 3


def test_a_forest_says_which_intervals_exclude_zero():
    figure = report.forest(intervals(), "MetaKE − the other")
    assert (
        "MEMIT: 4 intervals, 4 above zero, 0 below; AlphaEdit: 4 intervals, 0 above zero, 0 below; SPHERE: 4 "
        "intervals, 0 above zero, 4 below" in figure.alt
    )
    assert "CounterFact  AlphaEdit  0.0 [−3.0, +3.0]" in str(figure)
    bold = [
        text
        for style, text in re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', figure.svg["light"])
        if "font-weight: 700" in style
    ]
    assert sorted(bold) == sorted(["CounterFact", "ZsRE"] + 4 * ["+12.0", "−4.0"])
    with pytest.raises(ParameterError, match="no column low"):
        report.forest(intervals().drop(columns="low"), "MetaKE − the other")


def test_the_comparison_table_marks_the_highest_of_each_column():
    summary = pd.DataFrame(
        {
            "dataset": "d", "method": ["metake", "pre-edit", "memit"], "efficacy": [80.04, 99.0, 80.0],
            "fluency": [np.nan, 600.0, 500.0]
        }
    )
    shown = report.comparison_table(summary, "C")
    assert [line.split() for line in str(shown).splitlines()[2:]] == [
        ["d", "pre-edit", "99.0", "600.0"], ["d", "MEMIT", "80.0*", "500.0*"], ["d", "MetaKE", "80.0*", "–"]
    ]
    assert (
        shown.html.count("<strong>") == 3
        and '<td class="num"><strong>80.0</strong></td>' in shown.html
        and '<td class="num">–</td>' in shown.html
        and "*" not in shown.html
    )
    several = report.comparison_table(summary.assign(efficacy_sd=[1.0, 2.0, 3.0]))
    assert '<td class="num"><strong>80.0 ± 1.0</strong></td>' in several.html and "efficacy sd" not in several.html


def test_a_page_runs_before_its_recording_is_made(project):
    shown = report.if_recorded("operators-smollm2-135m", lambda _: pytest.fail("there is nothing to show"))
    assert str(shown) == "Not recorded yet. Make it with: metake record --only operators --model smollm2-135m"
    given = probes()
    assert report.recorded_or("operators-smollm2-135m", given).attrs["label"] == "recomputed" and not given.attrs
    path = report.write_recorded("operators-smollm2-135m", probes(), FACTS)
    assert report.recorded_or("operators-smollm2-135m", given).attrs["label"] == "recorded"
    assert report.if_recorded("operators-smollm2-135m", len, lambda n, by: n + by, by=1) == 3
    path.write_text("{}")
    with pytest.raises(ProvenanceError, match="damaged"):
        report.if_recorded("operators-smollm2-135m", len)


def test_code_is_shown_as_it_runs():
    from metake import methods

    shown = report.source(methods.metake)
    assert (
        str(shown) == inspect.getsource(methods.metake).rstrip()
        and "&quot;&quot;&quot;MetaKE" in shown.html
        and "base(model" in shown.html
    )


def frame():
    return pd.DataFrame(
        {
            "method": ["metake", "<b>"], "efficacy_sd": [97.125, 3e-16], "n": [1, None], "ok": [True, False],
            "label": ["recomputed", "reported"]
        }
    )


def test_tables_are_accessible():
    html = face(report.table(frame(), "Methods & more"), "text/html")
    assert html.startswith('<table class="dataframe metake-table"><caption>Methods &amp; more </caption>')
    assert html.count('scope="col"') == 5 and html.count('scope="row"') == 2 and not re.search(r"<th[^>]*></th>", html)
    assert ">MetaKE<" in html and ">&lt;b&gt;<" in html and ">efficacy sd<" in html
    assert '<span class="label label-recomputed">recomputed here</span>' in html and "label-reported" in html
    assert '<td class="num">97.12</td>' in html and '<td class="num">&lt;1e-09</td>' in html


def test_a_column_of_sentences_is_told_apart():
    html = report.table(
        pd.DataFrame({"name": ["a"], "claim": ["one sentence that fills several lines"], "n": [10**9]})
    ).html
    assert re.findall(r'<td class="([^"]+)"|<th scope="row" class="([^"]+)"', html) == [
        ("", "text"), ("text long", ""), ("num", "")
    ]


def test_the_text_of_a_table_is_aligned_and_rounded():
    expected = [
        "Methods", "method  efficacy sd     n  ok   label", "MetaKE        97.12  1.00  yes  recomputed here",
        "<b>          <1e-09     –  no   reported in the paper"
    ]
    assert face(report.table(frame(), "Methods"), "text/plain").splitlines() == expected


def test_tables_say_where_their_numbers_come_from():
    numbers = pd.DataFrame({"a": [0.5, 0.0005]})
    assert str(report.table(numbers, "A")).splitlines() == ["A [recomputed here]", "       a", "   0.500", "0.000500"]
    recorded = numbers.copy()
    recorded.attrs |= {"label": "recorded", "provenance": FACTS}
    for shown in (report.table(recorded, "A"), report.table(numbers, "A", source=recorded)):
        assert "[recorded]" in shown.text and "(smollm2-135m, facts, 2026-11-21, 0123456789, cpu)" in shown.html
    assert (
        "[reported in the paper]" in str(report.table(report.paper("table2")))
        and "label" not in report.table(numbers, label="").html
    )
    with pytest.raises(ParameterError, match="unknown label 'recompute'"):
        report.table(numbers, label="recompute")


def test_grouped_and_pivoted_frames_become_flat_tables():
    wide = cases().pivot_table(index="method", columns="dataset", values=["efficacy"])
    html = report.table(wide).html
    assert ">method<" in html and ">efficacy CounterFact<" in html and "></th>" not in html


@pytest.mark.parametrize(("holds", "word"), [(True, "holds"), (np.False_, "does not hold"), (None, "inconclusive")])
def test_a_verdict_is_shown_and_kept(holds, word, project):
    shown = report.verdict("page", "A page", "β < 1", holds, "largest β 0.97", 25.04, "rounding")
    assert (
        shown.verdict == word and shown.text == f"Verdict: {word} – β < 1\nDecided by: largest β 0.97 [recomputed here]"
    )
    assert f">{word}</span>" in shown.html and "β &lt; 1" in shown.html and "admonition" in shown.html
    kept = files(project / "_build" / "verdicts")
    assert list(kept) == ["page.json"]
    assert json.loads(kept["page.json"]) == {
        "page": "page", "title": "A page", "claim": "β < 1", "verdict": word, "decided_by": "largest β 0.97",
        "label": "recomputed", "margin": 25.0, "error": "rounding"
    }
    assert "Distance from turning: 25 times its error (rounding)" in shown.html and "25" not in shown.text


@pytest.mark.parametrize(("margin", "said"), [(0.5, "not within"), (float("nan"), "1"), (-1.0, "1")])
def test_a_verdict_within_its_error_says_so(project, margin, said):
    told = "smallest margin 0.0 is within its error" if said == "not within" else "1"
    if told != "1":
        shown = report.verdict("page", "A page", "claim", True, told, margin, "rounding")
        assert "within its error (rounding)" in shown.html
    with pytest.raises(ParameterError, match="errors from turning, and does not say so"):
        report.verdict("page", "A page", "claim", True, "1", margin, "rounding")


def test_another_model_does_not_speak_for_the_page(project, monkeypatch):
    report.verdict("page", "A page", "claim", True, "1", 9.0, "rounding")
    before = files(project / "_build" / "verdicts")["page.json"]
    other = report.verdict("page", "A page", "claim", False, "2", 9.0, "rounding", model="smollm2-135m")
    assert other.verdict == "does not hold"
    assert files(project / "_build" / "verdicts")["page.json"] == before
    monkeypatch.setenv("METAKE_VERDICTS", "build/verdicts")
    report.verdict("page", "A page", "claim", False, "2", 9.0, "rounding", model="smollm2-135m")
    assert list(files(project / "build" / "verdicts")) == ["page-smollm2-135m.json"]


def test_several_claims_of_one_page_have_a_verdict_each(project):
    for part in ("", "figure3"):
        report.verdict("page", "A page", f"claim {part}", True, "1", 9.0, "rounding", part=part)
    kept = {name: json.loads(text) for name, text in files(project / "_build" / "verdicts").items()}
    assert {name: found["page"] for name, found in kept.items()} == {"page.json": "page", "page-figure3.json": "page"}


def test_outside_a_project_a_verdict_stays_in_the_working_folder(project):
    (project / "_config.yml").unlink()
    report.verdict("page", "A page", "claim", True, "1", 9.0, "rounding")
    assert [path.relative_to(project).as_posix() for path in project.rglob("*.json")] == [
        "notebooks/_build/verdicts/page.json"
    ]


@pytest.mark.parametrize("holds", ["holds", float("nan"), 2])
def test_a_verdict_is_not_typed(holds):
    with pytest.raises(ParameterError, match="True, False or None"):
        report.verdict("page", "A page", "claim", holds, "1", 9.0, "rounding")


def test_provenance_prints_what_is_stable_and_shows_everything():
    shown = report.provenance(FACTS | {"file": "/home/me/data/zsre.json"})
    assert shown.text == "Provenance: model: smollm2-135m, model digest: abababababab, dataset: facts, seed: 0, n: 2"
    assert (
        all(
            text in shown.html
            for text in ("2026-11-21", "0123456789abcdef", "torch 2.13.0", "3.14", "<dd>zsre.json</dd>", "<summary>")
        )
        and "/home" not in shown.html
    )
    with pytest.raises(ProvenanceError, match="carry no provenance"):
        report.provenance(probes())


def test_recorded_gives_back_what_was_written(project):
    records = probes().assign(fluency=[1 / 3, np.nan], count=[np.int64(2), 3])
    path = report.write_recorded("quickstart-smollm2-135m", records, FACTS | {"data": "/home/me/zsre.json"})
    assert path == project / "results" / "quickstart-smollm2-135m.jsonl" and "/home" not in path.read_text()
    head, first, _ = map(json.loads, path.read_text().splitlines())
    assert head == {"provenance": FACTS | {"data": "zsre.json"}, "records": 2, "columns": list(records.columns)}
    records["fluency"] = [0.3333333333, np.nan]  # ten digits are kept
    assert first == records.iloc[0].tolist()
    found = report.recorded("quickstart-smollm2-135m")
    assert found.attrs["label"] == "recorded" and report.provenance(found).text.startswith(
        "Provenance: model: smollm2-135m"
    )
    pd.testing.assert_frame_equal(found, records, check_exact=True)
    with pytest.raises(ParameterError, match="JSON lines"):
        report.write_recorded("quickstart-smollm2-135m", records.assign(after=np.inf), FACTS)
    pd.testing.assert_frame_equal(report.recorded("quickstart-smollm2-135m"), records, check_exact=True)


def test_a_recording_with_names_on_every_line_opens_as_before(project):
    """As files were written at first."""
    records = probes().assign(fluency=[0.3333333333, np.nan])
    path = report.write_recorded("quickstart-smollm2-135m", records, FACTS)
    rows = [{k: None if v != v else v for k, v in row.items()} for row in records.to_dict("records")]
    lines = [{"provenance": FACTS, "records": 2}, *rows]
    path.write_text("".join(json.dumps(line, default=float) + "\n" for line in lines))
    pd.testing.assert_frame_equal(report.recorded("quickstart-smollm2-135m"), records, check_exact=True)


def test_a_recording_of_another_metake_says_so(project):
    """Made before its reading was chosen: whoever sees a row of it is told."""
    for told, shown in (("read literally", True), ("step_size 0.01", False)):
        report.write_recorded("comparison-x", compared("memit", "metake"), FACTS | {"metake": told})
        found = report.recorded("comparison-x")
        made = report.table(found[["method", "efficacy"]], "Scores", source=found)
        assert ("MetaKE read literally" in made.html) == shown
    report.write_recorded("comparison-x", compared("memit", "metake"), FACTS | {"metake": "read literally"})
    report.merge_recorded("comparison-x", compared("metake"), FACTS | {"metake": "step_size 0.01"})
    assert report.recorded("comparison-x").attrs["provenance"]["metake"] == "step_size 0.01"


def compared(*methods: str, value: float = 1.0) -> pd.DataFrame:
    return pd.DataFrame([{"method": m, "id": f"{i}", "efficacy": value} for m in methods for i in range(3)])


def test_some_methods_rows_are_made_again_and_the_others_stay(project):
    """Each row with its own provenance; a part of which nothing is left goes."""
    report.write_recorded("comparison-x", compared("memit", "metake"), FACTS | {"commit": "old", "minutes": 3.0})
    again = compared("metake", "sphere", value=0.5)
    report.merge_recorded("comparison-x", again, FACTS | {"commit": "new", "minutes": 2.0})
    found = report.recorded("comparison-x")
    assert found.groupby("method").efficacy.mean().to_dict() == {"memit": 1.0, "metake": 0.5, "sphere": 0.5}
    told = found.method.groupby(found.made).unique().map(list).to_dict()
    assert told == {0: ["memit"], 1: ["metake", "sphere"]}
    assert [part["commit"] for part in found.attrs["parts"]] == ["old", "new"]
    assert found.attrs["provenance"]["commit"] == "old; new" and found.attrs["provenance"]["minutes"] == 5.0
    assert found.attrs["label"] == "recorded" and "parts" not in found.attrs["provenance"]
    report.merge_recorded("comparison-x", compared("memit", value=0.0), FACTS | {"commit": "newest", "minutes": 1.0})
    found = report.recorded("comparison-x")
    assert [part["commit"] for part in found.attrs["parts"]] == ["new", "newest"] and len(found) == 9
    assert set(found.made[found.method == "memit"]) == {1} and set(found.made[found.method == "metake"]) == {0}


def test_where_rows_have_seeds_each_seed_is_added(project):
    """A recording of hours is made a seed at a time; the same method's rows of another seed stay."""
    def of(seed: int, value: float) -> pd.DataFrame:
        return compared("memit", "metake", value=value).assign(seed=seed)

    report.write_recorded("sequences-x", of(0, 1.0), FACTS | {"seeds": [0], "commit": "old"})
    report.merge_recorded("sequences-x", of(1, 0.5), FACTS | {"seeds": [1], "commit": "new"})
    again = of(1, 0.0)
    report.merge_recorded("sequences-x", again[again.method == "metake"], FACTS | {"seeds": [1], "commit": "newest"})
    found = report.recorded("sequences-x")
    assert found.attrs["provenance"]["seeds"] == [0, 1] and len(found) == 12
    told = found.groupby(["method", "seed"]).efficacy.mean().to_dict()
    assert told == {("memit", 0): 1.0, ("metake", 0): 1.0, ("memit", 1): 0.5, ("metake", 1): 0.0}
    assert [part["commit"] for part in found.attrs["parts"]] == ["old", "new", "newest"]


def test_rows_of_other_records_are_not_merged(project):
    path = report.write_recorded("comparison-x", compared("memit"), FACTS | {"edits": 100})
    before = path.read_bytes()
    with pytest.raises(ParameterError, match="has edits 100, the new rows 50: rows of one recording are compared"):
        report.merge_recorded("comparison-x", compared("metake"), FACTS | {"edits": 50})
    assert path.read_bytes() == before


def test_a_missing_recording_names_the_command(project):
    report.write_recorded("other", probes(), FACTS)
    with pytest.raises(
        ParameterError,
        match="recorded so far: other. Make it with: metake record --only comparison --model smollm2-135m$",
    ):
        report.recorded("comparison-smollm2-135m")
    with pytest.raises(ParameterError, match="cannot name a file"):
        report.recorded("../other")


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda t: t[:-9], "damaged"),
    (lambda t: t[:-1], "last line is not finished"),
    (lambda t: t[: t.rindex("\n", 0, -1) + 1], "2 records were written, 1 are there"),
    (lambda t: t.split("\n", 1)[1], "no provenance"),
    (lambda t: t.replace('"columns":["probe",', '"columns":[', 1), "same columns"),
    (lambda t: "", "damaged"),
])  # fmt: skip
def test_a_damaged_recording_is_refused(damage, reason):
    path = report.write_recorded("quickstart", probes(), FACTS)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ProvenanceError, match=reason):
        report.recorded("quickstart")


def test_portable_leaves_no_path():
    assert portable({"a": ["/root/x/model", "C:\\Users\\me\\f.json", "~/m", "openai-community/gpt2-xl", 3]}) == {
        "a": ["model", "f.json", "m", "openai-community/gpt2-xl", 3]
    }


def test_the_papers_numbers():
    seconds = report.paper("table5").set_index(["method", "dataset", "model"]).seconds
    gigabytes = report.paper("table6").set_index(["method", "dataset", "model"]).gigabytes
    for numbers, name in ((seconds, "run time"), (gigabytes, "peak memory")):  # the prose and the tables agree
        ratios = numbers["metake"] / numbers["alphaedit"]
        low, high = report.paper("overhead").set_index("quantity").loc[name, ["low", "high"]]
        assert (round(ratios.min(), 2), round(ratios.max(), 2)) == (low, high)
    sensitivity = report.paper("table3")
    default = sensitivity[(sensitivity.model == "LLaMA3") & sensitivity.setting.str.contains("default")]
    ablation = report.paper("table2")
    assert (
        default[["efficacy", "generalization", "specificity"]].to_numpy() == ablation.iloc[0, 1:4].to_numpy(float)
    ).all() and len(default) == 2
    for name in (
        "figure1", "table1", "table2", "table3", "table4", "table5", "table6", "overhead", "protocol", "case_study"
    ):
        table = report.paper(name)
        assert (table.label == "reported").all() and table["where"].str.contains("§|Appendix").all()
    with pytest.raises(ParameterError, match="Did you mean 'table3'"):
        report.paper("tabel3")


def test_what_is_recorded_of_further_models_is_shown_beside_the_pages_own(project, monkeypatch):
    shown = []
    monkeypatch.setattr("metake.report.studies.operators.display", lambda found: shown.append(str(found)))
    own = FACTS | {"model": "smollm2-135m"}
    report.write_recorded("operators-smollm2-135m", probes(), own)
    first = report.if_recorded("operators-smollm2-135m", report.table, caption="On SmolLM2-135M")
    assert not shown and str(first).startswith("On SmolLM2-135M [recorded")
    for name in ("operators-gpt2-xl", "operators-tiny", "operators_more-gpt2-xl"):
        report.write_recorded(name, probes(), FACTS | {"model": name})
    again = report.if_recorded("operators-smollm2-135m", report.table, caption="On SmolLM2-135M")
    assert str(again) == str(first) and len(shown) == 1 and shown[0].startswith("On gpt2-xl [recorded")
    assert report.of_others("operators-tiny", report.table) is None and len(shown) == 1


def test_a_curve_that_others_cover_shows_on_both_sides_of_them():
    """Two that coincide, to the pixel; one that parts from them at its end; single marks, which are no curves."""
    drawn = {}

    def draw(axes):
        for name, color, ys in (
            ("under", "#d97808", [1, 2, 3]), ("over", "#c70a2c", [1, 2, 3.001]), ("apart", "#00a76b", [1, 2, 2.5]),
            ("same color", "#c70a2c", [1, 2, 3]),
        ):  # fmt: skip
            (drawn[name],) = axes.plot([0, 1, 2], ys, color=color, marker="o", markersize=6, linewidth=2)
        for color in ("#d97808", "#c70a2c"):
            (drawn[color],) = axes.plot([1], [1], color=color, marker="o", markersize=6, linewidth=2)

    report.figure.Figure(draw, gammas(3), "covered", "Curves.")
    widths = {name: (line.get_linewidth(), line.get_markersize()) for name, line in drawn.items()}
    assert widths.pop("under") > (4, 8) and set(widths.values()) == {(2, 6)}


def test_three_curves_in_one_place_are_told_apart_by_their_widths():
    rows = [
        {"method": method, "stress": "text", "group": group, "efficacy_contained": share}
        for method in ("memit", "alphaedit", "metake") for group, share in (("0", 1.0), ("16", 0.5))
    ]  # fmt: skip
    svg = report.stress_curves(pd.DataFrame(rows)).svg["light"]
    found = (re.search(rf"stroke: {c}; stroke-width: ([\d.]+)", svg) for c in ("#00a76b", "#d97808", "#c70a2c"))
    widths = [float(one[1]) for one in found]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3


@pytest.mark.parametrize("labels", [["a", "b"], ["a reading with a long name", "b"]])
def test_words_over_and_under_panels_break_before_they_meet(labels):
    """Beside narrow panels, left of which names of rows take their room; what fits stays on its line."""
    drawn = []

    def draw(axes):
        for panel in axes[0]:
            title = panel.set_title("A title far too long for its panel, and with a formula $x_1$")
            panel.set(xlabel="what is measured, in units of what it was before", yticks=[0, 1], yticklabels=labels)
            drawn.append((panel, title, panel.xaxis.label))
        axes[0, 0].set_title("fits")

    report.figure.Figure(draw, gammas(3), "words", "Panels.", size=(7, 3), ncols=3, sharey=True)
    assert drawn[0][1].get_text() == "fits" and "\n" in drawn[1][1].get_text()
    canvas = drawn[0][0].figure
    canvas.draw_without_rendering()
    for words in zip(*[one[1:] for one in drawn], strict=True):
        boxes = [text.get_window_extent() for text in words]
        assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
        assert boxes[-1].x1 <= canvas.bbox.x1
