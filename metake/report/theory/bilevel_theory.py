"""What the bi-level theory says, drawn: the step along −c, the look-ahead's descent, the last layer's dominance."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _log_axis, _require, _soft
from metake.report.style import FALLBACK, Style

COLORS, MARKERS, LINES = FALLBACK[0], ("s", "o", "^", "D"), ("-", "--", "-.", ":")
ANCHORS = {
    "sum": Style(COLORS[1], "s", "--", "literal anchor"),
    "relative": Style(COLORS[0], "o", "-", "anchor relative to ‖v‖²"),
}
WHOLE, AHEAD = Style(COLORS[2], "^", "-", "whole edit"), Style(COLORS[0], "o", "-", "look-ahead")


def coupling_step(
    records: pd.DataFrame, plane: pd.DataFrame, model: str | None = None, name: str = "necessity"
) -> Figure:
    """Left: F(v_init − ηc) over F(v_init) for each request; right: F on a plane through v_init.

    records: id, anchor, eta, before, after; plane: down, along, loss, of one request.
    """
    _require(records, "id", "anchor", "eta", "before", "after")
    _require(plane, "down", "along", "loss")
    shares = records.assign(share=records.after / records.before)

    def draw(axes: Any) -> None:
        left = axes[0, 0]
        left.axhline(1, color=_soft(0.5), linewidth=1)
        for anchor, group in shares.groupby("anchor", sort=False):
            look = ANCHORS[anchor]
            for i, (_, own) in enumerate(group.groupby("id", sort=False)):
                left.plot(
                    own.eta, own.share, color=look.color, marker=look.marker, markersize=4, linestyle=look.line,
                    linewidth=1.2, label=look.name if not i else None
                )
        left.set(
            xscale="log", ylim=(0, 1.4), xlabel="step η", ylabel="F after the step / F before",
            title="From the isolated target along −c"
        )
        _log_axis(left.xaxis)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, handlelength=1.6)
        _draw_plane(axes[0, 1], plane)

    best = shares.groupby(["anchor", "id"], sort=False).share.min().reset_index()
    summary = (
        best.groupby("anchor", sort=False)
        .share.agg(["min", "median", "max"])
        .reset_index()
        .rename(columns={"anchor": "lowest F after / before, by anchor"})
    )
    alt = f"""The outer loss after the whole edit, over its value at the isolated target, against the step along minus
        c, {records.id.nunique()} requests with two anchors.
        Every curve starts below one; the least is {shares.share.min():.2f}, and long steps under the literal anchor
        rise above one.
        Second panel: contours of the loss on a plane through the isolated target, which does not lie at the lowest
        point."""
    data = pd.concat([shares.assign(kind="step"), plane.assign(kind="plane")], ignore_index=True)
    return Figure(draw, data, name, alt, model, summary, (8.8, 4.1), ncols=2)


def _draw_plane(axes: Any, plane: pd.DataFrame) -> None:
    grid = plane.pivot(index="along", columns="down", values="loss")
    low, high = grid.to_numpy().min(), grid.to_numpy().max()
    levels = [low * (high / low) ** (i / 9) for i in range(1, 9)]
    shades = mpl.colors.LinearSegmentedColormap.from_list("ink", [_soft(0.85), _soft(0.25)])
    lines = axes.contour(grid.columns, grid.index, grid.to_numpy(), levels=levels, cmap=shades, linewidths=1.1)
    axes.clabel(lines, levels[::2], fmt=lambda value: f"{value:.2g}", fontsize=8)
    least, end = plane.loc[plane.loss.idxmin()], 0.45 * grid.columns.max()
    axes.annotate(
        "", (end, 0), (0, 0), arrowprops={"arrowstyle": "-|>", "color": AHEAD.color, "linewidth": 2, "shrinkA": 0}
    )
    axes.annotate("−c", (end, 0), xytext=(3, 5), textcoords="offset points", color=AHEAD.color, fontweight="bold")
    axes.plot(0, 0, color=WHOLE.color, marker="D", markersize=8, linestyle="", label="isolated target")
    axes.plot(
        least.down, least.along, color=COLORS[1], marker="*", markersize=13, linestyle="", label="lowest F on the grid"
    )
    axes.set(xlabel="along −c", ylabel="along the plan r", title="F after the whole edit, one request")
    axes.grid(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, handletextpad=0.3)


def descent(
    falls: pd.DataFrame, iterates: pd.DataFrame, floor: pd.DataFrame, model: str | None = None,
    name: str = "convergence"
) -> Figure:
    """Left: what each step's fall is of η‖∇F_VL‖², against ηL; middle: F_VL over the steps; right:
    both gradients and Corollary 2's bound.

    falls: anchor, product, share; iterates: anchor, factor, step, loss; floor: T, least look-ahead, least whole, bound.
    """
    _require(falls, "anchor", "product", "share")
    _require(iterates, "anchor", "factor", "step", "loss")
    _require(floor, "T", "least look-ahead", "least whole", "bound")

    def draw(axes: Any) -> None:
        _draw_falls(axes[0, 0], falls)
        _draw_runs(axes[0, 1], iterates)
        _draw_floor(axes[0, 2], floor)

    inside = falls[falls["product"] < 2]
    shown = {
        "product": ("product", "first"), "steps": ("share", "size"), "least": ("share", "min"),
        "bound": ("bound", "first")
    }
    summary = falls.groupby(["anchor", "factor"], sort=False).agg(**shown).reset_index()
    alt = f"""Three panels. First: {len(falls)} steps; their fall over eta times the squared gradient norm lies on or
        above the line one minus eta L over two
        for {(inside.share > inside.bound - inside.error).sum()} of {len(inside)} steps with eta L below two,
        and below zero for some beyond. Second: the look-ahead loss over the steps for several step sizes.
        Third: the look-ahead's gradient falls to {floor["least look-ahead"].iloc[-1]:.2g}, the whole edit's stays at
        {floor["least whole"].iloc[-1]:.2g},
        under a bound of {floor.bound.iloc[-1]:.2g}."""
    data = pd.concat(
        [falls.assign(kind="step"), iterates.assign(kind="iterate"), floor.assign(kind="floor")], ignore_index=True
    )
    return Figure(draw, data, name, alt, model, summary, (11.2, 4.2), ncols=3)


def _draw_falls(axes: Any, falls: pd.DataFrame) -> None:
    """What each step's fall is of η‖∇F_VL‖², against ηL."""
    most = max(3.0, falls["product"].max())
    axes.plot([0, most], [1, 1 - most / 2], color=_soft(0.8), linewidth=1.6, label="1 − ηL/2, the bound")
    axes.axhline(0, color=_soft(0.4), linewidth=1)
    axes.axvline(2, color=_soft(0.4), linewidth=1, linestyle=":")
    for anchor, own in falls.groupby("anchor", sort=False):
        look = ANCHORS[anchor]
        axes.scatter(
            own["product"], own.share, color=look.color, marker=look.marker, s=22, alpha=0.75, linewidth=0, zorder=3,
            label=look.name
        )
    axes.set(
        xlabel="η L", ylabel="fall / η‖gradient‖²", title="Look-ahead, step by step", ylim=(-1.0, 1.1)
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), handletextpad=0.4)


def _draw_floor(axes: Any, floor: pd.DataFrame) -> None:
    """Both gradients and Corollary 2's bound."""
    axes.plot(floor["T"], floor.bound, color=_soft(0.8), label="bound of Corollary 2")
    for column, look, size in (("least whole", WHOLE, 5), ("least look-ahead", AHEAD, 4)):
        axes.plot(
            floor["T"], floor[column], color=look.color, marker=look.marker, linestyle=look.line, markersize=size,
            label=look.name
        )
    axes.set(yscale="log", xlabel="steps T", title="Smallest gradient so far")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), handletextpad=0.4)


def _draw_runs(axes: Any, iterates: pd.DataFrame) -> None:
    """F_VL of the runs with the anchor under which the model's own curvature shows."""
    own = iterates[iterates.anchor == "relative"]
    factors = sorted(own.factor.unique())
    for i, factor in enumerate(factors):
        run = own[own.factor == factor]
        tint = mpl.colors.to_rgba(AHEAD.color, 0.35 + 0.65 * i / max(1, len(factors) - 1))
        axes.plot(
            run.step, run.loss, color=tint, linestyle=LINES[i % 4], marker=(*MARKERS, "P", "X")[i % 6], markersize=4,
            linewidth=1.3, label=f"{factor:.1f}"
        )
    axes.set(yscale="log", xlabel="step", title="Its loss, relative anchor")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))
    _log_axis(axes.yaxis)
    axes.legend(title="η L", title_fontsize=9, fontsize=8.5, ncols=2, handlelength=1.8, columnspacing=1.0)


def last_layer(
    lemmas: pd.DataFrame, instances: pd.DataFrame, drifts: pd.DataFrame, real: pd.DataFrame, model: str | None = None,
    name: str = "dominance"
) -> Figure:
    """Left: ‖M_l − M_L‖ against Lemma 4's bound; right: ‖g − ĝ‖/‖ĝ‖ against q; at random, and on the model.

    lemmas: gates apart, paper, mean value; instances: q, error, lower; drifts: gates apart, mean value; real: proxy,
    q, error.
    """
    _require(lemmas, "gates apart", "paper", "mean value")
    _require(instances, "q", "error", "lower")
    paper = lemmas[lemmas.paper < float("inf")]

    def draw(axes: Any) -> None:
        left, right = axes[0]
        _draw_gates(left, paper, lemmas, drifts)
        _draw_errors(right, instances, real)
        left.set(xscale="log", yscale="log")
        left.set_ylim(top=3e4)
        _square(left, "bound", "distance of two gates", "Lemma 4: drift of the gates")
        _square(right, "q", "‖g − ĝ‖ / ‖ĝ‖", "Theorem 3: error of the proxy")

    ratios = {
        "Lemma 4, the paper's": paper["gates apart"] / paper.paper,
        "Lemma 4, mean value": lemmas["gates apart"] / lemmas["mean value"],
        "Theorem 3": instances.error / instances.q,
    }
    summary = pd.DataFrame([
        {"quantity": name, "instances": len(ratio), "largest left over right side": ratio.max()}
        for name, ratio in ratios.items()
    ])
    above = sum(int((ratio > 1 + 1e-9).sum()) for ratio in ratios.values())
    rises = instances[~instances.lower]
    alt = f"""Two logarithmic scatter plots with the diagonal where a bound is attained; {above} random instances lie
        above it. First: the drift of gates against
        its bounds; the {len(drifts)} real points lie far to the right, at bounds of {drifts["mean value"].min():.2g}
        and more. Second: the proxy's error against q;
        {len(rises)} instances whose loss rises, with q from {rises.q.min():.2g}, and real requests with q from
        {real.q.min():.2g} to {real.q.max():.2g}."""
    kinds = {"lemma 4": lemmas, "theorem": instances, "real drift": drifts, "real request": real}
    data = pd.concat([own.assign(kind=kind) for kind, own in kinds.items()], ignore_index=True)
    return Figure(draw, data, name, alt, model, summary, (8.8, 4.0), ncols=2)


def _draw_gates(axes: Any, paper: pd.DataFrame, lemmas: pd.DataFrame, drifts: pd.DataFrame) -> None:
    """‖M_l − M_L‖ against its bounds."""
    marks = (
        (paper.paper, paper, COLORS[0], "s", 14, 0.7, "the paper's bound, where Δ < λ"),
        (lemmas["mean value"], lemmas, COLORS[1], "P", 18, 0.6, "mean-value bound, always"),
        (drifts["mean value"], drifts, COLORS[3], "D", 34, None, "mean-value bound, real layers"),
    )
    for bound, own, color, marker, size, alpha, label in marks:
        axes.scatter(
            bound, own["gates apart"], color=color, marker=marker, s=size, alpha=alpha, linewidth=0, label=label
        )


def _draw_errors(axes: Any, instances: pd.DataFrame, real: pd.DataFrame) -> None:
    """‖g − ĝ‖/‖ĝ‖ against q."""
    falls, rises = instances[instances.lower], instances[~instances.lower]
    axes.scatter(
        falls.q, falls.error, color=COLORS[0], marker="o", s=14, alpha=0.6, linewidth=0, label="F falls along −ĝ"
    )
    axes.scatter(rises.q, rises.error, color=COLORS[1], marker="x", s=26, linewidth=1.4, label="F rises")
    for proxy, marker, color in (("one G", "D", COLORS[2]), ("Algorithm 1", "^", COLORS[3])):
        own = real[real.proxy == proxy]
        axes.scatter(
            own.q, own.error, color=color, marker=marker, s=38, linewidth=0, zorder=4, label=f"real, {proxy}"
        )
    axes.axvline(1, color=_soft(0.5), linewidth=1, linestyle=":")


def _square(axes: Any, xlabel: str, ylabel: str, title: str) -> None:
    """Two logarithmic axes with the diagonal where a bound is attained."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    low, high = max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=_soft(0.8), linewidth=1.4, zorder=1)
    axes.legend(loc="upper left", fontsize=8.5, handletextpad=0.2)
