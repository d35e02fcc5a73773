"""Rows that ranks share out: a rank takes its own of what every rank has, and collects those of all.

    take_rows      x[.., T, ..]     ->  x[.., T_i, ..]    the rank's own, one after the other; no communication
    collect_rows   x[.., T_i, ..]   ->  x[.., T, ..]      those of all ranks of the axes, in order of coordinate
    scatter_rows   x[.., T, ..]     ->  x[.., T_i, ..]    the rank's own of the sum over the axes

T rows over n ranks: each has ceil(T / n), the last ones fewer or none. So every rank knows how many each one has.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from runtime.ops.collectives import unbound

__all__ = ["collect_rows", "row_counts", "scatter_rows", "take_rows"]


def row_counts(total: int, parts: int) -> list[int]:
    """How many of `total` rows each of `parts` ranks has."""
    each = -(-total // parts)
    return [max(0, min(each, total - each * index)) for index in range(parts)]


def take_rows(x: Tensor, index: int, *, parts: int, axes: Sequence[str], dim: int, kind: str) -> Tensor:
    """The rows of `x` along `dim` that belong to rank `index` of the `parts` ranks of `axes`.

    kind: the name of the symbol of that dim's size, "sequence" or "batch"; or "tokens".
    """
    counts = row_counts(x.shape[dim], parts)
    return x.narrow(dim, sum(counts[:index]), counts[index])


def collect_rows(x: Tensor, total: int, axis: str | tuple[str, ...], *, dim: int) -> Tensor:
    """The rows of all ranks of `axis` along `dim`; `total`: how many they have together."""
    unbound("collect_rows", axis)


def scatter_rows(x: Tensor, axis: str | tuple[str, ...], *, dim: int, kind: str) -> Tensor:
    """The rank's own rows along `dim` of every rank's `x`, summed over `axis`; `kind`: see `take_rows`."""
    unbound("scatter_rows", axis)
