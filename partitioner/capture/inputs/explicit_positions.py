"""Positions that a model counts by itself, made an input: what it derives from an arange it derives from positions.

    embedding(table, arange(S) + 2)   [S, H]     ->   embedding(table, position_ids + 2)   [B, S, H]
    cos(arange(S)[:, None] * freq)    [S, D/2]   ->   one row per token, at its position

A graph that counts 0, 1, 2 ... from the start of its input is right for whole texts only: a piece of a text starts
somewhere else, and each sequence of a batch elsewhere. The ops that depend on the arange alone are run again under
`torch.vmap`, which gives each row of `position_ids` its own result, and are traced as any model is.
"""

from __future__ import annotations

import warnings
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from partitioner.capture.inputs.graph_inputs import BATCH, LENGTH
from partitioner.capture.trace.build_graph import Builder
from partitioner.capture.trace.functionalize import functionalize
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.program import Program, Value

aten = torch.ops.aten

__all__ = ["explicit_positions"]

_NAME = "position_ids"


def explicit_positions(program: Program) -> Program:
    """A copy in which nothing counts tokens from the start of the input, as far as that can be rewritten; `program`
    itself where nothing does.
    """
    copy = program.copy()
    counted = _counted(copy)
    edges = _edges(copy, counted)
    if not edges or "sequence" not in copy.symbols:
        return program
    try:
        rows = _Rows(copy, counted, list(dict.fromkeys(source for source, _ in edges)))
        made = _graft(copy, rows)
    except Exception:  # an op that vmap or the trace does not take: the proof that follows says what counts tokens
        return program
    for source, user in edges:
        replacement = _aligned(copy, made[source], source, user)
        if replacement is None:
            return program
        user.replace_input_with(source, replacement)
    copy.graph.eliminate_dead_code()
    copy.graph.lint()
    return copy


def _counted(program: Program) -> set[fx.Node]:
    """The nodes whose values follow from an arange over the sequence, weights and sizes alone."""
    found: set[fx.Node] = set()
    fixed: set[fx.Node] = set()  # weights, and what is made of them
    for node in program.graph.nodes:
        if node.op == "get_attr":
            fixed.add(node)
        if node.op != "call_function" or not node_values(node):
            continue
        operands = [n for n in node.all_input_nodes if node_values(n)]
        if operation(node) is aten.arange and _counts_tokens(program, node):
            found.add(node)
        elif operands and all(n in found or n in fixed for n in operands):
            (found if any(n in found for n in operands) else fixed).add(node)
    return found


def _counts_tokens(program: Program, node: fx.Node) -> bool:
    a, shape = arguments(node), node.meta["val"].shape
    start = a.get("start") or 0
    return shape == (program.symbols.get("sequence"),) and isinstance(start, int) and a.get("step") in (None, 1)


def _edges(program: Program, counted: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    return [
        (node, user) for node in program.graph.nodes if node in counted for user in node.users if user not in counted
    ]


def _example() -> Tensor:
    """Positions [B, S]."""
    return torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()


class _Rows(nn.Module):
    """The counted ops, of one row of positions [S] each; `wanted` are returned, [B, ...] each."""

    def __init__(self, program: Program, counted: set[fx.Node], wanted: list[fx.Node]) -> None:
        super().__init__()
        self.program, self.wanted = program, wanted
        needed, todo = set[fx.Node](), list(wanted)
        while todo:
            node = todo.pop()
            if node not in needed and node_values(node):
                needed.add(node)
                todo += node.all_input_nodes
        self.nodes = [node for node in program.graph.nodes if node in needed]
        self.names = [str(node.target) for node in self.nodes if node.op == "get_attr"]
        for number, weight in enumerate(_empty(program, self.names, FakeTensorMode())):
            self.register_buffer(f"weight_{number}", weight)
        # an export would keep vmap's own ops
        shapeless = _empty(program, self.names, FakeTensorMode(shape_env=ShapeEnv()))
        self.plain = make_fx(self._run, tracing_mode="symbolic")(_example(), *shapeless)

    def forward(self, positions: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.plain(positions, *self._weights())
        return found

    def _weights(self) -> list[Tensor]:
        return [getattr(self, f"weight_{number}") for number in range(len(self.names))]

    def _run(self, positions: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        # a batch of one in each row: what is repeated for every sequence is the same for all of them
        sizes = {self.program.symbols["sequence"]: positions.shape[1], self.program.symbols["batch"]: 1}
        by_name = dict(zip(self.names, weights, strict=True))

        def row(mine: Tensor) -> tuple[Tensor, ...]:
            env: dict[fx.Node, Any] = {}
            for node in self.nodes:
                if node.op == "get_attr":
                    env[node] = by_name[str(node.target)]
                elif operation(node) is aten.arange:
                    a = arguments(node)
                    env[node] = (mine + (a.get("start") or 0)).to(node.meta["val"].dtype)
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env.get(n, _number(n, sizes)))
                    env[node] = _REWRITTEN.get(node.target, node.target)(*args, **kwargs)
            return tuple(env[node] for node in self.wanted)

        return torch.vmap(row)(positions)


def _empty(program: Program, names: list[str], fake: FakeTensorMode) -> list[Tensor]:
    with fake:
        return [torch.empty(program.weights[name].shape, dtype=program.weights[name].dtype) for name in names]


def _index_select(table: Tensor, dim: int, index: Tensor) -> Tensor:
    """Vmap's own rule fixes the sizes."""
    return table.movedim(dim, 0)[index].movedim(0, dim)


_REWRITTEN: dict[Any, Any] = {aten.index_select.default: _index_select}


def _number(node: fx.Node, sizes: dict[sympy.Symbol, Any]) -> Any:
    """An integer of the graph: a size, or sums and products of sizes."""
    expression = node.meta["val"]
    if not isinstance(expression, sympy.Expr):
        return expression
    return sympy.lambdify(list(sizes), expression, modules=[{}])(*sizes.values())


def _graft(program: Program, rows: _Rows) -> dict[fx.Node, fx.Node]:
    """Traces the rows and puts them in front of the program's first op; what stands for each wanted node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(rows, (_example(),), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    names = rows.names
    builder = Builder(functionalize(exported), (_NAME,), lambda name: names[int(name.removeprefix("weight_"))])
    traced = builder.build()
    results = [traced.output_node().args[0], *builder.further]
    known: dict[fx.Node, fx.Node] = {}
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    weights = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    with program.graph.inserting_before(first):
        for node in traced.nodes:
            if node.op == "placeholder":
                known[node] = program.add_input(_NAME, node.meta["val"], "arange")
            elif node.op == "get_attr":
                known[node] = weights[str(node.target)]
                first.prepend(known[node])
            elif node.op == "call_function":
                known[node] = program.graph.node_copy(node, known.__getitem__)
    return {wanted: known[result] for wanted, result in zip(rows.wanted, results, strict=True)}  # type: ignore[index]


def _aligned(program: Program, made: fx.Node, source: fx.Node, user: fx.Node) -> fx.Node | None:
    """`made` [B, *shape of source] as `user` takes `source`: with the batch as its first dim. None: it cannot."""
    shape, out = source.meta["val"].shape, user.meta.get("val")
    batch = program.symbols["batch"]
    is_pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
    if not isinstance(out, Value) or len(shape) > len(out.shape) or out.shape[0] != batch:
        return None
    same_rank = len(shape) == len(out.shape)
    if not (same_rank and shape[0] == batch) and not (is_pointwise and (not same_rank or shape[0] == 1)):
        return None
    value, found = made.meta["val"], made
    with program.graph.inserting_after(made):
        if same_rank:
            found = program.graph.call_function(aten.select.int, (made, 1, 0))
            value = Value((batch, *shape[1:]), value.dtype)
            found.meta = {**made.meta, "val": value}
    for _ in range(len(out.shape) - len(shape) - 1):
        with program.graph.inserting_after(found):
            wider = program.graph.call_function(aten.unsqueeze.default, (found, 1))
        value = Value((value.shape[0], 1, *value.shape[1:]), value.dtype)
        wider.meta = {**made.meta, "val": value}
        found = wider
    return found
