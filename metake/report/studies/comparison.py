"""Methods side by side: what each reaches, on which data, and how far one is from another on the same cases."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.shown import Shown, table, texts
from metake.report.style import in_order, style

SHARES = ("efficacy", "generalization", "specificity")
UNBOUNDED = ("fluency", "consistency")  # not shares, or far from 100: their axis fits the values
LEAST = 2.0  # points that a panel of differences reaches to either side, at least
CELL = re.compile(r'<td class="text"> *((?:–|[\d.]+(?: ± [\d.]+)?))( |\*)</td>')


def _by_seed(records: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean and, over several seeds, sample standard deviation per data set, method and metric, in percent."""
    _require(records, "dataset", "method", *metrics)
    if "id" in records:
        _require(records, "seed")
        records = (100 * records.groupby(["dataset", "method", "seed"], sort=False)[list(metrics)].mean()).reset_index()
    rows = []
    for (dataset, method), group in records.groupby(["dataset", "method"], sort=False):
        for metric in metrics:
            values = group[metric].dropna()
            if len(values):
                told = group.get(f"{metric}_sd")
                sd = values.std() if told is None else told.iloc[0]  # of one value NaN
                rows.append({"dataset": dataset, "method": method, "metric": metric, "mean": values.mean(), "sd": sd})
    return pd.DataFrame(rows)


def _wide(found: pd.DataFrame, datasets: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """One row per data set and method, for a figure's text."""
    rows = []
    for dataset in datasets:
        for method in in_order(found.method):
            own = found[(found.dataset == dataset) & (found.method == method)].set_index("metric")
            if len(own):
                row = {"dataset": dataset, "method": method}
                for metric in (m for m in metrics if m in own.index):
                    row |= {metric: own["mean"][metric]} | (
                        {f"{metric} sd": own.sd[metric]} if found.sd.notna().any() else {}
                    )
                rows.append(row)
    return pd.DataFrame(rows)


def _grid(
    datasets: Sequence[str], metrics: Sequence[str], rows: Sequence[str], panel: Callable[[Any, str, str], None],
    unit: str, width: float = 1.95
) -> tuple[Callable[[Any], None], dict[str, Any]]:
    """A panel per metric (down) and data set (across), the same rows in each: narrow enough for a phone.

    Returns what draws it, and the size and panels for `Figure`.
    """
    titles = texts(pd.Series(datasets, name="dataset"), 0)

    def draw(axes: Any) -> None:
        for i, metric in enumerate(metrics):
            for j, dataset in enumerate(datasets):
                here = axes[i, j]
                panel(here, dataset, metric)
                here.set(
                    ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), yticklabels=[style(r).name for r in rows]
                )
                here.tick_params(axis="y", length=0)
                here.tick_params(axis="x", labelsize=8.5)
                here.spines["left"].set_visible(False)
                here.text(
                    0, 1, metric.replace("_", " ") + f", {unit}" * (metric != "fluency"), transform=here.transAxes,
                    va="bottom", fontsize=9.5
                )
                if not i:
                    here.set_title(titles[j], pad=19)

    size = (1.4 + width * len(datasets), 0.3 + len(metrics) * (0.5 + 0.2 * len(rows)))
    return draw, {"size": size, "nrows": len(metrics), "ncols": len(datasets), "sharey": True, "sharex": "row"}


def _number(axes: Any, place: int, text: str, width: float, strong: bool = False) -> None:
    """A number beside its row, in a column that ends `width` points right of the axes."""
    axes.annotate(
        text, (1, place), (width, 0), ("axes fraction", "data"), "offset points", ha="right", va="center", fontsize=9,
        fontweight="bold" if strong else "normal"
    )


def comparison_dots(
    records: pd.DataFrame, metrics: Sequence[str] = SHARES, model: str | None = None, name: str = "comparison"
) -> Figure:
    """Metrics per method, a panel per metric and data set; whiskers are ± one standard deviation over seeds.

    One order of methods throughout; a stem begins at the unedited model's value, if the records have it as "pre-edit";
    the highest of each panel is bold.
    records: dataset, method, and a column per metric, in one of three forms: a row per case, with id and seed, in
    shares; a row per run, in percent; a row per method, in percent, with the deviations as <metric>_sd.
    """
    found = _by_seed(records, metrics)
    datasets, methods = list(records.dataset.unique()), in_order(records.method)

    def panel(axes: Any, dataset: str, metric: str) -> None:
        own = found[(found.dataset == dataset) & (found.metric == metric)].set_index("method").reindex(methods)
        _draw_dots(axes, own, found.sd.notna().any(), metric in UNBOUNDED)

    draw, layout = _grid(datasets, metrics, methods, panel, "%", 2.3 if found.sd.notna().any() else 1.95)
    best = "; ".join(
        f"{d}, {m}: highest {' and '.join(style(b).name for b in _best(found, d, m)[0])} with {_best(found, d, m)[1]}"
        for d in datasets
        for m in metrics
    )
    alt = (
        f"Dots of {', '.join(metrics)} for {', '.join(style(m).name for m in methods)} on "
        f"{' and '.join(datasets)}. {best}."
    )
    return Figure(draw, records, name, alt, model, _wide(found, datasets, metrics), digits=2, **layout)


def _best(found: pd.DataFrame, dataset: str, metric: str, digits: int = 1) -> tuple[list[str], str]:
    """The methods that share the highest value as it is shown, and that value; the unedited model does not compete."""
    own = found[(found.dataset == dataset) & (found.metric == metric) & (found.method != "pre-edit")].dropna(
        subset="mean"
    )
    shown = own["mean"].map(f"{{:.{digits}f}}".format)
    top = shown[own["mean"].idxmax()] if len(own) else "–"
    return in_order(own.method[shown == top]), top


def _draw_dots(axes: Any, own: pd.DataFrame, deviations: bool, unbounded: bool) -> None:
    start = own["mean"].get("pre-edit", float("nan"))
    best = own["mean"].drop("pre-edit", errors="ignore").max()
    if start == start:
        axes.axvline(start, color=_soft(0.6), linestyle=":", linewidth=1.2, zorder=1)
    for place, (method, row) in enumerate(own.iterrows()):
        value, look = row["mean"], style(method)
        text = "–" if value != value else f"{value:.1f}" + (f" ± {row.sd:.1f}" if row.sd == row.sd else "")
        _number(
            axes, place, text, 62 if deviations else 32,
            value == value and method != "pre-edit" and f"{value:.1f}" == f"{best:.1f}"
        )
        if value == value:
            axes.plot(
                [start, value], [place, place], color=look.color, alpha=0.45, linewidth=2.4, solid_capstyle="butt",
                zorder=2
            )
            marks = {
                "color": look.color, "marker": look.marker, "markersize": 7, "markeredgewidth": 0, "elinewidth": 1.3,
                "capsize": 2, "zorder": 3
            }
            axes.errorbar(value, place, xerr=row.sd if row.sd == row.sd else None, **marks)
    if unbounded:
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
    else:
        axes.set(xlim=(-5, 105), xticks=(0, 50, 100), xticklabels=("0", "50", "100"))


def comparison_table(
    summary: pd.DataFrame, caption: str = "", digits: int = 1, source: pd.DataFrame | None = None
) -> Shown:
    """What `experiments.comparison.summarize` returns, methods in their order, a deviation as mean ± sd in one cell.

    The highest of a column within a data set is bold, in the text marked by *; ties as shown share it.
    """
    metrics = [c for c in summary if c not in ("dataset", "method") and not c.endswith("_sd")]
    found = summary.melt(["dataset", "method"], metrics, "metric", "mean")
    parts = [
        own.set_index("method").loc[in_order(own.method)].reset_index()
        for _, own in summary.groupby("dataset", sort=False)
    ]
    frame = pd.concat(parts, ignore_index=True)
    best = {(d, m): _best(found, d, m, digits)[0] for d in frame.dataset.unique() for m in metrics}
    columns: dict[str, Any] = {"dataset": frame.dataset, "method": frame.method}
    for metric in metrics:
        sd = frame.get(f"{metric}_sd", pd.Series(float("nan"), frame.index))
        cells = [
            "–" if v != v else f"{v:.{digits}f}" + (f" ± {s:.{digits}f}" if s == s else "")
            for v, s in zip(frame[metric], sd, strict=True)
        ]
        cells = [
            c + ("*" if m in best[d, metric] else " ")
            for c, d, m in zip(cells, frame.dataset, frame.method, strict=True)
        ]
        columns[metric] = [c.rjust(max(len(metric) + 1, *map(len, cells))) for c in cells]
    shown = table(pd.DataFrame(columns), caption, source=summary if source is None else source)
    html = CELL.sub(lambda m: f'<td class="num">{f"<strong>{m[1]}</strong>" if m[2] == "*" else m[1]}</td>', shown.html)
    return Shown(html, shown.text)


def tradeoff(
    records: pd.DataFrame, x: str = "specificity", y: str = "efficacy", model: str | None = None, name: str = "tradeoff"
) -> Figure:
    """One metric against another, a point per method, a panel per data set; whiskers: ± one deviation over seeds.

    records: as for `comparison_dots`.
    """
    found = _by_seed(records, (x, y))
    datasets, methods = list(records.dataset.unique()), in_order(records.method)

    def draw(axes: Any) -> None:
        for i, dataset in enumerate(datasets):
            for method in methods:
                own = found[(found.dataset == dataset) & (found.method == method)].set_index("metric")
                if {x, y} <= set(own.index):
                    look, (sx, sy) = style(method), own.sd.fillna(0)[[x, y]]
                    marks = {
                        "color": look.color, "marker": look.marker, "markersize": 8, "linestyle": "", "elinewidth": 1.4,
                        "markeredgewidth": 0, "label": look.name
                    }
                    axes[0, i].errorbar(own["mean"][x], own["mean"][y], sy or None, sx or None, **marks)
            axes[0, i].set(
                xlabel=f"{x}, %", ylabel="" if i else f"{y}, %", title=texts(pd.Series([dataset], name="dataset"), 0)[0]
            )
            axes[0, i].margins(0.12)
        axes[0, 0].figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3, columnspacing=1.2,
            handletextpad=0.4
        )

    wide = _wide(found, datasets, (x, y))
    points = "; ".join(
        f"{r['dataset']}, {style(r['method']).name}: {r[x]:.1f} and {r[y]:.1f}" for r in wide.to_dict("records")
    )
    alt = f"{x.capitalize()} against {y}, in percent, per method. {points}."
    size = (0.7 + 2.4 * len(datasets), 3.0 + 0.2 * -(-len(methods) // 3))
    return Figure(draw, records, name, alt, model, wide, size, 2, ncols=len(datasets), sharey=True)


def forest(differences: pd.DataFrame, against: str, model: str | None = None, name: str = "differences") -> Figure:
    """Paired differences with their intervals, a panel per metric and data set, a row per method compared with.

    differences: as `experiments.comparison.differences` returns them (dataset, metric, method, difference, low, high;
    in points). against: what is subtracted from what, for the axis. A filled mark and a bold number:
    the interval excludes zero.
    """
    _require(differences, "dataset", "metric", "method", "difference", "low", "high")
    datasets, metrics, methods = (list(differences[c].unique()) for c in ("dataset", "metric", "method"))
    methods = in_order(methods)
    clear = (differences.low > 0) | (differences.high < 0)

    def panel(axes: Any, dataset: str, metric: str) -> None:
        axes.axvline(0, color=_soft(0.8), linewidth=1, zorder=1)
        own = differences[(differences.dataset == dataset) & (differences.metric == metric)]
        for row in own.itertuples():
            place, look, sure = methods.index(row.method), style(row.method), clear[row.Index]
            axes.plot(
                [row.low, row.high], [place, place], color=look.color, linewidth=1.8, solid_capstyle="butt", zorder=2
            )
            fill = {
                "markerfacecolor": look.color if sure else "none", "markeredgecolor": look.color,
                "markeredgewidth": 1.2
            }
            axes.plot(row.difference, place, marker=look.marker, markersize=6.5, linestyle="", zorder=3, **fill)
            _number(axes, place, signed(row.difference), 34, sure)
        reach = own.loc[:, ["low", "high"]].abs().max(axis=None)
        axes.margins(x=0.08)
        if reach < LEAST:  # a tenth of a point must not look large
            axes.update_datalim([(-LEAST, 0), (LEAST, 0)])
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(3))
        if metric == metrics[-1]:
            axes.set_xlabel(against, fontsize=9)

    draw, layout = _grid(datasets, metrics, methods, panel, "points")
    told = "; ".join(
        f"{style(m).name}: {len(own)} intervals, {(own.low > 0).sum()} above zero, {(own.high < 0).sum()} below"
        for m in methods
        for own in [differences[differences.method == m]]
    )
    alt = (
        f"{against}, paired by case, of {', '.join(metrics)} on {' and '.join(datasets)}, with 95 % intervals. {told}."
    )
    return Figure(draw, differences, name, alt, model, _intervals(differences), **layout)


def _intervals(differences: pd.DataFrame) -> pd.DataFrame:
    """One row per data set and method, a difference with its interval per metric: for a figure's text."""
    told = differences.assign(
        text=[f"{signed(r.difference)} [{signed(r.low)}, {signed(r.high)}]" for r in differences.itertuples()]
    )
    wide = told.pivot(index=["dataset", "method"], columns="metric", values="text")
    places = [(d, m) for d in told.dataset.unique() for m in in_order(told[told.dataset == d].method)]
    return wide.loc[places, list(told.metric.unique())].reset_index().rename_axis(columns=None)


def signed(value: float) -> str:
    """One decimal with its sign; zero, and what is shown as zero, has none."""
    text = f"{value:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "−")
