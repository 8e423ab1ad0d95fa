"""MetaKE v3 Table 1: methods on both data formats, edits in sequential batches, every case evaluated after the last."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from metake.runs import RunConfig, run

PRIMARY = ("memit", "alphaedit", "metake")


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
) -> pd.DataFrame:
    """Run every (data set, method, seed) and collect the metrics, in percent.

    out: folder of the runs, which are resumable; None: a temporary one. One row per run, and one "pre-edit" row per
    data set and seed, measured on the same cases before the first edit. Columns: dataset, method, seed, metrics, seconds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root, rows = Path(out or scratch), []
        for name, source in (data or {"CounterFact format": "facts", "ZsRE format": "facts-zsre"}).items():
            for seed in seeds:
                for place, method in enumerate(methods):
                    folder = root / f"{Path(source).stem}-{method}-{seed}"
                    sampled = generate and "zsre" not in Path(source).stem
                    if not (folder / "summary.json").is_file():
                        run(RunConfig(model, method, source, edits, batch, seed, text, text_tokens, generate=sampled), folder)
                    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
                    fixed = {"dataset": name, "seed": seed, "edits": edits, "batch": batch}
                    if not place:
                        rows.append(fixed | {"method": "pre-edit", "seconds": 0.0} | summary["before"])
                    rows.append(fixed | {"method": method, "seconds": summary["seconds"]["total"]} | summary["after"])
    return pd.DataFrame(rows)


def summarize(records: pd.DataFrame, metrics: Sequence[str] = ("efficacy", "generalization", "specificity")) -> pd.DataFrame:
    """Mean and standard deviation over seeds per data set and method, in the order of first appearance."""
    grouped = records.groupby(["dataset", "method"], sort=False)[list(metrics)]
    mean, deviation = grouped.mean(), grouped.std(ddof=0)
    return mean.join(deviation, rsuffix="_sd").reset_index()
