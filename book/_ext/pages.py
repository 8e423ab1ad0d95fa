"""What a reader is told around a page: before it begins what it gives and takes, in the search the words in which it
may be asked for, beside its verdicts what would flip them, and under the pointer what a symbol means.

Read off book/pages.yml, the table of notation, the code that judges, and the page itself; ```{paths}``` on the first
page lists who reads what in which order, with minutes.
"""

import ast
import functools
import importlib
import inspect
import json
import math
import re
from html import escape
from pathlib import Path

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

WORDS, FORMULA, SHOWN = 200, 0.2, 0.4  # words a minute; minutes for a displayed formula, for a figure or table
FIGURE = ('<div class="metake-figure"', "<table")
VERDICT = '<div class="admonition metake-verdict'
TURNING = re.compile(r"<p>Distance from turning: (.*?)\.</p>")
RULE = re.compile(r"\bholds (?:if|where)\b.*", re.IGNORECASE)
SYMBOL = re.compile(r"\$([^$]+)\$")
NEEDS = {
    "Start": "no graphics card, no download of a model", "Understand": "linear algebra, a rough idea of a transformer",
    "Theory": "linear algebra; a symbol under the pointer says what it means",
    "Figures and tables": "the methods by name", "Use": "some Python", "Reproduce": "a shell",
}


@functools.cache
def listed(root: Path) -> dict:
    found = yaml.safe_load((root / "book" / "pages.yml").read_text("utf-8"))
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    parts = {chapter["file"]: part["caption"] for part in toc["parts"] for chapter in part["chapters"]}
    if differ := set(found["pages"]) ^ {toc["root"], *parts}:
        raise ExtensionError(f"book/pages.yml and _toc.yml differ in {sorted(differ)}")
    return found | {"parts": parts, "root": toc["root"]}


def keywords(questions: list[str]) -> str:
    """Every word of the questions once: the search knows keywords by the word."""
    return ",".join(dict.fromkeys(re.findall(r"[\w-]+", " ".join(questions))))


def minutes(document: nodes.document) -> int:
    """How long a page takes to read: its prose by the word, its formulas, figures and tables by the piece."""
    hidden = (nodes.literal_block, nodes.raw, nodes.math_block, nodes.comment)
    words = sum(
        len(text.split())
        for text in document.findall(nodes.Text)
        if not any(isinstance(up, hidden) for up in ancestors(text))
    )
    formulas = sum(1 for _ in document.findall(nodes.math_block))
    shown = sum(raw.astext().lstrip().startswith(FIGURE) for raw in document.findall(nodes.raw))
    shown += sum(1 for node in document.findall() if type(node).__name__ == "numbered_table")
    return max(1, math.ceil(words / WORDS + FORMULA * formulas + SHOWN * shown))


def ancestors(node: nodes.Node):
    while (node := node.parent) is not None:
        yield node


@functools.cache
def symbols(root: Path) -> dict[str, str]:
    """What every symbol of the table of notation means, with its name in the code, by its TeX without spaces."""
    found = {}
    for row in (root / "book" / "notation.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 3 and SYMBOL.match(cells[0]):
            said = SYMBOL.sub(lambda tex: plain(tex[1]), cells[2]) + ", in the code " + cells[1].replace("`", "")
            found |= {tex.split("=")[0].replace(" ", ""): said for tex in SYMBOL.findall(cells[0])}
    return found


def plain(tex: str) -> str:
    """A short formula as text."""
    for name, letter in {"gamma": "γ", "beta": "β", "lambda": "λ", "Delta": "Δ"}.items():
        tex = tex.replace(f"\\{name}", letter)
    return re.sub(r"[\\{}]", "", tex)


def rules(root: Path, page: str) -> list[str]:
    """When each verdict of a page would be another: what the function that judges says of itself."""
    cells = json.loads((root / f"{page}.ipynb").read_text("utf-8"))["cells"]
    trees = [ast.parse("".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    names = {
        alias.asname or alias.name: (node.module, alias.name)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for call in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", "") == "verdict":
            judge = next(word.value.func for word in call.keywords if word.arg is None)
            module, name = names[judge.value.id]
            function = getattr(importlib.import_module(f"{module}.{name}"), judge.attr)
            found.append(rule(function))
    return found


def rule(function) -> str:
    """From a judge's docstring, when its claim holds."""
    first = (inspect.getdoc(function) or "").split("\n\n")
    said = RULE.search(" ".join(next((part for part in first if RULE.search(part)), "").split()))
    if not said:
        raise ExtensionError(f"{function.__module__}.{function.__name__} does not say when its claim holds")
    given = inspect.signature(function).parameters
    named = {name: one.default for name, one in given.items()} | vars(inspect.getmodule(function))
    words = re.sub(r"`(\w+)`", lambda w: f"{named[w[1]]:g}" if isinstance(named.get(w[1]), float) else w[1], said[0])
    return words[0].upper() + words[1:].rstrip(". ")


class symbol(nodes.inline):
    """A formula that is one symbol. says: what it means."""


class reading_paths(nodes.General, nodes.Element):
    """A place for the table of reading paths, once the minutes of all pages are known."""


class Around(SphinxTransform):
    """After the furniture, before labels are collected."""

    default_priority = 405

    def apply(self, **kwargs):
        root, page = Path(self.env.srcdir), self.env.docname
        known = listed(root)
        if page not in known["pages"]:
            return
        told = known["pages"][page]
        self.document.insert(0, nodes.meta("", name="keywords", content=keywords([told["know"], *told["ask"]])))
        times = self.env.__dict__.setdefault("metake_minutes", {})
        times[page] = minutes(self.document)
        if page.startswith("notebooks/"):
            self.flips(rules(root, page))
        if not told.get("own_symbols") and page != "book/notation":
            self.symbols(symbols(root))
        first = next(self.document.findall(nodes.section), None)
        if first is None:
            return
        # a question as it was asked is found before pages that have its words somewhere
        first.insert(1, addnodes.index(entries=[("single", ask, first["ids"][0], "main", None) for ask in told["ask"]]))
        if page != known["root"]:
            first.insert(1, overview(told["know"], times[page], NEEDS[known["parts"][page]]))

    def flips(self, told):
        shown = [raw for raw in self.document.findall(nodes.raw) if raw.astext().startswith(VERDICT)]
        if len(shown) != len(told):
            raise ExtensionError(f"{self.env.docname} shows {len(shown)} verdicts and judges {len(told)} times")
        for raw, when in zip(shown, told, strict=True):
            html = TURNING.sub(
                lambda found, when=when: f"<p><strong>What would flip this verdict?</strong> {escape(when)}. "
                f"Now it stands {found[1]} from turning.</p>",
                raw.astext(),
            )
            raw.replace_self(nodes.raw("", html, format="html"))

    def symbols(self, known):
        for formula in list(self.document.findall(nodes.math)):
            said = known.get(formula.astext().replace(" ", ""))
            inside = (nodes.title, nodes.caption, nodes.reference, addnodes.pending_xref)
            if said and not any(isinstance(up, inside) for up in ancestors(formula)):
                formula.replace_self(symbol("", "", formula.deepcopy(), says=said))


def overview(know: str, time: int, needs: str) -> nodes.container:
    lines = [("You will know", f"{know}."), ("It takes", f"{time} minute{'s' * (time > 1)}; {needs}.")]
    return nodes.container(
        "", *(nodes.paragraph("", "", nodes.strong("", name), nodes.Text(f" {text}")) for name, text in lines),
        classes=["metake-overview"]
    )


class Paths(SphinxDirective):
    def run(self):
        self.env.note_dependency(str(Path(self.env.srcdir) / "book" / "pages.yml"))
        return [reading_paths()]


def fill(app, document, page):
    """The reading paths, with the minutes that were counted."""
    for place in list(document.findall(reading_paths)):
        known, items = listed(Path(app.srcdir)), []
        for who, pages in known["paths"].items():
            total = sum(app.env.metake_minutes[name] for name in pages)
            line = nodes.paragraph("", "", nodes.strong("", f"Who {who}" if who[0] != "n" else f"Who is {who}"))
            line += nodes.Text(f" ({total} minutes): ")
            for i, name in enumerate(pages):
                title = app.env.titles[name].astext()
                target = app.builder.get_relative_uri(page, name)
                line += [nodes.Text(" → " * bool(i)), nodes.reference("", title, refuri=target, internal=True)]
                line += nodes.Text(f" {app.env.metake_minutes[name]}")
            items.append(nodes.list_item("", line))
        place.replace_self(nodes.bullet_list("", *items, classes=["metake-paths"]))


def visit_symbol(self, node):
    self.body.append(f'<span class="metake-symbol" data-says="{escape(node["says"])}">')


def depart_symbol(self, node):
    self.body.append("</span>")


def setup(app):
    app.add_node(symbol, html=(visit_symbol, depart_symbol), latex=(lambda *_: None, lambda *_: None))
    app.add_node(reading_paths)
    app.add_directive("paths", Paths)
    app.add_transform(Around)
    app.connect("doctree-resolved", fill)
