"""What tests compare before and after: a model to the last bit, a folder to the last byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of a model, NaN and signed zeros included."""
    return {
        n: hashlib.sha256(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for n, t in model.state_dict().items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
