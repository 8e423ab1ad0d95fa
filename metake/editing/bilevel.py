"""MetaKE's outer level: refine the planned targets by looking ahead at the edit they will become (v3 Algorithm 1).

    repeat T times    V ← V − η · optimizer(∇_V F)                       eqs 7, 9, 82
    keep              the best V of those that were tried

F is the objective of `outer`: virtually edited at the last layer through its frozen gate, or, in `downstream`, at all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from metake.data.requests import EditRequest
from metake.editing.downstream import Downstream, StageTwo
from metake.editing.outer import CHOICES, LastLayer, OuterObjective, Refinement
from metake.editing.targets import Targets
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.support.errors import NumericalError
from metake.support.machine import halving
from metake.support.progress import progress

log = logging.getLogger(__name__)


@LanguageModel.entry(gradients=True)
def refine(
    lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], targets: Targets,
    through: Tensor | StageTwo, rule: Refinement = Refinement()
) -> Targets:
    """Targets refined by `rule.steps` look-ahead iterations on the virtually edited model.

    min_V Σᵢ L_edit,i + L_loc,i + L_reg,i  at  W̃_L = W_L + (V − H) M      (MetaKE v3 eqs 7–9, 79–82), or after all of
    Stage II      (eq. 84)

    requests: or their rows, if they are made; targets: Stage I's, planted at layer L; through: (n, d_in) frozen M of
    layer L on the live model, or the `StageTwo` that the whole look-ahead passes through.
    Returns Targets with the same anchor and the refined plan; `trace` gains under "refine" the outer losses of V_init
    and of every plan that was tried, under "refined" F before and after (weighted) and which of them was kept.
    Logs a warning if F fell for less than half of the requests.
    Raises NumericalError if a loss is not finite. The model is not changed.
    Cost: `steps` + 1 forwards and `steps` backwards of the objective: see `LastLayer` and `Downstream`.
    """
    if not len(requests) or not rule.steps:
        return targets
    rows = Rows.of(lm.tokenizer, requests, contexts)
    made = Downstream if isinstance(through, StageTwo) else LastLayer
    return halving(
        lambda few: _descend(made(lm, rows, contexts, targets, through, replace(rule, tokens=few)), targets),
        min(rule.tokens, lm.room(lm.depth - targets.layer, gradients=True)), lm.fitted
    )


def _descend(outer: OuterObjective, targets: Targets) -> Targets:
    """From the initial plan down; the plan that is kept."""
    rule, value = outer.rule, outer.initial.clone().requires_grad_()
    history: list[Tensor] = []
    best, kept, least = outer.initial, 0, torch.inf

    def tried() -> Tensor:
        """F of V as it stands, which is noted; its gradient, where gradients are on."""
        nonlocal best, kept, least
        if len(history) > rule.steps:
            raise _Enough
        value.grad = None
        history.append(outer.losses(value))
        told = (total := (history[-1] @ outer.weights).sum()).item()  # what a step reads of the device
        if bad := [] if math.isfinite(told) else (~history[-1].isfinite().all(1)).nonzero()[:, 0].tolist():
            raise NumericalError(
                f"the refinement loss of request(s) {bad} is not finite at step {len(history) - 1}; try a smaller "
                "step_size"
            )
        if rule.keep == "last" or told < least:
            best, kept, least = value.detach().clone(), len(history) - 1, told
        return total

    optimizer = CHOICES["optimizer"][rule.optimizer]([value], lr=rule.step_size)
    if rule.optimizer == "lbfgs":  # a line search tries as many plans as it needs: it is ended from inside
        many = 100 * rule.steps
        optimizer.param_groups[0].update(max_iter=many, max_eval=many, line_search_fn="strong_wolfe")
        with suppress(_Enough):
            optimizer.step(tried)
    else:
        for _ in progress(range(rule.steps), "refine"):
            optimizer.step(tried)
        with torch.no_grad():
            tried()
    planned = targets.planned + (best - outer.initial).double()
    return replace(targets, planned=planned, trace=_traced(targets, torch.stack(history), outer.weights, kept))


class _Enough(Exception):
    """As many plans as were asked for have been tried; never leaves this module."""


def _traced(targets: Targets, history: Tensor, weights: Tensor, kept: int) -> tuple[dict, ...]:
    """Each request's trace with its outer losses; history: (steps + 1, n, 3)."""
    losses, before, after = history.tolist(), (history[0] @ weights).tolist(), (history[kept] @ weights).tolist()
    fell = sum(b < a for a, b in zip(before, after, strict=True))
    if 2 * fell < len(before):
        log.warning(
            "the refinement lowered the outer loss for %d of %d requests only: its step size or anchor do not suit "
            "this model; see metake.Refinement", fell, len(before)
        )
    names = ("edit", "locality", "anchor")
    return tuple(
        old | {
            "refine": [dict(zip(names, step[i], strict=True)) for step in losses],
            "refined": {"before": before[i], "after": after[i], "kept": kept},
        }
        for i, old in enumerate(targets.trace or [{}] * len(before))
    )  # fmt: skip
