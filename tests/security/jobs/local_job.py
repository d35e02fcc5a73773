"""A job on this machine, started by our launcher in a process of its own, and looked at from outside."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.security.jobs.doors import Listening, listening
from tests.support.processes import forked

GARBAGE = [b"", b"\n", b"[" * 60_000 + b"\n", b"\0" * 8, b"\1" + b"\0" * 7 + b"x" * 1000, b"HELLO 1 2 3\n", b"x" * 300]
"""What a stranger may send; `test_strangers.py` has more of it."""

CODE = """
import json, sys
from runtime.processes.launch import launch
answers = launch([{module!r}, {sharing!r}, {folder!r}], num_ranks=2, timeout_s=600)
print(json.dumps([json.loads(answer) for answer in answers]))
"""


@dataclass
class Job:
    process: subprocess.Popen[str]
    folder: Path

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 90
        while not all((self.folder / name).exists() and self.ready(name) for name in names):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, names
            time.sleep(0.01)

    def ready(self, name: str) -> bool:
        return not name.startswith("pid") or bool((self.folder / name).read_text())

    def doors(self, rank: int) -> list[Listening]:
        return listening(self.pid(rank))

    def wait_for_doors(self) -> list[Listening]:
        """Those of rank 0, which waits for the others."""
        deadline = time.monotonic() + 60
        while not (doors := self.doors(0)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return doors

    def let(self, name: str) -> None:
        (self.folder / name).touch()

    def end(self) -> list[dict[str, Any]]:
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, err
        return list(json.loads(out))


@contextlib.contextmanager
def started(module: str, sharing: str, folder: Path, root: Path) -> Iterator[Job]:
    """`python -P -m MODULE SHARING FOLDER` on two ranks."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = ["-c", CODE.format(module=module, sharing=sharing, folder=str(folder))]
    process = forked.popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield Job(process, folder)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate()
