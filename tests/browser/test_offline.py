"""The book without a server: opened from the disk, as the archive is, and printed, as the PDF is."""

from __future__ import annotations

import importlib.util
import re

import pytest
from built import BOOK, ROOT, settled

PAGES = ["index.html", "notebooks/attenuation.html", "notebooks/geometry_of_beta.html", "book/api.html"]


@pytest.fixture
def complaints(tab):
    """What the browser complains of while a test has the window."""
    found: list[str] = []
    tab.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    tab.on("requestfailed", lambda request: found.append(request.url))
    tab.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_from_the_disk(tab, complaints, page):
    tab.goto((BOOK / page).as_uri())
    settled(tab)
    assert tab.locator("article h1").count() and not complaints
    assert "attenuation" not in page or tab.locator("mjx-container").count() > 20, "formulas are set"


def test_search_finds_from_the_disk(tab, complaints):
    tab.goto((BOOK / "search.html").as_uri() + "?q=attenuation")
    tab.locator("#search-results li a", has_text="Attenuation").first.wait_for()
    tab.wait_for_load_state("networkidle")
    assert not complaints


def test_a_print_stands_where_its_links_lead_and_fits_the_paper(tab, tmp_path):
    spec = importlib.util.spec_from_file_location("print_book", ROOT / "tools" / "print_book.py")
    spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    (tmp_path / "book").mkdir()
    wide = "<td>a_rather_long_word_that_cannot_break</td>" * 12
    (tmp_path / "book" / "intro.html").write_text(
        '<link rel="stylesheet" '
        f'href="top.css"><article><p>{"text " * 500}</p><div><table><tr>{wide}</tr></table></div></article>'
    )
    (tmp_path / "top.css").write_text("article p { break-after: page; }")
    for _ in range(2):  # again over what is there
        tool.print_book(tab, tmp_path, tmp_path / "out.pdf")
    printed = (tmp_path / "out.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) == 2, (
        "the style at the top was found: the table has its own page"
    )
    assert tab.locator("table").bounding_box()["width"] <= tool.PAPER["width"]
    assert tool.one_page(tmp_path) == tmp_path / "whole-book.html"
