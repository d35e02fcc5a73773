"""What each process checks of captured steps whose tokens the devices of several ranks tell each other.

python -P -m tests.runtime.pipeline.relay_rank NAME PLAN DEVICE SHARING     started by test_relay_ranks.py

Of stages, or of ranks that share out experts and have sequences of their own.

On a CPU a captured step is one that runs again (`tests.runtime.generation.replayed`), over memory or gloo; on GPUs it
is a CUDA graph, over NCCL. With one GPU all use that, over sockets.
"""

import contextlib
import sys
from typing import Any

import pytest
import torch

from partitioner import Plan, partition
from partitioner.errors import RankLost
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.processes.launch import begin_worker
from tests.runtime.generation.replayed import replaying
from tests.support import zoo
from tests.support.generated import prompts
from tests.support.processes.few_gpus import device_of_rank


def streams(engine: Engine, texts: list[list[int]], whole: Any) -> None:
    """One that is left, one that another task overtakes, and one that is under way when all close."""
    for leaves in (True, False):
        stream = engine.stream(texts, max_new_tokens=20, eos_token_id=[])
        found = [next(stream).tokens for _ in range(5)]
        assert torch.equal(torch.tensor(found).t(), whole[:, -20:][:, :5])
        if leaves:
            stream.close()
        assert torch.equal(engine.generate(texts, max_new_tokens=20, eos_token_id=[]).cpu(), whole)
    stream = engine.stream(texts, max_new_tokens=20, eos_token_id=[])
    for _ in range(5):
        next(stream)
    engine.close()


def a_lost_rank(engine: Engine, texts: list[list[int]]) -> None:
    """Rank 1 fails in the middle of a text, while turns are under way."""
    rank = engine.program.rank
    with pytest.raises(RankLost, match="rank 1") if rank != 1 else pytest.raises(ZeroDivisionError), engine:
        for number, _ in enumerate(engine.stream(texts, max_new_tokens=200, eos_token_id=[])):
            if number == 6 and rank == 1:
                raise ZeroDivisionError


def main() -> None:
    begin_worker()
    name, plan, device, sharing = sys.argv[1:]
    device = device_of_rank(device)
    model = zoo.tiny(name)[0]
    model = model.double() if device == "cpu" else model.float()
    texts = prompts(name, (4, 7, 2, 5, 3))
    one, parts = partition(model, Plan()), partition(model, Plan.parse(plan))
    alone = Engine(
        one.rank(0), ThreadGroup(one.mesh).communicator(0), device=device, entries=lambda entry: one.entry(entry, 0)
    )
    whole = alone.generate(texts, max_new_tokens=20, eos_token_id=[]).cpu()
    ends = {"eos_token_id": [int(whole[0, -15]), int(whole[2, -9])], "pad_token_id": 0}
    how: dict[str, Any] = {"device": device, "cuda_graph": True, "timeout_s": 20, "shared_memory": sharing}
    with replaying() if device == "cpu" else contextlib.nullcontext():
        with Engine.connect(parts, **how) as engine:
            for rows in (5, 1):
                for groups in (None, parts.mesh.size("pp") + 1) if parts.mesh.size("pp") > 1 else (None,):
                    given: dict[str, Any] = {"max_new_tokens": 20, "pipeline_groups": groups}
                    for options in ({"eos_token_id": []}, ends, {"do_sample": True, "seed": 3, "eos_token_id": []}):
                        expected = alone.generate(texts[:rows], max_new_tokens=20, **options).cpu()
                        assert torch.equal(engine.generate(texts[:rows], **given, **options).cpu(), expected), options
            streams(engine, texts, whole)
        if device == "cpu":  # on GPUs a process that waits is ended: tests/gpu/test_lost_rank.py
            a_lost_rank(Engine.connect(parts, **how), texts)


if __name__ == "__main__":
    main()
