"""What stands around every figure and table of a notebook page: number, CSV, the command that makes it again;
and at the end of the page how to run it again and where it comes from. All of it is read off the notebook,
so it cannot drift from it.
"""

import csv
import io
import re
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import stamp
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

NOTEBOOKS = "notebooks/"
RECORDING = re.compile(r"""(?:recorded|if_recorded|recorded_or)\(\s*["']([\w.-]+)["']""")
LABEL = re.compile(r'class="label label-(\w+)"')
CAPTION = re.compile(r"<caption>(.*?)</caption>", re.S)
TABLE = re.compile(r'<table class="[^"]*metake-table[^"]*">.*?</table>', re.S)
SHORT = re.compile(r'(<t[hd][^>]* class="text)"(>[^<]{1,22}</)')  # cells that are not worth a line break
INTERVAL = re.compile(r'(class="(?:num|text)[^"]*">[^<\[]*)(\[[^\]<]{1,24}\])')  # breaks from its value, not within
BREAKS_NOT = r'\1 short"\2'
WHOLE = r'\1<span class="no-break">\2</span>'
FOLDED = "tag_folded"  # a cell's tag, as myst-nb makes a class of it
STAMP = '<details class="metake-provenance"'
OPENED = '<details class="metake-more"><summary>Data and command</summary>'
AGAIN = re.compile(r"^Regenerate this page\b")
OWN_RUNS = "runs"  # where the commands put their results


class numbered_table(nodes.General, nodes.Element):
    """A table that a cell shows. html: its markup; page: of its notebook; recording: the name of its record,
    if it shows one; folded: whether a figure has shown its numbers already.
    """


class more(nodes.General, nodes.Element):
    """The one quiet line under a figure or table: behind it its data, its command, and where it comes from."""


class again(nodes.General, nodes.Element):
    """The command that makes a figure or table again, and the way to the page's stamp."""


class Cells(HTMLParser):
    """The rows of one HTML table as lists of text; what the caption says is left out."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.text = [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.text = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.text.strip())
            self.text = None

    def handle_data(self, data):
        if self.text is not None:
            self.text += data


def as_csv(html: str) -> str:
    """A table as CSV, with the digits that it shows."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(Cells(html).rows)
    return out.getvalue()


def plain(html: str) -> str:
    """A caption without its label."""
    return unescape(re.sub(r"<[^>]+>", "", re.sub(r'<span class="label.*?</span>.*', "", html, flags=re.S))).strip()


def papermill(page: str, parameters: str = "") -> str:
    """The line that runs a page at its default parameters, or at the given ones."""
    name = page.removeprefix(NOTEBOOKS)
    return (
        f"mkdir -p {OWN_RUNS} && .venv/bin/papermill {page}.ipynb "
        f"{OWN_RUNS}/{name}.ipynb{' ' * bool(parameters)}{parameters}"
    )


def command(root: Path, page: str, recording: str | None) -> str:
    """What makes one figure or table of a page again: of a recorded one, first the recording."""
    return "\n".join([*([stamp.record_command(root, recording)] if recording else []), papermill(page)])


def cells(document):
    return [c for c in document.findall(nodes.container) if c.get("nb_element") == "cell_code"]


class Furniture(SphinxTransform):
    """Number the tables, add the commands, gather how to run a page again at its end."""

    default_priority = 400  # before labels are collected

    def apply(self, **kwargs):
        page = self.env.docname
        if not page.startswith(NOTEBOOKS):
            return
        self.page, self.names, self.recordings = page, set(), []
        self.unrecorded()
        for cell in cells(self.document):
            self.cell(cell)
        self.ending()

    def cell(self, cell):
        source = "\n".join(block.astext() for block in cell.findall(nodes.literal_block))
        self.recordings += RECORDING.findall(source)
        shown = list(cell.findall(nodes.raw))
        if len(shown) == 1 and shown[0].astext().startswith(STAMP):  # the page's own stamp has it
            cell.parent.remove(cell)
            return
        folded = FOLDED in cell["classes"]
        for raw in shown:
            text = raw.astext()
            if text.lstrip().startswith("<table") and TABLE.match(text.lstrip()):
                raw.replace_self(self.table(text, folded))
            elif text.startswith('<div class="metake-figure"'):
                self.figure(raw, text)

    def recording(self, html):
        """The record that is shown, if one is: the last that the page has opened."""
        found = LABEL.search(html)
        return self.recordings[-1] if found and found[1] == "recorded" and self.recordings else None

    def again(self, html):
        return command(Path(self.env.srcdir), self.page, self.recording(html))

    def table(self, html, folded=False):
        title = CAPTION.search(html)
        words = re.sub(r"[^a-z0-9]+", "-", plain(title[1]).lower() if title else "").strip("-").split("-")[:6]
        base = "-".join(["tab", *self.page.removeprefix(NOTEBOOKS).split("_"), *filter(None, words)])
        name = next(n for n in (base, *(f"{base}-{i}" for i in range(2, 99))) if n not in self.names)
        self.names.add(name)
        node = numbered_table(
            "", html=html, title=plain(title[1]) if title else "", page=self.page, ids=[name], names=[name],
            folded=folded
        )
        node += again("", text=self.again(html))
        self.document.note_explicit_target(node, node)
        return node

    def figure(self, raw, html):
        figure = raw.parent
        while figure is not None and not isinstance(figure, nodes.figure):
            figure = figure.parent
        if figure is None:  # one without a caption of its own is told by its alternative text
            alt = unescape(re.search(r'aria-label="([^"]*)"', html)[1])
            name = re.search(r'<svg id="([^"]*)-light"', html)[1].replace("_", "-")
            figure = nodes.figure("", ids=[f"fig-{name}"], names=[f"fig-{name}"])
            raw.replace_self(figure)
            figure += [raw, nodes.caption("", alt)]
            self.document.note_explicit_target(figure, figure)
        name = re.search(r'<svg id="([^"]*)-light"', html)[1]
        png = next(
            (p for p in (Path(self.env.srcdir) / "figures").glob("*.png") if p.stem.replace(".", "_") == name), None
        )
        links = nodes.paragraph("", "", classes=["metake-links"])
        for file in [f for f in (png and png.with_suffix(".csv"), png) if f]:
            links += addnodes.download_reference(
                "", file.suffix[1:].upper(), reftype="download", refdomain="", refdoc=self.page, refexplicit=True,
                refwarn=True, reftarget=f"/figures/{file.name}"
            )
        shorten(next(figure.findall(nodes.caption), None))
        figure += nodes.legend("", more("", links, again("", text=self.again(html))))

    def unrecorded(self):
        """What is not recorded yet says so once, and takes no number."""
        seen = set()
        for cell in cells(self.document):
            notes = [raw for raw in cell.findall(nodes.raw) if "Not recorded yet" in raw.astext()]
            for raw in notes:
                figure = raw.parent
                while figure is not cell and not isinstance(figure, nodes.figure):
                    figure = figure.parent
                for caption in figure.findall(nodes.caption) if isinstance(figure, nodes.figure) else ():
                    figure.replace_self([child for child in figure.children if child is not caption])
            if notes and notes[0].astext() in seen:
                cell.parent.remove(cell)
            seen |= {raw.astext() for raw in notes}

    def ending(self):
        """The commands, those that the author wrote among them, and the stamp, as the last section."""
        written = []
        for block in list(self.document.findall(nodes.literal_block)):
            if f"papermill {self.page}.ipynb" in block.astext() and not isinstance(block.parent, again):
                before = block.previous_sibling()
                if before is None:  # the command stands in a cell of its own
                    before = block.parent.parent and block.parent.previous_sibling()
                written.append(block)
                block.parent.remove(block)
                if isinstance(before, nodes.paragraph) and AGAIN.match(before.astext()):
                    before.parent.remove(before)
        if not any(True for _ in self.document.findall(nodes.section)):
            return
        section = nodes.section(
            "", nodes.title("", "Regenerate this page"), ids=["regenerate-this-page"], classes=["metake-again"]
        )
        section += self.commands(written)
        section += stamp.stamp(Path(self.env.srcdir), self.page, dict.fromkeys(self.recordings))
        next(self.document.findall(nodes.section)).append(section)

    def commands(self, written):
        name = self.page.removeprefix(NOTEBOOKS)
        parts = [
            nodes.paragraph("", "As it stands, or with any of its parameters changed:"),
            shell(papermill(self.page, stamp.parameters(stamp.defaults(Path(self.env.srcdir), self.page)))),
        ]
        if written:
            lines = [
                line
                for block in written
                for line in block.astext().splitlines()
                if line.strip() != f"mkdir -p {OWN_RUNS}"
            ]
            parts += [nodes.paragraph("", "Larger, or another one:"), shell("\n".join(lines))]
        return [
            *parts,
            nodes.paragraph("", "The same in one command, which refuses misspelled parameters and keeps runs apart:"),
            shell(f".venv/bin/metake figure {name}"),
        ]


def shorten(caption):
    """Take "Data: CSV." off a caption's end: the link stands below it."""
    links = [] if caption is None else list(caption.findall(addnodes.download_reference))
    if (
        len(links) == 1
        and (before := links[0].previous_sibling()) is not None
        and before.astext().rstrip().endswith("Data:")
    ):
        for node in caption.children[caption.index(links[0]) :]:
            caption.remove(node)
        caption.replace(before, nodes.Text(before.astext().rstrip().removesuffix("Data:").rstrip()))


def shell(text):
    return nodes.literal_block(text, text, language="bash", classes=["metake-command"])


def visit_table(self, node):
    start = len(self.body)
    self.add_fignumber(node)
    number = "".join(self.body[start:])
    del self.body[start:]
    name, html = node["ids"][0], node["html"]
    if not CAPTION.search(html):
        html = re.sub(r"(<table[^>]*>)", r"\1<caption></caption>", html, count=1)
    permalink = f'<a class="headerlink" href="#{name}" title="Link to this table">#</a>'
    html = CAPTION.sub(
        lambda found: f'<caption><span class="metake-caption">{number}{found[1]}{permalink}</span></caption>', html,
        count=1
    )
    html = f'<div class="metake-scroll">{SHORT.sub(BREAKS_NOT, INTERVAL.sub(WHOLE, html))}</div>'
    if node["folded"]:
        html = f'<details class="metake-folded"><summary>The same numbers as a table</summary>{html}</details>'
    file = Path(self.builder.outdir) / "_downloads" / "tables" / f"{name}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_csv(node["html"]), "utf-8")
    up = "" if self.builder.name == "singlehtml" else "../" * node["page"].count("/")
    self.body.append(
        f'<div class="metake-table-box" id="{name}">{html}<div class="metake-tools">{OPENED}'
        f'<p class="metake-links"><a class="download" download href="{up}_downloads/tables/{name}.csv">CSV</a></p>'
    )


def depart_table(self, node):
    self.body.append("</details></div></div>\n")


def visit_more(self, node):
    self.body.append(OPENED)


def depart_more(self, node):
    self.body.append("</details>")


def visit_again(self, node):
    code = self.highlighter.highlight_block(node["text"], "bash")
    self.body.append(
        f'<div class="highlight-bash notranslate">{code}</div><p><a class="reference internal" '
        'href="#regenerate-this-page">Where it comes from</a></p>'
    )
    raise nodes.SkipNode


def skip(self, node):
    raise nodes.SkipNode


def setup(app):
    app.add_enumerable_node(
        numbered_table, "table", lambda node: escape(node["title"]) or None, html=(visit_table, depart_table),
        latex=(skip, None), text=(skip, None)
    )
    app.add_node(more, html=(visit_more, depart_more), latex=(skip, None), text=(skip, None))
    app.add_node(again, html=(visit_again, None), latex=(skip, None), text=(skip, None))
    app.add_transform(Furniture)
