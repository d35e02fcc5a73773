"""GPUs of one host that write into each other's memory, without NCCL: microseconds, not ten of them.

    prepare(kind, otherwise=.., ..) the operation of one node, as a callable on its operands

The memory is torch's symmetric memory: every rank's is mapped by all. Triton kernels of ours push pieces into it
(`large_kernel.py`). There is no multicast in it, no NVSHMEM and no work of the host, so calls may be captured in CUDA
graphs. What NCCL does quicker, or what is not summed here, NCCL does (`otherwise`); which that is, was measured on
these GPUs (`choice.py`). Sums are taken in order of coordinate by every rank, so that all get the same bits; bfloat16
and float16 are summed in float32 and rounded once.

A kernel that waits for a rank longer than the timeout says so in memory that the host reads (`late`), and goes on
waiting: `runtime.processes.device_watch` ends the process and names that rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.group_collectives import Group, to_pieces
from runtime.communication.peer_memory.choice import Choice, Way
from runtime.communication.peer_memory.mapped_memory import (
    BLOCKS,
    SMALL_BLOCKS,
    UNITS,
    Geometry,
)
from runtime.communication.peer_memory.rows.copy_rows import PeerCopies
from runtime.communication.peer_memory.rows.few_row_sums import FewRowSums, as_words
from runtime.communication.peer_memory.rows.merge_parts import PartMerge
from runtime.communication.peer_memory.rows.push_rows import PeerRows
from runtime.communication.peer_memory.rows.sum_rows import RowSums
from runtime.communication.peer_memory.side_stream import SideStream
from runtime.ops.communicating import Kind
from runtime.ops.kernels.decode.few_rows import can_launch_early
from runtime.ops.kernels.triton_needs import launch

__all__ = ["PeerMemory"]

_WARPS = 16
_BESIDE = 32
"""Blocks of a collective that others compute beside, as many on all ranks: those keep the other processors."""
_WORDS = {
    torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32", torch.float64: "float64",
    torch.int32: "int32", torch.int64: "int64",
}  # fmt: skip
"""What the kernel for small pieces sums."""
_MOST_ELEMENTS = 1 << 30


class PeerMemory:
    """One rank's end; see `connect.py`."""

    def __init__(self, group: Group, memory: Tensor, handle: Any, *, timeout_s: float) -> None:
        # Triton comes with torch for GPUs only
        from runtime.communication.peer_memory import large_kernel, small_kernel

        self._small, self._large, self._summed_as = small_kernel.small, large_kernel.large, large_kernel.summed_as
        self._group, self._geometry = group, Geometry(group.size)
        self._memory, self._handle = memory, handle
        device = memory.device
        # an allocation may hold more than this tensor
        offset = memory.data_ptr() - handle.buffer_ptrs[group.coordinate]
        self._table = torch.tensor([start + offset for start in handle.buffer_ptrs], device=device)
        self._small_counters = torch.zeros(SMALL_BLOCKS, dtype=torch.int32, device=device)
        self._counters = torch.zeros(group.size * BLOCKS, dtype=torch.int32, device=device)
        self._blocks = BLOCKS
        self._early = can_launch_early(device)
        self._late = torch.zeros(group.size, dtype=torch.int32, pin_memory=True)
        self._abandoned = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._patience_ns = int(timeout_s * 1e9)
        self.side_stream = SideStream(device)
        waiting = self._late.data_ptr(), self._abandoned.data_ptr(), self._patience_ns
        self.row_sums = RowSums(group, memory, handle, self._table, waiting, self.side_stream)
        self.few_row_sums = FewRowSums(
            group, self._table, self._small_counters, waiting, self.side_stream,
            lambda x: self.way("all_reduce", x) == "small", early=self._early,
        )  # fmt: skip
        self.part_merge = PartMerge(
            group, self._table, self._small_counters, waiting, self.side_stream, early=self._early
        )
        self.choice: Choice = Choice.unmeasured()
        self.rows: PeerRows | None = None
        """What rows are written through straight to where they belong."""
        self.copies: PeerCopies | None = None
        """What large pieces are brought by while this rank computes."""

    @property
    def group(self) -> Group:
        return self._group

    @property
    def device(self) -> torch.device:
        return self._memory.device

    def late(self) -> list[int]:
        """The ranks of the mesh that a kernel has waited for longer than the timeout."""
        return [rank for rank, is_late in zip(self._group.ranks, self._late.tolist(), strict=True) if is_late]

    def forget_late(self) -> None:
        self._late.zero_()

    def abandon(self) -> None:
        """Ends the kernels that wait; what they return is of no use. For a group in which a rank is lost."""
        self._abandoned.fill_(1)

    def prepare(
        self, kind: Kind, *, otherwise: Callable[..., Any], overwrite: bool = False, **options: Any
    ) -> Callable[..., Any]:
        """`otherwise`: the same by NCCL."""
        if kind == "all_reduce":
            return self._all_reduce(otherwise, overwrite=overwrite)
        if kind == "all_gather":
            return self._all_gather(otherwise, **options)
        if kind == "reduce_scatter":
            return self._reduce_scatter(otherwise, **options)
        if kind == "permute":
            return self._permute(otherwise, **options)
        if kind == "all_to_all":
            return self._all_to_all(otherwise)
        return otherwise

    # -- the primitives ------------------------------------------------------------------------------------------------

    def _all_reduce(self, otherwise: Callable[[Tensor], Tensor], *, overwrite: bool) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            way = self.way("all_reduce", x)
            if way == "nccl":
                return otherwise(x)
            out = x if overwrite and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
            return self.all_reduce(x, out, way)

        return run

    def all_reduce(self, x: Tensor, out: Tensor, way: Way) -> Tensor:
        """Into `out`, which may be x; not by NCCL."""
        if way != "in two":
            self._exchange(way, x, out, piece=x.numel(), total=x.numel(), sums=True)
            return out
        piece = -(-x.numel() // self._group.size)
        piece = -(-piece // 16) * 16  # so that pieces begin where wide loads may
        mine = x.new_empty(piece)
        self._exchange("large", x, mine, piece=piece, total=x.numel(), sums=True, spreads=True)
        self._exchange("large", mine, out, piece=piece, total=x.numel())
        return out

    def adds(self, x: Tensor, residual: Tensor) -> bool:
        """Whether one kernel sums x and adds a residual; by what all ranks know."""
        fits = residual.shape == x.shape and residual.dtype == x.dtype and x.dtype in (torch.bfloat16, torch.float16)
        return fits and x.numel() > 0 and self.way("all_reduce", x) == "small"

    def sum_added(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum plus a residual of its shape, rounded once."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._exchange("small", x, out, piece=x.numel(), total=x.numel(), sums=True, residual=as_words(residual))
        return out

    def _all_gather(
        self, otherwise: Callable[[Tensor], Tensor], *, dim: int, sizes: list[int] | None = None
    ) -> Callable[[Tensor], Tensor]:
        num_ranks = self._group.size

        def even(x: Tensor) -> Tensor:
            way = self.way("all_gather", x)
            if way == "nccl":
                return otherwise(x)
            out = x.new_empty((num_ranks * x.shape[0], *x.shape[1:]))
            self._exchange(way, x, out, piece=x.numel(), total=out.numel())
            return out

        def run(x: Tensor) -> Tensor:
            at = dim % x.dim()
            longest = x.shape[at] if sizes is None else max(sizes)
            shape = (*x.shape[:at], longest, *x.shape[at + 1 :])
            way = self.way("all_gather", x, numel=math.prod(shape))
            if way == "nccl":
                return otherwise(x)
            if x.shape[at] != longest:
                x = _padded(x, at, longest)
            flat = x.new_empty(num_ranks * x.numel())
            self._exchange(way, x, flat, piece=x.numel(), total=flat.numel())
            pieces = flat.view(num_ranks, *shape)
            if sizes is not None and len(set(sizes)) > 1:
                both = zip(pieces.unbind(0), sizes, strict=True)
                return torch.cat([each.narrow(at, 0, size) for each, size in both], dim=at)
            if math.prod(x.shape[:at]) == 1:
                return flat.view(*x.shape[:at], num_ranks * longest, *x.shape[at + 1 :])
            return torch.cat(pieces.unbind(0), dim=at)

        return even if dim == 0 and sizes is None else run

    def _reduce_scatter(
        self, otherwise: Callable[[Tensor], Tensor], *, dim: int, sizes: list[int] | None = None
    ) -> Callable[[Tensor], Tensor]:
        num_ranks, own = self._group.size, self._group.coordinate

        def even(x: Tensor) -> Tensor:
            shape = (x.shape[0] // num_ranks, *x.shape[1:])
            way = self.way("reduce_scatter", x, numel=math.prod(shape))
            if way == "nccl":
                return otherwise(x)
            out = x.new_empty(shape)
            self._exchange(way, x, out, piece=out.numel(), total=x.numel(), sums=True, spreads=True)
            return out

        def run(x: Tensor) -> Tensor:
            at = dim % x.dim()
            pieces = to_pieces(x, at, sizes, num_ranks)
            longest = max(piece.shape[at] for piece in pieces)
            shape = (*x.shape[:at], longest, *x.shape[at + 1 :])
            way = self.way("reduce_scatter", x, numel=math.prod(shape))
            if way == "nccl":
                return otherwise(x)
            if all(piece.shape[at] == longest for piece in pieces) and math.prod(x.shape[:at]) == 1:
                sent = x
            else:
                sent = torch.stack([_padded(piece, at, longest) for piece in pieces])
            out = x.new_empty(shape)
            self._exchange(way, sent, out, piece=out.numel(), total=sent.numel(), sums=True, spreads=True)
            return out.narrow(at, 0, pieces[own].shape[at])

        return even if dim == 0 and sizes is None else run

    def _permute(self, otherwise: Callable[[Tensor], Handle], *, shift: int) -> Callable[[Tensor], Handle]:
        shift %= self._group.size
        if shift == 0:
            return Handle.done

        def begin(x: Tensor) -> Handle:
            way = self.way("permute", x)
            if way == "nccl":
                return otherwise(x)
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            self._exchange(way, x, out, piece=x.numel(), total=x.numel(), shift=shift)
            return Handle.done(out)

        return begin

    def _all_to_all(
        self, otherwise: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
    ) -> Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]:
        # by one kernel whatever the counts: no rank knows those of two others
        def run(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
            if x.element_size() > 8:
                return otherwise(x, send_counts, receive_counts)
            out = x.new_empty((sum(receive_counts), *x.shape[1:]))
            width = x.shape[1:].numel()
            if len({*send_counts, *receive_counts}) == 1 and out.numel() < _MOST_ELEMENTS:
                self._exchange("large", x, out, piece=send_counts[0] * width, total=out.numel(), spreads=True)
                return out
            counts = self._counts(tuple(send_counts), tuple(receive_counts))
            return self.all_to_all(x, out, counts[0], counts[1])

        return run

    def all_to_all(self, x: Tensor, out: Tensor, send_counts: Tensor, receive_counts: Tensor) -> Tensor:
        """Rows for each from each, int64 counts [ranks] that the device reads: no host needs to know them.

        `out` must have room for all rows that come; what lies behind them is not written.
        """
        width = x.shape[1:].numel()
        self._exchange("large", x, out, piece=width, total=0, spreads=True, counts=(send_counts, receive_counts))
        return out

    # -- the kernels ---------------------------------------------------------------------------------------------------

    def way(self, kind: Kind, x: Tensor, *, numel: int | None = None) -> Way:
        """By what all ranks know: the shape and dtype."""
        numel = x.numel() if numel is None else numel
        is_sum = kind in ("all_reduce", "reduce_scatter")
        if (is_sum and (x.dtype == torch.bool or x.is_complex())) or x.element_size() > 8 or numel >= _MOST_ELEMENTS:
            return "nccl"
        num_bytes = numel * x.element_size()
        way = self.choice.of(kind, num_bytes)
        if way == "small" and not self.takes_small(x.dtype if is_sum else None, num_bytes):
            return "large"
        return way

    def takes_small(self, summed: torch.dtype | None, num_bytes: int) -> bool:
        """Whether the kernel for small pieces can do it."""
        fits = num_bytes % 8 == 0 and num_bytes <= self._geometry.small_bytes
        return fits and (summed is None or summed in _WORDS)

    def _exchange(
        self,
        way: Way,
        x: Tensor,
        out: Tensor,
        *,
        piece: int,
        total: int,
        sums: bool = False,
        spreads: bool = False,
        shift: int = 0,
        counts: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """`piece`: elements for or from each; see `large_kernel.py`. What others compute beside takes few blocks.

        residual: eights of bytes, which the way "small" adds to the sum.
        """
        if piece == 0:
            return
        self.side_stream.wait()
        x = x.contiguous().view(-1)
        dtype, geometry, group = x.dtype, self._geometry, self._group
        if way == "small":
            each = 8 // x.element_size()
            if x.data_ptr() % 8:
                x = x.clone()
            words = x.view(torch.int64)
            adds = words if residual is None else residual
            numbers = (
                self._late.data_ptr(),
                self._abandoned.data_ptr(),
                self._patience_ns,
                total // each,
                piece // each,
            )
            launch(
                self._small,
                (-(-piece // (each * UNITS)), 1, 1),
                (words, out.view(-1).view(torch.int64), adds, self._table, self._small_counters, *numbers),
                num_warps=UNITS // 32,
                num_stages=1,
                RANK=group.coordinate,
                RANKS=group.size,
                SPREADS=spreads,
                KIND=_WORDS[dtype] if sums else "",
                ADDS=residual is not None,
                SHIFT=shift,
                UNITS=UNITS,
                BLOCKS=SMALL_BLOCKS,
                EARLY=self._early,
                **({"launch_pdl": True} if self._early else {}),
            )
            return
        chunk = geometry.chunk_bytes // x.element_size()
        most = min(_BESIDE, self._blocks) if self.side_stream.is_current else self._blocks
        num_blocks = most if counts is not None else min(most, -(-piece // chunk))
        sent, received = counts or (self._table, self._table)
        if not sums and dtype == torch.bool:
            x, out = x.view(torch.uint8), out.view(torch.uint8)
        numbers = (self._late.data_ptr(), self._abandoned.data_ptr(), self._patience_ns, total, piece)
        launch(
            self._large,
            (num_blocks, 1, 1),
            (
                x, out.view(-1), self._table, self._counters, *numbers, sent, received, geometry.start_of_data,
                geometry.start_of_flags,
            ),
            num_warps=_WARPS,
            num_stages=1,
            RANK=group.coordinate,
            RANKS=group.size,
            SPREADS=spreads,
            SUMS=sums,
            SHIFT=shift,
            COUNTED=counts is not None,
            CHUNK=chunk,
            CHUNK_BYTES=geometry.chunk_bytes,
            BLOCKS=self._blocks,
            KIND=self._summed_as(x.dtype) if sums else None,  # type: ignore[no-untyped-call]
        )  # fmt: skip

    @functools.lru_cache(maxsize=256)  # noqa: B019 - as long as the memory
    def _counts(self, send_counts: tuple[int, ...], receive_counts: tuple[int, ...]) -> Tensor:
        return torch.tensor([send_counts, receive_counts], device=self.device)

    def close(self) -> None:
        """Takes part in nothing any more. Captured calls must be gone before."""
        self._handle = None
        if self.rows is not None:
            self.rows.close()
        if self.copies is not None:
            self.copies.close()


def _padded(piece: Tensor, dim: int, size: int) -> Tensor:
    if piece.shape[dim] == size:
        return piece
    out = piece.new_zeros((*piece.shape[:dim], size, *piece.shape[dim + 1 :]))
    out.narrow(dim, 0, piece.shape[dim]).copy_(piece)
    return out
