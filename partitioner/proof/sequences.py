"""That attention over a sequence which ranks share out gets what it speaks of: own tokens, and how many all have.

    sequence_attention   queries, keys and values are the rank's own rows of one order, over the axis that is named
"""

from __future__ import annotations

from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts, sizes_read
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program
from partitioner.sharding.layout import Rows
from runtime.ops.communicating import read_call

__all__ = ["require_own_tokens"]

_TOKENS = 2


def require_own_tokens(program: Program, node: fx.Node, layouts: Layouts) -> None:
    """Raises `LayoutError`; that queries, keys and values have the same rows follows from index notation."""
    a, axes = arguments(node), read_call(node).axes
    layout, size = layouts[a["q"]], a["q"].meta["val"].shape[_TOKENS]
    rows = Rows(axes, "sequence", a["order"])
    if layout.dims[_TOKENS] != rows or size != program.symbols.get("sequence"):
        raise LayoutError(f"node {node.name!r} attends to {rows}, but its queries {a['q']} are {layout}")
    total = a["total"]
    found = total.meta["val"] if isinstance(total, fx.Node) else total
    if found != size or any(isinstance(layouts[read].dims[dim], Rows) for read, dim in sizes_read(node)):
        raise LayoutError(f"node {node.name!r} attends to {size} tokens of all ranks, but its total {total} is {found}")
