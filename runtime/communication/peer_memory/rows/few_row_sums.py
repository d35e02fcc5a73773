"""Sums of few rows over the ranks with the residual and the norm behind them, every rank on all rows: one kernel.

As an all_reduce of a small piece, which waits for the others as long as it takes itself: what stands behind it takes no
launch, and reads nothing again. More rows are shared out: `sum_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.mapped_memory import SMALL_BLOCKS, UNITS
from runtime.communication.peer_memory.side_stream import SideStream
from runtime.ops.kernels.triton_needs import launch

__all__ = ["FewRowSums", "as_words"]

_KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_WIDEST = 1024
"""Units of a row: a thread of a program has one. Two H200 take 4.4 us for 32 such rows, where an all_reduce and a
kernel behind it take 4.8; but 10.0 for rows of twice as many units, and these two kernels 7.2.
"""


class FewRowSums:
    """One rank's end. waiting: as `RowSums` has it; is_small: whether the kernel for small pieces sums such tensors."""

    def __init__(
        self, group: Group, table: Tensor, counters: Tensor, waiting: tuple[Any, ...], side_stream: SideStream,
        is_small: Callable[[Tensor], bool], *, early: bool,
    ) -> None:  # fmt: skip
        # Triton comes with torch for GPUs only
        from runtime.communication.peer_memory.rows.few_row_sums_kernel import sum_norm_of_few

        self._kernel, self._group = sum_norm_of_few, group
        self._table, self._counters, self._waiting = table, counters, waiting
        self._side_stream, self._is_small, self._early = side_stream, is_small, early

    def takes(self, x: Tensor, residual: Tensor, weight: Tensor | None) -> bool:
        """By what all ranks know: shapes and dtypes of x, residual [.., N] and of the norm's weight [N]."""
        units, rest = divmod(x.shape[-1] * x.element_size(), 8)
        fits = x.dtype in _KINDS and rest == 0 and 0 < units <= _WIDEST and units % UNITS == 0
        fits = fits and x.numel() > 0 and residual.shape == x.shape and residual.dtype == x.dtype
        weighs = weight is None or (weight.dtype == x.dtype and weight.shape == x.shape[-1:])
        return fits and weighs and self._is_small(x)

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        """The sum of x plus the residual, and that normed and weighed, on every rank."""
        self._side_stream.wait()
        total, normed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        units = x.shape[-1] * x.element_size() // 8
        x = as_words(x)
        padded = 1 << (units - 1).bit_length()
        launch(
            self._kernel,
            (x.numel() // units, 1, 1),
            (
                x, as_words(residual), x if weight is None else as_words(weight), as_words(total), as_words(normed),
                self._table, self._counters, *self._waiting, units, eps,
            ),
            num_warps=padded // 32,
            num_stages=1,
            RANK=self._group.coordinate,
            RANKS=self._group.size,
            WEIGHTED=weight is not None,
            KIND=_KINDS[total.dtype],
            UNITS=UNITS,
            BLOCKS=SMALL_BLOCKS,
            PADDED=padded,
            EARLY=self._early,
            **({"launch_pdl": True} if self._early else {}),
        )  # fmt: skip
        return total, normed


def as_words(x: Tensor) -> Tensor:
    """As eights of bytes, one after the other."""
    x = x.contiguous().view(-1)
    return (x.clone() if x.data_ptr() % 8 else x).view(torch.int64)
