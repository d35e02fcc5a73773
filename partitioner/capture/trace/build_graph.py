"""Build the Program's graph from the export: weights by name, our runtime ops, and nothing that computes nothing.

One walk in order. Left out: asserts, grad-mode wrappers (their bodies are inlined), dropout, and copies, casts and
views that change nothing. `view` becomes `reshape`, because the copies that made a tensor viewable are gone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from partitioner.capture.layers.share_layers import BLOCK, ENTER, LEAVE, NotSharedError, SharedLayers
from partitioner.capture.layers.stamp_layers import Stamps
from partitioner.capture.overheads.source_lines import source_of
from partitioner.capture.trace.export_graph import WRAPPER
from partitioner.capture.trace.functionalize import draws
from partitioner.capture.trace.shape_limits import decisions, interval
from partitioner.capture.trace.transformers_hooks import COMBINE, DISPATCH, GROUPED_LINEAR
from partitioner.errors import CaptureError
from partitioner.program.program import Value
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear

__all__ = ["Builder"]

aten = torch.ops.aten
_END = 2**63 - 1
_ASSERTS = {
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
    "_assert_async",
}
_SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.requires_grad_.default,
}
"""Ops whose result has the value of their first argument."""
_IF_UNCHANGED = {
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.reshape.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.view.default,
}
"""Ops that are left out where neither shape nor dtype changes."""
_NEEDS_STRIDES = {aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype}
"""Ops that fail on a tensor that is not laid out as the model left it: copies in front of them stay."""
_RENAMED: dict[Any, Callable[..., Any]] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    DISPATCH: expert_dispatch,
    COMBINE: expert_combine,
}


class Builder:
    """Turns one export into a graph; `rename` gives the canonical name of a parameter or buffer.

    dims: by input, the names of its dims. shared: the layers that were traced once. `further`: what the export returns
    beside its result, as nodes of the graph.
    """

    def __init__(
        self,
        exported: ExportedProgram,
        inputs: tuple[str, ...],
        rename: Callable[[str], str],
        dims: Mapping[str, tuple[str, ...]] | None = None,
        shared: SharedLayers | None = None,
    ) -> None:
        self.exported = exported
        self.dims = dims or {}
        self.further: tuple[fx.Node, ...] = ()
        self.rename = rename
        self.graph = fx.Graph()
        self.weights: dict[str, fx.Node] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.ranges: dict[str, tuple[int, int | None]] = {}
        """By name of a symbol: its smallest and largest size, where not all are right; set by `limits`."""
        self.guards: list[sympy.Basic] = []
        """The comparisons of sizes on which the trace depends; set by `limits`."""
        self.symbols: dict[str, sympy.Symbol] = {}
        self._symbol_of: dict[sympy.Symbol, sympy.Expr] = {}
        self._sizes: dict[sympy.Symbol, torch.SymInt] = {}
        self._exprs: dict[sympy.Expr, sympy.Expr | int] = {}
        self._inputs = iter(inputs)
        self._asserted: set[str] = set()
        self._stamps = Stamps(shared, rename) if shared is not None else None
        self._program = self.graph
        """The graph that is built, where `graph` is that of a layer's ops."""

    def build(self) -> fx.Graph:
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        env: dict[fx.Node, Any] = {}
        users = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        users = [node for node in users if specs[node.name].kind is InputKind.USER_INPUT]
        for node in users:  # inputs come first in the graph, in their order
            name = next(self._inputs)
            self._name_symbols(node.meta["val"], self.dims.get(name, ("batch", "sequence")))
            env[node] = self._put(node, self.graph.placeholder(name))
        needed = self._needed(specs)
        given = [node for node in self.exported.graph.nodes if node.op == "placeholder" and node not in env]
        for node in self._with_hidden(given, specs):
            if isinstance(node, str):
                self._hidden_weight(node, needed)
            elif node.users or self._weight_name(specs[node.name]) in needed:
                env[node] = self._weight(node, specs[node.name])
        result = self._walk(self.exported.graph, self.exported.graph_module, env)
        out = self.graph.output(result[0])
        out.meta["val"] = result[0].meta["val"]
        self.further = tuple(result[1:])
        if self._stamps is not None:
            self._stamps.close()
        if not self.further:
            self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def _name_symbols(self, tensor: Any, dims: tuple[str, ...]) -> None:
        for name, size in zip(dims, tensor.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                # dims of one name have one size, whether or not the trace could prove it
                symbol = self.symbols.setdefault(name, sympy.Symbol(name, integer=True, positive=True))
                self._symbol_of[size.node.expr] = symbol
                self._sizes[size.node.expr] = size

    def limits(self) -> list[str]:
        """The sizes of inputs for which the trace holds, where that is not all of them."""
        if not self._symbol_of:
            return []
        environment = next(iter(self._sizes.values())).node.shape_env
        guards = self.guards = [expr.xreplace(self._symbol_of) for expr in decisions(environment.guards)]
        hints = {self._symbol_of[symbol]: size.node.hint for symbol, size in self._sizes.items()}
        found = []
        for name, symbol in self.symbols.items():
            others = {other: hint for other, hint in hints.items() if other != symbol}
            low, high = interval(guards, symbol, hints[symbol], others)
            if low == high:
                raise CaptureError(
                    f"cannot capture the model for more than one {name} size: what it decides at {low} it does not at "
                    f"{low + 1} or {low - 1}; "
                    "partition(..., fixed_length=N) compiles it for prompts of exactly N tokens"
                )
            if (low, high) != (1, None):
                self.ranges[name] = (low, high)
                found.append(f"{name} from {low}" + ("" if high is None else f" to {high}"))
        return found + sorted(self._asserted)

    def _needed(self, specs: Mapping[str, Any]) -> set[str]:
        """The weights of layers that were not traced."""
        if self._stamps is None:
            return set()
        names = {
            node: self._weight_name(specs[node.name]) for node in self.exported.graph.nodes if node.op == "placeholder"
        }
        return self._stamps.needed(self.exported.graph, names.get)

    def _with_hidden(self, given: list[fx.Node], specs: Mapping[str, Any]) -> list[fx.Node | str]:
        """The placeholders, and between them the names of weights that the trace did not have, in the model's order."""
        hidden = {} if self._stamps is None else self._stamps.shared.hidden.tensors
        if not hidden:
            return list(given)
        assert self._stamps is not None
        order = {name: place for place, name in enumerate(self._stamps.shared.tensors)}
        places: list[tuple[int, fx.Node | str]] = [(order[name], name) for name in hidden]
        for node in given:
            name = str(specs[node.name].target).removeprefix(WRAPPER + ".")
            places.append((order.get(name, len(order)), node))  # constants of the trace come last
        return [each for _, each in sorted(places, key=lambda found: found[0])]

    def _hidden_weight(self, target: str, needed: set[str]) -> None:
        name = self.rename(target)
        if name in needed and name not in self.weights:
            assert self._stamps is not None
            tensor = self._stamps.shared.hidden.tensors[target]
            self.weights[name] = self.graph.create_node("get_attr", name)
            self.weights[name].meta["val"] = Value(tuple(tensor.shape), tensor.dtype)

    def _weight_name(self, spec: Any) -> str | None:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            return self.rename(spec.target.removeprefix(WRAPPER + "."))
        if spec.kind is InputKind.CONSTANT_TENSOR:
            return f"constants.{spec.target.replace('.', '_')}"
        return None

    def _weight(self, node: fx.Node, spec: Any) -> fx.Node:
        name = self._weight_name(spec)
        if name is None:
            raise CaptureError(f"cannot capture the input {spec.target!r} of kind {spec.kind}")
        if spec.kind is InputKind.CONSTANT_TENSOR:
            self.constants[name] = self.exported.constants[spec.target]
        if name not in self.weights:
            # fx would look a dotted name up in a module that the graph does not have
            made = self.graph.create_node("get_attr", name)
            self.weights[name] = self._put(node, made)
        return self.weights[name]

    def _walk(self, graph: fx.Graph, module: Any, env: dict[fx.Node, Any]) -> Any:
        for node in graph.nodes:
            if node.op == "call_function":
                env[node] = self._call(node, module, env)
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
        raise AssertionError("a graph without an output")

    def _call(self, node: Any, module: Any, env: dict[fx.Node, Any]) -> Any:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inline(node, module, env)
        if isinstance(target, torch._ops.OpOverload) and target._schema.name.partition("::")[2] in _ASSERTS:
            self._note_assert(node)
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        if target in (ENTER, LEAVE, BLOCK):
            return self._layer(env, target, *args)
        if target in _NEEDS_STRIDES and _crosses_a_layer(node.args[0]):
            raise NotSharedError(f"{target} depends on how a layer lays out what it hands over")
        if target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        if self._changes_nothing(node):
            return args[0]
        if node.users and draws(node):
            raise CaptureError(
                f"cannot capture {target}, at {path_of(node)}: it draws random numbers, of which each rank would draw "
                "its own; required is a forward that, in evaluation, follows from its inputs and weights"
            )
        if target is aten.copy.default and _same_shape(node.args[1], node):
            # all of it is overwritten: only the dtype of what was there remains
            if node.args[1].meta["val"].dtype == node.meta["val"].dtype:
                return args[1]
            target, args, kwargs = aten.to.dtype, (args[1], node.meta["val"].dtype), {}
        return self._put(node, self._emit(node, target, args, kwargs))

    def _layer(
        self, env: dict[fx.Node, Any], target: Any, given: Any, number: int, call: int = -1
    ) -> tuple[fx.Node, ...]:
        """What a layer is given, or returns."""
        assert self._stamps is not None
        if target is ENTER:
            body = self._stamps.enter(number, list(given))
            self.graph = body.graph
            return tuple(body.inputs)
        if target is LEAVE:
            self.graph = self._program
            made = self._stamps.leave(self.graph, number, list(given))
            for node, value in env.items():  # sizes that it computed may be read by those after it
                env[node] = fx.node.map_arg(value, lambda each: made.get(each, each))
            return tuple(made[node] for node in given)
        return tuple(self._stamps.block(self.graph, number, call, list(given), self.weights.__getitem__))

    def _emit(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        if target is GROUPED_LINEAR:
            rows, weight, counts, bias, transposed = args
            return self.graph.call_function(grouped_linear, (rows, weight, counts, bias), {"transposed": transposed})
        # the device is bound when a rank is loaded, and these have no meaning in our runtime
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
        if target is aten.to.device:
            return self.graph.call_function(aten.to.dtype, (args[0], args[2]))
        if target is aten.contiguous.default or target is aten.clone.default:
            return self.graph.call_function(aten.clone.default, args[:1], {"memory_format": torch.contiguous_format})
        return self.graph.call_function(_RENAMED.get(target, target), args, kwargs)

    def _changes_nothing(self, node: Any) -> bool:
        target = node.target
        if target in _SAME:
            return not any(user.target in _NEEDS_STRIDES for user in node.users)
        if target is aten.dropout.default:
            return node.args[2] is False
        if target is aten.slice.Tensor:
            given: list[Any] = list(node.args[1:])
            dim, start, end, step = given + [0, 0, _END, 1][len(given) :]
            whole = node.args[0].meta["val"].shape[dim]
            return start in (0, None) and (end in (_END, None) or _equal(end, whole)) and step == 1
        if target in _IF_UNCHANGED:
            return _same_shape(node.args[0], node) and node.args[0].meta["val"].dtype == node.meta["val"].dtype
        return False

    def _note_assert(self, node: fx.Node) -> None:
        """What the trace takes for granted about sizes; that all inputs have the same two is checked when they come
        in.
        """
        if node.target is not aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
            return
        value = node.args[0].meta.get("val")
        if isinstance(value, torch.SymBool):
            claim = value.node.expr.xreplace(self._symbol_of)
            # sizes that depend on data (how many tokens an expert gets) are not known before they are met
            if claim is not sympy.true and claim.free_symbols and claim.free_symbols <= set(self.symbols.values()):
                self._asserted.add(f"assumes {claim}")

    def _inline(self, node: Any, module: Any, env: dict[fx.Node, Any]) -> Any:
        name = str(node.target)
        bodies = [i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"]
        if not bodies or "autocast" not in name or node.args[2] is not False:
            raise CaptureError(f"cannot capture {node.target}, at {path_of(node)}: not an op that a rank can run")
        body = getattr(module, node.args[bodies[0]].target)
        given = fx.node.map_arg(list(node.args[bodies[0] + 1 :]), lambda n: env[n])
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        return self._walk(body.graph, body, dict(zip(inputs, given, strict=True)))

    def _put(self, node: fx.Node, made: fx.Node) -> fx.Node:
        made.meta["val"] = self._convert(node.meta["val"], node)
        path = path_of(node)
        if path:
            made.meta["path"] = path
        source = source_of(node)
        if source:
            made.meta["source"] = source
        return made

    def _convert(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, torch.Tensor):
            return Value(tuple(self._size(size) for size in value.shape), value.dtype)
        if isinstance(value, (tuple, list)):
            return tuple(self._convert(item, node) for item in value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._expr(value.node.expr)
        if value is None or isinstance(value, (bool, int, float)):
            return sympy.sympify(value)
        raise CaptureError(f"cannot capture {node.target}, at {path_of(node)}: it returns a {type(value).__name__}")

    def _size(self, size: int | torch.SymInt) -> int | sympy.Expr:
        return size if isinstance(size, int) else self._expr(size.node.expr)

    def _expr(self, expr: sympy.Expr) -> int | sympy.Expr:
        if expr not in self._exprs:
            renamed = expr.xreplace(self._symbol_of)
            self._exprs[expr] = int(renamed) if renamed.is_Integer else renamed
        return self._exprs[expr]


_NO_MODULE = "_empty_nn_module_stack"
"""How the name begins that torch.export writes for nodes which its own passes add outside of every module."""


def path_of(node: fx.Node) -> str:
    """The module a node came from; "" where there is none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    *around, path = (str(each[0]).removeprefix("L['self'].") for each in stack.values())
    if path.startswith(_NO_MODULE):
        return ""
    if not _is_whole(path):  # torch.export names some modules from the one that calls them
        path = f"{next((each for each in reversed(around) if _is_whole(each)), WRAPPER)}.{path}"
    return path.removeprefix(WRAPPER).removeprefix(".")


def _is_whole(path: str) -> bool:
    """Whether it begins at the module that is traced."""
    return path in ("", WRAPPER) or path.startswith(f"{WRAPPER}.")


def _crosses_a_layer(node: Any) -> bool:
    return node.target is operator.getitem and node.args[0].target in (ENTER, LEAVE, BLOCK)


def _same_shape(one: Any, other: Any) -> bool:
    shapes = one.meta["val"].shape, other.meta["val"].shape
    return len(shapes[0]) == len(shapes[1]) and all(map(_equal, *shapes))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node):
        a = a.meta["val"]
    exprs = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (a, b)]
    return bool(exprs[0] == exprs[1])
