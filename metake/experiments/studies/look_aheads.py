"""What the proxy's answer costs: where the look-ahead through the last layer, through the whole edit with frozen gates,
and through the whole edit lead from the same plan, with the same optimizer and the same number of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from metake import methods
from metake.data.facts import facts
from metake.editing.bilevel import refine
from metake.editing.editor import Editor
from metake.editing.statistics import statistics
from metake.editing.targets import optimize_targets
from metake.experiments.speed.literal import flops
from metake.experiments.studies import comparison
from metake.experiments.studies.study import study
from metake.language.model import load
from metake.language.tokens import Rows

NONE, LAST, FROZEN, WHOLE = "none (AlphaEdit)", "last layer (proxy)", "whole, frozen gates", "whole, exact"
METRICS = ("efficacy", "generalization", "specificity")


def editors(model: str) -> dict[str, Editor]:
    """`metake/whole`, and the same with less of the edit looked through."""
    full = methods.metake_whole(model)
    changes = {LAST: {"look_ahead": "last"}, FROZEN: {"gates": "frozen"}, WHOLE: {}}
    return {NONE: replace(full, refine=None)} | {
        name: replace(full, refine=replace(full.refine, **change)) for name, change in changes.items()
    }


def look_aheads(model: str = "tiny", **settings: Any) -> pd.DataFrame:
    """Every look-ahead on one batch from Stage I's plan; settings and rows: see `study`."""
    return study(model, editors(model), **settings)


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """Per data set and look-ahead: `own`: its own outer loss, after over before; edited: F of the edited model, mean
    over requests; fell: requests whose F lies below AlphaEdit's, of a hundred; moved: of the plan, in percent; metrics.
    """
    rows = []
    for (dataset, method), own in records.groupby(["dataset", "method"], sort=False):
        plain = records[(records.dataset == dataset) & (records.method == NONE)].set_index(["seed", "id"]).edited
        there = own.set_index(["seed", "id"])
        rows.append(
            {
                "dataset": dataset, "look-ahead": method, "requests": len(own),
                "own": own.outer_after.mean() / own.outer_before.mean(), "edited": own.edited.mean(),
                "fell": 100 * (there.edited < plain).mean() if method != NONE else float("nan"),
                "moved": round(100 * own.moved.median(), 9),  # below it is rounding
            }
            | {name: 100 * own[name].mean() for name in METRICS}
        )
    return comparison.labelled(pd.DataFrame(rows), records)


def differences(records: pd.DataFrame) -> pd.DataFrame:
    """Each whole look-ahead minus the proxy's on the same requests: points, with bootstrap intervals."""
    return comparison.differences(
        records.assign(method=records.method.replace({WHOLE: "exact"})), {LAST: "exact", NONE: "exact"}, metrics=METRICS
    )


def operations(model: str = "tiny", edits: int = 4) -> pd.DataFrame:
    """Floating-point operations of one plan that a look-ahead tries, and as a multiple of one step of Stage I, of which
    a batch makes 25: counted, the same on every machine."""
    lm, full = load(model), methods.metake_whole(model)
    state = full.init(lm, statistics(lm, layers=list(full.layers)))
    asked, layer = [case.request for case in facts(limit=edits)], full.layers[-1]

    def plan(steps: int) -> Any:
        return optimize_targets(lm, asked, state.contexts, layer, replace(full.target, steps=steps, stop_below=0.0))

    first, targets, rows = flops(plan, 2).step, plan(2), []
    reader = full.reading.reader(lm, Rows.of(lm.tokenizer, asked, state.contexts), layer)
    for name, editor in editors(model).items():
        if editor.refine:
            through = editor.through(lm, state, reader, layer)
            step = flops(
                lambda steps, rule=editor.refine, through=through: refine(
                    lm, asked, state.contexts, targets, through, replace(rule, steps=steps, optimizer="sgd")
                ),
                2,
            ).step
            rows.append({"look-ahead": name, "GFLOP a plan": step / 1e9, "steps of Stage I": step / first})
    return pd.DataFrame(rows)
