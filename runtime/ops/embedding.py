"""An embedding whose rows are split over ranks: each looks up its own, and a sum over the ranks completes the result.

    ids [B, S]   weight [V/n, H], from row `start` of the whole   result [B, S, H], zero where another rank has the row

Vocabulary-parallel embedding, Megatron-LM (arXiv:1909.08053, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.kernels.decode.few_rows import KERNEL_DTYPES
from runtime.ops.kernels.triton_needs import missing_for_triton

__all__ = ["vocab_parallel_embedding"]

_BLOCK = 1024
"""Numbers of a row that one program copies."""


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, *, start: int) -> Tensor:
    """See the module's docstring; a rank may hold no row at all."""
    rows = weight.shape[0]
    if rows == 0:
        return weight.new_zeros(*ids.shape, weight.shape[1])
    if _has_kernel(ids, weight):
        return _by_kernel(ids, weight, start)
    local = ids - start
    absent = (local < 0) | (local >= rows)
    return functional.embedding(local.masked_fill(absent, 0), weight).masked_fill(absent.unsqueeze(-1), 0)


def _has_kernel(ids: Tensor, weight: Tensor) -> bool:
    """Whether one kernel does it, which op by op are seven. A compiler makes one of its own."""
    if not weight.is_cuda or torch.compiler.is_compiling() or ids.dtype != torch.int64 or not ids.numel():
        return False
    return weight.dtype in KERNEL_DTYPES and weight.stride(-1) == 1 and not missing_for_triton()


def _by_kernel(ids: Tensor, weight: Tensor, start: int) -> Tensor:
    from runtime.ops.kernels.decode.embedding_kernel import look_up  # Triton comes with torch for GPUs only

    rows, width = weight.shape
    out = weight.new_empty(*ids.shape, width)
    look_up[(ids.numel(), -(-width // _BLOCK))](
        ids.contiguous(), weight, out, start, rows, weight.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4
    )
    return out
