"""Collectives of ranks that share a host, through memory that all of them have mapped: microseconds, not gloo's 0.3 ms.

    connect(ranks, rank, exchange=..) a SharedMemory on every rank of the group, or Unavailable on every one
    all_reduce(call, overwrite=..)    the operation of one node, as a callable on its tensor
    all_gather(call, dim=.., sizes=..)
    messages                          what two of the ranks bring to each other (`mailboxes.py`)

Sums are taken in order of coordinate by every rank for itself, so that all get the same bits; bfloat16 and float16 are
summed in float32 and rounded once. The copying and waiting is C++ (`shared_memory.cpp`), which comes back to Python
several times a second while it waits: for signals, the deadline, and ranks whose process has ended. Operation, dtype
and size are compared every time, which costs nothing measurable.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import resource
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import RankMismatch
from runtime.communication.channels import require_piece
from runtime.communication.group_collectives import sum_in_order
from runtime.communication.matching_calls import Call
from runtime.communication.shared_memory.mailboxes import Mailboxes, declare
from runtime.communication.shared_memory.segment import Address, Segment
from runtime.communication.shared_memory.waiting import DISAGREE, DONE, WAIT_NS, Disconnected, Waiter
from runtime.ops.communicating import Kind
from runtime.ops.kernels.native.build_native import CannotBuild, Native, load
from runtime.processes.place import kernel_id

__all__ = ["Disconnected", "SharedMemory", "Unavailable"]

_SOURCES = ("shared_memory.cpp", "mailboxes.cpp")
_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_KINDS = [f"an all_reduce of {dtype}, elements:" for dtype in _TYPES] + ["an all_gather, bytes:"]

_LINE_BYTES = 128
SLOT_BYTES = 1 << 20
"""Longer tensors are taken in parts of this; two such slots per rank stay in the processor's caches."""

_ARENA_BYTES = 1 << 34
"""Room for a rank's messages that are under way: addresses, which cost nothing before they are used."""

Exchange = Callable[[Any], list[Any]]


class Unavailable(Exception):
    """Why a group cannot share memory; the same on all of its ranks."""

    def __init__(self, why: str, *, several_hosts: bool = False) -> None:
        super().__init__(why)
        self.several_hosts = several_hosts


class SharedMemory:
    """One rank's end of the memory that the ranks of one group share; see `meet`."""

    def __init__(
        self, native: Native, segment: Segment, ranks: Sequence[int], rank: int, *, slot_bytes: int, timeout_s: float
    ) -> None:
        self.ranks, self.rank = tuple(ranks), rank
        self.build_s = native.seconds
        self._coordinate = self.ranks.index(rank)
        self._segment, self._waiter = segment, Waiter(segment, self.ranks, timeout_s)
        self._library = library = native.library
        self._group = library.group_new(segment.start, len(ranks), self._coordinate, slot_bytes)
        weakref.finalize(self, library.group_free, self._group)
        start = _bytes_of_parts(len(ranks), slot_bytes)
        self.messages = Mailboxes(library, segment, start, self.ranks, rank, waiter=self._waiter)

    @classmethod
    def connect(
        cls,
        ranks: Sequence[int],
        rank: int,
        *,
        exchange: Exchange,
        timeout_s: float,
        slot_bytes: int = SLOT_BYTES,
    ) -> SharedMemory:
        """Called by all `ranks` at once; `exchange(x)` brings every rank's x, plain data, to all, in their order."""
        native, segment, why = None, None, ""
        coordinate = ranks.index(rank)
        try:
            native = _library(timeout_s)
            if coordinate == 0:
                segment = cls.segment(native, len(ranks), slot_bytes=slot_bytes)
        except (CannotBuild, OSError) as error:
            why = str(error)
        everyone = _met(exchange([_host(), why, segment and astuple(segment.address)]))
        if not (unavailable := _unavailable(ranks, everyone)):
            address = everyone[0][2]
            assert address is not None
            try:
                segment = segment or Segment.open(address)
                segment.hold(coordinate)
            except OSError as error:
                why = f"the memory of rank {ranks[0]} cannot be opened: {error}"
            unavailable = _unavailable(ranks, _met(exchange([_host(), why, None])))
        if unavailable:
            if segment is not None:
                segment.close()
            raise unavailable
        assert native is not None
        assert segment is not None
        return cls(native, segment, ranks, rank, slot_bytes=slot_bytes, timeout_s=timeout_s)

    @staticmethod
    def segment(native: Native, num_ranks: int, *, slot_bytes: int = SLOT_BYTES) -> Segment:
        """Memory for so many ranks."""
        limits = (resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE))
        arena = min([_ARENA_BYTES, *(each // (8 * num_ranks) for each in limits if each != resource.RLIM_INFINITY)])
        mailboxes = native.library.post_bytes(num_ranks)
        return Segment.create(_bytes_of_parts(num_ranks, slot_bytes) + mailboxes, num_ranks * (arena // 4096 * 4096))

    def all_reduce(self, call: Call, *, overwrite: bool) -> Callable[[Tensor], Tensor]:
        group, start = self._group, self._library.group_all_reduce
        gather = self.all_gather(call, dim=0)

        def run(x: Tensor) -> Tensor:
            kind = _TYPES.get(x.dtype)
            if kind is None:
                return sum_in_order(gather(x[None]).unbind(0))  # of whole numbers, which are few
            if not x.is_contiguous():
                x = out = x.contiguous()
            else:
                out = x if overwrite else torch.empty_like(x)
            status = start(group, x.data_ptr(), out.data_ptr(), x.numel(), kind, WAIT_NS)
            if status != DONE:
                self._see_through(status, call.on(x))
            return out

        return run

    def all_gather(self, call: Call, *, dim: int, sizes: list[int] | None = None) -> Callable[[Tensor], Tensor]:
        group, start = self._group, self._library.group_all_gather
        num_ranks = len(self.ranks)

        @functools.lru_cache(maxsize=1024)
        def plan(shape: torch.Size, item_bytes: int) -> tuple[int, Any, list[int]]:
            """Rows, bytes per row that each rank brings, and the result's shape."""
            at = dim % len(shape)
            pieces = sizes or [shape[at]] * num_ranks
            inner = math.prod(shape[at + 1 :]) * item_bytes
            widths = (ctypes.c_int64 * num_ranks)(*(piece * inner for piece in pieces))
            return math.prod(shape[:at]), widths, [*shape[:at], sum(pieces), *shape[at + 1 :]]

        def run(x: Tensor) -> Tensor:
            # always: a shorter piece would be read past its end
            require_piece(x, call.options, self._coordinate, node=call.node, rank=self.rank)
            rows, widths, shape = plan(x.shape, x.element_size())
            x = x.contiguous()
            out = x.new_empty(shape)
            status = start(group, x.data_ptr(), out.data_ptr(), rows, widths, WAIT_NS)
            if status != DONE:
                self._see_through(status, call.on(x))
            return out

        return run

    def primitive(self, kind: Kind, call: Call, **options: Any) -> Callable[..., Any]:
        """All but all_reduce, as in `runtime.communication.group_collectives.PRIMITIVES`."""
        if kind == "all_gather":
            return self.all_gather(call, **options)
        if kind == "all_to_all":
            begin = self.messages.all_to_all(call)
            return lambda *operands: begin(*operands).finish()
        begins: dict[Kind, Callable[..., Any]] = {
            "reduce_scatter": self.messages.reduce_scatter,
            "permute": self.messages.permute,
            "send": self.messages.send,
            "receive": self.messages.receive,
        }
        prepared: Callable[..., Any] = begins[kind](call, **options)
        return prepared

    def close(self) -> None:
        """Take part in nothing any more; ranks that wait for this one are told."""
        self._library.group_leave(self._group)
        self.messages.close()
        self._segment.close()

    def _see_through(self, status: int, call: Call) -> None:
        """Go on waiting until the operation is done, or cannot be."""
        group, advance = self._group, self._library.group_advance
        if self._waiter.wait(status, lambda ns: advance(group, ns), self._late) == DISAGREE:
            raise self._disagreement(call)

    def _late(self) -> list[int]:
        return [c for c in range(len(self.ranks)) if not self._library.group_has_arrived(self._group, c)]

    def _disagreement(self, call: Call) -> RankMismatch:
        kind, amount = ctypes.c_int64(), ctypes.c_int64()
        lines = []
        for coordinate, rank in enumerate(self.ranks):
            self._library.group_brought(self._group, coordinate, ctypes.byref(kind), ctypes.byref(amount))
            lines.append(f"rank {rank}: {_KINDS[kind.value]} {amount.value}")
        return RankMismatch(
            "ranks disagree on a collective:\n  " + "\n  ".join(lines) + f"\n  where this one is {call}\n"
            "All ranks must reach the same operations in the same order with the same shapes and dtypes; "
            "check=True compares them, with the nodes' names, before each one"
        )


def _bytes_of_parts(num_ranks: int, slot_bytes: int) -> int:
    """What all_reduce and all_gather take of the segment."""
    return num_ranks * (_LINE_BYTES + 2 * slot_bytes)


@functools.cache
def _library(timeout_s: float) -> Native:
    if sys.platform != "linux":
        raise CannotBuild("it needs Linux (memfd, futex)")
    native = load([Path(__file__).with_name(name) for name in _SOURCES], timeout_s=timeout_s)
    pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library = native.library
    library.group_new.restype = pointer
    library.group_new.argtypes = [pointer, integer, integer, number]
    library.group_free.argtypes = library.group_leave.argtypes = [pointer]
    library.group_free.restype = library.group_leave.restype = None
    library.group_advance.argtypes = [pointer, number]
    library.group_all_reduce.argtypes = [pointer, pointer, pointer, number, integer, number]
    library.group_all_gather.argtypes = [pointer, pointer, pointer, number, pointer, number]
    library.group_has_arrived.argtypes = [pointer, integer]
    library.group_brought.argtypes = [pointer, integer, pointer, pointer]
    library.group_brought.restype = None
    declare(library)
    return native


def _host() -> str:
    """Names the running kernel and its network as this process sees it: hosts may have the same name, containers of one
    host may not. Ranks whose networks are two meet over what joins these, and must notice when that is gone.
    """
    try:
        return f"{kernel_id()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return kernel_id()


def _met(everyone: list[Any]) -> list[tuple[str, str, Address | None]]:
    return [(host, why, None if address is None else Address.of(address)) for host, why, address in everyone]


def _unavailable(ranks: Sequence[int], everyone: list[tuple[str, str, Address | None]]) -> Unavailable | None:
    if len({host for host, _, _ in everyone}) > 1:
        return Unavailable(f"the ranks {', '.join(map(str, ranks))} are on several hosts", several_hosts=True)
    for rank, (_, why, _) in zip(ranks, everyone, strict=True):
        if why:
            return Unavailable(f"rank {rank}: {why}")
    return None
