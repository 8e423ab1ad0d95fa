"""The machine at hand: its device, its memory, versions. Nothing else asks which device it is."""

from __future__ import annotations

import logging
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import transformers
from torch import Tensor

from metake.support.errors import ParameterError
from metake.support.version import VERSION

log = logging.getLogger("metake")
T = TypeVar("T")
CPUINFO = "/proc/cpuinfo"


def default_device() -> torch.device:
    """The best device at hand: one CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take_accelerator(number: int) -> None:
    """Let `default_device` mean this one of several GPUs."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number)


def usable(name: str | torch.device) -> torch.device:
    """A device by name. Raises ParameterError if this machine or this torch has none such."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ParameterError(
            f"device {str(name)!r} cannot be used here; expected one that torch has, such as 'cpu', or none for "
            f"{str(default_device())!r}, the best at hand"
        ) from error


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here on; a CPU's cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Highest memory in use so far, bytes: of the accelerator's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # no such call outside POSIX
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sent(values: Sequence, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers on a device, without waiting for what it still computes."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the accelerator, or of the machine on a CPU."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def working_memory(device: torch.device) -> int:
    """Bytes that one micro-batch may take: a quarter of what is free, on a CPU 2 GiB at most.

    What is larger a CPU's allocator gives back after every step: a tenth of Stage I's time on smollm2-135m.
    """
    free = free_memory(device) // 4
    return free if device.type == "cuda" else min(free, 2**31)


def start_cost(device: torch.device) -> int:
    """Tokens whose computation takes as long as starting one more pass over a model's blocks.

    CPU: 48, 96 and 160 took 4.7, 4.3 and 4.2 s a step of Stage I (smollm2-135m, 100 requests); of a GPU an estimate.
    """
    return 512 if device.type == "cuda" else 96


def halving(attempt: Callable[[int], T], tokens: int, fitted: dict[str, int] | None = None) -> T:
    """`attempt(tokens)`; after an out-of-memory error again with half as many, down to one token (or row).

    The attempt must start anew each time: a micro-batch decides memory, never the result. fitted: what it came down to
    is kept there, and the next attempt of the same function begins with it.
    """
    fitted, name = {} if fitted is None else fitted, attempt.__qualname__
    tokens = min(tokens, fitted.get(name, tokens))
    while True:
        try:
            return attempt(tokens)
        except RuntimeError as error:
            said = str(error)  # of a library's own workspace too
            full = isinstance(error, torch.OutOfMemoryError) or "can't allocate" in said or "ALLOC_FAILED" in said
            if not full or tokens <= 1:
                raise
        tokens = fitted[name] = tokens // 2
        log.warning("out of memory: going on with micro-batches half as large (%d)", tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@cache
def mkl_is_slow() -> bool:
    """Whether MKL, which torch's float32 products call, leaves half of this processor unused: AVX-512 not Intel's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return both and wide and "AuthenticAMD" in (_read(CPUINFO) or platform.processor())


def processor() -> str:
    """The processor's name, and the widest instructions that torch uses on it, such as "AMD EPYC, AVX2"."""
    named = re.search(r"model name\s*:\s*(.+)", _read(CPUINFO))
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def accelerator(device: torch.device) -> dict[str, Any]:
    """A GPU's name, memory in bytes and driver, and whether its float32 products are exact; {} for a CPU."""
    if device.type != "cuda":
        return {}
    found, inside = torch.cuda.get_device_properties(device), torch.backends.cuda.matmul.fp32_precision
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read("/proc/driver/nvidia/version"))
    return {
        "accelerator": found.name, "accelerator_memory": found.total_memory, "driver": driver[1] if driver else "",
        "cuda": torch.version.cuda, "float32_products": "TF32" if inside == "tf32" else "exact"
    }


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


def versions() -> dict[str, str]:
    """Versions that decide a number's last digits."""
    return {
        "metake": VERSION, "python": sys.version.split()[0], "torch": torch.__version__,
        "transformers": transformers.__version__
    }
