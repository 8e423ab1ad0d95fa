"""One batch of edits by several editors from one unedited model: what a request planned, what of it was realized.

The pages on the ablation, the open readings, the hyper-parameters and the realized residual read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metake.algebra.solve import association, attenuation
from metake.algebra.update import Edit
from metake.data.requests import Cases, EditRequest
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.record import describe
from metake.editing.state import EditorState
from metake.editing.statistics import Statistics, statistics
from metake.editing.targets import Targets
from metake.experiments.cases import read_cases, select
from metake.experiments.kept import kept
from metake.experiments.measured import edited_losses
from metake.experiments.runs import Unedited
from metake.language.model import LanguageModel, load
from metake.language.tokens import Rows
from metake.scoring.evaluation import CaseScore, Evaluation, evaluate
from metake.support.errors import ParameterError

FORMATS = {"CounterFact format": "facts", "ZsRE format": "facts-zsre"}


@dataclass(frozen=True)
class Batch:
    """The same for every editor: the model, its statistics, the cases before any edit; Stage I's targets once made."""

    lm: LanguageModel
    statistics: Statistics
    cases: Cases
    before: Evaluation
    shared: Unedited = field(default_factory=Unedited)  # Stage I of the editors that plan alike
    whole: Batch | None = None  # a part of another batch takes its plans from there: requests are planned one by one
    places: tuple[int, ...] = ()

    @classmethod
    def of(cls, lm: LanguageModel, statistics: Statistics, cases: Cases) -> Batch:
        """The batch of these cases on the unedited model."""
        return cls(lm, statistics, cases, evaluate(lm, cases))

    def part(self, places: Sequence[int]) -> Batch:
        """The batch of the cases at these places alone."""
        cases = Cases([self.cases[i] for i in places], self.cases.format, self.cases.source)
        return replace(
            self, cases=cases, before=Evaluation(tuple(self.before.cases[i] for i in places)), shared=Unedited(),
            whole=self, places=tuple(places)
        )

    @property
    def requests(self) -> list[EditRequest]:
        return [c.request for c in self.cases]

    def plan(self, editor: Editor, state: EditorState) -> Targets:
        """Stage I's targets, once for all editors that plan alike. ParameterError if this one plans in pieces."""
        if editor.plan_key(state) is None:
            raise ParameterError(
                "a study compares editors with one plan a request; found one with its own targets at each "
                "layer, or one request at a time"
            )
        if self.whole:
            found, own = self.whole.plan(editor, state), list(self.places)
            return replace(
                found, anchor=found.anchor[own], planned=found.planned[own], trace=tuple(found.trace[i] for i in own)
            )
        return self.shared.plan(self.lm, editor, state, self.requests)


def study(
    model: str,
    editors: Mapping[str, Editor],
    data: Mapping[str, str] | None = None,
    edits: int = 20,
    seeds: Sequence[int] = (0,),
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Every editor on the same batch of `edits` requests of each data set, for each seed, which draws the requests.

    One row per data set, seed, editor ("method") and request: the metrics of `Evaluation.records` as shares;
    `likelihood`'s logarithms, which still tell editors apart where every request succeeds;
    and at the last edited layer, by ‖·‖ and ⟨·,·⟩ over the residual stream:

    gamma, beta      γ and β = γ/(1+γ) under the editor's own metric, before any edit          (MetaKE v3 eqs 111–112,
    116)
    planned          ‖v − h‖;  moved: ‖v − v_init‖ / ‖v_init − h‖, what the refinement changed
    beta_layer       ⟨Δ k, r⟩ / ‖r‖², the last layer's own share r of the plan                 (eqs 113–115)
    beta_initial     ⟨Δ k, r⟩ / ‖r‖² with r the share that v_init would have left to this layer
    whole, whole_initial   ⟨h_after − h, v − h⟩ / ‖v − h‖², all layers' work, against the plan and against v_init

    edited           L_edit + L_loc of the edited model (F of eq. 84 without its anchor), the same measure for all
    outer_before, outer_after   of an editor that refines: its own outer objective, under its own weights, at Stage I's
    plan and at the one that was kept; of the latter the anchor's part "anchor_after"; else NaN
    out: a folder that keeps what every finished editor gave; None: nothing is kept.

    Editors that plan alike share Stage I. The model is restored after each edit.
    """
    lm = load(model)
    given = statistics(
        lm, text, layers=sorted({layer for e in editors.values() for layer in e.layers}), tokens=text_tokens
    )
    rows = []
    for name, source in (data or FORMATS).items():
        for seed in seeds:
            batch = Batch.of(lm, given, select(lm, read_cases(source), edits, seed))
            for method, editor in editors.items():
                rows += [
                    {"dataset": name, "seed": seed, "method": method} | row
                    for row in one(batch, editor, out=out)
                ]
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = {"edits": edits, "seeds": list(seeds)}
    return frame


def one(
    batch: Batch, editor: Editor, state: EditorState | None = None, out: str | Path | None = None
) -> list[dict[str, Any]]:
    """What one editor does to a batch, a row a request, as `study` says; state: of `Editor.init`, if it is at hand."""
    state = state or editor.init(batch.lm, batch.statistics)
    told = (*circumstances(batch.lm, editor, state), batch.cases.digest)
    return kept(out, told, lambda: _measured(batch, editor, state))


def circumstances(lm: LanguageModel, editor: Editor | GradientEditor, state: EditorState) -> tuple[Any, ...]:
    """Everything but the requests that decides what an edit of the unedited model is: for `kept`."""
    return describe(editor), state.contexts, state.statistics_digest, lm.base(), lm.digest(lm.write_path(0))


def _measured(batch: Batch, editor: Editor, state: EditorState) -> list[dict[str, Any]]:
    lm, plan = batch.lm, batch.plan(editor, state)
    edit, _ = editor.step(lm, batch.requests, state, planned=plan)
    columns = _realized(lm, editor, state, batch.requests, edit, plan)
    columns["edited"] = edited_losses(lm, batch.requests, state.contexts, edit).sum(1)
    columns |= _outer(editor, list(edit.record.trace.values()))
    with edit.applied(lm):
        found = evaluate(lm, batch.cases, before=batch.before)
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        row | likelihood(case) | dict(zip(columns, own, strict=True))
        for row, case, own in zip(found.records(), found.cases, values, strict=True)
    ]


def likelihood(case: CaseScore) -> dict[str, float]:
    """What the scores cut to success or failure: natural logarithms, means over the target's tokens and the probes.

    log_p, log_p_paraphrase: of the target after the edited prompt and after its paraphrases; log_odds:
    log p of the target minus that of the true object, after the edited prompt, where there is a rival (CounterFact).
    NaN without such a probe.
    """
    found = {}
    for name, kind in (("log_p", "efficacy"), ("log_p_paraphrase", "paraphrase")):
        values = [p.target.log_p for p in case.probes if p.kind == kind]
        found[name] = fmean(values) if values else float("nan")
    against = [p.target.log_p - p.rival.log_p for p in case.probes if p.kind == "efficacy" and p.rival]
    return found | {"log_odds": fmean(against) if against else float("nan")}


def _outer(editor: Editor, traces: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The outer objective of each request at both ends of its refinement, as the edit's record has it."""
    names = ("outer_before", "outer_after", "anchor_after")
    if not editor.refine or not editor.refine.steps:
        return dict.fromkeys(names, torch.full((len(traces),), torch.nan))
    ends = [trace["refined"] for trace in traces]
    pulls = [t["refine"][end["kept"]]["anchor"] for t, end in zip(traces, ends, strict=True)]
    found = ([e["before"] for e in ends], [e["after"] for e in ends], [editor.refine.anchor_weight * p for p in pulls])
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in zip(names, found, strict=True)}


def refined(edit: Edit, editor: Editor, plan: Targets, scale: float = 1.0) -> Tensor:
    """The targets v that an edit was solved for, (n, d): the first layer still sees the anchor h itself. scale: the
    model's.
    """
    return plan.anchor + scale * edit.updates[0].left.T / editor.allocation(0, len(editor.layers))


def _realized(
    lm: LanguageModel, editor: Editor, state: EditorState, requests: Sequence[EditRequest], edit: Edit, plan: Targets
) -> dict[str, Tensor]:
    layer, count = editor.layers[-1], len(editor.layers)
    rows = Rows.of(lm.tokenizer, requests, state.contexts)
    reader = editor.reading.reader(lm, rows, layer)
    gamma = association(reader.read(layer).keys, state.metrics[layer])
    value = refined(edit, editor, plan, lm.scale)
    with edit.applied(lm):
        after = editor.reading.reader(lm, rows, layer).read(layer)
    last = edit.updates[-1]
    written, share = lm.scale * after.keys @ last.delta.T, lm.scale * last.left.T
    return {
        "gamma": gamma, "beta": attenuation(gamma),
        "planned": (value - plan.anchor).norm(dim=1),
        "moved": (value - plan.value).norm(dim=1) / plan.planned.norm(dim=1),
        "beta_layer": _along(written, share),
        "beta_initial": _along(written, share - (value - plan.value) * editor.allocation(count - 1, count)),
        "whole": _along(after.current - plan.anchor, value - plan.anchor),
        "whole_initial": _along(after.current - plan.anchor, plan.planned),
    }  # fmt: skip


def _along(realized: Tensor, planned: Tensor) -> Tensor:
    """⟨r̂, r⟩ / ‖r‖² per row; NaN where nothing was planned."""
    return (realized * planned).sum(1) / planned.square().sum(1).where(planned.any(1), torch.nan)
