"""MetaKE v3 Figure 7: hidden states of facts before and after edits, as a map and as distances that need no map."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from metake import methods
from metake.data.requests import Cases, EditRequest
from metake.editing.keys import KeyReader
from metake.experiments.borrowed import borrowed
from metake.experiments.cases import read_cases, select
from metake.experiments.decision import (
    Decision,
    all_of,
    any_of,
    at_most,
    for_and_against,
    interval,
    opposite,
    undecided,
    with_interval,
)
from metake.experiments.runs import RunConfig, open_run
from metake.experiments.studies.comparison import comparison, labelled
from metake.experiments.studies.finished import finished
from metake.experiments.studies.whose import READINGS, preferred
from metake.language.model import LanguageModel, load
from metake.report.style import in_order
from metake.support.errors import ParameterError

EDITED, HELD_OUT = "edited", "held out"
MEASURES = ("mean shift", "Fréchet")


class States(NamedTuple):
    """Hidden states of the same facts before any edit and after each method's, float64."""

    ids: tuple[str, ...]
    edited: np.ndarray  # (n,) bool
    before: np.ndarray  # (n, d)
    after: dict[str, np.ndarray]  # method → (n, d)


def hidden_states(
    model: str = "tiny",
    methods_: Sequence[str] = tuple(methods.METHODS),
    data: dict[str, str] | None = None,
    edits: int = 20,
    held_out: int = 40,
    batch: int | None = None,
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    perplexity: float = 30.0,
    draws: int = 200,
    out: str | Path | None = None,
    maps: bool = True,
) -> pd.DataFrame:
    """States at the last edited layer at the subject's last token, of edited facts and of facts about other subjects.

    The runs are `comparison`'s: those already in the folder `out` are read, the others made. batch:
    None for all in one; maps: whether there are rows of the kind "point".
    One frame of three kinds of rows, told by the column `kind`, taken apart by `points`, `distances` and `ratios`:

    point     dataset, method ("pre-edit" too), group, id, x, y: one t-SNE of all states of a data set (fixed seed),
    so that
              every method is seen on the same map; moved: ‖h_after − h_before‖ / spread
    distance  dataset, method, group, measure, value, low, high; chance: its 95 % level if before and after are
    exchanged at
              random within each fact (a permutation: what no systematic change looks like)
    ratio     the same for MetaKE's distance over that method's, on the same facts; `reading`: which reading of MetaKE's

    Distances are in units of the spread √(tr Σ_before), see `apart`. Intervals: 95 %, value · exp(± 1.96 s), s the
    standard deviation of the logarithm over bootstrap draws of facts, the same draws for all methods.
    """
    if (count := (edits + held_out) * (len(methods_) + 1)) <= perplexity or min(edits, held_out) < 3:
        raise ParameterError(
            "a map needs at least 3 edited and 3 held-out facts, and more states than its perplexity; found "
            f"{edits} and {held_out}, {count} states, perplexity {perplexity}"
        )
    for name in methods_:  # before it runs: the states are read where plans are written
        methods.planning(name, model)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        made = comparison(
            model, list(methods_), data, edits, batch or edits, (seed,), text, text_tokens, out=folder
        ).attrs["runs"]
        for name in dict.fromkeys(run["dataset"] for run in made):
            states = read_states([folder / run["folder"] for run in made if run["dataset"] == name], held_out)
            found = [row | {"kind": "point"} for row in _map(states, perplexity, seed)] if maps else []
            found += [row for group in (EDITED, HELD_OUT) for row in _measured(states, group, draws, seed)]
            rows += [{"dataset": name} | row for row in found]
    frame = pd.DataFrame(rows)
    frame.attrs["runs"], frame.attrs["settings"] = made, {"held_out": held_out, "perplexity": perplexity}
    return frame


def points(records: pd.DataFrame, dataset: str | None = None) -> pd.DataFrame:
    """The map's rows, of one data set: by default the first."""
    found = _of_kind(records, "point")
    return labelled(found[found.dataset == (dataset or found.dataset.iloc[0])].reset_index(drop=True), records)


def distances(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of distances."""
    return _of_kind(records, "distance")


def ratios(records: pd.DataFrame, reading: str = "") -> pd.DataFrame:
    """The rows of the distances of a reading of MetaKE over the others'; default: see `preferred`."""
    if "reading" in records:  # without MetaKE there are none
        records = labelled(records[records.reading == (reading or preferred(records.reading))], records)
    return _of_kind(records, "ratio").drop(columns="reading", errors="ignore")


def _of_kind(records: pd.DataFrame, kind: str) -> pd.DataFrame:
    own = records[records.kind == kind].drop(columns="kind").reset_index(drop=True)
    return labelled(own if own.empty else own.dropna(axis=1, how="all"), records)


def read_states(folders: Sequence[Path], held_out: int) -> States:
    """States of the runs' edited facts and of `held_out` others, at the last layer that any of the runs edits.

    The others are drawn by the run's seed among the facts about other subjects: where a prompt begins with its subject,
    another fact about the same one has the same state. All folders are of runs on the same cases. Cost:
    one forward pass a folder.
    """
    configs = [open_run(folder)[0] for folder in folders]
    lm = load(configs[0].model, configs[0].dtype)
    layer = max(_last_layer(config) for config in configs)
    edited, after = finished(folders[0], lm).cases, {}
    subjects, known = {case.request.subject for case in edited}, read_cases(configs[0].data)
    others = select(
        lm, Cases([c for c in known if c.request.subject not in subjects], known.format, known.source), held_out,
        configs[0].seed
    )
    requests = [case.request for case in (*edited, *others)]
    before = _read(lm, requests, layer)
    for folder, config in zip(folders, configs, strict=True):
        with finished(folder, lm).edit.applied(lm):
            after[config.method] = _read(lm, requests, layer)
    return States(tuple(r.id for r in requests), np.arange(len(requests)) < len(edited), before, after)


def _last_layer(config: RunConfig) -> int:
    with borrowed(config.model, config.recipe, config.layers):
        return methods.planning(config.method, config.model, **config.changes).layers[-1]


def _read(lm: LanguageModel, requests: Sequence[EditRequest], layer: int) -> np.ndarray:
    return KeyReader(lm, requests, ("{}",), layer).read(layer).current.cpu().numpy()


def _map(states: States, perplexity: float, seed: int) -> list[dict[str, Any]]:
    sets = {"pre-edit": states.before} | {method: states.after[method] for method in in_order(states.after)}
    groups = np.where(states.edited, EDITED, HELD_OUT)
    with threadpool_limits(1):  # sums of several threads differ in the last digit, which t-SNE blows up
        embedded = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
            np.concatenate(list(sets.values()))
        )
    spread = {group: scale(states.before[groups == group]) for group in (EDITED, HELD_OUT)}
    rows = []
    for (method, found), place in zip(sets.items(), np.split(embedded, len(sets)), strict=True):
        moved = np.linalg.norm(found - states.before, axis=1)
        for i, group, (x, y), far in zip(states.ids, groups, place.astype(float).round(3), moved, strict=True):
            rows.append({"method": method, "group": str(group), "id": i, "x": x, "y": y, "moved": far / spread[group]})
    return rows


def scale(states: np.ndarray) -> float:
    """√(tr Σ) of states (n, d): their root mean square distance from their mean."""
    return float(np.sqrt(states.var(0, ddof=1).sum()))


def apart(before: np.ndarray, after: np.ndarray, shrinkage: float = 0.0, dim: int | None = None) -> tuple[float, float]:
    """How far apart the Gaussians are that two sets of states fit: the shift of the mean, and the Fréchet distance.

    ‖μ₂ − μ₁‖,   and the root of   ‖μ₂ − μ₁‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½)        (Dowson and Landau 1982)
    Σ = (1 − δ) S + δ (tr S / d) I,   S the sample covariance                            (Ledoit and Wolf 2004)

    before, after: (n, r) states; shrinkage: δ, the same for both, so that equal sets are at distance 0 and fewer states
    than dimensions still give full rank; dim: d, if the states are coordinates in a subspace of r ≤ d dimensions that
    holds all of them (orthonormal basis): the rest then contributes (d − r) (√σ₁ − √σ₂)², σ = δ tr S / d.
    """
    dim = dim or before.shape[1]
    shift = float(np.square(after.mean(0) - before.mean(0)).sum())
    covariances, floors = [], []
    for states in (before, after):
        sample = np.cov(states, rowvar=False).reshape(2 * (states.shape[1],))
        floors.append(shrinkage * np.trace(sample) / dim)
        covariances.append((1 - shrinkage) * sample + floors[-1] * np.eye(len(sample)))
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    spreads = (
        np.trace(covariances[0])
        + np.trace(covariances[1])
        - 2 * cross
        + (dim - len(root)) * (floors[0] ** 0.5 - floors[1] ** 0.5) ** 2
    )
    return shift**0.5, (shift + max(float(spreads), 0.0)) ** 0.5


def _measured(states: States, group: str, draws: int, seed: int) -> list[dict[str, Any]]:
    """Distance rows of every method, and ratio rows of MetaKE against every other."""
    rows = states.edited if group == EDITED else ~states.edited
    before, generator = states.before[rows], np.random.default_rng(seed)
    unit, shrinkage = scale(before), float(ledoit_wolf_shrinkage(before))
    drawn = generator.integers(len(before), size=(draws, len(before)))
    swapped = generator.random((draws, len(before), 1)) < 0.5
    found, spreads, result = {}, {}, []

    def measure(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.array(apart(one, other, shrinkage, before.shape[1])) / unit

    for method in in_order(states.after):
        one, other = _coordinates(before, states.after[method][rows])
        found[method] = measure(one, other)
        spreads[method] = np.log(np.array([measure(one[i], other[i]) for i in drawn]).clip(1e-12))
        chance = np.percentile([measure(np.where(s, other, one), np.where(s, one, other)) for s in swapped], 95, axis=0)
        for k, name in enumerate(MEASURES):
            told = _interval(found[method][k], spreads[method][:, k].std(ddof=1))
            result.append(
                {"kind": "distance", "method": method, "group": group, "measure": name} | told | {"chance": chance[k]}
            )
    for reading, method in [(r, m) for r in READINGS if r in found for m in found if m != r]:
        for k, name in enumerate(MEASURES):
            told = _interval(
                found[reading][k] / max(found[method][k], 1e-12),
                (spreads[reading] - spreads[method])[:, k].std(ddof=1),
            )
            whose = {"kind": "ratio", "reading": reading, "method": method, "group": group, "measure": name}
            result.append(whose | told)
    return result


def _coordinates(*sets: np.ndarray) -> list[np.ndarray]:
    """Sets of states (n, d) in one orthonormal basis of the subspace that holds them all, around their common mean."""
    joined = np.concatenate(sets)
    joined = joined - joined.mean(0)
    left, sizes, _ = np.linalg.svd(joined, full_matrices=False)
    keep = sizes > 1e-12 * sizes[0]
    return np.split(left[:, keep] * sizes[keep], len(sets))


def _interval(value: float, deviation: float) -> dict[str, float]:
    return {"value": value, "low": value * np.exp(-1.96 * deviation), "high": value * np.exp(1.96 * deviation)}


def side_by_side(found: pd.DataFrame) -> pd.DataFrame:
    """`distances` or `ratios`, a row per data set and method: each measure of each group with its interval, and in
    brackets the level of chance, if there is one."""
    told = [
        f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" + (f" ({r.chance:.3f})" if "chance" in found else "")
        for r in found.itertuples()
    ]
    long = found.assign(column=found.measure + ", " + found.group, text=told)
    wide = long.pivot(index=["dataset", "method"], columns="column", values="text").rename_axis(columns=None)
    rows = [(d, m) for d in long.dataset.unique() for m in in_order(long[long.dataset == d].method)]
    return labelled(wide.loc[rows, list(long.column.unique())].reset_index(), found)


def judge(ratios: pd.DataFrame, against: str = "alphaedit", least: float = 0.05) -> dict[str, Any]:
    """The paper's claim, MetaKE shifts the states less than AlphaEdit: holds if on every data set some distance is
    smaller by more than the share `least`, its interval below 1, and none is larger, interval and all;
    does not hold if every interval lies above 1 − `least`, so that nowhere it is smaller by that much;
    inconclusive otherwise, and if AlphaEdit was not run."""
    own = ratios[ratios.method == against]
    if own.empty:
        return undecided("").verdict(f"the records do not compare MetaKE with {against}")
    rows = [(r, f"{r.measure}, {r.group}, {r.dataset}") for r in own.itertuples()]
    smaller: dict[str, list[Decision]] = {}
    for r, what in rows:
        below = opposite(interval(what, r.value, r.low, r.high, 1.0))
        by_enough = at_most(what, r.value, 1.0, least, "resolution")
        smaller.setdefault(r.dataset, []).append(all_of([by_enough, below]))
    larger = any_of(interval(what, r.value, r.low, r.high, 1.0) for r, what in rows)
    decided = for_and_against(
        undecided("") if larger.holds else all_of(map(any_of, smaller.values())),
        all_of(interval(what, r.value, r.low, r.high, 1 - least) for r, what in rows),
    )
    parts = [
        f"{r.measure}, {r.group} {with_interval(r.value, r.low, r.high, 3, sign='')} {r.dataset}"
        for r in own.itertuples()
    ]
    return decided.quiet().verdict("MetaKE's distance over AlphaEdit's: " + "; ".join(parts))
