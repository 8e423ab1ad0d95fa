"""A model of one's own, which has no recipe: whose numbers it takes, and which layers are edited."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from metake.editing.recipes import BORROWED, CHOSEN, recipe


@contextlib.contextmanager
def borrowed(model: str, like: str | None = None, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within the block `model` has the recipe of `like`, "default" for what most models share, and these edited layers:
    ROME and EMMET take the middle one, BLUE the first and the last. Without either nothing changes.
    """
    if not (like or layers):
        yield
        return
    found = replace(recipe(like or model), names=(model,))
    if layers:
        chosen = sorted({*layers})
        own = {"layers": chosen, "rome_layer": chosen[len(chosen) // 2], "blue_layers": sorted({chosen[0], chosen[-1]})}
        found = replace(found, numbers=found.numbers | own, sources=found.sources | dict.fromkeys(own, CHOSEN))
    token = BORROWED.set(found)
    try:
        yield
    finally:
        BORROWED.reset(token)


def borrowing(model: str) -> dict[str, Any]:
    """What of a model's recipe is borrowed now: "recipe", whose it is, and the chosen "layers"; {} if it is its own."""
    now = BORROWED.get()
    if not now or now.names != (model,):
        return {}
    return {"recipe": now.model, "layers": list(now.layers) if now.sources["layers"] == CHOSEN else None}
