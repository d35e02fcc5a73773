"""Which ops mix tokens: the layout rules, asked about the sequence instead of the ranks.

A graph whose attention reads a cache is right only if nothing else looks from one token at another. So the sequence is
split, as if each token had a rank of its own, in a copy of the program with sizes of its own; every layout is inferred
as for any split.
An op that would need a collective is one that mixes tokens, or that knows where in the sequence it stands by itself.

    input_ids  [B, S]              split along S
    attention  q[b h s d]          its queries may be split, whatever it reads: the cache holds the rest
    append     x[b g s d]          a cache by position: whole, whoever put in what
    dispatch   hidden [T, H]       rows keep to their tokens, in whatever order they lie
    output     logits [B, S, V]    must be split as the tokens are

The same question about the batch proves that what one sequence yields does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import sympy
import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.analysis.rules.data_movement import IDENTITIES
from partitioner.analysis.tokens.length_dependence import why_length_counts
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.program import Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split
from partitioner.sharding.mesh import Mesh
from runtime.ops.attention import attention
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.experts import expert_combine, expert_dispatch
from runtime.ops.local import once, reorder, shard
from runtime.ops.mask import attention_mask
from runtime.ops.rows import collect_rows, take_rows
from runtime.ops.state import cache_append

aten = torch.ops.aten

__all__ = ["BATCH_RULES", "SEQUENCE_RULES", "TOKENS", "Rule", "first_mixing", "why_rows_mix", "why_tokens_mix"]

Rule = Callable[[fx.Node, Layouts], str | None]
"""Sets the layout of a node, and returns the problem, if there is one: text in which {what} is a token or sequence."""
_NOUN = {"sequence": "token", "batch": "sequence"}
_BATCH, _SEQUENCE, _SLOTS = 2, 5, 11  # primes, so that no op divides them
_AXIS = "sp"
_ROWS = Split((_AXIS,), tuple(IndexSet.range(i, i + 1) for i in range(_BATCH)))
TOKENS = Split((_AXIS,), tuple(IndexSet.range(i, i + 1) for i in range(_SEQUENCE)))
"""The sequence, with a rank for each token."""
_SPLITS = {"sequence": TOKENS, "batch": _ROWS}


def why_tokens_mix(program: Program) -> str | None:
    """The first op, in graph order, that looks from one token at another other than by causal attention; None: none
    does, and each token's logits follow from it, its position and what attention reads.
    """
    if "sequence" not in program.symbols:
        return "the model was captured for one length only"
    return first_mixing(program, "sequence", SEQUENCE_RULES) or why_length_counts(program)


def why_rows_mix(program: Program) -> str | None:
    """The first op that looks from one sequence of the batch at another; None: each row is computed by itself."""
    if "batch" not in program.symbols:
        return "the model was captured for one batch size only"
    return first_mixing(program, "batch", {**BATCH_RULES, attention_mask: _mask_of_rows})


def first_mixing(
    program: Program,
    dim: Literal["sequence", "batch"],
    rules: Mapping[Any, Rule],
    *,
    also: Rule | None = None,
    picked: Collection[Any] = (),
) -> str | None:
    """The first op that looks from one index along `dim` of the inputs at another.

    also: asked of every op that has passed. picked: ops that keep one token of each sequence, so that the output has
    one row in place of one per token.
    """
    split = _SPLITS[dim]
    concrete = _with_sizes(program, ranks=len(split.owned))
    layouts: Layouts = {}
    inferrer = Inferrer(concrete)
    alike: _Alike = {}
    constant: set[fx.Node] = set()
    for node in concrete.graph.nodes:
        if node.op == "placeholder":
            sizes = program.inputs[len(layouts)].value.shape
            layouts[node] = Layout(tuple(split if size == program.symbols[dim] else None for size in sizes))
        elif node.op == "get_attr":
            layouts[node] = REPLICATED(len(node.meta["val"].shape))
            constant.add(node)
        elif node.op == "output":
            (logits,) = node.all_input_nodes
            one_row = dim == "sequence" and any(n.target in picked for n in concrete.graph.nodes)
            wanted = REPLICATED(3) if one_row else REPLICATED(3).with_dim(0 if dim == "batch" else 1, split)
            if layouts[logits] != wanted:
                return f"the output is not one row per {_NOUN[dim]}: it is {layouts[logits]}"
        elif node.op == "call_function" and node_values(node):
            if node.all_input_nodes and constant.issuperset(node.all_input_nodes):
                constant.add(node)
            alike[node] = _alike_dims(node, alike, constant)
            problem = _infer(node, layouts, inferrer, alike, rules)
            if problem is None and also is not None:
                problem = also(node, layouts)
            if problem:
                path = node.meta.get("path")
                where = f"{operation(node).__name__} at {node.name!r}{f' in {path}' if path else ''}"
                return f"{where} {problem.format(what=_NOUN[dim])}"
    return None


def _with_sizes(program: Program, *, ranks: int) -> Program:
    """The program with numbers for the batch and the sequence, on a mesh of `ranks`."""
    copy = program.copy(Mesh.of(**{_AXIS: ranks}))
    numbers = {"batch": _BATCH, "sequence": _SEQUENCE, "slots": _SLOTS}
    sizes = {symbol: numbers[name] for name, symbol in program.symbols.items()}
    known: dict[Any, Any] = {}

    def size(expression: Any) -> Any:
        if not isinstance(expression, sympy.Expr):
            return expression
        if expression not in known:
            found = expression.subs(sizes)
            known[expression] = int(found) if found.is_Integer else found
        return known[expression]

    def value(given: Any) -> Any:
        if isinstance(given, Value):
            return Value(tuple(map(size, given.shape)), given.dtype)
        if isinstance(given, (tuple, list)):
            return tuple(map(value, given))
        return size(given)

    for node in copy.graph.nodes:
        if "val" in node.meta:
            node.meta = {**node.meta, "val": value(node.meta["val"])}
    return replace(copy, symbols={}, weight_layouts={})


def _infer(node: fx.Node, layouts: Layouts, inferrer: Inferrer, alike: _Alike, rules: Mapping[Any, Rule]) -> str | None:
    """Sets the layout of `node`; the problem, if it would need more than its own token ({what})."""
    special = rules.get(node.target)
    if special is not None:
        return special(node, layouts)
    found = inferrer.infer(node, layouts)
    if found.problem:
        return "cannot be told apart by {what}: " + found.problem
    for source, wanted in found.requires:
        if layouts[source] == wanted or _is_same_rows(layouts[source], wanted, alike.get(source, _NONE)):
            continue
        if layouts[source].split_dims:
            return "reads other {what}s than its own"
        return (
            f"combines each {{what}} with a row of {source.name!r}, which counts {{what}}s from the start of the input"
        )
    layouts[node] = found.outputs[0] if isinstance(node.meta["val"], Value) else found.outputs
    return "sums over {what}s" if any(layout.partial for layout in found.outputs) else None


_Alike = dict[fx.Node, frozenset[int]]
"""The dims of a value along which all its rows are the same, so that it matters to nobody which ones they stand for."""
_NONE: frozenset[int] = frozenset()
_PER_TOKEN = {
    aten.embedding, *IDENTITIES, aten.expand, aten.unsqueeze, aten.reshape, aten.view,
    all_gather, all_reduce, collect_rows, once, reorder, shard, take_rows, vocab_parallel_embedding,
}  # fmt: skip
_FILLED = {aten.empty, aten.full, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones, aten.zeros}


def _alike_dims(node: fx.Node, alike: _Alike, constant: set[fx.Node]) -> frozenset[int]:
    """All dims of what is filled with one number, and of what is made of such values element by element or row by row;
    of what is made of weights alone and repeated, those along which it is.
    """
    if not isinstance(node.meta["val"], Value):
        return _NONE
    shape = node.meta["val"].shape
    every = frozenset(range(len(shape)))
    operands = [n for n in node.all_input_nodes if node_values(n) and n.op != "get_attr"]
    if operation(node) in _FILLED:
        return every
    if operation(node) is aten.expand and constant.issuperset(node.all_input_nodes[:1]):
        before = node.all_input_nodes[0].meta["val"].shape
        # a weight may have as many rows as there are tokens here: those are its own
        own = every if {_BATCH, _SEQUENCE}.intersection(before) else _NONE
        made = len(shape) - len(before)
        return every - frozenset(
            made + i for i, size in enumerate(before) if made + i in own and size == shape[made + i]
        )
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if not operands or not (is_pointwise or operation(node) in _PER_TOKEN):
        return _NONE
    shapes = [n.meta["val"].shape for n in operands]
    if all(len(alike.get(n, _NONE)) == len(of) for n, of in zip(operands, shapes, strict=True)):
        return every
    if is_pointwise and all(of == shape for of in shapes):
        return every.intersection(*(alike.get(n, _NONE) for n in operands))
    return _NONE


def _is_same_rows(layout: Layout, wanted: Layout, alike: frozenset[int]) -> bool:
    """Whether a value has the same rows in either layout, if they are the same along the dims `alike`."""
    moved = {i for i, (a, b) in enumerate(zip(layout.dims, wanted.dims, strict=True)) if a != b}
    return layout.partial == wanted.partial and moved <= alike


def _attention(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    layouts[node] = wanted = Layout((None, None, TOKENS, None))
    if not a["causal"] and _is_appended(a["k"]) and _is_appended(a["v"]):
        return _masked_attention(a, layouts)
    if not a["causal"]:
        return "is not causal: each token sees those after it"
    if any(layouts[a[name]] != wanted for name in ("q", "k", "v")):
        return "attends over something other than one row per token"
    for name in ("mask", "sinks"):
        operand = a[name]
        if operand is not None and layouts[operand].split_dims:
            return f"has {'a bias' if name == 'mask' else 'sinks'} that depends on the tokens"
        if name == "mask" and operand is not None and operand.meta["val"].shape[-1] != 1:
            return "has a bias by position, which would have to grow with the cache"
    return None


def _mask_of_rows(node: fx.Node, layouts: Layouts) -> str | None:
    """Row i of a mask is made of row i of the padding; of the reference, the number of rows counts."""
    a = arguments(node)
    reference, padding = layouts[a["reference"]], None if a["padding"] is None else layouts[a["padding"]]
    if reference.split_dims != (0,) or (padding is not None and padding.dims != (reference.dims[0], None)):
        return "makes a mask of other {what}s than its own"
    layouts[node] = REPLICATED(4).with_dim(0, reference.dims[0])
    return None


def _expand_as(node: fx.Node, layouts: Layouts) -> str | None:
    """Only the shape of the second operand counts: what has one row for all tokens is as good as split."""
    x, other = node.args[:2]
    shape, out = x.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    offset = len(out) - len(shape)
    dims = list(layouts[other].dims)  # type: ignore[index]
    for i, size in enumerate(shape):
        if size == out[offset + i] and layouts[x].dims[i] != dims[offset + i]:  # type: ignore[index]
            return "combines each token with a row that counts tokens from the start of the input"
    layouts[node] = Layout(tuple(dims))
    return None


def _is_appended(operand: fx.Node) -> bool:
    """Whether it is one row per slot of a cache, which `analysis.slots` proves to be read in order."""
    return bool(operand.meta["val"].shape[2] == _SLOTS)


def _masked_attention(a: dict[str, Any], layouts: Layouts) -> str | None:
    if layouts[a["q"]] != Layout((None, None, TOKENS, None)) or any(layouts[a[k]].split_dims for k in ("k", "v")):
        return "attends over something other than a cache, one query per token"
    mask, sinks = a["mask"], a["sinks"]
    if mask is None or layouts[mask].dims[-2] != TOKENS or layouts[mask].split_dims != (len(layouts[mask].dims) - 2,):
        return "has a mask that is not one row per token"
    return "has sinks that depend on the tokens" if sinks is not None and layouts[sinks].split_dims else None


def _append(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    rank = len(node.meta["val"].shape)
    if layouts[a["x"]] != REPLICATED(rank).with_dim(rank - 2, TOKENS) or layouts[a["positions"]].dims[1] != TOKENS:
        return "appends something other than one row per token"
    layouts[node] = REPLICATED(rank)
    return None


def _dispatch(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    tokens = layouts[a["index"]].dims[0]
    if layouts[a["hidden"]] != Layout((tokens, None)) or layouts[a["index"]] != Layout((tokens, None)):
        return "sends something other than one row per token to experts"
    rows = None if tokens is None else _times(tokens, a["index"].meta["val"].shape[1])
    layouts[node] = (Layout((rows, None)), Layout((rows,)), REPLICATED(1))
    return None


def _combine(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    tokens, choices = layouts[a["gates"]].dims[0], a["gates"].meta["val"].shape[1]
    rows = None if tokens is None else _times(tokens, choices)
    if layouts[a["rows"]] != Layout((rows, None)) or layouts[a["order"]] != Layout((rows,)):
        return "combines other experts' rows than those of its own tokens"
    layouts[node] = Layout((tokens, None))
    return None


def _times(split: Split, count: int) -> Split:
    """Each index as `count` in its place."""
    return Split(
        split.axes, tuple(IndexSet(tuple((a * count, b * count) for a, b in o.intervals)) for o in split.owned)
    )


BATCH_RULES: dict[Any, Rule] = {
    aten.expand_as.default: _expand_as,
    expert_dispatch: _dispatch,
    expert_combine: _combine,
}
SEQUENCE_RULES: dict[Any, Rule] = {**BATCH_RULES, attention: _attention, cache_append: _append}
