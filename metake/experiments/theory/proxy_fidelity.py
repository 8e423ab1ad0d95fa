"""MetaKE v3 Theorem 2 and its measurements (Figures 3 and 8): does the structural proxy ĝ point where the exact
hypergradient g points?
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.data.requests import EditRequest
from metake.editing.bilevel import refine
from metake.editing.editor import Editor, EditorState, describe, digest_of
from metake.editing.hypergradient import Downstream, Fidelity, fidelity
from metake.editing.statistics import statistics
from metake.editing.targets import Targets, optimize_targets
from metake.experiments.decision import Decision, all_of, interval, opposite
from metake.experiments.kept import kept
from metake.experiments.runs import read_cases, select
from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.comparisons import LONG, agreed, least
from metake.language.model import LanguageModel, load
from metake.support.progress import progress

DIMS = (2, 3, 8, 32)
POINTS = {"v_init": None, "refined by Adam": "adam", "refined by plain descent": "sgd"}
"""Where an edit is looked at, and the optimizer that leads there: the first version of the paper has Adam, v3 eq.
82 plain descent.
"""
REFINED = tuple(name for name, optimizer in POINTS.items() if optimizer)


# The theorem


def random_cases(count: int = 40_000, seed: int = 0) -> pd.DataFrame:
    """Gradients drawn at random, float64: G, M, an exact part g_L off by a gap, a tail of other layers, an anchor.

    Sizes of gap, tail and anchor go over decades, directions from random to straight along ±ĝ_down;
    a third of the cases has no anchor, and in a third it works against ĝ_down. One row per case:
    the quantities of `Fidelity`, and alignment = ⟨g, ĝ⟩ / ‖ĝ‖², off = ‖g − ĝ‖ / ‖ĝ_down‖, which the theorem bounds by
    1 − q/κ from below and q from above.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.concat([_draw(count // len(DIMS), dim, generator) for dim in DIMS], ignore_index=True)


def _draw(count: int, dim: int, generator: torch.Generator) -> pd.DataFrame:
    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, dtype=torch.float64, generator=generator)

    def decades(low: float, high: float) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(count, 1, dtype=torch.float64, generator=generator))

    def toward(vector: Tensor) -> Tensor:
        """Unit vectors between random and straight along ± the given ones."""
        mix = torch.nn.functional.normalize(normal(dim), dim=1) + normal(1).sign() * decades(
            -1, 2
        ) * torch.nn.functional.normalize(vector, dim=1)
        return torch.nn.functional.normalize(mix, dim=1)

    column = normal(dim)
    # from nearly rank one to full
    signal = normal(dim, 1) * column[:, None] + decades(-2, 0)[..., None] * normal(dim, dim)
    structural = decades(-2, 1) * column + normal(dim)
    proxy_down = (signal @ structural[..., None])[..., 0]
    size = proxy_down.norm(dim=1, keepdim=True)
    last = proxy_down + decades(-3, 0.3) * size * toward(proxy_down)
    down = last + decades(-3, 0.3) * last.norm(dim=1, keepdim=True) * toward(proxy_down)
    kind = torch.arange(count) % 3
    against = -torch.rand(count, 1, dtype=torch.float64, generator=generator) * 1.5 * proxy_down
    pull = torch.where(
        (kind == 0)[:, None], 0.0,
        torch.where((kind == 1)[:, None], decades(-2, 1.5) * size * toward(proxy_down), against)
    )
    found = fidelity(down, last, proxy_down, pull, signal.flatten(1).norm(dim=1), structural.norm(dim=1))
    anchor = np.array(["none", "any direction", "against ĝ_down"])[kind]
    return _frame(found, down + pull, proxy_down + pull, proxy_down).assign(dim=dim, anchor=anchor)


def _frame(found: Fidelity, exact: Tensor, proxy: Tensor, proxy_down: Tensor) -> pd.DataFrame:
    columns = found._asdict() | {"ratio": found.ratio, "threshold": found.threshold}
    columns |= {
        "alignment": (exact * proxy).sum(-1) / proxy.square().sum(-1),
        "off": (exact - proxy).norm(dim=-1) / proxy_down.norm(dim=-1),
    }
    return pd.DataFrame({name: value.detach().numpy() for name, value in columns.items()}).assign(
        terms=exact.shape[-1], spacing=torch.finfo(exact.dtype).eps
    )


def adversary(starts: int = 400, steps: int = 300, dim: int = 3, seed: int = 0) -> pd.DataFrame:
    """Two directed searches over all vectors at once, many starts each: the closest that anything comes to
    contradicting the theorem.

    First the smallest q/κ with ⟨g, ĝ⟩ = 0, which the tail is made to give; then the least of ⟨g, ĝ⟩/‖ĝ‖² − (1 − q/κ).
    One row per search: what it found, what the theorem allows at least, evaluations, and the quantities there,
    as of `random_cases`.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = (
        torch.randn(starts, 4, dim, dtype=torch.float64, generator=generator)
        * torch.tensor([1, 1, 0.5, 0.5], dtype=torch.float64)[:, None]
    )

    def margin(points: Tensor) -> Tensor:
        found, exact, proxy, _ = _vectors(points, dim)
        return (exact * proxy).sum(-1) / proxy.square().sum(-1) - (1 - found.ratio)

    searches = {
        "q/κ without descent": (lambda points: _vectors(points, dim, orthogonal=True)[0].ratio, 1.0, True),
        "⟨g, ĝ⟩/‖ĝ‖² − (1 − q/κ)": (margin, 0.0, False),
    }
    rows = []
    for name, (quantity, least, orthogonal) in searches.items():
        best = ascend(lambda points, quantity=quantity: -quantity(points), begin.flatten(1), steps, 0.03)
        told = {"smallest": name, "found": -best.score, "allowed": least, "evaluations": best.evaluations}
        rows.append(_frame(*_vectors(best.point[None], dim, orthogonal)).assign(**told))
    return pd.concat(rows, ignore_index=True)


def _vectors(points: Tensor, dim: int, orthogonal: bool = False) -> tuple[Fidelity, Tensor, Tensor, Tensor]:
    """What the theorem weighs, g, ĝ and ĝ_down of ĝ_down, gap, tail and anchor as free vectors; orthogonal:
    the tail makes ⟨g, ĝ⟩ = 0.

    ρ only rescales: q contains ε_gap/ρ = ‖gap‖ / ‖ĝ_down‖.
    """
    proxy_down, gap, tail, pull = points.view(-1, 4, dim).unbind(1)
    last, proxy = proxy_down + gap, proxy_down + pull
    if orthogonal:
        tail = tail - ((last + tail + pull) * proxy).sum(1, keepdim=True) / proxy.square().sum(1, keepdim=True) * proxy
    found = fidelity(
        last + tail, last, proxy_down, pull, proxy_down.norm(dim=1), torch.ones(len(points), dtype=points.dtype)
    )
    return found, last + tail + pull, proxy, proxy_down


def certificates(cases: pd.DataFrame) -> pd.DataFrame:
    """The theorem's condition, its other forms, and what is left of it when a part is dropped.

    One row per certificate: how many cases it certifies, how many of those do not descend, the least alignment among
    them, and how many uncertified cases descend all the same.
    """
    c, whole = cases, cases.compatibility
    conditions = {
        "q < κ": c.ratio < 1,
        "ε_gap < ρ (κ − ε_tail)/(1 + ε_tail)": c.gap < c.threshold,
        "κ ≥ 1 and ε_gap < ρ (1 − ε_tail)/(1 + ε_tail)": (whole >= 1)
        & (c.gap < c.strength * (1 - c.leakage) / (1 + c.leakage)),
        "without condition 1 (tail taken for 0)": c.gap / c.strength < whole,
        "without condition 2 (gap taken for 0)": c.leakage < whole,
        "without condition 3 (ρ taken for 1)": c.leakage + (1 + c.leakage) * c.gap < whole,
        "without κ (κ taken for 1)": c.bound < 1,
    }
    rows = []
    for name, granted in conditions.items():
        least = c.alignment[granted].min() if granted.any() else np.nan
        counted = {
            "certified": granted.sum(), "of_them_not_descending": (granted & ~(c.alignment > 0)).sum(),
            "uncertified_but_descending": (~granted & (c.alignment > 0)).sum()
        }
        rows.append({"certificate": name} | {k: int(v) for k, v in counted.items()} | {"least_alignment": least})
    return pd.DataFrame(rows)


def spare(cases: pd.DataFrame) -> pd.DataFrame:
    """How far each case is from contradicting the theorem, four ways, in units of rounding; NaN where nothing is said.

    bound: ‖g − ĝ‖ ≤ q ‖ĝ_down‖; alignment: ⟨g, ĝ⟩ ≥ (1 − q/κ) ‖ĝ‖²; both may be reached. descent: certified, so ⟨g, ĝ⟩
    > 0; forms: both forms of the condition say the same.

    Vectors of `terms` entries, each good to `spacing`; the largest, in units of ‖ĝ_down‖: g_L is at most 1 + ε_gap/ρ, g_down 1 + ε_tail times
    that, and g and ĝ add what the anchor may be, 1 + κ. A norm of a difference is off by that much, relative to what it
    is divided by; q, κ and the threshold take part in the last digits of what they are made of.
    """
    c, fine = cases, cases.spacing * np.minimum(cases.terms, LONG)
    gap = 1 + c.gap / c.strength
    size = (1 + c.leakage) * gap + 1 + 2 * c.compatibility
    tail = (2 + c.leakage) * fine  # of ε_tail
    off, bound = fine * size, (1 + c.leakage) * 2 * gap * fine + gap * tail
    whole = fine * (2 + c.compatibility)  # of κ
    ratio = (bound + c.ratio * whole) / c.compatibility
    aligned = fine * size / c.compatibility + 2 * whole / c.compatibility * c.alignment.abs()
    certain = (c.ratio - 1).abs() > ratio  # elsewhere rounding decides whether it is certified
    threshold = c.strength / (1 + c.leakage) * (whole + tail * (1 + c.threshold.abs() / c.strength)) + fine * c.strength
    forms = (c.threshold - c.gap) * np.where(c.ratio < 1, 1, -1) / (threshold + 2 * gap * fine * c.strength)
    return pd.DataFrame({
        "bound": (c.bound - c.off) / (off + bound), "alignment": (c.alignment - 1 + c.ratio) / (aligned + ratio),
        "descent": (c.alignment / aligned).where(certain & (c.ratio < 1)), "forms": forms.where(certain),
    })


def violations(cases: pd.DataFrame) -> int:
    """Cases that contradict the theorem beyond rounding, in one way at least."""
    return int((spare(cases) < -1).any(axis=1).sum())


def _theorem(cases: pd.DataFrame) -> Decision:
    """No case contradicts the theorem."""
    found = spare(cases[np.isfinite(cases.ratio)])
    return all_of(
        least(f"the theorem's {way}", found[way].dropna(), attained=way in ("bound", "alignment"))
        for way in found if found[way].notna().any()
    )


# On a model


def proxy_fidelity(
    model: str = "tiny", edits: int = 8, data: str = "facts", text: str = "embedded", seed: int = 0,
    text_tokens: int | None = None, out: Path | None = None
) -> pd.DataFrame:
    """g and ĝ of single edits on the unedited model, at v_init and where the refinement ends (v3 Figures 3 and 8,
    Appendix C.5).

    One row per edit and point: losses, the quantities of `Fidelity`, alignment and off as of `random_cases`, and the
    reduction of F in basis points by one step along g, ĝ, the proxy with the key-only gate, and none:
    with the same step size, the refinement's, and (equal_…) with the same length as g's; rounding:
    smaller reductions than this say nothing.
    out: a folder that keeps finished edits, ten at a time.
    """
    lm, editor = load(model), methods.metake(model, seed=seed)
    source = read_cases(data)
    requests = [case.request for case in select(lm, source, edits, seed)]
    state = editor.init(lm, statistics(lm, text, layers=editor.layers, tokens=text_tokens))
    rows = []
    for chunk in progress([requests[i : i + 10] for i in range(0, len(requests), 10)], "hypergradients"):
        told = (
            describe(editor), state.statistics_digest, state.contexts, lm.base(), lm.digest(lm.write_path(0)),
            digest_of(chunk)
        )
        rows += kept(out, told, lambda chunk=chunk: _edits(lm, editor, state, chunk))
    frame = pd.DataFrame(rows)
    settings = {
        "edits": len(requests), "seed": seed, "step_size": editor.refine.step_size, "steps": editor.refine.steps
    }
    frame.attrs["settings"] = {"dataset": f"{Path(data).name} sha256:{source.digest[:16]}"} | settings
    return frame


def _edits(lm: LanguageModel, editor: Editor, state: EditorState, requests: list[EditRequest]) -> list[dict[str, Any]]:
    # together, each as if alone
    planned = optimize_targets(lm, requests, state.contexts, editor.layers[-1], editor.target)
    rows = []
    for i, request in enumerate(requests):
        initial = Targets(planned.layer, planned.anchor[i : i + 1], planned.planned[i : i + 1])
        downstream = Downstream(lm, [request], editor, state, initial)
        key_only = downstream.frozen_gate("key_only")
        for point, optimizer in POINTS.items():
            rule = replace(editor.refine, optimizer=optimizer) if optimizer else replace(editor.refine, steps=0)
            value = refine(lm, [request], state.contexts, initial, downstream.gate, rule).value
            rows.append(
                {"request": request.id, "point": point} | _measured(downstream, value, key_only, rule.step_size)
            )
    return rows


def _measured(downstream: Downstream, value: Tensor, key_only: Tensor, step: float) -> dict[str, Any]:
    found = downstream.gradients(value)
    whole = {
        "exact": found.exact, "proxy": found.proxy, "key_only": found.through(key_only),
        "none": torch.zeros_like(value)
    }
    whole |= {
        f"equal_{name}": whole[name] * (found.exact.norm() / whole[name].norm()) for name in ("proxy", "key_only")
    }
    after = {name: downstream.losses(value - step * u).sum().item() for name, u in whole.items()}
    row = dict(zip(("edit", "locality", "anchor"), found.losses[0].tolist(), strict=True))
    row |= (
        _frame(Fidelity(*(q[None] for q in found.fidelity())), found.exact, found.proxy, found.proxy_down)
        .iloc[0]
        .to_dict()
    )
    row["pull_share"] = (found.pull.norm() / found.exact.norm()).item()
    # basis points; a loss sums some 20 logarithms, each good to eps
    row["rounding"] = 16e4 * torch.finfo(downstream.lm.dtype).eps
    return row | {name: 1e4 * (after["none"] - loss) / after["none"] for name, loss in after.items()}


def fidelity_summary(records: pd.DataFrame) -> pd.DataFrame:
    """Per point: medians of the theorem's quantities and of the cosines, edits certified,
    not certified and undefined.
    """
    rows = []
    for point, group in records.groupby("point", sort=False):
        aligned = {"aligned": int((group.cosine > 0).sum()), "aligned_downstream": int((group.down_cosine > 0).sum())}
        medians = {
            name: group[name].median()
            for name in ("leakage", "gap", "strength", "compatibility", "ratio", "cosine", "down_cosine")
        }
        defined = np.isfinite(group.ratio)
        counted = {
            "certified": int((group.ratio < 1).sum()), "not_certified": int((defined & (group.ratio >= 1)).sum()),
            "undefined": int((~defined).sum())
        }
        rows.append({"point": point, "edits": len(group)} | aligned | medians | counted)
    return _like(records, rows)


def _like(records: pd.DataFrame, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A summary that says, as its records do, whether they are recorded."""
    found = pd.DataFrame(rows)
    found.attrs = records.attrs
    return found


def descent(records: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Per point and direction: the median reduction in basis points with a 95 % bootstrap interval,
    edits whose loss falls, and the share of g's reduction, Σ over edits, with its interval."""
    rows = []
    for point, group in records.groupby("point", sort=False):
        drawn = np.random.default_rng(seed).integers(len(group), size=(draws, len(group)))
        exact = group.exact.to_numpy()
        for name in ("exact", "proxy", "key_only", "none", "equal_proxy", "equal_key_only"):
            values = group[name].to_numpy()
            low, high = np.percentile(np.median(values[drawn], 1), [2.5, 97.5])
            share_low, share_high = np.percentile(values[drawn].sum(1) / exact[drawn].sum(1), [2.5, 97.5])
            row = {
                "point": point, "direction": name, "median": np.median(values), "low": low, "high": high,
                "falls": int((values > group["rounding"]).sum())
            }
            rows.append(row | {"share": values.sum() / exact.sum(), "share_low": share_low, "share_high": share_high})
    return _like(records, rows)


# Verdicts


def judge_theorem(cases: pd.DataFrame, stuck: pd.DataFrame, measured: pd.DataFrame) -> dict:
    """Holds if nothing contradicts it: random cases, the adversary's closest, and the model's own edits."""
    count = violations(cases) + violations(stuck) + violations(measured)
    certified = int((cases.ratio < 1).sum() + (measured.ratio < 1).sum())
    told = f"{count} violations in {certified} certified cases; the adversary's closest case without descent has "
    return all_of(_theorem(found) for found in (cases, stuck, measured) if len(found)).verdict(
        f"{told}q/κ = {stuck.found.iloc[0]:.3f}"
    )


def judge_alignment(records: pd.DataFrame) -> dict:
    """The paper's claim for Figure 3, of every edit where the refinement has converged: inconclusive if it depends on
    the optimizer.
    """
    said, outcomes = [], []
    for point, group in records[records.point.isin(REFINED)].groupby("point", sort=False):
        fine = LONG / 16e4 * group["rounding"]  # of a cosine: ε times the terms it sums; `rounding` is 16e4 ε
        aligned, falls, n = int((group.cosine > fine).sum()), int((group.proxy > group["rounding"]).sum()), len(group)
        outcomes.append(all_of([
            least(f"the cosine, {point}", group.cosine / fine), least(f"F, {point}", group.proxy / group["rounding"])
        ]))
        medians = f"median cosine {group.cosine.median():.2f}, without the anchor {group.down_cosine.median():.2f}"
        said.append(f"{point}: aligned on {aligned} and F falls on {falls} of {n} edits, {medians}")
    return agreed(outcomes, "the optimizers disagree").verdict("; ".join(said))


def judge_dominance(records: pd.DataFrame, draws: int = 2000, seed: int = 0) -> dict:
    """Figure 8 (a): the final layer carries most of the downstream gradient: ε_tail is below 1 of the median edit, at
    each point, with its whole 95 % bootstrap interval.
    """
    tails, found = records.groupby("point", sort=False).leakage, []
    for point, own in tails:
        drawn = np.random.default_rng(seed).integers(len(own), size=(draws, len(own)))
        low, high = np.percentile(np.median(own.to_numpy()[drawn], 1), [2.5, 97.5])
        found.append(opposite(interval(f"median ε_tail, {point},", own.median(), float(low), float(high), 1.0)))
    told = f"median ε_tail {tails.median().min():.2f} to {tails.median().max():.2f} over the points of "
    return agreed(found, "the points disagree").verdict(f"{told}{records.request.nunique()} edits")
