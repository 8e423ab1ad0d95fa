"""One number changed at a time: the KL weight (MetaKE v3 Figure 5), and the outer level's own (Table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _legend_below, _require, _soft
from metake.report.style import FALLBACK, Style, in_order, style

MEASURES = {"efficacy": "efficacy, %", "generalization": "generalization, %", "log_p": "log p of the target"}
GROUPS = {"high": ("high γ", "-", 1.0), "low": ("low γ", "--", 0.55)}
SCORES = {"efficacy": ("o", "-"), "generalization": ("s", "--"), "specificity": ("^", ":")}


def kl_curves(
    curves: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES), model: str | None = None, name: str = "kl_strength"
) -> Figure:
    """A measure against λ_KL, a panel per measure (down) and method (across), a line per group of requests;
    a ring marks where efficacy is highest, ties to the smaller λ_KL. Scores share their axis; what is no share has one
    in each panel.

    curves: `experiments.kl_strength.curves` of one data set: method, group, kl_weight, best, and the measures.
    """
    _require(curves, "method", "group", "kl_weight", "best", *measures)
    methods = in_order(curves.method)
    best = curves[curves.best].set_index(["method", "group"])
    told = "; ".join(
        f"{style(m).name}: "
        + ", ".join(
            f"{GROUPS[g][0]} at {best.kl_weight[m, g]:.3g} with {best.efficacy[m, g]:.0f} %"
            for g in GROUPS
            if (m, g) in best.index
        )
        for m in methods
    )
    alt = (
        f"{', '.join(measures)} against the KL weight of Stage I, for the requests of highest and of lowest "
        f"association apart. Highest efficacy – {told}."
    )
    shown = curves[["method", "group", "kl_weight", *measures, "best"]]
    size = (1.0 + 2.5 * len(methods), 0.8 + 2.0 * len(measures))
    panels = {"nrows": len(measures), "ncols": len(methods), "sharex": True}
    return Figure(
        lambda axes: _draw_kl(axes, curves, measures, methods), curves, name, alt, model, shown, size, 2, **panels
    )


def _draw_kl(axes: Any, curves: pd.DataFrame, measures: Sequence[str], methods: list[str]) -> None:
    grid = sorted(curves.kl_weight.unique())
    ticks = sorted({grid[0], grid[len(grid) // 2], grid[-1]})
    for i, measure in enumerate(measures):
        for j, method in enumerate(methods):
            here, look = axes[i, j], style(method)
            _draw_groups(here, curves[curves.method == method], measure, look)
            here.set_xscale("log", base=2)
            here.set_xticks(ticks, labels=[f"{x:.3g}" for x in ticks])
            here.set(title="" if i else look.name, ylabel="" if j else MEASURES[measure])
            if measure in SCORES:
                here.set(ylim=(-4, 110), yticks=(0, 25, 50, 75, 100))
                here.tick_params(axis="y", labelleft=not j)
    for here in axes[-1]:
        here.set_xlabel("λ_KL")
    _legend_below(axes, 2, handlelength=2.6)


def _draw_groups(axes: Any, curves: pd.DataFrame, measure: str, look: Style) -> None:
    for group, (label, line, strength) in GROUPS.items():
        own = curves[curves.group == group]
        axes.plot(
            own.kl_weight, own[measure], color=look.color, alpha=strength, linestyle=line, marker=look.marker,
            markersize=5.5, markerfacecolor=look.color if group == "high" else "none", label=label
        )
        if measure == "efficacy":
            ring = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgewidth": 1.4}
            best = own[own.best]
            axes.plot(best.kl_weight, best[measure], markeredgecolor=_soft(0.9), linestyle="", **ring)


def sensitivity_curves(
    effects: pd.DataFrame, sweeps: Mapping[str, str], model: str | None = None, name: str = "sensitivity"
) -> Figure:
    """Scores per data set against each swept number, a column per sweep; below, how far the plan moved and what the
    outer objective fell to. The upright line marks the default.

    effects: `experiments.sensitivity.effects`; sweeps: name → words for its axis.
    """
    _require(effects, "dataset", "sweep", "value", "default", *SCORES, "moved, %", "after / before")
    datasets, shown = list(effects.dataset.unique()), [s for s in sweeps if s in set(effects.sweep)]

    ranges = {
        "efficacy": "efficacy {:.0f} to {:.0f}", "moved, %": "plan moved {:.2g} to {:.2g} percent",
        "after / before": "objective to {:.2g} to {:.2g} of its start"
    }
    told = "; ".join(
        f"{sweeps[sweep]}, {dataset}: "
        + ", ".join(text.format(own[column].min(), own[column].max()) for column, text in ranges.items())
        for sweep in shown
        for dataset in datasets
        for own in [effects[(effects.sweep == sweep) & (effects.dataset == dataset)]]
    )
    alt = (
        "Scores, displacement of the plan and outer objective against the numbers of the outer level, one changed at a "
        f"time. {told}."
    )
    summary = effects[["dataset", "sweep", "value", "efficacy", "moved, %", "after / before", "default"]]
    rows = len(datasets) + 2
    panels = {"nrows": rows, "ncols": len(shown), "sharex": "col", "sharey": "row"}
    return Figure(
        lambda axes: _draw_sweeps(axes, effects, {s: sweeps[s] for s in shown}, datasets), effects, name, alt, model,
        summary, (9.0, 1.0 + 1.75 * rows), 2, **panels
    )


def _draw_sweeps(axes: Any, effects: pd.DataFrame, sweeps: Mapping[str, str], datasets: list[str]) -> None:
    for j, (sweep, words) in enumerate(sweeps.items()):
        found = effects[effects.sweep == sweep]
        _draw_sweep(axes[:, j], found, datasets)
        for here in axes[:, j]:
            here.axvline(found.value[found.default].iloc[0], color=_soft(0.4), linewidth=1, linestyle=":", zorder=1)
            if sweep != "steps":
                here.set_xscale("log")
            here.set_xticks(values := sorted(found.value.unique()), labels=[f"{v:g}" for v in values])
            here.minorticks_off()
        for i, dataset in enumerate(datasets):
            axes[i, j].set(ylim=(-4, 106), ylabel="" if j else f"{dataset}\nscores, %")
        axes[-2, j].set(yscale="log", ylabel="" if j else "plan moved, %")
        axes[-1, j].set(ylabel="" if j else "outer objective,\nafter / before", xlabel=words)
        axes[-1, j].axhline(1, color=_soft(0.4), linewidth=1)
    scores, sets = (axes[i, 0].get_legend_handles_labels() for i in (0, -1))
    axes[0, 0].figure.legend(
        *(one + other for one, other in zip(scores, sets, strict=True)), loc="outside lower center",
        ncols=3 + len(datasets), columnspacing=1.2
    )


def _draw_sweep(panels: Any, found: pd.DataFrame, datasets: list[str]) -> None:
    """One column: the scores of each data set, then how far the plan moved, and what the outer objective fell to."""
    for k, dataset in enumerate(datasets):
        own = found[found.dataset == dataset]
        # later ones slimmer, so that equal curves show one inside the other
        for slim, (score, (marker, line)) in enumerate(SCORES.items()):
            looks = {"color": FALLBACK[0][3 - slim], "marker": marker, "linestyle": line, "label": score}
            panels[k].plot(own.value, own[score], markersize=8 - 2 * slim, linewidth=2.4 - 0.5 * slim, **looks)
        looks = {"color": FALLBACK[0][k % 4], "marker": ("o", "D", "v", "P")[k % 4], "label": dataset}
        panels[-2].plot(own.value, own["moved, %"], markersize=5, **looks)
        panels[-1].plot(own.value, own["after / before"], markersize=5, **looks)
