"""Which methods are trained, how, and which linear maps of a model they edit; where the finished ones are found."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.editing.gradient.stored import read
from metake.editing.gradient.training import Training
from metake.editing.recipes import recipe
from metake.support.errors import ParameterError, near_misses

TRAINED: dict[str, tuple[GradientRule, Training]] = {
    "malmen": (GradientRule(), Training()),
    "mend": (GradientRule("sum", inside=True), Training(1, 100, accumulate=10, rate=3e-4)),
    "smedit": (GradientRule(steps=2, penalty="norm"), Training()),
}
"""The methods that are trained: what tells them apart, and how."""
SHIPPED = files("metake") / "data" / "editors"
SHIPPED_RANK = 12  # of their networks: a fifth of the size of the default


def maps(name: str, model: str) -> tuple[str, ...]:
    """The linear maps that a method of the gradient family edits."""
    found = getattr(recipe(model), f"{name}_modules")
    return tuple(path.format(i) for path, first, last in found for i in range(first, last + 1))


def trained(name: str, model: str, editor: str | None) -> GradientEditor:
    """The editor in a folder; by default the one that is shipped. Raises ParameterError if there is none."""
    folder = Path(editor) if editor else SHIPPED / f"{recipe(model).model}-{name}"
    if not folder.is_dir():
        raise ParameterError(
            f"no trained editor of {name} for {model!r}; make one with: metake train {name} --model {model} --out DIR, "
            "and pass editor=DIR (--editor DIR)"
        )
    return read(folder)


def to_train(name: str, model: str, **changes: Any) -> tuple[GradientRule, tuple[str, ...], Training]:
    """What the training of a method begins with: its rule, the linear maps that it edits, and how it is trained.

    changes: of the training. Raises ParameterError for a method that is not trained, or a model of which nobody has
    said which linear maps to edit.
    """
    if name not in TRAINED:
        raise ParameterError(near_misses(name, TRAINED, "method that is trained"))
    rule, training = TRAINED[name]
    tokens = "all" if name == "mend" else recipe(model).gradient_tokens
    if not (modules := maps(name, model)):
        raise ParameterError(
            f"nobody has said which linear maps of {model!r} {name} edits; give the recipe {name}_modules, or name "
            "them to metake.train(lm, cases, rule, modules)"
        )
    return replace(rule, tokens=tokens), modules, replace(training, **changes)
