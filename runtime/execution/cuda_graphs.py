"""Steps of fixed shapes: compiled by torch, and captured as CUDA graphs that share memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from runtime.communication.traceable import Traceable
from runtime.execution.executable import Executable, build
from runtime.kv_cache.cache import Cache
from runtime.program.rank_program import RankProgram

__all__ = ["GraphPool", "captured", "compiled_step", "to_host"]

T = TypeVar("T")

# a product with one row is a sum over the weights' rows, whose tiles are found by trying. By default the compiler
# computes again what several kernels use, in each of them: cosines and sines of the position in every layer, and norms
# in every row of a product
_ON_GPU: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "realize_reads_threshold": 1,
    "realize_acc_reads_threshold": 2,
}


class GraphPool:
    """Memory that captured steps share, of which one is replayed at a time."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """What torch.cuda.graph takes."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def renew(self) -> None:
        """For when none of its graphs is left: torch captures nothing more into a pool that all graphs have left."""
        self._handle = None


def compiled_step(program: RankProgram, execute: Executable, cache: Cache, device: torch.device) -> Callable[..., Any]:
    """The function of `execute` through torch.compile, with inductor."""
    traceable = build(program, Traceable(execute.communicator), device, cache)
    function = functools.partial(traceable, *execute.weights)
    return torch.compile(function, dynamic=False, options=_ON_GPU if device.type == "cuda" else None)


def captured(run: Callable[[], T], pool: GraphPool) -> tuple[Any, T]:
    """A CUDA graph of `run`, which has run before, and what it yields, in memory of the pool."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool.handle):
        result = run()
    return graph, result


def to_host(said: Tensor) -> Callable[[], Tensor]:
    """Has it copied behind what the device was told before; what waits for the copy."""
    if said.device.type != "cuda":
        copy = said.clone()
        return lambda: copy
    copy = torch.empty(said.shape, dtype=said.dtype, pin_memory=True)
    copy.copy_(said, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait
