"""MetaKE v3 Theorem 3 and Corollary 2: descent and stationarity of the look-ahead iteration,
on a real layer and at random.

descent   F(v − η∇F) ≤ F(v) − (η − Lη²/2) ‖∇F‖²                        0 < η < 2/L; for η ≤ 1/L the bracket is ≥ η/2
rate      min_{t<T} ‖∇F_VL(v_t)‖² ≤ 2 (F_VL(v_0) − inf F_VL) / (η T)      η ≤ 1/L
floor     min_{t<T} ‖∇F(v_t)‖² ≤ 4 (F_VL(v_0) − inf F_VL) / (η T) + 2 δ²
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from metake.editing.bilevel import OuterObjective, Refinement, refine
from metake.experiments.theory.adversary import climb
from metake.experiments.theory.landscapes import READINGS
from metake.experiments.theory.real_layer import RealLayer

STEP = 1e-3  # of finite differences of a gradient, in the units of a hidden state (norms of tens)
SETTLED = 1e-9  # a step whose η‖∇F‖² is smaller than this share of F is rounding


def outer_rule(anchor: str, steps: int = 15, step_size: float = 1.0, optimizer: str = "sgd") -> Refinement:
    """The outer objective on the plain prompts (literal eq. 97) with a normalization of the anchor."""
    return Refinement(steps, step_size, optimizer, prompts="plain", anchor_norm=anchor)


# On a real layer


def curvature(
    outer: OuterObjective, value: Tensor, slope: Tensor, direction: Tensor, rounds: int
) -> tuple[float, Tensor]:
    """‖∇²F_VL‖ at V by power iteration on finite differences of the gradient, and the direction to go on from:
    an estimate from below.
    """
    size = 0.0
    for _ in range(rounds):
        direction = direction / direction.norm()
        direction = (outer.evaluate(value + STEP * direction)[1] - slope) / STEP
        size = direction.norm().item()
    return size, direction


def descend(outer: OuterObjective, step_size: float, steps: int, direction: Tensor, every: int = 8) -> list[dict]:
    """v ← v − η ∇F_VL(v) from V_init (eq. 82): one row an iterate with F_VL, ‖∇F_VL‖ and L as far as it shows there.

    smoothness: ‖∇F_VL(v) − ∇F_VL(v′)‖/‖v − v′‖ from the iterate before, and every so often ‖∇²F_VL‖, the larger.
    """
    value, last, rows = outer.initial, None, []
    for step in range(steps + 1):
        loss, slope = outer.evaluate(value)
        moved = step and step_size * last.square().sum() > SETTLED * loss  # else the quotient is one of rounding errors
        found = ((slope - last).norm() / (step_size * last.norm())).item() if moved else 0.0
        if step % every == 0:
            size, direction = curvature(outer, value, slope, direction, 4)
            # along the step itself: close eigenvalues keep the iteration from it
            own, _ = curvature(outer, value, slope, slope, 1)
            found = max(found, size, own)
        rows.append(
            {
                "step": step, "loss": loss.item(), "gradient": slope.norm().item(), "smoothness": found,
                "moved": (value - outer.initial).norm().item()
            }
        )
        value, last = value - step_size * slope, slope
    return rows


def pilot(outer: OuterObjective, steps: int, seed: int = 0) -> tuple[float, list[dict], Tensor]:
    """A cautious run with half of 1/L(V_init): its step size, its rows, and the direction of the largest curvature at
    V_init.
    """
    direction = torch.randn(
        outer.initial.shape, dtype=outer.initial.dtype, generator=torch.Generator().manual_seed(seed)
    ).to(outer.initial.device)
    size, direction = curvature(outer, outer.initial, outer.evaluate(outer.initial)[1], direction, 10)
    return 0.5 / size, descend(outer, 0.5 / size, steps, direction), direction


def descents(
    layer: RealLayer, factors: tuple[float, ...] = (1.0, 1.5, 1.9, 2.2, 3.0),
    anchors: tuple[str, ...] = ("sum", "relative"), steps: int = 15
) -> pd.DataFrame:
    """Runs of the look-ahead iteration with step sizes on both sides of 1/L and 2/L, as multiples of 1/L.

    L is the largest that a cautious run shows, which is the first one returned. One row an iterate: anchor, factor,
    step_size, then `descend`.
    """
    rows = []
    for anchor in anchors:
        outer = layer.outer(outer_rule(anchor))
        size, cautious, direction = pilot(outer, steps)
        measured = max(row["smoothness"] for row in cautious)
        runs = {size * measured: cautious} | {
            factor: descend(outer, factor / measured, steps, direction) for factor in factors
        }
        rows += [
            {"anchor": anchor, "factor": factor, "step_size": factor / measured} | row
            for factor, run in runs.items()
            for row in run
        ]
    return pd.DataFrame(rows)


def falls(iterates: pd.DataFrame) -> pd.DataFrame:
    """One row a step that is more than rounding: what F_VL fell by, as a share of η‖∇F_VL‖², which the theorem bounds
    from below by 1 − ηL/2.

    L is the largest that showed along the step's own run, so `product` = ηL is the run's.
    """
    rows = []
    for (anchor, factor, size), run in iterates.groupby(["anchor", "factor", "step_size"], sort=False):
        product = size * run.smoothness.max()
        for one, other in zip(run.itertuples(), run.iloc[1:].itertuples(), strict=False):
            predicted = size * one.gradient**2
            if predicted > SETTLED * one.loss:
                rows.append(
                    {
                        "anchor": anchor, "factor": factor, "step": one.step, "product": product,
                        "share": (one.loss - other.loss) / predicted, "bound": 1 - product / 2
                    }
                )
    return pd.DataFrame(rows)


def rates(iterates: pd.DataFrame) -> pd.DataFrame:
    """One row a run: ηL, the smallest share of a fall, steps that went up, and min ‖∇F_VL‖² over its bound with inf
    F_VL ≥ 0.

    `covered` by the descent inequality if ηL < 2, by the rate if ηL ≤ 1.
    """
    steps, rows = falls(iterates), []
    for (anchor, factor, size), run in iterates.groupby(["anchor", "factor", "step_size"], sort=False):
        own, count = steps[(steps.anchor == anchor) & (steps.factor == factor)], len(run) - 1
        bound = 2 * run.loss.iloc[0] / (size * count)
        row = {
            "anchor": anchor, "step size": size, "times L": size * run.smoothness.max(),
            "covered": size * run.smoothness.max() < 2, "smallest fall": own.share.min()
        }
        row |= {
            "bound": own.bound.iloc[0], "steps up": int((own.share < 0).sum()),
            "last loss / first": run.loss.iloc[-1] / run.loss.iloc[0]
        }
        rows.append(
            row | {"gradient over bound": run.gradient.iloc[:-1].min() ** 2 / bound, "moved": run.moved.iloc[-1]}
        )
    return pd.DataFrame(rows)


def stress(
    layer: RealLayer, iterates: pd.DataFrame, anchor: str = "relative", trials: int = 40, seed: int = 0
) -> pd.DataFrame:
    """A search around V_init, as far as the η ≤ 1/L runs went, for the point whose step at η = 1/L falls short of η/2
    ‖∇F_VL‖².

    L is the runs' own, so the search may find that it does not serve the whole neighborhood: then it is measured anew,
    along the step found.
    Six directions: the gradient, the plan, random ones. One row: the smallest share found, how far from V_init,
    `L here` over L, and the `bound` 1 − ηL/2 with the larger of the two L.
    """
    cautious = iterates[(iterates.anchor == anchor) & (iterates.factor <= 1)]
    size, reach = float(1 / cautious.smoothness.max()), float(cautious.moved.max())
    outer, generator = layer.outer(outer_rule(anchor)), torch.Generator().manual_seed(seed)
    start = outer.initial
    ways = [
        outer.evaluate(start)[1], start - outer.anchor,
        *(torch.randn(start.shape, dtype=start.dtype, generator=generator).to(start) for _ in range(4))
    ]
    ways = torch.stack([way / way.norm() for way in ways])

    def at(point: Tensor) -> Tensor:
        spot = 2 * point - 1
        return start + reach * torch.einsum("i,inj->nj", spot.to(ways) / max(1.0, spot.norm().item()), ways)

    def shortfall(point: Tensor) -> float:
        loss, slope = outer.evaluate(at(point))
        after = outer.evaluate(at(point) - size * slope)[0]
        return -((loss - after) / (size * slope.square().sum())).item()

    found = climb(shortfall, torch.full((len(ways),), 0.5, dtype=torch.float64), trials, generator)
    where, here, way = at(found.point), 0.0, ways[0]
    step = size * outer.evaluate(where)[1]
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        spot = where - part * step
        local, way = curvature(outer, spot, outer.evaluate(spot)[1], way, 6)
        here = max(here, local * size)
    row = {
        "smallest fall": -found.score, "bound": 1 - max(1.0, here) / 2, "L here / L": here,
        "distance": (where - start).norm().item()
    }
    return pd.DataFrame([row | {"reach": reach, "points": found.evaluations}])


def floor(layer: RealLayer, anchor: str = "relative", steps: int = 40, every: int = 4) -> pd.DataFrame:
    """Along the iteration at η = 1/L on F_VL: ‖∇F_VL‖ beside the whole pipeline's ‖∇F‖ and ‖∇F − ∇F_VL‖
    (Corollary 2's δ is their largest).

    One row at every `every`-th iterate; the exact gradient runs through all edited layers.
    """
    outer = layer.outer(outer_rule(anchor))
    size = 1 / max(row["smoothness"] for row in pilot(outer, steps)[1])
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
    return pd.DataFrame({"step": range(own.steps), "loss": [sum(losses) for losses in zip(*traces, strict=True)]})


def judge(
    instances: pd.DataFrame, search: pd.DataFrame, runs: pd.DataFrame, stressed: pd.DataFrame, along: pd.DataFrame,
    tolerance: float = 1e-6
) -> dict:
    """Holds if descent, rate and floor are violated nowhere they are claimed: at random, by the search,
    on the real layer within the measured L.
    """
    names = list(READINGS)[:3]
    worst = max(instances[names].max().max(), search[search.claimed][["T = 1", "T = 3"]].max().max())
    covered = runs[runs.covered]
    slack = (covered["smallest fall"] - covered.bound).min()
    rated = runs[runs["times L"] <= 1 + 1e-9]
    floor_ratio = floor_bound(along)["whole over bound"].max()
    descends = slack > -tolerance and (stressed["smallest fall"] >= stressed.bound - tolerance).all()
    real = descends and len(rated) > 0 and rated["gradient over bound"].max() <= 1 and floor_ratio <= 1
    told = (
        f"largest left over right side {worst:.3f} in {len(instances)} random landscapes and the search; on "
        f"the real layer {len(covered)} runs with "
        "ηL < 2"
    )
    holds = bool(worst <= 1 + 1e-9 and instances.shortfall.max() < 1e-9 and real)
    return {
        "holds": holds,
        "decided_by": f"{told}, smallest margin over the bound {round(slack, 6) + 0.0:.6f} (rounding may take "
        f"{tolerance:.0e}), and the whole gradient at most {floor_ratio:.2f} of Corollary 2's bound",
    }


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
