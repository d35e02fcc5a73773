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

from partitioner.program.node_arguments import symbols_of
from partitioner.sharding.layout import Layout, Rows

__all__ = ["held_alike", "is_own", "rows_of", "tokens_dim", "with_own"]


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


def held_alike(own: Layout, whole: Layout, rows: Rows) -> bool:
    """Whether `own` is `whole`, but for tokens that are dealt out as `rows`; partial sums are not compared."""
    return all(_alike(mine, dim, rows) for mine, dim in zip(own.dims, whole.dims, strict=True))


def _alike(mine: Any, dim: Any, rows: Rows) -> bool:
    if mine == dim or mine == rows_of(dim, rows):
        return True
    if not (isinstance(dim, Rows) and isinstance(mine, Rows)) or dim.kind not in (mine.kind, "tokens"):
        return False
    return set(mine.axes) == {*dim.axes, *rows.axes}
