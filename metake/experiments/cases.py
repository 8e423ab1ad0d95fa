"""Which records an experiment edits: read by name or path, of all subjects or a half of them, drawn by a seed."""

from __future__ import annotations

import logging
import random
import zlib
from functools import cache, partial
from pathlib import Path

from metake.data.facts import facts
from metake.data.files import dataset
from metake.data.requests import Cases, EditCase
from metake.experiments.portable import portable_facts
from metake.language.model import LanguageModel
from metake.language.tokens import encode, in_context, locate, prompted
from metake.support.errors import ParameterError, RequestError, near_misses

# each is made once a process: a quarter of a second that every run would spend again
EMBEDDED = {
    "facts": cache(facts), "facts-zsre": cache(partial(facts, format="zsre")),
    "facts-portability": cache(portable_facts)
}
PARTS = ("all", "choosing", "testing")
OPENING = 16  # tokens that a context template may take before a prompt: the methods' have ten, and a full stop
TOO_LONG = "longer than the model's window"


def read_cases(data: str) -> Cases:
    """Cases by name or path: the embedded facts in either format, or those whose edits have consequences in the set
    (`portable`), or a file whose layout its records tell."""
    if data in EMBEDDED:
        return EMBEDDED[data]()[:]
    if not Path(data).is_file():
        names = near_misses(data, EMBEDDED, "data set")
        raise ParameterError(f"{names} Or the path of a CounterFact or ZsRE file, or another of metake.dataset.")
    return dataset(data)


def part_of(cases: Cases, part: str) -> Cases:
    """The cases of one part: "choosing" or "testing", a half each by the subject alone (CRC-32), or "all"."""
    if part == "all":
        return cases
    place = PARTS.index(part) - 1
    return Cases(
        [c for c in cases if zlib.crc32(c.request.subject.encode()) % 2 == place], cases.format, cases.source,
        cases.skipped, cases.skipped_ids
    )


def select(lm: LanguageModel, cases: Cases, edits: int | None, seed: int = 0) -> Cases:
    """`edits` cases in an order drawn by `seed`, or with None all, in the file's order; those that this model's
    tokenizer cannot locate, or whose rows do not fit its window, and second requests about the same prompt and subject,
    are passed over and counted in `.skipped`."""
    order, chosen, seen, skipped, long = list(range(len(cases))), [], set(), dict(cases.skipped), []
    if edits is not None:
        random.Random(seed).shuffle(order)
    for i in order:
        if len(chosen) == edits:
            break
        texts = [request.text for request in cases[i].requests]
        try:
            for request in cases[i].requests:
                locate(lm.tokenizer, in_context(request.frame, request.prompt), request.subject)
            known = len({*texts} - seen) < len(texts)
            reason = "second request about the same prompt and subject" if known else None
            if not reason and not _fits(lm, cases[i]):
                reason = TOO_LONG
                long.append(cases[i].request.id)
        except RequestError:
            reason = "subject ends inside a token"
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        seen.update(texts)
        chosen.append(i)
    if long:
        told = (cases.source, len(long), TOO_LONG, lm.window, ", ".join(long[:9]) + ", …" * (len(long) > 9))
        logging.getLogger("metake").warning("%s: %d records skipped: %s of %d tokens (case_id %s)", *told)
    if len(chosen) < (edits or 0):
        raise ParameterError(
            f"{edits} edits were asked for, but the data has only {len(chosen)} usable cases for this model; "
            f"skipped: {skipped or 'none'}"
        )
    return Cases([cases[i] for i in chosen], cases.format, cases.source, skipped, (*cases.skipped_ids, *long))


def for_training(lm: LanguageModel, source: str) -> Cases:
    """What an editor may be trained on: the usable cases of the part "choosing", in the file's order."""
    return select(lm, part_of(read_cases(source), "choosing"), None)


def _fits(lm: LanguageModel, case: EditCase) -> bool:
    """Whether a case's rows, its request's in any context, fit the model's window."""
    rows = [(request.text, request.target, request.seam, OPENING) for request in case.requests]
    for p in case.probes:
        texts = ("",) if p.kind == "generation" else (p.target, p.rival)
        rows += [(p.prompt, text, p.seam, 0) for text in texts if text is not None]

    def length(prompt: str, text: str, given: str | None) -> int:
        if not text:
            return len(encode(lm.tokenizer, prompt))
        return sum(map(len, prompted(lm.tokenizer, prompt, text, given))) - 1

    # no token is shorter than a byte
    return all(
        len(f"{prompt} {text}".encode()) + more < lm.window or length(prompt, text, given) + more <= lm.window
        for prompt, text, given, more in rows
    )
