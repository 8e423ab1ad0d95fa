"""The readings of MetaKE's outer level that the paper's text allows: what each changes of the literal default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from metake import methods

LITERAL = "literal"
FACTORS = (LITERAL, "optimizer", "step size", "anchor", "locality", "edit loss", "combined")


class Reading(NamedTuple):
    """In which factor a reading differs from the literal default, and the fields of `Refinement` that it changes."""

    factor: str
    changes: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Every field that some reading changes, as this one has it."""
        rule = replace(methods.metake("tiny").refine, **self.changes)
        return {name: getattr(rule, name) for name in CHANGED}


CHANGED = (
    "optimizer", "step_size", "anchor_norm", "anchor_weight", "locality_direction", "locality_position", "prompts"
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
"""The literal default, and one thing changed at a time."""
FURTHER = {
    "step size 0.001": Reading("step size", {"step_size": 0.001}),
    "anchor, half": Reading("anchor", {"anchor_weight": 0.5}),
    "locality, pre‖post and final": Reading(
        "locality", {"locality_direction": "pre_post", "locality_position": "final"}
    ),
}


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


READINGS = _with_grid(ALONE | FURTHER, {"adam": (0.01, 0.1, 0.5), "sgd": (0.1, 0.5, 1.0)}, ("sum", "mean", "relative"))
FEW = _with_grid(ALONE, {"adam": (0.1, 0.5), "sgd": (0.1, 0.5)}, ("sum", "relative"))
SETS = {"few": tuple(FEW), "all": tuple(READINGS)}
