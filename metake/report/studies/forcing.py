"""Teacher-forced scores beside what a model writes freely, and free answers under stress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _require
from metake.report.studies.comparison import _by_seed, _grid, _number
from metake.report.style import in_order, style

FREE = ("_contained", "_exact")


def forced_and_free(
    records: pd.DataFrame, metrics: Sequence[str] = ("efficacy", "generalization"), model: str | None = None,
    name: str = "teacher_forcing"
) -> Figure:
    """Per method the forced score (filled) and the share of free answers that hold the new one (hollow) or are it
    (upright bar), a panel per metric and data set: the longer the line between the marks, the more forcing hides.

    records: dataset, method, seed, id and a column per metric, the free ones as <metric>_contained and <metric>_exact,
    as shares. The numbers are the forced score and what the free answers hold.
    """
    columns = [f"{metric}{suffix}" for metric in metrics for suffix in ("", *FREE)]
    _require(records, "dataset", "method", *columns)
    found = _by_seed(records, columns)
    means = found.set_index(["dataset", "method", "metric"])["mean"]
    datasets, methods = list(records.dataset.unique()), in_order(records.method)

    def panel(axes: Any, dataset: str, metric: str) -> None:
        for place, method in enumerate(methods):
            forced, held, exact = (means.get((dataset, method, f"{metric}{s}"), float("nan")) for s in ("", *FREE))
            _draw_pair(axes, place, method, forced, held, exact)
        axes.set(xlim=(-5, 105), xticks=(0, 50, 100))
        if metric == metrics[-1]:
            axes.set_xlabel("filled: forced;\nhollow: holds it, | is it, free", fontsize=8.5)

    draw, layout = _grid(datasets, metrics, methods, panel, "%", 2.5)
    told = "; ".join(
        f"{style(method).name}, {dataset}: {means[dataset, method, metric]:.1f} forced, "
        f"{means[dataset, method, f'{metric}_contained']:.1f} free"
        for metric in metrics[:1]
        for dataset in datasets
        for method in methods
        if (dataset, method, metric) in means
    )
    alt = f"{' and '.join(metrics)} in percent per method, forced and in free answers. {metrics[0]}: {told}."
    places = [(d, m) for d in datasets for m in methods if (d, m, metrics[0]) in means]
    summary = means.unstack("metric").loc[places, columns].reset_index()
    return Figure(draw, records, name, alt, model, summary, digits=1, **layout)


def _draw_pair(axes: Any, place: int, method: str, forced: float, held: float, exact: float) -> None:
    if forced != forced or held != held:
        return
    color = style(method).color
    axes.plot([forced, held], [place, place], color=color, alpha=0.45, linewidth=2.2, solid_capstyle="butt", zorder=2)
    looks = {"marker": style(method).marker, "linestyle": "", "markeredgecolor": color, "markeredgewidth": 1.2}
    axes.plot(exact, place, marker="|", markersize=9, markeredgecolor=color, markeredgewidth=1.6, zorder=3)
    axes.plot(held, place, markersize=6.5, markerfacecolor="none", zorder=4, **looks)
    axes.plot(forced, place, markersize=5.5, markerfacecolor=color, zorder=3, **looks)
    _number(axes, place, f"{forced:.0f} → {held:.0f}", 56, strong=forced - held >= 10)


def stress_curves(
    records: pd.DataFrame, held: str = "efficacy_contained", model: str | None = None, name: str = "under_stress"
) -> Figure:
    """Free answers that hold the new object under each stress, a panel a stress, a line a method over its groups.

    records: method, stress, group (in the order in which they are drawn), and `held` as a share, a row an answer.
    """
    _require(records, "method", "stress", "group", held)
    found = (100 * records.groupby(["stress", "method", "group"], sort=False)[held].mean()).reset_index()
    found.attrs = {k: v for k, v in records.attrs.items() if k in ("label", "provenance", "settings")}
    stresses, methods = list(records.stress.unique()), in_order(records.method)

    def draw(axes: Any) -> None:
        for i, stress in enumerate(stresses):
            here, own = axes[0, i], found[found.stress == stress]
            groups = list(records[records.stress == stress].group.unique())
            for method in methods:
                curve = own[own.method == method].set_index("group")[held].reindex(groups)
                look = style(method)
                looks = {"color": look.color, "marker": look.marker, "linestyle": look.line, "label": look.name}
                here.plot(range(len(groups)), curve, markersize=6, linewidth=1.6, **looks)
            here.set(ylim=(-4, 104), xticks=range(len(groups)), xlabel=stress)
            here.set_xticklabels([g.replace(" ", "\n") for g in groups])
            here.margins(x=0.12)
        axes[0, 0].set_ylabel("the free answer holds it, %")
        _legend_below(axes, 3)

    rows = found.itertuples(index=False)
    told = "; ".join(f"{style(r.method).name}, {r.group} {r.stress}: {r[-1]:.0f}" for r in rows)
    alt = f"Percent of free answers that hold the new object, per method under {', '.join(stresses)}. {told}."
    panels = {"ncols": len(stresses), "sharey": True}
    return Figure(draw, found, name, alt, model, size=(2.6 * len(stresses), 3.9), digits=1, **panels)
