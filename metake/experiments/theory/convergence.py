"""MetaKE v3 Theorem 3 and Corollary 2: descent and stationarity of the look-ahead iteration,
on a real layer and at random.

descent   F(v − η∇F) ≤ F(v) − (η − Lη²/2) ‖∇F‖²                        0 < η < 2/L; for η ≤ 1/L the bracket is ≥ η/2
rate      min_{t<T} ‖∇F_VL(v_t)‖² ≤ 2 (F_VL(v_0) − inf F_VL) / (η T)      η ≤ 1/L
floor     min_{t<T} ‖∇F(v_t)‖² ≤ 4 (F_VL(v_0) − inf F_VL) / (η T) + 2 δ²
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake.editing.bilevel import refine
from metake.editing.outer import OuterObjective, Refinement
from metake.experiments.decision import EPS, all_of, at_least, at_most
from metake.experiments.theory.adversary import climb
from metake.experiments.theory.landscapes import READINGS
from metake.experiments.theory.real_layer import RealLayer

STEP = 1e-3  # of finite differences of a gradient, in the units of a hidden state (norms of tens)
CLEAR = 1e-5  # a step's share of η‖∇F‖² is read to this, or the step is left out: its fall is lost in rounding
CHANCE = 1e-3  # with which L may exceed the upper end of its interval


def outer_rule(anchor: str, steps: int = 15, step_size: float = 1.0, optimizer: str = "sgd") -> Refinement:
    """The outer objective on the plain prompts (literal eq. 97) with a normalization of the anchor."""
    return Refinement(steps, step_size, optimizer, prompts="plain", anchor_norm=anchor)


# On a real layer


class Curvature(NamedTuple):
    """‖∇²F_VL‖ at one point: low is reached, high is exceeded with probability CHANCE at most."""

    low: float
    high: float


def curvature(outer: OuterObjective, value: Tensor, rounds: int, seed: int = 0) -> Curvature:
    """‖∇²F_VL‖ at V by `rounds` Lanczos steps on central differences of the gradient, from a random direction.

    The extreme Ritz values θ approach the extreme eigenvalues from inside; after k steps, by Kuczyński and Woźniakowski
    (1992, Theorem 4.2), P(λ₁ − θ₁ > ε (λ₁ − λ_n)) ≤ 1.648 √n exp(−√ε (2k − 1)), which gives the interval's other end.
    """
    count, rounds = value.numel(), min(rounds, value.numel())

    def image(direction: Tensor, width: float = STEP) -> Tensor:
        ahead, behind = (outer.evaluate(value + side * direction.view(value.shape))[1] for side in (width, -width))
        return ((ahead - behind) / (2 * width)).flatten()

    start = torch.randn(count, dtype=value.dtype, generator=torch.Generator().manual_seed(seed)).to(value.device)
    basis, images = (start / start.norm())[None], []
    for _ in range(rounds):
        images.append(image(basis[-1]))
        rest = images[-1] - basis.T @ (basis @ images[-1])
        rest = rest - basis.T @ (basis @ rest)  # twice: once leaves rounding of the size of what was taken away
        if rest.norm() <= 1e-7 * images[-1].norm():  # as exact as the differences are: nothing is left to see
            break
        basis = torch.cat([basis, (rest / rest.norm())[None]])
    inside = torch.stack(images)
    projected = basis[: len(inside)] @ inside.T
    ritz = torch.linalg.eigvalsh((projected + projected.T) / 2)
    lacks = (math.log(1.648 * count**0.5 / CHANCE) / (2 * len(inside) - 1)) ** 2 if len(inside) < count else 0.0
    low, spread = ritz.abs().max().item(), (ritz[-1] - ritz[0]).item()
    blurred = (image(basis[0], 2 * STEP) - images[0]).norm().item()  # differences of two widths show what they lose
    return Curvature(low, low + blurred + min(lacks, 0.49) * spread / (1 - 2 * min(lacks, 0.49)))


def descend(
    outer: OuterObjective, step_size: float, steps: int, start: Curvature, terms: int = 1, every: int = 8
) -> list[dict]:
    """v ← v − η ∇F_VL(v) from V_init (eq. 82): one row an iterate with F_VL, ‖∇F_VL‖ and L as far as it shows there.

    low, high: ‖∇²F_VL‖ every so often (start: at V_init), and ‖∇F_VL(v) − ∇F_VL(v′)‖/‖v − v′‖ from the iterate before,
    whichever is larger. rounding: of F_VL, whose longest chain of sums has so many terms.
    """
    value, last, rows = outer.initial, None, []
    for step in range(steps + 1):
        loss, slope = outer.evaluate(value)
        rounding = 2 * EPS * terms * loss.item()
        clear = step and rounding < CLEAR * step_size * last.square().sum().item()  # else the quotient is rounding's
        turned = ((slope - last).norm() / (step_size * last.norm())).item() if clear else 0.0
        own = start if not step else curvature(outer, value, 16) if step % every == 0 else Curvature(0.0, 0.0)
        rows.append({
            "step": step, "loss": loss.item(), "gradient": slope.norm().item(), "low": max(turned, own.low),
            "high": max(turned, own.high), "rounding": rounding, "moved": (value - outer.initial).norm().item()
        })
        value, last = value - step_size * slope, slope
    return rows


def pilot(outer: OuterObjective, steps: int, terms: int = 1) -> tuple[float, list[dict], Curvature]:
    """A cautious run with half of 1/L(V_init): its step size, its rows, and the curvature at V_init."""
    start = curvature(outer, outer.initial, 24)
    return 0.5 / start.high, descend(outer, 0.5 / start.high, steps, start, terms), start


def descents(
    layer: RealLayer, factors: tuple[float, ...] = (1.0, 1.5, 1.9, 2.2, 3.0),
    anchors: tuple[str, ...] = ("sum", "relative"), steps: int = 15
) -> pd.DataFrame:
    """Runs of the look-ahead iteration with step sizes on both sides of 1/L and 2/L, as multiples of 1/L.

    L is the upper end of what a cautious run shows, which is the first one returned. One row an iterate:
    anchor, factor, step_size, then `descend`.
    """
    rows = []
    for anchor in anchors:
        outer = layer.outer(outer_rule(anchor))
        size, first, start = pilot(outer, steps, layer.terms)
        measured = max(row["high"] for row in first)
        runs = {size * measured: first}
        runs |= {f: descend(outer, f / measured, steps, start, layer.terms) for f in factors}
        rows += [
            {"anchor": anchor, "factor": factor, "step_size": factor / measured} | row
            for factor, run in runs.items()
            for row in run
        ]
    return pd.DataFrame(rows)


def cautious(iterates: pd.DataFrame, anchor: str) -> pd.DataFrame:
    """The iterates of the runs with η ≤ 1/L."""
    return iterates[(iterates.anchor == anchor) & (iterates.factor <= 1)]


def cautious_smoothness(iterates: pd.DataFrame, anchor: str) -> float:
    """The upper end of L along these."""
    return float(cautious(iterates, anchor).high.max())


def falls(iterates: pd.DataFrame) -> pd.DataFrame:
    """One row a step that is more than rounding: what F_VL fell by, as a share of η‖∇F_VL‖², which the theorem bounds
    from below by 1 − ηL/2.

    bound: with the upper end of L along the step's own run, `product` = ηL; tight: with the lower end;
    error: of the share, from the rounding of the two losses.
    """
    rows = []
    for (anchor, factor, size), run in iterates.groupby(["anchor", "factor", "step_size"], sort=False):
        product, low = size * run.high.max(), size * run.low.max()
        for one, other in zip(run.itertuples(), run.iloc[1:].itertuples(), strict=False):
            predicted = size * one.gradient**2
            if max(one.rounding, other.rounding) < CLEAR * predicted:
                rows.append({
                    "anchor": anchor, "factor": factor, "step": one.step, "product": product,
                    "share": (one.loss - other.loss) / predicted, "bound": 1 - product / 2, "tight": 1 - low / 2,
                    "error": (one.rounding + other.rounding) / predicted
                })
    return pd.DataFrame(rows)


def rates(iterates: pd.DataFrame) -> pd.DataFrame:
    """One row a run: ηL, the smallest share of a fall, steps that went up, and min ‖∇F_VL‖² over its bound
    with inf F_VL ≥ 0.

    L: the upper end of its interval. `covered` by the descent inequality if ηL < 2; `rated`, by the rate, if η times
    the lower end is ≤ 1. nearest, error: of the step next to the bound, share − bound and what rounding may add to it.
    """
    steps, rows = falls(iterates), []
    for (anchor, factor, size), run in iterates.groupby(["anchor", "factor", "step_size"], sort=False):
        own, count = steps[(steps.anchor == anchor) & (steps.factor == factor)], len(run) - 1
        nearest = own.loc[((own.share - own.bound) / own.error).idxmin()]
        product = size * run.high.max()
        row = {
            "anchor": anchor, "step size": size, "times L": product, "covered": product < 2,
            "smallest fall": own.share.min(), "bound": own.bound.iloc[0],
            "steps up": int((own.share < -own.error).sum()), "last loss / first": run.loss.iloc[-1] / run.loss.iloc[0],
            "gradient over bound": run.gradient.iloc[:-1].min() ** 2 * size * count / (2 * run.loss.iloc[0]),
            "moved": run.moved.iloc[-1], "rated": size * run.low.max() <= 1, "nearest": nearest.share - nearest.bound,
            "error": nearest.error, "tight": (own.share - own.tight).min(), "rounding": own.error.max()
        }
        rows.append(row)
    return pd.DataFrame(rows)


def stress(
    layer: RealLayer, iterates: pd.DataFrame, anchor: str = "relative", trials: int = 40, seed: int = 0
) -> pd.DataFrame:
    """A search around V_init, as far as the η ≤ 1/L runs went, for the point whose step at η = 1/L falls short of
    η/2 ‖∇F_VL‖².

    L is the runs' own, so the search may find that it does not serve the whole neighborhood:
    then it is measured anew, along the step found. Six directions: the gradient, the plan, random ones.
    One row: the smallest share found and its rounding, how far from V_init, `L here` over L, and the `bound` 1 − ηL/2
    with the larger of the two, each at the upper end.
    """
    size, reach = 1 / cautious_smoothness(iterates, anchor), cautious(iterates, anchor).moved.max()
    outer, generator = layer.outer(outer_rule(anchor)), torch.Generator().manual_seed(seed)
    start = outer.initial
    ways = [torch.randn(start.shape, dtype=start.dtype, generator=generator).to(start) for _ in range(4)]
    ways = [outer.evaluate(start)[1], start - outer.anchor, *ways]
    ways = torch.stack([way / way.norm() for way in ways])

    def at(point: Tensor) -> Tensor:
        spot = 2 * point - 1
        return start + reach * torch.einsum("i,inj->nj", spot.to(ways) / max(1.0, spot.norm().item()), ways)

    def share(where: Tensor) -> tuple[float, float]:
        """What the step from here falls by over η‖∇F_VL‖², and the rounding of it."""
        loss, slope = outer.evaluate(where)
        predicted = size * slope.square().sum()
        fall = loss - outer.evaluate(where - size * slope)[0]
        return (fall / predicted).item(), (4 * EPS * layer.terms * loss / predicted).item()

    found = climb(
        lambda point: -share(at(point))[0], torch.full((len(ways),), 0.5, dtype=torch.float64), trials, generator
    )
    where = at(found.point)
    (fall, error), step = share(where), size * outer.evaluate(where)[1]
    here = size * max(curvature(outer, where - part * step, 16).high for part in (0.0, 0.5, 1.0))
    row = {
        "smallest fall": fall, "bound": 1 - max(1.0, here) / 2, "L here / L": here,
        "distance": (where - start).norm().item(), "reach": reach, "points": found.evaluations, "error": error
    }
    return pd.DataFrame([row])


def floor(
    layer: RealLayer, iterates: pd.DataFrame, anchor: str = "relative", steps: int = 40, every: int = 4
) -> pd.DataFrame:
    """Along the iteration at η = 1/L on F_VL: ‖∇F_VL‖ beside the whole pipeline's ‖∇F‖ and ‖∇F − ∇F_VL‖
    (Corollary 2's δ is their largest).

    One row at every `every`-th iterate; the exact gradient runs through all edited layers.
    """
    outer = layer.outer(outer_rule(anchor))
    size = 1 / cautious_smoothness(iterates, anchor)
    whole, _ = layer.downstream(outer.rule)
    value, rows = outer.initial, []
    for step in range(steps + 1):
        loss, slope = outer.evaluate(value)
        if step % every == 0:
            exact = whole.gradients(value)
            row = {
                "step": step, "look-ahead": slope.norm().item(), "whole": exact.exact.norm().item(),
                "apart": (exact.exact - slope).norm().item()
            }
            rows.append(row | {"loss": loss.item(), "whole loss": exact.losses.sum().item(), "step_size": size})
        value = value - size * slope
    return pd.DataFrame(rows)


def with_adam(layer: RealLayer, anchor: str = "sum") -> pd.DataFrame:
    """What the theorem does not cover: the first version's optimizer with the recipe's own step size and number of
    steps. One row an iterate: loss.
    """
    own = layer.editor.refine
    found = refine(
        layer.lm, layer.requests, layer.state.contexts, layer.targets, layer.gate,
        outer_rule(anchor, own.steps, own.step_size, "adam")
    )
    traces = [[sum(step.values()) for step in trace["refine"]] for trace in found.trace]
    losses = [sum(step) for step in zip(*traces, strict=True)]
    return pd.DataFrame({"step": range(len(losses)), "loss": losses})


def judge(
    instances: pd.DataFrame, search: pd.DataFrame, runs: pd.DataFrame, stressed: pd.DataFrame, along: pd.DataFrame
) -> dict:
    """Holds if descent, rate and floor are violated nowhere they are claimed, beyond rounding and with L's upper end:
    at random, by the search, on the real layer.
    """
    names, claimed = list(READINGS)[:3], search[search.claimed]
    found = claimed[["T = 1", "T = 3"]].max(axis=1)
    worst, covered = max(instances[names].max().max(), found.max()), runs[runs.covered]
    most, floor_ratio = runs[runs.rated]["gradient over bound"].max(), floor_bound(along)["whole over bound"].max()
    at_random = instances.loc[(instances.shortfall / instances.rounding).idxmax()]
    nearest, point = covered.loc[(covered.nearest / covered.error).idxmin()], stressed.iloc[0]
    decisions = [
        *(at_most("a ratio of the search", r, 1.0, e, attained=True) for r, e in zip(found, claimed.rounding)),
        at_most("a ratio at random", instances[names].max().max(), 1.0, instances.rounding.max(), attained=True),
        at_most("the descent's shortfall at random", at_random.shortfall, 0.0, at_random.rounding, attained=True),
        at_least("a step's share over its bound", nearest.nearest, 0.0, nearest.error),
        at_least("the share at the worst point found", point["smallest fall"], point.bound, point.error),
        at_most("a run's smallest gradient over its bound", most, 1.0, runs.rounding.max()),
        at_most("the whole gradient over its bound", floor_ratio, 1.0, runs.rounding.max()),
    ]
    tight = round(covered.tight.min(), 4)
    told = (
        f"largest left over right side {worst:.3f} in {len(instances)} random landscapes and the search; on the real "
        f"layer {len(covered)} runs with ηL < 2, the nearest step {nearest.nearest:.4f} above the bound with L's upper "
        f"end (rounding {nearest.error:.0e}) and {tight + 0.0:.4f} with its lower end; "
        f"the whole gradient at most {floor_ratio:.2f} of Corollary 2's bound"
    )
    return all_of(decisions).verdict(told)


def floor_bound(along: pd.DataFrame) -> pd.DataFrame:
    """Corollary 2 at every row of `floor`: min ‖∇F‖² so far, E = 2F_VL(v_0)/(ηT), 2E + 2δ² with δ the largest distance
    on the whole way, and their ratio.
    """
    delta, rows = along.apart.max(), []
    for i in range(1, len(along)):
        least, energy = along.whole[:i].min(), 2 * along.loss.iloc[0] / (along.step_size.iloc[0] * along.step.iloc[i])
        bound = 2 * energy + 2 * delta**2
        row = {"T": along.step.iloc[i], "bound": bound**0.5, "floor": delta, "whole over bound": least**2 / bound}
        rows.append(row | {"least whole": least, "least look-ahead": along["look-ahead"][:i].min()})
    return pd.DataFrame(rows)
