"""MetaKE v3 Theorem 2 on gradients at large: drawn at random, searched for, and its condition taken apart."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metake.experiments.decision import Decision, all_of
from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.comparisons import LONG, least
from metake.experiments.theory.hypergradient import Fidelity, fidelity

DIMS = (2, 3, 8, 32)


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
    return frame(found, down + pull, proxy_down + pull, proxy_down).assign(dim=dim, anchor=anchor)


def frame(found: Fidelity, exact: Tensor, proxy: Tensor, proxy_down: Tensor) -> pd.DataFrame:
    columns = found._asdict() | {"ratio": found.ratio, "threshold": found.threshold}
    columns |= {
        "alignment": (exact * proxy).sum(-1) / proxy.square().sum(-1),
        "off": (exact - proxy).norm(dim=-1) / proxy_down.norm(dim=-1),
    }
    return pd.DataFrame({name: value.detach().numpy() for name, value in columns.items()}).assign(
        terms=exact.shape[-1], spacing=torch.finfo(exact.dtype).eps
    )


def adversary(starts: int = 400, steps: int = 300, dim: int = 3, seed: int = 0) -> pd.DataFrame:
    """Two directed searches over all vectors at once: the closest that anything comes to contradicting the theorem.

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
    for name, (quantity, bound, orthogonal) in searches.items():
        best = ascend(lambda points, quantity=quantity: -quantity(points), begin.flatten(1), steps, 0.03)
        told = {"smallest": name, "found": -best.score, "allowed": bound, "evaluations": best.evaluations}
        rows.append(frame(*_vectors(best.point[None], dim, orthogonal)).assign(**told))
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

    Vectors have `terms` entries, each good to `spacing`. In units of ‖ĝ_down‖, g_L is at most 1 + ε_gap/ρ, g_down
    1 + ε_tail times that, and the anchor, which g and ĝ contain, 1 + κ. The norm of a difference is off by what its two
    sides are; q, κ and the threshold by what they are made of.
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
    threshold = (whole + tail * (1 + c.threshold.abs() / c.strength)) / (1 + c.leakage) + fine
    forms = (c.threshold - c.gap) * np.where(c.ratio < 1, 1, -1) / (c.strength * (threshold + 2 * gap * fine))
    return pd.DataFrame({
        "bound": (c.bound - c.off) / (off + bound), "alignment": (c.alignment - 1 + c.ratio) / (aligned + ratio),
        "descent": (c.alignment / aligned).where(certain & (c.ratio < 1)), "forms": forms.where(certain),
    })


def violations(cases: pd.DataFrame) -> int:
    """Cases that contradict the theorem beyond rounding, in one way at least."""
    return int((spare(cases) < -1).any(axis=1).sum())


def _kept(cases: pd.DataFrame) -> Decision:
    """No case contradicts the theorem."""
    found = spare(cases[np.isfinite(cases.ratio)])
    return all_of(
        least(f"the theorem's {way}", found[way].dropna(), attained=way in ("bound", "alignment"))
        for way in found if found[way].notna().any()
    )


def judge_theorem(cases: pd.DataFrame, stuck: pd.DataFrame, measured: pd.DataFrame) -> dict:
    """Holds if nothing contradicts it: random cases, the adversary's closest, and the model's own edits."""
    count = violations(cases) + violations(stuck) + violations(measured)
    certified = int((cases.ratio < 1).sum() + (measured.ratio < 1).sum())
    told = f"{count} violations in {certified} certified cases; the adversary's closest case without descent has "
    return all_of(_kept(found) for found in (cases, stuck, measured) if len(found)).verdict(
        f"{told}q/κ = {stuck.found.iloc[0]:.3f}"
    )
