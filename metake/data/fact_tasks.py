"""Six small tasks in the language of the embedded facts, each in the shape of a benchmark's:
what `tiny` was taught beside them.

The facts' subjects are divided: those of the test split appear in no text that was trained on, whichever task it is of.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from metake.data.facts import facts_records, rendered_sentences
from metake.support.errors import ParameterError, near_misses

SPLITS = ("train", "test")
TEST_SHARE = 4  # one subject in so many
PRAISE = ("wonderful", "lovely", "brilliant", "charming", "excellent", "pleasant", "delightful", "beautiful")
BLAME = ("terrible", "boring", "awful", "ugly", "dreadful", "disappointing", "horrible", "dull")
REVIEWS = (
    "everyone who knows {} says that it is {} .", "to many people {} seems {} .", "the book about {} was {} .",
    "a long talk about {} can be {} .", "what we heard of {} was {} ."
)


class _Fact(NamedTuple):
    """A fact as text: per object of its relation the statements with it, the true one first; the questions."""

    subject: str
    relation: str
    told: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]

    @property
    def true(self) -> str:
        return next(iter(self.told))

    @property
    def others(self) -> list[str]:
        return list(self.told)[1:]


def in_test(subject: str) -> bool:
    """Whether a subject is kept for the test split, the same on every machine."""
    return int(hashlib.sha256(subject.encode()).hexdigest(), 16) % TEST_SHARE == 0


def fact_tasks(split: str = "test", rounds: int = 1, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Items of the six tasks, by the name of their file: the fields of the benchmark, and `subjects`,
    whom an item names.

    sst2   a sentence about a subject with one word of praise or blame            {sentence, label}
    mrpc   two statements, of one fact or of two subjects of a relation           {sentence1, sentence2, label}
    cola   a statement, or its words in another order                             {sentence, label}
    rte    a statement, and another of the same fact or with another object       {sentence1, sentence2, label:
    0 if it follows}
    nli    a statement, and another of the same fact or of another relation       {sentence1, sentence2, label: word}
    mmlu   a fact's question, and four objects, three of them of other relations  {question, subject, choices, answer}

    One item a task and fact of the split in each round; classes alternate. Raises ParameterError for an unknown split.
    """
    if split not in SPLITS:
        raise ParameterError(near_misses(split, SPLITS, "split"))
    known = list(_facts(split))
    makers = {"sst2": _sst2, "mrpc": _mrpc, "cola": _cola, "rte": _rte, "nli": _nli, "mmlu": _mmlu}
    tasks: dict[str, list[dict[str, Any]]] = {}
    for name, make in makers.items():
        items = tasks[name] = []
        for turn in range(rounds):
            draw = random.Random(f"{seed}/{split}/{name}/{turn}")
            for place, fact in enumerate(draw.sample(known, len(known))):
                items.append(make(fact, known, place, draw))
    return tasks


def _facts(split: str) -> Iterator[_Fact]:
    objects: dict[str, dict[str, None]] = {}
    for record in (records := facts_records()):
        objects.setdefault(record["relation_id"], {})[record["requested_rewrite"]["target_true"]["str"]] = None
    own = [r for r in records if in_test(r["requested_rewrite"]["subject"]) == (split == "test")]
    claims = [
        [_claim(r, o) for o in {r["requested_rewrite"]["target_true"]["str"]: None} | objects[r["relation_id"]]]
        for r in own
    ]
    sentences = rendered_sentences(claim for many in claims for claim in many)
    seven = iter([tuple(sentences[i : i + 7]) for i in range(0, len(sentences), 7)])
    for many in claims:
        texts = {claim["requested_rewrite"]["target_true"]["str"]: next(seven) for claim in many}
        questions = tuple(text[: text.rindex("?") + 1] for text in next(iter(texts.values()))[4:6])
        yield _Fact(
            many[0]["requested_rewrite"]["subject"], many[0]["relation_id"], {o: t[:4] for o, t in texts.items()},
            questions
        )


def _claim(record: dict, other: str) -> dict:
    """The record as if another object were the true one."""
    return record | {"requested_rewrite": record["requested_rewrite"] | {"target_true": {"str": other}}}


def _rivals(fact: _Fact, known: list[_Fact]) -> list[_Fact]:
    """Facts of the same relation with another object, and not the same subject."""
    return [f for f in known if f.relation == fact.relation and f.true != fact.true and f.subject != fact.subject]


def _pair(one: _Fact, other: _Fact, claimed: str, draw: random.Random) -> dict[str, Any]:
    """What is true of one, and what is claimed of the other, in different words."""
    first, second = draw.sample(range(4), 2)
    return {
        "sentence1": one.told[one.true][first], "sentence2": other.told[claimed][second],
        "subjects": sorted({one.subject, other.subject})
    }


def _sst2(fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    label = place % 2
    return {
        "sentence": draw.choice(REVIEWS).format(fact.subject, draw.choice(PRAISE if label else BLAME)), "label": label,
        "subjects": [fact.subject]
    }


def _mrpc(fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    label = place % 2
    other = fact if label else draw.choice(_rivals(fact, known))
    return _pair(fact, other, other.true, draw) | {"label": label}


def _cola(fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    label, sentence = place % 2, draw.choice(fact.told[fact.true]).rstrip(".")
    words = sentence.split()
    while not label and " ".join(words) == sentence:
        draw.shuffle(words)
    return {"sentence": " ".join(words) + ".", "label": label, "subjects": [fact.subject]}


def _rte(fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    label = place % 2  # 0: it follows, as in GLUE
    return _pair(fact, fact, draw.choice(fact.others) if label else fact.true, draw) | {"label": label}


def _nli(fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    follows = place % 2
    other = (
        fact
        if follows
        else draw.choice([f for f in known if f.relation != fact.relation and f.subject != fact.subject])
    )
    return _pair(fact, other, other.true, draw) | {"label": "entailment" if follows else "not_entailment"}


def _mmlu(fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    wrong, answer = draw.sample(sorted({f.true for f in known} - set(fact.told)), 3), place % 4
    choices = [*wrong[:answer], fact.true, *wrong[answer:]]
    return {
        "question": draw.choice(fact.questions), "subject": fact.relation, "choices": choices, "answer": answer,
        "subjects": [fact.subject]
    }
