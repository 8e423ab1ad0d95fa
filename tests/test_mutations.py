"""The tests and pages would notice: of the mistakes in `mutants`, one in every room, a few are made here."""

from __future__ import annotations

import re

import pytest
from mutants import MUTATIONS, PAGES, ROOT, checkout, compared, made, run_tests

ROOMS = set("support data algebra language report scoring editing methods.py experiments commands".split())
SAMPLE = MUTATIONS[3::12]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("checkout"))


def test_there_are_mistakes_in_every_room_and_each_has_its_place_and_its_test():
    assert len(MUTATIONS) >= 40 and {m.file.split("/")[0] for m in MUTATIONS} == ROOMS
    for m in (*MUTATIONS, *PAGES):
        assert (ROOT / "metake" / m.file).read_text("utf-8").count(m.right) == 1, f"{m.what}: choose another place"
    for m in MUTATIONS:
        file, _, name = m.test.partition("::")
        assert re.search(rf"^def {re.escape(name)}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE), m.test


@pytest.mark.parametrize("mutation", SAMPLE, ids=lambda m: m.what)
def test_a_mistake_fails_the_test_that_is_named(mutation, copied):
    with made(mutation, copied):
        code, said = run_tests(copied, mutation.test)
    assert code == 1 and re.search(r"^(FAILED|ERROR) ", said, re.MULTILINE), said[-3000:]


def test_a_mistake_in_a_plotted_column_fails_its_page(copied):
    with made(PAGES[-1], copied):
        code, said = compared(copied, PAGES[-1].test)
    assert code == 1 and re.search("mismatch '(text/plain|stdout)'", said), said[-3000:]
