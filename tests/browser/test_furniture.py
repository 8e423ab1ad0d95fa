"""What the built pages hold, read without a browser: links, anchors, downloads, numbers, commands."""

from __future__ import annotations

import csv
import functools
import io
import re
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import papermill.cli
import papermill.parameterize
import pytest
import yaml
from built import BOOK, ROOT, pages

from metake.commands import pages as notebooks

LABELS = ("recomputed", "recorded", "reported")
NUMBER = re.compile(r'<span class="caption-number">(Figure|Table) (\d+)\.(\d+) </span>')


class Outline(HTMLParser):
    """The addresses that a page points at and the names that it offers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.names = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[k] for k in ("id", "name") if given.get(k) and (k == "id" or tag == "a")}
        self.links += [given[k] for k in ("href", "src") if given.get(k) is not None and tag not in ("use", "base")]


@functools.cache
def text(page: str) -> str:
    return (BOOK / page).read_text("utf-8")


@functools.cache
def outline(page: str) -> Outline:
    return Outline(text(page))


def reading_order() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    files = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    return [page for page in (f"{file}.html" for file in files) if page in pages()]


def boxes(page: str) -> list[str]:
    """The markup of each figure with a drawing and each numbered table of a page."""
    return re.findall(
        r'<figure class="[^"]*" id="[^"]*">\s*<div class="output text_html"><div '
        r'class="metake-figure">.*?</figure>|<div class="metake-table-box".*?</details></div></div>', text(page), re.S
    )


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    broken = []
    for link in outline(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or link.startswith("data:"):
            continue
        target = ((BOOK / page).parent / unquote(parts.path)).resolve() if parts.path else BOOK / page
        if not target.is_file() or not target.is_relative_to(BOOK):
            broken.append(link)
        elif parts.fragment and target.suffix == ".html":
            names = outline(target.relative_to(BOOK).as_posix()).names
            if not {parts.fragment, unquote(parts.fragment)} & names:
                broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", pages())
def test_names_are_unique(page):
    found = re.findall(
        r'<(?!span class="target")[a-z0-9]+\b[^>]*?\sid="([^"]+)"',
        re.sub(r"<script.*?</script>", "", text(page), flags=re.S),
    )
    assert {name for name in found if found.count(name) > 1} <= {""}


def test_figures_and_tables_are_numbered_by_page():
    """As "Figure 8.1": no number of the book can be taken for one of the paper's."""
    every = 0
    for place, page in enumerate(reading_order()):
        for kind in ("Figure", "Table"):
            found = [(int(chapter), int(number)) for of, chapter, number in NUMBER.findall(text(page)) if of == kind]
            assert found == [(place, i + 1) for i in range(len(found))]
            every += len(found)
    assert every > 100


@pytest.mark.parametrize("page", [p for p in reading_order() if p.startswith("notebooks/")])
def test_equations_are_numbered_by_page_and_nothing_hides_twice(page):
    place = reading_order().index(page)
    assert {number.split(".")[0] for number in re.findall(r'class="eqno">\(([\d.]+)\)', text(page))} <= {str(place)}
    for box in boxes(page):
        assert box.count('<details class="metake-more">') == 1 and "Regenerate" not in box
    assert text(page).count('<details class="metake-provenance">') == 1, "one stamp a page"


@pytest.mark.parametrize("page", [p for p in reading_order() if p != "book/intro.html"])
def test_every_page_begins_with_what_it_gives_and_takes(page):
    found = re.search(r'<div class="metake-overview.*?</div>', text(page), re.S)[0]
    minutes = int(re.search(r"It takes</strong> (\d+) minute", found)[1])
    assert "You will know" in found and 1 <= minutes <= 40
    article = text(page)[text(page).rindex("<h1") :]
    assert article.index(found) < 1000


def test_the_landing_page_counts_the_minutes_of_every_path():
    for path in re.findall(r"<li><p><strong>Who.*?</li>", text("book/intro.html"), re.S):
        said = int(re.search(r"\((\d+) minutes\)", path)[1])
        assert said == sum(int(n) for n in re.findall(r"</a> (\d+)", path)) > 10


@pytest.mark.parametrize("page", [p for p in reading_order() if p.startswith("notebooks/")])
def test_every_figure_and_table_has_number_label_data_and_command(page):
    found = boxes(page)
    assert text(page).count('<div class="metake-figure">') + text(page).count("metake-table-box") == len(found) > 0
    for box in found:
        assert len(NUMBER.findall(box)) == 1
        assert re.search(rf'label label-({"|".join(LABELS)})"', box), "no label"
        assert f"papermill {page.removesuffix('.html')}.ipynb" in unescape(re.sub("<[^>]+>", "", box)), "no command"
        caption = re.search(r'class="(?:caption-text|metake-caption)">(.*?)</(?:figcaption|caption)>', box, re.S)[1]
        assert len(re.sub("<[^>]+>", "", caption)) > 15, "no caption"
        data = [link for link in re.findall(r'href="([^"]+)"', box) if link.endswith(".csv")]
        assert len(data) == 1
        rows = list(csv.reader(io.StringIO(((BOOK / page).parent / data[0]).resolve().read_text("utf-8"))))
        assert len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])}, "no table"


@pytest.mark.parametrize("page", [p for p in reading_order() if p.startswith("notebooks/")])
def test_the_command_of_a_page_gives_its_own_defaults(page):
    """Read as papermill reads it."""
    name = page.removeprefix("notebooks/").removesuffix(".html")
    command = re.search(r"mkdir -p runs && \S+papermill (notebooks/.*)", own_commands(page))[1]
    given = papermill.cli.papermill.make_context("papermill", split(command)).params
    values = {k: papermill.cli._resolve_type(v) for k, v in given["parameters"]}
    for entry in given["parameters_yaml"]:
        values |= yaml.safe_load(entry)
    assert (given["notebook_path"], given["output_path"]) == (f"notebooks/{name}.ipynb", f"runs/{name}.ipynb")
    assert values == notebooks.defaults(name) and {k: type(v) for k, v in values.items()} == {
        k: type(v) for k, v in notebooks.defaults(name).items()
    }


def split(command: str) -> list[str]:
    import shlex

    return shlex.split(command)


def own_commands(page: str) -> str:
    section = text(page)[text(page).index('id="regenerate-this-page"') :]
    return unescape(re.sub("<[^>]+>", "", section[: section.index("</section>")]))


@pytest.mark.parametrize("page", [p for p in reading_order() if p.startswith("notebooks/")])
def test_the_stamp_of_a_page_says_where_it_comes_from(page):
    said = own_commands(page)
    for word in ("page last changed", "book built from", "model tiny", "embedded facts", "versions", "torch", "seed"):
        assert word in said
    for recording in re.findall(r"Recorded: (results/\S+?\.jsonl)", said):
        assert (ROOT / recording).is_file() and "device" in said and "minutes" in said
