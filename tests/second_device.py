"""A second device that every machine has: tensors on it compute on the CPU, but meet those of the first only where
something moves them, as between two GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

SECOND = torch.device("cpu:1")
DEVICE, MOVES = Tensor.device.__get__, {Tensor.to, Tensor.copy_, Tensor.cpu}


def mark(tensor: Tensor, away: bool = True) -> Tensor:
    tensor._away = away
    return tensor


def is_away(tensor: Tensor) -> bool:
    return getattr(tensor, "_away", False)


class SecondDevice(TorchFunctionMode):
    """Within it, tensors know on which of the two devices they are. `met`: how many were moved."""

    met = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == DEVICE:
            return SECOND if is_away(args[0]) else func(*args)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {is_away(t) for t in tensors if t.ndim or func in MOVES}
        there = is_away(args[0]) if args and isinstance(args[0], Tensor) else places == {True}
        if func in MOVES:
            wanted = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
            named = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, str)]
            wanted += [torch.device(x) for x in named]
            args = (args[0], *(torch.device("cpu") if x in (SECOND, str(SECOND)) else x for x in args[1:])) if (
                func is not Tensor.copy_) else args  # fmt: skip
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            goes = wanted[0] == SECOND if wanted else there and func is not Tensor.cpu
            self.met += goes != there
            found = func(*args, **kwargs)
            if goes != there and found is args[0]:
                found = found.view_as(found)  # a move makes another tensor
            return mark(found, goes) if found is not args[0] else found
        if func is torch.autograd.grad:  # each gradient is where what it belongs to is
            found, asked = func(*args, **kwargs), args[1]
            return tuple(mark(g, is_away(t)) for g, t in zip(found, asked, strict=True))
        if len(places) > 1 and func is not torch.autograd.backward:
            shapes = [(tuple(t.shape), "second" if is_away(t) else "first") for t in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func.__name__} of {shapes}")
        if kwargs.get("device") in (SECOND, str(SECOND)):
            kwargs["device"], places = "cpu", {True}
        found = func(*args, **kwargs)
        if places == {True} or there:
            tree_map_only(Tensor, mark, found)
        return found


class Hook(AlignDevicesHook):
    """accelerate's own, on a module whose weights are already where they belong; `calls`: how often it ran."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.calls = 0
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().pre_forward(module, *args, **kwargs)


def shard(lm: Any, first: int) -> list[Hook]:
    """Put the blocks from `first` on, and what follows them, on the second device, with accelerate's hooks on every
    block and on the model, as `device_map` does.
    """
    head = lm.model.get_output_embeddings()
    if head.weight is lm.model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    names = {id(m): name for name, m in lm.model.named_modules()}
    norm = next(m for name, m in lm.model.base_model.named_children() if name in ("ln_f", "norm"))
    hooks, places = [], [(block, i >= first) for i, block in enumerate(lm.blocks)] + [(norm, True), (head, True)]
    for module, away in places:
        assert names[id(module)]
        for tensor in (*module.parameters(), *module.buffers()):
            mark(tensor, away)
        hooks.append(Hook(execution_device=SECOND if away else torch.device("cpu")))
        add_hook_to_module(module, hooks[-1])
    hooks.append(Hook(execution_device=torch.device("cpu"), io_same_device=True))
    add_hook_to_module(lm.model, hooks[-1])
    return hooks
