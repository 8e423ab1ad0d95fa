"""General ability along a stream of edits."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _require, _soft
from metake.report.shown import SHOWN
from metake.report.style import in_order, style

COLUMNS = 3  # of panels


def ability_curves(found: pd.DataFrame, model: str | None = None, name: str = "general_ability") -> Figure:
    """Scores against the number of edits made, a panel per task, a line per method from the unedited model's value on.

    found: method, edits, task, title, score and guess in percent, as `experiments.general_ability.paper_scores` returns
    them; "pre-edit" at 0 edits is where all lines begin; the dotted level is `guess`.
    """
    _require(found, "method", "edits", "task", "title", "score", "guess")
    tasks, methods = list(dict.fromkeys(found.task)), [m for m in in_order(found.method) if m != "pre-edit"]
    last = found[found.edits == found.groupby("method").edits.transform("max")]
    wide = (
        last.pivot(index="method", columns="task", values="score")
        .loc[in_order(last.method), tasks]
        .rename_axis(columns=None)
        .reset_index()
    )
    told = "; ".join(
        f"{SHOWN['method'](row['method'])}: " + ", ".join(f"{task} {row[task]:.1f}" for task in tasks)
        for row in wide.to_dict("records")
    )
    alt = (
        f"Scores in percent on {len(tasks)} tasks against the number of edits, up to {found.edits.max()}, a line per "
        f"method. At the end – {told}."
    )
    across = min(COLUMNS, len(tasks))
    down = -(-len(tasks) // across)
    size, panels = (0.4 + 2.7 * across, 0.8 + 2.1 * down), {"nrows": down, "ncols": across}
    return Figure(
        lambda axes: _draw(axes, found, tasks, methods), found, name, alt, model, wide, size, 1, **panels, sharex=True,
        sharey=True
    )


def _draw(axes: Any, found: pd.DataFrame, tasks: list[str], methods: list[str]) -> None:
    end, lowest = found.edits.max(), min(-3.0, found.score.min() - 3)
    for here in axes.flat[len(tasks) :]:
        here.set_axis_off()
    for here, task in zip(axes.flat, tasks, strict=False):
        own = found[found.task == task]
        here.axhline(own.guess.iloc[0], color=_soft(0.5), linestyle=":", linewidth=1.2)
        for k, method in enumerate(methods):  # later ones slimmer, so that equal curves show one inside the other
            line, look = own[own.method.isin([method, "pre-edit"])].sort_values("edits"), style(method)
            looks = {"color": look.color, "marker": look.marker, "linestyle": look.line, "label": look.name}
            slim = k / len(methods)
            here.plot(line.edits, line.score, markersize=7 - 2.5 * slim, linewidth=2.4 - 1.2 * slim, **looks)
        here.set(ylim=(lowest, 103), xlim=(-0.04 * end, 1.04 * end), title=f"{own.title.iloc[0]}, %")
        if len(asked := sorted(own.edits.unique())) <= 5:
            here.set_xticks(asked)
        else:
            here.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True, steps=(1, 2, 3, 5, 6, 10)))
    axes[-1, min(1, len(axes[0]) - 1)].set_xlabel("edits made so far; dotted: guessing")
    _legend_below(axes, min(5, len(methods)))
