"""The page on which a reader edits the model: ```{edit-in-the-page}``` is its place; its scripts come with it.

The data of the page (weights, tokenizer, metrics, facts, plans) are written from the package when the book is built as
HTML; nothing of them is kept in the repository but the plans. Where no script runs, on paper too, the same example is a
picture with its numbers, which the library computes.
"""

import functools
import json
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import metake as mk
from metake.experiments import for_browser, in_the_page
from metake.methods import METHODS

PAGE = "book/edit_in_the_page"
FOLDER = "edit"  # below _static
SCRIPTS = ("model", "solve", "show", "page")  # in the order in which they run
PLANS = Path("results") / "edit_in_the_page.safetensors"
METHOD = "metake"  # of the example
ROW, HEAD, LEFT, LONG = 34, 42, 120, 170  # of the picture


@functools.cache
def loaded(root: Path):
    """Model, key statistics and plans."""
    lm = mk.load(in_the_page.MODEL)
    layers = METHODS["memit"](lm.name).layers
    return lm, mk.statistics(lm, layers=layers), in_the_page.Plans.load(root / PLANS)


def numbers(app, config):
    """How many plans there are, as {{ recorded_plans }} and {{ recorded_relations }} in prose."""
    requests = in_the_page.Plans.load(Path(app.srcdir) / PLANS).requests
    counts = {"recorded_plans": len(requests), "recorded_relations": len({r.prompt for r in requests})}
    config.myst_substitutions = {**{name: str(n) for name, n in counts.items()}, **config.myst_substitutions}


def write_data(app):
    """Put the scripts with the data beside those of the page, and what the library says of fifty edits."""
    if app.builder.name != "html":
        return
    folder = Path(app.outdir) / "_static" / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in for_browser.scripts(*loaded(Path(app.srcdir))).items():
        (folder / f"{name}-data.js").write_text(text, "utf-8")
    told = json.dumps(for_browser.answers(*loaded(Path(app.srcdir))))
    (folder / "answers.json").write_text(told, "utf-8")


def own_scripts(app, page, template, context, doctree):
    """The page's scripts and style, on no other page."""
    if page == PAGE and app.builder.name == "html":
        app.add_css_file(f"{FOLDER}/edit.css")
        for name in SCRIPTS:
            app.add_js_file(f"{FOLDER}/{name}.js", loading_method="defer")


def bar(name: str, look: str, y: int, share: float) -> str:
    """A bar; its look is of the light page, and the page's style changes it in the dark."""
    return f'<rect class="{name}" {look} x="{LEFT}" y="{y}" width="{1 + LONG * share:.1f}" height="9"/>'


def picture(shown) -> str:
    """The example as a drawing: every text with its next tokens, a hollow bar before the edit, a full one after."""
    parts, y = [], 0
    for kind, text, rows in shown:
        parts.append(f'<text x="0" y="{y + 16}" font-size="13" font-weight="bold">{escape(kind)}</text>')
        parts.append(f'<text x="0" y="{y + 33}" font-size="12" font-style="italic">{escape(text)} …</text>')
        y += HEAD
        for word, before, after in rows:
            parts += [
                f'<text x="0" y="{y + 17}" font-size="13">{escape(word)}</text>',
                bar("me-was", 'fill="none" stroke="#6b7280"', y + 2, before),
                bar("me-is", 'fill="#0a54b8"', y + 14, after),
                f'<text x="{LEFT + LONG + 10}" y="{y + 17}" font-size="13">{before:.2f} → {after:.2f}</text>'
            ]
            y += ROW
        y += 8
    told = "; ".join(f"{t}: " + ", ".join(f"{w} {b:.2f} → {a:.2f}" for w, b, a in rows) for _, t, rows in shown)
    label = escape(f"Probabilities of the next token before and after the edit. {told}.", quote=True)
    return f'<svg viewBox="0 0 380 {y}" width="380" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def provenance(source) -> str:
    """Where the plans come from, folded."""
    weights = ", ".join(f"{path} {digest[:12]}…" for path, digest in source["weights"].items())
    lines = {
        "model": f"{source['model']} in {source['dtype']}; {weights}",
        "key statistics": f"{source['statistics'][:12]}…, of the embedded text",
        "context templates": f"sampled with seed {source['seed']}: {'; '.join(source['contexts']['family'])}",
        "steps": f"{source['steps']} at most of Stage I, {source['refine_steps']} of MetaKE's refinement",
        "versions": ", ".join(f"{name} {version}" for name, version in source["versions"].items()),
        "made again by": "python tools/plan_in_page.py"
    }  # fmt: skip
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(told))}</dd>" for name, told in lines.items())
    return f'<details class="metake-provenance"><summary>Where the plans come from</summary><dl>{rows}</dl></details>'


class EditInThePage(SphinxDirective):
    def run(self):
        root = Path(self.env.srcdir)
        self.env.note_dependency(str(root / PLANS))
        lm, statistics, plans = loaded(root)
        request, shown = plans.requests[0], in_the_page.example(lm, statistics, plans, METHOD)
        told = (
            f"In the package’s small model, MetaKE (λ = 1) makes “{request.text}” go on with “{request.target}”. "
            "Hollow: the probability of a next token before the edit; full: after it. "
            "With JavaScript, in the book on a screen, any of the facts can be edited here."
        )
        html = (
            f'<div class="metake-edit" id="metake-edit"><figure class="me-still">{picture(shown)}'
            f"<figcaption>{escape(told)}</figcaption></figure></div>{provenance(plans.source)}"
        )
        return [nodes.raw("", html, format="html")]


def setup(app):
    app.add_directive("edit-in-the-page", EditInThePage)
    app.connect("config-inited", numbers, priority=100)
    app.connect("builder-inited", write_data)
    app.connect("html-page-context", own_scripts)
