"""How large a rank's tensors are, at given sizes of the batch and the text.

    None                 the whole dim
    Split(axes, owned)   the owned indices of the constant factor, times the symbols' values
    Rows(axes, kind)     the rank's share of the rows, as `runtime.ops.rows.token_order` deals them; of "routed" rows,
                         whose number only a run knows, an equal share

Sizes that depend on data have no symbol of the program: they are in `unknown`, not in a shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.errors import InputError
from partitioner.program.node_arguments import arguments, evaluate, map_nodes, node_values, operation
from partitioner.program.program import Program, Value
from partitioner.sharding.layout import REPLICATED, Layout, Rows, Split
from runtime.ops.rows import row_counts
from runtime.ops.rows.token_order import TokenOrder

__all__ = ["RankSizes"]

Shape = tuple[int, ...]


class RankSizes:
    """The sizes of one rank's tensors.

    sizes: by name, the value of every symbol of the program ("batch", "sequence", ...), and "past": how many tokens
    of each row the cache holds before the run (0 where it is not given). "slots" is past + sequence unless given.
    """

    def __init__(self, program: Program, coordinates: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        self.program = program
        self.rank = program.mesh.rank(coordinates)
        self.coordinates = program.mesh.coordinates(self.rank)
        given = dict(sizes)
        self.past = given.pop("past", 0)
        if "slots" in program.symbols and "sequence" in given:
            given.setdefault("slots", self.past + given["sequence"])
        if set(given) != set(program.symbols) or any(size < 1 for size in given.values()) or self.past < 0:
            raise InputError(
                f"the cost of {program.name or 'this program'} is a matter of the sizes {', '.join(program.symbols)}, "
                f"each at least 1, and of past, the tokens in the cache before the run; got {dict(sizes)}"
            )
        if self.past and not program.states:
            raise InputError(
                f"past is {self.past}, and {program.name or 'this program'} remembers nothing between runs: take the "
                "program of the entry prefill or decode, or leave past out"
            )
        self.symbols = {symbol: given[name] for name, symbol in program.symbols.items()}
        self._ones = dict.fromkeys(program.symbols.values(), 1)
        self._integers: dict[fx.Node, int] = {}
        self._shapes: dict[tuple[Value, Layout, int], Shape] = {}

    def layouts(self, node: fx.Node) -> tuple[Layout, ...]:
        """One for each tensor that the node yields; whole where nothing is laid out yet."""
        values = node_values(node)
        if node.op == "get_attr":
            name = str(node.target)
            return (self.program.layout_of(name),)
        found = node.meta.get("layout")
        if isinstance(found, Layout):
            return (found,)
        return tuple(found) if found is not None else tuple(REPLICATED(len(value.shape)) for value in values)

    def shapes(self, node: fx.Node) -> tuple[Shape, ...]:
        """The shape of each tensor that the node yields, on this rank."""
        return tuple(
            self.shape(value, layout) for value, layout in zip(node_values(node), self.layouts(node), strict=True)
        )

    def shape(self, value: Value, layout: Layout, rank: int | None = None) -> Shape:
        """The shape on this rank, or on another."""
        rank = self.rank if rank is None else rank
        key = (value, layout, rank)
        if key not in self._shapes:
            at = self.coordinates if rank == self.rank else self.program.mesh.coordinates(rank)
            self._shapes[key] = tuple(
                self._size(size, dim, at) for size, dim in zip(value.shape, layout.dims, strict=True)
            )
        return self._shapes[key]

    def _size(self, size: int | sympy.Expr, dim: Split | Rows | None, at: Mapping[str, int]) -> int:
        whole = evaluate(size, self.symbols)
        if isinstance(dim, Split):
            constant = evaluate(size, self._ones)
            return whole // constant * dim.at(self.program.mesh, at).size if constant else 0
        return whole if dim is None else self._rows(size, whole, dim, at)

    def _rows(self, size: int | sympy.Expr, whole: int, dim: Rows, at: Mapping[str, int]) -> int:
        mesh, symbols = self.program.mesh, dict(self.symbols)
        for level in dim.levels:  # rows, rows of these, and so on
            parts, index = mesh.size(*level.last_axes), mesh.index(level.last_axes, at)
            if level.kind in self.program.symbols:  # a dim may be the symbol times others: a flattened batch
                symbol = self.program.symbols[level.kind]
                symbols[symbol] = TokenOrder.of(symbols[symbol], parts, level.order).counts[index]
                whole = evaluate(size, symbols)
            elif level.kind == "tokens":
                factor = evaluate(size, self._ones)
                whole = factor * row_counts(whole // factor, parts)[index]
            else:
                whole = -(-whole // parts)
        return whole

    def integer(self, node: fx.Node) -> int:
        """What an integer of the graph is on this rank: sizes of its tensors, and what is reckoned from these."""
        if node not in self._integers:
            self._integers[node] = self._reckoned(node)
        return self._integers[node]

    def _reckoned(self, node: fx.Node) -> int:
        if operation(node) is torch.ops.aten.sym_size:
            a = arguments(node)
            return int(self.shapes(a["self"])[0][a["dim"]])
        if node.op != "call_function" or any(node_values(source) for source in node.all_input_nodes):
            return evaluate(node.meta["val"], self.symbols)
        args, kwargs = self.program.at((node.args, dict(node.kwargs)), self.coordinates)
        assert callable(node.target)
        return int(node.target(*map_nodes(args, self.integer), **map_nodes(kwargs, self.integer)))

    def unknown(self, node: fx.Node) -> str:
        """The sizes of the node that only a run knows, as text; "" where there are none."""
        known = set(self.symbols)
        found = {
            str(symbol)
            for value in node_values(node)
            for size in value.shape
            if isinstance(size, sympy.Basic)
            for symbol in size.free_symbols - known
        }
        return ", ".join(sorted(found))


def elements(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def bytes_of(shape: Shape, value: Any) -> int:
    return elements(shape) * int(value.dtype.itemsize)
