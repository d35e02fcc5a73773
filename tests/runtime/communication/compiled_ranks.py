"""What each of two processes checks of torch.compile over ranks; started by test_compiled.py.

Its arguments are the device, and whether to share memory ("on", "off", "auto") while one of them gets lost. With one
GPU both use that: see process_groups/three_processes.py.
"""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from partitioner import Parts, Plan, partition
from partitioner.errors import RankLost
from runtime.communication.process_groups import ProcessGroups, Sharing
from runtime.communication.traceable import Traceable
from runtime.engine import Engine
from runtime.kv_cache.cache_size import CacheSize
from runtime.ops.collectives import all_gather, all_reduce
from runtime.processes.launch import begin_worker
from tests.support import zoo
from tests.support.generated import prompts
from tests.support.processes.few_gpus import device_of_rank


def collectives(groups: ProcessGroups) -> None:
    """Equal to the eager ones, as they are and in a graph."""
    rank = groups.rank
    groups.begin_run(new_shapes=False)
    x = torch.arange(24.0).reshape(2, 3, 4) + 100 * rank
    sizes = [1, 2]
    cases: list[tuple[Callable[..., Tensor], dict[str, object], Tensor]] = [
        (all_reduce, {}, x),
        (all_reduce, {}, x.transpose(0, 2)),
        *((all_gather, {"dim": dim}, x) for dim in (0, 1, -1)),
        *((all_gather, {"dim": dim, "sizes": sizes}, x.narrow(dim, 0, sizes[rank])) for dim in (0, 1, -1)),
        (all_gather, {"dim": 0, "sizes": [2, 2]}, x.long()),
    ]
    eager = [groups.bind(op, "tp", node="n", options=options) for op, options, _ in cases]
    following = Traceable(groups)
    traceable = [following.bind(op, "tp", node="n", options=options) for op, options, _ in cases]

    def twice(given: list[Tensor]) -> list[Tensor]:
        return [2 * run(x + 0) for run, x in zip(traceable, given, strict=True)]

    given = [x for _, _, x in cases]
    expected = [run(x) for run, x in zip(eager, given, strict=True)]
    for run in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        for (op, options, _), found, once in zip(cases, run(given), expected, strict=True):
            assert torch.equal(found, 2 * once), (op, options)


def in_order(groups: ProcessGroups) -> None:
    """Collectives that do not depend on each other, one of them unused: none is dropped, none overtakes another."""
    first, second, third = (Traceable(groups).bind(all_reduce, "tp", node=f"n{i}", options={}) for i in range(3))

    @torch.compile(fullgraph=True)
    def run(x: Tensor) -> Tensor:
        small, _, large = first(x[:1]), second(x[:2]), third(x.repeat(3))
        return large.sum() + small.sum()

    x = torch.ones(4)
    assert run(x).item() == 2 * (12 + 1)


def one_graph(parts: Parts[Any], sharing: Sharing) -> None:
    """A decode step is one graph, and says what the eager one says."""
    texts = prompts("llama", (5, 5))
    with Engine.connect(parts, shared_memory=sharing) as engine:
        expected = engine.generate(texts, max_new_tokens=12, eos_token_id=[])
    torch._dynamo.reset()
    counters.clear()
    with Engine.connect(parts, shared_memory=sharing, compile=True) as engine:
        found = engine.generate(texts, max_new_tokens=12, eos_token_id=[])
    assert torch.equal(found, expected)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])


def a_lost_rank(parts: Parts[Any], sharing: Sharing) -> None:
    """Rank 1 ends in the middle of a text, after a step's tokens are chosen: rank 0 is in compiled code then."""
    engine = Engine.connect(parts, shared_memory=sharing, compile=True)
    stream = engine.stream([[5, 6, 7]], max_new_tokens=12, eos_token_id=[])
    for _ in range(4):
        next(stream)
    if engine.program.rank == 1:
        os._exit(0)
    with pytest.raises(RankLost, match="rank 1 lost: its process ended"):
        next(stream)


def over_nccl(parts: Parts[Any]) -> None:
    """The same over NCCL, and captured as a CUDA graph too."""
    device = device_of_rank("cuda")
    texts = prompts("llama", (5, 5))
    with Engine.connect(parts, device=device, cache=CacheSize(max_batch=2, memory="0.1 of free")) as engine:
        with torch.device(engine.device):
            collectives(engine.communicator)
            in_order(engine.communicator)
        if engine.program.rank == 0:
            print(engine.room)
        expected = engine.generate(texts, max_new_tokens=12, eos_token_id=[])
    for options in ({"compile": True}, {"cuda_graph": True}, {"compile": True, "cuda_graph": True}):
        torch._dynamo.reset()
        counters.clear()
        with Engine.connect(parts, device=device, **options) as engine:
            assert torch.equal(engine.generate(texts, max_new_tokens=12, eos_token_id=[]), expected), options
        assert not counters["graph_break"], dict(counters["graph_break"])
        assert counters["stats"]["unique_graphs"] == ("compile" in options), dict(counters["stats"])


def main() -> None:
    warnings.simplefilter("ignore")
    begin_worker()
    device, lost_over = sys.argv[1:]
    parts = partition(zoo.tiny("llama")[0].float(), Plan(tp=2))
    if device == "cuda":
        over_nccl(parts)
        return
    ways: tuple[Sharing, ...] = ("on", "off")
    for sharing in ways:
        with Engine.connect(parts, shared_memory=sharing) as engine:
            assert isinstance(engine.communicator, ProcessGroups)
            collectives(engine.communicator)
            in_order(engine.communicator)
        one_graph(parts, sharing)
    a_lost_rank(parts, lost_over)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
