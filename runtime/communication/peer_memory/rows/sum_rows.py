"""Sums over the ranks with the residual and the norm behind them, each rank on its share of the rows.

    rows       this rank's part of x goes to the rank whose rows they are     copied by the GPU's copy engines
    meet
    sum_norm   own rows: the sum, + residual, the norm                        one kernel
    meet
    rows       the others' normed rows are fetched                            copied by the GPU's copy engines

So the norm is computed once and not by every rank, the residual stays where it is needed next, and what crosses the
links takes no processors from products that run beside it. All of a rank's calls go through one stream, in the same
order on every rank. That is why one area is enough. A rank writes the next rows into another's area when it has met it
after that one's kernel has read the last ones; and it writes normed rows when it has met all others behind their
fetching of the last ones. More rows than the area has room for go in several rounds.

Megatron's sequence parallelism splits the rows between its linears so: arXiv:2205.05198, section 4.2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import OwnRows
from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.mapped_memory import ROW_BYTES, Geometry
from runtime.communication.peer_memory.side_stream import SideStream
from runtime.ops.kernels.triton_needs import launch

__all__ = ["RowSums"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 16384
"""Numbers of a row that one program holds."""
_MOST_KNOWN = 64
"""Sizes of x, of which it is remembered what is moved where."""
LEAST_BYTES = 4 << 20
"""Of x; below, the meetings take longer than what they save."""


@dataclass(frozen=True)
class _Round:
    """Of the rows that areas have room for: this rank's, where these are among all of its own, and of each other rank
    which rows go to or come from where.
    """

    mine: slice
    inside: slice
    sent: Sequence[tuple[slice, Tensor]]
    fetched: Sequence[tuple[slice, Tensor]]


class RowSums:
    """One rank's end. `waiting`: what kernels are given that wait for others: see `signals.py`."""

    def __init__(
        self,
        group: Group,
        memory: Tensor,
        handle: Any,
        table: Tensor,
        waiting: tuple[Any, ...],
        side_stream: SideStream,
    ) -> None:
        # Triton comes with torch for GPUs only
        from runtime.communication.peer_memory.rows import sum_rows_kernel

        self._meet_kernel, self._sum_norm_kernel = sum_rows_kernel.meet, sum_rows_kernel.sum_norm
        self._group, self._geometry = group, Geometry(group.size)
        self._table, self._waiting, self._side_stream = table, waiting, side_stream
        self._counter = torch.zeros(1, dtype=torch.int32, device=memory.device)
        start = self._geometry.start_of_rows
        offset = memory.data_ptr() - handle.buffer_ptrs[group.coordinate] + start
        self._areas = [
            memory[start : start + ROW_BYTES]
            if rank == group.coordinate
            else handle.get_buffer(rank, (ROW_BYTES,), torch.uint8, offset)
            for rank in range(group.size)
        ]
        self._known: dict[tuple[int, int, torch.dtype], Sequence[_Round]] = {}

    def takes(self, x: Tensor, weight: Tensor | None) -> bool:
        """By what all ranks know: shapes and dtypes of x [.., N] and of the norm's weight."""
        fits = x.dtype in _DTYPES and 0 < x.shape[-1] <= _WIDEST and x.numel() * x.element_size() >= LEAST_BYTES
        weighs = weight is None or (weight.dtype == x.dtype and weight.shape == x.shape[-1:])
        return fits and weighs and x.shape[-1] * x.element_size() <= self._piece_bytes

    @property
    def _piece_bytes(self) -> int:
        """Of an area, the part of each rank."""
        return ROW_BYTES // self._group.size // 256 * 256

    def begin(
        self, x: Tensor, residual: Tensor | OwnRows | None, weight: Tensor | None, eps: float
    ) -> Callable[[], tuple[OwnRows, Tensor]]:
        """Under way; what it returns waits for the end, and yields this rank's rows of the sum, and all normed rows.

        x [.., N]; residual: all rows, or those that such a call has yielded; weight [N].
        """
        shape, width = x.shape, x.shape[-1]
        x = x.contiguous().view(-1, width)
        share = OwnRows.share(len(x), self._group.size, self._group.coordinate)
        if isinstance(residual, Tensor):
            residual = residual.reshape(-1, width)[share]
        elif residual is not None:
            residual = residual.rows
        residual = None if residual is None else residual.contiguous()
        weight = None if weight is None else weight.contiguous()
        total = torch.empty(share.stop - share.start, width, dtype=x.dtype, device=x.device)
        normed = torch.empty_like(x)
        end = self._side_stream.begin(lambda: self._run(x, residual, weight, eps, total, normed))
        kept: list[Any] = [x, residual, weight]  # until nobody reads it any more

        def finish() -> tuple[OwnRows, Tensor]:
            self._side_stream.finish(end)
            kept.clear()
            return OwnRows(total, shape), normed.view(shape)

        return finish

    def _run(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, total: Tensor, normed: Tensor
    ) -> None:
        own, width = self._group.coordinate, x.shape[1]
        block = 1 << (width - 1).bit_length()
        area, piece = self._areas[own].view(x.dtype), self._piece_bytes // x.element_size()
        for each in self._rounds(len(x), width, x.dtype):
            for rows, theirs in each.sent:
                theirs.copy_(x[rows])
            self.meet()
            mine, inside = each.mine, each.inside
            if mine.start < mine.stop:
                launch(
                    self._sum_norm_kernel,
                    (mine.stop - mine.start, 1, 1),
                    (
                        x[mine],
                        area,
                        x if residual is None else residual[inside],
                        x if weight is None else weight,
                        total[inside],
                        normed[mine],
                        width,
                        piece,
                        eps,
                    ),
                    RANK=own,
                    RANKS=self._group.size,
                    ADDS=residual is not None,
                    WEIGHTED=weight is not None,
                    BLOCK=block,
                    num_warps=min(16, max(1, block // 512)),
                )
            self.meet()
            for rows, theirs in each.fetched:
                normed[rows].copy_(theirs)

    def _rounds(self, num_rows: int, width: int, dtype: torch.dtype) -> Sequence[_Round]:
        """What is moved where; remembered, as all layers of a model sum as many rows."""
        key = num_rows, width, dtype
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = list(self._made_rounds(*key))
        return self._known[key]

    def _made_rounds(self, num_rows: int, width: int, dtype: torch.dtype) -> Iterator[_Round]:
        size, own = self._group.size, self._group.coordinate
        share = [OwnRows.share(num_rows, size, rank) for rank in range(size)]
        piece = self._piece_bytes // dtype.itemsize
        at_a_time = piece // width

        def part(of: int, source: int, rows: slice) -> Tensor:
            """In a rank's area that of another, as so many rows."""
            count = rows.stop - rows.start
            return self._areas[of].view(dtype)[source * piece :][: count * width].view(count, width)

        others = [(own + step) % size for step in range(1, size)]
        for first in range(0, math.ceil(num_rows / size), at_a_time):
            rows = [slice(min(of.start + first, of.stop), min(of.start + first + at_a_time, of.stop)) for of in share]
            yield _Round(
                mine=rows[own],
                inside=slice(first, first + rows[own].stop - rows[own].start),
                sent=[(rows[rank], part(rank, own, rows[rank])) for rank in others],
                fetched=[(rows[rank], part(rank, rank, rows[rank])) for rank in others],
            )

    def meet(self) -> None:
        """On the stream: every rank has come so far on its own."""
        late, abandoned, patience_ns = self._waiting
        launch(
            self._meet_kernel,
            (1, 1, 1),
            (self._table, self._counter, late, abandoned, patience_ns, self._geometry.start_of_row_flags),
            RANK=self._group.coordinate,
            RANKS=self._group.size,
            num_warps=1,
        )
