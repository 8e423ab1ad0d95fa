"""One batch of edits by several editors from the same unedited model: what each request planned, what was realized of it, and
what came of it. The pages on the ablation, the open readings, the hyper-parameters and the realized residual read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake.editor import Editor, EditorState
from metake.errors import ParameterError
from metake.evaluation import Evaluation, evaluate
from metake.keys import KeyReader
from metake.model import LanguageModel, load
from metake.requests import Cases
from metake.runs import read_cases, select
from metake.solve import association, attenuation
from metake.statistics import Statistics, statistics
from metake.targets import Targets, optimize_targets
from metake.update import Edit

FORMATS = {"CounterFact format": "facts", "ZsRE format": "facts-zsre"}


class _Batch(NamedTuple):
    """The same for every editor: the model, its statistics and the cases before any edit; Stage I's targets as they are made."""

    lm: LanguageModel
    statistics: Statistics
    cases: Cases
    before: Evaluation
    plans: dict[Any, Targets]


def study(
    model: str, editors: Mapping[str, Editor], data: Mapping[str, str] | None = None, edits: int = 20, seeds: Sequence[int] = (0,), text: str = "embedded", text_tokens: int | None = None
) -> pd.DataFrame:
    """Every editor on the same batch of `edits` requests of each data set, for each seed, which draws the requests.

    One row per data set, seed, editor ("method") and request: the metrics of `Evaluation.records` as shares, and at the last
    edited layer, by ‖·‖ and ⟨·,·⟩ over the residual stream:

    gamma, beta      γ and β = γ/(1+γ) under the editor's own metric, before any edit          (MetaKE v3 eqs 111–112, 116)
    planned          ‖v − h‖;  moved: ‖v − v_init‖ / ‖v_init − h‖, what the refinement changed
    beta_layer       ⟨Δ k, r⟩ / ‖r‖², the last layer's own share r of the plan                 (eqs 113–115)
    beta_initial     ⟨Δ k, r⟩ / ‖r‖² with r the share that v_init would have left to this layer
    whole, whole_initial   ⟨h_after − h, v − h⟩ / ‖v − h‖², all layers' work, against the plan and against v_init

    Editors that plan alike share Stage I. The model is restored after each edit.
    """
    lm = load(model)
    given = statistics(lm, text, layers=sorted({layer for e in editors.values() for layer in e.layers}), tokens=text_tokens)
    rows = []
    for name, source in (data or FORMATS).items():
        for seed in seeds:
            cases = select(lm, read_cases(source), edits, seed)
            batch = _Batch(lm, given, cases, evaluate(lm, cases), {})
            for method, editor in editors.items():
                rows += [{"dataset": name, "seed": seed, "method": method} | row for row in _one(batch, editor)]
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = {"edits": edits, "seeds": list(seeds)}
    return frame


def _one(batch: _Batch, editor: Editor) -> list[dict[str, Any]]:
    lm, requests = batch.lm, [c.request for c in batch.cases]
    state = editor.init(lm, batch.statistics)
    plan = _plan(batch, editor, state)
    edit, _ = editor.step(lm, requests, state, planned=plan)
    measured = _realized(lm, editor, state, requests, edit, plan)
    with edit.applied(lm):
        scores = evaluate(lm, batch.cases, before=batch.before).records()
    return [score | {name: value.item() for name, value in zip(measured, values, strict=True)} for score, *values in zip(scores, *measured.values(), strict=True)]


def _plan(batch: _Batch, editor: Editor, state: EditorState) -> Targets:
    key = editor.plan_key(state)
    if key is None:
        raise ParameterError("a study compares editors with one plan a request; found one with its own targets at each layer, or one request at a time")
    if key not in batch.plans:
        batch.plans[key] = optimize_targets(batch.lm, [c.request for c in batch.cases], state.contexts, editor.layers[-1], editor.target)
    return batch.plans[key]


def _realized(lm: LanguageModel, editor: Editor, state: EditorState, requests: Sequence[Any], edit: Edit, plan: Targets) -> dict[str, Tensor]:
    layer, count = editor.layers[-1], len(editor.layers)
    reader = KeyReader(lm, requests, state.contexts, layer, flat=editor.context_rule.flat, site="block" if editor.target.site == "block" else "mlp")
    gamma = association(reader.read(layer).keys, state.metrics[layer])
    value = plan.anchor + edit.updates[0].left.T / editor.allocation(0, count)  # the first layer still sees h itself
    with edit.applied(lm):
        after = KeyReader(lm, requests, state.contexts, layer, flat=editor.context_rule.flat, site=reader.site).read(layer)
    last = edit.updates[-1]
    written, share = after.keys @ last.delta.T, last.left.T
    return {
        "gamma": gamma, "beta": attenuation(gamma),
        "planned": (value - plan.anchor).norm(dim=1), "moved": (value - plan.value).norm(dim=1) / plan.planned.norm(dim=1),
        "beta_layer": _along(written, share), "beta_initial": _along(written, share - (value - plan.value) * editor.allocation(count - 1, count)),
        "whole": _along(after.current - plan.anchor, value - plan.anchor), "whole_initial": _along(after.current - plan.anchor, plan.planned),
    }  # fmt: skip


def _along(realized: Tensor, planned: Tensor) -> Tensor:
    """⟨r̂, r⟩ / ‖r‖² per row; NaN where nothing was planned."""
    return (realized * planned).sum(1) / planned.square().sum(1).where(planned.any(1), torch.nan)
