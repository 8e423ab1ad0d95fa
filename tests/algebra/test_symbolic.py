"""What is exact is proved: the identities behind Proposition 1 and Theorem 1, symbolically for small sizes,
and the library on them.

A numerical test sees rounding; here both sides are rational functions of free symbols, and their difference is zero.
"""

from __future__ import annotations

import pandas as pd
import pytest
import sympy as sp
import torch

from metake.algebra.geometry import InverseCovariance, KeyStatistics, NullSpace, condition
from metake.algebra.solve import association, feasible_interval, gate, realization
from metake.algebra.solve import attenuation as share
from metake.experiments.theory import attenuation

T = sp.symbols("t", real=True)
LAMBDA, NU, GAMMA, TAU, EPSILON = sp.symbols("lambda nu gamma tau epsilon", positive=True)
DIRECTION = sp.Matrix([1 - T**2, 2 * T]) / (1 + T**2)  # every unit vector of the plane but one
PROJECTOR = DIRECTION * DIRECTION.T


def symmetric(name: str, d: int) -> sp.Matrix:
    return sp.Matrix(d, d, lambda i, j: sp.Symbol(f"{name}{min(i, j)}{max(i, j)}", real=True))


def free(name: str, rows: int, columns: int) -> sp.Matrix:
    return sp.Matrix(rows, columns, lambda i, j: sp.Symbol(f"{name}{i}{j}", real=True))


def inverse(matrix: sp.Matrix) -> sp.Matrix:
    return matrix.adjugate() / matrix.det()


def zero(difference) -> bool:
    """As rational functions in the free symbols, in lowest terms."""
    entries = sp.Matrix([difference])
    field = sp.QQ.frac_field(*sorted(entries.free_symbols | {LAMBDA}, key=str))
    return all(field.from_sympy(entry) == field.zero for entry in entries)


def test_a_wrong_identity_is_not_zero():
    A, k = symmetric("a", 2), free("k", 2, 1)
    assert not zero(inverse(A + k * k.T) - inverse(A))
    assert not zero(GAMMA / (1 + GAMMA) - GAMMA / (1 + GAMMA + LAMBDA))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_sherman_morrison(d: int):
    # in A's own basis
    A, k = symmetric("a", d) if d < 3 else sp.diag(*sp.symbols("a:3", nonzero=True)), free("k", d, 1)
    gamma = (k.T * inverse(A) * k)[0]
    stated = inverse(A) - inverse(A) * k * k.T * inverse(A) / (1 + gamma)
    assert zero(stated * (A + k * k.T) - sp.eye(d))
    assert zero(k.T * stated - k.T * inverse(A) / (1 + gamma))
    if d < 3:
        assert zero(stated - inverse(A + k * k.T))


@pytest.mark.parametrize(("d", "n"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_woodbury(d: int, n: int):
    """Kᵀ(A + KKᵀ)⁻¹ = (I + Γ)⁻¹KᵀA⁻¹, both sides multiplied by what they are divided by."""
    A, K = symmetric("a", d), free("k", d, n)
    Gamma = K.T * inverse(A) * K
    assert zero((sp.eye(n) + Gamma) * K.T - K.T * inverse(A) * (A + K * K.T))
    if d * n <= 4:
        assert zero(K.T * inverse(A + K * K.T) - inverse(sp.eye(n) + Gamma) * K.T * inverse(A))


@pytest.mark.parametrize("n", [1, 2])
def test_the_gate_of_equation_8_under_a_projector(n: int):
    """M = (I+Γ)⁻¹K̃ᵀA⁻¹ = KᵀP(KₚKₚᵀP + KKᵀP + λI)⁻¹, A = K̃ₚK̃ₚᵀ + λI, P any projector of rank one in the plane."""
    K, Kp = free("k", 2, n), free("p", 2, 1)
    assert zero(PROJECTOR**2 - PROJECTOR)
    A = PROJECTOR * Kp * Kp.T * PROJECTOR + LAMBDA * sp.eye(2)
    projected = PROJECTOR * K
    system = Kp * Kp.T * PROJECTOR + K * K.T * PROJECTOR + LAMBDA * sp.eye(2)
    Gamma = (projected.T * inverse(A) * projected).applyfunc(sp.cancel)
    M = (inverse(sp.eye(n) + Gamma) * projected.T * inverse(A)).applyfunc(sp.cancel)
    assert zero(M * system - K.T * PROJECTOR)  # the system is regular: its determinant is not the zero function
    assert not zero(system.det())
    assert zero(M * PROJECTOR - M)  # it reads nothing that is preserved


def test_remembering_past_keys_is_conditioning_the_metric():
    """Q | Kₚ = Q − QKₚ(I + KₚᵀQKₚ)⁻¹KₚᵀQ is P(K̃ₚK̃ₚᵀ + λI)⁻¹P for Q = P/λ, and (A + KₚKₚᵀ)⁻¹ for Q = A⁻¹."""
    for Kp in (free("p", 2, 1), free("p", 2, 2)):
        eye = sp.eye(Kp.shape[1])

        def conditioned(Q: sp.Matrix, Kp=Kp, eye=eye) -> sp.Matrix:
            return Q - Q * Kp * inverse(eye + Kp.T * Q * Kp) * Kp.T * Q

        past = PROJECTOR * Kp
        remembered = conditioned(PROJECTOR / LAMBDA)
        assert zero(remembered * (past * past.T + LAMBDA * sp.eye(2)) - PROJECTOR)  # P commutes with what is inverted
        A = sp.diag(*sp.symbols("a:2", positive=True))
        assert zero(conditioned(inverse(A)) - inverse(A + Kp * Kp.T))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_minimizer_writes_beta_of_the_plan(rows: int):
    """At Δ = r kᵀA⁻¹/(1+γ) the gradient of ‖Δk − r‖² + tr(ΔAΔᵀ) vanishes; Δk = βr and r − Δk = r/(1+γ)."""
    A, k, r = symmetric("a", 2), free("k", 2, 1), free("r", rows, 1)
    gamma = (k.T * inverse(A) * k)[0]
    D = free("d", rows, 2)
    objective = ((D * k - r).T * (D * k - r))[0] + (D * A * D.T).trace()
    gradient = sp.Matrix(rows, 2, lambda i, j: sp.diff(objective, D[i, j]))
    minimizer = r * k.T * inverse(A) / (1 + gamma)
    assert zero(gradient.subs(dict(zip(D, minimizer, strict=True))))
    assert not zero(gradient.subs(dict(zip(D, 2 * minimizer, strict=True))))
    assert zero(minimizer * k - gamma / (1 + gamma) * r)
    assert zero(r - minimizer * k - r / (1 + gamma))


def test_the_batch_form():
    """B = Γ(I+Γ)⁻¹ = (I+Γ)⁻¹Γ = I − (I+Γ)⁻¹ for n = 2, symmetric, with the eigenvalues g/(1+g);
    diagonal Γ is n scalars.
    """
    Gamma, eye = symmetric("g", 2), sp.eye(2)
    B = Gamma * inverse(eye + Gamma)
    for other in (inverse(eye + Gamma) * Gamma, eye - inverse(eye + Gamma), B.T):
        assert zero(B - other)
    z = sp.Symbol("z")
    assert zero((B - z / (1 + z) * eye).det() * (eye + Gamma).det() * (1 + z) ** 2 - (Gamma - z * eye).det())
    g, h = sp.symbols("g h", positive=True)
    assert zero(B.subs({Gamma[0, 0]: g, Gamma[0, 1]: 0, Gamma[1, 1]: h}) - sp.diag(g / (1 + g), h / (1 + h)))
    assert sp.limit(g / (1 + g), g, sp.oo) == 1 and sp.factor(sp.diff(g / (1 + g), g)).is_positive


def test_a_neighbor_takes_its_share():
    """B₁₁ ≤ β₁: what a second request in the batch leaves of the first one's share, with equality where the keys do
    not meet.
    """
    a, b, c = sp.symbols("a b c", positive=True)  # Γ₁₁, Γ₂₂, Γ₁₂
    Gamma = sp.Matrix([[a, c], [c, b]])
    B = Gamma * inverse(sp.eye(2) + Gamma)
    assert zero(a / (1 + a) - B[0, 0] - c**2 / ((1 + a) * ((1 + a) * (1 + b) - c**2)))  # c² ≤ ab: nothing negative


def test_the_interval_is_empty_exactly_where_the_paper_says():
    """ε/(1−β) − τ/β has the sign of β − τ/(τ+ε), and of γ − τ/ε."""
    beta = GAMMA / (1 + GAMMA)
    lower, upper = TAU / beta, EPSILON / (1 - beta)
    assert zero(upper - EPSILON * (1 + GAMMA))
    by_beta = sp.cancel((upper - lower) / (beta - TAU / (TAU + EPSILON)))
    by_gamma = sp.cancel((upper - lower) / (GAMMA - TAU / EPSILON))
    assert by_beta.is_positive and by_gamma.is_positive
    assert zero((upper - lower).subs(GAMMA, TAU / EPSILON)) and zero(
        beta.subs(GAMMA, TAU / EPSILON) - TAU / (TAU + EPSILON)
    )


def test_without_noise_all_is_realized():
    """ν → 0 of (νI + Γ)⁻¹: the gate becomes kᵀQ/(kᵀQk), and B the identity; ν = 1 is the paper's."""
    Q, k = symmetric("q", 2), free("k", 2, 1)
    gamma = (k.T * Q * k)[0]
    M = k.T * Q / (NU + gamma)
    assert zero(M.applyfunc(lambda entry: sp.limit(entry, NU, 0)) - k.T * Q / gamma)
    assert sp.limit(GAMMA / (NU + GAMMA), NU, 0) == 1 and zero((M * k)[0].subs(NU, 1) - gamma / (1 + gamma))
    Gamma = symmetric("g", 2)
    assert zero((inverse(NU * sp.eye(2) + Gamma) * Gamma).subs(NU, 0) - sp.eye(2))


def test_gamma_in_the_plane():
    """γ = ‖k‖² sin²θ / (λ + m‖kₚ‖² sin²φ): θ and φ are the angles of the key and of m equal past keys to the preserved
    line.
    """
    across = sp.Matrix([0, 1])
    x, y, p, q, m = sp.symbols("x y p q m", positive=True)
    Q, k, past = across * across.T / LAMBDA, sp.Matrix([x, y]), sp.Matrix([p, q])
    conditioned = Q - m * Q * past * past.T * Q / (1 + m * (past.T * Q * past)[0])
    gamma = (k.T * conditioned * k)[0]
    assert zero(gamma - y**2 / (LAMBDA + m * q**2))
    # the first version's eq. 35: ‖Pk‖²/(‖Pk‖² + λ)
    assert zero((gamma / (1 + gamma)).subs(m, 0) - y**2 / (y**2 + LAMBDA))


# The library on the same formulas


def numbers(matrix: sp.Matrix) -> torch.Tensor:
    return torch.tensor([[float(entry) for entry in matrix.row(i)] for i in range(matrix.rows)], dtype=torch.float64)


@pytest.mark.parametrize("noise", [1, sp.Rational(1, 3)])
def test_the_library_computes_what_is_proved(noise):
    """Exact rational values of γ, β, M, B and the interval against metake.algebra.solve in two dimensions."""
    K, Kp, weight = sp.Matrix([[1, 3], [2, -1]]), sp.Matrix([2, sp.Rational(1, 2)]), sp.Rational(5, 2)
    C = sp.Matrix([[5, 1], [1, 2]]) / 4
    statistics = KeyStatistics(4 * numbers(C), 4)
    flat = KeyStatistics(4 * numbers(DIRECTION.subs(T, 3) * DIRECTION.subs(T, 3).T), 4)  # the free direction is across
    P = sp.eye(2) - PROJECTOR.subs(T, 3)
    cases = (
        (InverseCovariance(statistics, weight=2.5), inverse(weight * C)),
        (condition(NullSpace(flat, 2.5, 1e-9), numbers(Kp.T)), P * inverse(P * Kp * Kp.T * P + weight * sp.eye(2)) * P),
    )
    for metric, Q in cases:
        Gamma = K.T * Q * K
        M = inverse(noise * sp.eye(2) + Gamma) * K.T * Q
        keys = numbers(K.T)
        torch.testing.assert_close(gate(keys, metric, float(noise)), numbers(M), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            realization(keys, gate(keys, metric, float(noise))), numbers(M * K), rtol=1e-12, atol=1e-14
        )
        gamma = association(keys, metric)
        torch.testing.assert_close(gamma, numbers(sp.Matrix([[Gamma[0, 0], Gamma[1, 1]]]))[0], rtol=1e-12, atol=1e-14)
        lower, upper = feasible_interval(gamma, 0.25, 0.75)
        exact = [Gamma[i, i] for i in range(2)]
        torch.testing.assert_close(
            share(gamma), numbers(sp.Matrix([[g / (1 + g) for g in exact]]))[0], rtol=1e-12, atol=0
        )
        torch.testing.assert_close(lower, numbers(sp.Matrix([[(1 + g) / g / 4 for g in exact]]))[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(upper, numbers(sp.Matrix([[3 * (1 + g) / 4 for g in exact]]))[0], rtol=1e-12, atol=0)


# The numerical search of the attenuation page: it stays at rounding, and would not if the statement were off


def test_the_search_finds_rounding_and_climbs_it():
    found = attenuation.adversarial_search(restarts=16, steps=40, seed=1)
    assert (
        len(found) == 16
        and (found.evaluations == 41).all()
        and set(found.method) == {"memit", "alphaedit"}
        and set(found.n) == {1, 3}
    )
    assert found.departure.max() < 1e-9 and found.times_rounding.max() < 1
    still = attenuation.adversarial_search(restarts=16, steps=0, seed=1)
    climbed = found.times_rounding[found.climbed == "times_rounding"].median()
    assert climbed > 2 * still.times_rounding[still.climbed == "times_rounding"].median(), "it does not climb"
    pd.testing.assert_frame_equal(
        found, attenuation.adversarial_search(restarts=16, steps=40, seed=1), check_exact=True
    )


@pytest.mark.parametrize("wrong", ["ridge", "history", "shape"])
def test_the_search_would_find_a_wrong_statement(monkeypatch: pytest.MonkeyPatch, wrong: str):
    right = attenuation.Instance.predicted
    if wrong == "shape":  # γ instead of γ/(1+γ)
        monkeypatch.setattr(
            attenuation.Instance, "predicted",
            lambda self: (self.metric().apply(self.keys) @ self.keys.T).T @ self.residuals
        )
    else:
        less = {
            "ridge": lambda i: i._replace(ridge=1.0001 * i.ridge), "history": lambda i: i._replace(past=i.past[:0])
        }[wrong]
        monkeypatch.setattr(attenuation.Instance, "predicted", lambda self: right(less(self)))
    found = attenuation.adversarial_search(restarts=8, steps=10)
    records = attenuation.attenuation_check(trials=24)
    assert found.times_rounding.max() > 1e4 and attenuation.judge(records, found)["holds"] is False
    assert attenuation.judge(records.assign(error=0.0, remainder_error=0.0), found)["holds"] is False
    assert "times rounding" in attenuation.judge(records, found)["decided_by"]


def test_edges_of_the_statement():
    found = attenuation.edges().set_index(["method", "case"])
    assert found.follows.groupby("case").nunique().eq(1).all()
    assert (
        found.follows.groupby("case").first().sum() == 2
        and found.loc[[c for c in found.index if "as stated" in c[1]]].follows.all()
    )
    for _, row in found.iterrows():
        interpolates, refined = "noise 0" in row.name[1], "1.4" in row.name[1]
        assert not interpolates or row.share == pytest.approx(1, abs=1e-9)
        assert not refined or row.share == pytest.approx(1.4 * row.beta, rel=1e-9)
