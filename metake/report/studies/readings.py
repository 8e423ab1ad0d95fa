"""The drawing of the open readings: what each does to its own outer loss, to the edited model's, and to paraphrases."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _log_axis, _require, _soft
from metake.report.shown import texts
from metake.report.style import style

PANELS = {
    "change": "Its own outer loss,\nafter / before", "gain": "Edited model's F,\nover AlphaEdit's",
    "paraphrase": "Paraphrases: log\u00a0p\nover AlphaEdit, nats",
}
RATIOS = ("change", "gain")
MARKS = ("o", "s", "^", "D")  # one a data set
# to either side of zero: a difference in the third decimal must not look large
LEAST = {"paraphrase": 0.02}


def reading_dots(summary: pd.DataFrame, model: str | None = None, name: str = "open_readings") -> Figure:
    """A row per reading, grouped by the factor in which it differs from the literal one, the dashed lines.

    summary: what `experiments.open_readings.summary` returns. Left: the outer loss at the refined plan over that at
    Stage I's, the whisker from the lowest to the highest seed; middle: the median over requests of F of the edited
    model over AlphaEdit's, between quartiles; right: with 95 % intervals. A filled mark: whiskers without 1, or 0.
    """
    _require(
        summary, "reading", "factor", "dataset", "outer_before", "outer_after",
        *(f"{p}{end}" for p in PANELS for end in ("", "_low", "_high"))
    )
    readings, datasets = list(dict.fromkeys(summary.reading)), list(dict.fromkeys(summary.dataset))
    fell = summary[summary.change < 1]
    told = "; ".join(
        f"{r.reading}, {r.dataset}: {r.change:.2f} times, edited model {r.gain:.2f} times, {r.paraphrase:+.3f} nats"
        for r in summary.itertuples()
    )
    alt = f"""Per reading: outer loss after over before the refinement, F of the edited model over AlphaEdit's, and
        difference of the paraphrases' log-probability to AlphaEdit.
        The outer loss falls for {len(fell)} of {len(summary)}. {told}."""
    numbers = ["outer_before", "outer_after", "fell", "moved", "edited", "paraphrase"]
    shown = summary[["reading", "dataset", "requests", *numbers]]
    size = (8.4, 1.3 + (0.2 + 0.08 * len(datasets)) * len(readings))
    return Figure(
        lambda axes: _draw(axes, summary, readings, datasets), summary, name, alt, model, shown, size,
        ncols=len(PANELS), sharey=True
    )


def _draw(axes: Any, summary: pd.DataFrame, readings: list[str], datasets: list[str]) -> None:
    factors = summary.drop_duplicates("reading").set_index("reading").factor
    for panel, quantity in zip(axes[0], PANELS, strict=True):
        neutral = 1 if quantity in RATIOS else 0
        panel.axvline(neutral, color=_soft(0.8), linewidth=1, zorder=1)
        dashed = {"linewidth": 1, "linestyle": (0, (3, 3)), "alpha": 0.8, "zorder": 1}
        for k, dataset in enumerate(datasets):
            own = summary[summary.dataset == dataset]
            panel.axvline(own.loc[own.reading == readings[0], quantity].iloc[0], color=_color(k), **dashed)
            for row in own.itertuples():
                height = readings.index(row.reading) + 0.3 * (k - (len(datasets) - 1) / 2)
                numbers = (getattr(row, f"{quantity}{end}") for end in ("", "_low", "_high"))
                _dot(panel, height, k, neutral, *numbers)
        _dress(panel, quantity, readings, factors)
    for k, label in enumerate(texts(pd.Series(datasets, name="dataset"), 0)):
        axes[0, 0].plot([], [], color=_color(k), marker=MARKS[k % 4], linestyle="", markersize=6, label=label)
    if len(datasets) > 1:
        _legend_below(axes, len(datasets))


def _color(place: int) -> str:
    return style(("metake", "blue", "memit", "alphaedit")[place % 4]).color


def _dot(panel: Any, height: float, place: int, neutral: float, value: float, low: float, high: float) -> None:
    clear = low > neutral or high < neutral
    panel.plot([low, high], [height, height], color=_color(place), linewidth=1.6, solid_capstyle="butt", zorder=2)
    panel.plot(
        value, height, marker=MARKS[place % 4], markersize=6, markerfacecolor=_color(place) if clear else "none",
        markeredgecolor=_color(place), markeredgewidth=1.2, zorder=3
    )


def _dress(panel: Any, quantity: str, readings: list[str], factors: pd.Series) -> None:
    panel.set(
        title=PANELS[quantity], ylim=(len(readings) - 0.4, -0.6), yticks=range(len(readings)), yticklabels=readings
    )
    if quantity in RATIOS:
        panel.set_xscale("log")
        panel.update_datalim([(0.5, 0), (2, 0)])
        panel.autoscale_view(scaley=False)
        _log_axis(panel.xaxis)
    else:
        panel.update_datalim([(-LEAST[quantity], 0), (LEAST[quantity], 0)])
        panel.autoscale_view(scaley=False)
        panel.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    for place in range(1, len(readings)):
        if factors[readings[place]] != factors[readings[place - 1]]:
            panel.axhline(place - 0.5, color=_soft(0.3), linewidth=0.8)
    panel.grid(False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8.5)
    panel.spines["left"].set_visible(False)
