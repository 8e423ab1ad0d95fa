"""A disk that fails on purpose: at a chosen file operation it is full, forbids, or the process dies.

Python tells an audit hook of every open, rename, mkdir and remove before it happens; the rest (fsync, what Rust writes,
the exchange of two names) is wrapped. Files below the watched folder count, all others are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from metake.support import storage

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
ERRORS = {"disk full": errno.ENOSPC, "forbidden": errno.EACCES, "read error": errno.EIO}


class Killed(BaseException):
    """The process is dead: nothing that it would do after this reaches the disk."""


@dataclass
class Faults:
    """What happens at the `at`-th operation below `root`: "killed" (an exception, and every later operation too),
    "SIGKILL", or an error's name. An operation that writes leaves half of its content behind.
    """

    root: Path
    at: int
    what: str
    seen: list[str] = field(default_factory=list)
    busy: bool = False

    @property
    def struck(self) -> bool:
        return len(self.seen) >= self.at

    def meet(self, name: str, path: str, half: Callable[[], None] | None = None) -> None:
        if self.busy or not str(path).startswith(str(self.root)) or str(path).endswith(".lock"):
            return
        self.seen.append(f"{name} {Path(path).name}")
        if len(self.seen) < self.at or (len(self.seen) > self.at and self.what != "killed"):
            return
        if half and len(self.seen) == self.at:
            self.busy = True
            half()
            self.busy = False
        if self.what == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "killed":
            raise Killed(self.seen[-1])
        raise OSError(ERRORS[self.what], os.strerror(ERRORS[self.what]), str(path))


ACTIVE: list[Faults] = []


def _hook(event: str, args: tuple) -> None:
    if not ACTIVE:
        return
    if event == "open" and isinstance(args[0], str | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.fspath(args[0])
        ACTIVE[-1].meet("write", path, lambda: Path(path).write_bytes(b'{"half": '))
    elif event in CHANGES and isinstance(args[0], str | os.PathLike):
        ACTIVE[-1].meet(event, os.fspath(args[1] if event == "os.rename" else args[0]))


@contextlib.contextmanager
def faults(root: Path, at: int = sys.maxsize, what: str = "killed") -> Iterator[Faults]:
    """Let the `at`-th file operation below a folder fail within the block; gives what was done so far."""
    if not getattr(sys, "_metake_hook", None):
        sys.addaudithook(_hook)
        sys._metake_hook = True
    layer, save, sync, exchange = Faults(root, at, what), storage.save_file, os.fsync, storage._exchange

    def save_file(tensors, path, metadata=None):
        def half():
            save(tensors, path, metadata)
            os.truncate(path, os.path.getsize(path) // 2)

        layer.meet("tensors", str(path), half)
        save(tensors, path, metadata)

    def fsync(descriptor):
        layer.meet("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def swap(one, other):
        layer.meet("exchange", str(other))
        return exchange(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "save_file", save_file)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(storage, "_exchange", swap)
        ACTIVE.append(layer)
        try:
            yield layer
        finally:
            ACTIVE.remove(layer)


def leftovers(folder: Path) -> list[str]:
    """What an unfinished write left behind, locks apart."""
    return [str(p) for p in folder.rglob(".*") if p.suffix in (".partial", ".retired")]


def forked(act: Callable[[], None], after: float | None = None) -> int:
    """Carry out `act` in a copy of this process, killed after so many seconds if that is asked; its exit code.

    A copy has all that is loaded and patched here: it starts in milliseconds.
    """
    sys.stdout.flush(), sys.stderr.flush()
    if not (child := os.fork()):
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()  # os._exit tells nobody
        finally:
            os._exit(code)
    if after is not None:
        handle = os.pidfd_open(child)
        select.select([handle], [], [], after)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moments(count: int, seed: int, most: int) -> list[int]:
    """So many operations drawn from the first `most`."""
    return [1 + random.Random(f"{seed}/{i}").randrange(most) for i in range(count)]
