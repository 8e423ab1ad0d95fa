"""Readers of the files that hold cases: CounterFact and ZsRE, in the layouts in which they are published."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from metake.data.requests import Cases, EditCase, EditRequest, Probe, whole_number
from metake.support.errors import ParameterError, RequestError, near_misses

# How a record is laid out: dotted path → what stands there; a "?" at the end marks a field that may be absent.
_TEXT, _TEXTS, _EITHER = "a string", "a list of strings", "a string or a list of strings"
_ROME = {
    "requested_rewrite.prompt": _TEXT, "requested_rewrite.subject": _TEXT, "requested_rewrite.target_new.str": _TEXT,
    "requested_rewrite.target_true.str": _TEXT, "paraphrase_prompts": _TEXTS, "neighborhood_prompts": _TEXTS,
    "generation_prompts?": _TEXTS, "reference?": _TEXT
}
_EASYEDIT = {
    "prompt": _TEXT, "subject": _TEXT, "target_new": _TEXT, "ground_truth": _TEXT, "rephrase_prompt": _EITHER,
    "locality_prompt": _TEXT, "locality_ground_truth": _TEXT
}
_ZSRE = {"src": _TEXT, "subject": _TEXT, "rephrase": _TEXT, "loc": _TEXT, "loc_ans": _TEXT}


def counterfact(path: str | Path, limit: int | None = None, offset: int = 0) -> Cases:
    """Cases of a CounterFact file: ROME's layout (also MultiCounterFact) or EasyEdit's, told from its first record.

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
    layout = ({**_ZSRE, target: _TEXTS if target == "answers" else _TEXT}, partial(_mend, answer=target))
    return _collect(list(records), *layout, "zsre", source, limit, offset)


def _rome(record: dict, id: str) -> EditCase:
    rewrite, prompts = record["requested_rewrite"], record.get("generation_prompts") or ()
    new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    return _case(
        id, rewrite["prompt"], rewrite["subject"], new, true, record["paraphrase_prompts"],
        [(prompt, true) for prompt in record["neighborhood_prompts"]],
        [Probe("generation", prompt, record.get("reference") or "") for prompt in prompts]
    )


def _easyedit(record: dict, id: str) -> EditCase:
    subject, rephrased = record["subject"], record["rephrase_prompt"]
    return _case(
        id, _template(record["prompt"], subject), subject, record["target_new"], record["ground_truth"],
        [rephrased] if isinstance(rephrased, str) else rephrased,
        [(record["locality_prompt"], record["locality_ground_truth"])]
    )


def _mend(record: dict, id: str, answer: str) -> EditCase:
    target = record["alt"] if answer == "alt" else next(iter(record["answers"]), "")
    question = record["loc"] if record["loc"].endswith("?") else record["loc"] + "?"
    return _case(
        id, _template(record["src"], record["subject"]), record["subject"], target, None, [record["rephrase"]],
        [(question, record["loc_ans"])]
    )


def _template(prompt: str, subject: str) -> str:
    """The prompt with the subject's first occurrence, matched exactly, turned into "{}"."""
    if subject not in prompt:
        raise RequestError("subject not in prompt")
    return prompt.replace(subject, "{}", 1) if subject.strip() else prompt


def _case(
    id: str,
    prompt: str,
    subject: str,
    target: str,
    true: str | None,
    paraphrases: list[str],
    neighbors: list[tuple[str, str]],
    generation: Iterable[Probe] = (),
) -> EditCase:
    """The request and its probes. Where a true object is given they compare it with the target, else none compares."""
    request = EditRequest(prompt, subject, target, id)
    if true is not None and true.strip() == request.target:
        raise RequestError("target equals truth")
    probes = (
        Probe("efficacy", request.text, target, true),
        *(Probe("paraphrase", text, target, true) for text in paraphrases),
        *(Probe("neighborhood", text, kept, None if true is None else target) for text, kept in neighbors),
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
        id = str(record.get("case_id", index) if isinstance(record, dict) else index)
        try:
            if wrong := _misfit(record, schema):
                raise RequestError(f"malformed: {wrong}")
            usable.append(build(record, id))
        except RequestError as error:
            skipped.append((str(error).partition(";")[0], id))
    counts, read = dict(Counter(reason for reason, _ in skipped)), len(skipped) + len(usable)
    if skipped:
        logging.getLogger("metake").warning("%s: %d of %d records skipped: %s", source, len(skipped), read, counts)
    return Cases(usable[offset:], format, source, counts, (id for _, id in skipped))


def _misfit(record: Any, schema: dict[str, str]) -> str:
    """The first field that does not have the expected shape, in words; "" if all do."""
    if not isinstance(record, dict):
        return f"is {type(record).__name__}; expected an object with {', '.join(map(repr, schema))}"
    for path, expected in schema.items():
        value: Any = record
        for name in path.rstrip("?").split("."):
            value = value.get(name) if isinstance(value, dict) else None
        texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        fits = isinstance(value, str) and expected != _TEXTS or texts and expected != _TEXT
        if not fits and not (value is None and path.endswith("?")):
            return f"{path.rstrip('?')!r} {'missing' if value is None else f'is {value!r:.40}'}; expected {expected}"
    return ""


def _next_step(records: list, format: str) -> str:
    marks, other, layouts = (
        ({"src"}, "ZsRE", "ROME's or EasyEdit's")
        if format == "counterfact"
        else ({"requested_rewrite", "rephrase_prompt"}, "CounterFact", "MEND's")
    )
    if records and isinstance(records[0], dict) and marks & set(records[0]):
        return f"this looks like a {other} file: use {other.lower()}(...)."
    return f"convert it to {layouts} layout, or pass another file."


def _load(path: str | Path) -> list:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(found, list):
            return found
        raise ValueError(f"it holds {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path}: cannot be read ({error}); expected one JSON list of records, in UTF-8: "
            "pass the path of such a file, or use facts() for the embedded set."
        ) from error
