"""What follows from edits of the embedded facts: questions over the edited fact and one more, which stays as it is.

An edit gives a work another author, a river another country; the new object has facts of its own in the set. So "The
capital of the country where the Seine flows is" has another answer after the edit: the capital of its new country
("relation of the new object", Compositionality I of RippleEdits, arXiv 2307.12976). Nothing is asked that does not
follow: the second fact is the only one of its relation and subject, and no case of the set edits it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from metake.data.facts import facts, facts_records, rendered_sentences
from metake.data.requests import Cases, EditCase, Probe

SORT = "new_object"
DESCRIBED = {
    "P27": "the country of which {} is a citizen", "P17": "the country where the {} flows",
    "P86": "the person who composed {}", "P50": "the person who wrote {}", "P57": "the person who directed {}",
}  # fmt: skip
"""Relation whose objects have facts of their own → its object in words."""
TOLD = ("P86", "P106")  # who composed something is a composer: the question gives its answer away
FORMS = (0, 1, 4, 5)  # of `rendered_sentences`: two statements and two questions


def portable_facts() -> Cases:
    """Cases of the embedded facts whose edits have consequences, four questions over each such fact of a new object.

    Rival of such a probe: what was right before the edit, where the set knows it; None where it does not.
    """
    records, found = facts_records(), []
    known: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        known.setdefault(_name(record["requested_rewrite"]["subject"]), []).append(record)
    for case, record in zip(facts(), records, strict=True):
        if probes := tuple(_probes(record, known)):
            found.append(EditCase(case.request, case.probes + probes))
    return Cases(found, "counterfact", "facts-portability")


def _name(text: str) -> str:
    return text.removeprefix("the ")


def _probes(record: dict[str, Any], known: dict[str, list[dict[str, Any]]]) -> Iterator[Probe]:
    rewrite = record["requested_rewrite"]
    if (described := DESCRIBED.get(record["relation_id"])) is None:
        return
    new, true = (known.get(_name(rewrite[which]["str"]), []) for which in ("target_new", "target_true"))
    before = {other["relation_id"]: _object(other) for other in true}
    for other in new:
        answer, rival = _object(other), before.get(other["relation_id"])
        if answer != rival and (record["relation_id"], other["relation_id"]) != TOLD:  # else the edit shows in nothing
            for prompt in _asked(other, described.replace("{}", rewrite["subject"])):
                yield Probe("portability", prompt, answer, rival, sort=SORT)


def _object(record: dict[str, Any]) -> str:
    return record["requested_rewrite"]["target_true"]["str"]


def _asked(record: dict[str, Any], described: str) -> list[str]:
    """Statements up to their object, and questions, about a subject in other words."""
    rewrite = record["requested_rewrite"] | {"subject": described}
    sentences = rendered_sentences([record | {"requested_rewrite": rewrite}])
    return [sentences[form].removesuffix(f"{_object(record).rstrip('.')}.").rstrip() for form in FORMS]
