"""MetaKE v1 Theorem 3 and Lemmas 3–5: when the last layer's gate stands for all layers.

Lemma 3    A ⪰ μI, ‖E‖ < μ:  ‖(A+E)⁻¹‖ ≤ 1/(μ−‖E‖),  ‖(A+E)⁻¹ − A⁻¹‖ ≤ ‖E‖ / (μ(μ−‖E‖))
Lemma 4    ‖M_l − M_L‖ ≤ ε_k/λ + ‖k_L‖ Δ/(λ(λ−Δ)) ≤ c (ε_k + ε_C),  Δ = ε_C + (‖k_l‖+‖k_L‖) ε_k < λ
Lemma 5    ∇_R ℓ(W + R M) = G Mᵀ,  ‖G Mᵀ‖_F ≤ ‖G‖_F ‖M‖
Theorem 3  ‖g − ĝ‖ ≤ q ‖ĝ‖,  q = ε_tail (1 + ε_gap) + ε_gap;   q < 1  ⟹  ⟨g, ĝ⟩ ≥ (1 − q) ‖ĝ‖² > 0
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from metake.algebra.geometry import InverseCovariance, KeyStatistics, Metric
from metake.algebra.solve import gate
from metake.editing.bilevel import Refinement
from metake.experiments.theory.adversary import ascend
from metake.experiments.theory.real_layer import RealLayer

BOUNDS = ("paper", "no condition", "mean value")


def _metric(covariance: Tensor, ridge: float) -> Metric:
    """(C + λI)⁻¹, the first version's metric."""
    return InverseCovariance(
        KeyStatistics(covariance * 100 * len(covariance), 100 * len(covariance)), weight=1.0, ridge=ridge
    )


def lemma3(
    metric_of: Callable[[Tensor, float], Metric], covariance: Tensor, mu: float, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Left over right sides of Lemma 3, () each, for A = C + μI and E = change."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    inverse, size = metric_of(covariance, mu).apply(eye), matrix_norm(change, 2)
    moved = torch.linalg.inv(covariance + mu * eye + change)
    return matrix_norm(moved, 2) * (mu - size), matrix_norm(moved - inverse, 2) * mu * (mu - size) / size


def gate_bounds(keys_apart: Tensor, apart: Tensor, keys: Tensor, last: Tensor, ridge: float) -> dict[str, Tensor]:
    """Bounds of ‖M_l − M_L‖ from ε_k, ε_C, ‖K_l‖, ‖K_L‖ and λ, () each, and Δ.

    "paper":  ε_k/λ + ‖K_L‖ Δ/(λ(λ−Δ)), infinite where Δ ≥ λ        (Lemma 3 with μ = λ)
    "no condition": ε_k/λ + ‖K_L‖ Δ/λ²                               (the resolvent identity alone:
    both inverses are ≤ 1/λ)
    "mean value":   (5/4) ε_k/λ + ε_C/(2 λ^{3/2}); for one key with 1 in place of 5/4        (ours:
    the derivative of M along a segment)
    """
    delta = apart + (keys + last) * keys_apart
    paper = torch.where(delta < ridge, keys_apart / ridge + last * delta / (ridge * (ridge - delta)), torch.inf)
    return {
        "delta": delta, "paper": paper, "no condition": keys_apart / ridge + last * delta / ridge**2,
        "mean value": 1.25 * keys_apart / ridge + apart / (2 * ridge**1.5)
    }


def drift(
    keys: Tensor, last: Tensor, metric: Metric, last_metric: Metric, apart: Tensor, ridge: float
) -> dict[str, Tensor]:
    """Lemma 4 for the keys, (n, d), and metrics of two layers whose covariances are `apart` = ε_C: ε_k,
    ‖M_l − M_L‖ by the editor's gates, the bounds.
    """
    here, there, keys_apart = gate(keys, metric), gate(last, last_metric), matrix_norm(keys - last, 2)
    found = {
        "keys apart": keys_apart, "covariances apart": apart, "gates apart": matrix_norm(here - there, 2),
        "gates": matrix_norm(here, 2) + matrix_norm(there, 2)
    }
    found |= gate_bounds(keys_apart, apart, matrix_norm(keys, 2), matrix_norm(last, 2), ridge)
    if len(keys) == 1:
        found["mean value"] = found["mean value"] - 0.25 * keys_apart / ridge
    return found


def _pair(one: tuple[Tensor, Tensor], last: tuple[Tensor, Tensor], ridge: float) -> dict[str, Tensor]:
    """`drift` of two layers given as keys and covariance."""
    return drift(
        one[0], last[0], _metric(one[1], ridge), _metric(last[1], ridge), matrix_norm(one[1] - last[1], 2), ridge
    )


def _draw(generator: torch.Generator, dim: int, n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], float]:
    """Two layers that differ by a little or by a lot, and λ: rank, conditioning, sizes and drift over six decades."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    share = torch.rand(5, dtype=torch.float64, generator=generator)
    rank = 1 + int(share[0] * dim)
    basis = torch.linalg.qr(normal(dim, dim))[0][:, :rank] * 10 ** (
        -3 * share[1] * torch.linspace(0, 1, rank, dtype=torch.float64)
    )
    keys, apart, ridge = (
        10 ** (2 * share[2] - 1) * normal(n, dim), 10 ** (6 * share[3] - 5), (10 ** (4 * share[4] - 2)).item()
    )
    covariance, noise = basis @ basis.T, normal(dim, dim)
    other = covariance + apart * noise @ noise.T / dim
    return (keys, covariance), (keys + apart * normal(n, dim), other), ridge


def lemmas_check(trials: int = 200, seed: int = 0, dims: tuple[int, ...] = (2, 6, 20)) -> pd.DataFrame:
    """Random instances: one row each with dim, n, whether Δ < λ, and left over right side of each inequality
    (holds: ≤ 1).

    "lemma 4: paper" is 0 where Δ ≥ λ: there it says nothing. "identity" is the relative error of Lemma 5's ∇_R ℓ = G
    Mᵀ by autograd.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        dim, n = dims[trial % len(dims)], 1 + trial // len(dims) % 3
        one, last, ridge = _draw(generator, dim, n)
        change = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
        change = change + change.T if trial % 2 else change
        change = (
            change
            / matrix_norm(change, 2)
            * ridge
            * (0.001 + 0.998 * torch.rand((), dtype=torch.float64, generator=generator))
        )
        inverse, moved = lemma3(_metric, one[1], ridge, change)
        found = _pair(one, last, ridge)
        row = {
            "dim": dim, "n": n, "ridge": ridge, "covered": bool(found["delta"] < ridge),
            "lemma 3: inverse": inverse.item(), "lemma 3: difference": moved.item()
        }
        row |= {f"lemma 4: {name}": (found["gates apart"] / found[name]).item() for name in BOUNDS}
        row |= {
            "gates apart": found["gates apart"].item(), "paper": found["paper"].item(),
            "mean value": found["mean value"].item()
        }
        rows.append(row | _lemma5(last, ridge, generator))
    return pd.DataFrame(rows)


def _lemma5(layer: tuple[Tensor, Tensor], ridge: float, generator: torch.Generator) -> dict[str, float]:
    """∇_R of a loss of W + R M by autograd against G Mᵀ, and the norm bound."""
    keys, covariance = layer
    weight, inputs, labels = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((4, keys.shape[1]), (keys.shape[1], 7), (4, 7))
    )
    through = gate(keys, _metric(covariance, ridge))
    residuals = torch.randn(4, len(keys), dtype=torch.float64, generator=generator).requires_grad_()
    edited = weight + residuals @ through
    loss = (torch.tanh(edited @ inputs) * labels).sum()
    direct, signal = torch.autograd.grad(loss, [residuals, edited])
    norm = matrix_norm(signal) * matrix_norm(through, 2)
    return {
        "identity": ((direct - signal @ through.T).norm() / direct.norm()).item(),
        "lemma 5": (direct.norm() / norm).item(),
    }


# Theorem 3


def channels(
    generator: torch.Generator, knobs: Tensor, width: int = 4, dim: int = 7, layers: int = 3
) -> dict[str, Tensor]:
    """A small edited network with exact gradients: r_l = A_l v, Δ_l = r_l M_l, and a loss of all edited weights at
    once.

    knobs: (3,) in [0, 1]: size of the allocations of the other layers, distance of A_L from I,
    weight of the other layers in the loss.
    Returns g, g_L, Σ_{l<L} g_l, ĝ with the G of the whole edit, ĝ with the G of the look-ahead (last layer alone,
    r = v), J_L, and F before and after a small step along −ĝ.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    keys, gates = 3 * normal(dim), []
    for _ in range(layers):
        covariance = normal(dim, dim)
        gates.append(gate((keys + 0.3 * normal(dim))[None], _metric(covariance @ covariance.T / dim, 1.0))[0])
    spread = 10 ** (4 * knobs - 3)
    allocations = [spread[0] * normal(width, width) for _ in gates[:-1]] + [
        torch.eye(width, dtype=torch.float64) + spread[1] * normal(width, width)
    ]
    weights, inputs, readout = (
        [normal(width, dim) for _ in gates],
        [normal(dim, 6) * (spread[2] if i < layers - 1 else 1.0) for i in range(layers)], normal(5, width)
    )
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    def loss(deltas: list[Tensor]) -> Tensor:
        hidden = torch.tanh(sum((w + delta) @ x for w, delta, x in zip(weights, deltas, inputs, strict=True)))
        return torch.nn.functional.cross_entropy((readout @ hidden).T, labels)

    def edit(value: Tensor) -> list[Tensor]:
        return [torch.outer(a @ value, m) for a, m in zip(allocations, gates, strict=True)]

    value = normal(width).requires_grad_()
    deltas = edit(value)
    signals = torch.autograd.grad(loss(deltas), deltas)
    shares = [a.T @ (signal @ m) for a, signal, m in zip(allocations, signals, gates, strict=True)]
    alone = torch.outer(value.detach(), gates[-1]).requires_grad_()
    (ahead,) = torch.autograd.grad(loss([torch.zeros_like(alone)] * (layers - 1) + [alone]), alone)
    (exact,) = torch.autograd.grad(loss(edit(value)), value)
    proxy = signals[-1] @ gates[-1]
    with torch.no_grad():
        before, after = (loss(edit(value - size * proxy)) for size in (0.0, 1e-4 / proxy.norm()))
    return {
        "g": exact, "last": shares[-1], "tail": sum(shares[:-1]), "proxy": proxy, "ahead": ahead @ gates[-1],
        "jacobian": allocations[-1], "before": before, "after": after
    }


def theorem_check(trials: int = 200, seed: int = 0) -> pd.DataFrame:
    """Random edited networks: ε_tail, ε_gap, q, ‖g − ĝ‖/‖ĝ‖, ⟨g, ĝ⟩/‖ĝ‖², whether a small step along −ĝ lowers F,
    and how g is put together.

    "assembly": ‖g − Σ_l g_l‖/‖g‖ (eq. 51); "look-ahead error": ‖g − ĝ‖/‖ĝ‖ with ĝ's G from the last layer's edit
    alone, as Algorithm 1 has it.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(trials):
        found = channels(generator, torch.rand(3, dtype=torch.float64, generator=generator))
        g, proxy, ahead = found["g"], found["proxy"], found["ahead"]
        tail = (found["tail"].norm() / found["last"].norm()).item()
        gap = matrix_norm(found["jacobian"] - torch.eye(len(proxy)), 2).item()
        row = {
            "tail": tail, "gap": gap, "q": tail * (1 + gap) + gap, "error": ((g - proxy).norm() / proxy.norm()).item()
        }
        row |= {"inner": (g @ proxy / proxy.square().sum()).item(), "lower": bool(found["after"] < found["before"])}
        rows.append(
            row
            | {
                "assembly": ((g - found["last"] - found["tail"]).norm() / g.norm()).item(),
                "look-ahead error": ((g - ahead).norm() / ahead.norm()).item(),
            }
        )
    return pd.DataFrame(rows)


def _vectors(points: Tensor, width: int) -> tuple[Tensor, ...]:
    """Any proxy, any J_L and any tail, one instance a row: ĝ, g, ε_tail and ε_gap."""
    proxy, off, tail = points[:, :width], points[:, width : width + width**2].view(-1, width, width), points[:, -width:]
    last = proxy + torch.einsum("bij,bi->bj", off, proxy)
    return proxy, last + tail, tail.norm(dim=1) / last.norm(dim=1), matrix_norm(off, 2)


def dominance_search(seed: int = 0, restarts: int = 4, steps: int = 120, width: int = 3) -> pd.DataFrame:
    """An optimizer that tries to break each inequality and reading. One row each: the largest left over right side
    that it found; above 1: refuted.

    Lemma 3 and 4 through the editor's own metrics and gates (d = 3, λ = μ = 1). "q < 1 is enough": the largest 1 − ⟨g,
    ĝ⟩/‖ĝ‖² over q.
    """
    generator = torch.Generator().manual_seed(seed)

    def each(points: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([of(point) for point in points])

    def inverse(point: Tensor, which: int) -> Tensor:
        half, change = point[: width**2].view(width, width), point[width**2 : 2 * width**2].view(width, width)
        return lemma3(_metric, half @ half.T, 1.0, change / matrix_norm(change, 2) * torch.sigmoid(point[-1]))[which]

    def apart(point: Tensor, name: str) -> Tensor:
        halves, keys = (
            point[: 2 * width**2].view(2, width, width),
            point[2 * width**2 : 2 * width**2 + 2 * width].view(2, 1, width),
        )
        first = (keys[0], halves[0] @ halves[0].T)
        second = (
            keys[0] + torch.exp(point[-2] - 3) * keys[1], first[1] + torch.exp(point[-1] - 3) * halves[1] @ halves[1].T
        )
        found = _pair(first, second, 1.0)
        ratio = found["gates apart"] / found[name]
        return torch.where(found["delta"] < 1, ratio, -found["delta"]) if name == "paper" else ratio

    scores = {
        f"lemma 3: {name}": lambda p, i=i: each(p, lambda x: inverse(x, i))
        for i, name in enumerate(("inverse", "difference"))
    }
    scores |= {f"lemma 4: {name}": lambda p, name=name: each(p, lambda x: apart(x, name)) for name in BOUNDS}

    def theorem(points: Tensor, bound: Callable[[Tensor, Tensor], Tensor], inner: bool = False) -> Tensor:
        proxy, whole, tail, gap = _vectors(points, width)
        off = (
            1 - (whole * proxy).sum(1) / proxy.square().sum(1)
            if inner
            else (whole - proxy).norm(dim=1) / proxy.norm(dim=1)
        )
        return off / bound(tail, gap)

    scores["theorem: ‖g − ĝ‖ ≤ (ε_tail(1+ε_gap) + ε_gap)‖ĝ‖"] = lambda p: theorem(p, lambda t, g: t * (1 + g) + g)
    scores["theorem without the product: (ε_tail + ε_gap)‖ĝ‖"] = lambda p: theorem(p, lambda t, g: t + g)
    scores["descent: ⟨g, ĝ⟩ ≥ (1 − q)‖ĝ‖²"] = lambda p: theorem(p, lambda t, g: t * (1 + g) + g, inner=True)
    sizes = {
        name: 2 * width**2 + 2 * width + 2 if name.startswith("lemma") else 2 * width + width**2 for name in scores
    }
    starts = {
        name: torch.randn(restarts, size, dtype=torch.float64, generator=generator) for name, size in sizes.items()
    }
    return pd.DataFrame(
        [
            {
                "statement": name, "claimed": "without the product" not in name,
                "largest": ascend(score, starts[name], steps).score
            }
            for name, score in scores.items()
        ]
    )


# Where the assumptions are dropped


def edges(instances: pd.DataFrame) -> pd.DataFrame:
    """Assumptions dropped one by one: what is then found, and what would be found if the statement still held.
    instances: of `theorem_check`.
    """
    covariance, unit = (
        torch.zeros(3, 3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    )
    lost = torch.linalg.eigvalsh(torch.eye(3, dtype=torch.float64) - unit).min().item()
    rows = [("‖E‖ < μ", "A = μI, E = −μ e₁e₁ᵀ: smallest eigenvalue of A + E, which is to be inverted", lost, "above 0")]
    beyond = lemma3(_metric, covariance, 1.0, -1.5 * unit)[0].item()
    rows.append(
        ("‖E‖ < μ", "E = −1.5 μ e₁e₁ᵀ: left over right side of Lemma 3, whose right side is negative", beyond, "0 to 1")
    )
    ahead = (instances["look-ahead error"] / instances.q).max()
    rows.append(
        (
            "ĝ and g share one G", "G of the look-ahead in ĝ, as Algorithm 1 computes it: largest ‖g − ĝ‖ over q‖ĝ‖",
            ahead, "at most 1"
        )
    )
    loose = instances[instances.q >= 1]
    rows.append(
        ("q < 1", "share of the instances with q ≥ 1 whose F does not fall along −ĝ", 1 - loose.lower.mean(), "0")
    )
    return pd.DataFrame(rows, columns=["assumption", "without it", "found", "if it still held"])


# On a real model


def drift_on_model(layer: RealLayer) -> pd.DataFrame:
    """Lemma 4's quantities between each edited layer and the last, per request, under the first version's metric
    (λC + ρI)⁻¹; its λ is our ρ.

    "any basis": the least Δ if the hidden units of a layer could be renamed, or rotated, at will:
    from |‖k_l‖ − ‖k_L‖| and the sorted spectra.
    """
    metrics, last, ridge, rows = layer.state.metrics, layer.layer, layer.editor.metric.ridge, []
    operators = {
        i: torch.linalg.inv(metric.apply(torch.eye(metric.dim, dtype=torch.float64))) for i, metric in metrics.items()
    }
    spectra = {i: torch.linalg.eigvalsh((a + a.T) / 2) for i, a in operators.items()}
    keys = layer.layer_keys()
    for i in layer.editor.layers[:-1]:
        apart = (
            torch.linalg.eigvalsh((operators[i] - operators[last] + (operators[i] - operators[last]).T) / 2).abs().max()
        )
        least = (spectra[i] - spectra[last]).abs().max()
        for r, request in enumerate(layer.requests):
            one, other = keys[i][r : r + 1], keys[last][r : r + 1]
            found = {
                name: value.item() for name, value in drift(one, other, metrics[i], metrics[last], apart, ridge).items()
            }
            sizes = one.norm(), other.norm()
            rows.append(
                {"id": request.id, "layer": i, "ridge": ridge}
                | found
                | {"any basis": (least + (sizes[0] + sizes[1]) * (sizes[0] - sizes[1]).abs()).item()}
            )
    drifts = pd.DataFrame(rows)
    drifts.attrs["model"] = layer.lm.name
    return drifts


def theorem_on_model(layer: RealLayer) -> pd.DataFrame:
    """Theorem 3's quantities at v_init for each request alone, exactly, with two proxies; g through the whole edit,
    J_L by differentiating r_L.

    "one G": ĝ = ∂ℓ/∂R_L after the whole edit and g_L = J_Lᵀ ĝ, as the proof has them; what moves M_L then counts to
    the tail.
    "Algorithm 1": ĝ with G where only the last layer is edited and with the live model's gate,
    and all that comes through Δ_L as g_L.
    mismatch: ‖g_L − ĝ‖/‖ĝ‖, which the proof bounds by ε_gap = ‖J_L − I‖; q, error ‖g − ĝ‖/‖ĝ‖ and cosine as in
    `theorem_check`.
    """
    rows = []
    for index, request in enumerate(layer.requests):
        whole, value = layer.downstream(Refinement(prompts="plain"), index)
        found = whole.gradients(value)
        leaf = value.clone().requires_grad_()
        written, states = whole.write(leaf)
        residual, (_, slopes) = written[-1][0], whole._slopes(states)
        shared = torch.autograd.grad([t for t in states if t is not None], residual, slopes, retain_graph=True)[
            0
        ].flatten()
        jacobian = torch.stack([torch.autograd.grad(x, leaf, retain_graph=True)[0][0] for x in residual[0]])
        gap = matrix_norm(jacobian - torch.eye(len(jacobian), dtype=jacobian.dtype), 2).item()
        for name, last, proxy in (
            ("one G", jacobian.T @ shared, shared), ("Algorithm 1", found.last.flatten(), found.proxy_down.flatten())
        ):
            g = found.down.flatten()
            tail = ((g - last).norm() / last.norm()).item()
            row = {
                "id": request.id, "proxy": name, "tail": tail, "gap": gap,
                "mismatch": ((last - proxy).norm() / proxy.norm()).item(), "q": tail * (1 + gap) + gap
            }
            rows.append(
                row
                | {
                    "error": ((g - proxy).norm() / proxy.norm()).item(),
                    "cosine": (g @ proxy / (g.norm() * proxy.norm())).item(),
                }
            )
    return pd.DataFrame(rows)


def judge(
    lemmas: pd.DataFrame, instances: pd.DataFrame, search: pd.DataFrame, drifts: pd.DataFrame, real: pd.DataFrame,
    tolerance: float = 1e-9
) -> dict:
    """Holds if no inequality is violated at random or by the search and every certified instance descends;
    says where the hypotheses hold on the model.
    """
    ratios = lemmas.filter(regex="lemma 3|paper|no condition|lemma 5").drop(columns="paper").max().max()
    ratios = max(
        ratios, (instances.error / instances.q).max(), ((1 - instances.inner) / instances.q).max(),
        search[search.claimed].largest.max()
    )
    certified, shared, computed = (
        instances[instances.q < 1], real[real.proxy == "one G"], real[real.proxy == "Algorithm 1"]
    )
    exact = lemmas.identity.max() < tolerance and instances.assembly.max() < tolerance
    holds = bool(
        (shared.error <= shared.q + tolerance).all() and exact and ratios <= 1 + tolerance and certified.lower.all()
    )
    met = (
        f"Δ < λ at {(drifts.delta < drifts.ridge).sum()} of {len(drifts)} pairs of layers, q < 1 for "
        f"{(shared.q < 1).sum()} of {len(shared)} "
        "requests"
    )
    met = (
        f"on {drifts.attrs['model']} {met}, and the proxy as Algorithm 1 computes it is off by more than q "
        "for "
        f"{(computed.error > computed.q).sum()}"
    )
    told = (
        f"largest left over right side {ratios:.4f} in {len(lemmas) + len(instances)} random instances and the search"
    )
    told = f"{told}; {len(certified)} certified instances, {certified.lower.sum()} descend"
    return {"holds": holds, "decided_by": f"{told}; {met}"}
