"""Rows that ranks share out: a rank takes its own of what every rank has, and collects those of all.

    take_rows        x[.., T, ..]     ->  x[.., T_i, ..]    the rank's own, one after the other; no communication
    collect_rows     x[.., T_i, ..]   ->  x[.., T, ..]      those of all ranks of the axes, in order of position
    scatter_rows     x[.., T, ..]     ->  x[.., T_i, ..]    the rank's own of the sum over the axes
    own_last_token   x[B, T_i, H]     ->  x[B, 1, H]        the last token's row on the rank that has it, or zeros

T rows over n ranks: in "blocks" each has ceil(T / n), the last ones fewer or none; "zigzag" is the other order of
`token_order`. Either way every rank knows how many each one has.

A dim may run over the rows of several sequences, one after the other, `outer` of them: each rank then has its rows of
each sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.ops.collectives import arriving, unbound
from runtime.ops.rows.token_order import TokenOrder

__all__ = [
    "collect",
    "collect_rows",
    "in_order",
    "own_last_token",
    "row_counts",
    "scatter",
    "scatter_rows",
    "take_rows",
]


def row_counts(total: int, parts: int) -> list[int]:
    """How many of `total` rows each of `parts` ranks has, in blocks."""
    each = -(-total // parts)
    return [max(0, min(each, total - each * index)) for index in range(parts)]


def take_rows(
    x: Tensor,
    index: int,
    outer: int = 1,
    *,
    parts: int,
    axes: Sequence[str],
    dim: int,
    kind: str,
    order: str = "blocks",
) -> Tensor:
    """The rows of `x` along `dim` that belong to rank `index` of the `parts` ranks of `axes`.

    kind: the name of the symbol of that dim's size, "sequence" or "batch"; or "tokens". order: see `token_order`.
    outer: how many sequences the dim runs over.
    """
    if outer != 1:
        apart = _apart(x, dim, outer)
        taken = take_rows(apart, index, parts=parts, axes=axes, dim=dim + 1, kind=kind, order=order)
        return taken.flatten(dim, dim + 1)
    if order == "blocks":
        counts = row_counts(x.shape[dim], parts)
        return x.narrow(dim, sum(counts[:index]), counts[index])
    runs = TokenOrder.of(int(x.shape[dim]), parts, order).runs[index]
    pieces = [x.narrow(dim, start, stop - start) for start, stop in runs]
    return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)


def _apart(x: Tensor, dim: int, outer: int) -> Tensor:
    """With a dim for the sequences, and one for the rows of each."""
    return x.view(*x.shape[:dim], outer, x.shape[dim] // outer, *x.shape[dim + 1 :])


def collect_rows(
    x: Tensor,
    total: int,
    axis: str | tuple[str, ...],
    outer: int = 1,
    *,
    dim: int,
    order: str = "blocks",
    ahead: bool = False,
) -> Tensor:
    """The rows of all ranks of `axis` along `dim`; `total`: how many they have together, of each of the sequences.

    ahead: they are on their way, and may be read once they have `landed`, until others are collected ahead.
    """
    unbound("collect_rows", axis)


def collect(
    channel: Any, x: Tensor, total: int, outer: int = 1, *, dim: int, order: str = "blocks", ahead: bool = False
) -> Tensor:
    """`collect_rows` over a channel."""
    if outer != 1:
        return collect(channel, _apart(x, dim, outer), total, dim=dim + 1, order=order).flatten(dim, dim + 1)
    num_ranks = len(channel.ranks)
    if order == "blocks":
        sizes = _unless_even(row_counts(total, num_ranks))
        if ahead and not torch.compiler.is_compiling():
            return arriving(channel.all_gather_begin(x, dim, sizes))
        return channel.all_gather(x, dim=dim, sizes=sizes)  # type: ignore[no-any-return]
    found = TokenOrder.of(int(total), num_ranks, order)
    return in_order(channel.all_gather(x, dim=dim, sizes=list(found.counts)), found, dim)


def _unless_even(counts: list[int]) -> list[int] | None:
    """None where all have as many: then it is the same call whatever their number, which a channel prepares once."""
    return None if not torch.compiler.is_compiling() and len(set(counts)) == 1 else counts


def in_order(x: Tensor, order: TokenOrder, dim: int) -> Tensor:
    """The rows of rank 0, 1, .. one after the other, put in order of position."""
    pieces = [x.narrow(dim, start, stop - start) for start, stop in order.joined]
    return torch.cat(pieces, dim) if len(pieces) > 1 else x


def scatter_rows(
    x: Tensor,
    axis: str | tuple[str, ...],
    outer: int = 1,
    *,
    dim: int,
    kind: str,
    order: str = "blocks",
    ahead: bool = False,
) -> Tensor:
    """The rank's own rows along `dim` of every rank's `x`, summed over `axis`; ahead: see `collect_rows`; the rest:
    `take_rows`.
    """
    unbound("scatter_rows", axis)


def scatter(
    channel: Any, x: Tensor, outer: int = 1, *, dim: int, kind: str, order: str = "blocks", ahead: bool = False
) -> Tensor:
    """`scatter_rows` over a channel."""
    if outer != 1:
        return scatter(channel, _apart(x, dim, outer), dim=dim + 1, kind=kind, order=order).flatten(dim, dim + 1)
    num_ranks = len(channel.ranks)
    if order == "blocks":
        sizes = _unless_even(row_counts(x.shape[dim], num_ranks))
    else:
        found = TokenOrder.of(int(x.shape[dim]), num_ranks, order)
        sizes = list(found.counts)
        runs = [run for mine in found.runs for run in mine]
        if len(runs) > 1:
            x = torch.cat([x.narrow(dim, start, stop - start) for start, stop in runs], dim)
    if ahead and not torch.compiler.is_compiling():
        return arriving(channel.reduce_scatter_begin(x, dim, sizes))
    return channel.reduce_scatter(x, dim=dim, sizes=sizes)  # type: ignore[no-any-return]


def own_last_token(
    x: Tensor, last: Tensor, total: int, index: int, *, parts: int, axes: Sequence[str], order: str = "zigzag"
) -> Tensor:
    """Of each sequence the row of its last token, if it is one of this rank's; zeros otherwise: a partial sum.

    last: [B], its place among all `total` tokens. index, parts, axes: as in `take_rows`.
    """
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], 1, x.shape[2])
    held = TokenOrder.of(int(total), parts, order).held(index, x.device)
    mine = held == last[:, None]
    at: Any = mine.to(torch.int8).argmax(1)[:, None, None].expand(-1, 1, x.shape[2])
    # a product would make NaN of what must not count
    return torch.where(mine.any(1)[:, None, None], x.gather(1, at), torch.zeros((), dtype=x.dtype, device=x.device))
