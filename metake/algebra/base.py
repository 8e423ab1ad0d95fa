"""Whether a model is the one that an edit was made on: first weights to the bit, later ones in a run up to rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metake.support.errors import ArchitectureError, ProvenanceError

PROBES = 8
TOLERANCE = 1e-6  # of a weight's norm: far above what another order of summation does, far below what an edit does


def sketch(weight: Tensor, probes: int = PROBES) -> Tensor:
    """uᵢᵀ W vᵢ for fixed random signs u and v, W (d_out, d_in): of two weights it differs by about ‖W − W′‖ each."""
    draw = torch.Generator().manual_seed(0)
    left, right = (2.0 * torch.randint(2, (size, probes), generator=draw).double() - 1 for size in weight.shape)
    return ((weight.double() @ right.to(weight.device)) * left.to(weight.device)).sum(0).cpu()


def known(model: Any, modules: Iterable[str], successive: bool) -> dict[str, Any]:
    """What an edit's record says of the weights that it is about to change: fields of `EditRecord`.

    successive: the model already carries edits of the same sequence. Their Δ, and so this base, have another last digit
    on another machine: it is known by its sketch and a tolerance too.
    """
    weights, told = {module: model.digest(module) for module in modules}, model.base()
    if successive:
        sketches = {module: sketch(model.weight(module)).tolist() for module in weights}
        told |= {"sketches": sketches, "tolerance": TOLERANCE}
    return {"base": told, "weights": weights}


def check(model: Any, weights: Mapping[str, str], told: Mapping[str, Any]) -> None:
    """Raise ProvenanceError unless each weight has its digest or, if the base's record has a sketch of it, lies within
    the tolerance that stands there.
    """
    name, sketches, tolerance = told.get("id", "?"), told.get("sketches", {}), told.get("tolerance", 0.0)
    for module, expected in weights.items():
        try:
            if (found := model.digest(module)) == expected:
                continue
        except ArchitectureError as error:
            raise ProvenanceError(f"the edit was made on {name!r}; apply it to that base: {error}") from error
        said = f"{module} of {model.name!r} has SHA-256 {found[:12]}…, but the edit was made on {expected[:12]}…"
        if module in sketches:
            weight = model.weight(module)
            difference = sketch(weight) - torch.tensor(sketches[module], dtype=torch.float64)
            away = difference.square().mean().sqrt().item() / max(weight.double().norm().item(), 1e-300)
            if away <= tolerance:
                continue
            said += f", and lies {away:.1e} of its norm away, after the run's earlier edits at most {tolerance:g}"
        raise ProvenanceError(f"{said} (base {name!r}); apply it to that base, or pass check=False")
