"""The drawing of the realized residual (MetaKE v3 Figure 4)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _require
from metake.report.style import in_order, style


def realized_curves(
    curves: pd.DataFrame, dataset: str, names: dict[str, str], model: str | None = None, name: str = "realized_residual"
) -> Figure:
    """Mean β̂ with its standard error in quantile bins of γ, a panel a reading (MetaKE v3 Figure 4); points: requests.

    curves: `experiments.realized_residual.curves`: kind, dataset, reading, method, percentile, mean, error; names:
    of the readings, for the panels' titles.
    """
    _require(curves, "kind", "dataset", "reading", "method", "percentile", "mean", "error")
    own_set = curves[curves.dataset == dataset]
    found, cloud = own_set[own_set.kind == "bin"], own_set[own_set.kind == "request"]
    if found.empty:
        _require(found)
    readings, methods = list(dict.fromkeys(found.reading)), in_order(found.method)

    def draw(axes: Any) -> None:
        for place, reading in zip(axes.flat, readings, strict=True):
            for k, method in enumerate(methods):
                own, look = found[(found.reading == reading) & (found.method == method)], style(method)
                points, slim = cloud[(cloud.reading == reading) & (cloud.method == method)], k / len(methods)
                place.scatter(points.percentile, points["mean"], color=look.color, s=6, alpha=0.15, linewidths=0)
                place.fill_between(
                    own.percentile, own["mean"] - own.error, own["mean"] + own.error, color=look.color, alpha=0.2,
                    linewidth=0
                )
                looks = {"color": look.color, "marker": look.marker, "linestyle": look.line, "label": look.name}
                place.plot(own.percentile, own["mean"], markersize=6 - 2 * slim, linewidth=2.2 - slim, **looks)
            place.set(title=names.get(reading, reading), xlim=(0, 102), ylim=(-0.05, 1.25))
        for place in axes[-1]:
            place.set_xlabel("percentile of γ, within the method")
        for row in axes:
            row[0].set_ylabel("realized share β̂")
        _legend_below(axes, len(methods))

    means = found.groupby(["reading", "method"], sort=False)["mean"].mean()
    told = "; ".join(
        f"{names.get(reading, reading)}: " + ", ".join(f"{style(m).name} {means[reading, m]:.2f}" for m in methods)
        for reading in readings
    )
    alt = (
        f"Realized share of each planned residual against the request's association percentile, {dataset}. "
        f"Means – {told}."
    )
    summary = means.unstack("reading").reset_index()
    return Figure(draw, own_set, name, alt, model, summary, (7.6, 6.0), nrows=2, ncols=2, sharex=True, sharey=True)
