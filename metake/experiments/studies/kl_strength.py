"""MetaKE v3 Figure 5: efficacy against the KL weight of Stage I, for the requests that an edit reaches best and for
those it reaches least."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from metake import methods
from metake.editing.diagnosis import diagnose
from metake.editing.editor import Editor
from metake.editing.state import EditorState
from metake.editing.statistics import statistics
from metake.experiments.cases import read_cases, select
from metake.experiments.studies.comparison import PRIMARY, labelled
from metake.experiments.studies.study import Batch, one
from metake.language.model import load
from metake.support.errors import ParameterError

OCTAVES = (0, 1, 2, 3)
"""How far Λ reaches from the default λ_KL to either side: the paper's grid, "centered at default", did not survive."""
GROUPS = {"high": "high γ", "low": "low γ"}
MEASURES = ("efficacy", "generalization", "specificity", "log_p", "log_p_paraphrase")
POINTS = MEASURES[:3]  # shares, told in percent


def kl_strength(
    model: str = "tiny",
    methods_: Sequence[str] = PRIMARY,
    octaves: Sequence[int] = OCTAVES,
    pool: int = 100,
    share: float = 0.2,
    data: Mapping[str, str] | None = None,
    seeds: Sequence[int] = (0,),
    text: str = "embedded",
    text_tokens: int | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """The whole pipeline at every λ_KL, on the requests of highest and of lowest γ apart (v3 §6.3 and Appendix C.6).

    pool: requests drawn by a seed, ranked by γ under each method's own metric at its last edited layer, before any
    edit;
    share: of them in the "high" and in the "low" group, each edited in one batch from the unedited model; octaves: Λ is
    each method's default λ_KL times 2^±k; data: default ZsRE, as in the paper; out: see `study`.
    All else stays as the method has it.

    One row per data set, seed, method, group, λ_KL ("kl_weight") and request: see `study`. Raises ParameterError for
    groups that overlap or are empty. Cost: a Stage I per λ_KL of every request that is in some group.
    """
    if not 0 < share <= 0.5 or round(share * pool) < 1:
        raise ParameterError(
            f"two groups of {share:g} of {pool} requests cannot be formed; expected a share up to 0.5 that "
            "gives each at least one request"
        )
    lm = load(model)
    editors = {name: methods.planning(name, model) for name in methods_}
    given = statistics(
        lm, text, layers=sorted({layer for e in editors.values() for layer in e.layers}), tokens=text_tokens
    )
    begun = {name: (editor, editor.init(lm, given)) for name, editor in editors.items()}
    rows = []
    for name, source in (data or {"ZsRE format": "facts-zsre"}).items():
        for seed in seeds:
            batch = Batch.of(lm, given, select(lm, read_cases(source), pool, seed))
            rows += [
                {"dataset": name, "seed": seed} | row
                for row in _sweep(batch, begun, sorted({2.0**s for k in octaves for s in (k, -k)}), share, out)
            ]
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = {"requests": pool, "requests_per_group": round(share * pool), "seeds": list(seeds)}
    return frame


def _sweep(
    batch: Batch, begun: Mapping[str, tuple[Editor, EditorState]], factors: Sequence[float], share: float,
    out: str | Path | None
) -> Iterator[dict[str, Any]]:
    """Groups by each method's own γ; what is in any of them is planned once per λ_KL, for all that plan alike."""
    ranked = {
        name: extremes([d.association for d in diagnose(batch.lm, batch.requests, editor, state)], share)
        for name, (editor, state) in begun.items()
    }
    members = sorted({i for groups in ranked.values() for own in groups.values() for i in own})
    batch = batch.part(members)
    batch = replace(batch, whole=None)
    for factor in factors:
        for name, (editor, state) in begun.items():
            weight = factor * editor.target.kl_weight
            tuned = replace(editor, target=replace(editor.target, kl_weight=weight))
            for group, own in ranked[name].items():
                found = one(batch.part([members.index(i) for i in own]), tuned, state, out=out)
                yield from (
                    {"method": name, "group": group, "kl_weight": weight, "factor": factor} | row for row in found
                )


def extremes(gamma: Sequence[float], share: float) -> dict[str, list[int]]:
    """Places of the `share` of highest and of lowest γ, by group; of equal ones, the earlier counts as lower."""
    order, count = np.argsort(gamma, kind="stable").tolist(), round(share * len(gamma))
    return {"high": order[::-1][:count], "low": order[:count]}


def curves(records: pd.DataFrame) -> pd.DataFrame:
    """Means per data set, method, group and λ_KL: shares in percent, log p in nats, and the length of the plan and what
    is realized of it as medians. `best`: the highest efficacy of its curve, of equal ones at the smallest λ_KL
    (eq. 118)."""
    keys = ["dataset", "method", "group", "kl_weight"]
    grouped = records.sort_values("kl_weight", kind="stable").groupby(keys, sort=False)
    found = grouped[list(MEASURES)].mean()
    found[list(POINTS)] *= 100
    found = found.join(grouped[["planned", "whole"]].median()).join(grouped.size().rename("requests")).reset_index()
    found["best"] = False
    for _, own in found.groupby(keys[:3], sort=False):
        found.loc[own.efficacy.round(9).idxmax(), "best"] = True
    return labelled(found, records)


class _Curve(NamedTuple):
    """One method's group: a measure of each request at each λ_KL, and its means in each bootstrap draw."""

    grid: np.ndarray  #    (λ,)
    values: np.ndarray  #  (requests, λ)
    means: np.ndarray  #   (draws, λ)

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(0)

    @property
    def best(self) -> int:
        return int(_first_best(self.mean))

    @property
    def drawn(self) -> np.ndarray:
        return _first_best(self.means)

    @property
    def tied(self) -> int:
        """How many λ_KL share the highest mean."""
        mean = self.mean.round(9)
        return int((mean == mean.max()).sum())


def _first_best(means: np.ndarray) -> np.ndarray:
    """Place of the highest mean; of equal ones, which rounding must not part, the first: the smaller λ_KL."""
    return means.round(9).argmax(-1)


def _curves(records: pd.DataFrame, measure: str, draws: int, seed: int) -> dict[tuple[str, str], dict[str, _Curve]]:
    """Per data set and method, by group. The same requests are drawn alike, so that methods compare by pair."""
    found: dict[tuple[str, str], dict[str, _Curve]] = {}
    for (dataset, method, group), own in records.groupby(["dataset", "method", "group"], sort=False):
        table = own.pivot(index=["seed", "id"], columns="kl_weight", values=measure).sort_index()
        generator = np.random.default_rng([seed, zlib.crc32(repr([dataset, *table.index]).encode())])
        counts = generator.multinomial(len(table), np.full(len(table), 1 / len(table)), draws)
        found.setdefault((dataset, method), {})[group] = _Curve(
            table.columns.to_numpy(), table.to_numpy(), counts @ table.to_numpy() / len(table)
        )
    return found


def _interval(drawn: np.ndarray, prefix: str = "") -> dict[str, float]:
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest")
    return {f"{prefix}low": low, f"{prefix}high": high}


def optima(records: pd.DataFrame, measure: str = "efficacy", draws: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Where each curve is highest, λ*, with a 95 % bootstrap interval over requests, ties to the smaller (eq. 118).

    tied: how many λ_KL share the highest mean; span: what the curve's highest and lowest mean are apart, points or
    nats.
    """
    rows, scale = [], 100 if measure in POINTS else 1
    for (dataset, method), groups in _curves(records, measure, draws, seed).items():
        for group, c in groups.items():
            row = {
                "dataset": dataset, "method": method, "group": GROUPS[group], "requests": len(c.values),
                "λ*": c.grid[c.best], **_interval(c.grid[c.drawn])
            }
            rows.append(row | {"at λ*": scale * c.mean[c.best], "tied": c.tied, "span": scale * np.ptp(c.mean)})
    return labelled(pd.DataFrame(rows), records)


def shifts(records: pd.DataFrame, measure: str = "efficacy", draws: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Octaves from the high-γ group's λ* to the low-γ group's, log₂(λ*_low / λ*_high), with 95 % bootstrap intervals.

    nearer: by how many octaves the two are less apart than under the method before it in the records (MEMIT, AlphaEdit,
    MetaKE);
    gap: the high-γ group's mean over all λ_KL minus the low-γ group's, points or nats; undecided:
    why the two λ* cannot be told apart whatever the intervals say, or "".
    """
    rows, scale, before = [], 100 if measure in POINTS else 1, {}
    for (dataset, method), groups in _curves(records, measure, draws, seed).items():
        high, low = groups["high"], groups["low"]
        octaves, drawn = (
            np.log2(low.grid[low.best] / high.grid[high.best]), np.log2(low.grid[low.drawn] / high.grid[high.drawn])
        )
        apart, apart_drawn = before.get(dataset, (np.nan, np.full(draws, np.nan)))
        row = {"dataset": dataset, "method": method, "octaves": octaves, **_interval(drawn)}
        row |= {"nearer": apart - abs(octaves), **_interval(apart_drawn - np.abs(drawn), "nearer_")}
        row |= {
            "gap": scale * (high.mean.mean() - low.mean.mean()),
            **_interval(scale * (high.means - low.means).mean(1), "gap_"),
        }
        rows.append(row | {"undecided": _undecided(high, low)})
        before[dataset] = abs(octaves), np.abs(drawn)
    return labelled(pd.DataFrame(rows), records)


def _undecided(high: _Curve, low: _Curve) -> str:
    """Where the rule for ties, or the end of the grid, decides instead of the data."""
    if len(high.grid) in (high.tied, low.tied):
        return "a flat curve"
    return "both at the grid's end" if high.best == low.best and high.best in (0, len(high.grid) - 1) else ""


def leads(
    records: pd.DataFrame, measure: str = "efficacy", draws: int = 4000, seed: int = 0, leader: str = "metake"
) -> pd.DataFrame:
    """MetaKE minus every other method, over both groups and all λ_KL: in how many of these it is above, equal or below,
    and the mean difference with a 95 % bootstrap interval, points or nats;
    by pair as far as their groups hold the same requests."""
    found, rows, scale = _curves(records, measure, draws, seed), [], 100 if measure in POINTS else 1
    for (dataset, method), groups in found.items():
        if method != leader:
            own = found[dataset, leader]
            apart = np.concatenate([own[g].mean - groups[g].mean for g in GROUPS]).round(9)
            drawn = np.mean([(own[g].means - groups[g].means).mean(1) for g in GROUPS], axis=0)
            counts = {
                "above": int((apart > 0).sum()), "equal": int((apart == 0).sum()), "below": int((apart < 0).sum())
            }
            rows.append(
                {
                    "dataset": dataset, "method": method, **counts, "difference": scale * apart.mean(),
                    **_interval(scale * drawn)
                }
            )
    return labelled(pd.DataFrame(rows), records)
