"""Readers of the files that hold cases, in the layouts in which they are published: one table, `layouts.toml`."""

from __future__ import annotations

import json
import logging
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

from metake.data.requests import Cases, EditCase, EditRequest, Probe, unspaced, whole_number
from metake.support.errors import ParameterError, RequestError, near_misses

_JOINERS = ("\u200c", "\u200d")  # zero-width, inside words
_QUESTIONS = ("?", "？", "؟")
_STEP = re.compile(r"(.*?)(\[[?*]?\])?(\??)")  # of a path: a name, whether it holds a list, whether it may be absent
_SHAPES = {"": "a {0}", "[]": "a list of {1}", "[?]": "a {0} or a list of {1}", "[*]": "{1}, in lists or not"}
_TEXT, _NAME = ("string", "strings"), ("string or a whole number", "strings or whole numbers")


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
    Returns Cases. Probes of a record: 1 efficacy, 1 paraphrase, 1 neighborhood (an unrelated question), no rivals; in
            EasyEdit's files 1 portability, one hop further.
    Raises  RequestError as `counterfact` does; ParameterError if target is another word.
    """
    return zsre_cases(_load(path), limit, offset, target, source=str(path))


def dataset(path: str | Path, layout: str | None = None, limit: int | None = None, offset: int = 0) -> Cases:
    """Cases of a file in any layout that is known (`layouts.toml`), told from its first record.

    layout: "mquake", "knowedit", "rippleedits", "bizsre" (edited in English, asked in both languages), "bizsre-zh" (in
            Chinese), "wikibigedit", "rome", "easyedit", "zsre", "zsre-alt", or "lines" of one's own: {"prompt": "The
            capital of {} is", "subject": "France", "target": "Rome"}, and if wished "id", "true", "seam",
            "paraphrases": [text], "generation": [text], "neighborhood" and "portability": [{"prompt", "target"}], each
            if wished with "sort", one word, and "aliases", other names of the target
    Returns Cases; several edits of a record are one case. Probes of kind "portability" ask what follows from the edit:
            by "alias" of the subject, "inverse" relation, "one_hop", "several_hops", relation of the "new_object", in
            the "other_language"; neighborhoods have sorts too. Without a true object nothing is compared: a probe's
            score is the share of its target's tokens (ZsRE's protocol). A question without an answer is not asked.
    Arguments, errors and skipped records otherwise as of `counterfact`; ParameterError for an unknown layout.
    """
    if layout is not None and layout not in _layouts():
        raise ParameterError(near_misses(str(layout), _layouts(), "layout"))
    return _cases(_load(path), [layout] if layout else [*_layouts()][::-1], limit, offset, str(path))


def counterfact_cases(
    records: Iterable[dict], limit: int | None = None, offset: int = 0, source: str = "records"
) -> Cases:
    """`counterfact` on records in memory; see there."""
    return _cases(list(records), ["rome", "easyedit"], limit, offset, source)


def zsre_cases(
    records: Iterable[dict], limit: int | None = None, offset: int = 0, target: str = "answers", source: str = "records"
) -> Cases:
    """`zsre` on records in memory; see there."""
    if target not in (targets := {"answers": "zsre", "alt": "zsre-alt"}):
        raise ParameterError(near_misses(str(target), targets, "ZsRE target"))
    return _cases(list(records), [targets[target]], limit, offset, source)


@cache
def _layouts() -> dict[str, dict[str, Any]]:
    return tomllib.loads(packaged("layouts.toml"))


def packaged(name: str) -> str:
    """The text of a file that comes with the package, from its folder `data`."""
    return resources.files("metake").joinpath("data", name).read_text(encoding="utf-8")


def _fields(layout: dict) -> Iterator[tuple[str, bool]]:
    """Every field of a layout as a path from the record on, and whether numbers may be there: names such as 1984."""
    for part in (layout["edit"], *layout["probes"]):
        named = ("subject", "target", "true", "aliases") if part.get("kind") != "generation" else ()
        for role in ("prompt", "subject", "target", "true", "aliases", "sorts"):
            if role in part:
                yield ".".join(filter(None, (part.get("at"), part[role]))), role in named
    yield "seam?", False


def _walk(value: Any, path: str | None, said: str = "") -> Iterator[tuple[str, Any, str]]:
    """What stands at a path: where, the value (None: missing) and how many are due. Nothing where it may be absent."""
    if not path:
        return
    step, _, rest = path.partition(".")
    name, many, free = _STEP.fullmatch(step).groups()
    found, said = value.get(name) if isinstance(value, dict) else None, f"{said}.{name}".lstrip(".")
    if found is None and free:
        return
    if not rest or many and not isinstance(found, list):
        yield said, found, many or ""
    else:
        for item in found if many else [found]:
            yield from _walk(item, rest, said)


def _texts(value: Any) -> list[str]:
    """The strings and numbers in lists and objects of any depth, in order."""
    if isinstance(value, list | dict):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _texts(item)]
    return [] if value is None else [str(value)]


def _at(record: Any, path: str | None) -> list[str]:
    return [text for _, value, _ in _walk(record, path) for text in _texts(value)]


def _each(record: dict, at: str | None) -> list[Any]:
    """What the paths of a part begin at."""
    found = [value for _, value, _ in _walk(record, at)] if at else [record]
    return [item for value in found for item in (value if isinstance(value, list) else [value])]


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


def _case(record: dict, id: str, layout: dict) -> EditCase:
    """Its requests and its probes. Where a true object is given they compare it with the target, else none compares."""
    edit, seam, requests, probes = layout["edit"], record.get("seam"), [], []
    for number, one in enumerate(_each(record, edit.get("at"))):
        roles = ("prompt", "subject", "target", "true")
        text, subject, target, true = (next(iter(_at(one, edit.get(role))), None) for role in roles)
        if subject is None:
            raise RequestError("subject not told by other sentences of its relation")
        text = _template(text, subject) if "filled" in edit else text.replace("{}", _template(subject, subject))
        requests.append(request := EditRequest(text, subject, target or "", f"{id}/{number}" if number else id, seam))
        if true is not None and true.strip() == request.target:
            raise RequestError("target equals truth")
        probes.append(Probe("efficacy", request.text, request.target, true, seam))
    if not requests:
        raise RequestError("no edit")
    rivals = {} if true is None else {"paraphrase": true, "neighborhood": target}
    for part in layout["probes"]:
        for one in _each(record, part.get("at")):
            probes += _probes(one, part, requests[0], rivals.get(part["kind"]), {p.prompt for p in probes})
    for probe in probes:
        if not probe.prompt.strip() or probe.kind != "generation" and (not probe.target or probe.rival == ""):
            raise RequestError(f"empty {probe.kind} probe")
    return EditCase(requests[0], tuple(probes), tuple(requests[1:]))


def _probes(item: dict, part: dict, request: EditRequest, rival: str | None, asked: set[str]) -> Iterator[Probe]:
    kind, sort = part["kind"], part.get("sort") or "".join(_at(item, part.get("sorts")))
    answers = [*dict.fromkeys(_at(item, part.get("target")) + _at(item, part.get("aliases")))]
    if "[*]" in part.get("target", "") and not (answers := [a for a in answers if a.strip()]):
        return
    target, *aliases = answers or ["" if "target" in part else request.target]
    for text in _at(item, part["prompt"]):
        if "ending" in part and not text.rstrip().endswith(_QUESTIONS):
            text = text.rstrip() + part["ending"]
        if kind != "portability" or text not in asked:  # a chain goes over the edited fact, which is asked already
            seam = None if kind == "generation" else request.seam
            yield Probe(kind, text, target, rival, seam, sort, tuple(aliases))


def _cases(records: list, known: Sequence[str], limit: int | None, offset: int, source: str) -> Cases:
    """Cases of records in one of these layouts; where the first record fits none it is refused as of the first."""
    first = records[0] if records and isinstance(records[0], dict) else {}
    fits = [name for name, layout in _layouts().items() if first.keys() >= {*layout["marks"]}]
    name = next((name for name in fits if name in known), known[0])
    layout, reader = _layouts()[name], _layouts()[name]["reader"]
    wanted = whole_number("offset", offset) + (len(records) if limit is None else whole_number("limit", limit))
    if wrong := _misfit(records[0], layout) if records else "missing; expected at least one":
        step = f"convert it to the layout of {layout['told']}, or pass another file."
        for other in (_layouts()[f] for f in fits[:1] if _layouts()[f]["reader"] != reader):
            step = f"this looks like a {other['told']} file: use {other['reader']}(...)."
        raise RequestError(f"{source}: record 0: {wrong}; {step}")
    records = _taken_apart(records, layout) if name == "rippleedits" else records
    usable, skipped = [], []
    for index, record in enumerate(records):
        if len(usable) >= wanted:
            break
        given = record.get(layout.get("id", "case_id")) if isinstance(record, dict) else None
        id = str(index if given is None or given != given or not str(given).strip() else given)  # NaN: an empty cell
        try:
            if wrong := _misfit(record, layout):
                raise RequestError(f"malformed: {wrong}")
            usable.append(_case(record, id, layout))
        except RequestError as error:
            skipped.append((str(error).partition(";")[0], id))
    counts, read = dict(Counter(reason for reason, _ in skipped)), len(skipped) + len(usable)
    if skipped:
        told = (source, len(skipped), read, counts, ", ".join(id for _, id in skipped[:9]) + ", …" * (len(skipped) > 9))
        logging.getLogger("metake").warning("%s: %d of %d records skipped: %s (case_id %s)", *told)
    format = name if reader == "dataset" else reader
    return Cases(usable[offset:], format, source, counts, (id for _, id in skipped))


def _misfit(record: Any, layout: dict) -> str:
    """The first field that does not have the expected shape, in words; "" if all do."""
    if not isinstance(record, dict):
        return f"is {type(record).__name__}; expected an object with {', '.join(repr(p) for p, _ in _fields(layout))}"
    for path, named in _fields(layout):
        for said, value, many in _walk(record, path):
            kinds = {str, int} if named else {str}
            listed = isinstance(value, list) and many in ("[]", "[?]") and {type(text) for text in value} <= kinds
            deep = many == "[*]" and isinstance(value, list)
            if not listed and not deep and not (many != "[]" and type(value) in kinds):
                expected = _SHAPES[many].format(*(_NAME if named else _TEXT))
                return f"{said!r} {'missing' if value is None else f'is {value!r:.40}'}; expected {expected}"
    return ""


def _taken_apart(records: list, layout: dict) -> list:
    """RippleEdits' records with subject and target of their edit, of which they have only the sentence.

    The words with which all prompts of a relation begin and end are the relation's: between them stands the subject,
    after them, in an edit's sentence, the target. It takes prompts about three subjects.
    """
    prompts: dict[str, dict[str, list[str]]] = {}
    for query in (query for r in records for part in layout["probes"] for query in _each(r, part["at"])):
        if isinstance(query, dict) and not query.get("phrase"):
            relation, subject, text = (str(query.get(name)) for name in ("relation", "subject_id", "prompt"))
            prompts.setdefault(relation, {})[subject] = text.split(" ")
    found = []
    for record in records:
        sentence, relation = (("".join(_at(record, f"edit.{name}"))) for name in ("prompt", "relation"))
        own = [*prompts.get(relation, {}).values()]
        opening, ending = "".join(f"{word} " for word in _common(own)), _common([words[::-1] for words in own])[::-1]
        subject, told, target = sentence.removeprefix(opening).partition(" ".join(["", *ending, ""]))
        if len(own) >= 3 and ending and sentence.startswith(opening) and told:
            parts = {"prompt": " ".join([f"{opening}{{}}", *ending]), "subject": subject}
            record = record | {"edit": record["edit"] | parts | {"target": target.removesuffix(".")}}
        found.append(record)
    return found


def _common(rows: Iterable[Sequence[str]]) -> list[str]:
    """The words with which all rows begin."""
    return [words[0] for words in takewhile(lambda words: len({*words}) == 1, zip(*rows, strict=False))]


def _load(path: str | Path) -> list:
    from metake.support.storage import reading  # loads torch, for which a list of layouts does not wait

    wanted = "one JSON list of records, or one record a line, in UTF-8: pass the path of such a file"
    with reading(path, "cannot be read", f"expected {wanted}, or use facts() for the embedded set", RequestError):
        found = list(_values(Path(path).read_text(encoding="utf-8-sig")))
        if len(found) != 1 or Path(path).suffix in (".jsonl", ".ndjson") and isinstance(found[0], dict):
            return found
        if isinstance(found[0], list):
            return found[0]
        raise ValueError(f"it holds {type(found[0]).__name__}")


def _values(text: str) -> Iterator[Any]:
    """The JSON values that stand in a text, one after the other."""
    at, blanks = 0, re.compile(r"[ \t\r\n]*")
    while (at := blanks.match(text, at).end()) < len(text):
        value, at = json.JSONDecoder().raw_decode(text, at)
        yield value
