"""What a model must be like while it is edited or read, whatever its owner does with it; and that it gives numbers.

It may come in training mode, with gradients on, inside `torch.no_grad()`: it leaves as it came.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from metake.support.errors import NumericalError, ParameterError


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Keep other threads from a model; this one may enter again. Raises ParameterError if another has it."""
    attributes, own = vars(model), (threading.get_ident(), id(model))
    found = attributes.setdefault("_held", own)  # one step: of two threads one is first
    if found[1] != id(model):  # it came along when a model was copied that was held
        found = attributes["_held"] = own
    if found[0] != own[0]:
        raise ParameterError(
            "another thread uses this model, and may be changing its weights: wait until it is done, or give each "
            "thread a model of its own"
        )
    try:
        yield
    finally:
        if found is own:
            attributes.pop("_held", None)


@contextmanager
def ready(lm: Any, gradients: bool = False) -> Iterator[None]:
    """Inside the block a model is held, in eval mode (no dropout, no checkpoints), frozen and in its own dtype, and
    gradients of other tensors are on or off; afterwards all is as it was.

    Raises ParameterError where gradients are needed and inference mode forbids them.
    """
    model, device = lm.model, lm.device.type
    if gradients and (torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters())):
        raise ParameterError(
            "gradients are needed, and tensors of torch.inference_mode() have none: load the model and call this "
            "outside of it (torch.no_grad() does no harm)"
        )
    own_dtype = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with held(model), torch.inference_mode(False), torch.set_grad_enabled(gradients), own_dtype:
        training = [m for m in model.modules() if m.training]
        learning = [p for p in model.parameters() if p.requires_grad]
        try:
            for module in training:
                module.training = False
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in learning:
                parameter.requires_grad_(True)


def entry(gradients: bool = False) -> Callable[[Callable], Callable]:
    """For a function of a model, its argument `lm` or its object's own: it runs while that is `ready`."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @wraps(function)
        def entered(*args: Any, **named: Any) -> Any:
            given = signature.bind(*args, **named).arguments
            with ready(given["lm"] if "lm" in given else given["self"].lm, gradients):
                return function(*args, **named)

        return entered

    return decorate


def check_finite(lm: Any, values: Tensor, tokens: Callable[[int], Sequence[int]]) -> None:
    """Raise NumericalError unless all numbers of each row of (n, …) are finite. tokens: those that gave a row."""
    if len(bad := (~values.isfinite()).flatten(1).any(1).nonzero()):
        text = lm.tokenizer.decode(tokens(int(bad[0])))
        raise NumericalError(f"what {lm.name!r} computes at {text!r} is not finite: {cause(lm)}")


def extremes(logits: Tensor) -> Tensor:
    """Lowest and highest of each row of (n, vocabulary), (n, 2): finite if and only if all of the row is."""
    return torch.stack(logits.aminmax(dim=-1), 1)


def still_finite(module: str, weight: Tensor, changed: Tensor) -> Tensor:
    """The changed weight in the weight's dtype. Raises NumericalError if finite numbers would not stay finite."""
    rounded = changed.to(weight.dtype)
    if not torch.equal(rounded.isfinite(), weight.isfinite()):
        raise NumericalError(
            f"{module} is left unchanged: with this update its largest number would be {changed.abs().max():.3g}, and "
            f"{weight.dtype} ends at {torch.finfo(weight.dtype).max:.3g}; load the model in a wider dtype, or edit "
            "with shorter targets or a larger ridge"
        )
    return rounded


def cause(lm: Any) -> str:
    """Why a model's numbers are not finite, as far as its weights tell, and what to do."""
    for name, weight in lm.model.named_parameters():
        if count := int((~weight.isfinite()).sum()):
            return f"{count} numbers of its weight {name} are not finite; undo what changed it, or load the model again"
    return f"all of its weights are finite, so a number on the way exceeds {lm.dtype}; load it in a wider dtype"
