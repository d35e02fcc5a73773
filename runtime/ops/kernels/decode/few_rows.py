"""Products of a few rows, as decode has them, with what stands before and behind them: one kernel each.

    few_rows(x, weight, bias)                        x [R, K], weight [N, K]: x weight^T + bias, [R, N]
    few_rows(x, weight, gate=.., act="silu")         act(x gate^T) * (x weight^T)
    few_rows(x, weight, added=.., norm=(w, eps))     total = x + added [R, K], and the product of its rms_norm times w

Sums are in float32 and round once, where the ops one by one round each time. What is added may be a sum over ranks:

    push_few_rows(sums, x, weight, ..)               the same product, which goes to all ranks and is their `sums`
    few_rows(x, weight, added=sums, norm=..)         on every rank next: total = x + the sum over the ranks
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.triton_needs import missing_for_triton

__all__ = ["KERNEL_DTYPES", "MOST_ROWS", "PartialSums", "can_launch_early", "few_rows", "push_few_rows", "takes"]

MOST_ROWS = 4
"""Beyond, a row's multiplications take longer than the weights take to come."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COLUMNS, _PER_WARP = 1024, 256
"""Columns at a time, and of a warp."""
_SUMS = 8
"""Rows of matrices that a program takes, times the rows of x."""
_PROGRAMS_PER_PROCESSOR = 2
_REGISTERS = 128
"""Of a thread at most for one row of 16-bit numbers, so that a processor has room for four programs of four warps; more
rows would leave registers for memory."""

FETCHED_COLUMNS = 0
"""Of its rows of a matrix, behind the first, that a program fetches into the L2 cache while it waits. Off, as is what
follows: they have not run on a GPU."""
AHEAD_BYTES = 0
"""Of the next product's matrices, that a product whose sums it takes fetches into the L2 cache."""
_STAYS_BYTES = 20 << 20
"""Of a matrix, up to which what is fetched before it is read is still in the cache afterwards."""


@dataclass(frozen=True)
class PartialSums:
    """Memory of all ranks of a group for the products that they sum: `SLOTS` calls of `num_ranks` parts.

    table: where each rank's memory is, int64 [num_ranks]; start: in bytes, where in it this memory begins, all of whose
    bits are ones at first; part_bytes: of a part. calls: int64 [4], zeros at first. late: memory with a number for each
    rank that a kernel waits for too long, abandoned: what ends its waiting; see `peer_memory/signals.py`.
    """

    table: Tensor
    calls: Tensor
    start: int
    part_bytes: int
    rank: int
    num_ranks: int
    late: int
    abandoned: int
    patience_ns: int

    def takes(self, numel: int, dtype: torch.dtype) -> bool:
        """By what all ranks know: whether a part has room for so many numbers, which are awaited by 16 bytes."""
        num_bytes = numel * dtype.itemsize
        return dtype in KERNEL_DTYPES and 0 < num_bytes <= self.part_bytes and num_bytes % 16 == 0


@functools.cache
def can_launch_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the end of the one before it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def takes(x: Tensor, *others: Tensor, may_be_empty: bool = False) -> bool:
    """Whether the kernel takes these: x [.., K] of a few rows, and all of its dtype on one GPU.

    may_be_empty: they may have no numbers, which a rank of several cannot know of another.
    """
    if not x.is_cuda or x.dtype not in KERNEL_DTYPES or not 0 < x.shape[:-1].numel() <= MOST_ROWS:
        return False
    alike = all(other.dtype == x.dtype and other.device == x.device for other in others)
    return alike and (may_be_empty or all(each.numel() for each in (x, *others))) and not missing_for_triton()


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    act: str = "",
    added: Tensor | PartialSums | None = None,
    norm: tuple[Tensor | None, float] | None = None,
) -> Any:
    """See the module's docstring: the product, or with `added` (which goes with `norm`) the total and the product."""
    x = _rows(x)
    if not weight.shape[0]:  # nothing to compute, but what is added must be taken all the same
        weight, bias, gate = x.new_zeros(1, x.shape[1]), None, None
        total, out = few_rows(x, weight, added=added, norm=norm)
        return total, out[:, :0]
    out = x.new_empty(x.shape[0], weight.shape[0])
    total = out if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, weight, bias, gate, act, added, norm, out, total, None, ())
    return out if added is None else (total, out)


def push_few_rows(
    sums: PartialSums,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    act: str = "",
    norm: tuple[Tensor | None, float] | None = None,
    ahead: tuple[Tensor, ...] = (),
) -> None:
    """Called by all ranks of a group, each of which takes the sum by its next kernel of `few_rows`.

    ahead: one or two matrices that the next kernel reads.
    """
    if x.shape[-1] == 0:  # nothing to multiply, but the others wait for what comes of it
        x, weight = x.new_zeros(*x.shape[:-1], 16), weight.new_zeros(weight.shape[0], 16)
        gate, norm = None if gate is None else weight, None
    x = _rows(x)
    _launch(x, weight, bias, gate, act, None, norm, x, x, sums, ahead)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, act: str, added: Tensor | PartialSums | None,
    norm: tuple[Tensor | None, float] | None, out: Tensor, total: Tensor, pushed: PartialSums | None,
    ahead: tuple[Tensor, ...],
) -> None:  # fmt: skip
    from runtime.ops.kernels.decode import few_rows_kernel  # Triton comes with torch for GPUs only

    pulled = added if isinstance(added, PartialSums) else None
    sums = pushed or pulled
    left = _rows(added) if isinstance(added, Tensor) else x
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    other = weight if gate is None else gate if gate.stride(-1) == 1 else gate.contiguous()
    (rows, inner), num_out = x.shape, weight.shape[0]
    scale, eps = (None, 0.0) if norm is None else norm
    tile_k = min(_COLUMNS, max(16, 1 << (inner - 1).bit_length()))
    tile_n = _tile_n(rows * (1 if gate is None else 2), num_out, x.device)
    num_warps = max(1, tile_k // _PER_WARP)
    early = can_launch_early(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    if rows == 1 and x.element_size() == 2:
        options["maxnreg"] = _REGISTERS
    ranks: tuple[Any, ...] = (x, x, 0, 0, 0, 0, 0)
    if sums is not None:
        part = sums.part_bytes // x.element_size()
        ranks = (sums.table, sums.calls, sums.late, sums.abandoned, sums.patience_ns, sums.start, part)
    programs = -(-num_out // tile_n)
    aligned = all(
        each.data_ptr() % 16 == 0 and each.stride(0) * each.element_size() % 16 == 0 for each in (weight, other)
    )
    fetch = FETCHED_COLUMNS if early and aligned and inner > tile_k and inner * x.element_size() % 16 == 0 else 0
    fetched_ahead = _ahead(ahead, programs) if early else None
    when = "" if fetched_ahead is None else "first" if weight.nbytes <= _STAYS_BYTES else "last"
    few_rows_kernel.few_rows[(programs,)](
        x, left, x if scale is None else scale.contiguous(), weight, other, x if bias is None else bias.contiguous(),
        out, total, eps, num_out, inner, x.stride(0), inner if pulled else left.stride(0), weight.stride(0),
        other.stride(0), *ranks, *(fetched_ahead or (x, 0, 0)),
        ROWS=rows, ADDS=added is not None, NORMS=norm is not None, WEIGHTED=scale is not None, ACT=act,
        BIAS=bias is not None, TILE_N=tile_n, TILE_K=tile_k, EVEN=inner % tile_k == 0, EARLY=early,
        PUSHES=pushed is not None, PULLS=pulled is not None, RANK=0 if sums is None else sums.rank,
        RANKS=1 if sums is None else sums.num_ranks, UNITS=4 * 32 * num_warps,
        FETCH=fetch, AHEAD=when,
        num_warps=num_warps, **options,
    )  # fmt: skip


def _ahead(matrices: tuple[Tensor, ...], programs: int) -> tuple[Tensor, int, int] | None:
    """Where the first begins, bytes from there to where odd programs begin, and bytes for each program."""
    turns = -(-programs // 2)
    if not AHEAD_BYTES or not matrices or any(not each.is_contiguous() or each.data_ptr() % 16 for each in matrices):
        return None
    first, last = matrices[0], matrices[-1]
    room = min(each.nbytes for each in matrices) * len(matrices) // (2 * turns)
    size = min(AHEAD_BYTES // programs, room) // 16 * 16
    if not size:
        return None
    return first, turns * size if last is first else last.data_ptr() - first.data_ptr(), size


def _tile_n(sums: int, num_out: int, device: torch.device) -> int:
    """Rows of a matrix for each program: fewer where processors would have none."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tile = max(1, _SUMS // (1 << (sums - 1).bit_length()))
    while tile > 1 and -(-num_out // tile) < _PROGRAMS_PER_PROCESSOR * processors:
        tile //= 2
    return tile


def _rows(x: Tensor) -> Tensor:
    """[R, K], each row's numbers one after the other."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])
