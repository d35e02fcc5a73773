"""What a rank remembers between runs, as the ops that read and write it.

    cache_append(x[.., S, D], positions, slots)   -> [.., T, D]    slot j holds what stands at position j
    state_read(batch)                             -> [B, *shape]   what a layer remembers of all tokens before
    state_write(value[B, *shape], active[B])      -> value         remembered from now on, by the active rows
    position_mask(positions[B, S], slots[T])      -> [B, 1, S, T]  additive: which slots each token may see
    rows_at(table[1, .., P, ..], positions, dim)  -> [B, .., S, ..] what a table says of each token's position

A slot that holds nothing yet lies behind every token, so that a causal mask hides it. A row that has no token left in a
run takes its last one again and is not active: a state that sums up all tokens would count it twice, and keys made of
such a state would not be those that its position has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from partitioner.errors import InputError
from runtime.ops.attention import allowed

__all__ = ["cache_append", "position_mask", "rows_at", "state_read", "state_write"]


@has_side_effect
def cache_append(x: Tensor, positions: Tensor, slots: Tensor, *, state: str) -> Tensor:
    """See the module's docstring. A cache takes its place when a rank is loaded, as for the next two."""
    raise _unbound("cache_append", state)


def state_read(batch: Tensor, *, state: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """`batch` has as many rows as the run; `shape` and `dtype` are those of the whole model."""
    raise _unbound("state_read", state)


@has_side_effect
def state_write(value: Tensor, active: Tensor, *, state: str) -> Tensor:
    raise _unbound("state_write", state)


def _unbound(op: str, state: str) -> InputError:
    return InputError(
        f"{op} of {state!r} is not bound to a cache: run the rank through Engine.generate or parts.generate(...)"
    )


def position_mask(
    positions: Tensor,
    slots: Tensor,
    padding: Tensor | None = None,
    *,
    dtype: torch.dtype,
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`padding` [B, T]: non-zero where a slot is a token; the keywords are those of `attention`."""
    seen = allowed(positions[:, :, None], slots, causal=causal, window=window, chunk=chunk)[:, None]
    if padding is not None:
        seen = seen & padding.bool()[:, None, None]
    zero = torch.zeros((), dtype=dtype, device=positions.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


def rows_at(table: Tensor, positions: Tensor, dim: int) -> Tensor:
    found = table[0].index_select(dim - 1, positions.reshape(-1))
    shape = (*found.shape[: dim - 1], *positions.shape, *found.shape[dim:])
    return found.reshape(shape).movedim(dim - 1, 0)
