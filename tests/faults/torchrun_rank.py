"""A rank that torchrun starts on one of several hosts, which are network namespaces.

torchrun .. -m tests.faults.torchrun_rank PLAN NEW FOLDER

It leaves FOLDER/come-RANK when it is about to connect, FOLDER/ready-RANK once it generates, its tokens in
FOLDER/tokens-RANK, and in FOLDER/lost-RANK when and why it gave up.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from partitioner.errors import RankLost
from runtime.engine import Engine
from tests.faults.two_hosts_rank import PROMPTS, TIMEOUT_S, tiny


def main() -> None:
    plan, new, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    parts, rank = tiny(plan), os.environ["RANK"]
    (folder / f"come-{rank}").write_text(str(os.getpid()))
    # how long a busy machine takes to start them all is not what is tried here
    while len(list(folder.glob("come-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.02)
    try:
        with Engine.connect(parts, timeout_s=TIMEOUT_S) as engine:
            tokens = []
            for step in engine.stream(PROMPTS, max_new_tokens=new):
                tokens.append(step.tokens)
                if len(tokens) == 5:
                    (folder / f"ready-{rank}").touch()
    except RankLost as error:
        (folder / f"lost-{rank}").write_text(json.dumps([time.monotonic(), str(error).partition("\n")[0]]))
        raise
    (folder / f"tokens-{rank}").write_text(json.dumps(tokens))


if __name__ == "__main__":
    main()
