"""One rank of a job that is looked at: `python -P -m tests.security.jobs.job_rank SHARING FOLDER`.

Our launcher starts it, or somebody who sets what torchrun would. It leaves FOLDER/pid-RANK; rank 1 connects once
FOLDER/come is there. Then it leaves FOLDER/ready-RANK, and goes on when FOLDER/go is there. It answers with its result,
and with every call of pickle that ours made; without our launcher, in FOLDER/answer-RANK.
"""

import json
import os
import pickle
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

import partitioner
from partitioner.compile.parts import Parts
from runtime.engine import Engine
from runtime.processes.launch import begin_worker, write_answer
from runtime.processes.place import LOCAL_STORE
from tests.support import handmade

OURS = str(Path(partitioner.__file__).parent.parent)
unpickled: list[str] = []


def watch_pickle() -> None:
    loads, unpickler = pickle.loads, pickle.Unpickler

    def note() -> None:
        frames = [frame for frame in traceback.extract_stack()[:-2] if frame.filename.startswith(OURS)]
        unpickled.extend(f"{frame.filename}:{frame.lineno}" for frame in frames[-1:] if frame.name != "<module>")

    def watched_loads(*given: Any, **options: Any) -> Any:
        note()
        return loads(*given, **options)

    class Watched(unpickler):  # type: ignore[misc, valid-type]
        def __init__(self, *given: Any, **options: Any) -> None:
            note()
            super().__init__(*given, **options)

    pickle.loads, pickle.Unpickler, distributed_c10d._unpickler = watched_loads, Watched, Watched  # type: ignore[misc]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def main(sharing: Any, folder: Path) -> None:
    rank = os.environ["RANK"]
    begin_worker()
    watch_pickle()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == "1":
        wait_for(folder / "come")
    parts = Parts(handmade.partitioned(int(os.environ["WORLD_SIZE"])), None)
    with Engine.connect(parts, timeout_s=30, shared_memory=sharing) as engine:
        first = engine(input_ids=handmade.input_ids())
        (folder / f"ready-{rank}").touch()
        wait_for(folder / "go")
        time.sleep(0.5)  # time for what is done to the ports to be noticed
        second = engine(input_ids=handmade.input_ids())
        assert first.equal(second)
        transport = engine.communicator.transports["tp"]
    answer = json.dumps({"result": first.tolist(), "unpickled": unpickled, "transport": transport}).encode()
    if LOCAL_STORE in os.environ:
        write_answer(answer)
    else:
        (folder / f"answer-{rank}").write_bytes(answer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
