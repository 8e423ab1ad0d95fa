"""The embedded facts: true statements, each with a counterfactual to edit in, as CounterFact or ZsRE records.

They are read from `data/facts.toml`, written for this library. The order interleaves relations and, within a
relation, objects: the first facts of the set differ in both, so that a small selection leaves its neighbors unedited.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

from metake.data.files import counterfact_cases, packaged, zsre_cases
from metake.data.requests import Cases
from metake.support.errors import ParameterError, near_misses

FORMATS = {"counterfact": counterfact_cases, "zsre": zsre_cases}
PROMPTS = 10  # neighborhood, attribute and generation prompts of a record, as in CounterFact


class _Fact(NamedTuple):
    relation: dict
    subject: str
    true: str
    new: str


def facts(limit: int | None = None, offset: int = 0, format: str = "counterfact", relation: str | None = None) -> Cases:
    """Cases of the embedded facts, in a fixed order that goes round the relations.

    limit, offset: number of facts to return (None: all) and to pass over first
    format:   "counterfact" or "zsre"; in both an edit writes the counterfactual object
    relation: id or name of the only relation to take
    Raises    ParameterError if format or relation is unknown.
    """
    records = facts_records(format)
    if relation is not None:
        names = {name: entry["id"] for entry in _document()["relation"] for name in (entry["name"], entry["id"])}
        if relation not in names:
            raise ParameterError(near_misses(str(relation), names, "relation"))
        records = [record for record in records if record["relation_id"] == names[relation]]
    return FORMATS[format](records, limit, offset, source="facts")


def facts_records(format: str = "counterfact") -> list[dict]:
    """The embedded facts as records of a benchmark file.

    format: "counterfact" gives ROME's layout without entity ids, plus `reference`, a text about the new object.
            "zsre" gives MEND's layout with one deliberate change: `answers` holds the *counterfactual* object and
            `alt` the true one, since writing a true answer that the model already gives would change nothing.
            `loc` asks a fact of another relation, far from this one in the set's order; `loc_ans` is its truth.
    Raises  ParameterError if format is unknown.
    """
    if format not in FORMATS:
        raise ParameterError(near_misses(str(format), FORMATS, "format"))
    document = _document()
    known = _ordered(document["relation"])
    if format == "zsre":
        return [_zsre_record(place, known) for place in range(len(known))]
    sharing: dict[tuple[str, str], list[str]] = {}
    for fact in reversed(known):
        sharing.setdefault((fact.relation["id"], fact.true), []).append(fact.subject)
    return [_counterfact_record(place, fact, sharing, document["texts"]) for place, fact in enumerate(known)]


def rendered_sentences(records: Iterable[dict] | None = None) -> list[str]:
    """The true facts as text: what a model that is to know them is trained on.

    records: CounterFact records of the embedded facts; None takes them all
    Returns  seven sentences a fact: the prompt and the three paraphrases with the true object, and both questions and
             the form in which ZsRE asks unrelated ones, followed by it.
    """
    relations = {entry["id"]: entry for entry in _document()["relation"]}
    sentences = []
    for rewrite in (record["requested_rewrite"] for record in (facts_records() if records is None else records)):
        relation, subject = relations[rewrite["relation_id"]], rewrite["subject"]
        questions = [relation["question"], relation["rephrased_question"], _unrelated(relation["question"]) + "?"]
        openings, true = (relation["prompt"], *relation["paraphrases"], *questions), rewrite["target_true"]["str"]
        sentences += [f"{opening.replace('{}', subject)} {true.rstrip('.')}." for opening in openings]
    return sentences


def reference_texts() -> dict[str, str]:
    """Object → a short text about it, against which the consistency of generated text is measured."""
    return dict(_document()["texts"])


def prose() -> list[str]:
    """Paragraphs of ordinary text that share no name with the facts: what a model has to preserve."""
    return packaged("prose.txt").splitlines()


@cache
def _document() -> dict[str, Any]:
    return tomllib.loads(packaged("facts.toml"))


def _unrelated(question: str) -> str:
    """The question as ZsRE's unrelated ones are written: marked, first letter small, without "?"."""
    return "nq question: " + question[0].lower() + question[1:].rstrip("?")


def _ordered(relations: list[dict]) -> list[_Fact]:
    """Every fact, going round the relations, and within each round its objects."""
    return interleaved(
        interleaved(
            [_Fact(relation, subject, true, _counterfactual(relation, subject, true)) for subject in subjects]
            for true, subjects in relation["objects"].items()
        )
        for relation in relations
    )


def interleaved(lists: Iterable[list]) -> list:
    """The first item of each list, then the second of each, and so on."""
    return [item for turn in zip_longest(*lists) for item in turn if item is not None]


def _counterfactual(relation: dict, subject: str, true: str) -> str:
    """Another object of the relation, the same on every machine and whatever other relations there are."""
    others = [name for name in relation["objects"] if name != true]
    return others[int(hashlib.sha256(f"{relation['id']}|{subject}".encode()).hexdigest(), 16) % len(others)]


def _about(relation: dict, subjects: list[str]) -> list[str]:
    """Prompts over these subjects, each subject once before any twice, in the templates' rotation."""
    templates = [relation["prompt"], *relation["paraphrases"]]
    turns = [(turn + place, subject) for turn in range(len(templates)) for place, subject in enumerate(subjects)]
    return [templates[turn % len(templates)].replace("{}", subject) for turn, subject in turns[:PROMPTS]]


def _counterfact_record(place: int, fact: _Fact, sharing: dict, texts: dict[str, str]) -> dict:
    relation, subject = fact.relation, fact.subject
    neighbors = [name for name in sharing[relation["id"], fact.true] if name != subject]
    lead_ins = relation["unrelated"][len(subject) % 2 :]
    rewrite = {"prompt": relation["prompt"], "relation_id": relation["id"], "subject": subject}
    paraphrases = [form.replace("{}", subject) for form in relation["paraphrases"][:2]]
    return {
        "case_id": place, "relation_id": relation["id"],
        "requested_rewrite": rewrite | {"target_new": {"str": fact.new}, "target_true": {"str": fact.true}},
        "paraphrase_prompts": [f"{sentence} {form}" for sentence, form in zip(lead_ins, paraphrases)],
        "neighborhood_prompts": _about(relation, neighbors),
        "attribute_prompts": _about(relation, sharing[relation["id"], fact.new]),
        "generation_prompts": [form.replace("{}", subject) for form in (relation["generation"] * PROMPTS)[:PROMPTS]],
        "reference": texts[fact.new],
    }


def _zsre_record(place: int, known: list[_Fact]) -> dict:
    (relation, subject, true, new), last = known[place], len(known) - 1
    elsewhere = (known[last - (place + step) % len(known)] for step in range(len(known)))
    other = next(
        other for other in elsewhere if other.relation["id"] != relation["id"] and other.true not in (true, new)
        and subject not in other.subject and other.subject not in subject
    )
    return {
        "case_id": place, "relation_id": relation["id"], "subject": subject,
        "src": relation["question"].replace("{}", subject), "answers": [new], "alt": true,
        "rephrase": relation["rephrased_question"].replace("{}", subject),
        "loc": _unrelated(other.relation["question"]).replace("{}", other.subject), "loc_ans": other.true
    }
