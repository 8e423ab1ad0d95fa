"""Edit requests, the probes that only an evaluator may see, and batches of them; `files` reads them."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from metake.support.errors import ParameterError, RequestError, near_misses

KINDS = ("efficacy", "paraphrase", "neighborhood", "portability", "generation")
_UNSPACED = ("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE ", "TAI ", "NEW TAI ")
# fields that digests of before do not know: left out where they say nothing
_LATER = {"seam": None, "frame": "{}", "sort": "", "aliases": ()}


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One change asked of a model, and all that an editor may see.

    prompt:  text with one "{}" where the subject stands: "The mother tongue of {} is"
    subject: "Danielle Darrieux"
    target:  the continuation to be written, "English"; surrounding space is dropped, as it is from the subject
    id:      how records and messages name the request
    seam:    what stands between prompt and target, to the letter: "" or " "; None: the rule of `language.tokens.seam`
    frame:   text around the prompt, which stands at its "{}": a chat's turns. Context templates stand inside it
    Raises   RequestError if prompt or frame has no "{}" or several, or a field is blank, no string or no Unicode.
    """

    prompt: str
    subject: str
    target: str
    id: str
    seam: str | None = None
    frame: str = "{}"

    def __post_init__(self) -> None:
        require_text(*(texts := (self.prompt, self.subject, self.target, self.id, self.frame)), seam=self.seam)
        if not all(isinstance(text, str) for text in texts):
            flaw = "not all strings"
        elif not (self.subject.strip() and self.target.strip()):
            flaw = f"empty {'target' if self.subject.strip() else 'subject'}"
        else:
            places = self.prompt.count("{}") * self.frame.count("{}")
            flaw = ("no placeholder", "", "several placeholders")[min(places, 2)]
        if flaw:
            wanted = "one {} in the prompt, and a subject and a target that are not blank"
            example = '"The capital of {} is", "France", "Rome"'
            raise RequestError(f"{flaw}; found {self!r}; expected {wanted}: write it as {example}.")
        for name in ("subject", "target"):  # a blank at the subject's end would be looked up in its place
            object.__setattr__(self, name, getattr(self, name).strip())

    @property
    def text(self) -> str:
        """All that the model reads before the target: the prompt with the subject filled in, in its frame."""
        return self.frame.replace("{}", self.prompt.replace("{}", self.subject))


@dataclass(frozen=True, slots=True)
class Probe:
    """One question to the edited model.

    kind:   "efficacy", "paraphrase", "neighborhood", "portability" (what follows from the edit) or "generation"
    prompt: full text, the subject filled in
    target: the continuation asked for, surrounding space dropped; for "generation" a reference text or ""
    rival:  the probe succeeds if p(target) > p(rival), strictly (CounterFact);
            None scores the arg-max accuracy of the target's tokens (ZsRE)
    seam:   as an `EditRequest` has it
    sort:   a word within the kind, by which it is also counted: "alias", "several_hops"; see `files.dataset`
    aliases: other names of the target, any of which a free answer may give
    Raises  RequestError if the kind is another word, the sort no word, the seam another blank, or a text no Unicode.
    """

    kind: str
    prompt: str
    target: str = ""
    rival: str | None = None
    seam: str | None = None
    sort: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(near_misses(str(self.kind), KINDS, "probe kind"))
        if self.sort and not self.sort.isidentifier():
            raise RequestError(f"sort is {self.sort!r}; expected one word, such as one_hop: join its words by _.")
        require_text(self.prompt, self.target, self.rival, *self.aliases, seam=self.seam)
        object.__setattr__(self, "target", self.target.strip())
        object.__setattr__(self, "rival", self.rival and self.rival.strip())


class EditCase(NamedTuple):
    """A request, and what only the evaluator may see; more: requests that are made with it, as several hops need."""

    request: EditRequest
    probes: tuple[Probe, ...]
    more: tuple[EditRequest, ...] = ()

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All that the case asks to be edited."""
        return (self.request, *self.more)

    def after(self, text: str) -> EditCase:
        """The case whose questions stand after a text, within a chat's turn; what is edited stays."""
        head = self.request.frame.partition("{}")[0]
        probes = (replace(p, prompt=f"{head}{text}{p.prompt.removeprefix(head)}") for p in self.probes)
        return self._replace(probes=tuple(probes))


def in_prompt(cases: Iterable[EditCase], beside: int = 0) -> list[EditCase]:
    """Cases whose every question stands after the facts that the case would edit, told as sentences: the baseline that
    changes no weight (RippleEdits' in-context editing). `evaluate` the unedited model on them.

    beside: facts of so many of the next cases told before them, which have nothing to do with the question.
    Raises ParameterError if there are not so many.
    """
    if not 0 <= beside < len(cases := list(cases)):
        raise ParameterError(f"{beside} facts beside a case's own; expected at most {len(cases) - 1}: ask for fewer.")
    facts = [
        "".join(f"{r.prompt.replace('{}', r.subject)} {r.target.rstrip('.')}. " for r in c.requests) for c in cases
    ]
    told = ("".join((facts + facts)[i : i + beside + 1][::-1]) for i in range(len(cases)))
    return [case.after(text) for case, text in zip(cases, told, strict=True)]


class Cases(list):
    """A list of `EditCase` that knows where it came from. Slices keep the type.

    format:  "counterfact", "zsre" or the name of another layout; `source` is the path of the file, "facts" or "records"
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
        parts = (([*told(c.request).values()], c.probes, [[*told(r).values()] for r in c.more]) for c in self)
        content = [[first, [[*told(p).values()] for p in probes], *more] for first, probes, more in parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def told(item: EditRequest | Probe) -> dict[str, Any]:
    """The fields of a request or probe as digests see them: an optional one only where it says something."""
    values = {name: getattr(item, name) for name in item.__slots__}
    return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}


def require_text(*texts: Any, seam: str | None = None) -> None:
    """Raises RequestError for half a character, which no tokenizer takes, and for a seam that is none."""
    if seam not in (None, "", " "):
        raise RequestError(f"unknown seam {seam!r}; expected '' or ' ' between prompt and target: choose one, or none.")
    for half in filter(None, (re.search("[\ud800-\udfff]", text) for text in texts if isinstance(text, str))):
        raise RequestError(
            f"text with an unpaired surrogate or stray byte; found {half[0]!r} at character {half.start()} of "
            f"{half.string!r:.200}; expected Unicode: write the text anew, in UTF-8."
        )


def unspaced(text: str) -> bool:
    """Whether a text ends in a script that writes no blanks between words, such as Chinese, Japanese or Thai."""
    wide = unicodedata.east_asian_width
    last = next((c for c in reversed(text) if wide(c) in "WFH" or unicodedata.category(c)[0] not in "MCP"), " ")
    name = "" if unicodedata.category(last) in ("So", "Sc") else unicodedata.name(last, "")
    return name.startswith(_UNSPACED) or wide(last) in "WFH" and name != "" and "HANGUL" not in name


def check_batch(requests: Iterable[EditRequest]) -> None:
    """Raises RequestError naming both if two requests of one batch share prompt and subject, or an id."""
    seen: dict[str, EditRequest] = {}
    ids: dict[str, EditRequest] = {}
    for request in requests:
        if (other := ids.setdefault(request.id, request)) is not request and other.text != request.text:
            what = f"{request.text!r} and {other.text!r} both have the id {request.id!r}"
            raise RequestError(f"{what}; expected an id of its own for each: records are kept by it.")
        if other := seen.get(request.text):
            what = "is a duplicate of" if other.target == request.target else "contradicts"
            both = f"{request.text!r} → {request.target!r} and {other.target!r}"
            told = f"request {request.id!r} {what} request {other.id!r}: {both}"
            raise RequestError(f"{told}; expected every prompt once: drop one.")
        seen[request.text] = request


def batches(requests: Iterable, size: int) -> Iterator[list]:
    """Consecutive batches of `size` requests; the last may be shorter. Raises ParameterError if size < 1."""
    whole_number("size", size, least=1)
    items = requests if isinstance(requests, list) else list(requests)
    return (items[start : start + size] for start in range(0, len(items), size))


def whole_number(name: str, value: int, least: int = 0) -> int:
    """The value. Raises ParameterError if it is no whole number, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ParameterError(f"{name} is {value!r}; expected a whole number of at least {least}: change {name}.")
    return value
