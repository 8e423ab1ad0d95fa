"""A model's answers to questions: what it writes, greedily, and how probable it finds each answer to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from metake.language.generation import greedy
from metake.language.model import LanguageModel
from metake.language.tokens import continuation, encode
from metake.scoring.evaluation import read
from metake.support.errors import RequestError

LENGTH = 5  # tokens that are generated (methods of AlphaEdit's `glue_eval`)


class Answer(NamedTuple):
    """What the model makes of one question."""

    text: str  # generated
    log_p: tuple[float, ...]  # of each candidate, mean over its tokens


@LanguageModel.entry()
def answer(
    lm: LanguageModel, questions: Sequence[tuple[str, Sequence[str]]], length: int = LENGTH, tokens: int = 8192
) -> list[Answer]:
    """Answers to (prompt, candidates), in order: `length` greedy tokens, to the end of text, and log-probabilities.

    A candidate continues the prompt after one space, whatever that ends in. One forward over a prompt serves both if
    its candidates are one token each; longer ones are read apart. tokens: of one micro-batch; the result is the same.
    Raises RequestError for a prompt without tokens, NumericalError for numbers that are not finite.
    """
    rows = [encode(lm.tokenizer, prompt) for prompt, _ in questions]
    if empty := [prompt for (prompt, _), row in zip(questions, rows, strict=True) if not row]:
        raise RequestError(f"the question {empty[0]!r} has no tokens; expected at least one")
    words = {c: continuation(lm.tokenizer, c) for _, candidates in questions for c in candidates}
    longer = {(prompt, c) for prompt, candidates in questions for c in candidates if len(words[c]) > 1}
    asked = [(*pair, " ") for pair in longer]
    apart = dict(zip(longer, (r.log_p for r in read(lm, asked, tokens)), strict=True)) if longer else {}
    found = greedy(lm, rows, length, tokens)
    return [
        Answer(text, tuple(apart[p, c] if (p, c) in apart else first[words[c][0]].item() for c in candidates))
        for (p, candidates), (text, first) in zip(questions, found, strict=True)
    ]
