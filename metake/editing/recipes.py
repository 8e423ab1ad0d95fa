"""Recipes: every number of every model with its source, read from `recipes.toml`."""

from __future__ import annotations

import tomllib
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from metake.support.errors import ParameterError, near_misses


@dataclass(frozen=True)
class Recipe:
    """The numbers of one model; attributes are the names in `recipes.toml`, e.g. `recipe("gpt2-xl").layers`."""

    model: str
    numbers: dict[str, Any] = field(repr=False)
    sources: dict[str, str] = field(repr=False)  # name → key of the source
    names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        numbers = self.__dict__.get("numbers", {})
        if name in numbers:
            return tuple(value) if isinstance(value := numbers[name], list) else value
        raise AttributeError(near_misses(name, numbers, "number of a recipe"))


CHOSEN = "chosen"  # the source of layers that a user has named
BORROWED: ContextVar[Recipe | None] = ContextVar("borrowed", default=None)  # in a block of `experiments.borrowed`


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("metake").joinpath("recipes.toml").read_text(encoding="utf-8"))


def source(key: str) -> str:
    """The full text of a source's key."""
    return _table()["sources"][key]


def models() -> tuple[str, ...]:
    """Names of all models that have a recipe."""
    return tuple(k for k in _table() if k not in ("sources", "default"))


def recipe(model: str) -> Recipe:
    """The recipe of a model by its name, its hub name, or the last part of a path.

    Raises ParameterError, with near matches, if there is none: take a known model's of the same family, see
    `experiments.borrowed`.
    """
    if (own := BORROWED.get()) and own.names == (model,):
        return own
    table = _table()
    wanted = {model.lower(), PurePath(model).name.lower()}
    for name in ("default",) if model == "default" else models():
        names = tuple(table[name].get("names", ()))
        if wanted & {part.lower() for alias in (name, *names) for part in (alias, PurePath(alias).name)}:
            entries = table["default"] | {k: v for k, v in table[name].items() if k != "names"}
            return Recipe(name, {k: v[0] for k, v in entries.items()}, {k: v[1] for k, v in entries.items()}, names)
    raise ParameterError(
        near_misses(model, models(), "model of a recipe")
        + " For a model of your own, pass the name of the closest one and override layers=…; on the command line "
        "--recipe NAME --layers N …, which metake layers finds."
    )
