"""Equal to the bit when it is done twice on one device, at some cost in time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def repeatable() -> Iterator[None]:
    """Within the block only algorithms that give the same bits again; where torch has none, it warns.

    An edit's record then says `"deterministic": true` of its base. Attention goes the plain way: the backward of its
    fused kernels adds in any order. What cuBLAS needs stands in the environment, which it reads when it starts.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
