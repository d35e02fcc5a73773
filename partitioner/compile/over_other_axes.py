"""Ops over several axes of ranks, made to work over fewer: the ranks along the others have other tokens now.

all_reduce(x, ("sp", "tp"))       a sum over tp        what it was over sp has been summed elsewhere
once(x, first)                    once in a sum over tp
take_rows(x, axes=["sp", "tp"])   of own tokens, those that a rank of tp is to send
collect_rows(x, total, ..)        own tokens again; `total`: how many of these there are
"""

from __future__ import annotations

from typing import Any

from torch import fx

from partitioner.compile.insert_collectives import over
from partitioner.program.program import Entry, Program
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import read_call
from runtime.ops.local import once
from runtime.ops.rows import collect_rows, take_rows

__all__ = ["OVER_AXES", "over_other_axes"]

OVER_AXES = (all_reduce, once, take_rows, collect_rows)
"""Ops that `over_other_axes` knows."""


def over_other_axes(program: Program, node: fx.Node, own: fx.Node, gone: frozenset[str], *, total: Any = None) -> bool:
    """Makes `node` work on `own` over its axes that are not `gone`; False, and left as it is, where there are none.

    total: of collect_rows, how many tokens `own` is a part of.
    """
    left = tuple(axis for axis in _axes(program, node) if axis not in gone)
    if not left:
        return False
    parts = program.mesh.size(*left)
    args: Any = (own, over(left))
    if node.target is once:
        args = (own, program.local("first", Entry(1, left, tuple(int(i == 0) for i in range(parts)))))
    elif node.target is take_rows:
        args = (own, program.local("row_index", Entry(0, left, tuple(range(parts)))))
        node.kwargs = {**node.kwargs, "parts": parts, "axes": list(left)}
    elif node.target is collect_rows:
        args = (own, total, over(left))
    node.args = args
    return True


def _axes(program: Program, node: fx.Node) -> tuple[str, ...]:
    if node.target is once:
        first: Any = node.args[1]
        return program.table[first.name].axes
    if node.target is take_rows:
        named: Any = node.kwargs["axes"]
        return tuple(named)
    return read_call(node).axes
