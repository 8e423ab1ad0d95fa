"""Random instances of a closed-form solve, made twice: from a method's parts, and by its published d×d form.

The published forms stand among the tests of a checkout, tests/reference.py; `literal.load_reference` reads them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import cond

from metake.algebra.geometry import (
    Isotropic,
    KeyStatistics,
    Metric,
    NullSpace,
    condition,
    inverse_covariance,
    null_space,
)
from metake.algebra.postprocess import PostProcess, cap_spectrum, keep_largest, soften_principal
from metake.algebra.solve import gate
from metake.algebra.update import LayerUpdate
from metake.editing.editor import Editor
from metake.support.errors import ParameterError

THRESHOLD = 1e-9  # of the random second moments: a direction of theirs has a variance of at least 1e-8, or none


class Case(NamedTuple):
    """A random instance of one layer; columns as in the papers, float64."""

    keys: Tensor  #      (d, n)       K
    at: Tensor  #        (d, n)       the plain prompts' keys, where ROME wants its residual
    residuals: Tensor  # (d_out, n)   R
    past: Tensor  #      (d, N)       Kₚ
    basis: Tensor  #     (d, d)       eigenvectors of the preserved keys' second moment C
    scales: Tensor  #    (d,)         log₁₀ of its eigenvalues
    rank: int  #                      of the second moment that leaves a null space
    strength: Tensor  #  ()           log₁₀ of the metric's weight or ridge
    weight: Tensor  #    (d_out, d)   the weight that is edited

    def statistics(self, rank: int | None = None) -> KeyStatistics:
        """Of `rank` directions, by default all."""
        values = 10**self.scales * (torch.arange(len(self.keys)) < (rank or len(self.keys)))
        moment = (self.basis * values) @ self.basis.T
        return KeyStatistics((moment + moment.T) * 50 * len(self.keys), 100 * len(self.keys))

    def metric(self, editor: Editor) -> Metric:
        """The editor's rule with this instance's strength and statistics; conditioned if it remembers."""
        rule, strength = editor.metric, 10 ** self.strength.item()
        if isinstance(rule, null_space):
            metric = replace(rule, threshold=THRESHOLD, ridge=strength)(self.statistics(self.rank))
        elif isinstance(rule, inverse_covariance):
            given = {"weight": strength} if editor.noise else {}
            metric = replace(rule, **given, **({"ridge": strength} if rule.ridge else {}))(self.statistics())
        else:
            metric = rule(self.statistics())
        # who asks bounds what rounding takes
        return condition(metric, self.past.T, lost=math.inf) if editor.remember else metric


def draw(generator: torch.Generator, dim: int, n: int, rows: int = 6) -> Case:
    """An instance: rank, conditioning (to 1e6), strength (1e-2 to 1e3), number of past keys, and scale at random."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    share = torch.rand(5, dtype=torch.float64, generator=generator)
    scales = -6 * share[0] * torch.linspace(0, 1, dim, dtype=torch.float64)
    size = 10 ** (2 * share[4] - 1)
    keys, past = size * normal(dim, n), size * normal(dim, int(share[1] * (dim + 1)))
    basis = torch.linalg.qr(normal(dim, dim))[0]
    return Case(
        keys, keys + 0.3 * size * normal(dim, n), normal(rows, n), past, basis, scales, 1 + int(share[2] * (dim - 1)),
        5 * share[3] - 2, normal(rows, dim)
    )


def ours(editor: Editor, case: Case) -> Tensor:
    """Δ as the library makes it, (d_out, d): gate, outer product, post-processes."""
    structural = gate(case.keys.T, case.metric(editor), editor.noise, case.at.T if editor.plain else None)
    update = LayerUpdate("", case.residuals, structural)
    for rule in editor.post:
        update = rule(update, case.weight)
    return update.delta


def difficulty(editor: Editor, case: Case) -> float:
    """κ: by how much a solve may amplify rounding in this instance.

    The largest condition number of what either form solves with, times what their subtractions cancel:
    A, I + K̃ₚᵀA⁻¹K̃ₚ, A + K̃ₚK̃ₚᵀ, A + K̃ₚK̃ₚᵀ + K̃K̃ᵀ, νI + K̃ᵀ(Q | Kₚ)K̃, and C on its range for a projector from it;
    ‖K‖/‖K̃‖ for K̃ = PK, ‖QK‖/‖(Q | Kₚ)K‖, and for ROME ‖Qk̄‖‖k‖/k̄ᵀQk.            A = λC (+ ρI), or λI
    """
    metric, plain = case.metric(editor), case.metric(replace(editor, remember=False))
    eye, keys, past = (
        torch.eye(len(case.keys), dtype=torch.float64), case.keys, case.past[:, : case.past.shape[1] * editor.remember]
    )
    numbers = []
    if isinstance(plain, NullSpace):
        keys, past, base = plain.project(keys.T).T, plain.project(past.T).T, plain.ridge * eye
        numbers.append(10 ** (case.scales[: case.rank].max() - case.scales[: case.rank].min()))
    else:
        base = torch.linalg.inv(plain.apply(eye))
    inner = metric.apply(keys.T) @ (case.at if editor.plain else keys)
    numbers += [cond(base), cond(base + past @ past.T), cond(base + past @ past.T + keys @ keys.T)]
    numbers += [cond(editor.noise * torch.eye(len(inner)).to(inner) + inner)]
    if past.numel():
        numbers.append(cond(torch.eye(past.shape[1]).to(past) + plain.apply(past.T) @ past))
    cancelled = case.keys.norm() / keys.norm() * plain.apply(keys.T).norm() / metric.apply(keys.T).norm()
    if editor.plain:
        cancelled = cancelled * metric.apply(keys.T).norm() * case.at.norm() / inner.norm()
    return (max(numbers) * cancelled).item()


def published(reference: ModuleType, method: str, editor: Editor, case: Case) -> dict[str, Tensor]:
    """Δ, (d_out, d), by each d×d form that a method, or a named difference, was published with; post-processed."""
    found = _solves(reference, method.partition("/")[0], editor, case)
    for rule in editor.post:
        found = {form: _post(reference, rule, delta, case.weight) for form, delta in found.items()}
    return found


def _solves(reference: ModuleType, method: str, editor: Editor, case: Case) -> dict[str, Tensor]:
    K, R, Kp, strength = case.keys, case.residuals, case.past, 10 ** case.strength.item()
    C = torch.eye(len(K)).to(K) if isinstance(case.metric(editor), Isotropic) else case.statistics().covariance
    match method:
        case "rome":
            return {"ROME eq. 2": reference.rome(K[:, 0], R[:, 0], C, case.at[:, 0])}
        case "emmet":
            return {"EMMET eq. 9": reference.emmet(K, R, C, 0.0)}
        case "pmet":
            return {"PMET, released code": reference.pmet(K, R, C, strength)}
        case "memit" | "prune" | "rect":
            return {"MEMIT eq. 14": reference.memit(K, R, C, strength)}
        case "memit_seq":
            return {"MEMIT eq. 14 with past keys": reference.memit(K, R, C, strength, Kp)}
        case "metake_v1":
            return {"MetaKE v1 eq. 7": R @ reference.gate_v1(K, strength * C, strength)}
        case "alphaedit" | "blue" | "sphere" | "metake":
            P = reference.projector(case.statistics(case.rank).covariance, THRESHOLD)
            if method == "metake":
                return {"MetaKE eq. 8, B.3": R @ reference.gate_b3(K, P, strength, Kp)}
            forms = {
                "AlphaEdit, released code": reference.alphaedit_code, "AlphaEdit eq. 14": reference.alphaedit_paper,
                "keys projected first": reference.alphaedit_projected
            }
            return {name: form(K, R, P, strength, Kp) for name, form in forms.items()}
    raise ParameterError(f"no published form of {method!r} is known; add it to tests/reference.py, and name it here")


def _post(reference: ModuleType, rule: PostProcess, delta: Tensor, weight: Tensor) -> Tensor:
    match rule:
        case keep_largest(share=0.4):
            return reference.rect_code(delta, weight)
        case keep_largest(share=0.2, epsilon=0.0):
            return reference.rect_original(delta, weight)
        case cap_spectrum():
            return reference.prune(weight + delta, weight, rule.add_twice) - weight
        case soften_principal():
            return reference.sphere(delta, weight, rule.ratio, rule.strength, rule.side == "output")
    raise ParameterError(f"no published form of {rule!r} is known; add it to tests/reference.py, and name it here")
