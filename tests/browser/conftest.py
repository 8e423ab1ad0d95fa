"""The built book in a browser, served on this machine. METAKE_BOOK: another folder of it; METAKE_CHROMIUM:
another browser.

Where the book or the browser is missing these tests skip and say so; with METAKE_BROWSER=required (`make browser`)
they fail.
"""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from built import ARGUMENTS, BOOK, CHROMIUM, missing


@pytest.hookimpl(tryfirst=True)  # before the workers share the groups out
def pytest_collection_modifyitems(items):
    """One worker opens a page once, for all tests of it."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = missing()
    if reason and here and os.environ.get("METAKE_BROWSER") == "required":
        raise pytest.UsageError(reason)
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        page = getattr(item, "callspec", None) and item.callspec.params.get("visit")
        item.add_marker(pytest.mark.xdist_group(page or item.path.stem))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    """Versions of pytest and pytest-xdist that do not understand each other share the groups out again, unasked."""
    if session.config.getoption("loadgroup", False):
        grouped = (item.nodeid for item in session.items if item.get_closest_marker("xdist_group"))
        apart = [name for name in grouped if "@" not in name]
        if apart:
            raise pytest.UsageError(f"{apart[0]} is not kept with its group: install what requirements.txt pins")


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(BOOK))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """A fresh window at the width of a laptop, in the light theme; it may read and write the clipboard."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme="light", permissions=["clipboard-read", "clipboard-write"]
    )
    context.set_default_timeout(20_000)
    yield context.new_page()
    context.close()
