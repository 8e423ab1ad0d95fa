"""Several processes that do one piece of work together, as torchrun starts them, one a GPU. Alone, all is as without.

Each has the whole model. Requests and cases, which do not influence one another, are divided among them: Stage I of a
batch, evaluation and generation. What is solved from all of them each solves, and takes the first one's edit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from metake.data.requests import EditRequest
from metake.editing.editor import Editor
from metake.editing.state import EditorState
from metake.editing.targets import Targets, optimize_targets
from metake.language.model import LanguageModel
from metake.support.errors import MetakeError
from metake.support.machine import take_accelerator

T = TypeVar("T")


def begin() -> None:
    """Meet the other processes, if torchrun has started any, and take a GPU of one's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
        take_accelerator(int(os.environ["LOCAL_RANK"]))


def place() -> tuple[int, int]:
    """Which process this is, and of how many: (0, 1) alone."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def gathered(work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process, in their order; a MetakeError of one is raised in all, so that none waits."""
    found: list[Any] = [None] * place()[1]
    if len(found) == 1:
        return [work()]
    try:
        mine: tuple[Any, Any] = work(), None
    except MetakeError as error:
        mine = None, error
    distributed.all_gather_object(found, mine)
    for error in (error for _, error in found if error):
        raise error
    return [value for value, _ in found]


def first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, which alone does it."""
    return gathered(lambda: work() if not place()[0] else None)[0]


def divided(items: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[T]]) -> list[T]:
    """`work(items)`, one result an item, of which each process makes its own part."""
    own, count = place()
    parts = gathered(lambda: work(items[own::count]) if items[own::count] or count == 1 else ())
    return [parts[i % count][i // count] for i in range(len(items))]


def planned_together(
    lm: LanguageModel, editor: Editor, requests: Sequence[EditRequest], state: EditorState
) -> Targets | None:
    """Stage I of a batch, its requests divided among the processes. None where there is nothing to divide: alone, or
    for an editor that plans in pieces (BLUE's layers, ROME's requests), which each process then does by itself.
    """
    if place()[1] == 1 or editor.plan_key(state) is None:
        return None
    layer = editor.layers[-1]

    def plan(mine: Sequence[EditRequest]) -> list[tuple]:
        found = optimize_targets(lm, mine, state.contexts, layer, editor.target)
        return list(zip(found.anchor.cpu(), found.planned.cpu(), found.trace, strict=True))

    anchor, planned, trace = zip(*divided(requests, plan), strict=True)
    return Targets(layer, torch.stack(anchor).to(lm.device), torch.stack(planned).to(lm.device), trace)
