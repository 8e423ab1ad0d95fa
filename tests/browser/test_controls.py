"""What a reader touches: sidebar, search, theme, copy buttons, downloads, the picture to drag.
Each does what it says.
"""

from __future__ import annotations

import csv
import io
import re

import pytest
from built import BOOK, ROOT, pages, settled

GEOMETRY, COMPARISON, FIGURES = (
    "notebooks/geometry_of_beta.html", "notebooks/main_comparison.html", "notebooks/association_dispersion.html"
)


def opened(tab, address, page):
    tab.goto(address + page)
    settled(tab)
    return tab


# The frame


def test_the_sidebar_leads_to_another_page(tab, address):
    opened(tab, address, "book/intro.html")
    tab.locator(".bd-sidebar-primary nav.bd-links a", has_text="Main comparison").first.click()
    settled(tab)
    # the print version's is hidden
    assert tab.url == address + COMPARISON and tab.get_by_role("heading", name="Main comparison", level=1).count() == 1


def test_the_sidebar_opens_and_closes_on_a_phone(tab, address):
    tab.set_viewport_size({"width": 375, "height": 800})
    opened(tab, address, "book/intro.html")
    link = tab.locator(".bd-sidebar-primary nav.bd-links a", has_text="Main comparison").first
    assert not link.is_visible()
    tab.locator("button.primary-toggle:visible").first.click()
    link.wait_for(state="visible")
    tab.wait_for_timeout(500)
    assert 0 <= link.bounding_box()["x"] < 375
    tab.keyboard.press("Escape")
    link.wait_for(state="hidden")


def test_the_sidebar_closes_on_a_laptop(tab, address):
    opened(tab, address, "book/intro.html")
    link = tab.locator(".bd-sidebar-primary nav.bd-links a", has_text="Main comparison").first
    assert link.is_visible()
    tab.locator("button.primary-toggle:visible").first.click()
    link.wait_for(state="hidden")


def test_the_search_finds_a_word_and_leads_to_it(tab, address):
    opened(tab, address, "book/intro.html")
    tab.locator(".search-button-field:visible, .search-button__button:visible").first.click()
    tab.locator("#pst-search-dialog input[type=search], input[type=search]:visible").first.fill("attenuation")
    tab.keyboard.press("Enter")
    results = tab.locator("#search-results ul.search li a")
    results.first.wait_for()
    titles = results.all_inner_texts()
    assert any(re.match(r"[\d. ]*Attenuation", title) for title in titles)
    summary = tab.locator("#search-results li p.context").first
    summary.wait_for()
    assert "attenuation" in summary.inner_text().lower()
    results.first.click()
    settled(tab)
    assert not tab.url.startswith(address + "search") and "attenuation" in tab.locator("article").inner_text().lower()


def test_the_search_says_when_it_finds_nothing(tab, address):
    opened(tab, address, "search.html?q=xylophonic")
    tab.get_by_text("did not match any documents").wait_for()


def test_the_theme_switch_changes_page_and_drawings(tab, address):
    opened(tab, address, FIGURES)
    drawn, seen = tab.locator(".metake-figure svg").first, set()
    for _ in range(3):
        theme = tab.evaluate("document.documentElement.dataset.theme")
        seen.add(theme)
        assert drawn.is_visible()
        for what, part in (("article p", "color"), (".metake-figure svg text", "fill")):
            ink = tab.evaluate(f"getComputedStyle(document.querySelector('{what}')).{part}")
            assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 384) == (theme == "dark"), what
        tab.locator("button.theme-switch-button:visible").first.click()
    assert seen == {"light", "dark"}


# What stands around figures and tables


@pytest.mark.parametrize(
    "where", [".metake-again", "figure .metake-more", ".metake-table-box .metake-more"]
)
def test_a_copy_button_copies_its_command(tab, address, where):
    opened(tab, address, FIGURES)
    if "more" in where:
        tab.locator(f"{where} > summary").first.click()
    block = tab.locator(f"{where} div.highlight").first
    block.hover()
    block.locator("button.copybtn").click()
    tab.wait_for_function("navigator.clipboard.readText().then((t) => t.length > 0)")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert (
        copied == block.locator("pre").inner_text().strip()
        and "papermill notebooks/association_dispersion.ipynb" in copied
    )


@pytest.mark.parametrize("where", ["figure", ".metake-table-box"])
def test_a_csv_arrives_and_can_be_read(tab, address, where):
    opened(tab, address, FIGURES)
    tab.locator(f"{where} .metake-more > summary").first.click()
    with tab.expect_download() as arriving:
        tab.locator(f"{where} .metake-links a", has_text="CSV").first.click()
    assert arriving.value.suggested_filename.endswith(".csv")
    rows = list(csv.reader(arriving.value.path().open(encoding="utf-8", newline="")))
    assert len(rows) > 2 and {len(row) for row in rows} == {len(rows[0])} and all(rows[0])


def test_the_csv_of_a_table_has_what_the_table_shows(tab, address):
    opened(tab, address, FIGURES)
    box = tab.locator(".metake-table-box").first
    shown = [[cell.strip() for cell in row.split("\t")] for row in box.locator("table tr").all_inner_texts()]
    box.locator(".metake-more > summary").click()
    with tab.expect_download() as arriving:
        box.locator(".metake-links a", has_text="CSV").click()
    assert list(csv.reader(io.StringIO(arriving.value.path().read_text("utf-8")))) == shown


def test_a_wide_table_scrolls_in_its_own_box_and_can_be_reached(tab, address):
    tab.set_viewport_size({"width": 375, "height": 800})
    opened(tab, address, COMPARISON)
    box = tab.locator(".metake-scroll[tabindex]:not(details:not([open]) *)").first  # not one that is folded away
    box.focus()
    before = box.evaluate("(e) => e.scrollLeft")
    for _ in range(8):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_timeout(400)
    assert box.evaluate("(e) => e.scrollLeft") > before == 0 and box.get_attribute("aria-label").startswith("Table")


def test_code_is_folded_and_opens(tab, address):
    opened(tab, address, FIGURES)
    fold = tab.locator("details.hide").first
    code = fold.locator("pre").first
    assert not code.is_visible()
    fold.locator("summary").click()
    assert code.is_visible()


# The picture to drag


def reading(tab) -> list[str]:
    return tab.locator("#metake-geometry dl.mg-numbers").inner_text().split()


def live(tab):
    tab.locator("#metake-geometry .mg-live").wait_for(state="visible")
    assert not tab.locator("#metake-geometry .mg-warning").is_visible()
    tab.locator("#metake-geometry").scroll_into_view_if_needed()


def drag(tab):
    knob = tab.locator("#metake-geometry .mg-knob")
    knob.scroll_into_view_if_needed()
    box = knob.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 20, y + 30, steps=4)
    tab.mouse.up()


def test_the_key_can_be_dragged(tab, address):
    live(opened(tab, address, GEOMETRY))
    before = reading(tab)
    drag(tab)
    assert reading(tab) != before
    tab.get_by_role("button", name="Start again").click()
    assert reading(tab) == before


def test_the_key_can_be_moved_by_keyboard_and_sliders(tab, address):
    live(opened(tab, address, GEOMETRY))
    seen = [reading(tab)]
    tab.locator("#metake-geometry .mg-handle").focus()
    tab.keyboard.press("ArrowDown")
    seen.append(reading(tab))
    for slider in range(tab.locator("#metake-geometry input[type=range]").count()):
        tab.locator("#metake-geometry input[type=range]").nth(slider).focus()
        for _ in range(3):
            tab.keyboard.press("ArrowRight")
        seen.append(tab.locator("#metake-geometry .mg-live").inner_text().split())
    tab.get_by_label("MEMIT", exact=True).check()
    seen.append(tab.locator("#metake-geometry .mg-live").inner_text().split())
    assert all(now != then for then, now in zip(seen, seen[1:], strict=False))


def test_the_picture_works_from_a_file(tab):
    """Without a server: what an offline zip holds."""
    errors = []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto((BOOK / GEOMETRY).as_uri())
    settled(tab)
    live(tab)
    before = reading(tab)
    drag(tab)
    assert reading(tab) != before and not errors
    assert tab.locator("mjx-container").count() > 10


def test_without_javascript_figures_numbers_and_commands_are_there(chromium, address):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + GEOMETRY)
    assert page.locator(".metake-figure svg").first.is_visible()
    assert "With JavaScript there is a picture here" in page.locator("#metake-geometry").inner_text()
    page.locator("#metake-geometry summary").click()
    assert page.locator("#metake-geometry table").is_visible()
    page.locator(".metake-more summary").first.click()
    assert "papermill notebooks/geometry_of_beta.ipynb" in page.locator(".metake-more pre").first.inner_text()
    context.close()


def test_every_notebook_of_the_book_is_a_page():
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == {
        p[10:-5] for p in pages() if p.startswith("notebooks/")
    }


def test_a_mark_under_the_pointer_says_its_values(tab, address):
    opened(tab, address, COMPARISON)
    told = tab.locator(".metake-figure svg use > title").all_text_contents()
    assert len(told) > 10 and any(re.fullmatch(r"MetaKE, [\d.]+", text) for text in told)


def test_a_figure_opens_as_large_as_the_window_and_closes(tab, address):
    opened(tab, address, COMPARISON)
    figure = tab.locator(".bd-content .metake-figure > svg").first
    small = figure.bounding_box()["width"]
    figure.focus()
    tab.keyboard.press("Enter")
    large = tab.locator("dialog.metake-zoom svg")
    assert large.bounding_box()["width"] > 1.3 * small
    tab.keyboard.press("Escape")
    tab.wait_for_selector("dialog.metake-zoom", state="detached")


def test_a_symbol_and_a_mark_under_the_pointer_say_what_they_are(tab, address):
    opened(tab, address, "notebooks/attenuation.html")
    symbol = tab.locator(".metake-symbol").first
    symbol.hover()
    said = symbol.evaluate("(e) => getComputedStyle(e, '::after').content")
    assert "in the code" in said and symbol.get_attribute("data-says") in said
    mark = tab.locator(".metake-figure svg *:has(> title)").first
    mark.scroll_into_view_if_needed()
    tip = tab.locator("#metake-tip")
    for _ in range(40):  # until the page's script listens
        mark.dispatch_event("pointermove", {"clientX": 300, "clientY": 300})
        if tip.count():
            break
        tab.wait_for_timeout(250)
    assert len(tip.inner_text()) > 3


def test_a_wide_table_fades_where_it_goes_on(tab, address):
    tab.set_viewport_size({"width": 390, "height": 800})
    opened(tab, address, "notebooks/proxy_fidelity.html")
    box = tab.locator(".metake-scroll.metake-scrolls").first
    mask = "(e) => getComputedStyle(e).maskImage"
    assert "gradient" in box.evaluate(mask)
    box.evaluate("(e) => { e.scrollLeft = e.scrollWidth; }")
    tab.wait_for_function("document.querySelector('.metake-scroll.metake-scrolls').classList.contains('metake-at-end')")
    assert box.evaluate(mask) == "none"
