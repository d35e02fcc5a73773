"""Fuse: fewer and larger ops, each of which rounds as the ops that it replaces.

    x * 1.0, dropout outside training, a cast to the dtype at hand    ->  x
    one op on the same operands in several places                     ->  once
    w * (x * rsqrt(mean(x ** 2) + eps))                               ->  rms_norm(x, [n], w, eps)
    cat([-x[h:], x[:h]]) * s                                          ->  roll(x, -h) * cat([-s[:n-h], s[n-h:]])

The third is an RMSNorm that the model writes out; if it computes in float32 inside, so does the fused op. The last is
the rotate-half of rotary embeddings: the factor made of `s` is computed once for all layers, where each layer sliced,
negated and concatenated its own queries and keys. RMSNorm: arXiv:1910.07467, section 3; rotary embedding:
arXiv:2104.09864, section 3.4.2.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from partitioner.program.node_arguments import arguments, operation
from partitioner.program.program import Program, Value
from partitioner.sharding.layout import Layout
from runtime.ops.communicating import COMMUNICATING

aten = torch.ops.aten

__all__ = ["Fuse"]


@dataclass(frozen=True)
class Fuse:
    """See the module's docstring. Runs after the passes that split, which may reduce a norm in parts."""

    name: str = "fuse"

    def run(self, program: Program) -> Program:
        graph = program.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and (source := _handed_on(node)) is not None:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        _compute_once(graph)
        scales: dict[tuple[fx.Node, int], fx.Node] = {}
        for node in list(graph.nodes):
            if node.op == "call_function" and operation(node) is aten.mul:
                _fuse_norm(node)
                _fuse_rotation(node, scales)
        graph.eliminate_dead_code()
        graph.lint()
        return program


# -- what changes nothing, and what is computed twice ------------------------------------------------------------------


def _handed_on(node: fx.Node) -> fx.Node | None:
    """The operand that `node` yields as it is."""
    op = operation(node)
    if op in (aten.mul, aten.div):
        a = arguments(node)
        # True is not the number 1 to every dtype
        if type(a["other"]) not in (int, float) or a["other"] != 1 or a.get("rounding_mode") is not None:
            return None
    elif op is aten.dropout:
        if arguments(node)["train"]:
            return None
    elif op not in (aten.to, aten._to_copy):
        return None
    source, value = node.args[0], node.meta.get("val")
    unchanged = isinstance(source, fx.Node) and isinstance(value, Value) and source.meta.get("val") == value
    return source if unchanged and isinstance(source, fx.Node) else None


def _compute_once(graph: fx.Graph) -> None:
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_pure(node.target):
            key = _key((node.target, node.args, sorted(node.kwargs.items())))
            first = known.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _is_pure(target: Any) -> bool:
    """Whether the result depends on the arguments alone. What communicates stays, each in its place."""
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return target not in COMMUNICATING


def _key(leaf: Any) -> Any:
    """Arguments as a key: 1, 1.0, True and -0.0 are different numbers to an op."""
    if isinstance(leaf, (list, tuple)):
        return tuple(map(_key, leaf))
    if isinstance(leaf, slice):
        return (slice, _key(leaf.start), _key(leaf.stop), _key(leaf.step))
    return (type(leaf), repr(leaf) if isinstance(leaf, float) else leaf)


# -- norms -------------------------------------------------------------------------------------------------------------


def _fuse_norm(node: fx.Node) -> None:
    """Fuses the norm that `node` completes, and what follows as far as the fused op rounds in the same places."""
    found = _root_mean_square(node)
    if found is None:
        return
    x, eps = found
    end, weight = node, None
    source, cast = _cast_of(x), _only_user(node)
    if (
        source is not None
        and cast is not None
        and _cast_of(cast) is not None
        and cast.meta["val"] == source.meta["val"]
    ):
        # the op computes in float32 by itself; its weight, though, it would apply before the cast
        x, end = source, cast
    else:
        scaled = _only_user(node)
        other = _other_factor(scaled, node) if scaled is not None else None
        value = x.meta["val"]
        if scaled is not None and other is not None and other.meta["val"] == Value(value.shape[-1:], value.dtype):
            end, weight = scaled, other
    end.target = aten.rms_norm.default
    end.args, end.kwargs = (x, [x.meta["val"].shape[-1]], weight, eps), {}
    end.meta["why"] = "a norm that the model writes out, as one op"


def _root_mean_square(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The x and eps where `node` is x * rsqrt(mean(x ** 2) + eps) over its last dim."""
    for root in node.args:
        x = _other_factor(node, root)
        added = _operand(root, aten.rsqrt)
        mean = _operand(added, aten.add)
        square = _operand(mean, aten.mean)
        if x is None or added is None or mean is None or square is None or _squared(square) is not x:
            continue
        plus, over = arguments(added), arguments(mean)
        last_dim = over["dim"] in ([-1], [len(x.meta["val"].shape) - 1])
        as_it_is = over["dtype"] is None and plus["alpha"] == 1 and isinstance(plus["other"], float)
        if last_dim and over["keepdim"] and as_it_is and _is_whole(x) and not _is_narrowed(x):
            return x, plus["other"]
    return None


def _operand(node: Any, op: Any) -> fx.Node | None:
    """What `op` is applied to in `node`, if `node` is that and has one user."""
    if isinstance(node, fx.Node) and node.op == "call_function" and operation(node) is op and len(node.users) == 1:
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


def _squared(node: fx.Node) -> fx.Node | None:
    if len(node.users) != 1 or node.op != "call_function":
        return None
    op, (source, *rest) = operation(node), node.args
    found = op is aten.square or (op is aten.pow and rest == [2]) or (op is aten.mul and rest == [source])
    return source if found and isinstance(source, fx.Node) else None


def _is_narrowed(x: fx.Node) -> bool:
    """A float64 model's detour through float32 rounds so coarsely that no device's own order of sums may be put in."""
    source = _cast_of(x)
    return source is not None and source.meta["val"].dtype.itemsize > x.meta["val"].dtype.itemsize


# -- rotations of halves -----------------------------------------------------------------------------------------------


def _fuse_rotation(node: fx.Node, scales: dict[tuple[fx.Node, int], fx.Node]) -> None:
    for turned in node.args:
        if not isinstance(turned, fx.Node):
            continue
        scale, halves = _other_factor(node, turned), _turned(turned)
        if halves is None or scale is None or scale.op != "call_function" or len(turned.users) != 1:
            continue
        x, half = halves
        shape, over = node.meta["val"].shape, scale.meta["val"].shape
        # no gain where the factor is as large as x: then it would be cut and joined instead
        smaller = len(over) < len(shape) or any(a != b for a, b in zip(over, shape, strict=True))
        if shape[-1:] != over[-1:] or not smaller or not _is_whole(x) or not _is_whole(scale):
            continue
        if (scale, half) not in scales:
            scales[scale, half] = _negated_up_to(scale, shape[-1] - half)
        with node.graph.inserting_before(turned):
            rolled = node.graph.call_function(aten.roll.default, (x, [-half], [-1]))
        rolled.meta = dict(turned.meta)
        node.args = (rolled, scales[scale, half])
        node.meta["why"] = "halves exchanged in one op; the sign is in the other factor, once for all layers"
        return


def _turned(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The x and h where `node` is cat([-x[.., h:], x[.., :h]])."""
    if node.op != "call_function" or operation(node) is not aten.cat:
        return None
    a = arguments(node)
    rank = len(node.meta["val"].shape)
    if len(a["tensors"]) != 2 or a["dim"] % rank != rank - 1 or not node.meta["val"].dtype.is_floating_point:
        return None
    upper, lower = _part(_operand(a["tensors"][0], aten.neg)), _part(a["tensors"][1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    (x, start, stop), (_, first, half) = upper, lower
    return (x, half) if (first, start, stop) == (0, half, x.meta["val"].shape[-1]) else None


def _part(node: fx.Node | None) -> tuple[fx.Node, int, int] | None:
    """The x, start and stop where `node` is x[.., start:stop], cut by itself or as one of several pieces."""
    if node is None or node.op != "call_function":
        return None
    if node.target is operator.getitem:
        pieces, place = node.args
        assert isinstance(pieces, fx.Node)
        if operation(pieces) not in (aten.split, aten.split_with_sizes, aten.chunk) or not isinstance(place, int):
            return None
        ends = [0]
        for value in pieces.meta["val"][: place + 1]:
            ends.append(ends[-1] + value.shape[-1])
        source, dim, start, stop = arguments(pieces)["self"], arguments(pieces)["dim"], ends[-2], ends[-1]
    elif operation(node) is aten.slice and arguments(node)["step"] == 1:
        source, dim, start, stop = (arguments(node)[name] for name in ("self", "dim", "start", "end"))
    else:
        return None
    shape = source.meta["val"].shape
    size = shape[-1]
    start, stop = start or 0, size if stop is None else stop
    if dim % len(shape) != len(shape) - 1 or not all(isinstance(x, int) for x in (size, start, stop)):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return source, start, stop


def _negated_up_to(scale: fx.Node, end: int) -> fx.Node:
    value, graph = scale.meta["val"], scale.graph
    size = value.shape[-1]
    place = scale

    def after(target: Any, args: tuple[Any, ...], width: int) -> fx.Node:
        nonlocal place
        with graph.inserting_after(place):
            place = graph.call_function(target, args)
        place.meta = {**scale.meta, "val": Value((*value.shape[:-1], width), value.dtype)}
        return place

    first = after(aten.neg.default, (after(aten.slice.Tensor, (scale, -1, 0, end), end),), end)
    second = after(aten.slice.Tensor, (scale, -1, end, size), size - end)
    return after(aten.cat.default, ([first, second], -1), size)


# -- reading nodes -----------------------------------------------------------------------------------------------------


def _only_user(node: fx.Node) -> fx.Node | None:
    (user, *others) = [*node.users, None]
    return user if user is not None and user.op == "call_function" and others == [None] else None


def _other_factor(node: fx.Node, factor: Any) -> fx.Node | None:
    """What `node` multiplies the node `factor` by, if it is another node."""
    if node.op != "call_function" or operation(node) is not aten.mul or len(node.args) != 2 or factor not in node.args:
        return None
    other = node.args[1] if node.args[0] is factor else node.args[0]
    return other if isinstance(other, fx.Node) and other is not factor else None


def _cast_of(node: fx.Node) -> fx.Node | None:
    """What `node` casts to another dtype, if that is what it does."""
    if node.op != "call_function" or operation(node) not in (aten.to, aten._to_copy):
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def _is_whole(x: fx.Node) -> bool:
    """Whether every rank holds the whole last dim of x, which is a number of floats."""
    layout: Layout | None = x.meta.get("layout")
    value = x.meta["val"]
    whole = layout is None or (layout.dims[-1] is None and not layout.partial)
    return whole and isinstance(value.shape[-1], int) and value.dtype.is_floating_point
