"""What of a text file is used for key statistics, and what is said of the rest."""

from __future__ import annotations

import logging
import textwrap

import pytest
from models import random_model, small_tokenizer

from metake import ParameterError, statistics
from metake.editing.statistics import documents, token_rows
from metake.language.tokens import encode

SENTENCES = [
    f"On day {i} the capital of country {i * 7 % 60} was moved to Rome, {'Berlin ' * (i % 4)}or Madrid, and then back."
    for i in range(40)
]
CHINESE = [
    "法国的首都是巴黎，也是最大的城市。", "柏林是德国的首都", "罗马不是一天建成的。",
    "长江是亚洲最长的河流之一，流经许多省份。"
]
BOOK = "\n\n".join(textwrap.fill(" ".join(SENTENCES[i : i + 5]), 64, initial_indent="  ") for i in range(0, 40, 5))


@pytest.fixture
def file(tmp_path):
    def write(content: str, encoding: str = "utf-8") -> str:
        path = tmp_path / "text.txt"
        path.write_text(content, encoding=encoding)
        return str(path)

    return write


def used(path: str, context: int = 64, **more) -> str:
    """The text of the rows that statistics would read."""
    rows = token_rows(random_model("llama"), documents(path), None, context, pieces=True, **more)
    assert max(map(len, rows)) <= context
    assert all(row[0] == 0 for row in rows), "every piece begins as a text does"
    return " ".join(small_tokenizer().decode(row[1:]) for row in rows)


def letters(text: str) -> list[str]:
    return sorted(c for c in text if not c.isspace() and c != "�")


@pytest.mark.parametrize("count", [1, 2])
def test_one_long_line_is_used_in_pieces(file, count):
    half = len(SENTENCES) // count
    lines = [" ".join(SENTENCES[i : i + half]) for i in range(0, len(SENTENCES), half)]
    path, lm = file("\n".join(lines)), random_model("llama")
    assert documents(path) == lines and letters(used(path)) == letters("".join(SENTENCES))
    whole = sum(len(encode(lm.tokenizer, line)) - 1 for line in lines)
    found = statistics(lm, path, [0], context=64, cache=False)[0].count
    assert whole < found < whole * 1.05 and found == statistics(lm, path, [0], context=64, cache=False).source["tokens"]
    assert statistics(lm, path, [0], tokens=100, cache=False)[0].count == 100


def test_first_pieces_come_first(file):
    """So that few tokens are those that were always taken."""
    lines = [" ".join(SENTENCES[i : i + 10]) for i in range(0, 40, 10)]
    lm, path = random_model("llama"), file("\n".join(lines))
    rows = token_rows(lm, documents(path), None, 64, pieces=True)
    assert rows[:4] == token_rows(lm, documents(path), None, 64) and len(rows) > 20
    assert token_rows(lm, documents(path), 150, 64, pieces=True) == token_rows(lm, documents(path), 150, 64)


def test_ordinary_lines_are_cut_as_ever_and_the_loss_is_said(file, caplog):
    lm, path = random_model("llama"), file("\n".join(SENTENCES))
    with caplog.at_level(logging.WARNING, "metake"):
        found = statistics(lm, path, [0], context=20, cache=False)
    lost = sum(len(encode(lm.tokenizer, line)) - 20 for line in SENTENCES)
    assert found[0].count == 20 * len(SENTENCES)
    assert f"{lost} of {lost + 800} tokens are left out, which lie behind the first 20 of their lines" in caplog.text


@pytest.mark.parametrize(
    "lines", [CHINESE[::3], CHINESE, [c[:4] for c in CHINESE], ["ภาษาไทย" * 3, "東京は日本の首都です"]]
)
def test_short_lines_of_scripts_without_blanks_are_used(file, lines):
    path = file("\n".join(lines * 9))
    assert letters("".join(documents(path))) == letters("".join(lines * 9))
    assert statistics(random_model("llama"), path, [0], cache=False)[0].count > 48


@pytest.mark.parametrize("width", [40, 64, 100])
def test_a_book_with_broken_lines_becomes_paragraphs(file, width):
    paragraphs = [" ".join(SENTENCES[i : i + 5]) for i in range(0, 40, 5)]
    path = file("\n\n".join(textwrap.fill(p, width) for p in paragraphs))
    assert documents(path) == paragraphs
    assert documents(file("\n".join(textwrap.fill(p, width, initial_indent="   ") for p in paragraphs))) == [
        " ".join(paragraphs)
    ], "without blank lines it is one long line"


def test_broken_lines_of_chinese_meet_without_a_blank(file):
    prose = "".join(CHINESE) * 12
    path = file("\n".join(prose[i : i + 30] for i in range(0, len(prose), 30)))
    assert "".join(documents(path)) == prose


def test_short_lines_of_verse_are_joined(file):
    verse = [f"The river of day {i},\nthe road of night {i}\n\n" for i in range(30)]
    found = documents(file("".join(verse)))
    assert found[0] == "The river of day 10, the road of night 10" and len(found) == 20


@pytest.mark.parametrize("lines", [SENTENCES, [s.rstrip(".") for s in SENTENCES], [f"{s} {s}" for s in SENTENCES]])
def test_one_document_a_line_stays_so(file, lines):
    assert documents(file("\n".join(lines))) == lines


def test_what_is_dropped_is_said(file, caplog):
    path = file("\n\n".join([" = Title = ", *SENTENCES[:5], "Notes", "杜甫"]))
    with caplog.at_level(logging.WARNING, "metake"):
        assert documents(path) == SENTENCES[:5]
    assert f"{path}: 3 of 8 lines are left out, each of less than about 10 tokens" in caplog.text
    caplog.clear()
    documents(file("\n".join(SENTENCES)))
    assert not caplog.text


@pytest.mark.parametrize("content", ["", "\n \n", "a\nb\n", "短"])
def test_a_text_of_nothing_is_refused(file, content):
    with pytest.raises(ParameterError, match="has no line of 40 or more characters"):
        documents(file(content))
