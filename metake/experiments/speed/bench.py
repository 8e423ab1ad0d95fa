"""MetaKE v3 Tables 5 and 6: seconds and memory of one batch, beside the literal path and the machine's own speed."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pandas as pd
import torch

from metake import methods
from metake.algebra.geometry import KeyStatistics
from metake.data.requests import Cases
from metake.editing.bilevel import refine
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.slopes import Passes
from metake.editing.keys import KeyReader
from metake.editing.recipes import recipe
from metake.editing.state import EditorState
from metake.editing.statistics import statistics
from metake.editing.targets import optimize_targets
from metake.experiments.borrowed import borrowed
from metake.experiments.cases import read_cases, select
from metake.experiments.speed import literal as slow
from metake.experiments.speed.sizes import random_contexts, random_model, random_statistics, size_of
from metake.language.kernels import linear
from metake.language.model import LanguageModel, load
from metake.language.tokens import Rows, rewriting_rows
from metake.report.shown import plain
from metake.scoring.evaluation import evaluate as evaluation
from metake.support.errors import ParameterError
from metake.support.machine import accelerator, peak_memory, processor, reset_peak, versions
from metake.support.storage import write_file

STAGES = ("slopes", "targets", "refinement", "keys", "solve", "write", "evaluation")
COUNTED = STAGES[1:4]  # of methods that plan, those that are matrix products of the model


@dataclass(frozen=True)
class _Job:
    """What is timed: a model, an editor in its first state, and the cases of one batch."""

    lm: LanguageModel
    editor: Editor | GradientEditor
    state: EditorState
    statistics: Mapping[int, KeyStatistics] = field(repr=False)
    cases: Cases = field(repr=False)

    @property
    def plans(self) -> bool:
        """Whether the method has a Stage I; one of the gradient family has slopes instead."""
        return isinstance(self.editor, Editor)


def bench(
    model: str = "tiny", method: str = "alphaedit", edits: int = 100, data: str = "facts", steps: int = 25,
    literal: int = 0, random_weights: bool = False, rounds: int = 1,
    evaluate: bool = True, text: str = "embedded", text_tokens: int | None = None, dtype: str | None = None,
    device: str | None = None, seed: int = 0, prompts: str = "", recipe: str | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of one batch of `edits` requests by stage (MetaKE v3 Tables 5, 6), medians over `rounds`, once warm.

    share = FLOP of Stage I / its seconds / FLOP per second of this process's best square matrix product

    Stage I makes exactly `steps` steps, without early stop; of the gradient family, which has none, the share is that
    of the slopes. literal: also time the literal path on the first so many of the requests, in alternating order with
    the accelerated one, and multiply up (`literal.parts` says how); of methods that plan, and only in a checkout.
    random_weights: a model of this size (`sizes.random_model`), random key statistics. prompts: of the refinement,
    default the method's own. recipe, layers: as in `experiments.borrowed`.
    Returns plain data: "stages" (a row per stage: seconds, flops, literal_*, ratio), "total", "stage_one",
    "peak_memory" in bytes (of the first batch; of a CPU the process's highest until its end), "counts", and where they
    come from.
    Raises ParameterError for unknown names and values out of range, before a model is loaded where it can.
    Cost: rounds + 0.3 batches, and literal / edits of a literal one a round.
    """
    for name, value, least in (
        ("edits", edits, 1), ("literal", literal, 0), ("rounds", rounds, 1), ("steps", steps, 1)
    ):
        if value < least:
            raise ParameterError(f"{name} must be at least {least}; found {value}")
    if literal > edits:
        raise ParameterError(
            f"the literal path was asked for on {literal} of {edits} requests; expected at most {edits}"
        )
    if literal and method.partition("/")[0] in methods.GRADIENT | methods.FINE_TUNING:
        raise ParameterError(
            f"the literal path is timed of methods that plan targets; {method} does not: leave --literal out"
        )
    reference = slow.load_reference() if literal else None
    with borrowed(size_of(model) if random_weights else model, recipe, layers):
        job = _job(model, method, edits, data, steps, random_weights, text, text_tokens, dtype, device, seed, prompts)
    rate = matmul_rate(job.lm)
    rounded, peak, calls = _rounds(job, reference, literal, rounds, evaluate)
    work = _operations(job)
    counted = {k: v.total for k, v in work.items()} | {
        f"literal_{k}": v for k, v in slow.operations(calls, COUNTED).items()
    }
    stages = [_stage(name, rounded, counted, edits) for name in STAGES if (name, "accelerated") in rounded]
    first = "targets" if job.plans else "slopes"
    one, spent = work[first], rounded[first, "accelerated"]
    settings = {
        "steps": steps if job.plans else job.editor.rule.steps, "literal_requests": literal, "rounds": rounds,
        "seed": seed, "prompts": job.editor.refine.prompts if job.plans and job.editor.refine else ""
    }
    return {
        "model": job.lm.name, "method": method, "dataset": Path(job.cases.source).name, "edits": edits, **settings,
        "stages": stages, "total": rounded["total", "accelerated"],
        "stage_one": {"flops": one.total, "flops_per_step": one.step, "matmul_rate": rate,
        "share": one.total / spent / rate}, "peak_memory": peak,
        "counts": _counts(job), "provenance": _provenance(job, random_weights),
    }  # fmt: skip


def _job(
    model: str, method: str, edits: int, data: str, steps: int, random: bool, text: str, tokens: int | None,
    dtype: str | None, device: str | None, seed: int, prompts: str
) -> _Job:
    name = size_of(model) if random else model
    editor = methods.method(method, name, seed=seed)
    if plans := isinstance(editor, Editor):
        editor = replace(editor, target=replace(editor.target, steps=steps, stop_below=0.0))
        if editor.refine and prompts:
            editor = replace(editor, refine=replace(editor.refine, prompts=prompts))
    cases = read_cases(data)
    if random:
        lm = random_model(name, dtype, device)
        editor = replace(editor, contexts=random_contexts(seed)) if plans else editor
        found = random_statistics(lm, editor.layers, recipe(name).threshold, seed)
    else:
        lm = load(model, dtype, device)
        found = statistics(lm, text, layers=editor.layers, tokens=tokens)
    return _Job(lm, editor, editor.init(lm, found), found, select(lm, cases, edits, seed))


def _rounds(
    job: _Job, reference: ModuleType | None, literal: int, rounds: int, evaluate: bool
) -> tuple[dict[tuple[str, str], float], int, dict[str, list[slow.Part]]]:
    """Median seconds per (stage, path), the highest memory during the first batch, and the literal path's calls."""
    _accelerated(replace(job, editor=_short(job.editor)), False)
    reset_peak(job.lm.device)
    found, peak, calls = [], 0, {}
    for turn in range(rounds):
        paths = ("accelerated", "literal") if turn % 2 == 0 else ("literal", "accelerated")
        for path in paths[: 2 if reference else None]:
            if path == "accelerated":
                found.append({(k, path): v for k, v in _accelerated(job, evaluate).items()})
                peak = peak or peak_memory(job.lm.device)
            elif reference:
                calls = calls or _literal(job, reference, literal, evaluate)
                found.append({(k, path): v for k, v in slow.seconds(job.lm, calls).items()})
    keys = dict.fromkeys(key for one in found for key in one)
    return {key: median(one[key] for one in found if key in one) for key in keys}, peak, calls


def _short(editor: Editor | GradientEditor) -> Editor | GradientEditor:
    """The same in a few steps, to warm up."""
    if not isinstance(editor, Editor):
        return editor
    return replace(
        editor, target=replace(editor.target, steps=min(2, editor.target.steps)),
        refine=editor.refine and replace(editor.refine, steps=1)
    )


def _accelerated(job: _Job, evaluate: bool) -> dict[str, float]:
    """Seconds of one batch: of its stages as the edit's record has them, and of all of it;
    then those of the evaluation."""
    seconds, (edit, _) = slow.timed(
        job.lm.device, lambda: job.editor.step(job.lm, [c.request for c in job.cases], job.state)
    )
    found = {name: edit.record.seconds[name] for name in STAGES if name in edit.record.seconds} | {"total": seconds}
    return found | (
        {"evaluation": slow.timed(job.lm.device, lambda: evaluation(job.lm, job.cases))[0]} if evaluate else {}
    )


def _literal(job: _Job, reference: ModuleType, count: int, evaluate: bool) -> dict[str, list[slow.Part]]:
    """The literal path's calls, each warmed up on one step."""
    calls = slow.parts(reference, job.lm, job.cases, count, job.editor, job.state, job.statistics)
    calls = {name: parts for name, parts in calls.items() if evaluate or name != "evaluation"}
    for name in ("targets", "refinement", "keys"):
        for part in calls.get(name, ()):
            part.call(min(part.steps, 1))
    return calls


def _operations(job: _Job) -> dict[str, slow.Work]:
    """Floating-point operations of the stages that are matrix products of the model, in a pass of their own."""
    lm, editor, contexts, layers = job.lm, job.editor, job.state.contexts, job.editor.layers
    asked = [c.request for c in job.cases]
    if not job.plans:
        passes = Passes(lm, rewriting_rows(lm.tokenizer, asked, contexts), editor.rule.tokens)
        # each step's slopes, and the losses after the last
        read = slow.flops(lambda _: passes.slopes(editor.modules))
        return {"slopes": slow.Work(editor.rule.steps * read.total, read.total)}

    def plan(steps: int) -> Any:
        return optimize_targets(lm, asked, contexts, layers[-1], replace(editor.target, steps=steps))

    def read(_: int = 0) -> Any:
        reader = KeyReader(lm, asked, contexts, layers[-1], 2 * editor.target.tokens)
        return [reader.read(layer)[0] for layer in layers][-1]

    found = {"targets": slow.flops(plan, editor.target.steps), "keys": slow.flops(read)}
    if rule := editor.refine:
        reader = editor.reading.reader(lm, Rows.of(lm.tokenizer, asked, contexts), layers[-1])
        targets, through = plan(1), editor.through(lm, job.state, reader, layers[-1])
        found["refinement"] = slow.flops(
            # a line search tries as many plans, each at the same cost
            lambda steps: refine(lm, asked, contexts, targets, through, replace(rule, steps=steps, optimizer="sgd")),
            rule.steps
        )
    return found


def _stage(name: str, seconds: dict[tuple[str, str], float], counted: dict[str, float], edits: int) -> dict[str, Any]:
    own, other = seconds[name, "accelerated"], seconds.get((name, "literal"))
    return {
        "stage": name, "seconds": own, "seconds_per_edit": own / edits, "flops": counted.get(name),
        "literal_seconds": other, "literal_flops": counted.get(f"literal_{name}"),
        "ratio": other / own if other else None,
    }  # fmt: skip


def matmul_rate(lm: LanguageModel, longest: float = 0.1, largest: int = 16384) -> float:
    """`product_rate` in the model's dtype on its device."""
    return product_rate(lm.dtype, lm.device, longest, largest)


def product_rate(dtype: torch.dtype, device: torch.device, longest: float = 0.1, largest: int = 16384) -> float:
    """FLOP per second of the best square product (`kernels.linear`), 2 n³ each.

    n doubles from 512 until one product takes `longest` seconds, or up to `largest`; best of three.
    """
    size, best, seconds = 512, 0.0, 0.0
    while seconds < longest and size <= largest:
        one, other = torch.rand(2, size, size, dtype=dtype, device=device)
        linear(one, other)
        seconds = min(_product(one, other) for _ in range(3))
        best, size = max(best, 2 * size**3 / seconds), 2 * size
    return best


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return slow.timed(one.device, lambda: linear(one, other))[0]


def _counts(job: _Job) -> dict[str, int]:
    """Rows and tokens of Stage I's rewriting prompts; `active` tokens are those from the subject's last one on."""
    rows = rewriting_rows(job.lm.tokenizer, [c.request for c in job.cases], job.state.contexts)
    return {
        "contexts": len(job.state.contexts), "rows": len(rows), "tokens": sum(len(r.ids) for r in rows),
        "active": sum(len(r.ids) - r.lookup for r in rows)
    }


def _provenance(job: _Job, random_weights: bool) -> dict[str, Any]:
    known = {
        "origin": job.lm.origin, "dtype": str(job.lm.dtype).removeprefix("torch."), "device": str(job.lm.device),
        "processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()
    } | accelerator(job.lm.device)
    keys = getattr(job.statistics, "source", {})
    if random_weights:
        keys = "random keys with independent coordinates, half of the spectrum below the threshold"
    return known | {
        "dataset_digest": job.cases.digest, "statistics": keys, "contexts": list(job.state.contexts),
        "date": datetime.date.today().isoformat(), "versions": versions()
    }


def text(result: dict[str, Any]) -> str:
    """A result of `bench` for a terminal: a row per stage, then what the numbers rest on."""
    frame = pd.DataFrame(result["stages"])
    whole = {"stage": "edit", "seconds": result["total"], "seconds_per_edit": result["total"] / result["edits"]}
    shown = ["stage", "seconds", "seconds_per_edit"] + ["literal_seconds", "ratio"] * bool(result["literal_requests"])
    frame = pd.concat([frame, pd.DataFrame([whole])], ignore_index=True)[shown]
    one, known = result["stage_one"], result["provenance"]
    first = "slopes" if result["stages"][0]["stage"] == "slopes" else "stage I"
    lines = [
        f"{result['model']}, {result['method']}: {result['edits']} edits of {result['dataset']}, "
        f"{result['steps']} step{'s' * (result['steps'] > 1)}, "
        f"{known['dtype']} on {known['device']}, {known['threads']} threads",
        plain(frame, 3),
        f"{first}: {one['flops_per_step'] / 1e9:.3g} GFLOP a step, {100 * one['share']:.0f} % of the "
        f"{one['matmul_rate'] / 1e9:.3g} GFLOP/s of this machine's matrix product",
        f"peak memory: {result['peak_memory'] / 2**30:.2f} GiB",
    ]
    if result["literal_requests"]:
        lines.append(
            f"literal: measured on {result['literal_requests']} of {result['edits']} requests, multiplied up by tokens"
        )
    return "\n".join(lines)


def write(result: dict[str, Any], path: str | Path) -> None:
    """Write the whole result as JSON, all or nothing."""
    write_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
