"""Messages of ranks that share a host: sends, permutes and exchanges, through memory that all of them have mapped.

    send(call, to=..)              (x) -> Handle                 copied when it is begun, and done
    receive(call, from_=..)        (shape, dtype) -> Handle
    permute(call, shift=..)        (x) -> Handle
    persistent_permute(call, x, ..)
    all_to_all(call)               (x, send_counts, receive_counts) -> Handle
    reduce_scatter(call, ..)       (x) -> Tensor                 summed in order of coordinate
    exchange(call, x, with_)       x of this rank and of another one, each to the other

Every rank has a queue from each other (`mailboxes.cpp`), and takes from it in the order in which it began to receive,
whatever is finished first. Kind, dtype and size are compared with every message. At most MOST_AWAITED receives from one
rank are begun and not taken: another one first waits for the oldest, whose send has been begun by then where nothing
needs buffers. A sender waits where twice as many are untaken, which for the same reason is never for ever.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CommunicationError, RankMismatch
from runtime.communication.channels import Handle, PersistentPermute
from runtime.communication.group_collectives import sum_in_order
from runtime.communication.matching_calls import Call
from runtime.communication.shared_memory.segment import Segment
from runtime.communication.shared_memory.waiting import (
    BROKEN,
    DISAGREE,
    DONE,
    FULL,
    WAIT_NS,
    Waiter,
)

__all__ = ["MOST_AWAITED", "Mailboxes", "declare"]

MOST_AWAITED = 32

_KINDS = ("send", "permute", "all_to_all", "reduce_scatter", "comparison")
_DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)


@dataclass(eq=False, slots=True)
class _Awaited:
    """A message that this rank has begun to receive. wanted: what `post_take` is given; last but one, how long."""

    sender: int
    size: tuple[int, int, int]
    """Rows, bytes of each, and bytes from one to the next."""
    kind: int
    call: Call
    keep: Tensor
    wanted: tuple[Any, ...]
    is_taken: bool = False
    mismatch: RankMismatch | None = None


class Mailboxes:
    """One rank's end; `start`: of the doors and mailboxes in the segment, behind which are the arenas."""

    def __init__(
        self, library: ctypes.CDLL, segment: Segment, start: int, ranks: Sequence[int], rank: int, *, waiter: Waiter
    ) -> None:
        self._ranks, self._own = tuple(ranks), ranks.index(rank)
        self._library = library
        self._segment, self._start, self._waiter = segment, start, waiter
        size = len(ranks)
        arena_bytes = (segment.address.num_bytes - start - library.post_bytes(size)) // size
        place = segment.start + start, size, self._own, arena_bytes, segment.descriptor
        self._post = library.post_new(*place)
        weakref.finalize(self, library.post_free, self._post)
        self._awaited: list[deque[_Awaited]] = [deque() for _ in ranks]
        """By sender, in the order in which they were begun."""
        self._brought = (ctypes.c_int64 * 2)()
        self._is_broken = False
        """While a message is sent or taken, and from then on where that was given up, also by an interrupt: who is at
        which message is not known any more."""
        self._is_closed = False

    # -- the primitives ------------------------------------------------------------------------------------------------

    def send(self, call: Call, *, to: int) -> Callable[[Tensor], Handle]:
        def begin(x: Tensor) -> Handle:
            self._send_whole(call, "send", to, x)

            def finish() -> Tensor:
                if not self._is_closed and self._library.post_num_untaken(self._post, to):
                    self._waiter.require_alive(to)
                return x

            return Handle(finish)

        return begin

    def receive(self, call: Call, *, from_: int) -> Callable[[Sequence[int], torch.dtype], Handle]:
        def begin(shape: Sequence[int], dtype: torch.dtype) -> Handle:
            return self._receive_whole(call, "send", from_, torch.empty(tuple(shape), dtype=dtype, device="cpu"))

        return begin

    def permute(self, call: Call, *, shift: int) -> Callable[[Tensor], Handle]:
        size = len(self._ranks)
        if shift % size == 0:
            return Handle.done
        to, from_ = (self._own + shift) % size, (self._own - shift) % size

        def begin(x: Tensor) -> Handle:
            self._send_whole(call, "permute", to, x)
            return self._receive_whole(
                call, "permute", from_, torch.empty_like(x, memory_format=torch.contiguous_format)
            )

        return begin

    def persistent_permute(self, call: Call, x: Tensor, *, shift: int) -> PersistentPermute:
        """x: contiguous. What comes lies in two places by turns."""
        size = len(self._ranks)
        to, from_ = (self._own + shift) % size, (self._own - shift) % size
        if to == self._own:
            return PersistentPermute.of(Handle.done, x)
        kind, whole, turn = _kind("permute", x.dtype), (1, x.nbytes, x.nbytes), 0
        given = self._given(kind, to, x.data_ptr(), whole)
        outs = [torch.empty_like(x) for _ in range(2)]
        places = [self._wanted(call, kind, from_, out.data_ptr(), whole, out) for out in outs]

        def begin() -> None:
            self._send(call, given)
            self._await(places[turn])

        def finish() -> Tensor:
            nonlocal turn
            awaited, turn = places[turn], 1 - turn
            self._take(awaited)
            return awaited.keep

        return PersistentPermute(begin, finish)

    def all_to_all(self, call: Call) -> Callable[[Tensor, Sequence[int], Sequence[int]], Handle]:
        own = self._own

        def begin(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Handle:
            x = x.contiguous()
            out = x.new_empty((sum(receive_counts), *x.shape[1:]))
            each, kind = math.prod(x.shape[1:]) * x.element_size(), _kind("all_to_all", x.dtype)
            at = x.data_ptr()
            for to, count in enumerate(send_counts):
                if to != own:
                    self._send(call, self._given(kind, to, at, (1, count * each, count * each)))
                at += count * each
            at, awaited = out.data_ptr(), list[_Awaited]()
            for from_, count in enumerate(receive_counts):
                if from_ != own:
                    awaited.append(self._expect(call, kind, from_, at, (1, count * each, count * each), out))
                at += count * each
            if send_counts[own]:
                mine = x.narrow(0, sum(send_counts[:own]), send_counts[own])
                out.narrow(0, sum(receive_counts[:own]), send_counts[own]).copy_(mine)
            return Handle(lambda: self._taken(awaited, out))

        return begin

    def reduce_scatter(self, call: Call, *, dim: int, sizes: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
        own, num_ranks = self._own, len(self._ranks)

        def run(x: Tensor) -> Tensor:
            x = x.contiguous()
            at = dim % x.dim()
            lengths = list(sizes) if sizes is not None else [x.shape[at] // num_ranks] * num_ranks
            rows, inner = math.prod(x.shape[:at]), math.prod(x.shape[at + 1 :]) * x.element_size()
            kind, stride, place = _kind("reduce_scatter", x.dtype), x.shape[at] * inner, x.data_ptr()
            for to, length in enumerate(lengths):
                if to != own:
                    self._send(call, self._given(kind, to, place, (rows, length * inner, stride)))
                place += length * inner
            mine = x.narrow(at, sum(lengths[:own]), lengths[own])
            pieces = [
                mine if c == own else torch.empty(mine.shape, dtype=x.dtype, device=x.device) for c in range(num_ranks)
            ]
            size = (1, mine.numel() * x.element_size(), mine.numel() * x.element_size())
            others = [(c, piece) for c, piece in enumerate(pieces) if c != own]
            for one in [self._expect(call, kind, c, piece.data_ptr(), size, piece) for c, piece in others]:
                self._take(one)
            return sum_in_order(pieces)

        return run

    def exchange(self, call: Call, x: Tensor, *, with_: int) -> Tensor:
        """What the other one brings, of the same shape; both wait for each other."""
        self._send_whole(call, "comparison", with_, x)
        return self._receive_whole(call, "comparison", with_, torch.empty_like(x)).finish()

    def close(self) -> None:
        """Take part in nothing any more; ranks that wait for this one are told. What was sent can be taken."""
        self._is_closed = True
        self._library.post_leave(self._post)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _send_whole(self, call: Call, kind: str, to: int, x: Tensor) -> None:
        x = x.contiguous()
        self._send(call, self._given(_kind(kind, x.dtype), to, x.data_ptr(), (1, x.nbytes, x.nbytes)))

    def _receive_whole(self, call: Call, kind: str, sender: int, out: Tensor) -> Handle:
        size = (1, out.nbytes, out.nbytes)
        awaited = self._expect(call, _kind(kind, out.dtype), sender, out.data_ptr(), size, out)
        return Handle(lambda: self._taken((awaited,), out), into=out)

    def _given(self, kind: int, to: int, x: int, size: tuple[int, int, int]) -> tuple[Any, ...]:
        """What `post_send` is given, how long it waits last: not at all, for nearly always nobody is full."""
        return self._post, to, x, *size, kind, self._start, 0

    def _send(self, call: Call, given: tuple[Any, ...]) -> None:
        was_broken, self._is_broken = self._is_broken, True
        status = BROKEN if was_broken else self._library.post_send(*given)
        if status == DONE:
            self._is_broken = False
        else:
            self._sent(call, given, status)

    def _sent(self, call: Call, given: tuple[Any, ...], status: int) -> None:
        """Goes on with a send that has not been done at once."""
        send, (post, to, _, rows, width, *_) = self._library.post_send, given
        full = functools.partial(self._library.post_num_untaken, post, to)
        status = self._waiter.wait(
            status,
            lambda patience_ns: send(*given[:-1], patience_ns),
            lambda: [to] if full() >= 2 * MOST_AWAITED else [],
        )
        self._is_broken = False
        if status == FULL:
            raise CommunicationError(
                f"rank {self._ranks[self._own]}: node {call.node!r} sends {rows * width} bytes to rank "
                f"{self._ranks[to]}, for which there is no memory: {self._library.post_backed(self._post)} bytes of "
                "messages are there already"
            )

    def _expect(
        self, call: Call, kind: int, sender: int, out: int, size: tuple[int, int, int], keep: Tensor
    ) -> _Awaited:
        awaited = self._wanted(call, kind, sender, out, size, keep)
        self._await(awaited)
        return awaited

    def _wanted(
        self, call: Call, kind: int, sender: int, out: int, size: tuple[int, int, int], keep: Tensor
    ) -> _Awaited:
        wanted = self._post, sender, out, *size, kind, WAIT_NS, self._brought
        return _Awaited(sender, size, kind, call, keep, wanted)

    def _await(self, awaited: _Awaited) -> None:
        awaited.is_taken, awaited.mismatch = False, None
        before = self._awaited[awaited.sender]
        if len(before) >= MOST_AWAITED:
            self._take(before[0])
        before.append(awaited)

    def _taken(self, awaited: Sequence[_Awaited], out: Tensor) -> Tensor:
        for one in awaited:
            self._take(one)
        return out

    def _take(self, awaited: _Awaited) -> None:
        """And all that came before it from there."""
        queue = self._awaited[awaited.sender]
        while not awaited.is_taken:
            self._take_first(queue)
        if awaited.mismatch is not None:
            raise awaited.mismatch

    def _take_first(self, queue: deque[_Awaited]) -> None:
        was_broken, self._is_broken = self._is_broken, True
        first = queue[0]
        status = BROKEN if was_broken else self._library.post_take(*first.wanted)
        if status == DONE:
            queue.popleft()
            first.is_taken = True
            self._is_broken = False
        else:
            self._taken_first(queue, status)

    def _taken_first(self, queue: deque[_Awaited], status: int) -> None:
        """Goes on with the first take of a queue that has not been done at once."""
        first, library, post = queue[0], self._library, self._post
        sender = first.sender
        status = self._waiter.wait(
            status,
            lambda patience_ns: library.post_take(*first.wanted[:-2], patience_ns, self._brought),
            lambda: [] if library.post_has_come(post, sender) else [sender],
        )
        queue.popleft()
        first.is_taken = True
        self._is_broken = False
        if status == DISAGREE:
            first.mismatch = self._disagreement(first)

    def _disagreement(self, awaited: _Awaited) -> RankMismatch:
        sender, receiver = self._ranks[awaited.sender], self._ranks[self._own]
        return RankMismatch(
            f"ranks {sender} and {receiver} disagree on what they do together:\n"
            f"  rank {sender}: {_described(*self._brought)}\n"
            f"  rank {receiver}: {_described(awaited.kind, awaited.size[0] * awaited.size[1])}\n"
            f"  where this one is {awaited.call}\n"
            "All ranks must reach the same operations in the same order with the same shapes and dtypes; "
            "check=True compares them, with the nodes' names, before each one"
        )


@functools.cache
def _kind(kind: str, dtype: torch.dtype) -> int:
    return _KINDS.index(kind) * len(_DTYPES) + _DTYPES.index(dtype)


def _described(kind: int, num_bytes: int) -> str:
    name, dtype = divmod(kind, len(_DTYPES))
    said = {"send": "a send", "permute": "a permute", "all_to_all": "an all_to_all"}.get(_KINDS[name])
    return f"{said or f'a {_KINDS[name]}'} of {_DTYPES[dtype]}, bytes: {num_bytes}"


def declare(library: ctypes.CDLL) -> None:
    """What the functions of `mailboxes.cpp` take and return."""
    pointer, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.post_bytes.restype = library.post_num_untaken.restype = library.post_backed.restype = number
    library.post_bytes.argtypes = [integer]
    library.post_new.restype = pointer
    library.post_new.argtypes = [pointer, integer, integer, number, integer]
    library.post_free.argtypes = library.post_leave.argtypes = library.post_backed.argtypes = [pointer]
    library.post_free.restype = library.post_leave.restype = None
    library.post_send.argtypes = [pointer, integer, pointer, *[number] * 6]
    library.post_take.argtypes = [pointer, integer, pointer, *[number] * 5, pointer]
    library.post_has_come.argtypes = library.post_num_untaken.argtypes = [pointer, integer]
