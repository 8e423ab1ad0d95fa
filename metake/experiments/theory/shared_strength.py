"""What follows from v3 Theorem 1 for a KL weight λ that all requests share (eqs 59–68), and how λ really shapes plans.

The paper assumes ‖r‖ = a/λ near the upstream optimum. Any decreasing law carries the argument;
an increasing one does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import Isotropic
from metake.algebra.solve import association
from metake.data.facts import facts
from metake.editing.diagnosis import diagnose
from metake.editing.statistics import statistics
from metake.editing.targets import optimize_targets
from metake.experiments.theory.editing_requirement import STEP
from metake.experiments.theory.one_request import Request, random_request
from metake.language.model import load


class Law(NamedTuple):
    """How the norm of a plan answers to λ: ‖r‖ of (a, λ), and λ of (a, ‖r‖)."""

    norm: Callable[[Tensor, Tensor], Tensor]
    strength: Callable[[Tensor, Tensor], Tensor]
    decreasing: bool = True


LAWS = {
    "a/λ": Law(lambda a, x: a / x, lambda a, n: a / n),
    "a/(λ+1)": Law(lambda a, x: a / (x + 1), lambda a, n: a / n - 1),
    "a·exp(−λ)": Law(lambda a, x: a * (-x).exp(), lambda a, n: (a / n).log()),
    "a·λ": Law(lambda a, x: a * x, lambda a, n: n / a, decreasing=False),
}


def admissible(law: Law, a: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """The λ whose plan is neither too long nor too short for a request: from law⁻¹(ε(1+γ)) to law⁻¹(τ/β).

    a(1−β)/ε ≤ λ ≤ aβ/τ for ‖r‖ = a/λ      (v3 eq. 60). An end may be negative, and then no λ > 0 reaches it;
    empty if the first is larger.
    """
    lower, upper = request.interval
    return law.strength(a, upper), law.strength(a, lower)


def _pair(trial: int, generator: torch.Generator, own: bool) -> tuple[Request, Request]:
    """Two requests in one layer, the second of the lower γ; `own` tolerances, or the same."""
    first = random_request(trial, generator)
    key = torch.randn(first.key.shape, dtype=torch.float64, generator=generator)
    share, tau, epsilon = (10 ** (2 * torch.rand(3, dtype=torch.float64, generator=generator) - 1)).unbind()
    wanted = first.gamma / (1 + 9 * share)
    second = first._replace(key=key * (wanted / association(key, first.metric)).sqrt())
    return first, second._replace(tau=first.tau * tau, epsilon=first.epsilon * epsilon) if own else second


def trap_check(pairs: int = 300, seed: int = 0) -> pd.DataFrame:
    """Random pairs, h of the higher γ and l of the lower, under each law; what a λ makes of both is really written.

    Tried are λ beside the ends of both intervals (eqs 61–65) and, where h's lies below l's (eq. 67), λ strictly between
    (eq. 68). One row per pair and law: law, decreasing, own (whether a, τ, ε are the requests' own, or shared),
    gamma_high, gamma_low, feasible (both alone), trap (eq. 67), nested (l's interval within h's), tried, wrong, and
    `agrees` = how clearly the outcomes are the foretold ones, at the least, in units of rounding.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(pairs):
        own, (name, law) = bool(trial % 2), list(LAWS.items())[trial // 2 % len(LAWS)]
        pair = _pair(trial // 8, generator, own)
        scale = 10 ** (2 * torch.rand(2, dtype=torch.float64, generator=generator) - 1)
        strengths = [s * q.interval[0] for s, q in zip(scale, pair, strict=True)]  # a
        strengths = strengths if own else strengths[:1] * 2
        ends = [admissible(law, a, q) for a, q in zip(strengths, pair, strict=True)]
        (first_high, last_high), (first_low, last_low) = ends
        tried = [(i, end * (1 + s * STEP)) for i, pairs_of in enumerate(ends) for end in pairs_of for s in (-1, 1)]
        trap, begin = bool(last_high < first_low), last_high.clamp_min(0)
        between = [begin + (first_low - begin) * x for x in (0.01, 0.5, 0.99)] if trap else []
        tried += [(i, x) for x in between for i in (0, 1)]
        judged = [_agrees(pair[i], law, strengths[i], ends[i], x) for i, x in tried if x > 0]
        rows.append({
            "law": name, "decreasing": law.decreasing, "own": own, "gamma_high": pair[0].gamma.item(),
            "gamma_low": pair[1].gamma.item(),
            "feasible": all(bool(q.interval[0] <= q.interval[1]) for q in pair), "trap": trap and bool(first_low > 0),
            "nested": bool(first_high <= first_low and last_low <= last_high), "tried": len(judged),
            "wrong": sum(x < -1 for x in judged), "agrees": min(judged, default=math.inf),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _agrees(request: Request, law: Law, a: Tensor, ends: tuple[Tensor, Tensor], strength: Tensor) -> float:
    """How clearly the plan that λ makes turns out as eqs 61–65 say: too weak above the last admissible λ, too long
    below the first, and neither in between; negative if it does not.
    """
    succeeds, editable = request.spare(law.norm(a, strength))
    return min(succeeds * (-1 if strength > ends[1] else 1), editable * (-1 if strength < ends[0] else 1))


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """Per law and kind of pair: pairs, pairs that are feasible one by one, traps among all and among these, λ tried,
    wrong, and `agrees` as of `trap_check`, the least.
    """
    counts = {
        "feasible": "feasible", "traps": "trap", "feasible_traps": "both", "nested": "nests", "tried": "tried",
        "wrong": "wrong"
    }
    grouped = records.assign(both=records.trap & records.feasible, nests=records.nested & records.feasible).groupby(
        ["law", "decreasing", "own"], sort=False
    )
    sums = {name: (column, "sum") for name, column in counts.items()}
    return grouped.agg(pairs=("trap", "size"), **sums, agrees=("agrees", "min")).reset_index()


def example() -> pd.DataFrame:
    """Two pairs of requests with γ = 9 and 1.5, τ = ε = 1 and ‖r‖ = a/λ, to be drawn: their first and last λ."""
    rows, one = [], torch.ones((), dtype=torch.float64)
    for pair, strengths in (("a differs", (1.0, 4.0)), ("same a", (1.0, 1.0))):
        for name, gamma, a in zip(("high γ", "low γ"), (9.0, 1.5), strengths, strict=True):
            key = torch.tensor([[gamma, 0.0]], dtype=torch.float64).sqrt()
            first, last = admissible(LAWS["a/λ"], a * one, Request("", Isotropic(2), key, key[0], one, one))
            row = {"pair": pair, "request": name, "gamma": gamma, "a": a}
            rows.append(row | {"first": first.item(), "last": last.item()})
    return pd.DataFrame(rows)


def diagnosed(model: str = "tiny", requests: int = 40, text: str = "embedded", seed: int = 0) -> pd.DataFrame:
    """`diagnose` of real requests at its default τ and ε under both metrics: method, requests, empty, range of β."""
    lm, asked, rows = load(model), [c.request for c in facts(limit=requests)], []
    for name in ("memit", "alphaedit"):
        editor = methods.method(name, model, seed=seed)
        found = diagnose(lm, asked, editor, statistics(lm, text, layers=editor.layers))
        beta = pd.Series([d.attenuation for d in found])
        row = {"method": name, "requests": len(found), "empty": sum(not d.feasible for d in found)}
        rows.append(row | {"least β": beta.min(), "median β": beta.median(), "largest β": beta.max()})
    return pd.DataFrame(rows)


def plans_on_model(
    model: str = "tiny", requests: int = 6, strengths: Sequence[float] = (0.0625, 1.0, 16.0, 256.0, 4096.0),
    text: str = "embedded", seed: int = 0, finer: float = 1.0
) -> pd.DataFrame:
    """What λ_KL does to real plans: Stage I of the same requests at each λ_KL, their intervals under both metrics.

    Norms are shares of ‖h‖, τ = ε = 0.25 ‖h‖ as in `diagnose`. The clamp and the early stop, which shorten plans too,
    are off. finer: Stage I takes steps so many times shorter, and 0.4 · finer times as many. One row per method,
    request and λ_KL:
    method, id, kl_weight, gamma, beta, planned, lower, upper, feasible, served.
    """
    lm, asked, rows = load(model), [c.request for c in facts(limit=requests)], []
    editors = {name: methods.method(name, model, seed=seed) for name in ("memit", "alphaedit")}
    states = {name: editor.init(lm, statistics(lm, text, layers=editor.layers)) for name, editor in editors.items()}
    editor, contexts, planned = editors["alphaedit"], states["alphaedit"].contexts, {}
    base = replace(
        editor.target, steps=round(editor.target.steps * max(1, 0.4 * finer)), step_size=editor.target.step_size / finer
    )
    for strength in strengths:  # Stage I does not see the metric: one plan for both
        rule = replace(base, kl_weight=strength, clamp=1e9, stop_below=0.0)
        targets = optimize_targets(lm, asked, contexts, editor.layers[-1], rule)
        planned[strength] = (targets.planned.norm(dim=1) / targets.anchor.norm(dim=1)).tolist()
    for name, state in states.items():
        for i, found in enumerate(diagnose(lm, asked, editors[name], state)):
            lower, upper = found.lower / found.anchor, found.upper / found.anchor
            row = {
                "method": name, "id": found.id, "gamma": found.association, "beta": found.attenuation, "lower": lower,
                "upper": upper, "feasible": found.feasible
            }
            rows += [
                row | {"kl_weight": x, "planned": planned[x][i], "served": lower <= planned[x][i] <= upper}
                for x in strengths
            ]
    return pd.DataFrame(rows)


def served(records: pd.DataFrame) -> pd.DataFrame:
    """Per method and λ_KL: requests, those with a non-empty interval, and those whose plan at this λ_KL lies in it."""
    grouped = records.groupby(["method", "kl_weight"], sort=False)
    return grouped.agg(
        requests=("id", "size"), feasible=("feasible", "sum"), served=("served", "sum"),
        median_plan=("planned", "median")
    ).reset_index()


def response(records: pd.DataFrame) -> pd.DataFrame:
    """How real plans answer to λ_KL: slope of log ‖r‖ on log λ_KL (a/λ: −1), and whether every step shortened it."""
    rows = []
    for request, group in records[records.method == records.method.iloc[0]].groupby("id", sort=False):
        ordered = group.sort_values("kl_weight")
        steps = np.diff(ordered.planned)
        slope = np.polyfit(np.log(ordered.kl_weight), np.log(ordered.planned), 1)[0]
        row = {"id": request, "slope": slope, "shorter": int((steps < 0).sum()), "steps": len(steps)}
        rows.append(row | {"decreasing": bool((steps < 0).all())})
    return pd.DataFrame(rows)
