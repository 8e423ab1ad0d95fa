"""MetaKE v3 Table 3: how the method answers to the number of look-ahead steps and to the meta learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from metake import methods
from metake.editing.editor import Editor
from metake.experiments.decision import Decision, all_of, interval, opposite, with_interval
from metake.experiments.studies import comparison
from metake.experiments.studies.study import study
from metake.support.errors import ParameterError

STEPS = (5, 10, 15, 20)
ADAM = (1e-3, 1e-2, 1e-1, 5e-1)
PLAIN = (0.01, 0.1, 0.5, 1.0)
SWEEPS = {"steps": "look-ahead steps T", "adam": "η of Adam", "plain": "η of plain gradient"}
SCORES = ("efficacy", "generalization", "specificity")


def sensitivity(
    model: str = "tiny", steps: Sequence[int] = STEPS, adam: Sequence[float] = ADAM, plain: Sequence[float] = PLAIN,
    **settings: Any
) -> pd.DataFrame:
    """MetaKE, read literally, with one number of its outer level changed at a time, on one batch from the same unedited
    model; settings: see `study`.

    steps: T, with Adam at the recipe's η; adam: η of Adam, at the recipe's T; plain: η of plain gradient descent
    (v3 eq. 82), at the recipe's T, with an anchor relative to ‖v_init‖²: with the literal one, η near 1 would throw v
    from side to side. The values of η did not survive in the paper; as there, the third of four is the default.

    Rows: see `study`, with outer objectives, and "sweep", "value" and "default" (whether the sweep is measured against
    this row); a setting that stands in two sweeps is computed once. Raises ParameterError for a sweep without its
    default.
    """
    full = methods.method("metake/literal", model)
    wanted = _settings(full, steps, adam, plain)
    editors = dict.fromkeys(wanted.values())
    names = {editor: name(editor) for editor in editors}
    found = study(model, {names[editor]: editor for editor in editors}, **settings)
    parts = []
    for (sweep, value), editor in wanted.items():
        own = found[found.method == names[editor]]
        parts.append(own.assign(sweep=sweep, value=float(value), default=value == _default(sweep, full, plain)))
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs = found.attrs
    return frame


def _settings(
    full: Editor, steps: Sequence[int], adam: Sequence[float], plain: Sequence[float]
) -> dict[tuple[str, float], Editor]:
    """(sweep, value) → editor."""
    wanted = {("steps", v): replace(full, refine=replace(full.refine, steps=v)) for v in steps}
    wanted |= {("adam", v): replace(full, refine=replace(full.refine, step_size=v)) for v in adam}
    wanted |= {
        ("plain", v): replace(full, refine=replace(full.refine, optimizer="sgd", anchor_norm="relative", step_size=v))
        for v in plain
    }
    for sweep in SWEEPS:
        if (default := _default(sweep, full, plain)) not in [value for own, value in wanted if own == sweep]:
            raise ParameterError(
                f"the sweep of {SWEEPS[sweep]} is measured against {default:g}, which is not among its values; add it"
            )
    return wanted


def _default(sweep: str, full: Editor, plain: Sequence[float]) -> float:
    """What a sweep is measured against: the recipe's number, or the third, of plain descent, which no recipe has."""
    return {
        "steps": full.refine.steps, "adam": full.refine.step_size, "plain": plain[2] if len(plain) > 2 else PLAIN[2]
    }[sweep]


def name(editor: Editor) -> str:
    """The outer level's numbers in words."""
    rule = editor.refine
    return f"{'Adam' if rule.optimizer == 'adam' else 'plain'} η = {rule.step_size:g}, T = {rule.steps}"


def effects(records: pd.DataFrame) -> pd.DataFrame:
    """Per data set and setting: scores in percent; log p of the target, nats; how far the plan moved, in percent of
    Stage I's plan; and the outer objective per request before and after the refinement, of it the anchor's part, and
    the mean after over the mean before:
    above one, the refinement has not descended. Means, of `moved` the median."""
    keys = ["dataset", "sweep", "value"]
    grouped = records.groupby(keys, sort=False)
    table = 100 * grouped[list(SCORES)].mean()
    table["log p"] = grouped.log_p.mean()
    table["moved, %"] = 100 * grouped.moved.median()
    table = table.join(grouped[["outer_before", "outer_after", "anchor_after"]].mean()).join(grouped.default.first())
    table.insert(table.columns.get_loc("default"), "after / before", table.outer_after / table.outer_before)
    table = table.reset_index()
    return comparison.labelled(table, records)


def differences(records: pd.DataFrame, draws: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Each setting minus its sweep's default on the same requests: scores in points, log p in nats, and the trade-off,
    the mean of the three scores, in points; with 95 % bootstrap intervals over requests. One row a data set, sweep,
    value and measure."""
    frame, rows = records.assign(trade_off=records[list(SCORES)].mean(axis=1)), []
    for (dataset, sweep), group in frame.groupby(["dataset", "sweep"], sort=False):
        generator, index = np.random.default_rng(seed), ["seed", "id"]
        base = group[group.default].set_index(index)
        places = generator.integers(len(base), size=(draws, len(base)))
        for value, own in group[~group.default].groupby("value", sort=False):
            own = own.set_index(index).loc[base.index]
            for measure in (*SCORES, "trade_off", "log_p"):
                apart = ((own[measure] - base[measure]) * (1 if measure == "log_p" else 100)).dropna().to_numpy()
                low, high = (
                    np.percentile(apart[places].mean(1), [2.5, 97.5]) if len(apart) == len(base) else (np.nan, np.nan)
                )
                rows.append(
                    {
                        "dataset": dataset, "sweep": sweep, "value": value, "measure": measure, "requests": len(apart),
                        "difference": apart.mean(), "low": low, "high": high
                    }
                )
    return comparison.labelled(pd.DataFrame(rows), records)


def wide(differences: pd.DataFrame) -> pd.DataFrame:
    """`differences` with a column a measure, each with its interval in brackets: for a table."""
    texts = [
        with_interval(r.difference, r.low, r.high, 3 if r.measure == "log_p" else 1) for r in differences.itertuples()
    ]
    shown = differences.assign(text=texts, measure=differences.measure.str.replace("_", "-"))
    table = shown.pivot(index=["dataset", "sweep", "value"], columns="measure", values="text")[
        list(shown.measure.unique())
    ]
    order = [tuple(key) for key in shown[["dataset", "sweep", "value"]].drop_duplicates().itertuples(index=False)]
    table = table.loc[order].reset_index().rename_axis(columns=None).assign(sweep=lambda t: t.sweep.map(SWEEPS))
    return comparison.labelled(table.rename(columns={"log-p": "log p, nats"}), differences)


def reported(paper: pd.DataFrame) -> pd.DataFrame:
    """The paper's Table 3 as differences from its default, and as the mean of the three scores:
    `best` where that is highest among the settings of one parameter and model. paper: what `report.paper("table3")`
    gives."""
    table = paper.assign(trade_off=paper[list(SCORES)].mean(axis=1))
    default = table[table.setting.str.contains("default")].set_index(["parameter", "model"])
    places = pd.MultiIndex.from_frame(table[["parameter", "model"]])
    for score in SCORES:
        table[f"{score} − default"] = table[score].to_numpy() - default.loc[places, score].to_numpy()
    table["best"] = table.trade_off == table.groupby(["parameter", "model"]).trade_off.transform("max")
    shown = table.drop(columns=["where", *SCORES]).rename(columns={"trade_off": "mean of the three"})
    shown.attrs = paper.attrs
    return shown


def judge(differences: pd.DataFrame, least: float = 5.0) -> dict[str, Any]:
    """The paper's two claims: robust to T and η, and the default gives the best trade-off (mean of the three scores).
    Holds if no setting is `least` points or more from its default in any score and every other setting's trade-off lies
    below the default's, by all intervals; does not hold if one of the two fails; else inconclusive.

    Robust: yes if no setting is `least` points or more from its default in any score, by all intervals, and the sample
    is large enough to show it (of n requests of which none changes, up to 3/n may still change, at 95 %); no if an
    interval lies beyond.
    Best: yes if every other setting's trade-off lies below, with its interval; no if one lies above.
    """
    scores, trade = differences[differences.measure.isin(SCORES)], differences[differences.measure == "trade_off"]
    requests = scores.groupby("dataset").requests.max().sum()
    robust = all_of([_within(scores, least), _enough(requests, least)]).quiet()
    best = all_of(opposite(interval("trade-off", r.difference, r.low, r.high)) for r in trade.itertuples()).quiet()
    words = {True: "yes", False: "no", None: "open"}
    far, top = scores.loc[scores.difference.abs().idxmax()], trade.loc[trade.difference.idxmax()]
    said = (
        f"robust: {words[robust.holds]}, farthest from its default "
        f"{with_interval(far.difference, far.low, far.high)} points, {far.measure}, {SWEEPS[far.sweep]} = "
        f"{far.value:g}, {far.dataset}"
    )
    said += (
        f"; default best: {words[best.holds]}, strongest rival {with_interval(top.difference, top.low, top.high, 2)} "
        f"points, {SWEEPS[top.sweep]} = {top.value:g}, {top.dataset}; {requests} requests"
    )
    return all_of([robust, best]).verdict(said)


def _within(scores: pd.DataFrame, least: float) -> Decision:
    """Is every setting less than `least` points from its default, to either side?"""
    return all_of(
        side
        for r in scores.itertuples()
        for side in (
            opposite(interval(r.measure, r.difference, r.low, r.high, least)),
            interval(r.measure, r.difference, r.low, r.high, -least),
        )
    )


def _enough(requests: int, least: float) -> Decision:
    """Of n requests of which none changes, 3/n may still change, at 95 %: whether that is at most `least` points."""
    return Decision(True if 300 / requests <= least else None, least * requests / 300, "sampling")
