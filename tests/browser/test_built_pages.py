"""Every page of the book: asks nothing of the network, raises no error, fits a phone, can be listened to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from built import pages, settled

PHONE, LAPTOP = 375, 1280
GRAVE = ("serious", "critical")
UNNAMED = """() => [
  ...[...document.querySelectorAll('img')].filter((e) => !e.hasAttribute('alt') || (!e.alt.trim() && e.closest('article'))),
  ...[...document.querySelectorAll('svg[role=img]')].filter((e) => !(e.getAttribute('aria-label') || '').trim() && !e.closest('[aria-hidden=true]')),
  ...[...document.querySelectorAll('article svg:not([role])')].filter((e) => !e.closest('[aria-hidden=true], mjx-container, svg[role], .headerlink, summary, button')),
].map((e) => e.outerHTML.slice(0, 150))"""
WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] : [`page ${document.documentElement.scrollWidth} wide`,
  ...[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((e) => e.outerHTML.slice(0, 120))]"""
AXE = """async () => (await axe.run(document, { resultTypes: ['violations'], preload: false })).violations.map((v) => [v.impact, `${v.id}: ${v.help}: `
  + v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160) + ' ' + (n.failureSummary || '').replace(/\\s+/g, ' ').slice(0, 160)).join(' | ')])"""


@dataclass
class Visit:
    """What was seen of one page."""

    elsewhere: list[str] = field(default_factory=list)  # requests that left this machine
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    wide: dict[int, list[str]] = field(default_factory=dict)
    axe: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    themes: list[str] = field(default_factory=list)


@pytest.fixture(scope="module", params=pages())
def visit(request, chromium, address) -> Visit:
    import axe_playwright_python
    from playwright.sync_api import TimeoutError

    seen = Visit()
    context = chromium.new_context(
        viewport={"width": LAPTOP, "height": 900}, color_scheme="light", reduced_motion="reduce"
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on(
        "request",
        lambda r: (
            seen.elsewhere.append(r.url)
            if urlsplit(r.url).scheme not in ("data", "blob") and not r.url.startswith(address)
            else None
        ),
    )
    page.on("response", lambda r: seen.failed.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("requestfailed", lambda r: seen.failed.append(f"{r.failure} {r.url}"))
    page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: seen.errors.append(str(e)))
    page.goto(address + request.param)
    settled(page)
    seen.unnamed = page.evaluate(UNNAMED)
    seen.wide[LAPTOP] = page.evaluate(WIDE)
    page.add_script_tag(path=Path(axe_playwright_python.__file__).parent / "axe.min.js")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        with contextlib.suppress(TimeoutError):  # one that does not follow is told by its own test
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'", timeout=10_000)
        page.wait_for_timeout(300)
        seen.themes.append(page.evaluate("document.documentElement.dataset.theme"))
        seen.axe[theme] = [tuple(v) for v in page.evaluate(AXE)]
    page.set_viewport_size({"width": PHONE, "height": 800})
    page.wait_for_timeout(200)
    seen.wide[PHONE] = page.evaluate(WIDE)
    context.close()
    return seen


def test_asks_nothing_of_the_network(visit):
    assert not visit.elsewhere


def test_raises_no_error_in_the_console(visit):
    assert not visit.errors


def test_finds_every_resource(visit):
    assert not visit.failed


def test_every_picture_has_an_alternative_text(visit):
    assert not visit.unnamed


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_does_not_scroll_sideways(visit, width):
    assert not visit.wide[width]


def test_follows_the_theme_of_the_system(visit):
    assert visit.themes == ["light", "dark"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_has_no_serious_violation_of_accessibility(visit, theme):
    assert not [text for impact, text in visit.axe[theme] if impact in GRAVE]
