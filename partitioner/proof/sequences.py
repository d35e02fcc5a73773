"""That what works on a sequence which ranks share out gets what it speaks of: own tokens, and how many all have.

    sequence_attention          queries, keys and values are own rows, in the order and over the axis that is named
    cached_sequence_attention   the same, with the positions of the rows; or all tokens of the run, to be merged
    latent_sequence_attention   the same, of the narrow value that keys and values are made of
    own_last_token              own rows, and which part of the order they are

That operands have the same rows follows from index notation.
"""

from __future__ import annotations

from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts, sizes_read
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Entry, PerRankInt, Program
from partitioner.proof.per_rank_integers import Checks
from partitioner.sharding.layout import Rows
from runtime.ops.communicating import as_axes
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention
from runtime.ops.rows.share_rows import own_last_token
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

__all__ = ["SEQUENCE_CHECKS"]

KIND = "sequence"


def _check_attention(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    if a["parts"] != (ranks := program.mesh.size(*as_axes(a["axis"]))):
        raise LayoutError(f"node {node.name!r} attends to tokens of {a['parts']} ranks, where {a['axis']} has {ranks}")
    if a["how"] == "ring-ulysses" and (ranks % a["neighbours"] or a["mask"] is not None):
        raise LayoutError(f"node {node.name!r} exchanges heads between {a['neighbours']} of {ranks} ranks")
    if a["how"] != "merge":
        _require_rows(program, node, a["q"], 2, Rows(as_axes(a["axis"]), KIND, a["order"]), layouts)
    elif node.target is sequence_attention or set(layouts[a["q"]].axes) & set(as_axes(a["axis"])):
        raise LayoutError(f"node {node.name!r} merges parts of a cache, of queries that are {layouts[a['q']]}")
    if "total" in a:
        _require_total(program, node, a["q"], 2, layouts)


def _check_last_token(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a, axes = arguments(node), tuple(arguments(node)["axes"])
    _require_rows(program, node, a["x"], 1, Rows(axes, KIND, a["order"]), layouts)
    _require_total(program, node, a["x"], 1, layouts)
    index, parts = a["index"], program.mesh.size(*axes)
    entry = program.table[index.name] if isinstance(index, PerRankInt) else None
    if entry != Entry(0, axes, tuple(range(parts))) or a["parts"] != parts:
        raise LayoutError(f"node {node.name!r} picks as part {index} of {a['parts']}, where {axes} has {parts} ranks")


def _require_rows(program: Program, node: fx.Node, x: fx.Node, dim: int, rows: Rows, layouts: Layouts) -> None:
    layout, size = layouts[x], x.meta["val"].shape[dim]
    if layout.dims[dim] != rows or size != program.symbols.get(KIND):
        raise LayoutError(f"node {node.name!r} needs {rows} along dim {dim} of {x.name!r} [{size}], which is {layout}")


def _require_total(program: Program, node: fx.Node, x: fx.Node, dim: int, layouts: Layouts) -> None:
    """The number of tokens that all ranks have together, read off what has those of all."""
    total, size = arguments(node)["total"], x.meta["val"].shape[dim]
    found = total.meta["val"] if isinstance(total, fx.Node) else total
    if found != size or any(isinstance(layouts[read].dims[i], Rows) for read, i in sizes_read(node)):
        raise LayoutError(f"node {node.name!r} is told that all ranks have {found} tokens, {total}; they have {size}")


SEQUENCE_CHECKS: Checks = {
    sequence_attention: _check_attention,
    cached_sequence_attention: _check_attention,
    latent_sequence_attention: _check_attention,
    own_last_token: _check_last_token,
}
