"""The exact hypergradient of MetaKE's outer objective beside its Structural Gradient Proxy, and what Theorem 2 asks of
the two (v3 eq. 84, Appendix A.5).

    g = ∇F through the whole sequential edit (`downstream`),   ĝ = GMᵀ + ∇L_reg through the last layer's frozen gate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metake.data.requests import EditRequest
from metake.editing.downstream import Downstream, moved
from metake.editing.editor import Editor
from metake.editing.outer import Refinement
from metake.editing.state import EditorState
from metake.editing.targets import Targets
from metake.language.model import LanguageModel
from metake.language.tokens import Rows
from metake.support.errors import ParameterError


class Gradients(NamedTuple):
    """At one V, float64: parts of the exact gradient g and of the proxy ĝ, (n, d) each, and what makes the proxy."""

    down: Tensor  #        g_down = Σ_l g_l, all that comes through the edited weights
    last: Tensor  #        g_L, the share of it that comes through Δ_L
    proxy_down: Tensor  #  ĝ_down = G Mᵀ as rows
    pull: Tensor  #        ∇L_reg, in both
    signal: Tensor  #      (d, d_in)  G = ∂(L_edit + L_loc)/∂W̃_L at the virtual look-ahead
    gate: Tensor  #        (n, d_in)  M, frozen on the live model
    losses: Tensor  #      (n, 3)     weighted L_edit, L_loc, L_reg of each request; their sum is F(V)

    @property
    def exact(self) -> Tensor:
        """g = g_down + ∇L_reg."""
        return self.down + self.pull

    @property
    def proxy(self) -> Tensor:
        """ĝ = ĝ_down + ∇L_reg (v3 eq. 9)."""
        return self.proxy_down + self.pull

    def through(self, gate: Tensor) -> Tensor:
        """The proxy with another gate, (n, d_in), in M's place, the task signal as it is: G M′ᵀ + ∇L_reg, (n, d)."""
        return gate @ self.signal.T + self.pull

    def fidelity(self) -> Fidelity:
        """What Theorem 2 asks, of all requests together."""
        whole = [t.flatten() for t in (self.down, self.last, self.proxy_down, self.pull)]
        return fidelity(*whole, self.signal.norm(), torch.linalg.matrix_norm(self.gate, 2))


class Fidelity(NamedTuple):
    """The quantities of v3 Theorem 2, each of the batch's shape; NaN where a denominator is zero."""

    leakage: Tensor  #     ε_tail = ‖g_down − g_L‖ / ‖g_L‖               condition 1: what the other layers contribute
    gap: Tensor  #         ε_gap = ‖g_L − ĝ_down‖ / (‖G‖_F ‖M‖₂)         condition 2: what it misses of the last layer
    strength: Tensor  #    ρ = ‖GMᵀ‖ / (‖G‖_F ‖M‖₂)                      condition 3: what the gate lets through
    compatibility: Tensor  # κ = ‖ĝ‖ / ‖ĝ_down‖
    bound: Tensor  #       q = ε_tail + (1 + ε_tail) ε_gap / ρ;  ‖g − ĝ‖ ≤ q ‖ĝ_down‖
    cosine: Tensor  #      of g and ĝ
    down_cosine: Tensor  # of g_down and ĝ_down, without the anchor that both share

    @property
    def ratio(self) -> Tensor:
        """q / κ. Below 1 the theorem certifies ⟨g, ĝ⟩ ≥ (1 − q/κ) ‖ĝ‖² > 0: a step against ĝ lowers F."""
        return self.bound / self.compatibility

    @property
    def threshold(self) -> Tensor:
        """ρ (κ − ε_tail) / (1 + ε_tail): the condition in its other form is ε_gap < threshold."""
        return self.strength * (self.compatibility - self.leakage) / (1 + self.leakage)


def fidelity(
    down: Tensor, last: Tensor, proxy_down: Tensor, pull: Tensor, signal_norm: Tensor, gate_norm: Tensor
) -> Fidelity:
    """Conditions 1–3, κ and q of v3 Theorem 2 from the gradients' parts.

    down, last, proxy_down, pull: (…, d) as in `Gradients`; signal_norm: ‖G‖_F, gate_norm: ‖M‖₂, (…).
    """
    size = signal_norm * gate_norm
    tail = _share((down - last).norm(dim=-1), last.norm(dim=-1))
    gap, strength = _share((last - proxy_down).norm(dim=-1), size), _share(proxy_down.norm(dim=-1), size)
    compatibility = _share((proxy_down + pull).norm(dim=-1), proxy_down.norm(dim=-1))
    return Fidelity(
        tail, gap, strength, compatibility, tail + (1 + tail) * _share(gap, strength),
        cosine(down + pull, proxy_down + pull), cosine(down, proxy_down)
    )


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """⟨a, b⟩ / (‖a‖ ‖b‖) over the last dimension; NaN where either is zero."""
    return _share((one * other).sum(-1), one.norm(dim=-1) * other.norm(dim=-1))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, torch.nan)


class Hypergradient(Downstream):
    """F through the whole edit of an editor, with the gradients that the theorems compare.

    requests: edited together, usually one; state: of the editor before them; initial: Stage I's targets, to which L_reg
    pulls. What the losses are is the editor's `refine`, or MetaKE's default.
    Raises ParameterError for an editor that cannot be looked through whole, or that solves these requests apart.
    Cost: as `Downstream`; `gradients` also keeps the edited blocks' outputs, goes through them twice, and looks ahead
    at the last layer.
    """

    @LanguageModel.entry(gradients=True)
    def __init__(
        self, lm: LanguageModel, requests: Sequence[EditRequest], editor: Editor, state: EditorState, initial: Targets
    ):
        if len(editor.reading.groups(len(requests))) > 1:
            raise ParameterError(
                f"this editor solves these {len(requests)} requests apart, {editor.together} at a time: expected "
                "requests that are solved together, give it so many"
            )
        rule = editor.refine or Refinement()
        rows, own = Rows.of(lm.tokenizer, requests, state.contexts), replace(editor, refine=rule)
        super().__init__(lm, rows, state.contexts, initial, own.stage_two(lm, state), rule)
        self.editor, self.state, self._rows = own, state, rows
        with torch.no_grad():
            self.gate = self.frozen_gate(rule.gate)
            self.live = [
                [found[self.last] for found in part.run.read([self.last], [self.last], self.first - 1, below)]
                for part, below in zip(self.parts, self.below[0], strict=True)
            ]

    def frozen_gate(self, kind: str) -> Tensor:
        """M of layer L on the live model, (n, d_in): "structural", or "key_only" without P and Kₚ."""
        reader = self.editor.reading.reader(self.lm, self._rows, self.last)
        rule = replace(self.rule, gate=kind)
        return replace(self.editor, refine=rule)._frozen_gate(reader, self.state, self.last)

    @LanguageModel.entry()
    def after(self, value: Tensor) -> Tensor:
        """Weighted L_edit, L_loc and L_reg of each request after the edit towards V, (n, 3). Their sum is F(V)."""
        return self.losses(value) * self.weights

    @LanguageModel.entry(gradients=True)
    def gradients(self, value: Tensor) -> Gradients:
        """g through the whole edit and ĝ through the frozen gate, with their parts, at V, (n, d).

        g_L is what comes through (R_L, M_L) as they stand in the last update; they themselves depend on V in every way.
        Raises NumericalError if V, or a loss, is not finite.
        """
        value = value.detach().double().clone().requires_grad_()
        written, states = self.write(value)
        losses, tensors, slopes = self.slopes(states)
        self.lm.check_finite(losses, lambda i: self._rows.taught[i * self.contexts].ids)
        (down,) = torch.autograd.grad(tensors, value, slopes, retain_graph=True)
        factors = [t for t in written[-1] if t.requires_grad]  # with one edited layer, M does not depend on V
        (last,) = torch.autograd.grad(factors, value, torch.autograd.grad(tensors, factors, slopes, retain_graph=True))
        anchored = value.detach().clone().requires_grad_()
        pull = self.rule.anchor_weight * self.pull(anchored)
        pull.sum().backward()
        signal = self._signal(value.detach())
        every = torch.cat([losses * self.weights[:2], pull.detach()[:, None]], 1)
        return Gradients(down, last, self.gate @ signal.T, anchored.grad, signal, self.gate, every)

    def _signal(self, value: Tensor) -> Tensor:
        """G at the virtual look-ahead W̃_L = W_L + (V − H) M, (d, d_in) float64: Σ_j δ_j u_jᵀ over all positions."""
        inputs, states = zip(*self.live, strict=True)
        _, _, slopes = self.slopes(moved(states, inputs, value - self.anchor, self.gate))
        scored = (own for part, own in zip(self.parts, inputs, strict=True) if part.bucket)
        places = [u for own in scored for u in own if u is not None]
        return sum(d.double().flatten(0, 1).T @ u.double().flatten(0, 1) for d, u in zip(slopes, places, strict=True))
