"""What tells the methods of the gradient family apart, and their one step from slopes to an update Δ = R·M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metake.algebra.geometry import Isotropic
from metake.algebra.solve import gate
from metake.editing.gradient.slopes import Slopes
from metake.support.errors import ParameterError, near_misses

CHOICES = {
    "solve": ("least squares", "sum", "adam"), "tokens": ("answer", "all"), "penalty": ("kl", "norm"),
    "coefficient": ("raw", "normalized"),
}  # fmt: skip


@dataclass(frozen=True)
class GradientRule:
    """How slopes K, (T, d_in), and g, (T, d_out), become an update, with k̃, g̃ what a network makes of them.

    solve        "least squares": Δ = Dᵀ(KKᵀ + λI)⁻¹K with D_t = −η c_t g̃_t, which is R·M with Q = I/λ (MALMEN);
                 "sum": Δ = −Σ η g̃_t k̃_tᵀ (MEND); "adam": fine-tuning by the weight's gradient Σ g_t k_tᵀ (FT)
    added        whether D and the sum have the other sign, which climbs the loss until η has turned (MEND's code)
    coefficient  c_t: "raw", k_t·k̃_t (MALMEN); "normalized", k̃_t·k̃_t (UltraEdit)
    tokens       "answer", positions whose next token is the answer's; "all", every attended one (MEND)
    steps        J, how often slopes are read again of the model as the steps before left it (SMEdit: 2)
    penalty      of training, what keeps the model: "kl", drift on unrelated prompts (MEND, MALMEN); "norm", ‖Δ‖²
                 (SMEdit)
    inside       whether scale and shift stand inside the maximum of a network's blocks (MEND)
    step         η where nothing is trained (UltraEdit, FT), and λ is 1 then
    living       whether the moments go on over all edits (UltraEdit, MALMEN's code), or stay those of the training
    micro        0: each request's slopes are those of its own mean loss; n: of the mean over micro-batches of n, which
                 training filled, so that those of a last, shorter one are larger (MALMEN's code)
    """

    solve: str = "least squares"
    coefficient: str = "raw"
    tokens: str = "answer"
    steps: int = 1
    penalty: str = "kl"
    inside: bool = False
    step: float = 1e-6
    living: bool = False
    added: bool = False
    micro: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ParameterError(near_misses(value, allowed, f"value of {name}"))
        if self.steps < 1:
            raise ParameterError(f"steps must be at least 1; found {self.steps}")
        if self.micro < 0:
            raise ParameterError(f"micro must not be below 0; found {self.micro}")

    def shares(self, count: int) -> list[float]:
        """What each of `count` requests' losses counts: 1, or in a last, shorter micro-batch more."""
        if not self.micro:
            return [1.0] * count
        return [self.micro / min(self.micro, count - i // self.micro * self.micro) for i in range(count)]


class Descent:
    """Fine-tuning of one weight, (d_out, d_in), by Adam (Kingma and Ba 2015); no entry of Δ is larger than limit."""

    def __init__(self, shape: tuple[int, int], step: float, limit: float | None, device: torch.device) -> None:
        self.delta, self.limit = torch.zeros(shape, dtype=torch.float64, device=device), limit
        self.optimizer = torch.optim.Adam([self.delta], step)

    def __call__(self, slopes: Slopes) -> Tensor:
        """What a step adds to Δ."""
        before, self.delta.grad = self.delta.clone(), slopes.gradients.double().T @ slopes.keys.double()
        self.optimizer.step()
        if self.limit:
            self.delta.clamp_(-self.limit, self.limit)
        return self.delta - before


class Corrected(NamedTuple):
    """[k̃; g̃] of the rows, (T, d_in + d_out), and their weight's step η and ridge λ, each a number or a tensor."""

    rows: Tensor
    step: Tensor | float
    ridge: Tensor | float


def factors(rule: GradientRule, slopes: Slopes, corrected: Corrected) -> tuple[Tensor, Tensor]:
    """R = Dᵀ, (d_out, T), and M, (T, d_in), in float64, differentiable in what is corrected: Δ = R·M."""
    width = slopes.keys.shape[1]
    keys, gradients = corrected.rows[:, :width], corrected.rows[:, width:]
    step = corrected.step if rule.added else -corrected.step
    if rule.solve == "sum":
        return (step * gradients).double().T, keys.double()
    other = slopes.keys if rule.coefficient == "raw" else keys
    residuals = step * (other * keys).sum(1, keepdim=True) * gradients
    return residuals.double().T, gate(slopes.keys.double(), Isotropic(width, corrected.ridge))
