"""Whether a model is the one that an edit was made on: its first weights to the bit, later ones in a run up to
rounding.

A model is anything with `weight(module)`, `digest(module)` and `name`, as `LanguageModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metake.support.errors import ArchitectureError, ProvenanceError

TOLERANCE = 1e-6  # of a weight's norm: far above what another order of summation does, far below what an edit does
PROBES = 8


def sketch(weight: Tensor) -> list[float]:
    """uᵢᵀ W vᵢ for fixed random signs u and v, weight (d_out, d_in): two weights' sketches differ by about ‖W − W′‖."""
    signs = torch.Generator().manual_seed(0)
    left, right = (
        (2.0 * torch.randint(2, (size, PROBES), generator=signs) - 1).to(weight.device, torch.float64)
        for size in weight.shape
    )
    return ((weight.double() @ right) * left).sum(0).tolist()


def known(model: Any, modules: Iterable[str], successive: bool) -> dict[str, Any]:
    """What an edit's record says of the weights that it is about to change: fields of `EditRecord`.

    successive: the model already carries edits of the same sequence. Their Δ have another last digit on another
    machine, and so has this base; it is then known by its sketch and a tolerance too.
    """
    digests = {module: model.digest(module) for module in modules}
    if not successive:
        return {"weights": digests}
    sketches = {module: sketch(model.weight(module)) for module in digests}
    return {"weights": digests, "sketches": sketches, "tolerance": TOLERANCE}


def check(
    model: Any, weights: Mapping[str, str], sketches: Mapping[str, Sequence[float]], tolerance: float, name: str
) -> None:
    """Raise ProvenanceError unless each weight has its digest or, where there is a sketch of it, lies within
    `tolerance` of its norm. name: of the model that is expected.
    """
    for module, expected in weights.items():
        try:
            found = model.digest(module)
        except ArchitectureError as error:
            raise ProvenanceError(f"the edit was made on {name!r}; apply it to that base: {error}") from error
        if found == expected:
            continue
        if not (recorded := sketches.get(module)):
            raise ProvenanceError(
                f"{module} of {model.name!r} has SHA-256 {found[:12]}…, but the edit was made on {expected[:12]}… "
                f"(base {name!r}); apply it to that base, or pass check=False"
            )
        away = _distance(model.weight(module), recorded)
        if not away <= tolerance:
            raise ProvenanceError(
                f"{module} of {model.name!r} lies {away:.1e} of its norm away from the weight that the edit was made "
                f"on, within a run at most {tolerance:g} is expected; apply all edits of the run in their order to "
                f"{name!r}, or pass check=False"
            )


def _distance(weight: Tensor, recorded: Sequence[float]) -> float:
    """‖W − W′‖ / ‖W‖, estimated from the sketch of W′."""
    own = torch.tensor(sketch(weight), dtype=torch.float64)
    difference = own - torch.tensor(recorded, dtype=torch.float64)
    return (difference.square().mean().sqrt() / weight.double().norm().clamp_min(1e-300).cpu()).item()
