"""General ability along a stream of edits."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.shown import SHOWN
from metake.report.style import in_order, style

COLUMNS = 3  # of panels


def ability_curves(found: pd.DataFrame, model: str | None = None, name: str = "general_ability") -> Figure:
    """Scores against the number of edits made, a panel per task, a line per method from the unedited model's value on.

    found: method, edits, task, title, score and guess in percent, as `experiments.general_ability.paper_scores`
    returns them; "pre-edit" at 0 edits is where all lines begin; the dotted level is `guess`.
    """
    _require(found, "method", "edits", "task", "title", "score", "guess")
    tasks, end = list(dict.fromkeys(found.task)), found.edits.max()
    methods = [m for m in in_order(found.method) if m != "pre-edit"]
    lowest = min(-3.0, found.score.min() - 3)

    def draw(axes: Any) -> None:
        for here in axes.flat[len(tasks) :]:
            here.set_axis_off()
        for here, task in zip(axes.flat, tasks, strict=False):
            own = found[found.task == task]
            here.axhline(own.guess.iloc[0], color=_soft(0.5), linestyle=":", linewidth=1.2)
            for k, method in enumerate(methods):  # later ones slimmer, so that equal curves show one inside the other
                line, look, slim = (
                    own[own.method.isin([method, "pre-edit"])].sort_values("edits"), style(method), k / len(methods)
                )
                looks = {"color": look.color, "marker": look.marker, "linestyle": look.line, "label": look.name}
                here.plot(line.edits, line.score, markersize=7 - 2.5 * slim, linewidth=2.4 - 1.2 * slim, **looks)
            here.set(ylim=(lowest, 103), xlim=(-0.04 * end, 1.04 * end), title=f"{own.title.iloc[0]}, %")
            if len(asked := sorted(own.edits.unique())) <= 5:
                here.set_xticks(asked)
            else:
                here.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True, steps=(1, 2, 3, 5, 6, 10)))
        axes[-1, min(1, len(axes[0]) - 1)].set_xlabel("edits made so far; dotted: guessing")
        axes[0, 0].figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(methods))
        )

    last = found[found.edits == found.groupby("method").edits.transform("max")]
    wide = (
        last.pivot(index="method", columns="task", values="score")
        .loc[in_order(last.method), tasks]
        .rename_axis(columns=None)
        .reset_index()
    )
    told = "; ".join(
        f"{SHOWN['method'](row['method'])}: " + ", ".join(f"{task} {row[task]:.0f}" for task in tasks)
        for row in wide.to_dict("records")
    )
    alt = (
        f"Scores in percent on {len(tasks)} tasks against the number of edits, up to {end}, a line per "
        f"method. At the end – {told}."
    )
    across = min(COLUMNS, len(tasks))
    down = -(-len(tasks) // across)
    return Figure(
        draw, found, name, alt, model, wide, (0.4 + 2.7 * across, 0.8 + 2.1 * down), 1, nrows=down, ncols=across,
        sharex=True, sharey=True
    )
