"""One of several ranks, of which rank 1 goes wrong: `python -P -m tests.faults.faulty_rank FAULT PIDS_FOLDER SHARING`.

kill: ends by SIGKILL while the others wait for it. raise: an exception of its own. hang: sleeps past the deadline.
linger: nothing goes wrong, it only takes a minute. SHARING: "on", through shared memory, or "off", over gloo.
"""

import os
import signal
import sys
import time
from pathlib import Path

from partitioner.parts import Parts
from runtime.engine import Engine
from runtime.launch import begin_worker
from runtime.process_groups import Sharing
from tests import handmade


def main(fault: str, pids: Path, sharing: Sharing) -> None:
    begin_worker()
    (pids / str(os.getpid())).touch()
    victim = 0 if fault == "kill-host" else 1
    deadline_s = 3.0 if fault == "hang" else 30.0
    parts = Parts(handmade.partitioned(int(os.environ["WORLD_SIZE"])), None)
    with Engine.connect(parts, timeout_s=deadline_s, shared_memory=sharing) as engine:
        engine(input_ids=handmade.input_ids())
        if fault == "linger":
            time.sleep(60)
        for step in range(10_000):
            if step == 20 and engine.program.rank == victim:
                (pids / "when").write_text(str(time.time()))
                if fault == "raise":
                    raise ValueError("a fault of its own")
                if fault == "hang":
                    time.sleep(8)
                os.kill(os.getpid(), signal.SIGKILL)
            engine(input_ids=handmade.input_ids())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]
