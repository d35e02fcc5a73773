"""The int8-weights pass: linears that read their weights as int8.

    linear(x, w[N, K], bias)   ->   int8_linear(x, w.codes int8[N, K], w.scales[N], bias)

A rank then holds a quarter of the bytes of these weights in float32, half of those in bfloat16. It runs after the
built-in passes: the codes of a weight are split as the weight was, and the scales as its rows were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from int8_weights.op import int8_linear, make_codes, make_scales
from partitioner.plugin import (
    Layout,
    Program,
    Weight,
    add_made_weight,
    arguments,
    drop_unused_weights,
    operation,
    weights_named,
)


@dataclass(frozen=True)
class Int8Weights:
    """weights: globs of the names of weights, or of modules; one that selects no linear's weight is an error."""

    name: ClassVar[str] = "int8-weights"
    weights: tuple[str, ...] = ("*",)

    def run(self, program: Program) -> Program:
        linears: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and operation(node) is torch.ops.aten.linear:
                weight = arguments(node)["weight"]
                if weight.op == "get_attr":
                    linears.setdefault(weight.target, []).append(node)
        for name in weights_named(program, self.weights, among=list(linears)):
            for node in linears[name]:
                _rewrite(program, node, program.weights[name])
        drop_unused_weights(program)
        return program


def _rewrite(program: Program, node: fx.Node, weight: Weight) -> None:
    a = arguments(node)
    layout = program.weight_layouts.get(weight.name)
    rows = None if layout is None else Layout(layout.dims[:1])
    (num_rows, _), exact = weight.shape, torch.promote_types(weight.dtype, torch.float32)
    with program.graph.inserting_before(node):
        codes = add_made_weight(
            program, weight, f"{weight.name}_codes", make_codes, shape=weight.shape, dtype=torch.int8, layout=layout
        )
        scales = add_made_weight(
            program, weight, f"{weight.name}_scales", make_scales, shape=(num_rows,), dtype=exact, layout=rows
        )
    node.target, node.args, node.kwargs = int8_linear, (a["input"], codes, scales, a["bias"]), {}
    node.meta["why"] = "; ".join(filter(None, [node.meta.get("why"), "its weight is int8"]))
