"""Bytes that a node reads and writes, and which data-movement ops copy.

    products, norms, element-wise   each operand once, a weight too, however many tokens meet it; the result once
    look-ups                        of the table as much as comes out
    grouped linear                  of the experts' weights at most one expert for each routed row
    cached attention                of the cache what a query sees; the new keys and values, or what they are made of,
                                    are written to it
    views                           nothing; which ops are views is seen by running them on meta tensors, with strides
    copies                          what they take, and what they make
    communication                   nothing: its bytes are those of its meetings

A kernel that reads an operand twice, or keeps a result in registers for the next one, is not known here. Results have
the order of elements that their shapes say: attention, say, may make another, and then a reshape after it is a view.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from partitioner.analysis.cost.local_sizes import RankSizes, bytes_of, elements
from partitioner.analysis.cost.products import ATTENTION, CACHED, SHARED_OUT, kept_operands, keys_read
from partitioner.analysis.rules.data_movement import IDENTITIES, is_move, run_move
from partitioner.analysis.rules.notation import Notation
from partitioner.program.node_arguments import arguments, evaluate, map_nodes, node_values, operation
from runtime.ops.cached_attention import last_token
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.experts import expert_dispatch, grouped_linear
from runtime.ops.local import once, shard
from runtime.ops.rows import take_rows
from runtime.ops.state import cache_append, rows_at, state_read

aten = torch.ops.aten

__all__ = ["MemoryTraffic", "Traffic"]

LOOKUPS = {
    aten.embedding, aten.index, aten._unsafe_index, aten.index_select, aten.gather,
    vocab_parallel_embedding, last_token, rows_at, expert_dispatch,
}  # fmt: skip
"""Ops that read of their first operand (of an embedding, of its weight) as much as comes out."""

_ALWAYS_COPY = {aten.clone, aten._to_copy, aten.lift_fresh_copy}
_LOCAL_MOVES = {shard, once, take_rows}


class Traffic(NamedTuple):
    """Bytes read and written; `unsure`: why it could not be said exactly, or ""."""

    read: int
    written: int
    unsure: str = ""


class MemoryTraffic:
    """Of the nodes of one program on one rank, asked for in graph order."""

    def __init__(self, sizes: RankSizes) -> None:
        self.sizes = sizes
        self._tensors: dict[fx.Node, Any] = {}
        """Per node its tensors without data, whose strides say what is a view."""

    def source(self, node: fx.Node) -> None:
        """An input or a weight: in memory already."""
        self._tensors[node] = self._fresh(node)

    def moves(self, node: fx.Node) -> bool:
        return is_move(node) or operation(node) in _LOCAL_MOVES

    def move(self, node: fx.Node) -> Traffic:
        """Of a data-movement op."""
        sources = [n for n in node.all_input_nodes if node_values(n)]
        unsure = ""
        try:
            found = self._run(node, sources)
            made = [found] if isinstance(found, Tensor) else list(found)
            if tuple(tuple(each.shape) for each in made) != self.sizes.shapes(node):
                raise ValueError("shapes")
        except (RuntimeError, IndexError, ValueError, TypeError):
            found, unsure = self._fresh(node), "does not fit these sizes: counted as a copy"
        self._tensors[node] = found
        if operation(node) is operator.getitem:
            return Traffic(0, 0)
        memory = {_memory(tensor) for source in sources for tensor in _flat(self._tensors[source])}
        copied = [tensor for tensor in _flat(found) if _memory(tensor) not in memory]
        written = sum(tensor.nbytes for tensor in copied)
        if operation(node) is once:
            return Traffic(0, written, unsure)  # zeros, which read nothing
        read = min(sum(self.held(source) for source in sources), _at_width_of(written, node, sources))
        return Traffic(read if copied else 0, written, unsure)

    def compute(self, node: fx.Node, found: Notation) -> Traffic:
        """Of any other op, by its notation."""
        tensors = self._tensors[node] = self._fresh(node)
        op, a = operation(node), arguments(node)
        written = sum(tensor.nbytes for tensor in _flat(tensors))
        operands = {operand.node: self.held(operand.node) for operand in found.operands}
        if op in CACHED:
            keys = keys_read(node, found, self.sizes)
            kept = kept_operands(node)
            new = sum(operands[each] for each in kept)
            length = self.sizes.shapes(a["q"])[0][2]
            cached = new // length * keys if length else 0
            others = sum(size for operand, size in operands.items() if operand not in kept)
            return Traffic(others + new + cached, written + new)
        if op in ATTENTION:
            return Traffic(sum(operands.values()), written)
        if op is cache_append:
            return Traffic(sum(operands.values()), operands[a["x"]])
        if op is state_read:
            return Traffic(written, 0)
        if op in LOOKUPS:
            table = found.operands[1 if "weight" in a else 0].node
            operands[table] = min(operands[table], bytes_of(tuple(_flat(tensors)[0].shape), node_values(table)[0]))
        elif op is grouped_linear:
            experts, rows = self.sizes.shapes(a["weight"])[0][0], self.sizes.shapes(a["rows"])[0][0]
            operands[a["weight"]] = operands[a["weight"]] * min(experts, rows) // max(experts, 1)
        return Traffic(sum(operands.values()), written)

    def communicate(self, node: fx.Node) -> Traffic:
        tensors = self._tensors[node] = self._fresh(node)
        if node.target not in SHARED_OUT:
            return Traffic(0, 0)
        a = arguments(node)
        kept = kept_operands(node)
        queries, own = self.held(a["q"]), sum(self.held(each) for each in kept)
        keys = self.sizes.past + evaluate(a["q"].meta["val"].shape[2], self.sizes.symbols)
        length = self.sizes.shapes(kept[0])[0][-2]
        parts: int = a["parts"] if a["how"] == "merge" else 1
        seen = own // length * (keys // parts) if length else 0
        return Traffic(queries + seen, sum(tensor.nbytes for tensor in _flat(tensors)))

    def held(self, node: fx.Node) -> int:
        """Bytes in memory of what the node yields: an expanded dim lies there once."""
        return sum(
            elements(tuple(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or size == 0))
            * t.element_size()
            for t in _flat(self._tensors[node])
        )

    def _fresh(self, node: fx.Node) -> Any:
        made = [
            torch.empty(shape, dtype=value.dtype, device="meta")
            for shape, value in zip(self.sizes.shapes(node), node_values(node), strict=True)
        ]
        return made if isinstance(node.meta.get("val"), (tuple, list)) else (made[0] if made else [])

    def _run(self, node: fx.Node, sources: list[fx.Node]) -> Any:
        op, source = operation(node), self._tensors[sources[0]]
        if op in IDENTITIES:
            same = node_values(node)[0].dtype is source.dtype
            if op is aten.contiguous:
                return source.contiguous()
            return self._fresh(node) if op in _ALWAYS_COPY or not same else source

        def argument(n: fx.Node) -> Any:
            return self._tensors[n] if node_values(n) else self.sizes.integer(n)

        args, kwargs = self.sizes.program.at((node.args, dict(node.kwargs)), self.sizes.coordinates)
        args, kwargs = map_nodes(args, argument), map_nodes(kwargs, argument)
        return node.target(*args, **kwargs) if op in _LOCAL_MOVES else run_move(node, args, kwargs)  # type: ignore[operator]


def _at_width_of(written: int, node: fx.Node, sources: list[fx.Node]) -> int:
    """As many elements as are written, in bytes of the source's dtype."""
    return written // node_values(node)[0].dtype.itemsize * node_values(sources[0])[0].dtype.itemsize


def _flat(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _memory(tensor: Tensor) -> int:
    """Whose memory it lies in: the same for a view and what it is a view of."""
    return int(tensor.untyped_storage()._cdata)
