"""Linears of one input as one product, in a graph that is about to be compiled or captured.

    linear(x, q), linear(x, k), linear(x, v)   ->   linear(x, [q; k; v]).split([q's rows, k's, v's], -1)

Of weights that are held as stored (`stored_linear`), codes, scales and zeros are put below each other, and each row's
index of its scales is moved on by the scales above; which columns share a scale must be the same in all.

One token's product is read from memory rather than computed, and a small matrix is over before the memory is up to
speed: on an H200 a 4096 x 1024 one in bfloat16 takes 9 us where its bytes take 2. So linears are merged where one of
them is small. The merged matrix costs no memory, but for such indices: the single ones become views of it, side by
side.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from runtime.ops.kernels.stored.stored_linear import stored_linear
from runtime.program.rank_program import RankProgram
from runtime.program.shards import WeightShard

__all__ = ["lay_side_by_side", "merge_linears"]

SMALL_BYTES = 32 << 20
"""A matrix of fewer bytes is merged with its neighbours."""
_OPERANDS: dict[Any, tuple[str, ...]] = {
    torch.nn.functional.linear: ("input", "weight", "bias"),
    stored_linear: ("input", "codes", "scales", "zeros", "rows", "columns", "bias"),
}
_PAIRING = (torch.view_as_complex, torch.ops.aten.view_as_complex.default)
"""Read two neighbours as one number, and refuse them where an odd number of others comes before or between."""


@dataclass(frozen=True)
class _Group:
    """Linears of the same input, in the graph's order."""

    x: fx.Node
    nodes: tuple[fx.Node, ...]
    stacks: dict[str, tuple[WeightShard, ...]]
    """What is put below each other, by operand: their matrices or codes first, scales, zeros, biases."""
    indices: tuple[WeightShard, ...]
    """As stored: the scales of each one's rows."""

    @property
    def rows(self) -> list[int]:
        return _heights(next(iter(self.stacks.values())))


def lay_side_by_side(program: RankProgram, weights: list[Tensor]) -> None:
    """Moves the weights of linears that can be merged, one after the other, into memory of their own.

    `weights` in the order of `program.weights`, changed in place. What else refers to a weight that is moved, such as
    the caller's model, keeps its own copy.
    """
    place = {weight: index for index, weight in enumerate(program.weights)}
    moved: set[WeightShard] = set()
    for group in _groups(program, dict(zip(program.weights, weights, strict=True))):
        for stack in group.stacks.values():
            if moved.isdisjoint(stack):
                moved.update(stack)
                indices = [place[weight] for weight in stack]
                joined = torch.cat([weights[index].detach() for index in indices])
                for index, part in zip(indices, torch.split(joined, _heights(stack)), strict=True):
                    weights[index] = part


def merge_linears(program: RankProgram, weights: Sequence[Tensor]) -> tuple[RankProgram, list[Tensor]]:
    """The program with one linear in the place of those whose weights lie side by side, and the weights that it takes.

    All other nodes, the collectives among them, keep their names and their order.
    """
    held = dict(zip(program.weights, weights, strict=True))
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copied))
    joined: dict[WeightShard, Tensor] = {}
    for group in _groups(program, held):
        found = {key: _joined([held[weight] for weight in stack]) for key, stack in group.stacks.items()}
        wholes = {_shard(group.stacks[key]): whole for key, whole in found.items() if whole is not None}
        if len(wholes) == len(found):
            names = dict(zip(found, (shard.name for shard in wholes), strict=True))
            if group.indices:
                rows = _shard(group.indices)
                names["rows"] = rows.name
                wholes[rows] = _moved_on([held[weight] for weight in group.indices], _heights(group.stacks["scales"]))
            joined |= wholes
            _replace(graph, group, copied, names)
    graph.lint()
    merged = replace(program, build_graph=lambda: graph, weights=(*program.weights, *joined))
    return merged, [*weights, *joined.values()]


def _groups(program: RankProgram, held: Mapping[WeightShard, Tensor]) -> Iterator[_Group]:
    """Those of which one is small."""
    shards = {weight.name: weight for weight in program.weights}
    found: dict[Any, list[tuple[fx.Node, dict[str, WeightShard]]]] = {}
    kinds: list[Tensor] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _OPERANDS:
            continue
        given = dict(zip(_OPERANDS[node.target], node.args, strict=False)) | node.kwargs
        x, leaves = given.pop("input"), {key: leaf for key, leaf in given.items() if isinstance(leaf, fx.Node)}
        options = {key: value for key, value in given.items() if key not in leaves and value is not None}
        if not all(leaf.op == "get_attr" for leaf in leaves.values()):
            continue
        weights = {key: shards[str(leaf.target)] for key, leaf in leaves.items()}
        matrix = next(iter(weights.values()))
        if len(matrix.local_shape) == 2 and matrix.bytes:
            if "columns" in weights:
                options["kind"] = _place_among(kinds, held[weights["columns"]])
            alike = (node.target, x, *options.items(), *((key, weight.dtype) for key, weight in weights.items()))
            found.setdefault(alike, []).append((node, weights))
    in_pairs = any(node.target in _PAIRING for node in program.graph.nodes)
    for (_, x, *_), linears in found.items():
        stacks = {key: tuple(weights[key] for _, weights in linears) for key in linears[0][1]}
        stacks.pop("columns", None)
        indices = stacks.pop("rows", ())
        matrices = next(iter(stacks.values()))
        differ = all(len(set(stack)) == len(stack) > 1 for stack in stacks.values())
        fit = all(len({weight.local_shape[1:] for weight in stack}) == 1 for stack in stacks.values())
        fit = fit and (not in_pairs or all(matrix.local_shape[0] % 2 == 0 for matrix in matrices))
        if differ and fit and min(matrix.bytes for matrix in matrices) < SMALL_BYTES:
            yield _Group(x, tuple(node for node, _ in linears), stacks, indices)


def _place_among(kinds: list[Tensor], columns: Tensor) -> int:
    """Which of `kinds` has the same scales for its columns; a new one is put at the end."""
    for place, kind in enumerate(kinds):
        if torch.equal(kind, columns):
            return place
    kinds.append(columns)
    return len(kinds) - 1


def _heights(stack: Sequence[WeightShard]) -> list[int]:
    return [weight.local_shape[0] for weight in stack]


def _shard(stack: Sequence[WeightShard]) -> WeightShard:
    shape = (sum(_heights(stack)), *stack[0].local_shape[1:])
    name, everywhere = "+".join(weight.name for weight in stack), (None,) * len(shape)
    return WeightShard(name, stack[0].dtype, shape, shape, everywhere, "computed", aliases=(), pieces=())


def _moved_on(indices: Sequence[Tensor], heights: Sequence[int]) -> Tensor:
    """Rows' indices of their scales, once these stand below each other; heights: how many scales each one has."""
    above = accumulate(heights, initial=0)
    return torch.cat([each + start for each, start in zip(indices, above, strict=False)])


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parts as one tensor, where they follow each other in memory."""
    for one, other in pairwise(parts):
        same_memory = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        in_order = one.storage_offset() + one.numel() == other.storage_offset()
        if not (same_memory and in_order and one.is_contiguous() and other.is_contiguous()):
            return None
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _replace(graph: fx.Graph, group: _Group, copied: dict[fx.Node, fx.Node], names: Mapping[str, str]) -> None:
    linears = [copied[node] for node in group.nodes]
    first: Any = linears[0]
    with graph.inserting_before(first):
        given: dict[str, Any] = dict(zip(_OPERANDS[first.target], first.args, strict=False)) | first.kwargs
        given |= {key: graph.get_attr(name) for key, name in names.items()}
        operands = [given.pop(key, None) for key in _OPERANDS[first.target]]
        product = graph.call_function(first.target, tuple(operands), given)
        product.meta |= {key: first.meta[key] for key in ("path", "why") if key in first.meta}
        parts = graph.call_method("split", (product, group.rows, -1))
        for index, linear in enumerate(linears):
            linear.replace_all_uses_with(graph.call_function(operator.getitem, (parts, index)))
    for linear in linears:
        graph.erase_node(linear)
