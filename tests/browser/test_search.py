"""A reader's question finds its page, and what is quoted of a page can be read."""

from __future__ import annotations

import pytest
from built import settled

QUESTIONS = {
    "does MetaKE beat AlphaEdit": {"notebooks/main_comparison", "notebooks/does_metake_hold"},
    "LoRA export": {"notebooks/quickstart"},
    "undo an edit": {"notebooks/quickstart"},
    "limitations": {"book/intro", "book/checklists"},
    "counterfact download": {"book/data"},
    "how does MetaKE work": {"book/method_metake"},
    "what is gamma": {"book/method_disconnect"},
    "why do edits fail": {"book/method_disconnect"},
    "which edits will fail": {"notebooks/gamma_beforehand"},
    "forgetting": {"notebooks/general_ability"},
    "thousand edits": {"notebooks/long_streams"},
    "bug in released code": {"notebooks/published_differences"},
    "seconds per edit": {"notebooks/run_time_and_memory"},
    "add a model": {"book/extend"},
    "add a method": {"book/extend"},
    "licence cite BibTeX": {"book/data"},
    "hyperparameters of MEMIT": {"book/recipes"},
    "list of methods": {"book/methods"},
    "reconstructed formulas": {"book/notation"},
    "t-SNE": {"notebooks/hidden_states"},
    "edit in the browser": {"book/edit_in_the_page"},
    "run a notebook": {"book/reproduce"},
}
FIND = """async (question) => {
  const [query, terms, excluded, highlight, objects] = Search._parseQuery(question);
  return Search._performSearch(query, terms, excluded, highlight, objects).map((r) => r[0]);
}"""
QUOTE = """async (page) => Search.htmlToText(await (await fetch(page)).text())"""


@pytest.fixture(scope="module")
def search(chromium, address):
    page = chromium.new_page()
    page.goto(address + "search.html")
    settled(page)
    page.wait_for_function("typeof Search !== 'undefined' && Search._index !== null")
    yield page
    page.close()


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_finds_its_page(search, question):
    found = search.evaluate(FIND, question)
    pages = list(dict.fromkeys(reversed(found)))  # the best comes last
    assert QUESTIONS[question] & set(pages[:3]), pages[:6]


def test_a_quotation_has_neither_tex_nor_glued_cells(search, address):
    said = search.evaluate(QUOTE, address + "notebooks/attenuation.html")
    assert "\\\\" not in said and "\\gamma" not in said and "γ" in said
    assert "method · n" in said.replace("  ", " ") or "method ·" in said
