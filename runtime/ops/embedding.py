"""An embedding whose rows are split over ranks: each looks up its own, and a sum over the ranks completes the result.

    ids [B, S]   weight [V/n, H], from row `start` of the whole   result [B, S, H], zero where another rank has the row

Vocabulary-parallel embedding, Megatron-LM (arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["vocab_parallel_embedding"]


def vocab_parallel_embedding(ids: Tensor, weight: Tensor, *, start: int) -> Tensor:
    """See the module's docstring; a rank may hold no row at all."""
    rows = weight.shape[0]
    if rows == 0:
        return weight.new_zeros(*ids.shape, weight.shape[1])
    local = ids - start
    absent = (local < 0) | (local >= rows)
    return functional.embedding(local.masked_fill(absent, 0), weight).masked_fill(absent.unsqueeze(-1), 0)
