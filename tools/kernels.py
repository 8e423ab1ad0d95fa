"""Kernels that have their libraries already: forks of one process that imported them.

What a page imports, torch before all, takes seven seconds of a processor, a quarter of what all pages take. Each page
still runs in a process of its own, and what is this project's own is imported there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from jupyter_client.provisioning import local_provisioner

FORKS = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
LIBRARIES = [
    "ipykernel.kernelapp", "IPython.core.display", "matplotlib.pyplot", "matplotlib.backends.backend_svg", "pandas",
    "scipy.stats", "seaborn", "safetensors.torch", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2"
]  # fmt: skip


class Forked:
    """One kernel's process; what jupyter_client asks of a subprocess.Popen."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        begun, told = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_kernel, args=(list(arguments), dict(env), cwd, told), daemon=True)
        self._process.start()
        told.close()
        begun.recv()  # it leads a group of its own: a signal to the group reaches nobody else
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _kernel(arguments: list[str], env: dict[str, str], cwd: str | None, told: Connection) -> None:
    os.setsid()
    told.send(True)
    os.environ.clear()
    os.environ |= env
    os.chdir(cwd or os.curdir)
    from ipykernel.kernelapp import IPKernelApp

    quiet = ["--log-level=ERROR"] * (not any(word.startswith("--log-level") for word in arguments))
    # the fork's own parent: a kernel ends with the process that it was begun for
    IPKernelApp.launch_instance(argv=[*arguments, *quiet, f"--IPKernelApp.parent_handle={os.getppid()}"])


def fork_kernels() -> None:
    """From now on kernels that this process starts are forks; where there is no fork, nothing changes."""
    if FORKS is not None:
        FORKS.set_forkserver_preload(LIBRARIES)
        local_provisioner.launch_kernel = _launch


def _launch(command: list[str], *, env: Mapping[str, str], cwd: str | None = None, **_: Any) -> Forked:
    return Forked(command[command.index("ipykernel_launcher") + 1 :], env, cwd)
