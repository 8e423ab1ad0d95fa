"""A batch on a GPU beside the paper's: its Tables 5 and 6 are of one NVIDIA A100."""

from __future__ import annotations

import math

import pandas as pd

from metake import report
from metake.experiments.speed.run_time import VARIANTS, beside

MODELS = {"gpt2-xl": "GPT2-XL", "gpt-j-6b": "GPT-J", "llama3-8b": "LLaMA3"}
DATASET = "counterfact"  # of the paper's numbers: the batch's facts are of this format


def beside_paper(records: pd.DataFrame) -> pd.DataFrame:
    """`run_time`'s records of several sizes (column model), one row per model and method, as seconds of a batch:

    here, literal (multiplied up), literal / here; paper, paper / here: the paper's own seconds and how many times as
    long; share: of the device's matrix product, in Stage I; GiB here, GB paper: highest memory. NaN where not timed.
    """
    rows = []
    for model, own in records.groupby("model", sort=False):
        whole = beside(own, "seconds").set_index("stage").loc[["edit"]].set_index("method")
        for method, found in whole.iterrows():
            told = own[own.method == method].iloc[0]
            name = VARIANTS.get(method, {"method": method})["method"]
            seconds, gigabytes = (_reported(table, name, model) for table in ("table5", "table6"))
            rows.append(
                {
                    "model": model, "method": name, "here": found.accelerated,
                    "literal": found.get("literal", math.nan), "literal / here": found.get("ratio", math.nan),
                    "paper": seconds, "paper / here": seconds / found.accelerated, "share": told.share,
                    "GiB here": told.peak_gib, "GB paper": gigabytes
                }
            )
    found = pd.DataFrame(rows)
    found.attrs |= {k: v for k, v in records.attrs.items() if k in ("label", "provenance")}
    return found


def _reported(table: str, method: str, model: str) -> float:
    found = report.paper(table)
    found = found[(found.method == method) & (found.dataset == DATASET) & (found.model == MODELS.get(model, ""))]
    return float(found.iloc[0, 3]) if len(found) else math.nan


def line(found: pd.DataFrame) -> str:
    """The first row of `beside_paper` in words."""
    row = found.iloc[0]
    parts = [f"{row.here:.2f} s a batch"]
    for name, told in (("literal", "on the literal path"), ("paper", "in the paper")):
        if not math.isnan(row[name]):
            parts.append(f"{row[name]:.4g} s {told} ({row[f'{name} / here']:.3g} times)")
    parts += [f"Stage I at {100 * row.share:.0f} % of the matrix product", f"{row['GiB here']:.1f} GiB"]
    return ", ".join(parts)
