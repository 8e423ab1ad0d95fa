"""Sphinx extension of this book.

* `{{ name }}` in prose takes its text from results/numbers.json; a name that is not there fails the build.
* ```{finding}``` says in a sentence what the page *Does MetaKE hold?* found;
* ```{verdicts}``` draws results/verdicts/*.json as a table; a page of a checked part without one, or with a stale one,
fails the build.
* Figures and tables of the notebooks get numbers, data and commands, pages their stamp: furniture.py, stamp.py.
* What needs the public repository (buttons, archive, DOI): public.py.
* What stands around a page (overview, reading paths, what would flip a verdict, symbols): pages.py; {value}: value.py.
* ```{edit-in-the-page}``` is the page on which a reader edits the model: edit_page.py.
* MathJax comes from an installed package and Thebe is left out: a reader's browser asks nothing of the network.
* A few roles and names in the finished pages are repaired, for readers who listen to them.
"""

import importlib.util
import json
import re
from collections import Counter
from html import escape
from pathlib import Path

import edit_page
import furniture
import pages
import public
import typeset
import value
import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.fileutil import copy_asset

from metake.report.shown import distance

FONTS = "output/chtml/fonts/woff-v2"
FIELDS = {"page", "title", "claim", "verdict", "decided_by", "label", "margin", "error"}
VERDICTS = {"holds": "yes", "does not hold": "no", "inconclusive": "open"}
CHECKED = ("Theory", "Figures and tables")  # parts of _toc.yml whose pages have verdicts
FINDING = "does_metake_hold"  # the page that the landing page's sentence speaks of
SOURCE = re.compile(r"\(([^()]*(?:Paper|Theorem|Proposition|App\.)[^()]*)\)$")
GRADE = re.compile(r"(?:grade|to) \*\*([ABC])\*\*")
SAYS = {"holds": "it holds", "does not hold": "it does not hold", "inconclusive": "the records do not tell"}
LABELS = {"recomputed": "recomputed here", "recorded": "recorded"}
REPAIRS = (
    ('<div role="list" class="citation-list">', '<div class="citation-list">'),
    (' role="doc-biblioentry"', ""),
    ('-content" id="proof-content">', '-content">'),
    (
        'search-button__button pst-js-only" title="Search" aria-label="Search"',
        'search-button__button pst-js-only" title="Search"',
    ),
    ('<summary aria-label="Toggle hidden content">', "<summary>"),
    ('data-mode="light" title="Light"', 'data-mode="light"'),
    ('data-mode="dark"  title="Dark"', 'data-mode="dark"'),
    ('data-mode="auto"  title="System Settings"', 'data-mode="auto"'),
    (
        '<div class="sidebar-primary-items__start sidebar-primary__section">',
        '<div class="sidebar-primary-items__start sidebar-primary__section" role="navigation" aria-label="Book">',
    ),
)
TWICE = re.compile(r'<p class="admonition-title" id="[^"]*">')  # the box around a theorem has the name already
# never at the start of a line
PUNCTUATED = re.compile(r'(<span class="math notranslate nohighlight">[^<]*</span>)([.,;:!?)\]’”]+)')


def numbers(app, config):
    """Make the entries of results/numbers.json, a flat {"name": "text"}, available as {{ name }}."""
    file = Path(app.srcdir) / "results" / "numbers.json"
    if file.exists():
        config.myst_substitutions = {**json.loads(file.read_text("utf-8")), **config.myst_substitutions}


def checked_pages(root: Path) -> dict[str, str]:
    """Pages that must have a verdict, in reading order, each with the caption of its part in _toc.yml."""
    parts = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))["parts"]
    return {
        Path(c["file"]).stem: part["caption"] for part in parts if part["caption"] in CHECKED for c in part["chapters"]
    }


def read_verdict(file: Path) -> dict:
    verdict = json.loads(file.read_text("utf-8"))
    if missing := FIELDS - verdict.keys():
        raise ExtensionError(f"{file}: no {', '.join(sorted(missing))}")
    for field, allowed in (("verdict", VERDICTS), ("label", LABELS)):
        if verdict[field] not in allowed:
            raise ExtensionError(f"{file}: {field} is {verdict[field]!r}, expected one of {list(allowed)}")
    return verdict


def shown(root: Path, page: str) -> str:
    """What a page's committed outputs say in plain text."""
    cells = json.loads((root / "notebooks" / f"{page}.ipynb").read_text("utf-8"))["cells"]
    return "\n".join(
        "".join(output.get("data", {}).get("text/plain", "")) for cell in cells for output in cell.get("outputs", ())
    )


def read_verdicts(root: Path) -> list[dict]:
    """Every verdict, in the order of the pages; each page of a checked part has one that it still shows,
    and no other page.
    """
    pages = list(checked_pages(root))
    verdicts = [read_verdict(file) for file in sorted((root / "results" / "verdicts").glob("*.json"))]
    found = {verdict["page"] for verdict in verdicts}
    if missing := set(pages) - found:
        raise ExtensionError(f"results/verdicts has no verdict of {sorted(missing)}; `make notebooks` writes them")
    if strange := found - set(pages):
        raise ExtensionError(
            f"results/verdicts speaks of {sorted(strange)}, not under {' or '.join(CHECKED)} in _toc.yml"
        )
    stale = [
        v["page"]
        for v in verdicts
        if any(v[field] not in shown(root, v["page"]) for field in ("claim", "verdict", "decided_by"))
    ]
    if stale:
        raise ExtensionError(
            f"the verdicts of {sorted(stale)} are stale: their pages show others; `make notebooks` writes both"
        )
    return sorted(verdicts, key=lambda verdict: pages.index(verdict["page"]))


def badge(verdict: str, suffix: str = "") -> nodes.inline:
    return nodes.inline("", verdict + suffix, classes=["verdict", f"verdict-{VERDICTS[verdict]}"])


def row(*cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))


class Verdicts(SphinxDirective):
    """Claim, verdict with the number that decided it, and the page that computes it."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        for file in (root / "_toc.yml", *(root / "results" / "verdicts").glob("*.json")):
            self.env.note_dependency(str(file))
        verdicts, part = read_verdicts(root), checked_pages(root)
        count = Counter(verdict["verdict"] for verdict in verdicts)
        summary = [node for name in VERDICTS for node in (badge(name, f": {count[name]}"), nodes.Text(" "))]
        tables = [
            node
            for caption in CHECKED
            for node in self.table(root, caption, [v for v in verdicts if part[v["page"]] == caption])
        ]
        return [nodes.paragraph("", "", *summary), *tables]

    def table(self, root: Path, caption: str, verdicts: list[dict]) -> list[nodes.Node]:
        group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in (45, 30, 25)), cols=3)
        group += nodes.thead("", row(*([nodes.Text(name)] for name in ("Claim", "Verdict", "Page, source, formulas"))))
        group += nodes.tbody("", *(self.verdict_row(root, verdict) for verdict in verdicts))
        return [nodes.rubric("", caption), nodes.table("", group, classes=["verdicts"])] if verdicts else []

    def verdict_row(self, root: Path, verdict: dict) -> nodes.row:
        label = nodes.inline("", LABELS[verdict["label"]], classes=["label", f"label-{verdict['label']}"])
        link = addnodes.pending_xref(  # its words are the page's title
            "", nodes.inline("", ""), refdomain="std", reftype="doc", refexplicit=False, refwarn=True,
            refdoc=self.env.docname, reftarget=f"/notebooks/{verdict['page']}"
        )
        source, graded = SOURCE.search(verdict["title"]), grades(root, verdict["page"])
        told = "; ".join(filter(None, (source and source[1], graded and f"formulas: {graded}")))
        found = row(
            typeset.typeset(verdict["claim"]), [badge(verdict["verdict"]), nodes.Text(" "), label],
            [link, nodes.Text(f" ({told})" if told else "")]
        )
        told = f"Distance from turning: {distance(verdict['margin'], verdict['error'])}"
        decided = f"<p>{escape(verdict['decided_by'])}</p><p>{escape(told)}</p>"
        found[1] += nodes.raw("", f"<details><summary>decided by</summary>{decided}</details>", format="html")
        return found


def grades(root: Path, page: str) -> str:
    """How sure the formulas of a page are, in the grades that it names itself: "A", "A, B"."""
    cells = json.loads((root / "notebooks" / f"{page}.ipynb").read_text("utf-8"))["cells"]
    said = [part for c in cells for part in "".join(c["source"]).split("\n\n") if part.startswith("How sure")]
    return ", ".join(sorted({letter for part in said for letter in GRADE.findall(part)}))


def outcome(verdicts: list[dict], part: dict[str, str]) -> list[str]:
    """The answer in three sentences: what of the theory holds, what of the measurements, and in which reading."""
    theory = [v for v in verdicts if part[v["page"]] == "Theory" and "Paper " not in v["title"]]
    measured = [v for v in verdicts if v not in theory and v["page"] != FINDING and "Paper " in v["title"]]
    proved, count = Counter(v["verdict"] for v in theory), Counter(v["verdict"] for v in measured)
    return [
        f"What the paper proves holds: {proved['holds']} of {len(theory)} statements, each tried on random instances "
        "and by a search for a counterexample.",
        f"What it measures was found only in part, on a model of 135 million parameters: of {len(measured)} claims "
        f"{count['holds']} hold{'s' * (count['holds'] == 1)}, {count['does not hold']} do not, and "
        f"{count['inconclusive']} cannot be told from so few edits of so small a model.",
        sentence(verdicts),
    ]


class Finding(SphinxDirective):
    """What was found, in three sentences, and the page that computes the last."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        said = " ".join(outcome(read_verdicts(root), checked_pages(root)))
        link = addnodes.pending_xref(
            "", nodes.inline("", "does MetaKE hold?"), refdomain="std", reftype="doc", refexplicit=True, refwarn=True,
            refdoc=self.env.docname, reftarget=f"/notebooks/{FINDING}"
        )
        return [nodes.paragraph("", "", nodes.strong("", said + " "), nodes.Text("Claim by claim: "), link)]


def sentence(verdicts: list[dict]) -> str:
    """What each reading of MetaKE came to."""
    said = [v for v in verdicts if v["page"] == FINDING]
    text = ", ".join(f"{v['title'].removeprefix('MetaKE, ')} {SAYS[v['verdict']]}" for v in said)
    start = "Whether MetaKE lowers its own loss and edits better than AlphaEdit depends on how its text is read"
    return f"{start}: {text}."


def mathjax(app):
    """Copy the parts of MathJax that the pages use beside them."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise ExtensionError("the package sphinx-mathjax-offline is not installed; requirements.txt pins it")
    source = Path(spec.submodule_search_locations[0]) / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    copy_asset(str(source / "tex-chtml.js"), str(target))
    copy_asset(str(source / FONTS), str(target / FONTS))


def local_scripts(app, page, template, context, doctree):
    """Leave out the scripts of Thebe, which point at a content network and serve nothing here."""

    def wanted(script):
        text = f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {})}"
        return "thebe" not in text.lower()

    context["script_files"] = [script for script in context.get("script_files", []) if wanted(script)]


def repair(app, error):
    """Correct roles and names that the theme and the bibliography get wrong."""
    if error or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text("utf-8")
        for wrong, right in REPAIRS:
            text = text.replace(wrong, right)
        text = TWICE.sub('<p class="admonition-title">', text)
        text = PUNCTUATED.sub(r'<span class="no-break">\1\2</span>', text)
        page.write_text(text, "utf-8")


def setup(app):
    app.add_directive("verdicts", Verdicts)
    app.add_directive("finding", Finding)
    for part in (edit_page, furniture, pages, public, value):
        part.setup(app)
    app.connect("config-inited", numbers, priority=100)
    app.connect("builder-inited", mathjax)
    app.connect("html-page-context", local_scripts, priority=900)
    app.connect("build-finished", repair)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
