"""Readers of the files that hold cases: CounterFact and ZsRE, in the layouts in which they are published."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from metake.data.requests import Cases, EditCase, EditRequest, Probe, unspaced, whole_number
from metake.support.errors import ParameterError, RequestError, near_misses

# How a record is laid out: dotted path → what stands there; a "?" at the end marks a field that may be absent.
_TEXT, _TEXTS, _EITHER = "a string", "a list of strings", "a string or a list of strings"
_JOINERS = ("\u200c", "\u200d")  # zero-width, inside words
_NAME, _NAMES = "a string or a whole number", "a list of strings or whole numbers"  # of things: 1984, 747
_ROME = {
    "requested_rewrite.prompt": _TEXT, "requested_rewrite.subject": _NAME, "requested_rewrite.target_new.str": _NAME,
    "requested_rewrite.target_true.str": _NAME, "paraphrase_prompts": _TEXTS, "neighborhood_prompts": _TEXTS,
    "generation_prompts?": _TEXTS, "reference?": _TEXT, "seam?": _TEXT
}
_EASYEDIT = {
    "prompt": _TEXT, "subject": _NAME, "target_new": _NAME, "ground_truth": _NAME, "rephrase_prompt": _EITHER,
    "locality_prompt": _TEXT, "locality_ground_truth": _NAME, "seam?": _TEXT
}
_ZSRE = {"src": _TEXT, "subject": _NAME, "rephrase": _TEXT, "loc": _TEXT, "loc_ans": _NAME, "seam?": _TEXT}


def counterfact(path: str | Path, limit: int | None = None, offset: int = 0) -> Cases:
    """Cases of a CounterFact file: ROME's layout (also MultiCounterFact) or EasyEdit's, told from its first record.

    The file is one JSON list or JSON Lines. Every request's text is the file's, to the letter; a record's field "seam",
    which may be absent, says what stands between its prompts and their targets: "" or " ".

    limit, offset: number of usable records to return (None: all) and to pass over first
    Returns Cases. Probes of a record: 1 efficacy and its paraphrases (new object against true one), its neighborhood
            (true against new: the comparison is reversed), its generation prompts (with `reference`, if it has one).
    Raises  RequestError if the file is missing or of another kind. A record that cannot be used is skipped, counted
            in `.skipped` with its reason, and reported by a warning on the "metake" logger.
    """
    return counterfact_cases(_load(path), limit, offset, source=str(path))


def zsre(path: str | Path, limit: int | None = None, offset: int = 0, target: str = "answers") -> Cases:
    """Cases of a ZsRE file in MEND's layout.

    target: "answers" writes the first true answer (AlphaEdit's protocol), "alt" the alternative (EasyEdit's)
    Returns Cases. Probes of a record: 1 efficacy, 1 paraphrase, 1 neighborhood (an unrelated question); no rivals.
    Raises  RequestError as `counterfact` does; ParameterError if target is another word.
    """
    return zsre_cases(_load(path), limit, offset, target, source=str(path))


def counterfact_cases(
    records: Iterable[dict], limit: int | None = None, offset: int = 0, source: str = "records"
) -> Cases:
    """`counterfact` on records in memory; see there."""
    records = list(records)
    easyedit = bool(records) and isinstance(records[0], dict) and "rephrase_prompt" in records[0]
    layout = (_EASYEDIT, _easyedit) if easyedit else (_ROME, _rome)
    return _collect(records, *layout, "counterfact", source, limit, offset)


def zsre_cases(
    records: Iterable[dict], limit: int | None = None, offset: int = 0, target: str = "answers", source: str = "records"
) -> Cases:
    """`zsre` on records in memory; see there."""
    if target not in ("answers", "alt"):
        raise ParameterError(near_misses(str(target), ("answers", "alt"), "ZsRE target"))
    layout = ({**_ZSRE, target: _NAMES if target == "answers" else _NAME}, partial(_mend, answer=target))
    return _collect(list(records), *layout, "zsre", source, limit, offset)


def _rome(record: dict, id: str) -> EditCase:
    rewrite, prompts = record["requested_rewrite"], record.get("generation_prompts") or ()
    subject, new, true = rewrite["subject"], rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    prompt = rewrite["prompt"].replace("{}", _template(str(subject), subject))
    neighbors = [(text, true) for text in record["neighborhood_prompts"]]
    generation = [Probe("generation", text, record.get("reference") or "") for text in prompts]
    return _case(id, prompt, subject, new, true, record["paraphrase_prompts"], neighbors, record, generation)


def _easyedit(record: dict, id: str) -> EditCase:
    subject, rephrased = record["subject"], record["rephrase_prompt"]
    paraphrases = [rephrased] if isinstance(rephrased, str) else rephrased
    neighbors = [(record["locality_prompt"], record["locality_ground_truth"])]
    prompt, new, true = _template(record["prompt"], subject), record["target_new"], record["ground_truth"]
    return _case(id, prompt, subject, new, true, paraphrases, neighbors, record)


def _mend(record: dict, id: str, answer: str) -> EditCase:
    target = record["alt"] if answer == "alt" else next(iter(record["answers"]), "")
    question = record["loc"] if record["loc"].rstrip().endswith(("?", "？", "؟")) else record["loc"].rstrip() + "?"
    prompt, neighbors = _template(record["src"], record["subject"]), [(question, record["loc_ans"])]
    return _case(id, prompt, record["subject"], target, None, [record["rephrase"]], neighbors, record)


def _template(prompt: str, subject: str | int) -> str:
    """The prompt with the subject's first occurrence as a whole word turned into "{}"; nothing else changes."""
    name = str(subject).strip()
    at = prompt.find(name)
    while name and at >= 0 and not _whole(prompt, at, at + len(name)):
        at = prompt.find(name, at + 1)
    if at < 0:
        raise RequestError("subject only inside other words" if name in prompt else "subject not in prompt")
    return prompt[:at] + "{}" + prompt[at + len(name) :] if name else prompt


def _whole(text: str, start: int, end: int) -> bool:
    """Whether no word reaches over the ends of text[start:end]. Any place may be one in a script that writes no blanks,
    or endings to a word, as Korean; but none before a mark that belongs to the character before it."""
    before, after = text[:start], text[end : end + 1]
    for outside, around in ((before[-1:], (before, text[start])), (after, (text[:end], after))):
        mark = outside in _JOINERS or unicodedata.category(outside or " ")[0] == "M"
        free = any(unspaced(part) or "HANGUL" in unicodedata.name(part[-1:] or " ", "") for part in around)
        if mark and outside is after or not free and (mark or outside.isalnum() or outside == "_"):
            return False
    return True


def _case(
    id: str, prompt: str, subject: str | int, target: str | int, true: str | int | None, paraphrases: list[str],
    neighbors: list[tuple[str, str | int]], record: dict, generation: Iterable[Probe] = ()
) -> EditCase:
    """The request and its probes. Where a true object is given they compare it with the target, else none compares."""
    target, true, seam = str(target), None if true is None else str(true), record.get("seam")
    request = EditRequest(prompt, str(subject), target, id, seam)
    if true is not None and true.strip() == request.target:
        raise RequestError("target equals truth")
    probes = (
        Probe("efficacy", request.text, target, true, seam),
        *(Probe("paraphrase", text, target, true, seam) for text in paraphrases),
        *(Probe("neighborhood", text, str(kept), None if true is None else target, seam) for text, kept in neighbors),
        *generation,
    )
    for probe in probes:
        if not probe.prompt.strip() or probe.kind != "generation" and (not probe.target or probe.rival == ""):
            raise RequestError(f"empty {probe.kind} probe")
    return EditCase(request, probes)


def _collect(
    records: list[dict], schema: dict[str, str], build: Callable[[dict, str], EditCase], format: str, source: str,
    limit: int | None, offset: int
) -> Cases:
    wanted = whole_number("offset", offset) + (len(records) if limit is None else whole_number("limit", limit))
    if wrong := _misfit(records[0], schema) if records else "missing; expected at least one":
        raise RequestError(f"{source}: record 0: {wrong}; {_next_step(records[:1], format)}")
    usable, skipped = [], []
    for index, record in enumerate(records):
        if len(usable) >= wanted:
            break
        given = record.get("case_id") if isinstance(record, dict) else None
        id = str(index if given is None or given != given or not str(given).strip() else given)  # NaN: an empty cell
        try:
            if wrong := _misfit(record, schema):
                raise RequestError(f"malformed: {wrong}")
            usable.append(build(record, id))
        except RequestError as error:
            skipped.append((str(error).partition(";")[0], id))
    counts, read = dict(Counter(reason for reason, _ in skipped)), len(skipped) + len(usable)
    if skipped:
        told = (source, len(skipped), read, counts, ", ".join(id for _, id in skipped[:9]) + ", …" * (len(skipped) > 9))
        logging.getLogger("metake").warning("%s: %d of %d records skipped: %s (case_id %s)", *told)
    return Cases(usable[offset:], format, source, counts, (id for _, id in skipped))


def _misfit(record: Any, schema: dict[str, str]) -> str:
    """The first field that does not have the expected shape, in words; "" if all do."""
    if not isinstance(record, dict):
        return f"is {type(record).__name__}; expected an object with {', '.join(map(repr, schema))}"
    for path, expected in schema.items():
        value: Any = record
        for name in path.rstrip("?").split("."):
            value = value.get(name) if isinstance(value, dict) else None
        kinds = {str, int} if "number" in expected else {str}
        many = isinstance(value, list) and {type(text) for text in value} <= kinds
        fits = many and expected not in (_TEXT, _NAME) or type(value) in kinds and expected not in (_TEXTS, _NAMES)
        if not fits and not (value is None and path.endswith("?")):
            return f"{path.rstrip('?')!r} {'missing' if value is None else f'is {value!r:.40}'}; expected {expected}"
    return ""


def _next_step(records: list, format: str) -> str:
    marks, other, layouts = {"requested_rewrite", "rephrase_prompt"}, "CounterFact", "MEND's"
    if format == "counterfact":
        marks, other, layouts = {"src"}, "ZsRE", "ROME's or EasyEdit's"
    if records and isinstance(records[0], dict) and marks & set(records[0]):
        return f"this looks like a {other} file: use {other.lower()}(...)."
    return f"convert it to {layouts} layout, or pass another file."


def _load(path: str | Path) -> list:
    try:
        found = list(_values(Path(path).read_text(encoding="utf-8-sig")))
        if len(found) != 1 or Path(path).suffix in (".jsonl", ".ndjson") and isinstance(found[0], dict):
            return found
        if isinstance(found[0], list):
            return found[0]
        raise ValueError(f"it holds {type(found[0]).__name__}")
    except (OSError, ValueError) as error:
        wanted = "one JSON list of records, or one record a line, in UTF-8: pass the path of such a file"
        told = f"{path}: cannot be read ({error}); expected {wanted}, or use facts() for the embedded set."
        raise RequestError(told) from error


def _values(text: str) -> Iterator[Any]:
    """The JSON values that stand in a text, one after the other."""
    at, blanks = 0, re.compile(r"[ \t\r\n]*")
    while (at := blanks.match(text, at).end()) < len(text):
        value, at = json.JSONDecoder().raw_decode(text, at)
        yield value
