"""Where the models with short names are, for who writes a name that other programs must find."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

TINY = Path(__file__).parents[1] / "data/tiny"  # ships with the package
REPOSITORIES: Mapping[str, str] = MappingProxyType({"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"})


def findable(name: str) -> str:
    """A model's name as any program finds it: its repository on the hub, or the absolute path of its folder."""
    if name == "tiny":
        return str(TINY)
    return os.path.abspath(name) if os.path.isdir(name) else REPOSITORIES.get(name, name)
