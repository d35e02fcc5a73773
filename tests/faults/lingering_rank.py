"""What the launcher starts in its tests: `python -P -m tests.faults.lingering_rank FAULT FOLDER`; rank 1 goes wrong.

Each rank leaves its process id in FOLDER. kill, stop: that signal. exit: sys.exit(0). raise: an error. linger: nothing
goes wrong, it only takes a minute. early: all take a minute before they import anything. refuse: every rank finds wrong
what it was given. refuse one: rank 1 does, while rank 0 waits for it.
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    fault, folder = sys.argv[1], Path(sys.argv[2])
    (folder / str(os.getpid())).touch()
    if fault == "early":
        time.sleep(60)

import signal

from partitioner.errors import InputError
from runtime.processes.launch import begin_worker, refuse

if __name__ == "__main__" and fault == "refuse":  # before it imports what it would run with
    begin_worker()
    refuse(InputError("no rank can do that"))

from partitioner.compile.parts import Parts
from runtime.engine import Engine
from tests.support import handmade


def main(fault: str, folder: Path) -> None:
    begin_worker()
    parts = Parts(handmade.partitioned(int(os.environ["WORLD_SIZE"])), None)
    with Engine.connect(parts, timeout_s=5.0 if fault == "stop" else 30.0) as engine:
        engine(input_ids=handmade.input_ids())
        if engine.program.rank == 0:
            (folder / "ready").touch()
        if fault == "linger":
            time.sleep(60)
        for step in range(10_000):
            if step == 20 and engine.program.rank == 1:
                (folder / "when").write_text(str(time.time()))
                if fault == "raise":
                    raise ValueError("a fault of its own")
                if fault == "refuse one":
                    raise InputError("no rank can do that")
                if fault == "exit":
                    sys.exit(0)
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            engine(input_ids=handmade.input_ids())


if __name__ == "__main__":
    try:
        main(fault, folder)
    except InputError as error:
        refuse(error)
