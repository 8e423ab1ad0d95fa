"""MetaKE v3 Proposition 1: the realized residual is β r with β = γ/(1+γ), and R·Γ(I+Γ)⁻¹ for a batch."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.facts import facts
from metake.geometry import InverseCovariance, KeyStatistics, Metric, NullSpace, condition
from metake.keys import KeyReader
from metake.model import load
from metake.solve import association, attenuation, gate, realization, solve
from metake.statistics import statistics


def _random_metric(kind: str, dim: int, rank: int, conditioning: float, ridge: float, past: int, generator: torch.Generator) -> Metric:
    """A metric of MEMIT's or AlphaEdit's kind from keys of the given rank and spread of scales, with `past` remembered keys."""
    scales = torch.logspace(0, -torch.log10(torch.tensor(conditioning)).item(), dim, dtype=torch.float64)
    keys = torch.randn(4 * dim, dim, dtype=torch.float64, generator=generator) * scales
    if kind == "alphaedit":
        keys[:, rank:] = 0  # the last directions are never used by preserved text: the null space
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
    found = KeyStatistics.empty(dim)
    found.update(keys @ rotation)
    metric = NullSpace(found, ridge, threshold=1e-10) if kind == "alphaedit" else InverseCovariance(found, weight=ridge)
    return condition(metric, torch.randn(past, dim, dtype=torch.float64, generator=generator))


def _written(keys: Tensor, residuals: Tensor, metric: Metric) -> Tensor:
    """What the update really writes at its own keys: Δ formed as a d_out×d_in matrix and applied, (n, d_out)."""
    delta = residuals.T @ gate(keys, metric)
    return keys @ delta.T


def attenuation_check(trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (4, 16, 64), batch: int = 8) -> pd.DataFrame:
    """Random instances in float64: what an explicit Δ writes against what the proposition predicts.

    One row per instance: method, dim, n, gamma and beta (n = 1), measured = ⟨r̂, r⟩/‖r‖², `error` = ‖r̂ − predicted‖/‖r‖,
    `remainder_error` = |‖r − r̂‖ − ‖r‖/(1+γ)|/‖r‖ for n = 1; scale, rank, conditioning and past keys are swept.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for trial in range(trials):
        kind, dim = ("memit", "alphaedit")[trial % 2], dims[trial // 2 % len(dims)]
        n = 1 if trial // 2 % 4 else min(batch, dim)
        draw = torch.rand(4, generator=generator).tolist()
        rank, conditioning = 1 + int(draw[0] * (dim - 2)), 10 ** (3 * draw[1])
        ridge, past = 10 ** (4 * draw[2] - 2), int(draw[3] * 3)
        metric = _random_metric(kind, dim, rank, conditioning, ridge, past, generator)
        keys, residuals = (torch.randn(n, d, dtype=torch.float64, generator=generator) for d in (dim, dim + 3))
        written, gamma = _written(keys, residuals, metric), association(keys, metric)
        interaction = metric.apply(keys) @ keys.T
        predicted = torch.linalg.solve(torch.eye(n, dtype=torch.float64) + interaction, interaction).T @ residuals
        row = {"method": kind, "dim": dim, "n": n, "rank": rank, "conditioning": conditioning, "ridge": ridge, "past": past}
        row |= {"error": ((written - predicted).norm() / residuals.norm()).item(), "gamma": float("nan"), "beta": float("nan"), "measured": float("nan"), "remainder_error": float("nan")}
        if n == 1:
            share = ((written * residuals).sum() / residuals.square().sum()).item()
            left = ((residuals - written).norm() - residuals.norm() / (1 + gamma)).abs() / residuals.norm()
            row |= {"gamma": gamma.item(), "beta": attenuation(gamma).item(), "measured": share, "remainder_error": left.item()}
        rows.append(row)
    return pd.DataFrame(rows)


def attenuation_on_model(model: str = "tiny", requests: int = 40, text: str = "embedded", seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same on a real layer: β of real requests under MEMIT's and AlphaEdit's metrics, and the batch's spectrum.

    Returns (one row per request: method, id, gamma, beta, measured alone, in_batch; one row per eigenvalue of B).
    """
    lm = load(model)
    asked = [c.request for c in facts(limit=requests)]
    singles, spectra = [], []
    for name in ("memit", "alphaedit"):
        editor = methods.method(name, model, seed=seed)
        state = editor.init(lm, statistics(lm, text, layers=editor.layers))
        layer = editor.layers[-1]
        keys = KeyReader(lm, asked, state.contexts, layer).read(layer).keys
        metric = state.metrics[layer]
        residuals = torch.randn(len(asked), lm.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(keys.device)
        gamma, together = association(keys, metric), realization(keys, gate(keys, metric))
        for i, request in enumerate(asked):
            alone = solve(keys[i : i + 1], residuals[i : i + 1], metric).realized[0]
            measured = (alone @ residuals[i] / residuals[i].square().sum()).item()
            singles.append({"method": name, "id": request.id, "gamma": gamma[i].item(), "beta": attenuation(gamma[i]).item(), "measured": measured, "in_batch": together[i, i].item()})
        eigenvalues = torch.linalg.eigvals(together).real.sort(descending=True).values.tolist()
        spectra += [{"method": name, "index": i + 1, "eigenvalue": value} for i, value in enumerate(eigenvalues)]
    return pd.DataFrame(singles), pd.DataFrame(spectra)


def judge(records: pd.DataFrame, tolerance: float = 1e-9) -> dict:
    """Holds if no instance, single or batch, departs from the prediction by more than `tolerance` (relative)."""
    worst = max(records.error.max(), records.remainder_error.max())
    return {"holds": bool(worst < tolerance), "decided_by": f"largest relative departure {'below 1e-9' if worst < 1e-9 else f'{worst:.0e}'} in {len(records)} random instances"}
