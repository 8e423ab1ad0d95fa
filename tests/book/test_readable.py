"""What a reader meets: numbers in prose come from data, names are words, one order, one numbering, one line around."""

import importlib
import json
import re
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import stand_in
from sphinx.errors import ExtensionError

import metake as mk
from metake import report
from metake.editing.statistics import statistics
from metake.report import figure
from metake.report.style import METHOD_STYLE, in_order

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROSE = sorted((ROOT / "book").glob("*.md"))
VALUE = re.compile(r"\{value\}`([^`]+)`")
CODE_NAME = re.compile(r">\s*([a-z]+(?:_[a-z0-9]+)+)\s*<")
OWN = re.compile(r"(?<!Paper )(?<![\w.\"])\b(?:Figures?|Figs?\.|Tables?) \d")


@pytest.fixture(scope="module", autouse=True)
def extension():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "book" / "_ext"), *sys.path])
        yield


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["cells"]


def markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text("utf-8")
    return "\n\n".join("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")


def outputs(path: Path, kind: str) -> list[str]:
    return ["".join(o.get("data", {}).get(kind, "")) for c in cells(path) for o in c.get("outputs", ())]


def test_numbers_in_prose_are_those_of_the_data():
    value, found = importlib.import_module("value"), 0
    for path in (*NOTEBOOKS, *PROSE):
        for asked in VALUE.findall(markdown(path)):
            page = path.relative_to(ROOT).with_suffix("").as_posix()
            assert re.fullmatch(r"[+−]?[\d.]+(e-\d+)?", value.value(ROOT, page, asked)), asked
            found += 1
    assert found > 20


@pytest.mark.parametrize(
    "asked", ["Random layers | dim=2", "Random layers | dim=3 | median angle", "None | dim=2 | median angle",
              "Random layers | dim=2 | angle", "nothing.csv | method=metake | difference .1f"],
)  # fmt: skip
def test_a_number_that_is_not_there_is_refused(asked):
    value = importlib.import_module("value")
    with pytest.raises(value.NotThere):
        value.value(ROOT, "notebooks/geometry_of_beta", asked)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PROSE], ids=lambda path: path.stem)
def test_figures_and_tables_of_the_paper_are_called_so(path):
    """Those of the book are numbered by the build, and referred to by name."""
    shown = outputs(path, "text/plain") if path.suffix == ".ipynb" else []
    assert not [found[0] for text in (markdown(path), *shown) for found in OWN.finditer(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_code_name_stands_in_a_table(path):
    tables = [html for html in outputs(path, "text/html") if html.startswith("<table")]
    assert not {name for html in tables for name in CODE_NAME.findall(html)} - {"v_init"}  # a symbol


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_methods_stand_in_one_order_in_every_table(path):
    furniture, known = importlib.import_module("furniture"), [look.name for look in METHOD_STYLE.values()]
    for html in outputs(path, "text/html"):
        if html.startswith("<table"):
            head, *rows = furniture.Cells(html).rows
            if "method" in head:
                place = head.index("method")
                named = [row for row in rows if row[place] in known]
                for _, run in groupby(named, lambda row, place=place: row[:place]):
                    found = [known.index(row[place]) for row in run]
                    assert found == sorted(found), html[:300]


def test_a_table_sorts_its_methods_within_what_stands_left_of_them():
    methods = ["metake", "alphaedit", "memit"]
    frame = pd.DataFrame({"dataset": ["b", "b", "a"], "method": methods, "ratio": [94.535, 2, 1]})
    shown = report.table(frame, two_digits=["ratio"], label="")
    assert [line.split() for line in shown.text.splitlines()[1:]] == [
        ["b", "AlphaEdit", "2"], ["b", "MetaKE", "95"], ["a", "MEMIT", "1"]
    ]
    named = pd.DataFrame({"direction": ["equal_key_only"], "metric": ["log_p_paraphrase"]})
    assert "_" not in report.table(named).text and "_" not in report.table(named).html.replace("_blank", "")


def test_an_interval_stands_in_the_cell_of_its_value():
    frame = pd.DataFrame({
        "method": ["metake", "memit"], "share": [0.094, 2.0], "low": [-0.15, None], "high": [0.3, None], "n": [1, 2],
    })  # fmt: skip
    shown = report.table(frame, "Shares", ranges={"share": ("low", "high")}, without=["n"], label="")
    assert shown.text == "Shares\nmethod               share\nMEMIT                 2.00\nMetaKE  0.09 [-0.15, 0.30]"
    assert shown.html.count('<th scope="col"') == 2 and '<td class="num">0.09 [-0.15, 0.30]</td>' in shown.html


def test_prose_reads_the_ends_of_an_interval():
    value = importlib.import_module("value")
    rows = [["method", "share"], ["MetaKE", "0.09 [-0.15, 0.30]"], ["MEMIT", "2.00"]]
    asked = partial(value.cell, rows, "method=MetaKE", where="here")
    assert [asked(column=column) for column in ("share", "share low", "share high")] == ["0.09", "-0.15", "0.30"]
    for chosen, column in (("method=MEMIT", "share low"), ("method=MetaKE", "share middle"), ("method=MetaKE", "low")):
        with pytest.raises(value.NotThere):
            value.cell(rows, chosen, column, "here")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_table_is_wider_than_can_be_read(path):
    for html in outputs(path, "text/html"):
        if html.startswith("<table"):
            assert html.count('<th scope="col"') <= 10, re.search(r"<caption>(.{60})", html)[1]


def test_no_drawing_is_wider_than_its_column(tmp_path, monkeypatch):
    monkeypatch.setenv("METAKE_FIGURES", str(tmp_path))
    titles = "A title that is much longer than the panel that it stands over"

    def draw(axes):
        for panel in axes.flat:
            panel.set_title(titles)

    shown = figure.Figure(draw, pd.DataFrame({"x": [1]}), "wide", "alt", size=(11.2, 3), ncols=3)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', shown.svg["light"])[1])
    assert width <= 72 * figure.WIDEST + 1 and shown.svg["light"].count(">A title that") == 3
    assert titles not in shown.svg["light"], "titles of neighbors meet"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_hollow_marks_are_hollow(theme):
    """A fill without a color is black, whatever was meant."""
    for path in (ROOT / "figures").glob(f"*.{theme}.svg"):
        styles = re.findall(r'style="([^"]*fill-opacity: (?!0[;"])[^"]*)"', path.read_text("utf-8"))
        assert all(re.search(r"(?:^|; )fill: ", style) for style in styles), path.name


def test_methods_are_clear_on_the_dark_page_and_themselves_on_the_light(tmp_path, monkeypatch):
    monkeypatch.setenv("METAKE_FIGURES", str(tmp_path))
    olive, ground = METHOD_STYLE["pmet"].color, figure.luminance(figure.DARK) + 0.05
    for look in METHOD_STYLE.values():
        assert (figure.luminance(figure.lifted(look.color)) + 0.05) / ground >= figure.CLEAR
    shown = figure.Figure(lambda axes: axes.plot([0, 1], color=olive), pd.DataFrame({"x": [1]}), "line", "alt")
    assert olive in shown.svg["light"] and olive not in shown.svg["dark"]
    assert figure.lifted(olive) in shown.svg["dark"] and f"var(--mk-{olive[1:]},{olive})" in shown.html
    assert f"--mk-{olive[1:]}:{figure.lifted(olive)}" in shown.html


def test_every_page_says_what_it_gives_and_is_found_by_its_readers_words():
    pages = importlib.import_module("pages")
    known = pages.listed(ROOT)
    for page, told in known["pages"].items():
        assert len(told["know"]) > 30 and not told["know"].endswith(".") and len(told["ask"]) >= 3, page
    assert all(name in known["pages"] for names in known["paths"].values() for name in names)
    assert pages.keywords(["undo an edit", "an edit"]) == "undo,an,edit"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_verdict_says_what_would_flip_it(path):
    pages = importlib.import_module("pages")
    shown = [text for text in outputs(path, "text/plain") if text.startswith("Verdict: ")]
    found = pages.rules(ROOT, f"notebooks/{path.stem}")
    assert len(found) == len(shown)
    assert all(rule.startswith("Holds ") and len(rule) > 50 and "`" not in rule for rule in found)


def test_a_judge_that_does_not_say_when_its_claim_holds_is_refused():
    pages = importlib.import_module("pages")
    with pytest.raises(ExtensionError, match="does not say when"):
        pages.rule(in_order)


def test_symbols_mean_what_the_notation_says():
    known = importlib.import_module("pages").symbols(ROOT)
    assert known[r"\gamma"].startswith("association with the constraint") and len(known) > 20
    assert not any("$" in said or "\\" in said or "`" in said for said in known.values())


def test_formulas_of_claims_are_set():
    typeset = importlib.import_module("typeset")
    odd = re.compile(r"[α-ωΓΔ∇‖√⁻²_]|\b[b-zB-HJ-Z]\b")
    for path in (ROOT / "results" / "verdicts").glob("*.json"):
        claim = json.loads(path.read_text("utf-8"))["claim"]
        parts = typeset.pieces(claim)
        assert "".join(part for part, _ in parts).replace(" ", "") == claim.replace(" ", "")
        left = [part for part, formula in parts if not formula and odd.search(part.replace("'s", ""))]
        assert not left, left
    assert typeset.tex("−∇²_vu") == r"-\nabla ^2_{vu}" and typeset.tex("√λmax") == r"\sqrt{\lambda _{\text{max}}}"
    assert [part for part, formula in typeset.pieces("A λ below 1, or β = γ/(1+γ).") if formula] == ["λ", "β = γ/(1+γ)"]


def test_one_model_is_shown_with_one_digest():
    found: dict[str, set[str]] = {}
    for path in NOTEBOOKS:
        for text in outputs(path, "text/plain"):
            if told := re.match(r"Provenance: model: ([\w-]+), model digest: (\w+)", text):
                found.setdefault(told[1], set()).add(told[2])
    assert len(found) > 1 and all(len(digests) == 1 for digests in found.values()), found


def test_the_landing_page_answers_in_three_sentences():
    book = importlib.import_module("metake_book")
    verdicts, part = book.read_verdicts(ROOT), book.checked_pages(ROOT)
    said = book.outcome(verdicts, part)
    theory = [v for v in verdicts if part[v["page"]] == "Theory" and "Paper " not in v["title"]]
    assert len(said) == 3 and f"{sum(v['verdict'] == 'holds' for v in theory)} of {len(theory)}" in said[0]
    turned = [v | {"verdict": "does not hold"} for v in verdicts]
    assert book.outcome(turned, part)[0] != said[0] and book.outcome(turned, part)[1] != said[1]
    assert book.grades(ROOT, "attenuation") == "A, B" and not book.grades(ROOT, "ablation")


def test_the_examples_of_the_first_names_run(monkeypatch, tmp_path):
    """In their order, as they are printed, on a random model; what needs a file of the reader's is only read."""
    reference, names = importlib.import_module("metake_reference"), {"mk": mk}
    assert len(reference.FIRST) == 20 and set(reference.FIRST) <= set(mk.__all__)
    for name in reference.FIRST:
        assert len(reference.sentence(name)) > 15 and (ROOT / reference.source_of(getattr(mk, name))).is_file()
    monkeypatch.setattr(mk, "load", stand_in)
    monkeypatch.setattr(mk, "statistics", partial(statistics, tokens=2000))
    monkeypatch.chdir(tmp_path)
    for name, line in reference.FIRST.items():
        assert f"mk.{name}" in line or name in ("Editor", "Edit", "EditorState")
        if "file" in line or ".json" in line or name in ("chat", "MetakeError"):
            continue
        if name == "gate":  # the one thing that a reader brings
            names["keys"] = torch.randn(2, mk.NullSpace(names["stats"]).dim, dtype=torch.float64)
        exec(line, names)  # noqa: S102
    assert (tmp_path / "runs" / "first").exists()
