"""Edit requests, the probes that only an evaluator may see, and readers of the files that hold them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metake.support.errors import ParameterError, RequestError, near_misses

KINDS = ("efficacy", "paraphrase", "neighborhood", "generation")


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One change asked of a model, and all that an editor may see.

    prompt:  text with one "{}" where the subject stands: "The mother tongue of {} is"
    subject: "Danielle Darrieux"
    target:  the continuation to be written, "English"; surrounding space is dropped, as it is from the subject
    id:      how records and messages name the request
    Raises   RequestError if the prompt has no "{}" or several, or a field is blank or no string.
    """

    prompt: str
    subject: str
    target: str
    id: str

    def __post_init__(self) -> None:
        flaw = (
            "not all strings"
            if not all(isinstance(text, str) for text in astuple(self))
            else "empty subject"
            if not self.subject.strip()
            else "empty target"
            if not self.target.strip()
            else {0: "no placeholder", 1: ""}.get(self.prompt.count("{}"), "several placeholders")
        )
        if flaw:
            raise RequestError(
                f"{flaw}; found {self!r}; expected one {{}} in the prompt, and a subject and a target "
                'that are not blank: write it as "The capital of {} is", "France", "Rome".'
            )
        for name in ("subject", "target"):  # a blank at the subject's end would be looked up in its place
            object.__setattr__(self, name, getattr(self, name).strip())

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True, slots=True)
class Probe:
    """One question to the edited model.

    kind:   "efficacy", "paraphrase", "neighborhood" or "generation"
    prompt: full text, the subject filled in
    target: the continuation asked for, surrounding space dropped; for "generation" a reference text or ""
    rival:  the probe succeeds if p(target) > p(rival), strictly (CounterFact);
            None scores the arg-max accuracy of the target's tokens (ZsRE)
    Raises  RequestError if the kind is another word.
    """

    kind: str
    prompt: str
    target: str = ""
    rival: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(near_misses(str(self.kind), KINDS, "probe kind"))
        object.__setattr__(self, "target", self.target.strip())
        object.__setattr__(self, "rival", self.rival and self.rival.strip())


class EditCase(NamedTuple):
    """A request, and what only the evaluator may see."""

    request: EditRequest
    probes: tuple[Probe, ...]


class Cases(list):
    """A list of `EditCase` that knows where it came from. Slices keep the type.

    format:  "counterfact" or "zsre"; `source` is the path of the file, "facts" or "records"
    skipped: reason → number of records read but not used; `skipped_ids` are their ids, in the order of the file
    """

    def __init__(
        self, cases: Iterable[EditCase] = (), format: str = "", source: str = "", skipped: dict[str, int] | None = None,
        skipped_ids: Iterable[str] = ()
    ) -> None:
        super().__init__(cases)
        self.format, self.source = format, source
        self.skipped, self.skipped_ids = dict(skipped or {}), tuple(skipped_ids)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        slot = not isinstance(index, slice)
        return found if slot else Cases(found, self.format, self.source, self.skipped, self.skipped_ids)

    def __repr__(self) -> str:
        return f"Cases({len(self)} of {self.format}, source={self.source!r}, skipped={self.skipped})"

    @property
    def digest(self) -> str:
        """SHA-256 of every request and probe in the list, in order; independent of path and layout of the file."""
        content = [[astuple(case.request), [astuple(probe) for probe in case.probes]] for case in self]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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


def check_batch(requests: Iterable[EditRequest]) -> None:
    """Raises RequestError naming both if two requests of one batch share prompt and subject, or an id."""
    seen: dict[str, EditRequest] = {}
    ids: dict[str, EditRequest] = {}
    for request in requests:
        if (other := ids.setdefault(request.id, request)) is not request and other.text != request.text:
            raise RequestError(
                f"{request.text!r} and {other.text!r} both have the id {request.id!r}; expected an id of its own "
                "for each: records are kept by it."
            )
        if other := seen.get(request.text):
            what = "is a duplicate of" if other.target == request.target else "contradicts"
            raise RequestError(
                f"request {request.id!r} {what} request {other.id!r}: {request.text!r} → "
                f"{request.target!r} and {other.target!r}; expected every prompt once: drop one."
            )
        seen[request.text] = request


def batches(requests: Iterable, size: int) -> Iterator[list]:
    """Consecutive batches of `size` requests; the last may be shorter. Raises ParameterError if size < 1."""
    _whole("size", size, least=1)
    items = requests if isinstance(requests, list) else list(requests)
    return (items[start : start + size] for start in range(0, len(items), size))


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
    wanted = _whole("offset", offset) + (len(records) if limit is None else _whole("limit", limit))
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


def _whole(name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ParameterError(f"{name} is {value!r}; expected a whole number of at least {least}: change {name}.")
    return value
