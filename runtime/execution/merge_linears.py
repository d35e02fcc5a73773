"""Linears of one input as one product, in a graph that is about to be compiled or captured.

    linear(x, q), linear(x, k), linear(x, v)   ->   linear(x, [q; k; v]).split([q's rows, k's, v's], -1)

One token's product is read from memory rather than computed, and a small matrix is over before the memory is up to
speed: on an H200 a 4096 x 1024 one in bfloat16 takes 9 us where its bytes take 2. So linears are merged where one of
them is small. The merged matrix costs no memory: the single ones become views of it, side by side.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from runtime.program.rank_program import RankProgram
from runtime.program.shards import WeightShard

__all__ = ["lay_side_by_side", "merge_linears"]

SMALL_BYTES = 32 << 20
"""A matrix of fewer bytes is merged with its neighbours."""
_PAIRING = (torch.view_as_complex, torch.ops.aten.view_as_complex.default)
"""Read two neighbours as one number, and refuse them where an odd number of others comes before or between."""


@dataclass(frozen=True)
class _Group:
    """Linears of the same input, in the graph's order."""

    x: fx.Node
    nodes: tuple[fx.Node, ...]
    stacks: tuple[tuple[WeightShard, ...], ...]
    """Their matrices, and their biases where they have any."""

    @property
    def rows(self) -> list[int]:
        return [matrix.local_shape[0] for matrix in self.stacks[0]]


def lay_side_by_side(program: RankProgram, weights: list[Tensor]) -> None:
    """Moves the weights of linears that can be merged, one after the other, into memory of their own.

    `weights` in the order of `program.weights`, changed in place. What else refers to a weight that is moved, such as
    the caller's model, keeps its own copy.
    """
    place = {weight: index for index, weight in enumerate(program.weights)}
    moved: set[WeightShard] = set()
    for group in _groups(program):
        for stack in group.stacks:
            if moved.isdisjoint(stack):
                moved.update(stack)
                indices = [place[weight] for weight in stack]
                joined = torch.cat([weights[index].detach() for index in indices])
                for index, part in zip(indices, torch.split(joined, group.rows), strict=True):
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
    for group in _groups(program):
        found = [_joined([held[weight] for weight in stack]) for stack in group.stacks]
        wholes = [whole for whole in found if whole is not None]
        if len(wholes) == len(found):
            shards = [_shard(stack, sum(group.rows)) for stack in group.stacks]
            joined |= zip(shards, wholes, strict=True)
            _replace(graph, group, copied, [shard.name for shard in shards])
    graph.lint()
    merged = replace(program, build_graph=lambda: graph, weights=(*program.weights, *joined))
    return merged, [*weights, *joined.values()]


def _groups(program: RankProgram) -> Iterator[_Group]:
    """Those of which one is small."""
    shards = {weight.name: weight for weight in program.weights}
    found: dict[Any, list[tuple[fx.Node, tuple[WeightShard, ...]]]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is not torch.nn.functional.linear:
            continue
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        stored = [given[key] for key in ("weight", "bias") if given.get(key) is not None]
        if not all(leaf.op == "get_attr" for leaf in stored):
            continue
        weights = tuple(shards[str(leaf.target)] for leaf in stored)
        if len(weights[0].local_shape) == 2:
            alike = (given["input"], *(weight.dtype for weight in weights))
            found.setdefault(alike, []).append((node, weights))
    in_pairs = any(node.target in _PAIRING for node in program.graph.nodes)
    for (x, *_), linears in found.items():
        stacks = tuple(zip(*(weights for _, weights in linears), strict=True))
        differ = all(len(set(stack)) == len(stack) > 1 for stack in stacks)
        fit = not in_pairs or all(matrix.local_shape[0] % 2 == 0 for matrix in stacks[0])
        if differ and fit and min(matrix.bytes for matrix in stacks[0]) < SMALL_BYTES:
            yield _Group(x, tuple(node for node, _ in linears), stacks)


def _shard(stack: Sequence[WeightShard], rows: int) -> WeightShard:
    shape = (rows, *stack[0].local_shape[1:])
    name, everywhere = "+".join(weight.name for weight in stack), (None,) * len(shape)
    return WeightShard(name, stack[0].dtype, shape, shape, everywhere, "computed", aliases=(), pieces=())


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parts as one tensor, where they follow each other in memory."""
    for one, other in pairwise(parts):
        same_memory = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        in_order = one.storage_offset() + one.numel() == other.storage_offset()
        if not (same_memory and in_order and one.is_contiguous() and other.is_contiguous()):
            return None
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _replace(graph: fx.Graph, group: _Group, copied: dict[fx.Node, fx.Node], names: Sequence[str]) -> None:
    linears = [copied[node] for node in group.nodes]
    with graph.inserting_before(linears[0]):
        operands = [graph.get_attr(name) for name in names]
        product = graph.call_function(torch.nn.functional.linear, (copied[group.x], *operands))
        product.meta |= {key: linears[0].meta[key] for key in ("path", "why") if key in linears[0].meta}
        parts = graph.call_method("split", (product, group.rows, -1))
        for index, linear in enumerate(linears):
            linear.replace_all_uses_with(graph.call_function(operator.getitem, (parts, index)))
    for linear in linears:
        graph.erase_node(linear)
