"""The structural proxy beside the exact hypergradient: where they point, what a step gives, what is certified."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _log_axis, _require, _soft
from metake.report.style import METHOD_STYLE, Style

DIRECTIONS = {
    "exact": Style("#0e7fa8", "s", "-", "exact g"),
    "proxy": Style(METHOD_STYLE["metake"].color, "o", "-", "proxy ĝ"),
    "key_only": Style("#a06a00", "^", "--", "key-only proxy"),
    "none": Style(METHOD_STYLE["pre-edit"].color, "X", ":", "no update"),
}
POINTS = {
    "v_init": Style(METHOD_STYLE["pre-edit"].color, "D", ":", "at v_init"),
    "refined by Adam": Style(METHOD_STYLE["metake"].color, "o", "-", "refined by Adam"),
    "refined by plain descent": Style("#7a5cc8", "v", "--", "refined by plain descent"),
}
FREE = ("gap", "strength", "compatibility", "leakage", "alignment")


def _points(records: pd.DataFrame) -> list[str]:
    _require(records, "point")
    return [p for p in POINTS if p in set(records.point)]


def _strip(axes: Any, values: pd.Series, row: float, look: Style, filled: bool) -> None:
    """One mark a value, sorted and spread evenly over a lane, and their median."""
    ordered = sorted(values.dropna())
    lanes = [row + 0.11 * (2 * (i * 0.618034 % 1) - 1) for i in range(len(ordered))]
    face = look.color if filled else "none"
    axes.scatter(
        ordered, lanes, s=25, marker=look.marker, facecolor=face, edgecolor=look.color, linewidth=1.1, alpha=0.85,
        zorder=3
    )
    axes.plot(
        [values.median()] * 2, [row - 0.17, row + 0.17], color=_soft(1), linewidth=2.2, solid_capstyle="butt", zorder=5
    )


def _rows(axes: Any, names: list[str]) -> None:
    axes.set(ylim=(len(names) - 0.45, -0.55), yticks=range(len(names)), yticklabels=names)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=_soft(0.6), linewidth=1, zorder=1)


def proxy_cosines(records: pd.DataFrame, model: str | None = None, name: str = "proxy_cosines") -> Figure:
    """Cosine of exact and proxy hypergradient of every edit, per point: with the anchor that both share, and without.

    records: point, cosine, down_cosine; one row per edit and point.
    """
    _require(records, "point", "cosine", "down_cosine")
    points = _points(records)
    kinds = ["cosine", "down_cosine"]
    summary = records.melt(["request", "point"], kinds, "gradients", "cosine of").replace(
        {"cosine": "whole", "down_cosine": "without anchor"}
    )
    summary = (
        summary.groupby(["point", "gradients"], sort=False)["cosine of"].agg(["min", "median", "max"]).reset_index()
    )

    def draw(axes: Any) -> None:
        for row, point in enumerate(points):
            own, look = records[records.point == point], POINTS[point]
            for column, offset, filled in (("cosine", -0.2, True), ("down_cosine", 0.2, False)):
                _strip(axes, own[column], row + offset, look, filled)
        _rows(axes, [POINTS[p].name for p in points])
        axes.set(xlim=(-1.04, 1.04), xlabel="cosine of exact and proxy gradient")
        axes.scatter([], [], s=26, color=_soft(0.9), label="g and ĝ, anchor included")
        axes.scatter([], [], s=26, facecolor="none", edgecolor=_soft(0.9), label="without the anchor that both share")
        axes.plot([], [], color=_soft(1), linewidth=2.2, label="median")
        axes.legend(loc="lower center", bbox_to_anchor=(0.42, 1.0), ncols=3, handletextpad=0.4, columnspacing=1.2)

    medians = records.groupby("point", sort=False)[kinds].median()
    said = "; ".join(
        f"{POINTS[p].name}: median {m.cosine:.2f}, without the anchor {m.down_cosine:.2f}"
        for p, m in medians.iterrows()
    )
    alt = f"Cosine of exact and proxy hypergradient of each edit. {said}."
    return Figure(
        draw, records[["request", "point", *kinds]], name, alt, model, summary, (7.4, 0.9 + 0.75 * len(points)),
        digits=2
    )


def proxy_descent(records: pd.DataFrame, model: str | None = None, name: str = "proxy_descent") -> Figure:
    """Reduction of the outer loss by one step along four directions, a panel per point; logarithmic beyond ±10.

    records: point, exact, proxy, key_only, none, equal_proxy, equal_key_only, in basis points;
    one row per edit and point.
    """
    _require(records, "point", *DIRECTIONS)
    points = _points(records)
    tall = records.melt(
        ["request", "point"], [*DIRECTIONS, "equal_proxy", "equal_key_only"], "direction", "basis_points"
    )
    tall.attrs = records.attrs
    summary = tall.groupby(["point", "direction"], sort=False).basis_points.agg(["min", "median", "max"]).reset_index()

    def panel(axes: Any, point: str) -> None:
        own = records[records.point == point]
        for row, (direction, look) in enumerate(DIRECTIONS.items()):
            both = f"equal_{direction}" in own
            _strip(axes, own[direction], row - 0.18 * both, look, True)
            if both:
                _strip(axes, own[f"equal_{direction}"], row + 0.18, look, False)
        reach = max(abs(x) for x in axes.get_xlim())
        ticks = [sign * 10.0**k for k in (1, 2, 3) for sign in (-1, 1) if 10.0**k < reach] + [0]
        axes.set_xscale("symlog", linthresh=10, linscale=0.8)  # a few edits move a hundred times more than most
        axes.xaxis.set(
            major_locator=mpl.ticker.FixedLocator(ticks), minor_locator=mpl.ticker.NullLocator(),
            major_formatter=lambda value, _: f"{value:g}".replace("-", "−")
        )
        axes.set_title(POINTS[point].name)
        axes.set_xlabel("reduction of F, basis points")

    def draw(axes: Any) -> None:
        for i, point in enumerate(points):
            panel(axes[0, i], point)
            _rows(axes[0, i], [look.name for look in DIRECTIONS.values()])
            axes[0, i].margins(x=0.08)
        last = axes[0, -1]
        last.scatter([], [], s=24, color=_soft(0.9), label="same step size")
        last.scatter([], [], s=24, facecolor="none", edgecolor=_soft(0.9), label="same length as g")
        last.figure.legend(loc="outside lower center", ncols=2, handletextpad=0.4)

    medians = records.groupby("point", sort=False)[list(DIRECTIONS)].median()
    said = "; ".join(
        f"{POINTS[p].name}: " + ", ".join(f"{look.name} {medians.loc[p, d]:.3g}" for d, look in DIRECTIONS.items())
        for p in points
    )
    alt = f"Median reduction of the outer loss in basis points by one step. {said}."
    return Figure(
        draw, tall, name, alt, model, summary, (1.4 + 2.25 * len(points), 3.3), digits=2, ncols=len(points), sharey=True
    )


def _region(axes: Any) -> None:
    """The certified region ε_gap/ρ < (κ − ε_tail)/(1 + ε_tail), both axes divided by ρ."""
    axes.set_xscale("symlog", linthresh=0.1, linscale=0.6)
    axes.set_yscale("log")
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    right, high, low = max(right, 3), max(high, 3), low / 3  # room for the word
    xs = [low * (right / low) ** (i / 200) for i in range(201)]
    axes.fill_between(xs, low, [min(x, high) for x in xs], color=_soft(0.13), linewidth=0, zorder=0)
    axes.plot(xs, xs, color=_soft(0.7), linewidth=1.2, zorder=1)
    axes.axvline(0, color=_soft(0.35), linewidth=1, linestyle=":", zorder=1)
    axes.text(
        0.97, 0.05, "certified", transform=axes.transAxes, ha="right", zorder=6, fontweight="bold", color=_soft(0.8)
    )
    axes.set(
        xlim=(left, right), ylim=(low, high), xlabel=r"threshold / ρ = (κ − $ε_{tail}$)/(1 + $ε_{tail}$)",
        ylabel=r"proxy gap / ρ = $ε_{gap}$/ρ"
    )
    _log_axis(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def proxy_certificates(
    cases: pd.DataFrame, records: pd.DataFrame, model: str | None = None, name: str = "proxy_certificates",
    drawn: int = 1600
) -> Figure:
    """Theorem 2's condition as a region of the plane: random gradients on the left, the model's edits on the right.

    cases, records: gap, strength, compatibility, leakage, alignment; records also point. Of the cases,
    the first of an even choice are drawn and kept; undefined ones are not.
    """
    _require(cases, *FREE)
    _require(records, "point", *FREE)
    few = cases.iloc[:: max(1, len(cases) // drawn)]
    data = pd.concat([few.assign(point="random")[["point", *FREE]], records[["point", *FREE]]], ignore_index=True)
    data = data.assign(x=(data.compatibility - data.leakage) / (1 + data.leakage), y=data.gap / data.strength).dropna(
        subset=["x", "y"]
    )
    data.attrs = records.attrs
    points = _points(records)
    counted = data.assign(certified=data.y < data.x, descends=data.alignment > 0).groupby("point", sort=False)
    summary = counted.agg(n=("x", "size"), certified=("certified", "sum"), descends=("descends", "sum")).reset_index()

    def draw(axes: Any) -> None:
        left, right = axes[0]
        random = data[data.point == "random"]
        falls = random.alignment > 0
        left.scatter(
            random.x[falls], random.y[falls], s=9, color=_soft(0.55), marker=".", linewidth=0, label="descends",
            zorder=2
        )
        left.scatter(
            random.x[~falls], random.y[~falls], s=12, color="#b0487a", marker="x", linewidth=0.9,
            label="does not descend", zorder=3
        )
        for point in points:
            _edits(right, data[data.point == point], POINTS[point])
        right.scatter([], [], s=34, facecolor="none", edgecolor=_soft(0.9), label="hollow: does not descend")
        for here, title, scale in ((left, "Random gradients", 1.6), (right, "Edits of the model", 1)):
            _region(here)
            here.set_title(title)
            here.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2, fontsize=8.5, handletextpad=0.3,
                columnspacing=1, markerscale=scale
            )
        right.set_ylabel("")

    said = "; ".join(f"{r.point}: {r.certified} of {r.n} certified, {r.descends} descend" for r in summary.itertuples())
    alt = f"Proxy gap against the threshold that Theorem 2 allows; below the diagonal a case is certified. {said}."
    return Figure(draw, data, name, alt, model, summary, (8.6, 4.2), ncols=2)


def _edits(axes: Any, own: pd.DataFrame, look: Style) -> None:
    falls = own.alignment > 0
    axes.scatter([], [], s=34, color=look.color, marker=look.marker, label=look.name)
    # an alpha of its own would fill "none" with black
    faces = [mpl.colors.to_rgba(look.color, 0.9) if f else (0, 0, 0, 0) for f in falls]
    axes.scatter(
        own.x, own.y, s=34, facecolor=faces, edgecolor=look.color, marker=look.marker, linewidth=1.2, zorder=3
    )
