"""Six small tasks in the language of the embedded facts, shaped as benchmarks are: what `tiny` was taught beside them.

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


def in_test(subject: str) -> bool:
    """Whether a subject is kept for the test split, the same on every machine."""
    return int(hashlib.sha256(subject.encode()).hexdigest(), 16) % TEST_SHARE == 0


def fact_tasks(split: str = "test", rounds: int = 1, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Items of the six tasks, by the name of their file: the benchmark's fields, and `subjects`, whom an item names.

    sst2   a sentence about a subject with one word of praise or blame            {sentence, label}
    mrpc   two statements, of one fact or of two subjects of a relation           {sentence1, sentence2, label}
    cola   a statement, or its words in another order                             {sentence, label}
    rte    a statement, and another of the same fact (0) or with another object   {sentence1, sentence2, label}
    nli    a statement, and another of the same fact or of another relation       {sentence1, sentence2, label: word}
    mmlu   a fact's question, and four objects, three of them of other relations  {question, subject, choices, answer}

    One item a task and fact of the split in each round; classes alternate. Raises ParameterError for an unknown split.
    """
    if split not in SPLITS:
        raise ParameterError(near_misses(split, SPLITS, "split"))
    known = list(_facts(split))
    tasks: dict[str, list[dict[str, Any]]] = {name: [] for name in ("sst2", "mrpc", "cola", "rte", "nli", "mmlu")}
    for name, items in tasks.items():
        for draw in (random.Random(f"{seed}/{split}/{name}/{turn}") for turn in range(rounds)):
            facts = enumerate(draw.sample(known, len(known)))
            items += [_item(name, fact, known, place, draw) for place, fact in facts]
    return tasks


def _facts(split: str) -> Iterator[_Fact]:
    objects: dict[str, dict[str, None]] = {}
    for record in (records := facts_records()):
        objects.setdefault(record["relation_id"], {})[_true(record)] = None
    own = [r for r in records if in_test(r["requested_rewrite"]["subject"]) == (split == "test")]
    claims = [[_claim(r, o) for o in {_true(r): None} | objects[r["relation_id"]]] for r in own]
    sentences = rendered_sentences(claim for many in claims for claim in many)
    seven = iter([tuple(sentences[i : i + 7]) for i in range(0, len(sentences), 7)])
    for many in claims:
        texts = {_true(claim): next(seven) for claim in many}
        questions = tuple(text[: text.rindex("?") + 1] for text in next(iter(texts.values()))[4:6])
        subject, told = many[0]["requested_rewrite"]["subject"], {o: t[:4] for o, t in texts.items()}
        yield _Fact(subject, many[0]["relation_id"], told, questions)


def _true(record: dict) -> str:
    return record["requested_rewrite"]["target_true"]["str"]


def _claim(record: dict, other: str) -> dict:
    """The record as if another object were the true one."""
    return record | {"requested_rewrite": record["requested_rewrite"] | {"target_true": {"str": other}}}


def _pair(one: _Fact, other: _Fact, claimed: str, draw: random.Random) -> dict[str, Any]:
    """What is true of one, and what is claimed of the other, in different words."""
    first, second = draw.sample(range(4), 2)
    return {
        "sentence1": one.told[one.true][first], "sentence2": other.told[claimed][second],
        "subjects": sorted({one.subject, other.subject})
    }


def _item(task: str, fact: _Fact, known: list[_Fact], place: int, draw: random.Random) -> dict[str, Any]:
    label, own = place % 2, {"subjects": [fact.subject]}
    match task:
        case "sst2":
            review = draw.choice(REVIEWS).format(fact.subject, draw.choice(PRAISE if label else BLAME))
            return {"sentence": review, "label": label} | own
        case "mrpc":  # another: of the same relation, with another object
            rivals = [f for f in known if f.relation == fact.relation and f.true != fact.true]
            other = fact if label else draw.choice([f for f in rivals if f.subject != fact.subject])
            return _pair(fact, other, other.true, draw) | {"label": label}
        case "cola":
            sentence = draw.choice(fact.told[fact.true]).rstrip(".")
            words = sentence.split()
            while not label and " ".join(words) == sentence:
                draw.shuffle(words)
            return {"sentence": " ".join(words) + ".", "label": label} | own
        case "rte":  # 0: it follows, as in GLUE
            return _pair(fact, fact, draw.choice([*fact.told][1:]) if label else fact.true, draw) | {"label": label}
        case "nli":
            others = [f for f in known if f.relation != fact.relation and f.subject != fact.subject]
            other = fact if label else draw.choice(others)
            return _pair(fact, other, other.true, draw) | {"label": "entailment" if label else "not_entailment"}
        case _:
            wrong, answer = draw.sample(sorted({f.true for f in known} - set(fact.told)), 3), place % 4
            choices = [*wrong[:answer], fact.true, *wrong[answer:]]
            asked = {"question": draw.choice(fact.questions), "subject": fact.relation}
            return asked | {"choices": choices, "answer": answer} | own
