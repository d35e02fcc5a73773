"""CUDA graphs as a CPU can have them: a captured function runs again whenever it is replayed, on the memory it had.

Capturing runs nothing: what the function writes is undone. What graphs of one pool yield shares memory: a replay spoils
what the others have yielded, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.communication.thread_communicator import ThreadCommunicator
from runtime.generation import generate_loop, steps
from runtime.generation.decode_graphs import decoder

__all__ = ["Replayed", "captured", "capturing_prompts", "decoding", "replaying"]


class Replayed:
    """One captured function."""

    def __init__(self, run: Callable[[], Any], pool: list[Replayed]) -> None:
        self._run, self._pool = run, pool
        with _Undone() as undone:
            self.result = _owned(run())
        undone.restore()
        self.count = 0
        pool.append(self)

    def replay(self) -> None:
        self.count += 1
        for other in self._pool:
            if other is not self:
                for tensor in _tensors(other.result):
                    tensor.fill_(torch.nan)
        for held, new in zip(_tensors(self.result), _tensors(self._run()), strict=True):
            held.copy_(new)

    def reset(self) -> None:
        self._pool.remove(self)


class _Undone(TorchDispatchMode):
    """Keeps what operators overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                self._before.append((given, given.clone()))
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        for written, before in reversed(self._before):
            written.copy_(before)


@contextmanager
def replaying() -> Iterator[list[Replayed]]:
    """In the block `cuda_graph=True` works on a CPU; all that was captured in it."""
    pools: dict[int, list[Replayed]] = {}
    made: list[Replayed] = []

    def captured(run: Callable[[], Any], pool: Any) -> tuple[Replayed, Any]:
        graph = Replayed(run, pools.setdefault(id(pool), []))
        made.append(graph)
        return graph, graph.result

    with (
        mock.patch.object(decoder, "captured", captured),
        mock.patch.object(steps, "captured", captured),
        mock.patch.object(generate_loop, "require_fixed_shapes"),
    ):
        yield made


@contextmanager
def decoding(ranks: Any, **how: bool) -> Iterator[None]:
    """In the block the ranks' engines decode so."""
    engines = ranks._simulator.engines
    before = [engine._decoding for engine in engines]
    for engine in engines:
        engine._decoding = {"compile": False, "cuda_graph": False, **how}
        engine.__dict__.pop("_generate_loop", None)
    try:
        yield
    finally:
        for engine, decoded in zip(engines, before, strict=True):
            engine._decoding = decoded
            engine.__dict__.pop("_generate_loop", None)


@contextmanager
def captured(ranks: Any) -> Iterator[list[Replayed]]:
    """In the block the engines of simulated ranks capture their decode steps; all that was captured."""
    with replaying() as graphs, decoding(ranks, cuda_graph=True):
        yield graphs


@contextmanager
def capturing_prompts() -> Iterator[list[Replayed]]:
    """`replaying`, with pieces of prompts captured, whatever the device and the communicator."""
    original = ThreadCommunicator.__init__

    def made(communicator: ThreadCommunicator, *given: Any) -> None:
        original(communicator, *given)
        communicator.can_be_captured = True

    with (
        mock.patch.object(steps, "CAPTURED_ON", frozenset({"cpu"})),
        mock.patch.object(ThreadCommunicator, "__init__", made),
        replaying() as found,
    ):
        yield found


def _owned(found: Any) -> Any:
    return tuple(map(_owned, found)) if isinstance(found, tuple) else found if found is None else found.clone()


def _tensors(found: Any) -> list[Tensor]:
    return [] if found is None else list(found) if isinstance(found, tuple) else [found]
