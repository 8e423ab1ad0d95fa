"""Numbers in prose are not typed: {value}`caption | column=cell, column=cell | column` is the cell of a table.

The table is one that the page's committed outputs show, named by how its caption begins (a page of prose puts the
notebook's name and a colon in front), or the data behind a figure, by the name of its file: {value}`file.csv | … |
column +.1f`, with a number's form. What is not there, or is there twice, fails the build.
"""

import csv
import functools
import json
import re
from pathlib import Path

import furniture
from docutils import nodes
from sphinx.util.docutils import SphinxRole


ENDS = ("low", "high")


class NotThere(Exception):
    """A value that the tables do not have, or not once."""


@functools.cache
def tables(notebook: Path) -> tuple[tuple[str, list[list[str]]], ...]:
    """Caption and rows of every table that a notebook's committed outputs show."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    markup = ["".join(o.get("data", {}).get("text/html", "")) for c in cells for o in c.get("outputs", ())]
    found = [html for html in markup if furniture.TABLE.match(html.lstrip())]
    captions = [furniture.CAPTION.search(html) for html in found]
    return tuple(
        (furniture.plain(caption[1]) if caption else "", furniture.Cells(html).rows)
        for caption, html in zip(captions, found, strict=True)
    )


def value(root: Path, page: str, asked: str) -> str:
    """What a cell says, with the digits that the table shows."""
    parts = [part.strip() for part in asked.split("|")]
    if len(parts) != 3:
        raise NotThere(f"{asked!r} is not: caption | column=cell, … | column")
    caption, chosen, column = parts
    if caption.endswith(".csv"):
        if not (root / "figures" / caption).is_file():
            raise NotThere(f"figures/ has no {caption}")
        column, form = column.rsplit(" ", 1)
        with (root / "figures" / caption).open(encoding="utf-8", newline="") as lines:
            return minus(format(float(cell(list(csv.reader(lines)), chosen, column, caption)), form))
    other = re.match(r"(\w+): (.*)", caption)
    if other and (root / "notebooks" / f"{other[1]}.ipynb").is_file():
        page, caption = f"notebooks/{other[1]}", other[2]
    found = [rows for name, rows in tables(root / f"{page}.ipynb") if name.startswith(caption)]
    if len(found) != 1:
        raise NotThere(f"{page} has {len(found)} tables whose caption begins with {caption!r}")
    return minus(cell(found[0], chosen, column, f"{caption!r} of {page}"))


def minus(number: str) -> str:
    return number.replace("-", "−") if re.match(r"-\d", number) else number


def cell(table: list[list[str]], chosen: str, column: str, where: str) -> str:
    """The one cell of a column whose row has the given cells."""
    head, *rows = table
    # an interval stands in the cell of its value: "0.09 [-0.15, 0.18]"
    base, _, end = column.rpartition(" ")
    column, end = (base, end) if column not in head and base in head and end in ENDS else (column, None)
    wanted = dict(pair.split("=", 1) for pair in re.split(r",\s*(?=[^,=]+=)", chosen))
    if unknown := {column, *wanted} - set(head):
        raise NotThere(f"the table {where} has no column {sorted(unknown)}; it has {head}")
    cells = [
        row[head.index(column)] for row in rows if all(row[head.index(name)] == cell for name, cell in wanted.items())
    ]
    if len(cells) != 1:
        raise NotThere(f"the table {where} has {len(cells)} rows with {chosen}")
    value, _, rest = cells[0].partition(" [")
    if end is None:
        return value if rest.endswith("]") else cells[0]
    if not rest.endswith("]"):
        raise NotThere(f"the column {column!r} of the table {where} has no {end!r}: {cells[0]!r}")
    return rest.removesuffix("]").split(", ")[ENDS.index(end)]


class Value(SphinxRole):
    def run(self):
        notebook = Path(self.env.srcdir) / "notebooks"
        try:
            text = value(notebook.parent, self.env.docname, self.text)
        except NotThere as problem:
            message = self.inliner.reporter.error(str(problem), line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        return [nodes.inline("", text, classes=["metake-value"])], []


def setup(app):
    app.add_role("value", Value())
