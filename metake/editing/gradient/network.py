"""What the trained editors learn: running moments of [k; g], and residual low-rank blocks that correct them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = 1e-7  # added to a standard deviation


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of rows, per coordinate. A value: `joined` gives another.

    table: (3, D) float64, the count in every place of its first row.
    """

    table: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of rows, (T, D); none at all: the moments to begin with."""
        rows = rows.detach().double()
        count = torch.full_like(rows[:1].sum(0), len(rows))
        mean = rows.mean(0) if len(rows) else torch.zeros_like(count)
        return cls(torch.stack([count, mean, (rows - mean).square().sum(0)]))

    def joined(self, other: Tensor) -> Moments:
        """With another's table: as if the rows of both had been seen at once (Chan et al. 1983)."""
        (n, mean, squares), (m, new, more) = self.table, other.to(self.table)
        both = (n + m).clamp(min=1)
        apart = new - mean
        return Moments(torch.stack([n + m, mean + apart * m / both, squares + more + apart.square() * n * m / both]))

    def normalized(self, rows: Tensor) -> Tensor:
        """(x − μ)/(σ + ε), σ with n − 1; of one row or none, which has no spread, x − μ."""
        count, mean, squares = self.table
        deviation = (squares / (count - 1).clamp(min=1)).sqrt()
        deviation = torch.where(count > 1, deviation, torch.ones_like(deviation))
        return ((rows.double() - mean) / (deviation + EPS)).to(rows.dtype)


class Network(nn.Module):
    """The hyper-network of all edited weights of one shape: y ← [k; g] normalized, then residual low-rank blocks.

    y ← y + s_m ⊙ max(0, yAB + c) + o_m                   (MALMEN, SMEdit; Tan et al. 2024)
    y ← y + max(0, s_m ⊙ (yAB + c) + o_m)                 (MEND: `inside`; Mitchell et al. 2022)

    D = d_in + d_out; A: (D, rank) ~ N(0, 1/D), B = 0, c = 0, s_m = 1, o_m = 0: the identity to begin with. Of each of
    the `modules`: s, o, a step η and a ridge e^ℓ. The maximum lets the gradient through at 0, where it begins.
    """

    def __init__(self, dim: int, modules: int, rank: int, blocks: int, step: float, inside: bool, seed: int,
                 dtype: torch.dtype = torch.float32):  # fmt: skip
        super().__init__()
        self.inside, kind = inside, {"dtype": dtype}
        draw = torch.Generator().manual_seed(seed)
        first = [torch.randn(dim, rank, generator=draw, dtype=torch.float64).div(dim**0.5).to(dtype)
                 for _ in range(blocks)]  # fmt: skip
        self.down = nn.ParameterList(nn.Parameter(a) for a in first)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(rank, dim, **kind)) for _ in range(blocks))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(dim, **kind)) for _ in range(blocks))
        self.scale = nn.ParameterList(nn.Parameter(torch.ones(modules, dim, **kind)) for _ in range(blocks))
        self.shift = nn.ParameterList(nn.Parameter(torch.zeros(modules, dim, **kind)) for _ in range(blocks))
        self.step = nn.Parameter(torch.full((modules,), step, **kind))
        self.log_ridge = nn.Parameter(torch.zeros(modules, **kind))
        self.register_buffer("table", torch.zeros(3, dim, dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        return Moments(self.table)

    def see(self, rows: Tensor) -> None:
        """Take rows, (T, D), into the running moments."""
        self.table.copy_(self.moments.joined(Moments.of(rows).table).table)

    def forward(self, rows: Tensor, place: int, moments: Moments | None = None) -> Tensor:
        """[k̃; g̃] of the rows, (T, D), of edited weight number `place`; moments: in the place of its own."""
        y = (moments or self.moments).normalized(rows).to(self.step.dtype)
        for down, up, bias, scale, shift in zip(self.down, self.up, self.bias, self.scale, self.shift, strict=True):
            inner = y @ down @ up + bias
            if self.inside:
                y = y + (scale[place] * inner + shift[place]).clamp(min=0)
            else:
                y = y + scale[place] * inner.clamp(min=0) + shift[place]
        return y

    @property
    def digest(self) -> str:
        """SHA-256 of parameters and moments."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def __repr__(self) -> str:
        """What tells it from another, in records of what was done with it."""
        return f"Network({self.digest})"

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that learn at the networks' rate, and the steps and ridges, whose unit is their own."""
        own = [self.step, self.log_ridge]
        return [p for p in self.parameters() if not any(p is q for q in own)], own


def shapes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The distinct (d_out, d_in) in the order in which they first appear: those of one shape share a network."""
    return list(dict.fromkeys(sizes))
