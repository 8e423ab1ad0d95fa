"""Read activations, replace blocks and gather logits, as context managers over a model's own modules.

Decoder blocks return a tensor or a tuple whose first item is the hidden state, depending on architecture and version of
transformers: `hidden` and `rewrap` are the only two places that know.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metake.support.machine import sent


class _Stop(Exception):
    """Raised by a hook once the last wanted activation was read; never leaves this module."""


def hidden(output: Any) -> Tensor:
    """The hidden state in a block's output: the tensor itself, or the first item of the tuple."""
    return output[0] if isinstance(output, tuple) else output


def rewrap(output: Any, replacement: Tensor) -> Any:
    """`output` with its hidden state replaced, in the shape the block returned."""
    return (replacement, *output[1:]) if isinstance(output, tuple) else replacement


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that stay while the block runs."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Let modules compute by these functions while the block runs; what somebody had put in their place returns."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextlib.contextmanager
def reading(
    inputs: Mapping[Any, nn.Module] = MappingProxyType({}), outputs: Mapping[Any, nn.Module] = MappingProxyType({}),
    then: Callable[[Tensor], Tensor] = lambda t: t, stop_after: nn.Module | None = None
) -> Iterator[dict[Any, Tensor]]:
    """Collect, under the given names, what goes into and comes out of modules while the block runs.

    then: applied to each activation as it is read, (rows, positions, width), so that only what is needed is kept.
    stop_after: the forward pass ends once this module has run; blocks after it are never computed.
    """
    found: dict[Any, Tensor] = {}

    def keep(name: Any, _: nn.Module, *activations: Any) -> None:  # what went in, and behind it what came out
        found[name] = then(hidden(activations[-1]))

    handles = [module.register_forward_pre_hook(partial(keep, name)) for name, module in inputs.items()]
    handles += [module.register_forward_hook(partial(keep, name)) for name, module in outputs.items()]
    handles += [stop_after.register_forward_hook(_raise_stop)] if stop_after is not None else []
    with hooked(handles), contextlib.suppress(_Stop):
        yield found


def _raise_stop(*_: Any) -> None:
    raise _Stop


def moved(state: Tensor, vector: Tensor) -> Tensor:
    """A hidden state, (rows, positions, width) or flat, with (rows, width) added at each row's first position."""
    if state.ndim == 2:
        return moved(state.unflatten(0, (len(vector), -1)), vector).flatten(0, 1)
    first = state[:, 0].to(vector.dtype) + vector.to(state.device)
    return torch.cat([first.to(state.dtype)[:, None], state[:, 1:]], 1)


@contextlib.contextmanager
def adding(module: nn.Module, vector: Tensor) -> Iterator[None]:
    """Add (rows, width) to what the module returns at each row's first position; may require a gradient."""
    with module.register_forward_hook(lambda _, __, out: rewrap(out, moved(hidden(out), vector))):
        yield


class Probe(NamedTuple):
    """What went into a linear map, and a zero added to what came out, whose gradient is the output's."""

    input: Tensor  # (rows, positions, d_in)
    leaf: Tensor  # (rows, positions, d_out)


@contextlib.contextmanager
def probing(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, Probe]]:
    """Collect, under the given names, what is needed for the gradients at linear maps while the block runs.

    The weights need no gradients: a zero that asks for one is added to each output.
    """
    found: dict[Any, Probe] = {}

    def add(name: Any, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        found[name] = Probe(args[0].detach(), torch.zeros_like(output, requires_grad=True))
        return output + found[name].leaf

    with hooked(module.register_forward_hook(partial(add, name)) for name, module in modules.items()):
        yield found


@contextlib.contextmanager
def resumed(blocks: Sequence[nn.Module], last: int, state: Tensor, arity: int) -> Iterator[None]:
    """Start the forward pass after block `last`: blocks 0..last are not computed, and `state` is what `last` returns.

    The model's own forward still builds masks, positions and caches. state: (rows, positions, width), may require a
    gradient. arity: how many items the architecture's blocks return (1: a bare tensor). last = −1 changes nothing.
    """

    def passing(own: Tensor | None, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden_states if own is None else own
        return out if arity == 1 else (out, *[None] * (arity - 1))

    with replaced({b: partial(passing, state if i == last else None) for i, b in enumerate(blocks[: last + 1])}):
        yield


class Places(NamedTuple):
    """(row, column) pairs of a rectangle of rows, flat: as they are asked for, and each once, ascending."""

    asked: Tensor
    once: Tensor

    @classmethod
    def of(cls, rows: Iterable[int], columns: Iterable[int], width: int, device: Any = "cpu") -> Places:
        """rows, columns: (pairs,); width: columns of the rectangle."""
        asked = [int(row) * width + int(column) for row, column in zip(rows, columns, strict=True)]
        return cls(*(sent(x, device, torch.long) for x in (asked, sorted({*asked}))))


@contextlib.contextmanager
def gathered(head: nn.Module, last_mlp: nn.Module | None, places: Places) -> Iterator[None]:
    """Let the model compute logits only at the given places: it then returns them as (places, vocabulary).

    The head, its bias and the final norm stay the model's own; only the rows that reach the head are chosen. The last
    block's MLP acts on each position alone and feeds nothing but the head: it too runs only there, unless it is None.
    """
    shape: list[int] = []

    def choose(_: nn.Module, args: tuple) -> tuple:
        return args[0].flatten(0, 1).index_select(0, places.asked.to(args[0].device)), *args[1:]

    def thin(_: nn.Module, args: tuple) -> tuple:  # the residual stream may come beside what is to be transformed
        shape[:] = args[0].shape[:-1]
        return tuple(s.flatten(0, -2).index_select(0, places.once.to(s.device))[None] for s in args)

    def spread(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        whole = output.new_zeros(math.prod(shape), output.shape[-1])
        return whole.index_copy(0, places.once.to(whole.device), output[0]).unflatten(0, shape)

    handles = [head.register_forward_pre_hook(choose)]
    if last_mlp is not None:
        handles += [last_mlp.register_forward_pre_hook(thin), last_mlp.register_forward_hook(spread)]
    with hooked(handles):
        yield
