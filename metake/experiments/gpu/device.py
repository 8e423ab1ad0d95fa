"""What the device itself can do: the rates that an edit's seconds are compared with."""

from __future__ import annotations

import subprocess
from typing import Any

import pandas as pd
import torch

from metake.experiments.speed.bench import product_rate
from metake.experiments.speed.literal import timed
from metake.support.machine import free_memory

LAUNCHES = 1000


def measure(device: torch.device, longest: float = 0.1, largest: int = 16384, copied: int = 2**32) -> pd.DataFrame:
    """Rates of matrix products by precision, of copies within the device and to it, and what starting a kernel takes.

    longest, largest: as in `bench.product_rate`; copied: bytes. One row per quantity: quantity, value, unit.
    """
    rates = {"float32, exact": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    rows = [
        (f"matrix product, {name}", product_rate(dtype, device, longest, largest) / 1e12, "TFLOP/s")
        for name, dtype in rates.items()
    ]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rows.insert(1, ("matrix product, float32 as TF32", product_rate(torch.float32, device, longest, largest) / 1e12,
                        "TFLOP/s"))  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(before)
    copied = min(copied, free_memory(device) // 4)
    host = torch.zeros(min(copied, 2**28), dtype=torch.uint8)
    target = torch.empty_like(host, device=device)
    rows += [
        ("copy within the device, read and written", copy_rate(device, copied) / 1e9, "GB/s"),
        ("copy to the device", len(host) / _best(device, lambda: target.copy_(host)) / 1e9, "GB/s"),
        ("start of a kernel", _launch(device) * 1e6, "µs"),
        ("memory free", free_memory(device) / 2**30, "GiB"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["quantity", "value", "unit"])


def copy_rate(device: torch.device, copied: int) -> float:
    """Bytes per second that a copy of so many bytes within the device reads and writes."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copied / _best(device, lambda: target.copy_(source))


def _best(device: torch.device, call: Any) -> float:
    call()
    return min(timed(device, call)[0] for _ in range(3))


def _launch(device: torch.device) -> float:
    """Seconds from one small operation to the next, all of them started before any is waited for."""
    one = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return _best(device, many) / LAUNCHES


def system_report() -> str:
    """The driver's own words on the devices, in one line each; "" where its tool is not."""
    words = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if not found.returncode else ""
