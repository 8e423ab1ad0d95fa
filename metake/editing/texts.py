"""Texts for key statistics: where they come from, and what of a file is a document."""

from __future__ import annotations

import logging
import re
from functools import cache
from itertools import groupby, islice, pairwise
from pathlib import Path

from metake.data.facts import prose, reference_texts, rendered_sentences
from metake.scoring.tasks import lessons
from metake.support.errors import ParameterError
from metake.support.storage import reading

log = logging.getLogger("metake")
SHORT = 40  # letters, about ten tokens: a shorter line is a heading or a scrap
# of scripts that put no blanks between words (Thai to Khmer, Chinese, Japanese), and Hangul: a token or more each
WIDE = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]"
ENDS = tuple(".!?…:;\"'”’»)]。！？：；」』）")  # of a sentence, and what closes it


def documents(text: str = "embedded") -> list[str]:
    """Documents of a text source: "embedded", a text file, or "hub:owner/name[:config]".

    Of a file, a line is a document; if most lines are short, or broken to one width as in a book, what stands between
    blank lines is. What has less than about ten tokens (40 letters, 5 Chinese characters) is left out, and logged.
    "embedded+tasks": beside the facts and prose a third of what `tiny` was taught of the small tasks (`tasks.lessons`).
    """
    if text == "embedded":
        return list(_embedded())
    if text == "embedded+tasks":
        return [*_embedded(), *(prompt + answer for taught in lessons().values() for prompt, answer in taught[::3])]
    if text.startswith("hub:"):
        return _hub_documents(text.removeprefix("hub:"))
    path = Path(text)
    if not path.is_file():
        raise ParameterError(
            f"text source {text!r} is neither 'embedded' or 'embedded+tasks', nor 'hub:owner/name[:config]', nor a file"
        )
    with reading(f"text source {text!r}", "is not UTF-8 text", "convert it", ParameterError):
        units = _units([_untokenize(line) for line in path.read_text(encoding="utf-8").splitlines()])
    found = [unit for unit in units if _letters(unit) >= SHORT]
    if not found:
        raise ParameterError(f"text source {text!r} has no line of 40 or more characters; expected one document a line")
    if dropped := len(units) - len(found):
        log.warning("%s: %d of %d lines are left out, each of less than about 10 tokens", text, dropped, len(units))
    return found


@cache
def _embedded() -> tuple[str, ...]:
    return (*prose(), *reference_texts().values(), *rendered_sentences())


def _letters(line: str) -> int:
    """Length in letters, four to a token; a character of `WIDE` is taken for two tokens."""
    return len(line) + 7 * len(re.findall(WIDE, line))


def _units(lines: list[str]) -> list[str]:
    """Lines; or paragraphs, if most lines are short or end where the first word of the next one had no room."""
    full, pairs = [line for line in lines if line], [(a, b) for a, b in pairwise(lines) if a and b]
    width = sorted([0, *map(len, full)])[9 * len(full) // 10]
    broken = sum(len(a) + len(b.split()[0]) >= width and not a.endswith(ENDS) for a, b in pairs)
    if broken <= max(2, len(pairs) / 2) and sum(_letters(line) < SHORT for line in full) <= len(full) / 2:
        return full
    joined = ("\n".join(block) for some, block in groupby(lines, bool) if some)
    return [re.sub(f"(?<={WIDE})\n(?={WIDE})", "", block).replace("\n", " ") for block in joined]


def _hub_documents(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ParameterError("text from the hub needs the package 'datasets': pip install datasets") from None
    dataset, _, config = name.partition(":")
    records = load_dataset(dataset, config or None, split="train", streaming=True)
    return [record["text"] for record in islice(records, 100_000)]


def _untokenize(line: str) -> str:
    """Undo WikiText's tokenization: joined punctuation, no <unk> marks. Ordinary text passes through unchanged."""
    line = re.sub(r" @(.)@ ", r"\1", line.strip().replace("<unk>", ""))
    line = re.sub(r" ([,.;:!?)\]%]|'s\b)", r"\1", line)
    return re.sub(r"([(\[]) ", r"\1", re.sub(r"\s+", " ", line)).strip()
