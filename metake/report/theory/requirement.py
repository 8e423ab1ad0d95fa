"""Figures of three statements: the feasible interval of a plan, suppression by the spectrum, ball and ellipsoid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _log_axis, _require, _soft
from metake.report.shown import NOISE
from metake.report.style import METHOD_STYLE, in_order, style

GOOD, FIRST, SECOND, BAD = (METHOD_STYLE[m].color for m in ("memit", "alphaedit", "blue", "pre-edit"))
OUTCOMES = {
    "both hold": (GOOD, "o"), "too little is written": (FIRST, "v"), "too much is left": (SECOND, "^"),
    "both fail": (BAD, "x"),
    "both are served": (GOOD, "o"), "easy one stuck": (FIRST, "v"), "hard one unsafe": (SECOND, "^"),
}  # fmt: skip
"""How the outcome of a plan, or of a λ, is drawn."""


def _outcomes(axes: Any, records: pd.DataFrame, x: str, y: str, size: float = 15) -> None:
    for outcome in (o for o in OUTCOMES if o in set(records.outcome)):
        own, (color, marker) = records[records.outcome == outcome], OUTCOMES[outcome]
        line = {"linewidth": 1.1} if marker == "x" else {"linewidth": 0}
        axes.scatter(own[x], own[y], color=color, marker=marker, s=size, alpha=0.85, zorder=3, label=outcome, **line)


def _key(axes: Any, ncols: int = 2) -> None:
    """A legend under the axes."""
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=ncols, columnspacing=1.2, handletextpad=0.4,
        borderaxespad=0
    )


def _counted(records: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return records.groupby(list(columns), sort=False).size().rename("count").reset_index()


def feasible_plans(
    region: pd.DataFrame, plans: pd.DataFrame, intervals: pd.DataFrame, name: str = "editing_requirement"
) -> Figure:
    """Left: norms of a plan against β, the two ends and what became of plans that were really written, τ = ε. Right:
    λ of two pairs of requests.

    region: beta, lower, upper; plans: beta, norm, outcome; intervals: pair, request, gamma, first, last.
    """
    _require(region, "beta", "lower", "upper")
    _require(intervals, "pair", "request", "first", "last")
    summary = _counted(plans, "outcome")

    def draw(axes: Any) -> None:
        left, right = axes[0]
        fits = region[region.lower <= region.upper]
        left.fill_between(fits.beta, fits.lower, fits.upper, color=GOOD, alpha=0.16, linewidth=0)
        left.plot(region.beta, region.lower, color=FIRST, linestyle="--", label="τ/β")
        left.plot(region.beta, region.upper, color=SECOND, linestyle="-", label="ε/(1−β)")
        left.axvline(fits.beta.min(), color=_soft(0.6), linewidth=1.2, linestyle=":", label="β = τ/(τ+ε)")
        _outcomes(left, plans, "beta", "norm")
        left.set(
            yscale="log", xlim=(0, 1), ylim=(0.45, 22), xlabel="share β that is written",
            ylabel="norm of the plan ‖r‖, in units of τ = ε", title="Plans that were written"
        )
        _log_axis(left.yaxis)
        _key(left, 3)
        _draw_intervals(right, intervals)

    told = "; ".join(f"{outcome}: {count}" for outcome, count in summary.to_numpy())
    spans = "; ".join(f"{r.pair}, {r.request}: λ from {r.first:.2g} to {r.last:.2g}" for r in intervals.itertuples())
    alt = f"""Left: norm of a plan against β with the feasible region between τ/β and ε/(1−β), empty left of β =
        {region[region.lower <= region.upper].beta.min():.2g};
        {len(plans)} plans lie on the side of each curve that their outcome demands ({told}). Right: admissible λ of
        two pairs of requests. {spans}."""
    data = pd.concat(
        [region.assign(kind="region"), plans.assign(kind="plan"), intervals.assign(kind="interval")], ignore_index=True
    )
    return Figure(draw, data, name, alt, None, summary, (9.4, 4.5), ncols=2, width_ratios=(5, 4))


def _draw_intervals(axes: Any, intervals: pd.DataFrame) -> None:
    rows = intervals.reset_index(drop=True)
    for i, row in rows.iterrows():
        place = i + 0.5 * (i >= 2)
        axes.barh(place, row["last"] - row["first"], left=row["first"], height=0.5, color=GOOD, alpha=0.85, linewidth=0)
        axes.barh(place, row["first"] - 0.04, left=0.04, height=0.5, color=SECOND, alpha=0.16, linewidth=0)
        axes.barh(place, 9 - row["last"], left=row["last"], height=0.5, color=FIRST, alpha=0.16, linewidth=0)
        axes.annotate("left over", (0.046, place), fontsize=8, va="center")
        axes.annotate("too short", (8.6, place), fontsize=8, va="center", ha="right")
    high, low = rows.iloc[0], rows.iloc[1]
    axes.fill_betweenx(
        (-0.45, 1.45), high["last"], low["first"], facecolor="none", edgecolor=_soft(0.75), hatch="////", linewidth=0,
        zorder=4
    )
    axes.annotate(
        "any λ here fails both", ((high["last"] * low["first"]) ** 0.5, 1.47), (0, -2), textcoords="offset points",
        ha="center", va="top", fontsize=8.5
    )
    labels = [f"{r.request}, a = {r.a:g}" for r in rows.itertuples()]
    axes.set(ylim=(4.1, -0.7), yticks=[0, 1, 2.5, 3.5], yticklabels=labels)
    axes.set(
        xscale="log", xlim=(0.04, 9), xlabel="KL weight λ that all requests share", title="λ that a request can use"
    )
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    _log_axis(axes.xaxis)


def real_plans(
    records: pd.DataFrame, region: pd.DataFrame, model: str | None = None, name: str = "editing_requirement_model"
) -> Figure:
    """Left: real requests' plans at each λ_KL against the feasible region; right: how they answer, beside a/λ.

    records: method, id, kl_weight, beta, planned (in ‖h‖); region: beta, lower, upper in the same unit.
    """
    _require(records, "method", "id", "kl_weight", "beta", "planned")
    methods, weights = in_order(records.method), sorted(records.kl_weight.unique())
    once = records[records.method == methods[0]]
    low, high = min(records.planned.min(), region.lower.min()) * 0.8, records.planned.max() * 1.6

    def draw(axes: Any) -> None:
        left, right = axes[0]
        fits = region[region.lower <= region.upper]
        left.fill_between(fits.beta, fits.lower, fits.upper, color=GOOD, alpha=0.16, linewidth=0, label="feasible")
        for method in methods:
            own, look = records[records.method == method], style(method)
            sizes = 10 + 9 * own.kl_weight.map(weights.index)
            left.scatter(
                own.beta, own.planned, s=sizes, facecolor="none", edgecolor=look.color, marker=look.marker,
                linewidth=1.1, label=look.name, zorder=3
            )
        left.set(
            yscale="log", xlim=(0, 1), ylim=(low, high), xlabel="share β that is written",
            ylabel="norm of the plan ‖r‖ / ‖h‖"
        )
        left.set(title=r"Real requests (larger mark: larger $\lambda_{KL}$)")
        _key(left, 3)
        for _, group in once.groupby("id", sort=False):
            right.plot(group.kl_weight, group.planned, color=_soft(0.45), linewidth=1.1, marker=".", markersize=5)
        start = once[once.kl_weight == weights[0]].planned.median()
        right.plot(weights, [start * weights[0] / w for w in weights], color=FIRST, linestyle="--", label="a/λ")
        right.plot([], [], color=_soft(0.45), marker=".", label="one real request")
        right.set(
            xscale="log", yscale="log", ylim=(low, high), xlabel=r"KL weight $\lambda_{KL}$",
            title=r"What $\lambda_{KL}$ does to a plan"
        )
        _key(right)
        _log_axis(left.yaxis)
        _log_axis(right.yaxis)

    median = once.groupby("kl_weight").planned.median()
    summary = median.rename("median plan").reset_index()
    alt = f"""Left: {once.id.nunique()} real requests under {" and ".join(style(m).name for m in methods)}: norm of the
        planned residual against β, with the feasible region.
        Right: the same norms against λ_KL; the median falls from {median.iloc[0]:.2g} at {weights[0]:g} to
        {median.iloc[-1]:.2g} at {weights[-1]:g},
        while a/λ would fall {weights[-1] / weights[0]:.2g} times."""
    data = pd.concat([records.assign(kind="plan"), region.assign(kind="region")], ignore_index=True)
    return Figure(draw, data, name, alt, model, summary, (9.4, 4.3), ncols=2, width_ratios=(5, 4))


def suppression(
    limits: pd.DataFrame, spectrum: pd.DataFrame, model: str | None = None, name: str = "spectral_suppression"
) -> Figure:
    """Left: β as the protected eigenvalues grow, for keys with energy outside them. Right:
    β of a layer's eigen-directions, and where real keys lie.

    limits: outside, floor, beta, bound, limit; spectrum: method, eigenvalue, beta, energy.
    """
    _require(limits, "outside", "floor", "beta", "limit")
    _require(spectrum, "method", "eigenvalue", "beta", "energy")
    looks = list(zip(limits.outside.unique(), (GOOD, FIRST, SECOND), ("o", "v", "^"), strict=False))
    methods = in_order(spectrum.method)

    def draw(axes: Any) -> None:
        left, right = axes[0]
        for outside, color, marker in looks:
            own = limits[limits.outside == outside]
            left.plot(
                own.floor, own.beta, color=color, marker=marker, markersize=5, label=f"{100 * outside:g} % outside"
            )
            left.plot(own.floor, own.bound, color=color, linestyle=":", linewidth=1.3)
            if outside:
                left.annotate(
                    f"limit {own['limit'].iloc[0]:.2g}", (own.floor.iloc[-1], own.beta.iloc[-1]), (0, -6),
                    textcoords="offset points", ha="right", va="top", fontsize=8.5
                )
        left.plot([], [], color=_soft(0.7), linestyle=":", linewidth=1.3, label="the bound on β")
        left.set(
            xscale="log", yscale="log", xlabel="smallest protected eigenvalue $s_H$", ylabel="share β that is written",
            title="Protected eigenvalues grow"
        )
        _key(left)
        for method in methods:
            own, look = spectrum[spectrum.method == method].sort_values("eigenvalue"), style(method)
            shown = own.iloc[sorted({*range(0, len(own), max(1, len(own) // 60)), *range(len(own) - 8, len(own))})]
            right.plot(
                shown.eigenvalue, shown.beta, color=look.color, linestyle=look.line, marker=look.marker, markersize=3.2,
                linewidth=1.2, label=look.name
            )
        _draw_energy(right, spectrum[spectrum.method == methods[0]])
        right.set(
            xscale="log", ylim=(-0.03, 1.03), xlabel="eigenvalue of C of the direction",
            ylabel="share β that is written", title="A key along each eigen-direction"
        )
        _key(right)

    ends = "; ".join(
        f"{100 * o:g} % outside: β = {limits[limits.outside == o].beta.iloc[-1]:.2g} at s_H = {limits.floor.max():.0e}"
        for o, *_ in looks
    )
    spans = spectrum.groupby("method", sort=False).beta.agg(["min", "max"]).mask(lambda x: x < NOISE, 0.0)
    told = "; ".join(f"{style(m).name} from {r['min']:.2g} to {r['max']:.2g}" for m, r in spans.iterrows())
    alt = f"""Left: share β against the protected eigenvalue. {ends}. Right: β of a key along each eigen-direction of a
        layer against its eigenvalue,
        and the share of real keys' energy there. {told}."""
    data = pd.concat([limits.assign(kind="limit"), spectrum.assign(kind="direction")], ignore_index=True)
    summary = limits.rename(columns={"floor": "s_H"})[limits.floor.isin((1.0, 1e4, 1e8))]
    return Figure(draw, data, name, alt, model, summary.astype({"s_H": "int64"}), (9.4, 4.4), ncols=2)


def _draw_energy(axes: Any, own: pd.DataFrame, bins: int = 24) -> None:
    """The share of real keys' energy by eigenvalue, as bars that grow from the bottom."""
    edges = np.geomspace(own.eigenvalue.min(), own.eigenvalue.max() * 1.001, bins)
    held, _ = np.histogram(own.eigenvalue, edges, weights=own.energy)
    axes.bar(
        edges[:-1], held, width=np.diff(edges), align="edge", color=_soft(0.2), linewidth=0, zorder=0,
        label="energy of real keys"
    )


def ball_and_ellipsoid(
    outlines: pd.DataFrame, requests: pd.DataFrame, sweep: pd.DataFrame, tau: float = 2.0, name: str = "static_trap"
) -> Figure:
    """Left: the feasible ellipsoid, its two balls, and where two shared λ put an easy and a hard request. Right:
    every λ against τ√λmax/δ.

    outlines: curve, x, y; requests: strength, request, x, y, ball, progress, safe; sweep: boundary, strength, outcome.
    """
    _require(outlines, "curve", "x", "y")
    _require(sweep, "boundary", "strength", "outcome")

    def draw(axes: Any) -> None:
        left, right = axes[0]
        _draw_balls(left, outlines, tau)
        looks = zip(sorted(requests.strength.unique()), (SECOND, FIRST), ("^", "v"), strict=True)
        for strength, color, marker in looks:
            _draw_requests(left, requests[requests.strength == strength], f"λ = {strength:g}", color, marker)
        _key(left)
        _draw_sweep(right, sweep)

    condition = np.where(sweep.boundary > 1, "τ > δ/√λmax", "τ ≤ δ/√λmax")
    summary = _counted(sweep.assign(condition=condition), "condition", "outcome")
    served = sweep[sweep.outcome == "both are served"]
    alt = f"""Left: an ellipse with the largest circle inside and the smallest around it; of two shared λ one leaves
        the hard request outside the ellipse,
        the other leaves the easy request short of the progress τ. Right: {len(sweep)} pairs of τ√λmax/δ and λ;
        {len(served)} serve both requests, all with τ√λmax/δ up to {served.boundary.max():.2g}."""
    data = pd.concat(
        [outlines.assign(kind="outline"), requests.assign(kind="request"), sweep.assign(kind="sweep")],
        ignore_index=True,
    )
    return Figure(draw, data, name, alt, None, summary, (9.4, 5.0), ncols=2)


def _draw_balls(axes: Any, outlines: pd.DataFrame, tau: float) -> None:
    """The feasible ellipsoid, its two balls, and how far the easy request is to go."""
    lines = {
        "feasible": (GOOD, "-", "feasible ellipsoid"), "inscribed": (_soft(0.9), "--", "balls of Lemma 2"),
        "circumscribed": (_soft(0.9), "--", "")
    }
    for curve, (color, line, label) in lines.items():
        own = outlines[outlines.curve == curve]
        axes.plot(own.x, own.y, color=color, linestyle=line, linewidth=1.5, label=label or "_")
        if curve == "feasible":
            axes.fill(own.x, own.y, color=color, alpha=0.14, linewidth=0)
    axes.plot([tau, tau], [-4, 4], color=_soft(0.6), linewidth=1.2, linestyle=":", label="progress τ")
    axes.set(
        aspect="equal", xlim=(-4.4, 4.4), ylim=(-4.4, 4.4), xlabel="easy direction $q_{min}$",
        ylabel="hard direction $q_{max}$", title="One λ for two requests"
    )


def _draw_requests(axes: Any, own: pd.DataFrame, label: str, color: str, marker: str) -> None:
    """Where one λ puts the easy and the hard request, and whether that serves them."""
    axes.scatter(own.x, own.y, color=color, marker=marker, s=60, zorder=4, label=label)
    for row in own.itertuples():
        easy = row.request == "easy"
        words = ("progress", "short") if easy else ("safe", "unsafe")
        low = easy and not row.progress  # else it would cross its neighbor's
        axes.annotate(
            words[not (row.progress if easy else row.safe)], (row.x, row.y), (-5, 4) if low else (6, 5),
            textcoords="offset points", fontsize=8.5, color=color, ha="right" if low else "left"
        )


def _draw_sweep(axes: Any, sweep: pd.DataFrame) -> None:
    """What becomes of both requests at every λ, against τ√λmax/δ."""
    _outcomes(axes, sweep, "boundary", "strength", 12)
    ends = np.array([sweep.boundary.min(), sweep.boundary.max()])
    axes.plot(ends, 1 / ends, color=FIRST, linestyle="--", linewidth=1.4)
    axes.axhline(1, color=SECOND, linewidth=1.4)
    axes.axvline(1, color=_soft(0.7), linewidth=1, linestyle=":")
    axes.set(
        xscale="log", yscale="log", title="Every λ, tried",
        xlabel=r"$\tau\lambda_{max}^{1/2}/\delta$; above 1 no λ can serve both",
        ylabel=r"shared λ, in units of $\alpha\lambda_{max}^{1/2}/\delta$",
    )
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    _key(axes)
