"""Δ = R·M: every closed-form method against its published d×d solve, at random, searched for, and at the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import pandas as pd
import torch
from torch import Tensor
from torch.linalg import LinAlgError

from metake import methods
from metake.algebra.geometry import NullSpace
from metake.editing.editor import Editor
from metake.experiments.decision import undecided
from metake.experiments.speed.literal import load_reference
from metake.experiments.theory.comparisons import rounding, same
from metake.experiments.theory.solves import THRESHOLD, Case, difficulty, draw, ours, published
from metake.support.errors import StatisticsError

STARTS = 20  # random instances of a search, before it climbs
DISTANCES = (0.0, 1e-6, 1e-5, 1e-3)  # closer, and rounding alone would decide the size of an exact write


def _compared(reference: ModuleType, method: str, editor: Editor, case: Case, wrong: Case | None = None) -> list[dict]:
    """One row per published form: relative difference of the updates, κ, what rounding explains, and their ratio.

    Rounding: four sums over key space in a row, ε κ each: C or its projector, the metric's own inverse, what remembers
    the past, and the batch's system.
    wrong: the instance that the library is given instead, to see that it would be noticed.
    """
    found, kappa, rows = ours(editor, wrong or case), difficulty(editor, case), []
    for form, expected in published(reference, method, editor, case).items():
        error = ((found - expected).norm() / expected.norm()).item()
        cancels = any(rule.when == "sequence" for rule in editor.post)  # W − W₀
        size = kappa * max(1.0, (case.weight.norm() / expected.norm()).item() if cancels else 1.0)
        row = {"method": method, "form": form, "error": error, "kappa": size}
        rows.append(row | {"ratio": error / rounding(4 * len(case.keys), size)})
    return rows


def formula_check(
    trials: int = 60, seed: int = 0, dims: tuple[int, ...] = (4, 16, 64), model: str = "tiny",
    names: Sequence[str] = tuple(methods.METHODS)
) -> pd.DataFrame:
    """Random instances in float64: each method's update, post-processes included, against its published d×d forms.

    Swept: dimension, rank, conditioning up to 1e6, strength of the metric, scale of the keys,
    number of past keys (up to d) and batch size (up to 2 d; exact writes up to d/2; ROME one). Other numbers,
    such as RECT's share, are the model's recipe.
    One row per instance and form: method, form, dim, n, rank, past, error, kappa (see `difficulty`),
    ratio = error / what rounding explains.
    """
    reference, generator, rows = load_reference(), torch.Generator().manual_seed(seed), []
    for method in names:
        editor = methods.method(method, model)
        for trial in range(trials):
            dim = dims[trial % len(dims)]
            most = 1 if editor.together == 1 else 2 * dim if editor.noise else dim // 2
            case = draw(generator, dim, 1 + int(torch.rand(1, generator=generator).item() * most))
            swept = {"dim": dim, "n": case.keys.shape[1], "rank": case.rank, "past": case.past.shape[1]}
            rows += [swept | row for row in _compared(reference, method, editor, case)]
    return pd.DataFrame(rows)


def by_form(records: pd.DataFrame) -> pd.DataFrame:
    """Per method and published form: whether the median difference is below 1e-9, and rounding explains every one."""
    grouped = records.groupby(["method", "form"], sort=False)
    told = {"median below 1e-9": grouped.error.median() < 1e-9, "all explained by rounding": grouped.ratio.max() < 1}
    return grouped.agg(instances=("error", "size")).assign(**told).reset_index()


def distinct_solves(model: str = "tiny") -> dict[str, Editor]:
    """One method per different solve, without post-processes: others differ in targets, layers, what comes after."""
    found: dict[tuple, str] = {}
    for name in methods.METHODS:
        editor = methods.method(name, model)
        ridge = bool(getattr(editor.metric, "ridge", 0))
        found.setdefault((type(editor.metric), ridge, editor.remember, editor.noise, editor.plain), name)
    return {name: replace(methods.method(name, model), post=()) for name in found.values()}


def sensitivity(
    trials: int = 60, seed: int = 1, size: float = 1e-3, dim: int = 16, n: int = 4, model: str = "tiny"
) -> pd.DataFrame:
    """What the check would notice: the library's first key is longer by `size`, the published form has the true one.

    One row per distinct solve: instances, and in how many of them the difference is more than rounding explains.
    """
    reference, generator, rows = load_reference(), torch.Generator().manual_seed(seed), []
    for method, editor in distinct_solves(model).items():
        noticed = 0
        for _ in range(trials):
            case = draw(generator, dim, 1 if editor.together == 1 else n)
            longer = case.keys.clone()
            longer[:, 0] *= 1 + size
            wrong = case._replace(keys=longer, at=(1 + size) * case.at)
            noticed += _compared(reference, method, editor, case, wrong)[0]["ratio"] > 1
        rows.append({"method": method, "instances": trials, "noticed": noticed})
    return pd.DataFrame(rows)


def search(evaluations: int = 200, seed: int = 0, dim: int = 6, n: int = 3, model: str = "tiny") -> pd.DataFrame:
    """A hill climb per distinct solve for the instance that departs most from its published form, for its rounding.

    From the worst of `STARTS` random instances it moves keys, past keys, spectrum and strength, brings keys together or
    onto the preserved directions, and keeps what departs more. One row per solve and starting point or end (`stage`),
    with what `_compared` says of its worst form, and `refused`: instances that the library would not solve.
    """
    reference, generator, rows = load_reference(), torch.Generator().manual_seed(seed), []
    for method, editor in distinct_solves(model).items():
        size, refused = 1 if editor.together == 1 else n, 0

        def worst(case: Case, method: str = method, editor: Editor = editor) -> dict:
            return max(_compared(reference, method, editor, case), key=lambda row: row["ratio"])

        found = [(worst(case), case) for case in (draw(generator, dim, size) for _ in range(STARTS))]
        best, at = max(found, key=lambda pair: pair[0]["ratio"])
        rows.append({"stage": "start"} | best)
        for _ in range(evaluations):
            try:
                moved = _moved(at, generator)
                if (row := worst(moved))["ratio"] > best["ratio"]:
                    best, at = row, moved
            except (StatisticsError, LinAlgError):
                refused += 1
        rows.append({"stage": "end", "refused": refused} | best)
    return pd.DataFrame(rows)


def by_search(searched: pd.DataFrame, evaluations: int) -> pd.DataFrame:
    """Per distinct solve: instances that the search visited, and whether rounding explains the worst of them."""
    ends = searched[searched.stage == "end"]
    told = {"instances visited": STARTS + evaluations, "all explained by rounding": ends.ratio < 1}
    return ends[["method"]].assign(**told)


def _moved(case: Case, generator: torch.Generator) -> Case:
    """A neighbor of an instance: one of six moves, with a step between 1e-8 and 1 relative to what it moves."""

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    kind, draws = (
        torch.randint(6, (1,), generator=generator).item(), torch.rand(2, dtype=torch.float64, generator=generator)
    )
    step, pick = 10 ** (-8 * draws[0]), int(draws[1] * case.keys.shape[1])
    keys = case.keys.clone()
    match kind:
        case 0:
            keys = keys + step * keys.norm() * normal(keys) / keys.numel() ** 0.5
        case 1:  # two keys nearly coincide
            keys[:, pick] = keys[:, 0] + step * keys[:, 0].norm() * normal(keys[:, 0])
        case 2:  # a key nearly in the directions that the preserved keys use
            inside = case.basis[:, : case.rank]
            keys[:, pick] = inside @ (inside.T @ keys[:, pick]) + step * keys[:, pick].norm() * normal(keys[:, 0])
        case 3:
            return case._replace(past=case.past * 10 ** (2 * draws[1] - 1) + step * normal(case.past))
        case 4:
            return case._replace(scales=(case.scales + step * normal(case.scales)).clamp(-8, 2))
        case 5:
            return case._replace(strength=(case.strength + 2 * step * (2 * draws[1] - 1)).clamp(-4, 5))
    return case._replace(keys=keys, at=keys + (case.at - case.keys))


def coinciding_keys(
    method: str = "emmet", seed: int = 0, dim: int = 8, distances: Sequence[float] = DISTANCES, model: str = "tiny"
) -> pd.DataFrame:
    """Exact writes (ν = 0) of three requests, two with keys `distance` apart (relative) and different wishes.

    One row per distance: whether the d×d form writes what was planned (to 1e-3), the order of magnitude of its
    ‖Δ‖‖K‖/‖R‖, and what the library does.
    """
    reference, generator = load_reference(), torch.Generator().manual_seed(seed)
    editor, case, rows = methods.method(method, model), draw(generator, dim, 3), []
    for distance in distances:
        keys = case.keys.clone()
        keys[:, 2] = keys[:, 0] + distance * case.keys[:, 2] * keys[:, 0].norm() / case.keys[:, 2].norm()
        near = case._replace(keys=keys, at=keys)
        try:
            (delta,) = published(reference, method, editor, near).values()
            writes = bool((delta @ keys - case.residuals).norm() < 1e-3 * case.residuals.norm())
            size = _order(delta.norm() * keys.norm() / case.residuals.norm()) if writes else None
        except LinAlgError:
            writes, size = False, None
        try:
            row = _compared(reference, method, editor, near)[0]
            answer = "same update" if row["ratio"] < 1 else "another update"
        except StatisticsError:
            answer = "refuses"
        row = {"distance of the keys": f"{distance:g}", "d×d form writes the plan": writes}
        rows.append(row | {"size of its update": size, "library": answer})
    return pd.DataFrame(rows)


def not_idempotent(seed: int = 0, dim: int = 12, sizes: Sequence[float] = (1e-8, 1e-4, 1e-2)) -> pd.DataFrame:
    """AlphaEdit's three forms when P² = P holds only to a given size: the projector as computed, as stored in single
    precision, as the library keeps it, and disturbed by a symmetric matrix of that size.

    One row per projector: orders of magnitude of ‖P² − P‖/‖P‖ and of the relative difference of each form from the
    paper's.
    """
    reference, generator = load_reference(), torch.Generator().manual_seed(seed)
    case = draw(generator, dim, 4)._replace(rank=dim // 2, strength=torch.tensor(0.0).double())
    eye = torch.eye(dim, dtype=torch.float64)
    P = reference.projector(case.statistics(case.rank).covariance, THRESHOLD)
    noise = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    noise = (noise + noise.T) / (noise + noise.T).norm() * P.norm()
    kept = NullSpace(case.statistics(case.rank), threshold=THRESHOLD).project(eye)
    given = {"as computed": P, "as the library keeps it": kept, "rounded to single precision": P.float().double()}
    rows = []
    for name, projector in (given | {f"disturbed by {size:.0e}": P + size * noise for size in sizes}).items():
        forms = [
            form(case.keys, case.residuals, projector, 1.0, case.past)
            for form in (reference.alphaedit_paper, reference.alphaedit_code, reference.alphaedit_projected)
        ]
        apart = [_order((form - forms[0]).norm() / forms[0].norm()) for form in forms[1:]]
        defect = _order((projector @ projector - projector).norm() / projector.norm())
        row = {"projector": name, "P² − P": defect}
        rows.append(row | {"released code − paper": apart[0], "projected keys − paper": apart[1]})
    return pd.DataFrame(rows)


def _order(size: Tensor) -> str:
    return "rounding" if size < 1e-12 else f"1e{round(size.log10().item()):+d}"


def judge(records: pd.DataFrame, searched: pd.DataFrame, names: Sequence[str] = tuple(methods.METHODS)) -> dict:
    """Holds if every method was compared, and no instance, drawn or searched for, departs from a published form by more
    than rounding explains; inconclusive if a method has not been compared."""
    ratios = pd.concat([records.ratio, searched.ratio])
    found = same("the difference of an update from a published form", ratios, [1.0] * len(ratios))
    missing = [name for name in names if name not in set(records.method)]
    if found.holds and missing:
        found = undecided(f"not compared: {', '.join(missing)}", "rounding")
    count = f"{len(records)} random comparisons of {records.method.nunique()} methods and {len(searched) // 2} searches"
    worst = f"a difference of {found.margin:.0e} times" if found.holds is False else "no difference above"
    return found.verdict(f"{worst} rounding in {count}")
