"""How a model comes into the state that editing and reading need, and leaves as it came; that it gives numbers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partialmethod, wraps
from typing import Any

import torch
from torch import Tensor

from metake.support.errors import NumericalError, ParameterError


class Ready:
    """This part of a `LanguageModel`."""

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Keep other threads out; this one may enter again: false then. Raises ParameterError if another is in."""
        attributes, own = vars(self.model), (threading.get_ident(), id(self.model))
        found = attributes.setdefault("_held", own)  # one step: of two threads one is first
        if found[1] != own[1]:  # it came along when a model was copied that was held
            found = attributes["_held"] = own
        if found[0] != own[0]:
            raise ParameterError(
                "another thread uses this model, and may be changing its weights: wait until it is done, or give each "
                "thread a model of its own"
            )
        try:
            yield found is own
        finally:
            if found is own:
                attributes.pop("_held", None)

    @contextmanager
    def scratch(self, modules: Sequence[str], keep: bool = False) -> Iterator[None]:
        """Copy these weights back on exit, bit for bit; with `keep` after an error only. Other threads stay out."""
        with self.held():
            originals = {m: self.weight(m).clone() for m in modules}
            try:
                yield
                originals = {} if keep else originals
            finally:
                for module, weight in originals.items():
                    self.write_weight(module, weight)

    restored_on_error = partialmethod(scratch, keep=True)  # what is made without an error stays

    @contextmanager
    def ready(self, gradients: bool = False) -> Iterator[None]:
        """Hold the model in eval mode (no dropout, no checkpoints), frozen and in its own dtype, gradients of other
        tensors on or off; then all is as it was. Raises ParameterError where inference mode forbids needed gradients,
        NumericalError if a weight is not finite (asked by the outermost call alone).
        """
        if gradients and (torch.is_inference_mode_enabled() or any(p.is_inference() for p in self.model.parameters())):
            raise ParameterError(
                "gradients are needed, and tensors of torch.inference_mode() have none: load the model and call this "
                "outside of it (torch.no_grad() does no harm)"
            )
        kind = self.device.type
        own_dtype = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with self.held() as first, torch.inference_mode(False), torch.set_grad_enabled(gradients), own_dtype:
            if first:
                self.check_weights()
            on = [(m, "training") for m in self.model.modules() if m.training]
            on += [(p, "requires_grad") for p in self.model.parameters() if p.requires_grad]
            try:
                for owner, flag in on:
                    setattr(owner, flag, False)
                yield
            finally:
                for owner, flag in on:
                    setattr(owner, flag, True)

    @staticmethod
    def entry(gradients: bool = False) -> Callable[[Callable], Callable]:
        """Decorator: a function runs while the model is `ready` that is its argument `lm`, or its object's."""

        def decorate(function: Callable) -> Callable:
            signature = inspect.signature(function)

            @wraps(function)
            def entered(*args: Any, **named: Any) -> Any:
                given = signature.bind(*args, **named).arguments
                with (given["lm"] if "lm" in given else given["self"].lm).ready(gradients):
                    return function(*args, **named)

            return entered

        return decorate

    def check_finite(self, values: Tensor, tokens: Callable[[int], Sequence[int]]) -> None:
        """Raise NumericalError unless all numbers of each row of (n, …) are finite. tokens: those that gave a row."""
        if len(bad := (~values.isfinite()).any(1).nonzero()):
            text = self.tokenizer.decode(tokens(int(bad[0])))
            raise NumericalError(f"what {self.name!r} computes at {text!r} is not finite: {self.cause()}")

    def check_weights(self) -> None:
        """Raise NumericalError unless all weights are finite. What the model computes need not show it: where no score
        of an attention is a number, torch's for CPUs may give zeros. Cost: weights are read once, as for one token."""
        sums = [p.detach().sum(dtype=torch.float32).to(self.device) for p in self.model.parameters()]
        if not torch.stack(sums).isfinite().all() and (broken := self._broken()):
            raise NumericalError(f"the weights of {self.name!r} are not finite: {broken}")

    def cause(self) -> str:
        """Why numbers are not finite, as far as the weights tell, and what to do."""
        return self._broken() or (
            f"all weights are, so a number on the way exceeds {self.dtype}; load the model in a wider dtype"
        )

    def _broken(self) -> str:
        for name, weight in self.model.named_parameters():
            if count := int((~weight.isfinite()).sum()):
                return f"{count} of {weight.numel()} numbers in {name} are not; undo what changed it, or load it again"
        return ""
