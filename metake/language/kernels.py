"""Products with frozen float32 weights, by whichever of the two libraries in torch is faster on this processor.

On x86 torch sends float32 products to MKL, which keeps to AVX2 where the processor is not Intel's. oneDNN, which the
same builds carry, uses AVX-512 there: twice the rate at every size that editing needs. Both compute in float32; sums
differ in order. `torch.backends.mkldnn.flags(enabled=False)` switches oneDNN off, here as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from metake.language.capture import replaced
from metake.support.machine import mkl_is_slow

OPERATIONS: Mapping[Any, Callable[..., int]] = (
    {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * prod(x) * weight[0]}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
)
"""What torch.utils.flop_counter must be told of the product used here: torch's op → operations from its shapes."""


class _Product(torch.autograd.Function):
    """x Wᵀ + b through oneDNN; W and b are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(slope, weight.t(), None), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for a weight without gradient. x: (…, d_in); weight: (d_out, d_in), or a view so; bias: (d_out,)."""
    if _served(weight) and x.dtype == torch.float32 and x.numel():
        return _Product.apply(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def _served(weight: Tensor) -> bool:
    """Whether oneDNN is the faster one for this weight, and nobody asked for another precision, device or gradient."""
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.requires_grad
    chosen = OPERATIONS and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return bool(plain and chosen and mkl_is_slow())


def fast_products(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Let these modules' linear maps compute by `linear` while the block runs; forwards that were replaced stay."""
    looked_at = modules if mkl_is_slow() else ()  # elsewhere no pass pays for the walk
    linears = (m for m in looked_at if type(m) in (nn.Linear, Conv1D) and "forward" not in vars(m))
    served = {m: m.weight.t() if type(m) is Conv1D else m.weight for m in linears if _served(m.weight)}
    return replaced({m: partial(linear, weight=weight, bias=m.bias) for m, weight in served.items()})
