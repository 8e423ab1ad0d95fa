"""One batch, or one request after the other: for one layer with fixed keys, exactly when the two write the same update.

Let T be the sum of the updates so far, and the next request's residual what is still missing, r − T k.
With A = Q⁻¹ + KₚKₚᵀ,

    T ← T + (r − T k) kᵀ (A + k kᵀ)⁻¹    ⇒    T (A + k kᵀ) = T A + r kᵀ,    so that   T = R Kᵀ (Q⁻¹ + K Kᵀ)⁻¹

after all of them: the batch's solve. It needs both: the metric that remembers every earlier key,
and the residual read again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import KeyStatistics, Metric, condition
from metake.algebra.solve import gate
from metake.algebra.update import LayerUpdate, total
from metake.data.facts import facts
from metake.data.requests import EditRequest
from metake.editing.editor import Editor
from metake.editing.keys import KeyReader
from metake.editing.state import EditorState
from metake.editing.statistics import statistics
from metake.editing.targets import Targets, optimize_targets
from metake.experiments.decision import KINDS, Decision, all_of, undecided
from metake.experiments.runs import edit_sequence
from metake.experiments.theory.comparisons import least, rounding, same
from metake.experiments.theory.solves import Case, difficulty, draw
from metake.language.model import LanguageModel, load

READINGS = ("read again", "planned once")
SAME = 1e-9  # a relative difference above it is never taken for rounding, however ill-conditioned the instance


def _total(editor: Editor, case: Case, metric: Metric, size: int, reading: str) -> Tensor:
    """Sum of the updates, (d_out, d), of consecutive parts of `size` requests, with memory and post-processes."""
    done = LayerUpdate("", case.residuals[:, :0], case.keys.T[:0])
    for first in range(0, case.keys.shape[1], size):
        keys, residuals = case.keys[:, first : first + size], case.residuals[:, first : first + size]
        if reading == "read again":
            residuals = residuals - done.delta @ keys
        update = LayerUpdate("", residuals, gate(keys.T, metric, editor.noise))
        for rule in (rule for rule in editor.post if rule.when != "sequence"):
            update = rule(update, case.weight + done.delta)
        done = done + update
        metric = condition(metric, keys.T) if editor.remember else metric
    for rule in (rule for rule in editor.post if rule.when == "sequence"):
        done = rule(done, case.weight)
    return done.delta


def _unrelated(case: Case, metric: Metric) -> Case:
    """The instance with its keys made orthogonal in the metric: no request meets another.
    Keeps their first one's scale.
    """
    inner = metric.apply(case.keys.T) @ case.keys
    factor = torch.linalg.cholesky(inner)
    return case._replace(keys=torch.linalg.solve_triangular(factor, case.keys.T, upper=False).T * factor[0, 0])


def sequential_check(
    trials: int = 20, seed: int = 0, dim: int = 12, n: int = 4, model: str = "tiny",
    names: Sequence[str] = tuple(methods.METHODS)
) -> pd.DataFrame:
    """Random instances of one layer with fixed keys and fixed targets: n requests one by one, against one batch of n.

    One row per instance, method, reading of the residual ("read again": what the updates so far have left of it;
    "planned once": as on the unedited weight) and keys ("any", or "unrelated": KᵀQK diagonal);
    difference = ‖T − Δ‖/‖Δ‖, and rounding, what rounding may make of it: n solves in a row, each amplified by κ.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        case = draw(generator, dim, n)
        case = case._replace(rank=dim // 2, strength=case.strength.clamp(-1, 1), scales=case.scales.clamp(min=-3))
        for name in names:
            editor = methods.method(name, model)
            metric = case.metric(replace(editor, remember=False))
            for kind, given in (("any", case), ("unrelated", _unrelated(case, metric))):
                batch = _total(editor, given, metric, n, "planned once")
                granted = rounding(4 * dim * n, difficulty(editor, given._replace(past=given.keys)), SAME)
                for reading in READINGS:
                    difference = ((_total(editor, given, metric, 1, reading) - batch).norm() / batch.norm()).item()
                    row = {"method": name, "instance": trial, "keys": kind, "reading": reading}
                    rows.append(row | {"difference": difference, "rounding": granted})
    return pd.DataFrame(rows)


def by_method(
    records: pd.DataFrame, names: Sequence[str] = tuple(methods.METHODS), model: str = "tiny"
) -> pd.DataFrame:
    """Median difference per method: for keys that meet, under both readings; for unrelated keys the larger one."""
    found = records.groupby(["method", "keys", "reading"]).difference.median()
    rows = []
    for name in names:
        editor = methods.method(name, model)
        unrelated = max(found[name, "unrelated", reading] for reading in READINGS)
        row = {"method": name, "remembers": editor.remember, "afterwards": bool(editor.post)}
        row |= {reading: found[name, "any", reading] for reading in READINGS}
        rows.append(row | {"unrelated keys": unrelated})
    return pd.DataFrame(rows)


def sequential_on_model(
    model: str = "tiny", names: Sequence[str] = ("memit", "memit_seq", "alphaedit"), requests: int = 4, seed: int = 0
) -> pd.DataFrame:
    """The same on a real layer, the last edited one: real requests one after the other, against one batch of them.

    One row per method and setting: keys of the "plain prompt" or "averaged" over the sampled openings,
    targets "kept" as planned on the unedited model, or "planned anew" before each edit, as every run does;
    difference = ‖T − Δ‖/‖Δ‖.
    """
    lm, asked, rows = load(model), [case.request for case in facts(limit=requests)], []
    editors = {
        name: replace(editor, layers=editor.layers[-1:])
        for name in names
        for editor in [methods.method(name, model, seed=seed)]
    }
    given = statistics(lm, layers=sorted({editor.layers[0] for editor in editors.values()}))
    for keys, contexts in (("plain prompt", ("{}",)), ("averaged", None)):
        for name, editor in editors.items():
            own = replace(editor, contexts=contexts)
            state = own.init(lm, given)
            targets = optimize_targets(lm, asked, state.contexts, own.layers[0], own.target)
            batch, kept = (_parts(lm, own, state, asked, targets, size) for size in (len(asked), 1))
            found = {"kept": kept} | ({"planned anew": _run(lm, own, asked, given)} if contexts is None else {})
            for kind, delta in found.items():
                row = {"method": name, "keys": keys, "targets": kind}
                rows.append(row | {"difference": ((delta - batch).norm() / batch.norm()).item()})
    return pd.DataFrame(rows)


def _run(lm: LanguageModel, editor: Editor, asked: Sequence[EditRequest], given: Mapping[int, KeyStatistics]) -> Tensor:
    """Δ of the pipeline's own sequence of single edits."""
    with lm.scratch([lm.write_path(layer) for layer in editor.layers]):
        return total([edit for edit, _ in edit_sequence(lm, editor, asked, given, 1)]).updates[0].delta


def _parts(
    lm: LanguageModel, editor: Editor, state: EditorState, asked: Sequence[EditRequest], targets: Targets, size: int
) -> Tensor:
    """Δ of edits of `size` requests whose targets stay; keys and current states are read again each time."""
    (layer,), done = editor.layers, []
    metric, path = state.metrics[layer], lm.write_path(layer)
    with lm.scratch([path]):
        for first in range(0, len(asked), size):
            found = KeyReader(lm, asked[first : first + size], state.contexts, layer).read(layer)
            residuals = targets.value[first : first + size] - found.current
            done.append(LayerUpdate(path, residuals.T, gate(found.keys, metric, editor.noise)))
            lm.add(path, done[-1])
            metric = condition(metric, found.keys) if editor.remember else metric
    return sum(done[1:], done[0]).delta


def judge(records: pd.DataFrame, names: Sequence[str] = tuple(methods.METHODS), model: str = "tiny") -> dict:
    """The statement, for methods that remember and do nothing afterwards: one by one equals the batch with the
    residual read again, in every instance, and in none with the residual planned once. Does not hold if an instance
    contradicts it; inconclusive without such a method."""
    editors = {name: methods.method(name, model) for name in names}
    own = [name for name, editor in editors.items() if editor.remember and not editor.post]
    meet = records[(records["keys"] == "any") & records.method.isin(own)]
    if meet.empty:
        return undecided("", "rounding").verdict("no method that remembers was compared")
    again, once = (meet[meet.reading == reading] for reading in READINGS)
    equals, differs = ((found.difference <= found.rounding).sum() for found in (again, once))
    agrees = f"{equals} of {len(again)} with the residual read again, {differs} of {len(once)} with it planned once"
    found = all_of([
        same("one by one with the residual read again", again.difference, again.rounding),
        least("how far one by one with the residual planned once is off", once.difference / once.rounding),
    ])
    return found.verdict(f"instances in which one by one equals the batch: {agrees}")


def together(*found: dict) -> dict:
    """Several judgments as one: holds if every one of them holds (no difference above rounding, one by one equals the
    batch), does not hold if one does not, else inconclusive."""
    kinds = {told: kind for kind, told in KINDS.items()}
    whole = all_of(Decision(one["holds"], one["margin"], kinds[one["error"]]) for one in found)
    return whole.verdict("; ".join(one["decided_by"] for one in found))
