"""One number changed at a time: efficacy against the KL weight (MetaKE v3 Figure 5), and the outer level's own numbers
(Table 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.style import FALLBACK, in_order, style

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
    methods, grid = in_order(curves.method), sorted(curves.kl_weight.unique())
    ticks = sorted({grid[0], grid[len(grid) // 2], grid[-1]})

    def draw(axes: Any) -> None:
        for i, measure in enumerate(measures):
            for j, method in enumerate(methods):
                here, look = axes[i, j], style(method)
                for group, (label, line, strength) in GROUPS.items():
                    own = curves[(curves.method == method) & (curves.group == group)]
                    filled = look.color if group == "high" else "none"
                    here.plot(
                        own.kl_weight, own[measure], color=look.color, alpha=strength, linestyle=line,
                        marker=look.marker, markersize=5.5, markerfacecolor=filled, label=label
                    )
                    if measure == "efficacy":
                        best = own[own.best]
                        here.plot(
                            best.kl_weight, best[measure], marker="o", markersize=14, markerfacecolor="none",
                            markeredgecolor=_soft(0.9), markeredgewidth=1.4, linestyle=""
                        )
                here.set_xscale("log", base=2)
                here.set_xticks(ticks, labels=[f"{x:.3g}" for x in ticks])
                here.set(title="" if i else look.name, ylabel="" if j else MEASURES[measure])
                if measure in SCORES:
                    here.set(ylim=(-4, 110), yticks=(0, 25, 50, 75, 100))
                    here.tick_params(axis="y", labelleft=not j)
        for j in range(len(methods)):
            axes[-1, j].set_xlabel("λ_KL")
        axes[0, 0].figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.6
        )

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
        "association apart. Highest efficacy – "
        f"{told}."
    )
    columns = ["method", "group", "kl_weight", *measures, "best"]
    panels = {"nrows": len(measures), "ncols": len(methods), "sharex": True}
    return Figure(
        draw, curves, name, alt, model, curves[columns], (1.0 + 2.5 * len(methods), 0.8 + 2.0 * len(measures)), 2,
        **panels
    )


def sensitivity_curves(
    effects: pd.DataFrame, sweeps: Mapping[str, str], model: str | None = None, name: str = "sensitivity"
) -> Figure:
    """Scores per data set against each swept number, a column per sweep; below, how far the plan moved and what the
    outer objective fell to. The upright line marks the default.

    effects: `experiments.sensitivity.effects`; sweeps: name → words for its axis.
    """
    _require(effects, "dataset", "sweep", "value", "default", *SCORES, "moved, %", "after / before")
    datasets, shown = list(effects.dataset.unique()), [s for s in sweeps if s in set(effects.sweep)]

    def draw(axes: Any) -> None:
        for j, sweep in enumerate(shown):
            for i, dataset in enumerate(datasets):
                here, own = axes[i, j], effects[(effects.dataset == dataset) & (effects.sweep == sweep)]
                # later ones slimmer, so that equal curves show one inside the other
                for k, (score, (marker, line)) in enumerate(SCORES.items()):
                    here.plot(
                        own.value, own[score], color=FALLBACK[0][3 - k], marker=marker, linestyle=line,
                        markersize=8 - 2 * k, linewidth=2.4 - 0.5 * k, label=score
                    )
                here.set(ylim=(-4, 106), ylabel="" if j else f"{dataset}\nscores, %")
            for k, dataset in enumerate(datasets):
                own, looks = (
                    effects[(effects.dataset == dataset) & (effects.sweep == sweep)],
                    {"color": FALLBACK[0][k % 4], "marker": ("o", "D", "v", "P")[k % 4], "label": dataset},
                )
                axes[-2, j].plot(own.value, own["moved, %"], markersize=5, **looks)
                axes[-1, j].plot(own.value, own["after / before"], markersize=5, **looks)
            for here in axes[:, j]:
                own = effects[effects.sweep == sweep]
                here.axvline(own.value[own.default].iloc[0], color=_soft(0.4), linewidth=1, linestyle=":", zorder=1)
                if sweep != "steps":
                    here.set_xscale("log")
                here.set_xticks(values := sorted(own.value.unique()), labels=[f"{v:g}" for v in values])
                here.minorticks_off()
            axes[-2, j].set(yscale="log", ylabel="" if j else "plan moved, %")
            axes[-1, j].set(ylabel="" if j else "outer objective,\nafter / before", xlabel=sweeps[sweep])
            axes[-1, j].axhline(1, color=_soft(0.4), linewidth=1)
        handles = [axes[i, 0].get_legend_handles_labels() for i in (0, -1)]
        axes[0, 0].figure.legend(
            *(a + b for a, b in zip(*handles, strict=True)), loc="outside lower center", ncols=3 + len(datasets),
            columnspacing=1.2
        )

    ranges = {
        "efficacy": "efficacy {:.0f} to {:.0f}", "moved, %": "plan moved {:.2g} to {:.2g} percent",
        "after / before": "objective to {:.2g} to {:.2g} of its start"
    }
    told = "; ".join(
        f"{sweeps[s]}, {d}: " + ", ".join(text.format(own[column].min(), own[column].max()) for column,
        text in ranges.items())
        for s in shown for d in datasets for own in [effects[(effects.sweep == s) & (effects.dataset == d)]]
    )  # fmt: skip
    panels = {"nrows": len(datasets) + 2, "ncols": len(shown), "sharex": "col", "sharey": "row"}
    alt = (
        "Scores, displacement of the plan and outer objective against the numbers of the outer level, one "
        f"changed at a time. {told}."
    )
    return Figure(
        draw, effects, name, alt, model,
        effects[["dataset", "sweep", "value", "efficacy", "moved, %", "after / before", "default"]],
        (9.0, 1.0 + 1.75 * (len(datasets) + 2)), 2, **panels
    )
