"""The drawings of what γ, read before an edit, says about its failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.shown import texts
from metake.report.style import in_order, style


def gamma_auroc(
    found: pd.DataFrame, chance: str = "base rate", model: str | None = None, name: str = "gamma_beforehand"
) -> Figure:
    """AUROC of each predictor on held-out requests, a mark per method, a panel per data set and kind of failure.

    found: `experiments.predictors.assessed`; chance: the predictor that knows nothing, drawn as the line at ½.
    """
    _require(found, "dataset", "method", "outcome", "predictor", "edits", "fail", "auroc", "low", "high")
    counts = found.drop_duplicates(["dataset", "method", "outcome"])
    counts, found = counts.assign(enough=counts.auroc.notna()), found.dropna(subset="auroc")
    predictors = [p for p in found.predictor.unique() if p != chance]

    def panel(axes: Any, dataset: str, outcome: str) -> None:
        own = found[(found.dataset == dataset) & (found.outcome == outcome) & (found.predictor != chance)]
        _draw_auroc(axes, own, predictors)

    summary = found.assign(auroc=[f"{r.auroc:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in found.itertuples()]).pivot(
        index=["dataset", "outcome", "method"], columns="predictor", values="auroc"
    )
    if len(found):
        summary = summary[predictors].reset_index().rename_axis(columns=None)
    else:
        summary = counts[["dataset", "outcome", "method", "edits", "fail"]]
    told = "; ".join(
        f"{r.dataset}, {r.outcome}, {style(r.method).name}, {r.predictor}: {r.auroc:.2f}"
        for r in found.itertuples()
        if r.predictor != chance
    )
    alt = (
        "Area under the ROC curve of failure predictors on held-out requests, one half is chance. "
        f"{told or 'Nowhere enough edits fail.'}"
    )
    data, height = found if len(found) else counts.dropna(axis=1), 0.9 + 0.3 * max(len(predictors), 2)
    return _panels(panel, counts, data, name, alt, model, summary, height, "AUROC")


def _draw_auroc(axes: Any, found: pd.DataFrame, predictors: list[str]) -> None:
    axes.axvline(0.5, color=_soft(0.8), linewidth=1, zorder=1)
    methods = in_order(found.method)
    for row in found.itertuples():
        look, beside = style(row.method), methods.index(row.method) - (len(methods) - 1) / 2
        place = predictors.index(row.predictor) + 0.24 * beside
        axes.plot([row.low, row.high], [place, place], color=look.color, linewidth=1.6, solid_capstyle="butt", zorder=2)
        axes.plot(
            row.auroc, place, marker=look.marker, markersize=6, markeredgewidth=0, linestyle="", color=look.color,
            label=look.name if row.predictor == predictors[0] else "", zorder=3
        )
    axes.set(xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0", "¼", "½", "¾", "1"))
    axes.set(ylim=(max(len(predictors), 1) - 0.4, -0.6), yticks=range(len(predictors)), yticklabels=predictors)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def gamma_calibration(curves: pd.DataFrame, model: str | None = None, name: str = "gamma_calibration") -> Figure:
    """How many requests fail of those to which γ gives a probability of it: a line per method, Wilson's intervals.

    curves: `experiments.predictors.reliability`.
    """
    _require(curves, "dataset", "method", "outcome", "bin", "requests", "predicted", "observed", "low", "high")
    cells = curves.assign(fails=(curves.observed * curves.requests).round())
    cells = cells.groupby(["dataset", "method", "outcome"], sort=False)
    counts = cells.agg(edits=("requests", "sum"), fail=("fails", "sum"), enough=("predicted", "count"))
    counts = counts.reset_index().astype({"fail": int})
    curves = curves.dropna(subset="predicted")

    def panel(axes: Any, dataset: str, outcome: str) -> None:
        axes.plot([0, 1], [0, 1], color=_soft(0.3), linewidth=4, solid_capstyle="round", zorder=1)
        own = curves[(curves.dataset == dataset) & (curves.outcome == outcome)]
        # later ones slimmer, so that equal curves show one inside the other
        for k, method in enumerate(in_order(own.method)):
            line, look, slim = own[own.method == method], style(method), min(k, 3)
            looks = {"color": look.color, "marker": look.marker, "linestyle": look.line, "label": look.name}
            reach = line.observed - line.low, line.high - line.observed
            axes.errorbar(
                line.predicted, line.observed, reach, markersize=9 - 2 * slim, linewidth=2.8 - 0.6 * slim,
                elinewidth=2.4 - 0.6 * slim, **looks
            )
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
        axes.set_ylabel("share that fails")

    summary = curves.drop(columns=["low", "high"]) if len(curves) else counts.drop(columns="enough")
    told = "; ".join(
        f"{d}, {o}, {style(m).name}: "
        + ", ".join(f"{r.predicted:.2f} predicted {r.observed:.2f} seen" for r in own.itertuples())
        for (d, m, o), own in curves.groupby(["dataset", "method", "outcome"], sort=False)
    )
    alt = f"Observed share of failures against the probability that γ predicts. {told or 'Nowhere enough edits fail.'}"
    return _panels(
        panel, counts, curves if len(curves) else counts, name, alt, model, summary, 2.6,
        "predicted probability of failure"
    )


def _panels(
    panel: Callable[[Any, str, str], None], counts: pd.DataFrame, data: pd.DataFrame, name: str, alt: str,
    model: str | None, summary: pd.DataFrame, height: float, label: str
) -> Figure:
    """A panel per data set (across) and kind of failure (down); below, which methods fail too seldom, or too often."""
    datasets, outcomes = list(counts.dataset.unique()), list(counts.outcome.unique())
    titles = texts(pd.Series(datasets, name="dataset"), 0)

    def draw(axes: Any) -> None:
        for i, outcome in enumerate(outcomes):
            for j, dataset in enumerate(datasets):
                panel(here := axes[i, j], dataset, outcome)
                own = counts[(counts.dataset == dataset) & (counts.outcome == outcome)]
                few = [
                    f"{style(r.method).name}: {r.fail} of {r.edits}, too one-sided"
                    for r in own.itertuples()
                    if not r.enough
                ]
                here.set_xlabel("\n".join([label, *few]), fontsize=9)
                here.set_title(f"{titles[j]}\n{outcome}")
        looks = {
            text: handle for place in axes.flat for handle, text in zip(*place.get_legend_handles_labels(), strict=True)
        }
        if looks:
            axes[0, 0].figure.legend(looks.values(), looks, loc="outside lower center", ncols=len(looks))

    size = (2.2 + 2.7 * len(datasets), 0.4 + (height + 1.0) * len(outcomes))
    return Figure(draw, data, name, alt, model, summary, size, nrows=len(outcomes), ncols=len(datasets), sharey=True)
