"""MetaKE v3 Tables 5 and 6: what a batch of edits costs per method, stage by stage, in one process on one machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from metake import methods
from metake.algebra.geometry import Dense
from metake.editing.statistics import statistics
from metake.experiments.cases import read_cases, select
from metake.experiments.decision import all_of, at_least, at_most, for_and_against, opposite, undecided
from metake.experiments.runs import edit_sequence
from metake.experiments.speed.bench import bench
from metake.language.model import load
from metake.report.style import style

PLAIN = "MetaKE, plain prompts"  # L_edit on the plain prompt alone: v3 eq. 97, and what `metake` takes
VARIANTS = {PLAIN: {"method": "metake", "prompts": "plain"}, "metake": {"method": "metake", "prompts": "contexts"}}
PRIMARY = ("memit", "alphaedit", "metake", PLAIN)
EDIT = ("slopes", "targets", "refinement", "keys", "solve", "write")  # stages of an edit; the evaluation comes after it


def run_time(model: str = "tiny", methods_: Sequence[str] = PRIMARY, **settings: Any) -> pd.DataFrame:
    """`bench` of each method, one after the other in this process; "metake": with Stage I's contexts, more rows than
    `PLAIN` has. settings: bench's, such as edits, steps, data.

    One row per method, stage and path ("accelerated", "literal"): seconds of the batch (literal: measured on
    `literal_requests` and multiplied up), seconds_per_edit, flops; share of the machine's matrix product that Stage I
    reaches, and peak_gib, the process's highest memory until then, per method. The evaluation is the same for all
    methods, and made once. attrs["settings"]: what was asked for, and of which machine.
    """
    rows, found = [], {}
    for place, label in enumerate(methods_):
        changes = VARIANTS.get(label, {"method": label})
        if changes["method"] in methods.GRADIENT | methods.FINE_TUNING:
            changes = changes | {"literal": 0}  # there is no literal path of it to time
        found = bench(model, **settings | changes | {"evaluate": settings.get("evaluate", not place)})
        common = {"share": found["stage_one"]["share"], "peak_gib": found["peak_memory"] / 2**30}
        for stage in found["stages"]:
            for path, prefix in (("accelerated", ""), ("literal", "literal_")):
                if (seconds := stage[f"{prefix}seconds"]) is not None:
                    row = {
                        "method": label, "stage": stage["stage"], "path": path, "seconds": seconds,
                        "seconds_per_edit": seconds / found["edits"]
                    }
                    rows.append(row | {"flops": stage[f"{prefix}flops"]} | common)
    frame = pd.DataFrame(rows).astype({"flops": float})
    asked = {k: found[k] for k in ("edits", "rounds", "seed")} | {
        "steps": settings.get("steps", 25), "literal_requests": settings.get("literal", 0)
    }
    frame.attrs["settings"] = (
        asked
        | {k: found["provenance"][k] for k in ("processor", "threads", "cores")}
        | {"matmul_gflop_per_second": round(found["stage_one"]["matmul_rate"] / 1e9, 1)}
    )
    return frame


def stream(
    model: str = "tiny", method: str = "alphaedit", edits: int = 2000, batch: int = 100, steps: int = 1,
    data: str = "facts", seed: int = 0
) -> pd.DataFrame:
    """A long stream of edits: what the stages cost per edit as the history grows.

    steps: of Stage I, which does not depend on the history; 1 leaves it out but for its forwards.
    Facts come round again when there are fewer than `edits`, each time as new requests. One row per batch:
    edits so far, history ("thin" factor or "matrix"), seconds_per_edit of each stage, and of all of them as `edit`.
    """
    editor = methods.planning(method, model, seed=seed)
    editor = replace(editor, target=replace(editor.target, steps=steps, stop_below=0.0))
    lm = load(model)
    cases = select(lm, read_cases(data), min(edits, len(read_cases(data))), seed)
    requests = [
        replace(case.request, id=f"{case.request.id}/{turn}")
        for turn in range(-(-edits // len(cases)))
        for case in cases
    ][:edits]
    rows = []
    with lm.scratch(editor.paths(lm)):
        for edit, state in edit_sequence(lm, editor, requests, statistics(lm, layers=editor.layers), batch):
            spent = {stage: seconds / len(edit.record.requests) for stage, seconds in edit.record.seconds.items()}
            history = "matrix" if isinstance(state.metrics[editor.layers[-1]], Dense) else "thin"
            rows.append({"edits": state.edits, "history": history} | spent | {"edit": sum(spent.values())})
    return pd.DataFrame(rows)


def growth(records: pd.DataFrame, early: int = 100, late: int = 2000, around: int = 3) -> float:
    """Seconds per edit at edit `late` over those at `early`: each the median of the `around` batches next to it."""
    first, last = (
        records.iloc[(records.edits - at).abs().argsort(kind="stable")[:around]].edit.median() for at in (early, late)
    )
    return last / first


def beside(records: pd.DataFrame, quantity: str = "seconds_per_edit", scale: float = 1.0) -> pd.DataFrame:
    """A quantity of both paths by method and stage, and of all stages of the edit together;
    `ratio` is literal over accelerated.

    Where the literal path lacks a stage (the write is the same in both), its sum lacks it too.
    """
    parts = records[records.stage.isin(EDIT)].groupby(["method", "path"], sort=False)
    both = pd.concat([records, parts[quantity].sum().reset_index().assign(stage="edit")]).dropna(subset=quantity)
    found = both.pivot_table(quantity, ["method", "stage"], "path", sort=False)
    found = found.reindex(columns=[p for p in ("accelerated", "literal") if p in found]) * scale
    if "literal" in found:
        found["ratio"] = found.literal / found.accelerated
    methods, stages = list(dict.fromkeys(records.method)), [*EDIT, "edit", "evaluation"]
    found = found.reindex([(m, s) for m in methods for s in stages if (m, s) in found.index])
    return found.reset_index().rename_axis(columns=None)


def overhead(records: pd.DataFrame) -> pd.DataFrame:
    """Seconds of a whole edit by each variant of MetaKE over those of its base method, per path.

    AlphaEdit is MetaKE without the refinement, so both times are read off one and the same edit:
    edit / (edit − refinement).
    """
    found = beside(records).set_index(["stage", "method"]).drop(columns="ratio", errors="ignore")
    refinement = found.loc["refinement"]
    whole = found.loc["edit"].reindex(refinement.index)
    return (whole / (whole - refinement)).reset_index()


def reported_overhead(table: pd.DataFrame, quantity: str = "seconds", base: str = "alphaedit") -> pd.DataFrame:
    """MetaKE over `base` in a table of the paper: one row per data set and model."""
    sides = [table[table.method == m].set_index(["dataset", "model"])[quantity] for m in ("metake", base)]
    found = (sides[0] / sides[1]).rename("ratio").reset_index()
    found.attrs |= table.attrs
    return found


def spread(records: pd.DataFrame) -> pd.Series:
    """How far timings of the same work lie apart, per path: targets and keys are that in every method.

    Longest over shortest, minus one: what a single timing on this machine may be off. NaN for a path that one method
    alone was timed on: nothing is known of it then.
    """
    same = records[records.stage.isin(["targets", "keys"])].groupby(["path", "method"]).seconds.sum().groupby("path")
    return (same.max() / same.min() - 1).where(same.size() > 1)


def judge_speed(records: pd.DataFrame, promised: float = 10.0) -> dict[str, Any]:
    """This library's promise, that a batch is edited at least `promised` times faster than on the literal path, on the
    processor of the records: it holds if it does for every method timed on both, and does not if it fails for one.

    A ratio may be off by the `spread` of both paths. What multiplying up the literal path may lack is not in it.
    """
    found = beside(records)
    ratios = found[found.stage == "edit"].set_index("method").get("ratio", pd.Series(dtype=float)).dropna()
    if ratios.empty:
        return undecided("", "timing").verdict("the literal path was not timed")
    off = spread(records).reindex(["accelerated", "literal"]).sum(skipna=False)
    decided = all_of(
        at_least(f"{style(method).name}'s ratio", ratio, promised, ratio * off, "timing")
        for method, ratio in ratios.items()
    )
    said = ", ".join(f"{style(method).name} {ratio:.1f} times" for method, ratio in ratios.items())
    return decided.verdict(f"{said}; {processor_of(records)}")


def processor_of(records: pd.DataFrame) -> str:
    """On which processor the times were taken, as far as the records tell."""
    known = records.attrs.get("provenance") or records.attrs.get("settings") or {}
    named = known.get("processor", "a processor that the recording does not name")
    told = {"threads": "{} threads", "matmul_gflop_per_second": "matrix products at {} GFLOP/s"}
    return ", ".join([f"on {named}", *(text.format(known[key]) for key, text in told.items() if key in known)])


def wide(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A table of the paper with a column per model."""
    found = table.pivot_table(quantity, ["dataset", "method"], "model", sort=False)
    found = found.reset_index().rename_axis(columns=None)
    found.attrs |= table.attrs
    return found


def judge(reported: pd.DataFrame, measured: pd.DataFrame, spreads: pd.Series) -> dict[str, Any]:
    """The paper's claim, a range of MetaKE's time over AlphaEdit's, for MetaKE as recorded here:
    holds if the ratio of every path lies in the range to two digits, does not hold if none does;
    inconclusive if it depends on the path.

    spreads: what a timing may be off, per path (`spread`). Of a ratio 1 + refinement / rest both parts may be.
    """
    low, high = round(reported.ratio.min(), 2), round(reported.ratio.max(), 2)
    ratios = measured.set_index("method").loc["metake"].dropna()
    inside = []
    for path, ratio in ratios.items():
        off = 2 * spreads.get(path, math.nan) * (ratio - 1)
        what = f"the ratio on the {path} path"
        ends = at_least(what, ratio, low - 0.005, off, "timing"), at_most(what, ratio, high + 0.005, off, "timing")
        inside.append(all_of(ends))
    told = ", ".join(f"{ratio:.2f} on the {path} path" for path, ratio in ratios.items())
    return for_and_against(all_of(inside), all_of(map(opposite, inside))).verdict(
        f"{told}; {low:.2f} to {high:.2f} in Paper Table 5"
    )
