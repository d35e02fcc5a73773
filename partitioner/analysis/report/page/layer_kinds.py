"""Kinds of layers as steps: matrices that they multiply with, how these are divided, and what ranks exchange between.

    product     a weight, its shape, and how it is divided:
                  columns       each rank makes outputs of its own           dims that the result has
                  rows          each rank sums its inputs, a partial sum     dims that are summed
                  experts       each rank has experts of its own
                  entries       each rank looks up entries of its own
                  whole         every rank does all of it
    attention   its heads
    exchange    an op of `runtime.ops.communicating`, over which axes, and what for

Layers with the same steps are of one kind. What stands outside layers (tables, heads) is a kind by itself.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from partitioner.analysis.cost.memory_traffic import LOOKUPS
from partitioner.analysis.cost.products import ATTENTION
from partitioner.analysis.report.report import matrices_of, pattern_of
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import is_move
from partitioner.program.node_arguments import layer_of, node_values, operation
from partitioner.program.program import Program
from partitioner.sharding.layout import Layout
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import COMMUNICATING, axes_text, read_call
from runtime.ops.expert_exchange import expert_return, expert_send
from runtime.ops.rows import collect_rows, scatter_rows

__all__ = ["layer_kinds"]

PURPOSES: dict[Any, str] = {
    all_reduce: "adds up the ranks' partial sums",
    all_gather: "puts the ranks' parts together",
    collect_rows: "puts the ranks' rows together",
    scatter_rows: "adds up partial sums, and leaves each rank its rows",
    expert_send: "sends tokens to the ranks that have their experts",
    expert_return: "brings the experts' results back to the tokens",
}


def layer_kinds(program: Program) -> list[dict[str, Any]]:
    """Per kind: its name, its layers, and its steps in graph order, as plain data."""
    layers: dict[str, list[dict[str, Any]]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        layer = layer_of(str(node.meta.get("path") or ""))
        layers.setdefault(layer, []).extend(_steps(program, node, matrices_of(node), layer))
    kinds: dict[str, tuple[list[str], list[dict[str, Any]]]] = {}
    for layer, steps in layers.items():
        if steps:
            # two kinds may read alike by chance of their names only: what stands outside layers is kept apart
            kinds.setdefault(f"{bool(layer)}{steps}", ([], steps))[0].append(layer)
    return [
        {
            "name": f"{pattern_of(of[0] + '.')[:-1]}" if of[0] else "outside layers",
            "layers": of if of[0] else [],
            "count": len(of),
            "steps": steps,
        }
        for of, steps in kinds.values()
    ]


def _steps(program: Program, node: fx.Node, names: list[str], layer: str) -> list[dict[str, Any]]:
    path = _inside(str(node.meta.get("path") or ""), layer)
    if node.target in COMMUNICATING:
        axes, value = read_call(node).axes, node_values(node)[0]
        sizes = [size for size in value.shape if isinstance(size, int)]
        return [
            {
                "kind": "exchange",
                "op": operation(node).__name__,
                "path": path,
                "axes": axes_text(axes),
                "ranks": program.mesh.size(*axes),
                "purpose": PURPOSES.get(node.target)
                or str(node.meta.get("why") or "exchanges what ranks need of each other"),
                "bytes_per_token": math.prod(sizes) * value.dtype.itemsize,
            }
        ]
    if operation(node) in ATTENTION:
        layout = node.meta.get("layout")
        split = layout.split(1) if isinstance(layout, Layout) and 1 in layout.split_dims else None
        return [
            {
                "kind": "attention",
                "op": operation(node).__name__,
                "path": path,
                "heads": str(node_values(node)[0].shape[1]),
                "how": "whole" if split is None else "heads",
                "axes": "" if split is None else axes_text(split.axes),
                "parts": [] if split is None else list(split.sizes),
            }
        ]
    return [_product(program, node, name, layer) for name in names]


def _product(program: Program, node: fx.Node, name: str, layer: str) -> dict[str, Any]:
    weight = program.weights[name]
    divided = [
        {
            "dim": dim,
            "how": _how(program, node, name, dim),
            "axes": axes_text(split.axes),
            "parts": list(split.sizes),
            "shared": sum(split.sizes) > weight.shape[dim],
        }
        for dim, split in program.layout_of(name).splits
    ]
    return {
        "kind": "product",
        "op": operation(node).__name__,
        "weight": _inside(name, layer),
        "shape": list(weight.shape),
        "bytes": weight.bytes,
        "divided": divided,
    }


def _how(program: Program, node: fx.Node, name: str, dim: int) -> str:
    """What dividing a dim of the weight means for the product."""
    if operation(node) in LOOKUPS:
        return "entries" if dim == 0 else "columns"
    rule = notation(node)
    wanted = program.weight_layouts[name].splits[[d for d, _ in program.weight_layouts[name].splits].index(dim)][1]
    for operand in rule.operands:
        source = operand.node
        while is_move(source) and source.all_input_nodes:
            source = source.all_input_nodes[0]
        if source.op != "get_attr" or str(source.target) != name:
            continue
        layout = operand.node.meta.get("layout") if operand.node.op != "get_attr" else program.weight_layouts[name]
        at = [d for d, split in layout.splits if split == wanted] if isinstance(layout, Layout) else []
        at = [dim] if dim in at else at  # moved dims are found by how they are split
        for letter in [operand.letters[place] for place in at[:1]]:
            if letter in rule.sums:
                return "rows"
            return "columns" if any(letter in output for output in rule.outputs) else "experts"
    return "parts"


def _inside(name: str, layer: str) -> str:
    return name[len(layer) + 1 :] if layer and name.startswith(f"{layer}.") else name
