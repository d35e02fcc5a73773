"""A graph for steps of single tokens with fewer small ops, which take a kernel each that does next to nothing.

    last_token(norm(x), last)                       ->  norm(last_token(x, last)): a step's norm then goes into the head
    cos, sin, .. of position_ids and weights        ->  a row of a table: `PositionTable`

What is made of positions alone is known before a step runs: cosines and sines of a rotation, in every way that models
scale them. It is computed once for all positions that the cache has room for, by the same ops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from runtime.execution.fusion.operations import added_norm
from runtime.ops.cached_attention import last_token

__all__ = ["PositionTable", "for_single_tokens", "of_last_rows", "with_position_table"]

MOST_BYTES = 32 << 20
"""Of a table; beyond, rows are computed anew in each step."""
_ELEMENTWISE = frozenset({torch.mul, torch.add, torch.sub, torch.neg, torch.cos, torch.sin, torch.div, torch.pow})
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def for_single_tokens(graph: fx.Graph, num_weights: int, length: Callable[[], int] | None) -> fx.Graph:
    """A copy of a bound graph, of which the first `num_weights` placeholders are weights. length: how many positions
    the cache has room for.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    of_last_rows(copy)
    if length is not None:
        with_position_table(copy, num_weights, length)
    copy.lint()
    return copy


def of_last_rows(graph: fx.Graph) -> None:
    """Takes last tokens before a norm of each token, in place."""
    for node in list(graph.nodes):
        if node.target is not last_token or len(node.args) != 2:
            continue
        normed, last = node.args
        if len(normed.users) != 1:
            continue
        if normed.target is torch.rms_norm and not normed.kwargs and len(normed.args[1]) == 1:
            with graph.inserting_before(node):
                row = graph.call_function(last_token, (normed.args[0], last))
            node.target, node.args = torch.rms_norm, (row, *normed.args[1:])
            graph.erase_node(normed)
        elif normed.target is operator.getitem and normed.args[1] == 1:
            both = normed.args[0]
            totals = [user for user in both.users if user is not normed]
            if both.target is not added_norm or any(total.users for total in totals) or len(both.args[2]) != 1:
                continue
            with graph.inserting_before(node):
                rows = [graph.call_function(last_token, (each, last)) for each in both.args[:2]]
                new = graph.call_function(added_norm, (*rows, *both.args[2:]), both.kwargs)
            node.target, node.args = operator.getitem, (new, 1)
            for old in (normed, *totals, both):
                graph.erase_node(old)


class PositionTable:
    """Some results of a graph of positions [B, 1] and weights, of which each row depends on its own position only.

    length: how many positions there are, asked before each run. Called with positions and weights: the results, whose
    first dim is that of the positions.
    """

    __name__ = "position_table"

    def __init__(self, graph: fx.Graph, length: Callable[[], int]) -> None:
        self._function: Callable[..., tuple[Tensor, ...]] = fx.GraphModule({}, graph).forward
        self._length = length
        self._tables: list[Tensor] = []
        """The last one is in use; captured steps may still read those before."""
        self._shapes: list[torch.Size] = []

    def __call__(self, positions: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        if positions.dim() != 2 or positions.shape[1] != 1 or not self._is_made(positions.device, weights):
            return self._function(positions, *weights)
        table = self._tables[-1]
        found = table.index_select(0, positions[:, 0].clamp(max=len(table) - 1))
        parts = torch.split(found, [shape.numel() for shape in self._shapes], 1)
        return tuple(part.view(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True))

    def _is_made(self, device: torch.device, weights: tuple[Tensor, ...]) -> bool:
        length = 1 << max(1, self._length() - 1).bit_length()
        if self._tables and len(self._tables[-1]) >= length:
            return True
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        one = self._function(torch.zeros(1, 1, dtype=torch.int64, device=device), *weights)
        width = sum(each.numel() for each in one)
        # a weight with rows of its own, or more dims than the positions have, would show in how many rows there are
        if any(each.dtype != one[0].dtype or each.shape[0] != 1 for each in one):
            return False
        if length * width * one[0].element_size() > MOST_BYTES:
            return False
        try:
            rows = self._function(torch.arange(length, device=device)[:, None], *weights)
        except RuntimeError:  # shapes that go with one row only
            return False
        if any(each.shape != (length, *of_one.shape[1:]) for each, of_one in zip(rows, one, strict=True)):
            return False
        self._tables.append(torch.cat([each.flatten(1) for each in rows], 1))
        self._shapes = [each.shape[1:] for each in one]
        return True


def with_position_table(graph: fx.Graph, num_weights: int, length: Callable[[], int]) -> None:
    """Puts one table in the place of what is made of `position_ids` and weights, the first placeholders, in place."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    positions = [node for node in placeholders[num_weights:] if node.target == "position_ids"]
    if len(positions) != 1:
        return
    (position_ids,) = positions
    fixed: dict[fx.Node, None] = dict.fromkeys(placeholders[:num_weights])
    made: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            used = node.all_input_nodes
            if used and all(each in fixed for each in used) and _is_cast(node):
                fixed[node] = None
            elif all(each in fixed or each in made or each is position_ids for each in used) and _is_by_row(
                node, {*made, position_ids}
            ):
                made[node] = None
    results = [node for node in made if any(user not in made for user in node.users)]
    if not any(node.target in _ELEMENTWISE for node in made):
        return
    weights = [each for each in placeholders[:num_weights] if any(user in fixed or user in made for user in each.users)]
    own = fx.Graph()
    copies = {each: own.placeholder(f"given_{number}") for number, each in enumerate((position_ids, *weights))}
    needed = _reached(results)
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = own.node_copy(node, copies.__getitem__)
    own.output(tuple(copies[node] for node in results))
    table = PositionTable(own, length)
    first = next(node for node in graph.nodes if node in made)
    with graph.inserting_before(first):
        found = graph.call_function(table, (position_ids, *weights))
        rows = [graph.call_function(operator.getitem, (found, number)) for number in range(len(results))]
    for node, row in zip(results, rows, strict=True):
        node.replace_all_uses_with(row, delete_user_cb=lambda user: user not in made)
    for node in reversed([*graph.nodes]):
        if (node in made or node in fixed) and node.op != "placeholder" and not node.users:
            graph.erase_node(node)


def _reached(results: list[fx.Node]) -> set[fx.Node]:
    reached, left = set(results), list(results)
    while left:
        for node in left.pop().all_input_nodes:
            if node not in reached:
                reached.add(node)
                left.append(node)
    return reached


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "to" and node.args[1:] != () and set(node.args[1:]) <= _DTYPES


def _is_by_row(node: fx.Node, rows: set[fx.Node]) -> bool:
    """Whether each row of its result is made of that row of what depends on positions, and of weights."""
    if node.kwargs:
        return False
    if _is_cast(node) or node.target in _ELEMENTWISE:
        # weights have one row at most where they meet those of positions, or all results would not have as many
        return any(each in rows for each in node.all_input_nodes)
    dim: Any = None
    if node.target in (torch.unsqueeze, torch.narrow) and node.args[0] in rows:
        dim = node.args[1]
    elif node.target is torch.cat and all(each in rows for each in node.all_input_nodes):
        dim = node.args[1] if len(node.args) > 1 else 0
    # the last dims are no rows, for positions have two dims, and none is taken away
    return isinstance(dim, int) and (dim > 0 or dim == -1)
