"""Servers for tests: one in a thread of this process, over any model; or the command, as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from partitioner.serving.http.server import bound, config_of
from partitioner.serving.http.service import Service
from partitioner.storage.example import EXAMPLE_MODEL

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = ROOT / "examples" / "serving" / "plain_chat.jinja"


@contextmanager
def in_thread(service: Service) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """Its address, and the loop that it runs on."""
    with bound("127.0.0.1", 0) as listening, contextlib.closing(service):
        server = uvicorn.Server(config_of(service))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(loop, server, listening), daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", loop
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def _run(loop: asyncio.AbstractEventLoop, server: uvicorn.Server, listening: socket.socket) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(server.serve(sockets=[listening]))


@dataclass
class Served:
    """A process of `partitioner serve`."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    _ranks: list[int] = field(default_factory=list)

    def ranks(self) -> list[int]:
        """The processes of its ranks, in the order in which they were started."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
                command = Path(path.parent, "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and b"runtime.processes.worker" in command and fields[0] != "Z":
                found.append(int(path.parent.name))
        return sorted(found)

    def end(self, number: int = signal.SIGTERM, *, within_s: float = 30) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(within_s)


@contextmanager
def served(folder: Path, options: Sequence[str], *, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """The command on the model that comes along, at a port that is free; killed at the end if it is still there."""
    log = folder / "log"
    command = [sys.executable, "-m", "partitioner", "serve", str(EXAMPLE_MODEL), "--port", "0"]
    command += ["--device", "cpu", "--chat-template", str(TEMPLATE), *options]
    environ: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environ, start_new_session=True)
    server = Served(process, log)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1 ", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        server.url = found[1]
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
