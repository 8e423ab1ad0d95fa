"""MetaKE v3 Table 1: methods on both data formats, edits in sequential batches, every case evaluated after the last."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metake.experiments.decision import Decision, interval, one_and_none_against, with_interval
from metake.experiments.runs import RunConfig, Unedited, holds, open_run, run
from metake.support.errors import ParameterError, near_misses

PRIMARY = ("memit", "alphaedit", "metake")
FREE = ("efficacy_exact", "efficacy_contained", "generalization_exact", "generalization_contained")
METRICS = ("efficacy", "generalization", "specificity", "specificity_pre_edit", "fluency", "consistency")


def comparison(
    model: str = "tiny",
    methods: Sequence[str] = PRIMARY,
    data: dict[str, str] | None = None,
    edits: int = 60,
    batch: int = 20,
    seeds: Sequence[int] = (0,),
    text: str = "embedded",
    text_tokens: int | None = None,
    generate: bool = False,
    out: str | Path | None = None,
    part: str = "all",
    shared: dict[tuple[str, int], Unedited] | None = None,
) -> pd.DataFrame:
    """Run every (data set, method, seed): sequential batches, all cases evaluated after the last.

    out: folder of the runs, which are resumable; None: a temporary one; part: of the data's subjects (`part_of`);
    shared: what an earlier call of the same settings found of the unedited model, by data set and seed, to be filled.
    One row per case, run and method, and one per case and seed for "pre-edit", measured before the first edit:
    dataset, method, seed, id, metrics as shares; of a method that refines, its own outer loss at Stage I's plan and at
    the one that was kept, "outer_before" and "outer_after".
    attrs["runs"]: the summary of every run.
    """
    rows, summaries = [], []
    shared = {} if shared is None else shared
    with tempfile.TemporaryDirectory() as scratch:
        for name, source in (data or {"CounterFact format": "facts", "ZsRE format": "facts-zsre"}).items():
            for seed in seeds:
                # of every method: the model before any edit, and the plans of those that plan alike
                unedited = shared.setdefault((name, seed), Unedited())
                for place, method in enumerate(methods):
                    sampled = generate and "zsre" not in Path(source).stem
                    config = RunConfig(
                        model, method, source, edits, batch, seed, text, text_tokens, generate=sampled, part=part
                    )
                    folder = made(config, Path(out or scratch), unedited)
                    summaries.append(told(name, config, folder))
                    rows += run_rows(folder, name, method, seed, before=not place)
    frame = pd.DataFrame(rows)
    frame.attrs["runs"] = summaries
    return frame


def place(folder: Path, config: RunConfig) -> Path:
    """Where a run of several stands."""
    return folder / f"{Path(config.data).stem}-{config.method.replace('/', '-')}-{config.seed}"


def made(config: RunConfig, folder: Path, unedited: Unedited) -> Path:
    """The folder of a run among several in `folder`; it is carried out unless it is finished."""
    if not (holds(own := place(folder, config), config) and (own / "summary.json").is_file()):
        run(config, own, shared=unedited)
    return own


def told(dataset: str, config: RunConfig, folder: Path) -> dict[str, Any]:
    """What a finished run says of itself, and whose it is."""
    return {"dataset": dataset, "method": config.method, "seed": config.seed, "folder": folder.name} | json.loads(
        (folder / "summary.json").read_text(encoding="utf-8")
    )


def run_rows(folder: Path, dataset: str, method: str, seed: int, before: bool) -> list[dict[str, Any]]:
    """A finished run's rows as `comparison` has them; before: with those of "pre-edit"."""
    outer, rows = _outer_loss(folder), []
    for label, file in ([("pre-edit", "before.jsonl")] if before else []) + [(method, "cases.jsonl")]:
        rows += [
            {"dataset": dataset, "method": label, "seed": seed} | row
            | (outer.get(row["id"], {}) if label == method else {})
            for row in case_rows(folder / file)
        ]
    return rows


def _outer_loss(folder: Path) -> dict[str, dict[str, float]]:
    """By case: the outer loss before and after the refinement, as the edits' records tell it; {} without one."""
    return {
        id: {f"outer_{end}": trace["refined"][end] for end in ("before", "after")}
        for record in open_run(folder)[1].records()
        for id, trace in record.trace.items()
        if "refined" in trace
    }


def case_rows(file: Path) -> list[dict]:
    """What a run keeps of its cases (before.jsonl, cases.jsonl), a row each, without generations."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in row.items() if k != "generations"} for row in rows]


def summarize(records: pd.DataFrame) -> pd.DataFrame:
    """Percent per data set and method: mean over a seed's cases, then mean and sample standard deviation over seeds."""
    metrics = [m for m in (*METRICS, *FREE) if m in records and records[m].notna().any()]
    by_seed = 100 * records.groupby(["dataset", "method", "seed"], sort=False)[metrics].mean()
    grouped = by_seed.groupby(["dataset", "method"], sort=False)
    mean, deviation = grouped.mean(), grouped.std()
    return labelled(
        (mean.join(deviation.add_suffix("_sd")) if records.seed.nunique() > 1 else mean).reset_index(), records
    )


def harmonic_mean(found: pd.DataFrame) -> pd.Series:
    """Of efficacy, generalization and specificity in each row, the field's summary score; 0 where one of them is."""
    three = found[list(METRICS[:3])]
    return (3 / (1 / three.where(three > 0)).sum(axis=1)).where((three > 0).all(axis=1), 0.0)


def labelled(frame: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    """`frame`, computed from `records`, with their label and provenance."""
    frame.attrs = {k: records.attrs[k] for k in ("label", "provenance") if k in records.attrs}
    return frame


def paired_differences(
    records: pd.DataFrame, one: str = "metake", other: str = "alphaedit", draws: int = 4000, seed: int = 0,
    level: float = 0.95, metrics: Sequence[str] = METRICS[:3]
) -> pd.DataFrame:
    """`one` minus `other` on the same cases, with a bootstrap interval over cases (default: of 95 %).

    A case that several seeds drew counts once, with its mean: to draw it as if it were two would be too sure.

    metrics: columns of the records; those of `METRICS` and `FREE`, shares, in percentage points, others as they are.
    Raises ParameterError if one of the two is not among the records' methods.
    """
    for name in (one, other):
        if name not in set(records.method):
            raise ParameterError(near_misses(name, set(records.method), "method among the records"))
    generator, rows = np.random.default_rng(seed), []
    for dataset, group in records.groupby("dataset", sort=False):
        for metric in metrics:
            sides = [group[group.method == m].set_index(["seed", "id"])[metric] for m in (one, other)]
            paired = (100 if metric in (*METRICS, *FREE) else 1) * (sides[0] - sides[1]).dropna()
            difference = paired.groupby("id", sort=False).mean().to_numpy()  # one that several seeds drew counts once
            means = generator.choice(difference, (draws, len(difference))).mean(1)
            low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
            rows.append(
                {
                    "dataset": dataset, "metric": metric, "cases": len(difference), "difference": difference.mean(),
                    "low": low, "high": high
                }
            )
    return pd.DataFrame(rows)


def differences(records: pd.DataFrame, pairs: dict[str, str] | None = None, **bootstrap: Any) -> pd.DataFrame:
    """`paired_differences` of every pair: other → one, so that a column `method` says what is subtracted.

    pairs: default "metake" minus every other method of the records. The label of the records goes along.
    """
    pairs = pairs or {m: "metake" for m in records.method.unique() if m not in ("metake", "pre-edit")}
    if not pairs:
        raise ParameterError(
            f"the records hold nothing to compare MetaKE with; found {', '.join(records.method.unique())}: add a method"
        )
    found = pd.concat(
        [paired_differences(records, one, other, **bootstrap).assign(method=other) for other, one in pairs.items()],
        ignore_index=True,
    )
    return labelled(found[["dataset", "metric", "method", "cases", "difference", "low", "high"]], records)


def over(records: pd.DataFrame, base: str = "alphaedit", **bootstrap: Any) -> pd.DataFrame:
    """`paired_differences` of every method minus `base`: column `method` says whose. The label goes along."""
    own = [m for m in records.method.unique() if m not in (base, "pre-edit")]
    found = [paired_differences(records, one, base, **bootstrap).assign(method=one) for one in own]
    return labelled(pd.concat(found, ignore_index=True), records)


def setting(records: pd.DataFrame) -> pd.DataFrame:
    """What was measured, and how, in one row per question: from the runs, or from a recording's provenance."""
    runs, told = records.attrs.get("runs"), records.attrs.get("provenance", {})
    first = runs[0]["config"] if runs else told or records.attrs["asked"]
    edits, batch = first["edits"], min(first["batch"], first["edits"])
    batches = "in one batch"
    if batch < edits:
        batches = f"in {-(-edits // batch)} consecutive batches of {batch}; the weights accumulate"
    tokens = "all" if first.get("text_tokens") is None else f"{first['text_tokens']:,}"
    if told:
        statistics, data = told["statistics"], told["dataset"]
    else:
        statistics = f"{Path(first['text']).name}, {tokens} tokens"
        sources = [(r["dataset"], r["data"]["source"]) for r in runs] if runs else first["data"].items()
        data = ", ".join(dict.fromkeys(f"{name}: {source}" for name, source in sources))
    seeds = sorted(records.seed.unique())
    rows = {
        "model": first["model"],
        "key statistics": statistics,
        "data": data,
        "editing": f"{edits} edits {batches}",
        "evaluated": "every edited case once, after the last batch",
        "seeds" if len(seeds) > 1 else "seed": ", ".join(map(str, seeds)),
    }
    return labelled(pd.DataFrame({"what": list(rows), "here": list(rows.values())}), records)


def claimed(differences: pd.DataFrame) -> pd.DataFrame:
    """The rows that the paper's claim is about: efficacy and generalization, forced or free."""
    return differences[differences.metric.str.startswith(("efficacy", "generalization"))]


def decide(differences: pd.DataFrame) -> Decision:
    """Is one above the other in efficacy or generalization, by an interval above zero, and in neither of them below?"""
    return one_and_none_against(
        interval(f"{r.metric} {r.dataset}", r.difference, r.low, r.high) for r in claimed(differences).itertuples()
    )


def judge(differences: pd.DataFrame) -> dict[str, Any]:
    """The paper's claim, efficacy and generalization above AlphaEdit's: holds if an interval lies above zero and none
    below; does not hold if one lies below; inconclusive if all include zero."""
    parts = [
        f"{r.metric.replace('_', ' ')} {r.dataset} {with_interval(r.difference, r.low, r.high)}"
        for r in claimed(differences).itertuples()
    ]
    return decide(differences).quiet().verdict("MetaKE − AlphaEdit in points: " + "; ".join(parts))
