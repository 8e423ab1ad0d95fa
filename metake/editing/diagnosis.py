"""Before any edit: how strongly each request meets the constraints, what share of its plan will be written, and whether
any plan can satisfy both success and editability (MetaKE v3 Proposition 1 and Theorem 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from metake.algebra.geometry import KeyStatistics
from metake.algebra.solve import attenuation, feasible_interval
from metake.data.requests import EditRequest, check_batch
from metake.editing.editor import Editor
from metake.editing.keys import Keys
from metake.editing.state import EditorState
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.support.errors import ParameterError


class RequestDiagnosis(NamedTuple):
    """One request at the last edited layer. Norms are of the planned residual at that layer, in the model's units."""

    id: str
    association: float  # γ
    attenuation: float  # β = γ/(ν+γ): the share that is realized if the request is edited alone
    in_batch: float  # the diagonal of B: its own share beside the requests that are solved with it
    anchor: float  # ‖h‖, the present representation
    lower: float  # τ/β: a shorter plan does not succeed
    upper: float  # ε(1+γ/ν): a longer plan leaves more unrealized than is tolerated
    feasible: bool


class Diagnosis(list[RequestDiagnosis]):
    """One row per request; prints as a table."""

    def __str__(self) -> str:
        width = max([2, *(len(d.id) for d in self)])
        lines = [f"{'id':<{width}}  {'γ':>9}  {'β':>6}  {'B_ii':>6}  {'‖h‖':>8}  {'feasible ‖r‖':>23}"]
        for d in self:
            interval = f"{d.lower:.2f} … {d.upper:.2f}" if d.feasible else f"none ({d.lower:.2f} > {d.upper:.2f})"
            lines.append(
                f"{d.id:<{width}}  {d.association:9.3g}  {d.attenuation:6.3f}  {d.in_batch:6.3f}  "
                f"{d.anchor:8.2f}  {interval:>23}"
            )
        return "\n".join(lines)


@LanguageModel.entry()
def diagnose(
    lm: LanguageModel, requests: Sequence[EditRequest], editor: Editor,
    statistics: Mapping[int, KeyStatistics] | EditorState, tau: float = 0.25, epsilon: float = 0.25,
    relative: bool = True
) -> Diagnosis:
    """γ, β and the feasible interval of each request at the editor's last layer; nothing is optimized or edited.

    γ = kᵀQk,  β = γ/(ν+γ),  τ/β ≤ ‖r‖ ≤ ε(1+γ/ν)    (MetaKE v3 Proposition 1, Theorem 1, eqs 111–112, with ν = 1)

    What is read is what the editor would solve from: its keys, where it wants the residual to be found (ROME: the plain
    prompt's key, γ = kᵀQk*), its noise ν and its site. An exact write, ν = 0, has β = 1 and no upper bound.

    statistics: key statistics, or the state of an editing sequence, whose past keys then count. tau: norm that must be
    realized; epsilon: norm that may stay unrealized; both as shares of ‖h‖ if `relative`, else in the model's units.
    Raises RequestError for requests that cannot be edited, ParameterError if tau or epsilon is not positive.
    """
    if not editor.layers:
        raise ParameterError(
            "γ, β and the feasible interval are of planned residuals, and an editor of the gradient family plans none; "
            "its edits' records have the spectrum of B and the share of D that is realized"
        )
    if not (tau > 0 and epsilon > 0):
        raise ParameterError(f"tau and epsilon must be > 0; found tau={tau}, epsilon={epsilon}")
    requests = list(requests)
    check_batch(requests)
    state = statistics if isinstance(statistics, EditorState) else editor.init(lm, statistics)
    layer, rows = editor.layers[-1], Rows.of(lm.tokenizer, requests, state.contexts)
    found = editor.reading.reader(lm, rows, layer).read(layer)
    metric, noise, norm = state.metrics[layer], editor.noise, found.current.norm(dim=1)
    gamma = editor.reading.association(found, metric)
    scale = norm if relative else torch.ones_like(norm)
    lower, upper = feasible_interval(gamma, tau * scale, epsilon * scale, noise)
    groups = (Keys(*(t[list(group)] for t in found)) for group in editor.reading.groups(len(rows)))
    own = torch.cat([editor.reading.realization(group, metric).diagonal() for group in groups])
    columns = (gamma, attenuation(gamma, noise), own, norm, lower, upper, lower <= upper)
    return Diagnosis(
        RequestDiagnosis(r.id, *values) for r, *values in zip(requests, *(c.tolist() for c in columns), strict=True)
    )
