"""The readings of MetaKE's outer level that the paper's text allows: what each changes of the literal one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from metake import methods
from metake.editing.outer import Refinement

LITERAL = "literal"
FACTORS = (LITERAL, "optimizer", "step size", "anchor", "locality", "edit loss", "combined")


class Reading(NamedTuple):
    """In which factor a reading differs from the literal one, and the fields of `Refinement` that it changes."""

    factor: str
    changes: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Every field that some reading changes, as this one has it."""
        return {name: getattr(self.rule("tiny"), name) for name in CHANGED}

    def rule(self, model: str) -> Refinement:
        """The whole rule on a model."""
        return replace(methods.method("metake/literal", model).refine, keep="best", **self.changes)


CHANGED = (
    "optimizer", "step_size", "anchor_norm", "locality_direction", "locality_position", "prompts"
)
LEVELS = {"optimizer": ("adam", "sgd"), "step_size": (0.1, 0.5), "anchor_norm": ("sum", "relative")}
"""Of the small factorial design: two of each factor, in all eight combinations."""
ALONE = {
    LITERAL: Reading(LITERAL, {}),
    "plain gradient": Reading("optimizer", {"optimizer": "sgd"}),
    "step size 0.01": Reading("step size", {"step_size": 0.01}),
    "step size 0.5": Reading("step size", {"step_size": 0.5}),
    "anchor, mean": Reading("anchor", {"anchor_norm": "mean"}),
    "anchor, relative": Reading("anchor", {"anchor_norm": "relative"}),
    "locality, pre‖post": Reading("locality", {"locality_direction": "pre_post"}),
    "locality, final token": Reading("locality", {"locality_position": "final"}),
    "edit loss, plain prompt": Reading("edit loss", {"prompts": "plain"}),
}
"""The literal reading, and one thing changed at a time."""
GRID = {"adam": (0.01, 0.1, 0.5), "sgd": (0.1, 0.5, 1.0)}
NORMS = ("sum", "mean", "relative")
AROUND = {
    ", plain prompt": {"prompts": "plain"},
    ", eq. 98": {"locality_direction": "pre_post", "locality_position": "final"},
    ", plain prompt, eq. 98": {
        "prompts": "plain", "locality_direction": "pre_post", "locality_position": "final"
    },
}
"""Where the outer level's own equations say otherwise than Stage I: the prompts (eq. 97) and the drift (eq. 98)."""


def _with_grid(
    table: dict[str, Reading], steps: Mapping[str, Sequence[float]], norms: Sequence[str]
) -> dict[str, Reading]:
    """`table` and every combination of optimizer, step size and anchor normalization that is not in it; by factor."""
    titles, found = {"adam": "Adam", "sgd": "plain"}, dict(table)
    for optimizer, norm in product(steps, norms):
        for step in steps[optimizer]:
            new = Reading("combined", {"optimizer": optimizer, "step_size": step, "anchor_norm": norm})
            if new.settings not in [old.settings for old in table.values()]:
                found[f"{titles[optimizer]} {step:g}, {norm}"] = new
    return {name: found[name] for name in sorted(found, key=lambda name: FACTORS.index(found[name].factor))}


def _around(table: dict[str, Reading]) -> dict[str, Reading]:
    """`table` and every reading of the grid with the prompts and the drift as the outer level's equations have them."""
    known, found = [reading.settings for reading in table.values()], dict(table)
    for name, reading in table.items():
        for words, changes in AROUND.items() if reading.factor not in ("locality", "edit loss") else ():
            new = Reading("combined", reading.changes | changes)
            if new.settings not in known:
                found[name + words] = new
    return found


ONCE = _with_grid(ALONE, GRID, NORMS)
FEW = _with_grid(ALONE, {"adam": (0.1, 0.5), "sgd": (0.1, 0.5)}, ("sum", "relative"))
READINGS = _around(ONCE)
WORDS = AROUND[", plain prompt, eq. 98"]
SETS = {
    "few": tuple(FEW), "all": tuple(READINGS),
    "words": tuple(n for n, r in READINGS.items() if all(r.settings[k] == v for k, v in WORDS.items())),
}
"""Some readings, all, or those with prompts and drift in the equations' words."""


def around(name: str) -> list[str]:
    """The readings that differ from this one in the prompts or the drift alone."""
    own = READINGS[name].settings
    return [
        other
        for other, reading in READINGS.items()
        if other != name and all(reading.settings[k] == v for k, v in own.items() if k not in WORDS)
        and (reading.settings["locality_direction"] == "pre_post") == (reading.settings["locality_position"] == "final")
    ]


def departures(name: str) -> int:
    """In how many places a reading departs from the words of eqs 79–82, 97 and 98.

    Optimizer and step size do not count: the two versions of the paper disagree in the one, the other is lost.
    """
    words = {"anchor_norm": "sum"} | WORDS
    return sum(READINGS[name].settings[field] != value for field, value in words.items())
