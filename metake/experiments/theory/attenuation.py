"""MetaKE v3 Proposition 1: the realized residual is β r with β = γ/(1+γ), and R·Γ(I+Γ)⁻¹ for a batch.

Three looks at it: random instances, a search for the instance that departs most, and what happens where an assumption
is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import Metric
from metake.algebra.solve import association, attenuation, gate, realization, solve
from metake.data.facts import facts
from metake.editing.keys import KeyReader
from metake.editing.statistics import statistics
from metake.experiments.decision import all_of
from metake.experiments.theory.comparisons import same
from metake.experiments.theory.instance import Instance, normal, preserved_keys
from metake.language.model import load


def _written(instance: Instance, metric: Metric) -> Tensor:
    """What the library's update really writes at its own keys, (n, d_out): Δ formed as a matrix and applied.
    """
    delta = instance.residuals.T @ gate(instance.keys, metric)
    return instance.keys @ delta.T


def attenuation_check(
    trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (4, 16, 64), batch: int = 8
) -> pd.DataFrame:
    """Random instances in float64: what an explicit Δ writes against what the proposition predicts.

    One row per instance: method, dim, n, gamma and beta (n = 1), measured = ⟨r̂, r⟩/‖r‖²,
    `error` = ‖r̂ − predicted‖/‖r‖ and `remainder_error` = |‖r − r̂‖ − ‖r‖/(1+γ)|/‖r‖ for n = 1, beside `rounding`, what
    rounding may make of them; and of the objective's own minimizer `minimizer_error` = ‖r̂ − predicted‖/‖r‖ beside
    `minimizer_rounding`. Rank, conditioning, ridge, number of past keys and the keys' scale are swept.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for trial in range(trials):
        kind, dim = ("memit", "alphaedit")[trial % 2], dims[trial // 2 % len(dims)]
        n = 1 if trial // 2 % 4 else min(batch, dim)
        draw = torch.rand(5, generator=generator).tolist()
        rank, conditioning = 1 + int(draw[0] * (dim - 2)), 10 ** (3 * draw[1])
        ridge, past, scale = 10 ** (4 * draw[2] - 2), int(draw[3] * 3), 10 ** (2 * draw[4] - 1)
        preserved = preserved_keys(kind, dim, rank, conditioning, generator)
        instance = Instance(
            kind, preserved, *(scale * normal(generator, m, dim) for m in (past, n)), normal(generator, n, dim + 3),
            ridge
        )
        row = {
            "method": kind, "dim": dim, "n": n, "rank": rank, "conditioning": conditioning, "ridge": ridge,
            "past": past, "scale": scale
        }
        rows.append(row | _departures(instance))
    return pd.DataFrame(rows)


def _departures(instance: Instance) -> dict[str, float]:
    """The columns of `attenuation_check` that are measured."""
    metric, planned = instance.metric(), instance.residuals
    written, predicted = _written(instance, metric), instance.predicted()
    found = {"error": written - predicted, "minimizer_error": instance.minimizer() - predicted}
    row = {name: (off.norm() / planned.norm()).item() for name, off in found.items()}
    row |= {
        "rounding": instance.update_rounding(metric), "minimizer_rounding": instance.minimizer_rounding(),
        **dict.fromkeys(("gamma", "beta", "measured", "remainder_error"), float("nan")),
    }
    if len(planned) == 1:
        gamma = association(instance.keys, metric)
        left = ((planned - written).norm() - planned.norm() / (1 + gamma)).abs() / planned.norm()
        share = ((written * planned).sum() / planned.square().sum()).item()
        row |= {
            "gamma": gamma.item(), "beta": attenuation(gamma).item(), "measured": share, "remainder_error": left.item()
        }
    return row


class _Point(NamedTuple):
    """Where a search stands. Logarithms base 10."""

    scales: Tensor  #  (d,)    log of the preserved directions' standard deviations, −1.5 to 0
    ridge: Tensor  #   ()      log, −1 to 1
    size: Tensor  #    ()      log of the keys' scale, −1 to 0.5
    keys: Tensor  #    (n, d)  entries −3 to 3, as are those of
    past: Tensor  #    (m, d)

    def moved(self, step: float, generator: torch.Generator) -> _Point:
        near = [t + step * normal(generator, *t.shape) for t in self]
        bounds = ((-1.5, 0), (-1, 1), (-1, 0.5), (-3, 3), (-3, 3))
        return _Point(*(t.clamp(*b) for t, b in zip(near, bounds, strict=True)))

    def instance(self, kind: str, rank: int, residuals: Tensor) -> Instance:
        dim = len(self.scales)
        used = torch.arange(dim) < (rank if kind == "alphaedit" else dim)
        size = 10**self.size
        return Instance(
            kind, dim**0.5 * torch.diag(10**self.scales * used), size * self.past, size * self.keys, residuals,
            10 ** self.ridge.item()
        )


def adversarial_search(restarts: int = 24, steps: int = 120, seed: int = 0) -> pd.DataFrame:
    """The instance that departs most from the proposition: an evolution strategy of one parent climbs the departure.

    Half of the starts climb ‖r̂ − predicted‖/‖r‖ of the objective's minimizer itself, half climb it in units of what
    rounding may make of it. They move the preserved spectrum, the ridge, the keys, the past keys and their scale;
    kind, d ∈ {2, 4, 8}, n ∈ {1, 3}, rank and number of past keys differ between starts. One row per start: method,
    dim, n, climbed, evaluations; the largest departure on the way, and the most times its own rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_climb(start, steps, generator) for start in range(restarts)])


def _climb(start: int, steps: int, generator: torch.Generator) -> dict[str, object]:
    kind, goal, n, dim = (
        ("memit", "alphaedit")[start % 2], ("departure", "times_rounding")[start // 2 % 2], (1, 3)[start // 4 % 2],
        (2, 4, 8)[start // 8 % 3]
    )
    rank, past = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, dim), (0, 3)))
    zero = torch.zeros((), dtype=torch.float64)
    at = _Point(
        torch.zeros(dim, dtype=torch.float64), zero, zero, normal(generator, n, dim), normal(generator, past, dim)
    ).moved(1.0, generator)
    residuals = normal(generator, n, dim + 1)

    def measure(point: _Point) -> dict[str, float]:
        instance = point.instance(kind, rank, residuals)
        off = ((instance.minimizer() - instance.predicted()).norm() / residuals.norm()).item()
        return {"departure": off, "times_rounding": off / instance.minimizer_rounding()}

    best = measure(at)
    worst, step = dict(best), 0.5
    for _ in range(steps):
        candidate = at.moved(step, generator)
        found = measure(candidate)
        worst = {name: max(worst[name], value) for name, value in found.items()}
        better = found[goal] > best[goal]
        step = min(step * 1.5, 2.0) if better else max(step * 0.9, 1e-3)  # one success in five keeps it
        if better:
            at, best = candidate, found
    return {"method": kind, "dim": dim, "n": n, "climbed": goal, "evaluations": steps + 1, **worst}


def edges(seed: int = 0) -> pd.DataFrame:
    """One request where an assumption is dropped, beside it as stated: β, and the share that is really realized.

    share = ⟨r̂, r⟩/‖r‖² (v3 eq. 115) by the library's solve. One row per method and case; `follows`:
    they agree to 1e-9.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for kind in ("memit", "alphaedit"):
        instance = Instance(
            kind, preserved_keys(kind, 16, 8, 10.0, generator), *(normal(generator, m, 16) for m in (2, 1)),
            normal(generator, 1, 24), 5.0
        )
        metric, key, planned = instance.metric(), instance.keys, instance.residuals
        beta, elsewhere, other = (
            attenuation(association(key, metric)).item(), key + 0.5 * normal(generator, 1, 16),
            normal(generator, 1, 24)
        )

        def share(written: Tensor, of: Tensor) -> float:
            return ((written * of).sum() / of.square().sum()).item()

        cases = {
            "as stated": share(solve(key, planned, metric).realized, planned),
            "as stated, another v": share(solve(key, other, metric).realized, other),
            "the key read in another context": share(elsewhere @ gate(key, metric).T @ planned, planned),
            "noise 0: the write interpolates": share(solve(key, planned, metric, noise=0.0).realized, planned),
            "v refined 1.4 times as far, share of the first plan": share(
                solve(key, 1.4 * planned, metric).realized, planned
            ),
        }
        rows += [
            {"method": kind, "case": case, "beta": beta, "share": found, "follows": abs(found - beta) < 1e-9}
            for case, found in cases.items()
        ]
    return pd.DataFrame(rows)


def attenuation_on_model(
    model: str = "tiny", requests: int = 40, text: str = "embedded", seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same on a real layer: β of real requests under MEMIT's and AlphaEdit's metrics, and the batch's spectrum.

    Returns (one row per request: method, id, gamma, beta, measured alone, on_plain, in_batch;
    one row per eigenvalue of B).
    measured is the share written at the key that was averaged over contexts; on_plain the share at the plain prompt's
    own key.
    """
    lm = load(model)
    asked = [c.request for c in facts(limit=requests)]
    singles, spectra = [], []
    for name in ("memit", "alphaedit"):
        editor = methods.method(name, model, seed=seed)
        state = editor.init(lm, statistics(lm, text, layers=editor.layers))
        layer = editor.layers[-1]
        keys, _, plain = KeyReader(lm, asked, state.contexts, layer).read(layer)
        metric = state.metrics[layer]
        residuals = torch.randn(
            len(asked), lm.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        ).to(keys.device)
        gamma, together = association(keys, metric), realization(keys, gate(keys, metric))
        for i, request in enumerate(asked):
            alone = solve(keys[i : i + 1], residuals[i : i + 1], metric)
            measured = (alone.realized[0] @ residuals[i] / residuals[i].square().sum()).item()
            row = {"method": name, "id": request.id, "gamma": gamma[i].item(), "beta": attenuation(gamma[i]).item()}
            row |= {"measured": measured, "on_plain": (alone.gate[0] @ plain[i]).item()}
            singles.append(row | {"in_batch": together[i, i].item()})
        eigenvalues = torch.linalg.eigvals(together).real.sort(descending=True).values.tolist()
        spectra += [{"method": name, "index": i + 1, "eigenvalue": value} for i, value in enumerate(eigenvalues)]
    return pd.DataFrame(singles), pd.DataFrame(spectra)


def judge(records: pd.DataFrame, searched: pd.DataFrame | None = None) -> dict:
    """Holds if neither the library's update nor the objective's own minimizer departs from the prediction by more than
    its rounding: in every instance, single or batch, and of the minimizer in those `searched` for.
    """
    single = records[records.n == 1]
    update = all_of([
        same("the share written", records.error, records.rounding),
        same("the share left", single.remainder_error, single.rounding),
    ])
    minimizer = [same("the minimizer", records.minimizer_error, records.minimizer_rounding)]
    if searched is not None:
        minimizer.append(same("the minimizer that was searched for", searched.times_rounding, [1.0] * len(searched)))
    found = all_of(minimizer)
    worst = max(records.error.max(), records.remainder_error.max())
    told = f"largest relative departure {'below 1e-9' if worst < 1e-9 else f'{worst:.0e}'} in {len(records)} "
    told += "random instances; the objective's own minimizer departs by "
    told += f"{'no more than' if found.holds else f'{found.margin:.0e} times'} rounding in these"
    if searched is not None:
        told += f" and in {searched.evaluations.sum()} that a search for the largest departure went through"
    return all_of([update, found]).verdict(told)
