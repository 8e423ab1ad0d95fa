"""MetaKE v1 Theorem 3: when the last layer's gate stands for all layers. Its Lemmas 3–5 are `gate_lemmas`.

Theorem 3  ‖g − ĝ‖ ≤ q ‖ĝ‖,  q = ε_tail (1 + ε_gap) + ε_gap;   q < 1  ⟹  ⟨g, ĝ⟩ ≥ (1 − q) ‖ĝ‖² > 0
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from metake.algebra.solve import gate
from metake.editing.outer import Refinement
from metake.experiments.decision import all_of
from metake.experiments.theory.comparisons import LONG, least, rounding, same
from metake.experiments.theory.dominance_search import dominance_search
from metake.experiments.theory.gate_lemmas import LEMMAS, _metric, drift, lemma3, lemmas_check
from metake.experiments.theory.real_layer import RealLayer

__all__ = [
    "channels", "dominance_search", "drift_on_model", "edges", "judge", "lemmas_check", "theorem_check",
    "theorem_on_model"
]


def channels(
    generator: torch.Generator, knobs: Tensor, width: int = 4, dim: int = 7, layers: int = 3
) -> dict[str, Tensor]:
    """A small edited network with exact gradients: r_l = A_l v, Δ_l = r_l M_l, one loss of all edited weights.

    knobs: (3,) in [0, 1]: size of the allocations of the other layers, distance of A_L from I,
    weight of the other layers in the loss.
    Returns g, g_L, Σ_{l<L} g_l, ĝ with the G of the whole edit, ĝ with the G of the look-ahead (last layer alone,
    r = v), J_L, F before and after a small step along −ĝ, and what rounding may make of F.
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
    # a loss is off by twice what its logits are; tanh passes on at most what its argument is off by
    bent = sum((w + delta) @ x for w, delta, x in zip(weights, deltas, inputs, strict=True)).abs().max().item()
    fine = rounding(layers * dim + width + 5, 1 + before.item() + 2 * (1 + bent) * readout.abs().sum(1).max().item())
    return {
        "g": exact, "last": shares[-1], "tail": sum(shares[:-1]), "proxy": proxy, "ahead": ahead @ gates[-1],
        "jacobian": allocations[-1], "before": before, "after": after,
        "rounding": fine
    }


def theorem_check(trials: int = 200, seed: int = 0) -> pd.DataFrame:
    """Random edited networks: ε_tail, ε_gap, q, ‖g − ĝ‖/‖ĝ‖, ⟨g, ĝ⟩/‖ĝ‖², and how g is put together.

    "fall": of F along −ĝ by a small step, in units of rounding, and "lower": whether it falls; "assembly":
    ‖g − Σ_l g_l‖/‖g‖ (eq. 51); "look-ahead error": ‖g − ĝ‖/‖ĝ‖ with ĝ's G from the last layer's edit alone, as
    Algorithm 1 has it; "rounding" of the first three, relative to ‖ĝ‖, and "assembly rounding".
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(trials):
        found = channels(generator, torch.rand(3, dtype=torch.float64, generator=generator))
        g, proxy, ahead, last = found["g"], found["proxy"], found["ahead"], found["last"]
        tail = (found["tail"].norm() / last.norm()).item()
        gap = matrix_norm(found["jacobian"] - torch.eye(len(proxy)), 2).item()
        error, parts = ((g - proxy).norm() / proxy.norm()).item(), last.norm() + found["tail"].norm()
        fine = rounding(LONG)  # forward and backward through three layers
        rows.append({
            "tail": tail, "gap": gap, "q": tail * (1 + gap) + gap, "error": error,
            "rounding": fine * (2 + error + 3 * (1 + tail) * (1 + gap)),
            "inner": (g @ proxy / proxy.square().sum()).item(),
            "fall": ((found["before"] - found["after"]) / found["rounding"]).item(),
            "assembly": ((g - last - found["tail"]).norm() / g.norm()).item(),
            "assembly rounding": fine * (parts / g.norm()).item(),
            "look-ahead error": ((g - ahead).norm() / ahead.norm()).item(),
        })  # fmt: skip
    return pd.DataFrame(rows).assign(lower=lambda rows: rows.fall > 1)


# Where the assumptions are dropped


def edges(instances: pd.DataFrame) -> pd.DataFrame:
    """Assumptions dropped one by one: what is then found, and what would be found if the statement still held.
    instances: of `theorem_check`.
    """
    unit = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    lost = round(torch.linalg.eigvalsh(torch.eye(3, dtype=torch.float64) - unit).min().item(), 9)
    beyond = lemma3(_metric, torch.zeros_like(unit), 1.0, -1.5 * unit)[0].item()
    ahead = (instances["look-ahead error"] / instances.q).max()
    rises = 1 - instances[instances.q >= 1].lower.mean()
    rows = [
        ("‖E‖ < μ", "A = μI, E = −μ e₁e₁ᵀ: smallest eigenvalue of A + E, which is to be inverted", lost, "above 0"),
        ("‖E‖ < μ", "E = −1.5 μ e₁e₁ᵀ: left over right side of Lemma 3, whose right side is negative", beyond,
         "0 to 1"),
        ("ĝ and g share one G", "G of the look-ahead in ĝ, as Algorithm 1 computes it: largest ‖g − ĝ‖ over q‖ĝ‖",
         ahead, "at most 1"),
        ("q < 1", "share of the instances with q ≥ 1 whose F does not fall along −ĝ", rises, "0"),
    ]  # fmt: skip
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
        moved = operators[i] - operators[last]
        apart = torch.linalg.eigvalsh((moved + moved.T) / 2).abs().max()
        nearest = (spectra[i] - spectra[last]).abs().max()
        for r, request in enumerate(layer.requests):
            one, other = keys[i][r : r + 1], keys[last][r : r + 1]
            found = drift(one, other, metrics[i], metrics[last], apart, ridge)
            sizes = one.norm(), other.norm()
            found["any basis"] = nearest + (sizes[0] + sizes[1]) * (sizes[0] - sizes[1]).abs()
            row = {"id": request.id, "layer": i, "ridge": ridge}
            rows.append(row | {name: value.item() for name, value in found.items()})
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
    mismatch: ‖g_L − ĝ‖/‖ĝ‖, which the proof bounds by ε_gap = ‖J_L − I‖; q, error ‖g − ĝ‖/‖ĝ‖, its rounding and cosine
    as in `theorem_check`.
    """
    rows = []
    for index, request in enumerate(layer.requests):
        whole, value = layer.downstream(Refinement(prompts="plain"), index)
        found = whole.gradients(value)
        leaf = value.clone().requires_grad_()
        written, states = whole.write(leaf)
        residual, (_, tensors, slopes) = written[-1][0], whole.slopes(states)
        shared = torch.autograd.grad(tensors, residual, slopes, retain_graph=True)[0].flatten()
        jacobian = torch.stack([torch.autograd.grad(x, leaf, retain_graph=True)[0][0] for x in residual[0]])
        gap = matrix_norm(jacobian - torch.eye(len(jacobian), dtype=jacobian.dtype), 2).item()
        for name, last, proxy in (
            ("one G", jacobian.T @ shared, shared), ("Algorithm 1", found.last.flatten(), found.proxy_down.flatten())
        ):
            g = found.down.flatten()
            tail = ((g - last).norm() / last.norm()).item()
            error, fine = ((g - proxy).norm() / proxy.norm()).item(), rounding(len(g), whole.lm.depth)
            rows.append({
                "id": request.id, "proxy": name, "tail": tail, "gap": gap,
                "mismatch": ((last - proxy).norm() / proxy.norm()).item(), "q": tail * (1 + gap) + gap, "error": error,
                "rounding": fine * (2 + error + 3 * (1 + tail) * (1 + gap)),
                "cosine": (g @ proxy / (g.norm() * proxy.norm())).item(),
            })  # fmt: skip
    return pd.DataFrame(rows)


def judge(
    lemmas: pd.DataFrame, instances: pd.DataFrame, search: pd.DataFrame, drifts: pd.DataFrame, real: pd.DataFrame
) -> dict:
    """Holds if no inequality is violated at random or by the search and every certified instance descends;
    says where the hypotheses hold on the model.
    """
    certified, claimed, own = instances[instances.q < 1], search[search.claimed], instances
    shared, computed = (real[real.proxy == name] for name in ("one G", "Algorithm 1"))
    ratios = [lemmas[[*LEMMAS]].max().max(), (own.error / own.q).max(), ((1 - own.inner) / own.q).max()]
    found = all_of([
        *(least(name, (1 - lemmas[name]) / lemmas[f"{name} rounding"], attained=True) for name in LEMMAS),
        same("Lemma 5's gradient", lemmas.identity, lemmas["identity rounding"]),
        same("g put together", own.assembly, own["assembly rounding"]),
        least("the proxy's error", (own.q - own.error) / own["rounding"], attained=True),
        least("the proxy's alignment", (own.inner - 1 + own.q) / own["rounding"], attained=True),
        least("limits of the search", claimed.spare, attained=True), least("the fall along −ĝ", certified.fall),
        least("the proxy's error on the model", (shared.q - shared.error) / shared["rounding"], attained=True),
    ])
    told = f"largest left over right side {max(*ratios, claimed.largest.max()):.4f} in {len(lemmas) + len(own)} random "
    told += f"instances and the search; {len(certified)} certified instances, {certified.lower.sum()} descend; on "
    told += f"{drifts.attrs['model']} Δ < λ at {(drifts.delta < drifts.ridge).sum()} of {len(drifts)} pairs of layers, "
    told += f"q < 1 for {(shared.q < 1).sum()} of {len(shared)} requests, and the proxy as Algorithm 1 computes it is "
    told += f"off by more than q for {(computed.error > computed.q).sum()}"
    return found.verdict(told)
