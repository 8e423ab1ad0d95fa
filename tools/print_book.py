"""Print a one-page build of the book as PDF with a headless Chromium: python tools/print_book.py _build/singlehtml
_build/metake-book.pdf

The drawings of the light theme, every fold closed as on the screen; formulas are set before it prints.
Tables that are wider than the paper are made smaller, for on paper nothing scrolls.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

CHROMIUM = (
    os.environ.get("METAKE_CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
MINUTES = 5 * 60_000
PAPER = {"width": 680, "height": 1009}  # A4 without its margins, in CSS pixels
FIT = """() => document.querySelectorAll("article table").forEach(table => {
  const room = table.parentElement.clientWidth;
  if (table.offsetWidth > room) table.style.zoom = room / table.offsetWidth;
})"""


def one_page(folder: Path) -> Path:
    """The page that holds the whole book, at the folder's top.

    Sphinx writes it under the first page's own folder, but with links as seen from the top; the other pages of such a
    build are redirects and the search.
    """
    (top := folder / "whole-book.html").unlink(missing_ok=True)  # of an earlier print
    return shutil.copyfile(max(folder.rglob("*.html"), key=lambda page: page.stat().st_size), top)


def print_book(page: Page, folder: Path, out: Path) -> None:
    """Open the book in an empty window and print it."""
    page.set_default_timeout(MINUTES)
    page.set_viewport_size(PAPER)
    page.goto(one_page(folder).resolve().as_uri())
    page.wait_for_function(
        "!window.MathJax || (window.MathJax.startup?.promise && window.MathJax.startup.promise.then(() => true))"
    )
    page.emulate_media(media="print")
    page.evaluate(FIT)
    page.pdf(
        path=out, format="A4", outline=True, tagged=True,
        margin=dict.fromkeys(("top", "bottom", "left", "right"), "15mm")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium on the path: apt-get install chromium, or name one in METAKE_CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        print_book(browser.new_page(color_scheme="light"), given.folder, given.out)
        browser.close()
