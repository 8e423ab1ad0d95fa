"""The built book and the browser that opens it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOOK = Path(os.environ.get("METAKE_BOOK") or ROOT / "_build" / "html").resolve()
CHROMIUM = (
    os.environ.get("METAKE_CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"
]


def pages() -> list[str]:
    """Every page of the built book, as its address below the root."""
    return sorted(
        p.relative_to(BOOK).as_posix() for p in BOOK.rglob("*.html") if "_static" not in p.relative_to(BOOK).parts
    )


def missing() -> str:
    """What these tests lack, in one sentence; nothing if they can run."""
    if not (BOOK / "index.html").is_file():
        return f"no built book in {BOOK}: run `make html`"
    try:
        import axe_playwright_python  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed: requirements.txt pins it"
    return "" if CHROMIUM else "no Chromium on the path: `apt-get install chromium`, or name one in METAKE_CHROMIUM"


def settled(page) -> None:
    """Wait until a page stands still: loaded, its formulas set, what it computes by itself shown, two frames drawn."""
    page.wait_for_load_state("load")
    page.wait_for_function(
        "!window.MathJax || (window.MathJax.startup && window.MathJax.startup.promise && "
        "window.MathJax.startup.promise.then(() => true))"
    )
    page.wait_for_function("!document.querySelector('[data-state=loading], [data-state=busy]')")
    page.evaluate(
        "document.fonts.ready.then(() => new Promise((done) => requestAnimationFrame(() => "
        "requestAnimationFrame(() => done(true)))))"
    )


def axe_script() -> Path:
    """What asks a page whether everybody can use it."""
    import axe_playwright_python

    return Path(axe_playwright_python.__file__).parent / "axe.min.js"
