"""Layouts of what ranks share out, compared with those of what every rank has all of.

    [*, *]                   [sequence rows of sp, *]               the tokens are a rank's own, nothing is otherwise
    [tokens rows of tp, *]   [tokens rows of tp of the rows of sp]  those that it sends are of its own
    [routed rows of tp, *]   [routed rows of sp x tp, *]            what comes to its experts is of ranks like it
    [batch rows of dp, *]    [sequence rows of sp of those of dp]   its tokens of its sequences, along one dim

So a pass that deals tokens out can tell that it has changed nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from partitioner.program.node_arguments import node_values, symbols_of
from partitioner.sharding.layout import Layout, Rows
from partitioner.sharding.mesh import AXES, EXPERT_AXES

__all__ = ["has_own", "rows_of", "summed_by_experts", "tokens_dim", "with_own", "works_row_by_row"]


def tokens_dim(shape: Sequence[Any], symbol: sympy.Symbol) -> int | None:
    """The one dim that runs over tokens, alone or with others."""
    dims = [i for i, size in enumerate(shape) if symbol in symbols_of(size)]
    return dims[0] if len(dims) == 1 else None


def rows_of(dim: Any, rows: Rows) -> Rows | None:
    """What a dim of all tokens, or of those of own sequences, runs over with own tokens; None: of others."""
    if dim is None:
        return rows
    return dim.merged(rows) if isinstance(dim, Rows) and dim != rows else None


def with_own(shape: Sequence[Any], layout: Layout, rows: Rows, symbol: sympy.Symbol) -> Layout | None:
    """The same with own tokens; None where it has no dim of tokens, or several, or is divided over the axes."""
    dim = tokens_dim(shape, symbol)
    own = None if dim is None else rows_of(layout.dims[dim], rows)
    if dim is None or own is None or not (layout.axes | layout.partial).isdisjoint(rows.axes):
        return None
    return layout.with_dim(dim, own)


def is_own(dim: Any, rows: Rows) -> bool:
    """Whether a dim runs over own rows of the axes of `rows`, perhaps of others as well."""
    return isinstance(dim, Rows) and set(rows.axes) <= set(dim.axes)


def has_own(layout: Layout | tuple[Layout, ...] | None, rows: Rows) -> bool:
    """Whether a value, or one of several, has a dim of own rows; None: a node that yields no tensor."""
    several = layout if isinstance(layout, tuple) else (layout,)
    return any(is_own(dim, rows) for each in several if each for dim in each.dims)


def works_row_by_row(
    node: fx.Node, own: Any, whole: Any, rows: Rows, symbol: sympy.Symbol, summed: frozenset[str]
) -> bool:
    """Whether the layout that `node` yields of own rows is the one it yields of all, but for these rows.

    own, whole: its layouts, of own rows and of all. symbol: the size of the dims that are dealt out. summed: axes over
    which own rows leave no partial sum.
    """
    several = (own, whole) if isinstance(whole, tuple) else ((own,), (whole,))
    for value, mine, layout in zip(node_values(node), *several, strict=True):
        dims = [dim for dim, size in enumerate(value.shape) if symbol in symbols_of(size)]
        alike = _held_alike(mine, layout, rows) and mine.partial == layout.partial - summed
        if not alike or not all(is_own(mine.dims[dim], rows) for dim in dims):
            return False
    return True


def summed_by_experts(axis: str) -> frozenset[str]:
    """Axes over which no partial sum of a rank's own tokens along `axis` is left: experts sum theirs where they end."""
    return frozenset({axis, *EXPERT_AXES} - (set(AXES) - {axis}))


def _held_alike(own: Layout, whole: Layout, rows: Rows) -> bool:
    """Whether `own` is `whole`, but for tokens that are dealt out as `rows`; partial sums are not compared."""
    return all(_alike(mine, dim, rows) for mine, dim in zip(own.dims, whole.dims, strict=True))


def _alike(mine: Any, dim: Any, rows: Rows) -> bool:
    if mine == dim or mine == rows_of(dim, rows):
        return True
    if not (isinstance(dim, Rows) and isinstance(mine, Rows)) or dim.kind not in (mine.kind, "tokens"):
        return False
    return set(mine.axes) == {*dim.axes, *rows.axes}
