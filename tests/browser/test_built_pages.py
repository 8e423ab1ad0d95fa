"""Every page of the book: asks nothing of the network, raises no error, fits a phone, can be listened to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from built import axe_script, pages, settled

PHONE, LAPTOP = 375, 1280
GRAVE = ("serious", "critical")
UNNAMED = """() => [
  ...[...document.querySelectorAll('img')].filter((e) => !e.hasAttribute('alt') || (!e.alt.trim() && e.closest('article'))),
  ...[...document.querySelectorAll('svg[role=img]')].filter((e) => !(e.getAttribute('aria-label') || '').trim() && !e.closest('[aria-hidden=true]')),
  ...[...document.querySelectorAll('article svg:not([role])')].filter((e) => !e.closest('[aria-hidden=true], mjx-container, svg[role], .headerlink, summary, button')),
].map((e) => e.outerHTML.slice(0, 150))"""
WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] : [`page ${document.documentElement.scrollWidth} wide`,
  ...[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((e) => e.outerHTML.slice(0, 120))]"""
# Tables of more than eight columns may scroll.
CUT = """() => [...document.querySelectorAll('.metake-scrolls:has(table)')].map((box) => box.querySelector('table'))
  .filter((table) => table.rows[0].cells.length <= 8).map((table) => `${table.scrollWidth}: ${table.innerText.slice(0, 120)}`)"""
# Words of a drawing that lie on each other, but for those of one formula.
MET = """() => [...document.querySelectorAll('.metake-figure > svg')].flatMap((svg) => {
  const words = [...svg.querySelectorAll('text')].filter((t) => t.textContent.trim()).map((t) => [t, t.getBoundingClientRect()]);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.4 * Math.min(a.height, b.height);
  return words.flatMap(([t, a], i) => words.slice(i + 1).filter(([u, b]) => !u.querySelector('tspan') && meet(a, b))
    .map(([u]) => `${t.textContent.trim()} | ${u.textContent.trim()}`)); })"""
# Contrast costs axe a hundred times what its other rules do, and texts that look alike are alike in it: it is asked of
# one text of each look (letters, what lies under them, what moves over others), in each theme, that no page before had;
# the rest is asked once a page.
LOOKS = """(known) => { const seen = new Set(), asked = new Set(known), style = (e) => getComputedStyle(e);
  document.querySelectorAll('[data-look]').forEach((e) => e.removeAttribute('data-look'));
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('mjx-container') || ![...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim())) continue;
    const { color, fill, fontSize, fontWeight, display, visibility } = style(e);
    const look = [e.namespaceURI, color, fill, fontSize, fontWeight, display, visibility];
    for (let under = e; under; under = under.parentElement) {
      const { backgroundColor, backgroundImage, opacity, position, filter } = style(under);
      look.push(...[backgroundColor, backgroundImage, opacity, filter].filter((v) => !['rgba(0, 0, 0, 0)', 'none', '1'].includes(v)));
      if (position !== 'static' && position !== 'relative') look.push(under.className);
    }
    if (!asked.has(`${look}`)) e.setAttribute('data-look', asked.add(`${look}`).size);
    seen.add(`${look}`);
  }
  axe.configure({ rules: [{ id: 'color-contrast', selector: '[data-look]' }] });
  return [...seen]; }"""
AXE = """async (only) => (await axe.run(document, { resultTypes: ['violations'], preload: false,
    ...(only.length ? { runOnly: only } : { rules: { region: { enabled: false } } }) }))  // never more than moderate
  .violations.map((v) => [v.impact, `${v.id}: ${v.help}: ` + v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160) + ' '
  + (n.failureSummary || '').replace(/\\s+/g, ' ').slice(0, 160)).join(' | ')])"""
ASKED = {"light": [], "dark": ["color-contrast", "link-in-text-block"]}  # of axe's rules; none named: all of them


@dataclass
class Visit:
    """What was seen of one page."""

    elsewhere: list[str] = field(default_factory=list)  # requests that left this machine
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    wide: dict[int, list[str]] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)  # tables that scroll on a laptop
    met: list[str] = field(default_factory=list)  # words that lie on others
    axe: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)  # of its texts
    themes: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def reader(chromium):
    """One for all pages, as a reader's browser is: scripts that every page has are compiled once."""
    context = chromium.new_context(reduced_motion="reduce")
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture(scope="session")
def known() -> dict[str, set[str]]:
    """Theme → looks whose contrast was asked."""
    return {theme: set() for theme in ASKED}


@pytest.fixture(scope="module", params=pages())
def visit(request, reader, address, known) -> Visit:
    from playwright.sync_api import TimeoutError

    seen = Visit()
    page = reader.new_page()
    page.set_viewport_size({"width": LAPTOP, "height": 900})
    page.emulate_media(color_scheme="light")
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
    seen.wide[LAPTOP], seen.cut, seen.met = map(page.evaluate, (WIDE, CUT, MET))
    page.add_script_tag(path=axe_script())
    for theme, rules in ASKED.items():
        page.emulate_media(color_scheme=theme)
        with contextlib.suppress(TimeoutError):  # one that does not follow is told by its own test
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'", timeout=10_000)
        page.wait_for_timeout(300)
        seen.themes.append(page.evaluate("document.documentElement.dataset.theme"))
        looks = page.evaluate(LOOKS, list(known[theme]))
        known[theme].update(looks)
        seen.looks[theme] = len(looks)
        seen.axe[theme] = [tuple(v) for v in page.evaluate(AXE, rules)]
    page.set_viewport_size({"width": PHONE, "height": 800})
    page.wait_for_timeout(200)
    seen.wide[PHONE] = page.evaluate(WIDE)
    page.close()
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


def test_its_tables_fit_a_laptop(visit):
    assert not visit.cut


def test_no_words_of_its_drawings_meet(visit):
    assert not visit.met


def test_follows_the_theme_of_the_system(visit):
    assert visit.themes == ["light", "dark"]


@pytest.mark.parametrize("theme", ASKED)
def test_has_no_serious_violation_of_accessibility(visit, theme):
    assert visit.looks[theme] > 3  # texts were found
    assert not [text for impact, text in visit.axe[theme] if impact in GRAVE]


def test_a_pale_text_among_many_of_its_kind_is_found(tab, address):
    """What is asked of one text of each look misses none that looks otherwise, on this page or on one before."""
    tab.goto(address + "book/intro.html")
    settled(tab)
    tab.add_script_tag(path=axe_script())
    known = tab.evaluate(LOOKS, [])
    assert tab.evaluate("document.querySelectorAll('[data-look]').length") == len(known)
    assert set(tab.evaluate(LOOKS, known)) == set(known) and not tab.evaluate("document.querySelector('[data-look]')")
    paragraph = "[...document.querySelectorAll('article p')].at(-1)"
    for pale in ("color = '#ccc'", "opacity = '0.3'", "backgroundColor = '#555'"):
        tab.evaluate(f"{paragraph}.style.{pale}")
        tab.evaluate(LOOKS, known)
        assert any(told.startswith("color-contrast") for _, told in tab.evaluate(AXE, ["color-contrast"])), pale
        tab.evaluate(f"{paragraph}.removeAttribute('style')")
