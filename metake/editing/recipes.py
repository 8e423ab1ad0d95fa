"""Recipes: every number of every model with its source, read from `recipes.toml`."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
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


_BORROWED: ContextVar[tuple[str, Recipe, dict[str, Any]] | None] = ContextVar("borrowed recipe", default=None)


@contextlib.contextmanager
def borrowed(model: str, like: str | None = None, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block `model` has the recipe of `like`, "default" for what most models share, and these edited layers:
    ROME and EMMET take the middle one, BLUE the first and the last. Without either nothing changes.
    """
    found = recipe(like or model) if like or layers else None
    if found and layers:
        chosen = sorted({*layers})
        own = {"layers": chosen, "rome_layer": chosen[len(chosen) // 2], "blue_layers": sorted({chosen[0], chosen[-1]})}
        found = replace(found, numbers=found.numbers | own)
    told = {"recipe": like, "layers": sorted({*layers}) if layers else None}
    token = _BORROWED.set((model, found, told) if found else _BORROWED.get())
    try:
        yield
    finally:
        _BORROWED.reset(token)


def borrowing(model: str) -> dict[str, Any]:
    """What of a model's recipe is borrowed now: "recipe", whose it is, and "layers"; {} if it is its own."""
    now = _BORROWED.get()
    return now[2] if now and now[0] == model else {}


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

    Raises ParameterError, with near matches, if there is none: take a known model's of the same family, see `borrowed`.
    """
    if borrowing(model):
        return _BORROWED.get()[1]
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
