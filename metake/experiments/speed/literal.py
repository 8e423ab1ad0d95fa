"""The literal path, as released code takes it: one request at a time, full forwards, d×d systems. For timing only.

Its forms stand among the tests of a checkout, tests/reference.py, where the accelerated path is checked against them.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from metake.algebra.geometry import InverseCovariance, KeyStatistics, NullSpace
from metake.data.requests import EditCase
from metake.editing.editor import Editor
from metake.editing.state import EditorState
from metake.language.kernels import OPERATIONS
from metake.language.model import LanguageModel
from metake.support.errors import ParameterError
from metake.support.machine import synchronize

FOLDER = Path(__file__).parents[3] / "tests"


class Part(NamedTuple):
    """A piece of a stage: `call(steps)` is timed, and stands for `factor` of its kind. steps: 0 where it has none."""

    call: Callable[[int], Any]
    factor: float
    steps: int = 0


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call until the device has finished it, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


class Work(NamedTuple):
    """Floating-point operations of a call, and of one of its equal steps."""

    total: float
    step: float = 0.0


def flops(call: Callable[[int], Any], steps: int = 0) -> Work:
    """Floating-point operations of the matrix products in `call(steps)`, 2 for a multiply-add, as torch counts them.

    F(S) = F(1) + (S − 1) (F(2) − F(1)): only two of many equal steps are run.      steps = 0: `call(0)` itself
    Attention scores count only where torch knows the kernel; solves and factorizations do not count.
    """

    def count(steps: int) -> int:
        with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
            call(steps)
        return counter.get_total_flops()

    if not steps:
        return Work(count(0))
    first = count(1)
    step = count(2) - first
    return Work(first + (steps - 1) * step, step)


def load_reference(folder: Path | None = None) -> ModuleType:
    """tests/reference.py of the checkout that this package runs from. Raises ParameterError outside of one."""
    path = (folder or FOLDER) / "reference.py"
    if not path.is_file():
        raise ParameterError(
            "the literal path stands among the tests, and this installation has none: run from a checkout (git "
            "clone, make test), or leave --literal out"
        )
    spec = importlib.util.spec_from_file_location("metake_literal_reference", path)
    module, known = importlib.util.module_from_spec(spec), set(sys.modules)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ParameterError(
            f"the literal path needs what the tests need ({error}): install it with make test, or leave --literal out"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
        for name in {"models"} - known:
            sys.modules.pop(name, None)
    return module


def parts(
    reference: ModuleType, lm: LanguageModel, cases: Sequence[EditCase], count: int, editor: Editor, state: EditorState,
    statistics: dict[int, KeyStatistics]
) -> dict[str, list[Part]]:
    """Stages of the literal path on the first `count` cases, to be multiplied up to the batch of all of them.

    targets, refinement: request by request, the refinement sees only these cases. evaluation: case by case, all rows of
    a case padded together, logits at every position. Each × padded tokens of all cases / of these:
    some are longer.
    keys: 2|L| passes over all contexts (before the writes; after them for the history) and |L| over plain prompts, each
    over all rows to the logits; one of either kind is timed, × rows. solve: |L| d×d systems in float64 with as many
    random keys.
    """
    asked, layers = [c.request for c in cases[:count]], editor.layers
    share = _share(lm, reference, [reference.stage_one_texts(lm, c.request, state.contexts) for c in cases], count)
    probes = _share(
        lm, reference, [[text for own in reference.probe_texts(lm, c) for text in own] for c in cases], count
    )
    last, contexts = layers[-1], state.contexts
    found = {
        "targets": [
            Part(
                lambda steps: _targets(reference, lm, asked, contexts, last, replace(editor.target, steps=steps)),
                share, editor.target.steps
            )
        ]
    }
    if editor.refine:
        planned = _targets(reference, lm, asked[:1], contexts, last, replace(editor.target, steps=1))[0][0]
        rule = editor.refine
        found["refinement"] = [
            Part(
                lambda steps: _refinement(reference, lm, asked, contexts, layers, planned, replace(rule, steps=steps)),
                share, rule.steps
            )
        ]
    found["keys"] = [
        Part(lambda _: reference.key_pass(lm, asked, contexts, last), 2 * len(layers) * len(cases) / count),
        Part(lambda _: reference.key_pass(lm, asked, contexts[:1], last), len(layers) * len(cases) / count),
    ]
    found["solve"] = [Part(_solve(reference, lm, len(cases), editor, state, statistics), len(layers))]
    found["evaluation"] = [Part(lambda _: [reference.evaluation(lm, case) for case in cases[:count]], probes)]
    return found


def _share(lm: LanguageModel, reference: ModuleType, texts: Sequence[Sequence[str]], count: int) -> float:
    """How many times the first `count` batches of texts all of them are, by their tokens with padding."""
    tokens = [reference.padded(lm, batch)["input_ids"].numel() for batch in texts]
    return sum(tokens) / sum(tokens[:count])


def seconds(lm: LanguageModel, stages: dict[str, list[Part]]) -> dict[str, float]:
    """Seconds of each stage, multiplied up to the whole batch."""
    return {
        name: sum(part.factor * timed(lm.device, lambda part=part: part.call(part.steps))[0] for part in pieces)
        for name, pieces in stages.items()
    }


def operations(stages: dict[str, list[Part]], names: Sequence[str]) -> dict[str, float]:
    """Floating-point operations of the named stages, likewise (`flops`)."""
    return {
        name: sum(part.factor * flops(part.call, part.steps).total for part in stages[name])
        for name in names
        if name in stages
    }


def _targets(
    reference: ModuleType, lm: LanguageModel, asked: Sequence, contexts: Sequence[str], layer: int, rule: Any
) -> list[tuple]:
    return [reference.stage_one(lm, request, contexts, layer, rule) for request in asked]


def _refinement(
    reference: ModuleType, lm: LanguageModel, asked: Sequence, contexts: Sequence[str], layers: Sequence[int],
    anchor: Tensor, rule: Any
) -> Any:
    """From random plans and a random gate, small enough to stay finite: only time is read."""
    states = anchor[:, None].expand(-1, len(asked)).contiguous()
    width = lm.shape(lm.write_path(layers[-1]))[1]
    gate = 1e-3 * torch.randn(len(asked), width, dtype=lm.dtype, device=lm.device)
    if rule.look_ahead == "whole":
        edited = reference.all_layers(lm, asked, contexts, layers, lambda _, __, residuals: residuals @ gate)
    else:
        edited = reference.last_layer(lm, layers[-1], states, gate)
    return reference.refinement(lm, asked, contexts, states + 1e-2 * torch.randn_like(states), edited, rule)


def _solve(
    reference: ModuleType, lm: LanguageModel, edits: int, editor: Editor, state: EditorState,
    statistics: dict[int, KeyStatistics]
) -> Callable[[int], Tensor]:
    """The published d×d system of the editor's metric at its last layer, with nothing remembered."""
    rows, width = lm.shape(lm.write_path(editor.layers[-1]))
    drawn = {"dtype": torch.float64, "device": lm.device}
    keys, residuals, past = (
        torch.randn(width, edits, **drawn), torch.randn(rows, edits, **drawn), torch.zeros(width, 0, **drawn)
    )
    metric, rule = state.metrics[editor.layers[-1]], editor.metric
    if isinstance(metric, NullSpace):
        projector = metric.project(torch.eye(width, **drawn))
        return lambda _: reference.alphaedit_code(keys, residuals, projector, metric.ridge, past)
    if not isinstance(metric, InverseCovariance):
        raise ParameterError(f"no literal form of a {type(metric).__name__} solve is known; leave --literal out")
    moment = statistics[editor.layers[-1]].to(lm.device).covariance
    if rule.ridge:
        return lambda _: residuals @ reference.gate_v1(keys, rule.weight * moment, rule.ridge)
    return lambda _: reference.memit(keys, residuals, moment, rule.weight)
