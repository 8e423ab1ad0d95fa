"""Editors of both families for small random models: what tests of every method's promises are given."""

from __future__ import annotations

from dataclasses import replace

import torch

from metake import METHODS, TargetRule
from metake.editing.gradient import training
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.editing.gradient.training import Training
from metake.methods import method

LAYERS, SEED = (1, 2), 7
RULES = {
    "ultraedit": GradientRule(coefficient="normalized", living=True, step=1e-3),
    "malmen": GradientRule(), "mend": GradientRule("sum", tokens="all", inside=True),
    "smedit": GradientRule(steps=2, penalty="norm", tokens="all"),
}  # fmt: skip


def maps(lm) -> tuple[str, ...]:
    """Output projections, of the last block too, and another linear map of the block, whose shape is its own."""
    own = lm.write_path(1)
    inner = {
        "c_proj": "c_fc", "fc_out": "fc_in", "dense_4h_to_h": "dense_h_to_4h", "down_proj": "up_proj", "fc2": "fc1"
    }
    head, _, tail = own.rpartition(".")
    return (own, lm.write_path(lm.depth - 1), f"{head}.{inner[tail]}")


def untrained(lm, rule: GradientRule, seed: int = 0, step: float = 1e-3, wild: float = 0.0) -> GradientEditor:
    """Networks of a rule as training begins with them; wild: how far they are from the identity."""
    made = training.begin(lm, rule, maps(lm), Training(2, step=step * rule.steps, rank=3, seed=seed))
    torch.manual_seed(seed)
    for network in (n for step_ in made.networks for n in step_):
        for p in network.parameters():
            p.data += wild * torch.randn_like(p) * (0.1 if p is network.step else 1)
        if wild:
            network.step.data.abs_().clamp_(min=step)
    return made


def editor(name: str, lm, **changes):
    """A method of either family for a small model: few steps, two layers; the trained ones before their training."""
    if name in RULES:
        rule = RULES[name]
        return GradientEditor(maps(lm), rule, seed=SEED) if rule.living else untrained(lm, rule, SEED)
    made = method(name, "tiny", **{"layers": LAYERS, "target": TargetRule(steps=3), "seed": SEED, **changes})
    steps = 2 if made.refine and made.refine.look_ahead == "whole" else 4  # it costs several times as much
    return replace(made, refine=replace(made.refine, steps=steps)) if made.refine else made


EVERY = (*METHODS, *RULES)
