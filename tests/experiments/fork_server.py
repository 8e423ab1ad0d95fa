"""Runs `metake` commands in forks of this very process: each is a process of its own that can be killed, without the
seconds that a fresh Python needs to import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

CLIENT = """#!/bin/sh
exec "{python}" -S -c 'import json, os, socket, sys
there = socket.socket(socket.AF_UNIX); there.connect("{address}")
there.sendall(json.dumps([os.getcwd(), *sys.argv[1:]]).encode() + b"\\n")
told = json.loads(there.makefile().readline() or "[137, \\"killed\\\\n\\"]")
print(told[1], end=""); sys.exit(told[0])' "$@"
"""


class ForkServer:
    """`python` is a program to be called like Python, with -m metake and a command's words."""

    def __init__(self, folder: Path, main: Callable[[list[str]], int]) -> None:
        address, self.python, self.pids = str(folder / "socket"), folder / "python", folder / "pids"
        self.python.write_text(CLIENT.format(python=sys.executable, address=address))
        self.python.chmod(0o755)
        self.pids.mkdir()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(address)
        self._socket.listen()
        self._main, self.pid = main, os.fork()
        if not self.pid:
            self._serve()

    def _serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            there, _ = self._socket.accept()
            if not os.fork():
                try:
                    self._work(there)
                finally:  # whatever it raises: a fork must not go on as the test
                    os._exit(1)

    def _work(self, there: socket.socket) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        folder, _, module, *words = json.loads(there.makefile().readline())
        mine = self.pids / str(os.getpid())
        mine.touch()
        os.chdir(folder)
        said = Path(f"{mine}.out")
        with said.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = self._main(words)
        mine.unlink()
        there.sendall(json.dumps([code, f"{module}\n{said.read_text()}"]).encode() + b"\n")

    def kill_workers(self) -> int:
        """SIGKILL to what is at work; how many there were."""
        killed = 0
        for file in self.pids.glob("[0-9]*"):
            if not file.suffix:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.name), signal.SIGKILL)
                    killed += 1
                file.unlink()
        return killed

    def close(self) -> None:
        self.kill_workers()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._socket.close()
