"""Parts of an attention that ranks have come to over tokens of their own, put together: one kernel per call.

Each rank brings float32 [B, H, 1, Dv + 1]: what its tokens yield, and as the last number their log-sum-exp, -inf where
it has none. All ranks have the same bits afterwards (arXiv:2411.01783, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.mapped_memory import SMALL_BLOCKS, UNITS
from runtime.communication.peer_memory.side_stream import SideStream
from runtime.ops.kernels.triton_needs import launch

__all__ = ["PartMerge"]


class PartMerge:
    """One rank's end. counters: those of the kernel for small pieces. `waiting`: what kernels are given that wait for
    others: see `signals.py`.
    """

    def __init__(
        self,
        group: Group,
        table: Tensor,
        counters: Tensor,
        waiting: tuple[Any, ...],
        side_stream: SideStream,
        *,
        early: bool,
    ) -> None:
        from runtime.communication.peer_memory.rows import merge_parts_kernel  # Triton comes with torch for GPUs only

        self._kernel = merge_parts_kernel.merge
        self._group, self._table, self._counters = group, table, counters
        self._waiting, self._side_stream, self._early = waiting, side_stream, early

    def takes(self, parts: Tensor) -> bool:
        """By what all ranks know: the shape."""
        width, rows = parts.shape[-1], parts.shape[:-1].numel()
        return parts.dtype == torch.float32 and 0 < rows <= SMALL_BLOCKS and 1 < width <= 2 * UNITS

    def merge(self, parts: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[B, H, 1, Dv] of `dtype`. sinks [H]: a score of nothing that each head sees besides."""
        heads, width = parts.shape[1], parts.shape[-1] - 1
        out = torch.empty(*parts.shape[:-1], width, dtype=dtype, device=parts.device)
        self._side_stream.wait()
        parts = parts.contiguous()
        launch(
            self._kernel,
            (parts.shape[:-1].numel(), 1, 1),
            (parts, out, parts if sinks is None else sinks.contiguous(), self._table, self._counters, *self._waiting),
            num_warps=4,
            num_stages=1,
            RANK=self._group.coordinate,
            RANKS=self._group.size,
            HEADS=heads,
            DV=width,
            LANES=max(32, 1 << (width // 2).bit_length()),
            UNITS=UNITS,
            BLOCKS=SMALL_BLOCKS,
            SINKS=sinks is not None,
            EARLY=self._early,
            **({"launch_pdl": True} if self._early else {}),
        )
        return out
