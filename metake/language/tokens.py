"""Text to token rows: where the subject ends, where the target's logits are read, how rows are padded.

Everything here is exact bookkeeping in absolute positions of one row; padding shifts it in one place (`pad`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metake.data.requests import EditRequest, require_text, unspaced
from metake.support.errors import RequestError
from metake.support.machine import sent


class Located(NamedTuple):
    """A prompt as tokens, and the position of its subject's last token."""

    ids: tuple[int, ...]
    lookup: int


class Row(NamedTuple):
    """One sequence of an objective: its tokens, its lookup position, and the tokens whose logits are scored."""

    request: int  # index in the batch
    ids: tuple[int, ...]
    lookup: int
    read: tuple[int, ...]  # positions whose next-token logits are used
    labels: tuple[int, ...]  # the tokens scored there; empty: the whole distribution is compared (locality)
    weight: float = 1.0  # of each read position in the request's loss


class Padded(NamedTuple):
    """Rows in one rectangle, (rows, width) each; the mask also covers columns that a cache holds before them."""

    ids: Tensor
    mask: Tensor
    positions: Tensor


class Counted(Tensor):
    """A mask that knows its sum: transformers asks for it before a pass, and would wait for the device each time."""

    @classmethod
    def of(cls, mask: Tensor, count: int) -> Counted:
        found = mask.as_subclass(cls)
        found.count = count
        return found

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is Tensor.sum and len(args) == 1 and not kwargs:
            return args[0].count
        with torch._C.DisableTorchFunctionSubclass():
            made, own = function(*args, **(kwargs or {})), args[0]
        same = function in (Tensor.to, Tensor.view, Tensor.__getitem__) and type(own) is cls
        return cls.of(made, own.count) if same and made.numel() == own.numel() else made


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids as a model expects a text to begin and to go on: with the special tokens that the tokenizer puts before
    it (BOS), once if the text carries them already, and without those that it puts after it (EOS)."""
    require_text(text)
    # not verbose: a text may be longer than the model's window
    found = tokenizer(text, verbose=False, return_special_tokens_mask=True)
    ids, own = tuple(found["input_ids"]), [i for i, added in enumerate(found["special_tokens_mask"]) if not added]
    if not own:
        return ids[:1] if ids[:1] == (getattr(tokenizer, "bos_token_id", None),) else ()
    head, body = ids[: own[0]], ids[own[0] : own[-1] + 1]
    return body if body[: len(head)] == head else head + body


def seam(prompt: str, given: str | None = None) -> tuple[str, str]:
    """A prompt up to where its target begins, and what stands between: " ", or "" for a target directly after it.

    given: the seam to the letter. None: blanks at the prompt's end are the seam; there is none after a line's end or
    other white space, nor in a script that writes no blanks between words; else it is one blank.
    """
    if given is not None:
        return prompt, given
    bare = prompt.rstrip(" \u200b\ufeff")  # blanks, and among them what has no width
    bare = bare if " " in prompt[len(bare) :] else prompt
    if bare[-1:].isspace():  # blanks that begin a line indent it: the last of them belongs to the word
        return (prompt[:-1], " ") if prompt.endswith(" ") else (bare, "")
    return bare, " " if bare != prompt or not unspaced(bare) else ""


def prompted(tokenizer: Any, prompt: str, answer: str, given: str | None = None) -> tuple[tuple[int, ...], ...]:
    """Token ids of a prompt and of the answer that continues it; `given` is their seam, as `seam` takes it."""
    start, between = seam(prompt, given)
    return encode(tokenizer, start), continuation(tokenizer, answer, None if between else start)


def continuation(tokenizer: Any, text: str, prompt: str | None = None) -> tuple[int, ...]:
    """Token ids of `text` as it continues a sentence: after exactly one space, or directly after `prompt`.

    Read off as the difference of "is" and "is text", which serves tokenizers that carry the space in the token
    (byte-level BPE) and those that mark the beginning of words alike. Where a token reaches over the prompt's end, they
    are those of the text that begins a line.
    """
    require_text(text := text.strip())
    if not text:
        raise RequestError("the target is empty or only white space; expected at least one word")
    blank = " " if prompt is None else ""
    for stem in ("is",) if prompt is None else (prompt, "\n"):
        first, both = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (stem, stem + blank + text))
        if both[: len(first)] == first:
            return tuple(both[len(first) :])
    return tuple(tokenizer(blank + text, add_special_tokens=False)["input_ids"])


def locate(tokenizer: Any, template: str, subject: str) -> Located:
    """Tokens of the template with its subject filled in, and the position of the subject's last token.

    The position is len(tokens(prefix + subject)) − 1, special tokens counted. Raises RequestError if the tokens of
    prefix + subject are not the beginning of the tokens of the whole prompt: the subject's end lies inside a token.
    """
    prefix, found, suffix = template.partition("{}")
    if not found or "{}" in suffix:
        raise RequestError(f"prompt {template!r} must contain exactly one '{{}}' where the subject goes")
    upto, full = encode(tokenizer, prefix + subject), encode(tokenizer, prefix + subject + suffix)
    if full[: len(upto)] != upto:
        torn = tokenizer.decode(next((t for t, u in zip(full, upto, strict=False) if t != u), full[-1]))
        raise RequestError(
            f"subject {subject!r} in {template!r} ends inside the token {torn!r}, so it has no last token of its own; "
            "put a space or punctuation after '{}', or choose another subject"
        )
    return Located(full, len(upto) - 1)


def in_context(context: str, template: str, bos: str | None = None) -> str:
    """The prompt template inside a context template: `context`'s {} becomes the prompt, whose own {} stays, and so does
    a beginning token before all."""
    first = bos if bos and template.startswith(bos) else ""
    return first + context.replace("{}", template.removeprefix(first), 1)


def rewriting_rows(tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]) -> list[Row]:
    """Rows that teach the target: each request in each context, teacher-forced on its target.

    The weight of a position is 1/(contexts · target tokens), so that a request's weighted sum is its mean loss.
    """
    rows, bos = [], tokenizer.bos_token if encode(tokenizer, "") else None  # where the tokenizer begins every text so
    for i, request in enumerate(requests):
        start, between = seam(request.text, request.seam)
        target = continuation(tokenizer, request.target, None if between else start)
        cut = len(request.text) - len(start)
        for context in contexts:
            template = in_context(request.frame, in_context(context, request.prompt, bos))
            prompt, lookup = locate(tokenizer, template[: len(template) - cut], request.subject)
            read = tuple(range(len(prompt) - 1, len(prompt) - 1 + len(target)))
            rows.append(Row(i, prompt + target[:-1], lookup, read, target, 1 / (len(contexts) * len(target))))
    return rows


def locality_rows(tokenizer: Any, requests: Sequence[EditRequest], template: str = "{} is a") -> list[Row]:
    """Rows that watch for drift: the next-token distribution after "{subject} is a", in the request's frame."""
    found = (locate(tokenizer, in_context(request.frame, template), request.subject) for request in requests)
    return [Row(i, ids, lookup, (len(ids) - 1,), ()) for i, (ids, lookup) in enumerate(found)]


class _Once:
    """A tokenizer that reads each text once: a request's prompts begin alike, and requests share targets."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.read = tokenizer, cache(lambda text, **options: tokenizer(text, **options))

    def __call__(self, text: str, **options: Any) -> Any:
        return self.read(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@dataclass(frozen=True)
class Rows:
    """A batch of requests as token rows: what all stages of an edit read, made and checked once."""

    contexts: tuple[str, ...]
    taught: tuple[Row, ...]  # each request in each context with its target, request-major, the plain prompt first
    watched: tuple[Row, ...]  # each request's subject alone

    @classmethod
    def of(cls, tokenizer: Any, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str]) -> Rows:
        """The rows of requests in these contexts; rows pass as they are. Raises RequestError as `locate` does."""
        if isinstance(requests, Rows):
            return requests
        once = _Once(tokenizer)
        taught, watched = rewriting_rows(once, requests, contexts), locality_rows(once, requests)
        return cls(tuple(contexts), tuple(taught), tuple(watched))

    def __len__(self) -> int:
        """How many requests."""
        return len(self.watched)

    def pick(self, requests: Iterable[int]) -> Rows:
        """The rows of some of the requests, which are numbered anew."""
        count = len(self.contexts)
        pairs = list(enumerate(requests))
        taught = (row._replace(request=k) for k, i in pairs for row in self.taught[i * count : (i + 1) * count])
        watched = (self.watched[i]._replace(request=k) for k, i in pairs)
        return Rows(self.contexts, tuple(taught), tuple(watched))

    def prompts(self) -> list[tuple[int, ...]]:
        """Every request in every context, cut after the subject's last token."""
        return [row.ids[: row.lookup + 1] for row in self.taught]

    def rewriting(self, plain: bool = False) -> list[Row]:
        """The rows that teach the targets, or those of the plain prompt alone, which then weigh as much."""
        if not plain:
            return list(self.taught)
        return [row._replace(weight=1 / len(row.labels)) for row in self.taught[:: len(self.contexts)]]

    def locality(self, position: str = "subject") -> list[Row]:
        """The rows that watch for drift.

        position: "subject" reads at the subject's last token, as the released code of the family does (the words after
        it then play no part and are cut off); "final" at the last token, the literal reading of MetaKE v3 eq. 98.
        """
        if position == "final":
            return list(self.watched)
        return [row._replace(ids=row.ids[: row.lookup + 1], read=(row.lookup,)) for row in self.watched]


def pad(rows: Sequence[Sequence[int]], device: Any) -> Padded:
    """Rows in one rectangle, padded on the right; padding is masked, positions count on."""
    width = max(map(len, rows))
    ids = sent([(*row, *[0] * (width - len(row))) for row in rows], device, torch.long)
    columns = torch.arange(width, device=device)
    lengths = list(map(len, rows))
    mask = Counted.of((columns < sent(lengths, device)[:, None]).long(), sum(lengths))
    return Padded(ids, mask, columns.expand(len(rows), -1))


def continued(rows: Sequence[Sequence[int]], past: Sequence[int], device: Any) -> Padded:
    """Rows that continue sequences of these lengths, whose columns stand before theirs and end with them.

    The mask covers both; ids and positions are the rows' own, padded on the right.
    """
    own, lengths, width = pad(rows, device), sent(past, device), max(past)
    before = (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()
    mask = Counted.of(torch.cat([before, own.mask], 1), own.mask.sum() + sum(past))
    return Padded(own.ids, mask, own.positions + lengths[:, None])


def shared_beginnings(
    rows: Sequence[Sequence[int]], limits: Sequence[int], start: int = 0, least: int = 4
) -> list[int]:
    """Per row, how many first tokens it has in common with others, where running them once saves more than it costs.

    limits: at most so many of a row may be cut off; start: tokens whose computation takes as long as one more pass,
    which a beginning must save. Rows in alphabetical order are taken together as long as neighbors agree in `least`
    tokens or more.
    """
    parts = [tuple(row[:limit]) for row, limit in zip(rows, limits, strict=True)]
    order = sorted(range(len(rows)), key=parts.__getitem__)
    common = [0, *(_agreement(parts[i], parts[j]) for i, j in pairwise(order)), 0][: len(order) + 1]
    cuts, first = [0] * len(rows), 0
    for end in range(1, len(order) + 1):
        if common[end] < least:
            cut = min(common[first + 1 : end], default=0)
            for i in order[first:end] if cut * (end - first - 1) >= start else ():
                cuts[i] = cut
            first = end
    return cuts


def _agreement(one: Sequence[int], other: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def buckets(sizes: Sequence[int | tuple[int, ...]], budget: int, start: int) -> Iterator[list[int]]:
    """Indices of rows of similar size, in groups whose rectangle holds at most `budget` tokens (one row at least).

    What is computed is least: minimize Σ over groups of (rows · widest + start)   over runs of rows in order of size
    start: tokens whose computation takes as long as one more group. A size may have several parts, each padded on its
    own: the first is what every step computes, the others count in the rectangle only.
    """
    parts = [s if isinstance(s, tuple) else (s,) for s in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (parts[i], i), reverse=True)
    for first, end in pairwise(_cheapest_cuts([parts[i][0] for i in order], budget, start)):
        group: list[int] = []
        widest = parts[order[first]]
        for i in order[first:end]:
            grown = tuple(map(max, widest, parts[i]))
            if group and sum(grown) * (len(group) + 1) > budget:
                yield group
                group, grown = [], parts[i]
            group.append(i)
            widest = grown
        yield group


def _cheapest_cuts(widths: Sequence[int], budget: int, start: int) -> list[int]:
    """Where to cut rows of descending width, ends included: dynamic programming over the distinct widths."""
    ends = [0, *(i for i in range(1, len(widths)) if widths[i] != widths[i - 1]), len(widths)] if widths else [0]
    best: list[tuple[int, int]] = [(0, 0)]  # per end: least cost up to it, and where its last run begins
    for k, end in enumerate(ends[1:], 1):
        area = [widths[first] * (end - first) for first in ends[:k]]
        best.append(min((best[j][0] + area[j] + start * -(-area[j] // budget), j) for j in range(k)))
    cuts, k = [len(widths)], len(ends) - 1
    while k:
        k = best[k][1]
        cuts.append(ends[k])
    return cuts[::-1]
