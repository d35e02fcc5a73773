"""A copy of a layer's ops wherever a block stands for the layer, over the weights of that layer.

    enter, ops over layers.0.*, leave      the ops go into a graph of their own, and from there into the program's
    block(inputs) of layers.7              the same ops over layers.7.*

A weight of the traced layer is replaced by the one that has its place in the other layer; one that belongs to no layer
is the same for all. Where that is ambiguous, and where the ops read what was not handed to the layer, the trace is
refused (`NotSharedError`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
from torch import fx

from partitioner.capture.layers.layer_kinds import Layer
from partitioner.capture.layers.share_layers import BLOCK, ENTER, LEAVE, NotSharedError, SharedLayers

__all__ = ["Stamps"]


@dataclass
class _Body:
    """graph: the ops of one layer; inputs and outputs are nodes of it. given: what that layer is given."""

    layer: Layer
    given: list[fx.Node]
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.layer.path

    def nodes(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "call_function"]


class Stamps:
    """One for each graph that is built. `rename`: the canonical name of a parameter or buffer."""

    def __init__(self, shared: SharedLayers, rename: Callable[[str], str]) -> None:
        self.shared, self.rename = shared, rename
        self.names: dict[str, list[str]] = defaultdict(list)
        """By canonical name, all names of a tensor."""
        for name in shared.tensors:
            self.names[rename(name)].append(name)
        self._bodies: dict[int, _Body] = {}
        self._sizes: dict[sympy.Expr | int, fx.Node] = {}
        """Where each was computed first, of those that layers compute: as in a full trace, once."""
        self._in_place_of: dict[tuple[str, str, str], str] = {}

    def needed(self, graph: fx.Graph, weight_of: Callable[[fx.Node], str | None]) -> set[str]:
        """The weights that blocks of the exported graph read; `weight_of` a placeholder, by canonical name."""
        found: set[str] = set()
        inside: int | None = None
        seen: list[int] = []
        for node in graph.nodes:
            if node.target is ENTER:
                inside = int(node.args[1])
            elif node.target is LEAVE:
                assert inside is not None
                seen.append(inside)
                inside = None
            elif node.target is BLOCK:
                seen.append(-1)
            elif inside is not None:
                traced = self.shared.bodies[inside]
                own = [name for name in map(weight_of, node.all_input_nodes) if name is not None]
                for layer in traced.calls.values():
                    found |= {self._of(layer.path, traced.layer.path, name) for name in own}
        # in the body of another op, or dropped because nothing reads it
        if sorted(seen) != sorted([*range(len(self.shared.bodies)), *[-1] * self.shared.shared]):
            raise NotSharedError("layers are called where the trace cannot be taken apart")
        return found

    def enter(self, number: int, given: list[fx.Node]) -> _Body:
        """The graph in which the ops up to `leave` belong, and what stands for the inputs in it."""
        body = self._bodies[number] = _Body(self.shared.bodies[number].layer, given)
        for i, node in enumerate(given):
            made = body.graph.placeholder(f"input_{i}")
            made.meta = dict(node.meta)
            body.inputs.append(made)
        return body

    def leave(self, graph: fx.Graph, number: int, outputs: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Puts the ops into `graph` as they are; what each of them has become there."""
        body = self._bodies[number]
        body.outputs = outputs
        model = self.shared.bodies[number].same_as
        if model is not None and self._lines(body) != self._lines(self._bodies[model]):
            raise NotSharedError(f"{body.path} computes something else than {self._bodies[model].path}")
        return self._copy(graph, body, body.given, body.layer, lambda node: node)

    def block(
        self, graph: fx.Graph, number: int, call: int, given: list[fx.Node], weight: Callable[[str], fx.Node]
    ) -> list[fx.Node]:
        """Puts the ops into `graph` once more, over the weights of another layer."""
        body = self._bodies[number]
        layer = self.shared.bodies[number].calls[call]

        def outside(node: fx.Node) -> fx.Node:
            if node.op == "get_attr":
                return weight(self._of(layer.path, body.path, str(node.target)))
            if node.op == "placeholder" and node.target in self.shared.common:
                return node
            if node.op == "placeholder" or not isinstance(node.meta["val"], sympy.Expr | int):
                raise NotSharedError(f"{body.path} reads {node.name}, which it is not given")
            return node

        made = self._copy(graph, body, given, layer, outside)
        return [made[node] for node in body.outputs]

    def close(self) -> None:
        """The ops kept here no longer count as users of the program's nodes."""
        for body in self._bodies.values():
            for node in reversed(body.nodes()):
                node.args, node.kwargs = (), {}

    def _copy(
        self, graph: fx.Graph, body: _Body, given: list[fx.Node], layer: Layer, outside: Callable[[fx.Node], fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        made = dict(zip(body.inputs, given, strict=True))

        def refer(node: fx.Node) -> fx.Node:
            return made[node] if node in made else outside(node)

        for node in body.nodes():
            if _is_size(node) and node.meta["val"] in self._sizes:
                made[node] = self._sizes[node.meta["val"]]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), refer)
            copy = made[node] = graph.create_node("call_function", node.target, args, kwargs)
            copy.meta = {**node.meta, **_moved(node.meta.get("path"), body.path, layer.path)}
            if _is_size(node):
                self._sizes[node.meta["val"]] = copy
            if node.target is self.shared.append:
                x, slots, state = cast(tuple[Any, ...], args)
                copy.args = (x, slots, self._state(body, layer, state))
        # what the layer returns may be none of its own
        return made | {node: outside(node) for node in body.outputs if node not in made}

    def _state(self, body: _Body, layer: Layer, state: int) -> int:
        """The state of another layer in the place of one of the traced layer."""
        cache = self.shared.cache
        part = None if cache is None else cache.part_of(body.layer.number, state)
        if part is None:
            raise NotSharedError(f"{body.path} adds to what the cache holds of another layer")
        assert cache is not None
        return cache.state_of(layer.number, part)

    def _of(self, path: str, model: str, name: str) -> str:
        """The weight of the layer `path` in the place of the weight `name` of the layer `model`."""
        key = path, model, name
        if key not in self._in_place_of:
            self._in_place_of[key] = self._find(path, model, name)
        return self._in_place_of[key]

    def _find(self, path: str, model: str, name: str) -> str:
        names = self.names.get(name, [])
        own = [each for each in names if each.startswith(f"{model}.")]
        found = {self.rename(path + each.removeprefix(model)) for each in own}
        if len(own) < len(names) or not own:  # other modules have it, or it is a constant of the trace
            found.add(name)
        if len(found) != 1:
            raise NotSharedError(f"{path} shares {name} with other modules otherwise than {model} does")
        return found.pop()

    def _in_layer(self, body: _Body) -> Callable[[str], str]:
        """Names of weights that are equal for two layers where the weights have one place in them."""

        def relative(name: str) -> str:
            own = [each for each in self.names.get(name, []) if each.startswith(f"{body.path}.")]
            return min(own).removeprefix(body.path) if own else name

        return relative

    def _lines(self, body: _Body) -> list[Any]:
        """What the ops of a layer are, comparable between layers.

        A size stands for itself, wherever it is computed: of several layers that need it, the first does.
        """
        weight = self._in_layer(body)
        place = {node: i for i, node in enumerate(each for each in body.graph.nodes if not _is_size(each))}

        def refer(node: fx.Node) -> Any:
            if _is_size(node):
                return ("size", str(node.meta["val"]))
            if node in place:
                return ("own", place[node])
            if node.op == "get_attr":
                name = str(node.target)
                return ("weight", weight(name), _shape(node)) if not name.startswith("constants.") else ("constant",)
            return ("outside", node.op, str(node.meta.get("val")))

        found: list[Any] = [[_shape(node) for node in body.inputs]]
        for node in body.nodes():
            if _is_size(node):
                continue
            given = node.args
            if node.target is self.shared.append:
                assert self.shared.cache is not None
                given = (*given[:2], self.shared.cache.part_of(body.layer.number, cast(int, given[2])))
            args = fx.node.map_arg((given, tuple(sorted(node.kwargs.items()))), refer)
            found.append((node.target, repr(args), _shape(node), _moved(node.meta.get("path"), body.path, "")))
        return [*found, list(map(refer, body.outputs))]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), sympy.Basic | int)


def _moved(at: str | None, model: str, path: str) -> dict[str, str]:
    if at is None or not (at == model or at.startswith(f"{model}.")):
        return {}
    return {"path": path + at.removeprefix(model)}


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return str(value) if not isinstance(value, tuple) else str([str(each) for each in value])
