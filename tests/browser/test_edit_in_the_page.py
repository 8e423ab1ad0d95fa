"""The page that edits a model in the browser: it agrees with the library, and does what a reader asks of it.

One window serves all tests of a width: the page is loaded once.
"""

from __future__ import annotations

import json
import math

import pytest
from built import BOOK

PAGE = "book/edit_in_the_page.html"
EDITS = 50  # that are compared
NEAR, SMALL = 1e-2, 1e-2  # of keys, γ and β relative to their size; of probabilities
MOST, SOON = 12e6, 3.0  # bytes of the page with its data; seconds until the first edit is shown
# A control that a listener meets without a name, however briefly: while the model loads, too.
UNNAMED = """new MutationObserver(() => {
  for (const one of document.querySelectorAll('#metake-edit button:not([hidden])'))
    if (!one.textContent.trim()) console.error('a button without a name');
}).observe(document, { childList: true, subtree: true, attributes: true })"""
IN_PAGE = """async ([place, method, strength, keys]) => {
  const { model, data } = metakeEdit.page, [id, subject] = data.pairs[place];
  const relation = data.relations.find((one) => one.id === id), request = { prompt: relation.prompt, subject };
  const covariance = await metakeEdit.part("covariance");
  const seen = metakeEdit.page.diagnosed(request, method, strength, covariance);
  const plan = metakeEdit.planned(data, place, method, strength);
  const edit = metakeEdit.solve(model, request, method, strength, plan, covariance);
  const after = model.next(relation.prompt.replace("{}", subject), edit.updates);
  const { gamma, beta, lower } = seen, upper = Number.isFinite(seen.upper) ? seen.upper : null;
  const whole = keys ? { key: [...seen.key], gate: [...edit.updates.at(-1).gate] } : {};
  return { gamma, beta, lower, upper, after: [...after], ...whole };
}"""


@pytest.fixture(scope="module")
def page(chromium):
    """The page as the offline archive opens it, once for all tests; what it complained of, and what it loaded."""
    window = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    window.set_default_timeout(60_000)
    window.complaints = []
    window.on("console", lambda m: window.complaints.append(m.text) if m.type == "error" else None)
    window.on("pageerror", lambda e: window.complaints.append(str(e)))
    window.on("requestfailed", lambda r: window.complaints.append(r.url))
    window.add_init_script(UNNAMED)
    session = window.context.new_cdp_session(window)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # what it computes, however busy the machine
    window.goto((BOOK / PAGE).as_uri())
    ready(window)
    told = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    window.seconds = told["TaskDuration"]
    yield window
    window.close()


def ready(window):
    window.wait_for_selector("#metake-edit[data-state=ready]")


def choose(window, what: str, value: str):
    window.get_by_label(what, exact=False).first.select_option(value)
    ready(window)


def said(window) -> str:
    return window.locator("#metake-edit .me-said").inner_text()


def numbers(window) -> str:
    return window.locator("#metake-edit .me-numbers").inner_text()


def later(window) -> list[str]:
    return window.locator("#metake-edit .me-prompt .me-later").all_inner_texts()[1:]


def far(mine: list[float], theirs: list[float]) -> float:
    """‖a − b‖ / ‖b‖."""
    return math.dist(mine, theirs) / math.hypot(*theirs)


def test_fifty_edits_agree_with_the_library(page):
    """Keys, γ, β, the interval, the gate, and the likeliest next tokens' probabilities after the edit; the library's
    were computed when the book was built."""
    told = json.loads((BOOK / "_static" / "edit" / "answers.json").read_text("utf-8"))
    assert len(told) >= EDITS and {one["method"] for one in told} == {"rome", "memit", "alphaedit", "metake"}
    assert len({one["place"] for one in told}) >= 24 and sum("key" in one for one in told) >= 10
    for one in told:
        found = page.evaluate(IN_PAGE, [one["place"], one["method"], one["strength"], "key" in one])
        for name in ("gamma", "beta", "lower", "upper"):
            assert found[name] == (one[name] and pytest.approx(one[name], rel=NEAR)), (name, one)
        assert max(abs(found["after"][token] - p) for token, p in one["after"]) < SMALL, one
        for name in ("key", "gate") if "key" in one else ():
            assert far(found[name], one[name]) < NEAR, (name, one)


def test_it_opens_from_the_disk_without_complaint_soon_and_weighs_little(page):
    files = list((BOOK / "_static" / "edit").iterdir())
    assert {"model-data.js", "covariance-data.js", "page.js"} <= {f.name for f in files}
    assert not page.complaints and 0.05 < page.seconds < SOON
    assert sum(f.stat().st_size for f in files) + (BOOK / PAGE).stat().st_size < MOST


def test_another_lambda_moves_the_interval_and_the_edit_by_keyboard(page):
    before, bars = numbers(page), later(page)
    page.locator("#metake-edit input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    ready(page)
    assert numbers(page) != before and later(page) != bars
    page.keyboard.press("ArrowLeft")
    ready(page)
    assert numbers(page) == before and later(page) == bars


def test_undo_gives_back_what_was_and_the_edit_can_be_made_again(page):
    bars, first = later(page), page.locator("#metake-edit .me-prompt .me-number").all_inner_texts()
    page.get_by_role("button", name="Undo the edit").click()
    ready(page)
    assert "bit for bit" in said(page) and set(later(page)) == {"–"}
    page.get_by_role("button", name="Make the edit again").press("Enter")
    ready(page)
    assert later(page) == bars
    assert page.locator("#metake-edit .me-prompt .me-number").all_inner_texts() == first


def test_every_method_says_its_own_numbers(page):
    seen = []
    for name in ("ROME", "MEMIT", "AlphaEdit", "MetaKE"):
        page.get_by_label(name, exact=True).check()
        ready(page)
        seen.append((numbers(page), later(page)))
        assert name in said(page) and page.locator("#metake-edit input[type=range]").is_disabled() == (name == "ROME")
    assert len({figures for figures, _ in seen[:3]}) == 3 and seen[2][1] != seen[3][1]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("Atlantis", "“Atlantis” is no subject that this model was taught for “The capital of … is”: choose one of"),
        ("Hamlet", "“Hamlet” is known, but not for “The capital of … is”: choose “The author of … is” above."),
        ("", "No subject is given"), ("lazio", "No plan was recorded for Lazio → ")
    ]
)  # fmt: skip
def test_what_is_not_known_gets_one_clear_line(page, typed, line):
    subject = page.locator("#metake-edit input[type=text]")
    kept = subject.input_value()
    subject.fill(typed)
    subject.press("Tab")
    ready(page)
    assert line in said(page) and "\n" not in said(page)
    assert page.locator("#metake-edit .me-prompt").is_visible() == (typed == "lazio")
    assert not page.get_by_role("button", name="Undo the edit").is_visible()
    subject.fill(kept)
    subject.press("Tab")
    ready(page)
    assert "MetaKE wrote" in said(page)


def test_a_phone_shows_all_of_it_in_the_dark(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    try:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for part in (".me-choice select", "input[type=range]", ".me-line", ".me-table"):
            box = page.locator(f"#metake-edit {part}").first.bounding_box()
            assert 0 <= box["x"] and box["x"] + box["width"] <= 390 and box["width"] > 100
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})
        page.emulate_media(color_scheme="light")


def test_without_javascript_it_is_a_picture_with_text(chromium):
    context = chromium.new_context(java_script_enabled=False)
    window = context.new_page()
    window.goto((BOOK / PAGE).as_uri())
    picture = window.locator("#metake-edit svg[role=img]")
    assert picture.is_visible() and "before and after the edit" in picture.get_attribute("aria-label")
    assert "→" in picture.text_content() and window.locator("#metake-edit figcaption").is_visible()
    context.close()
