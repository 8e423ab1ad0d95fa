"""Which records an experiment edits: read by name or path, of all subjects or a half of them, drawn by a seed."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

from metake.data.facts import facts
from metake.data.files import counterfact, zsre
from metake.data.requests import Cases
from metake.language.model import LanguageModel
from metake.language.tokens import locate
from metake.support.errors import ParameterError, RequestError, near_misses

PARTS = ("all", "choosing", "testing")


def read_cases(data: str) -> Cases:
    """Cases by name or path: the embedded facts in either format, or a file whose format its records tell."""
    if data in ("facts", "facts-zsre"):
        return facts(format="zsre" if data == "facts-zsre" else "counterfact")
    if not Path(data).is_file():
        raise ParameterError(
            f"{near_misses(data, ('facts', 'facts-zsre'), 'data set')} Or the path of a CounterFact or ZsRE file."
        )
    try:
        return counterfact(data)
    except RequestError as not_counterfact:
        try:
            return zsre(data)
        except RequestError as not_zsre:
            raise (not_zsre if "a ZsRE file" in str(not_counterfact) else not_counterfact) from None


def part_of(cases: Cases, part: str) -> Cases:
    """The cases of one part: "choosing" or "testing", a half each by the subject alone (CRC-32), or "all"."""
    if part == "all":
        return cases
    place = PARTS.index(part) - 1
    return Cases(
        [c for c in cases if zlib.crc32(c.request.subject.encode()) % 2 == place], cases.format, cases.source,
        cases.skipped, cases.skipped_ids
    )


def select(lm: LanguageModel, cases: Cases, edits: int, seed: int) -> Cases:
    """`edits` cases in an order drawn by `seed`; those that this model's tokenizer cannot locate, and second requests
    about the same prompt and subject, are passed over and counted in `.skipped`."""
    order, chosen, seen, skipped = list(range(len(cases))), [], set(), dict(cases.skipped)
    random.Random(seed).shuffle(order)
    for i in order:
        if len(chosen) == edits:
            break
        request = cases[i].request
        try:
            locate(lm.tokenizer, request.prompt, request.subject)
            reason = "second request about the same prompt and subject" if request.text in seen else None
        except RequestError:
            reason = "subject ends inside a token"
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        seen.add(request.text)
        chosen.append(i)
    if len(chosen) < edits:
        raise ParameterError(
            f"{edits} edits were asked for, but the data has only {len(chosen)} usable cases for this model; "
            f"skipped: {skipped or 'none'}"
        )
    return Cases([cases[i] for i in chosen], cases.format, cases.source, skipped, cases.skipped_ids)
