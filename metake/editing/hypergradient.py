"""The exact hypergradient: MetaKE's outer objective differentiated through the whole sequential edit (v3 eq. 84,
Appendix A.5).

    for each edited layer l, on a model that the layers before have changed
        r_l = share · (v − h^L),   M_l = gate(k_l)                       eqs 99–102; both depend on v through k_l and
        h^L
        every position j of block l moves by r_l (M_l u_j)               Δ_l = r_l M_l is never formed
    F(v) = L_edit + L_loc + L_reg on the model so edited                 g = ∇F

Beside it the Structural Gradient Proxy ĝ of `bilevel`, and what Theorem 2 asks of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from metake.data.requests import EditRequest
from metake.editing.bilevel import OuterObjective, Refinement
from metake.editing.editor import Editor, EditorState
from metake.editing.keys import Keys
from metake.editing.objective import Bucket
from metake.editing.targets import Targets
from metake.language.model import LanguageModel
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import Row, Rows, shared_beginnings
from metake.support.errors import NumericalError, ParameterError


class Gradients(NamedTuple):
    """At one V, float64: parts of the exact gradient g and of the proxy ĝ, (n, d) each, and what the proxy is made
    of.
    """

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
        """The proxy with another gate in M's place, the task signal as it is: G M′ᵀ + ∇L_reg, (n, d). gate:
        (n, d_in).
        """
        return gate @ self.signal.T + self.pull

    def fidelity(self) -> Fidelity:
        """What Theorem 2 asks, of all requests together."""
        whole = [t.flatten() for t in (self.down, self.last, self.proxy_down, self.pull)]
        return fidelity(*whole, self.signal.norm(), torch.linalg.matrix_norm(self.gate, 2))


class Fidelity(NamedTuple):
    """The quantities of v3 Theorem 2, each of the batch's shape; NaN where a denominator is zero."""

    leakage: Tensor  #     ε_tail = ‖g_down − g_L‖ / ‖g_L‖               condition 1: what the other layers contribute
    # ε_gap = ‖g_L − ĝ_down‖ / (‖G‖_F ‖M‖₂)  condition 2: what the proxy misses of the last layer
    gap: Tensor
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


class Downstream:
    """The outer objective after the whole edit, F(V), as a differentiable function of the targets.

    F(V) = Σᵢ L_edit,i + L_loc,i + L_reg,i  at  W_l + Δ_l(V) for all edited layers l      (MetaKE v3 eqs 5–7, 84,
    99–102)

    requests: edited together, usually one; state: of the editor before them; initial: Stage I's targets, to which L_reg
    pulls. What the losses are is the editor's `refine`, or MetaKE's default. The model is only read.
    Raises ParameterError for an editor whose update is not R·M of the block's output alone.
    Cost: each evaluation one forward from the first edited block on, over the rewriting rows in all contexts;
    a gradient two such forward-backward passes (exact and proxy, the latter above block L) and a second backward below
    L.
    """

    def __init__(
        self, lm: LanguageModel, requests: Sequence[EditRequest], editor: Editor, state: EditorState, initial: Targets
    ):
        reading = editor.reading
        apart = len(reading.groups(len(requests))) > 1
        if editor.post or editor.own_targets or reading.plain or reading.site != "block" or apart:
            raise ParameterError(
                "the exact hypergradient is of editors that write R·M towards one shared target at a block's output "
                "(memit, alphaedit, metake); this one has a post-process, own targets, a plain key or another site, or "
                "solves these requests apart"
            )
        self.lm, self.editor, self.state, self.initial, self.last = lm, editor, state, initial, editor.layers[-1]
        self.rule, self.count = editor.refine or Refinement(), len(requests)
        batch = Rows.of(lm.tokenizer, requests, state.contexts)
        self.reader = reading.reader(lm, batch, self.last)
        rows = _taught(batch, self.rule.prompts)
        taught, rows = len(rows), rows + batch.locality(self.rule.locality_position)
        cuts = shared_beginnings([r.ids for r in rows], [r.lookup for r in rows])
        self.bucket, self.rows = Bucket.of(rows, cuts, lm.device), Prefixed(lm, [r.ids for r in rows], cuts)
        self.lookup = (
            torch.arange(taught, device=lm.device),
            torch.tensor([r.lookup - c for r, c in zip(rows[:taught], cuts, strict=False)], device=lm.device),
        )
        plain = batch.prompts()[:: len(batch.contexts)]
        self.plain = Prefixed(lm, plain, [0] * len(plain))
        self.ends = (
            torch.arange(len(plain), device=lm.device), torch.tensor([len(ids) - 1 for ids in plain], device=lm.device)
        )
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """What no target changes: the blocks below the first edited one, and the live model at block L."""
        below = self.editor.layers[0] - 1
        self.below = tuple(
            run.read([], [below])[1][below] if below >= 0 else Split(None, None) for run in (self.rows, self.plain)
        )
        keys, states = self.rows.read([self.last], [self.last], below, self.below[0])
        self.live = states[self.last], keys[self.last]
        self._score(self.live[0])  # the first call keeps p₀
        self.gate = self.frozen_gate(self.rule.gate)

    def frozen_gate(self, kind: str) -> Tensor:
        """M of layer L on the live model, (n, d_in): "structural", or "key_only" without P and Kₚ."""
        return replace(self.editor, refine=replace(self.rule, gate=kind))._frozen_gate(
            self.reader, self.state, self.last
        )

    def _keys(self, found: Split, current: Tensor) -> Keys:
        """K of a layer as the editor reads it, float64."""
        rows = found.tail[self.lookup].double()
        return Keys(self.reader.average(rows), current, rows[:: self.reader.contexts])

    def write(self, value: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Split]:
        """The whole sequential edit towards V, (n, d): (R, M) of each layer as rows, and block L's outputs after all
        of them.
        """
        if not torch.isfinite(value).all():
            raise NumericalError(
                f"{int((~torch.isfinite(value)).any(1).sum())} of {len(value)} targets are not finite; expected "
                "vectors such as Stage I's"
            )
        rows, plain = self.below
        after, written = self.editor.layers[0] - 1, []
        for index, layer in enumerate(self.editor.layers):
            keys, states = self.rows.read([layer], [layer], after, rows)
            plain_keys, plain_states = self.plain.read([layer], sorted({layer, self.last}), after, plain)
            current = plain_states[self.last].tail[self.ends].double()  # h^L as the layers before have left it
            residuals = (value - current) * self.editor.allocation(index, len(self.editor.layers))
            structural = self.editor.reading.gate(self._keys(keys[layer], current), self.state.metrics[layer])
            rows = _moved(states[layer], keys[layer], residuals, structural)
            plain = _moved(plain_states[layer], plain_keys[layer], residuals, structural)
            written.append((residuals, structural))
            after = layer
        return written, rows

    def _score(self, states: Split) -> Tensor:
        """Weighted L_edit and L_loc with these outputs of block L, (n, 2)."""
        logits = self.rows.logits(self.last, states, self.bucket.places)
        nll, drift = self.bucket.losses(logits, self.count, self.rule.locality_direction)
        return torch.stack([self.rule.edit_weight * nll, self.rule.locality_weight * drift], 1)

    def _pull(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted L_reg, (n, 1), and its gradient, (n, d): what is left of the outer objective when no row is
        scored.
        """
        point = value.detach().clone().requires_grad_()
        with torch.enable_grad():
            losses = OuterObjective([], self.initial.anchor, self.initial.value, self.last, self.rule).losses(point)
        return self.rule.anchor_weight * losses[:, 2:], point.grad

    @torch.no_grad()
    def losses(self, value: Tensor) -> Tensor:
        """Weighted L_edit, L_loc and L_reg of each request after the edit towards V, (n, 3) float64.
        Their sum is F(V).
        """
        return torch.cat([self._score(self.write(value)[1]).double(), self._pull(value)[0]], 1)

    def gradients(self, value: Tensor) -> Gradients:
        """g through the whole edit and ĝ through the frozen gate, with their parts, at V, (n, d).

        g_L is what comes through (R_L, M_L) as they stand in the last update; they themselves depend on V in every way.
        Raises NumericalError if V is not finite; a loss that is not makes the gradients NaN.
        """
        value = value.detach().double().clone().requires_grad_()
        written, states = self.write(value)
        losses, slopes = self._slopes(states)
        tensors = [t for t in states if t is not None]
        (down,) = torch.autograd.grad(tensors, value, slopes, retain_graph=True)
        factors = [t for t in written[-1] if t.requires_grad]  # with one edited layer, M does not depend on V
        inner = torch.autograd.grad(tensors, factors, slopes, retain_graph=True)
        (last,) = torch.autograd.grad(factors, value, inner)
        pull_loss, pull = self._pull(value)
        signal = self._signal(value.detach())
        return Gradients(down, last, self.gate @ signal.T, pull, signal, self.gate, torch.cat([losses, pull_loss], 1))

    def _signal(self, value: Tensor) -> Tensor:
        """G at the virtual look-ahead W̃_L = W_L + (V − H) M, (d, d_in) float64: Σ_j δ_j u_jᵀ over all positions."""
        states, keys = self.live
        _, slopes = self._slopes(_moved(states, keys, value - self.initial.anchor, self.gate))
        inputs = [u for u in keys if u is not None]
        return sum(d.double().flatten(0, 1).T @ u.double().flatten(0, 1) for d, u in zip(slopes, inputs, strict=True))

    def _slopes(self, states: Split) -> tuple[Tensor, list[Tensor]]:
        """The losses, (n, 2), and the gradient of their sum in block L's outputs, for the parts of `states` that
        exist.
        """
        leaves = Split(*(t if t is None else t.detach().requires_grad_() for t in states))
        losses = self._score(leaves)
        slopes = torch.autograd.grad(losses.sum(), [t for t in leaves if t is not None], materialize_grads=True)
        return losses.detach().double(), list(slopes)


def _taught(batch: Rows, prompts: str) -> list[Row]:
    """Rewriting rows in all contexts: their beginnings give the keys. With "plain" prompts only the plain ones are
    scored.
    """
    rows, count = batch.rewriting(), len(batch.contexts)
    if prompts == "contexts":
        return rows
    plain = batch.rewriting(plain=True)
    unscored = (row._replace(ids=row.ids[: row.lookup + 1], read=(), labels=()) for row in rows)
    return [plain[i // count] if i % count == 0 else row for i, row in enumerate(unscored)]


def _moved(states: Split, keys: Split, residuals: Tensor, gate: Tensor) -> Split:
    """Outputs of a block after its weight changed by R M: h_j + R M u_j at every position. residuals: (n, d); gate:
    (n, d_in).
    """
    return Split(
        *(
            h if h is None else h + (u @ gate.T.to(h.dtype)) @ residuals.to(h.dtype)
            for h, u in zip(states, keys, strict=True)
        )
    )
