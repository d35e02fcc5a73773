"""Times every way of every primitive on the GPUs at hand, and keeps what was chosen for the next start.

All are timed in CUDA graphs, which is how decode steps run, and in turns; of the ranks' times the longest counts, so
that all choose alike. What was chosen stands in the user's cache, as data, under the card, the number of ranks, the
versions of torch, NCCL and Triton, and what the kernels are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist

from runtime.communication.channels import Handle
from runtime.communication.group_collectives import PRIMITIVES
from runtime.communication.peer_memory.choice import SIZES, Choice, Row, Way
from runtime.communication.peer_memory.mapped_memory import Exchange
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.ops.communicating import Kind
from runtime.ops.kernels.native.build_native import cache_folder
from runtime.ops.kernels.native.own_folder import NotOurs, OwnFolder

__all__ = ["candidates", "choose", "measured", "microseconds"]

_log = logging.getLogger("partitioner")
_ROUNDS = 5
_OPTIONS: dict[Kind, dict[str, Any]] = {
    "all_reduce": {"overwrite": False},
    "all_gather": {"dim": 0},
    "reduce_scatter": {"dim": 0},
    "permute": {"shift": 1},
}


def choose(peers: PeerMemory, *, exchange: Exchange) -> None:
    """Called by all ranks of the group: takes what is kept, or measures; all have the same then."""
    is_first = peers.group.coordinate == 0
    name = _name(peers) if is_first else ""
    kept = Choice.from_data(exchange(_read(name) if is_first else None)[0])
    if kept is not None:
        peers.choice = kept
        return
    started = time.monotonic()
    peers.choice = Choice.of_times(measured(peers))
    if is_first:
        _log.info("measured what is quickest between these GPUs in %.1f s", time.monotonic() - started)
        _keep(name, peers.choice)


def measured(peers: PeerMemory, sizes: Mapping[str, Sequence[int]] = SIZES) -> dict[str, list[Row]]:
    """By kind, for each size the microseconds of each way."""
    found: dict[str, list[Row]] = {}
    for kind, of_kind in sizes.items():
        rows = found[kind] = []
        for num_bytes in of_kind:
            ways = candidates(peers, cast("Kind", kind), num_bytes)
            times = microseconds(ways, peers.device, calls=20 if num_bytes < 2**20 else 4, rounds=_ROUNDS)
            longest = torch.tensor(list(times.values()), dtype=torch.float64, device=peers.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=peers.group.handle)
            rows.append((num_bytes, dict(zip(times, longest.tolist(), strict=True))))
    return found


def candidates(peers: PeerMemory, kind: Kind, num_bytes: int) -> dict[str, Callable[[], object]]:
    """The ways, as calls on random bfloat16 of this size."""
    size = peers.group.size
    numel = max(1, num_bytes // 2)
    x = torch.randn(numel * (size if kind == "reduce_scatter" else 1), device=peers.device, dtype=torch.bfloat16)
    options = _OPTIONS[kind]
    by_nccl = PRIMITIVES[kind](peers.group, **options)
    ways: list[Way] = ["large"]
    if peers.takes_small(x.dtype, num_bytes):
        ways.append("small")
    if kind == "all_reduce" and size > 2:
        ways.append("in two")

    def calling(run: Callable[[Tensor], Any], choice: Choice) -> Callable[[], object]:
        def call() -> object:
            before, peers.choice = peers.choice, choice
            try:
                said = run(x)
                return said.finish() if isinstance(said, Handle) else said
            finally:
                peers.choice = before

        return call

    made: dict[str, Callable[[], object]] = {"nccl": calling(by_nccl, Choice.always("nccl"))}
    for way in ways:
        made[way] = calling(peers.prepare(kind, otherwise=by_nccl, **options), Choice.always(way))
    return made


def microseconds(
    ways: Mapping[str, Callable[[], object]], device: torch.device, *, calls: int, rounds: int, rest_s: float = 0
) -> dict[str, float]:
    """Of one call in a CUDA graph of `calls`, the median of `rounds` in which the ways take turns.

    rest_s: before each turn nothing runs for so long.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for name, call in ways.items():
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(calls):
                call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            time.sleep(rest_s)
            graph.replay()  # the ranks come together here
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1e3 / calls)
    for graph in graphs.values():
        graph.reset()
    return {name: statistics.median(of_one) for name, of_one in times.items()}


# -- what is kept ------------------------------------------------------------------------------------------------------


def _name(peers: PeerMemory) -> str:
    kernels = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    what = [torch.cuda.get_device_name(peers.device), peers.group.size, torch.__version__, nccl, version("triton")]
    digest = hashlib.blake2b(json.dumps(what).encode() + kernels, digest_size=10).hexdigest()
    return f"collectives-{digest}.json"


def _read(name: str) -> Any:
    """None: nothing is kept that can be read."""
    try:
        with OwnFolder.open(cache_folder()) as folder:
            return json.loads(folder.read(name))
    except (NotOurs, OSError, ValueError):
        return None


def _keep(name: str, choice: Choice) -> None:
    try:
        with OwnFolder.open(cache_folder()) as folder:
            folder.add(name, choice.to_json().encode())
    except (NotOurs, OSError) as error:
        _log.warning("what was measured between these GPUs is not kept: %s", error)


def told(choice: Choice) -> str:
    """In a line: up to how many bytes which way."""
    parts = [f"{way} to {_size(end)}" if end != math.inf else way for end, way in choice.table["all_reduce"]]
    return ", then ".join(parts)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.3g} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.3g} KiB"
