"""What a program costs as expressions: in batch, sequence and past, and in what a rank holds of each split class.

    batch, sequence, past     as `program_cost` has them: rows, new tokens of each, tokens in the cache before
    heads, kv_heads, ffn ..   how many of a class's groups the fullest rank holds (`SplitClass.held`)
    experts                   how many experts of a layer the rank holds
    experts_met               how many of them at least one of its rows has chosen
    routed                    the rank's share of all (token, expert) pairs of its tokens

A program that was laid out once, at two ranks, so says what it costs at any number: what is split, and how far, does
not depend on it, until there are more ranks than atoms. Of identical layers one is looked at (`find_blocks`).
Whether a reshape copies depends on sizes: it is seen at the sizes that are given, and holds for all like them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.analysis.cost.local_sizes import RankSizes
from partitioner.analysis.cost.memory_traffic import LOOKUPS, MemoryTraffic
from partitioner.analysis.cost.products import (
    ATTENTION,
    CACHED,
    LATENT,
    attention_limits,
    kept_operands,
    latent_products,
    latent_sizes,
    product_flops,
)
from partitioner.analysis.cost.value_classes import ValueClasses
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.notation import Notation
from partitioner.program.node_arguments import arguments, describe, evaluate, node_values, operation
from partitioner.program.program import Program, Value
from partitioner.sharding.layout import Layout, Split
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from runtime.ops.state import cache_append, state_read

aten = torch.ops.aten

__all__ = [
    "EXPERTS",
    "MET",
    "PAST",
    "ROUTED",
    "Expressions",
    "MeetingExpression",
    "NodeExpression",
    "SymbolicSizes",
    "expressions",
]

Expr = Any
PAST = sympy.Symbol("past", integer=True, nonnegative=True)
EXPERTS, MET = (sympy.Symbol(name, integer=True, positive=True) for name in ("experts", "experts_met"))
ROUTED = sympy.Symbol("routed", positive=True)
_REFERENCE = {"batch": 3, "past": 7}


@dataclass(frozen=True)
class MeetingExpression:
    """bytes: what a rank brings."""

    kind: str
    axes: tuple[str, ...]
    bytes: Expr


@dataclass(frozen=True)
class NodeExpression:
    """kind: "linear", "attention", "experts", "move", "meeting" or "other". product: of a linear, rows m, n out of k;
    of attention, rows, heads, kv heads, head sizes together, queries, keys read, pairs; of experts, rows, n, k. made:
    bytes of its result. source: of a linear, the node that it multiplies.
    """

    name: str
    op: str
    path: str
    kind: str
    dtype: str
    flops: Expr = 0
    read: Expr = 0
    written: Expr = 0
    made: Expr = 0
    product: tuple[Expr, ...] = ()
    meetings: tuple[MeetingExpression, ...] = ()
    unsure: str = ""
    source: str = ""


@dataclass
class SymbolicSizes:
    """In the place of `RankSizes`: shapes as expressions."""

    program: Program
    classes: ValueClasses
    past: Expr = PAST
    routed: set[fx.Node] = field(default_factory=set)
    """Nodes whose rows are (token, expert) pairs."""
    _known: dict[fx.Node, tuple[tuple[Expr, ...], ...]] = field(default_factory=dict)

    @property
    def batch(self) -> Expr:
        return self.program.symbols.get("batch", sympy.Integer(1))

    @property
    def sequence(self) -> Expr:
        return self.program.symbols.get("sequence", sympy.Integer(1))

    def layouts(self, node: fx.Node) -> tuple[Layout, ...]:
        return self.classes.layouts(node)

    def shapes(self, node: fx.Node) -> tuple[tuple[Expr, ...], ...]:
        if node not in self._known:
            self._known[node] = tuple(
                tuple(self._size(node, size, dim) for size, dim in zip(value.shape, layout.dims, strict=True))
                for value, layout in zip(node_values(node), self.layouts(node), strict=True)
            )
        return self._known[node]

    def _size(self, node: fx.Node, size: Expr, dim: Any) -> Expr:
        if isinstance(dim, Split):
            constant = evaluate(size, dict.fromkeys(self.program.symbols.values(), 1))
            size = sympy.Rational(1, constant) * size * self.classes.local(node, constant, dim) if constant else 0
        slots = self.program.symbols.get("slots")
        if isinstance(size, sympy.Basic):
            if slots is not None:
                size = size.subs(slots, self.past + self.sequence)
            if node in self.routed and size.has(self.batch):
                size = size * ROUTED
        return size


def expressions(program: Program, *, sequence: int = 5) -> dict[fx.Node, NodeExpression]:
    """Of the ops of a program that is laid out, in graph order; without those that repeat an identical layer.

    sequence: the new tokens at which copies are told from views: 1 for single tokens.
    """
    return Expressions(program, sequence).all()


class Expressions:
    def __init__(self, program: Program, sequence: int) -> None:
        self.program = program
        self.sizes = SymbolicSizes(program, ValueClasses(program))
        reference = {**_REFERENCE, "sequence": sequence}
        given = {name: reference.get(name, 1) for name in program.symbols if name != "slots"}
        past = {"past": reference["past"]} if program.states else {}
        self.at = RankSizes(program, {}, {**given, **past})
        self.traffic = MemoryTraffic(self.at)
        self.held: dict[fx.Node, Expr] = {}

    def all(self) -> dict[fx.Node, NodeExpression]:
        found = {}
        for node in self.sizes.classes.analysed():
            if node.op in ("placeholder", "get_attr"):
                self._source(node)
            elif node.op == "call_function" and node_values(node):
                for source in node.all_input_nodes:
                    if node_values(source) and source not in self.held:
                        self._source(source)  # of a layer that is not looked at
                self._mark_routed(node)
                found[node] = self._cost(node)
        return found

    def _source(self, node: fx.Node) -> None:
        if node_values(node):
            self.traffic.source(node)
            self.held[node] = self.bytes(node)

    def _mark_routed(self, node: fx.Node) -> None:
        op = operation(node)
        if op is expert_dispatch or (op is not expert_combine and self.sizes.routed & set(node.all_input_nodes)):
            self.sizes.routed.add(node)

    def bytes(self, node: fx.Node) -> Expr:
        return sum(
            _numel(shape) * value.dtype.itemsize
            for shape, value in zip(self.sizes.shapes(node), node_values(node), strict=True)
        )

    def _cost(self, node: fx.Node) -> NodeExpression:
        values, made = node_values(node), self.bytes(node)
        dtype = str(values[0].dtype).removeprefix("torch.")
        op, path = describe(node).partition(" in ")[0], str(node.meta.get("path") or "")
        self.held[node] = made
        if node.target in COMMUNICATING:
            self.traffic.communicate(node)
            return NodeExpression(node.name, op, path, "meeting", dtype, made=made, meetings=self._meetings(node))
        if self.traffic.moves(node):
            read, written, unsure = self._move(node, made)
            return NodeExpression(node.name, op, path, "move", dtype, 0, read, written, written, unsure=unsure)
        rule = notation(node)
        self.traffic.compute(node, rule)
        read, written = self._compute(node, rule, made)
        if rule.opaque:
            return NodeExpression(
                node.name, op, path, "other", dtype, 0, read, written, made, unsure=f"no rule for {describe(node)}"
            )
        product: tuple[Expr, ...] = ()
        kind, flops, unsure = "other", self._flops(node, rule), ""
        if operation(node) in ATTENTION:
            flops, product, unsure = self._attention(node, rule)
            kind = "attention"
        elif operation(node) is grouped_linear:
            rows, k = self.sizes.shapes(arguments(node)["rows"])[0]
            kind, product = "experts", (rows, self.sizes.shapes(node)[0][1], k)
        elif flops != 0:
            kind, product = "linear", self._matrix(node, flops)
        if flops != 0:
            dtype = str(node_values(rule.operands[0].node)[0].dtype).removeprefix("torch.")
        source = rule.operands[0].node.name if kind == "linear" else ""
        return NodeExpression(
            node.name, op, path, kind, dtype, flops, read, written, made, product, unsure=unsure, source=source
        )

    def _flops(self, node: fx.Node, rule: Notation) -> Expr:
        return 0 if operation(node) in ATTENTION else product_flops(node, rule, self.sizes)  # type: ignore[arg-type]

    def _matrix(self, node: fx.Node, flops: Expr) -> tuple[Expr, ...]:
        """Rows m, columns n, summed k."""
        shape = self.sizes.shapes(node)[0]
        rows, columns = _numel(shape[:-1]), shape[-1] if shape else 1
        return rows, columns, sympy.simplify(flops / (2 * rows * columns))

    def _move(self, node: fx.Node, made: Expr) -> tuple[Expr, Expr, str]:
        seen = self.traffic.move(node)
        sources = [source for source in node.all_input_nodes if node_values(source)]
        if not seen.written:
            first = self.held[sources[0]] if sources else made
            whole = self.bytes(sources[0]) if sources else made
            expanded = operation(node) in (aten.expand, aten.broadcast_to) or first != whole
            self.held[node] = first if expanded and sources else made
            return 0, 0, seen.unsure
        if not seen.read:
            return 0, made, seen.unsure
        held = sum(self.held[source] for source in sources)
        item = node_values(node)[0].dtype.itemsize
        width = made * sympy.Rational(node_values(sources[0])[0].dtype.itemsize, item)
        at_width = seen.written // item * node_values(sources[0])[0].dtype.itemsize
        return (width if seen.read == at_width else held), made, seen.unsure

    def _compute(self, node: fx.Node, rule: Notation, made: Expr) -> tuple[Expr, Expr]:
        op, a = operation(node), arguments(node)
        operands = {operand.node: self.held[operand.node] for operand in rule.operands}
        if op in CACHED:
            kept = kept_operands(node)
            new = sum(operands[each] for each in kept)
            queries = self.sizes.shapes(node)[0][2]
            keys = _keys(self.sizes.past, queries, *attention_limits(node))
            others = sum(size for operand, size in operands.items() if operand not in kept)
            return others + new + new / queries * keys, made + new
        if op is cache_append:
            return sum(operands.values()), made + operands[a["x"]]
        if op is state_read:
            return made, 0
        if op in LOOKUPS:
            table = rule.operands[1 if "weight" in a else 0].node
            out = _numel(self.sizes.shapes(node)[0]) * node_values(table)[0].dtype.itemsize
            operands[table] = self._fewer(node, out, table)
        elif op is grouped_linear:
            weight = a["weight"]
            operands[weight] = MET * operands[weight] / node_values(weight)[0].shape[0]
        return sum(operands.values()), made

    def _fewer(self, node: fx.Node, out: Expr, table: fx.Node) -> Expr:
        """What a look-up reads: as much as comes out, or all of a smaller table."""
        held = self.held[table]
        return held if held == out else sympy.Min(held, out)

    def _attention(self, node: fx.Node, rule: Notation) -> tuple[Expr, tuple[Expr, ...], str]:
        if operation(node) in LATENT:
            return self._latent_attention(node)
        batch, heads, queries, width = self.sizes.shapes(node)[0]
        size = self.sizes.shapes(rule.operands[0].node)[0][3] + width
        kv_heads = self.sizes.shapes(rule.operands[1].node)[0][1]
        cached = operation(node) in CACHED
        first, keys = (self.sizes.past, None) if cached else (0, self.sizes.shapes(rule.operands[1].node)[0][2])
        causal, window, chunk = attention_limits(node)
        if causal:
            seen, unsure = _pairs(first, queries, window, chunk), ""
        else:
            seen = queries * (first + queries if keys is None else keys)
            unsure = "a window without a causal mask is counted whole" if window or chunk else ""
        read = _keys(first, queries, causal, window, chunk) if keys is None else keys
        return 2 * batch * heads * size * seen, (batch, heads, kv_heads, size, queries, read, seen), unsure

    def _latent_attention(self, node: fx.Node) -> tuple[Expr, tuple[Expr, ...], str]:
        """As `product_flops` has it: its kernel reads one head for all."""
        batch, heads, queries, key, value, latent, carried = latent_sizes(node, self.sizes)
        first, (causal, window, chunk) = self.sizes.past, attention_limits(node)
        seen, made = _pairs(first, queries, window, chunk), latent * (key + value)
        options = {"made": made, "latent": latent, "carried": carried, "size": key + value}
        ways = latent_products(queries, first + queries, seen, **options)
        read = _keys(first, queries, causal, window, chunk)
        product = (batch, heads, sympy.Integer(1), latent + carried, queries, read, seen)
        return 2 * batch * heads * sympy.Min(*ways), product, ""

    def _meetings(self, node: fx.Node) -> tuple[MeetingExpression, ...]:
        found = []
        for meeting in COMMUNICATING[node.target].meetings(node):
            sources = [
                n for n in node.all_input_nodes if n.meta.get("val") == Value(meeting.shape or (), meeting.dtype)
            ]
            size = self.held.get(sources[0], self.bytes(sources[0])) if sources else self.bytes(node)
            found.append(MeetingExpression(meeting.kind, meeting.axes, size))
        return tuple(found)


def _numel(shape: Iterable[Expr]) -> Expr:
    found: Expr = sympy.Integer(1)
    for size in shape:
        found = found * size
    return found


def _keys(first: Expr, queries: Expr, causal: bool, window: int | None, chunk: int | None) -> Expr:
    """How many keys at least one query sees, as `keys_read`."""
    keys = first + queries
    if causal and window is not None:
        return sympy.Min(keys, queries + window - 1)
    return keys - sympy.floor(first / sympy.Integer(chunk)) * chunk if causal and chunk is not None else keys


def _pairs(first: Expr, queries: Expr, window: int | None, chunk: int | None) -> Expr:
    """Pairs of query and key under a causal mask, as `pairs_seen`: those of all queries up to the last, less those of
    the queries before the first.
    """

    def below(count: Expr) -> Expr:
        if window is not None:
            short = sympy.Min(count, window)
            return short * (short + 1) / 2 + (count - short) * window
        if chunk is not None:
            full = sympy.floor(count / sympy.Integer(chunk))
            rest = count - full * chunk
            return full * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2
        return count * (count + 1) / 2

    if window is None and chunk is None:
        return queries * first + queries * (queries + 1) / 2
    return below(first + queries) - below(first)
