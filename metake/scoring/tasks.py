"""Six tasks of general ability: their prompts, and how an answer is read (AlphaEdit's `glue_eval`; MetaKE v3 §6.5,
App. C.4).

Two readings. "parity" is the published harness to the letter, for curves beside published ones. "corrected", the
default, mends what is a mistake there and nothing else:

labels     RTE: GLUE's label 0 says that the second sentence follows, but the harness counts "True" as label 1
spacing    CoLA: its prompt ends in a blank, after which most tokenizers cannot write an ordinary word
answers    the harness looks for its words anywhere ("no" in "not", MMLU's "a"); here the first whole word counts
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from metake.data.fact_tasks import fact_tasks
from metake.data.files import packaged
from metake.support.errors import ParameterError, near_misses

READINGS = ("corrected", "parity")
INVALID = -1


class Task(NamedTuple):
    """One task. Classes are 0, 1, …: what `classes[i]` says.

    form: the prompt, with the item's fields in braces; order: of the classes, as the harness looks for them; cue: its
    answer is the text after the last of it, "": the new text; paper: the metric that MetaKE v3 App. C.4 names for it.
    """

    name: str
    file: str
    form: str
    classes: tuple[str, ...]
    order: tuple[int, ...]
    cue: str
    paper: str

    def prompt(self, item: Mapping[str, Any], reading: str = "corrected") -> str:
        """The question as text. Raises ParameterError if the item lacks a field."""
        try:
            found = self.form.format_map(item)
        except (KeyError, IndexError, TypeError) as error:
            raise ParameterError(
                f"an item of {self.name} lacks {error}; found the fields {', '.join(item)}; its prompt is {self.form!r}"
            ) from error
        return found if reading == "parity" else found.rstrip(" ")

    def label(self, item: Mapping[str, Any], reading: str = "corrected") -> int:
        """The class that is right. Raises ParameterError for a label that is none of the task's."""
        found = item.get("answer" if self.file == "mmlu" else "label")
        if self.file == "nli":
            found = {"entailment": 1, "not_entailment": 0}.get(found, found)
        if isinstance(found, str) and found.isdigit():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < len(self.classes):
            wanted = f"expected one of {len(self.classes)} classes, from 0 on"
            raise ParameterError(f"an item of {self.name} has the label {found!r}; {wanted}")
        return 1 - found if self.file == "rte" and reading == "corrected" else found

    def read(self, prompt: str, written: str, reading: str = "corrected") -> int:
        """The class that a generated answer names, or INVALID."""
        if reading == "corrected":
            words = {word.lower(): i for i, word in enumerate(self.classes)}
            found = re.search(rf"\b({'|'.join(words)})\b", written.lower())
            return words[found[1]] if found else INVALID
        text = ((prompt + written).split(self.cue)[-1] if self.cue else written).lower()
        words = [self.classes[i].lower() + ("" if self.cue else "\n") for i in range(len(self.classes))]
        return next((i for i in self.order if words[i] in text), INVALID)


TASKS: dict[str, Task] = {
    file: Task(file=file, **entry | {"classes": tuple(entry["classes"]), "order": tuple(entry["order"])})
    for file, entry in tomllib.loads(packaged("tasks.toml")).items()
}
"""By the name of their file. "NLI" is RTE's training set, as the harness has it."""


def task(name: str) -> Task:
    """A task by the name of its file, or by its own. Raises ParameterError, with near matches, for an unknown one."""
    found = {t.name: t for t in TASKS.values()} | TASKS
    if name not in found:
        raise ParameterError(near_misses(name, TASKS, "task"))
    return found[name]


def lessons(rounds: int = 1, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """The small tasks' train split as text, by task: prompts, and the right answers with the blank before them."""
    drawn = [(TASKS[name], items) for name, items in fact_tasks("train", rounds, seed).items()]
    return {t.file: [(t.prompt(item), f" {t.classes[t.label(item)]}") for item in items] for t, items in drawn}
