"""A model's answers to questions: what it writes, greedily, and how probable it finds each answer to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from metake.language.model import LanguageModel
from metake.language.tokens import Counted, Padded, continuation, encode
from metake.scoring.evaluation import read
from metake.support.errors import RequestError
from metake.support.machine import halving, sent
from metake.support.progress import progress

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
    most = min(tokens, lm.room(1, gradients=False))
    found = halving(lambda size: _written(lm, rows, length, size), most, lm.fitted)
    return [
        Answer(text, tuple(apart[p, c] if (p, c) in apart else first[words[c][0]].item() for c in candidates))
        for (p, candidates), (text, first) in zip(questions, found, strict=True)
    ]


def _written(lm: LanguageModel, rows: Sequence[tuple[int, ...]], length: int, tokens: int) -> list[tuple[str, Tensor]]:
    """Per row its continuation as text, and the log-probabilities of the first token after it."""
    found: list[tuple[str, Tensor]] = [("", torch.empty(0))] * len(rows)
    for group in progress(lm.groups([len(row) for row in rows], tokens, length), "answer"):
        new, first = _continue(lm, [rows[i] for i in group], length)
        for i, ids, log_p in zip(group, new.tolist(), first.cpu(), strict=True):
            found[i] = (lm.tokenizer.decode(_until_end(lm, ids), skip_special_tokens=True), log_p)
    return found


def _continue(lm: LanguageModel, rows: Sequence[tuple[int, ...]], length: int) -> tuple[Tensor, Tensor]:
    """`length` greedy tokens after each row, (rows, length), and the first's log-probabilities, (rows, vocabulary)."""
    step, cache = _aligned(rows, lm.device), DynamicCache()
    new: list[Tensor] = []
    for _ in range(length):
        logits = lm.logits(step, range(len(rows)), [step.ids.shape[1] - 1] * len(rows), cache)
        if not new:
            first = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        new.append(logits.argmax(-1, keepdim=True))
        mask = torch.cat([step.mask, torch.ones_like(new[-1])], 1)
        step = Padded(new[-1], Counted.of(mask, step.mask.sum() + len(rows)), step.positions[:, -1:] + 1)
    return torch.cat(new, 1), first


def _aligned(rows: Sequence[tuple[int, ...]], device: torch.device) -> Padded:
    """Rows that end in one column, padded on the left: what follows continues all of them. Padding is masked."""
    lengths, width = [len(row) for row in rows], max(map(len, rows))
    ids = sent([(*[0] * (width - len(row)), *row) for row in rows], device, torch.long)
    positions = torch.arange(width, device=device) - (width - sent(lengths, device))[:, None]
    return Padded(ids, Counted.of((positions >= 0).long(), sum(lengths)), positions.clamp_min(0))


def _until_end(lm: LanguageModel, ids: list[int]) -> list[int]:
    end = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = set(end) if isinstance(end, list) else {end, lm.tokenizer.eos_token_id}
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
