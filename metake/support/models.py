"""Where the models with short names are, for other programs that must find them."""

import os
from pathlib import Path

TINY = Path(__file__).parents[1] / "data/tiny"  # ships with the package
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def findable(name: str) -> str:
    """A model's name as any program finds it: its repository on the hub, or the absolute path of its folder."""
    name = {"tiny": str(TINY), "smollm2-135m": SMOLLM2}.get(name, name)
    return os.path.abspath(name) if os.path.isdir(name) else name
