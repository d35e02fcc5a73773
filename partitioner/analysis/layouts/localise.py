"""Sizes that a trace baked into moves, made local; and the proof that the local move does what the whole one does.

    view(x, [b, s, 32, 128])  with dim 2 split   ->  view(x, [b, s, local("view_2_0"), 128])
    split(x, [64, 32, 32])    along a split dim  ->  the sizes that each rank holds of each piece

The proof runs the move on tensors of element numbers: what each rank gets must be exactly the elements of the whole
result that its layout says, in order. A size that was missed, or rows that would be swapped, cannot pass.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.rules.data_movement import IDENTITIES, MOVES, run_move
from partitioner.program.node_arguments import arguments, evaluate, map_nodes, node_values, operation, shape_at
from partitioner.program.program import Entry, PerRankInt, Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split, in_order, points
from runtime.ops.local import reorder

aten = torch.ops.aten

__all__ = ["Localised", "Scaled", "localise", "moves_alike"]

_LARGEST_CHECK = 1 << 24
_DIM_ONLY = {
    aten.permute,
    aten.transpose,
    aten.t,
    aten.mT,
    aten.numpy_T,
    aten.unsqueeze,
    aten.squeeze,
    aten.movedim,
    aten.swapaxes,
}
"""Moves of whole dims: they have no sizes that could be wrong."""


@dataclass(frozen=True)
class Scaled:
    """A symbolic size times local / whole: stands in arguments until the pass inserts the nodes that compute it."""

    node: fx.Node
    whole: int
    local: Any


@dataclass(frozen=True)
class Localised:
    """What a move becomes."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def localise(program: Program, node: fx.Node, layouts: Layouts, outputs: tuple[Layout, ...]) -> Localised | None:
    """The move with local sizes; None where its arguments already serve every rank, or nothing better is known."""
    op = operation(node)
    if op in (aten.view, aten.reshape, aten._unsafe_view, aten.expand):
        return _sizes(program, node, outputs[0], node.args[1], lambda sizes: (node.args[0], sizes))
    a = arguments(node)
    if op is aten.unflatten:
        dim = a["dim"] % len(node_values(a["self"])[0].shape)
        return _sizes(program, node, outputs[0], a["sizes"], lambda sizes: (a["self"], a["dim"], sizes), offset=dim)
    if op is aten.repeat_interleave and a.get("output_size") is not None:
        return Localised(aten.repeat_interleave.self_int, (a["self"], a["repeats"], a["dim"]), {})
    if "dim" not in a or op in (aten.unsqueeze, aten.cat, aten.stack, aten.repeat_interleave, operator.getitem):
        return None
    a.setdefault("self", a.get("x"))
    source = layouts.get(a["self"])
    if not isinstance(source, Layout) or not isinstance(a["dim"], int) or not source.dims:
        return None
    dim = a["dim"] % len(source.dims)
    split = source.dims[dim]
    if not isinstance(split, Split):
        return None
    if op in (aten.split, aten.split_with_sizes, aten.chunk):
        return _pieces(program, node, a["self"], dim, [split, *(layout.split(dim) for layout in outputs)])
    if op is reorder:
        return _reordered(program, a, dim, split, outputs[0].split(dim))
    if op in (aten.slice, aten.slice_scatter, aten.narrow) and a.get("step", 1) == 1:
        return _sliced(program, op, a, dim, split)
    return None


def _pieces(program: Program, node: fx.Node, source: fx.Node, dim: int, splits: list[Split | None]) -> Localised:
    """Of a split into pieces: how much of each piece a rank holds. splits: of the whole dim, then of each piece."""
    wholes = [evaluate(v.shape[dim], _ones(program)) for v in node_values(node)]
    axes = in_order(axis for split in splits if split is not None for axis in split.axes)
    per_rank = [
        tuple(
            whole if piece is None else piece.at(program.mesh, place).size
            for piece, whole in zip(splits[1:], wholes, strict=True)
        )
        for place in points(program.mesh, axes)
    ]
    sizes = program.local("sizes", Entry(tuple(wholes), axes, tuple(per_rank)))
    return Localised(aten.split_with_sizes.default, (source, _listed(sizes), dim), {})


def _reordered(program: Program, a: dict[str, Any], dim: int, split: Split, output: Split | None) -> Localised | None:
    """The order of the indices that a rank is to have, by their places among those that it has; None: it lacks one."""
    axes = split.axes if output is None else in_order((*split.axes, *output.axes))
    orders = []
    for coordinates in points(program.mesh, axes):
        place = {index: i for i, index in enumerate(split.at(program.mesh, coordinates).indices())}
        mine = list(range(len(a["order"]))) if output is None else output.at(program.mesh, coordinates).indices()
        if any(a["order"][i] not in place for i in mine):
            return None
        orders.append(tuple(place[a["order"][i]] for i in mine))
    order = program.local("order", Entry(tuple(a["order"]), axes, tuple(orders)))
    return Localised(reorder, (a["self"], _listed(order)), {"dim": dim})


def _sliced(program: Program, op: Any, a: dict[str, Any], dim: int, split: Split) -> Localised | None:
    """The bounds of a slice by their places among a rank's indices; None where they are no plain numbers."""
    whole = evaluate(node_values(a["self"])[0].shape[dim], _ones(program))
    end = a["start"] + a["length"] if op is aten.narrow and isinstance(a["start"], int) else a.get("end")
    start, stop = _bounds(a["start"], end, whole)
    if start is None or stop is None:
        return None
    local = tuple(
        program.local(hint, Entry(bound, split.axes, tuple(_before(bound, mine) for mine in split.owned)))
        for hint, bound in (("start", start), ("stop", stop))
    )
    if op is aten.slice_scatter:
        return Localised(aten.slice_scatter.default, (a["self"], a["src"], dim, *local), {})
    return Localised(aten.slice.Tensor, (a["self"], dim, *local), {})


def _before(bound: int, owned: IndexSet) -> int:
    """How many of the owned indices lie before `bound`: its place among them."""
    return sum(min(b, bound) - a for a, b in owned.intervals if a < bound)


def _listed(sizes: Any) -> Any:
    return list(sizes) if isinstance(sizes, tuple) else sizes


def _bounds(start: Any, stop: Any, size: int) -> tuple[int | None, int | None]:
    start = 0 if start is None else start
    stop = size if stop is None else stop
    if not isinstance(start, int) or not isinstance(stop, int):
        return None, None
    start = max(start + size, 0) if start < 0 else min(start, size)
    stop = max(stop + size, 0) if stop < 0 else min(stop, size)
    return start, max(stop, start)


def _ones(program: Program) -> dict[Any, int]:
    return dict.fromkeys(program.symbols.values(), 1)


def _sizes(
    program: Program,
    node: fx.Node,
    output: Layout,
    sizes: Any,
    build: Callable[[Any], tuple[Any, ...]],
    offset: int = 0,
) -> Localised | None:
    """Sizes of split dims made local, those of the others left."""
    value = node_values(node)[0]
    found, changed = [], False
    for i, size in enumerate(sizes):
        split = output.dims[offset + i]
        if not isinstance(split, Split) or size == -1:
            found.append(size)
            continue
        changed = True
        whole = evaluate(value.shape[offset + i], _ones(program))
        local = program.local("size", Entry(whole, split.axes, split.sizes))
        found.append(local if isinstance(size, int) else Scaled(size, whole, local))
    if not changed:
        return None
    target = aten.reshape.default if operation(node) in (aten.view, aten._unsafe_view) else node.target
    return Localised(target, build(found), dict(node.kwargs))  # type: ignore[arg-type]


# -- the proof ---------------------------------------------------------------------------------------------------------


def moves_alike(
    program: Program, node: fx.Node, done: Localised, layouts: Layouts, outputs: tuple[Layout, ...]
) -> bool:
    """Whether `done` yields, on every rank, the elements of the whole result that `outputs` says it holds.

    Symbols take values above 1, so that dims merged with the batch or the sequence are told apart.
    """
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Value, tuple)) and node_values(n)]
    if node.target is operator.getitem:
        return True
    if any(_numel(n.meta["val"], program) > _LARGEST_CHECK for n in sources):
        return operation(node) in _DIM_ONLY or operation(node) in IDENTITIES
    symbols = {s: 2 + i for i, s in enumerate(program.symbols.values())}
    wholes: dict[fx.Node, Tensor] = {}
    base = 0
    for n in sources:
        shape = shape_at(n.meta["val"], symbols)
        count = int(torch.Size(shape).numel())
        wholes[n] = torch.arange(base, base + count).view(shape)
        base += count
    whole_out = _run(program, node, wholes, lambda n: evaluate(n.meta["val"], symbols))
    involved = (*outputs, *(layouts[n] for n in sources))
    axes = in_order(axis for x in involved for dim in x.dims if isinstance(dim, Split) for axis in dim.axes)
    integers = _integers(done)
    axes = in_order((*axes, *(axis for name in integers for axis in program.table[name].axes)))
    seen = set()
    for coordinates in points(program.mesh, axes) if axes else []:
        held = tuple(dim.at(program.mesh, coordinates) for x in involved for dim in x.dims if isinstance(dim, Split))
        case = (held, tuple(program.at(PerRankInt(name), coordinates) for name in integers))
        if case in seen:
            continue  # another rank with the same parts
        seen.add(case)
        mine = {n: _part(wholes[n], layouts[n], coordinates, n.meta["val"], program) for n in sources}

        argument = functools.partial(_argument, program, mine, symbols, coordinates)
        try:
            args = fx.node.map_aggregate(done.args, argument)
            kwargs = fx.node.map_aggregate(done.kwargs, argument)
            found = _call(done.target, args, kwargs)
        except (RuntimeError, IndexError, ValueError):
            return False
        for piece, whole, layout, value in zip(found, whole_out, outputs, node_values(node), strict=True):
            expected = _part(whole, layout, coordinates, value, program)
            if piece.shape != expected.shape or not torch.equal(piece, expected):
                return False
    return True


def _argument(
    program: Program,
    mine: Mapping[fx.Node, Tensor],
    symbols: Mapping[Any, int],
    coordinates: Mapping[str, int],
    value: Any,
) -> Any:
    """What an argument is on the rank at `coordinates`, which holds the tensors `mine`."""
    if isinstance(value, Scaled):
        return evaluate(value.node.meta["val"], symbols) // value.whole * program.at(value.local, coordinates)
    if isinstance(value, PerRankInt):
        return _listed(program.at(value, coordinates))
    if isinstance(value, fx.Node):
        return mine[value] if value in mine else _integer(program, value, symbols, coordinates)
    return value


def _numel(value: Any, program: Program) -> int:
    return int(torch.Size(shape_at(value, _ones(program))).numel()) if isinstance(value, Value) else 0


def _run(
    program: Program, node: fx.Node, tensors: dict[fx.Node, Tensor], integer: Callable[[fx.Node], int]
) -> list[Tensor]:
    given = program.whole((node.args, dict(node.kwargs)))
    args, kwargs = map_nodes(given, lambda n: tensors[n] if n in tensors else integer(n))
    found = run_move(node, args, dict(kwargs))
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _call(target: Any, args: Any, kwargs: Any) -> list[Tensor]:
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if packet not in MOVES:
        return [args[0]]  # an identity
    found = aten.pad(*args[:2]) if packet is aten.pad else MOVES[packet](*args, **kwargs)
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _integers(done: Localised) -> list[str]:
    """The rows of the table that stand in its arguments."""
    names: dict[str, None] = {}

    def note(value: Any) -> Any:
        leaf = value.local if isinstance(value, Scaled) else value
        if isinstance(leaf, PerRankInt):
            names[leaf.name] = None
        for source in [value.node] if isinstance(value, Scaled) else [value] if isinstance(value, fx.Node) else []:
            if source.op == "call_function" and source.target in _ARITHMETIC:
                fx.node.map_aggregate(source.args, note)
        return value

    fx.node.map_aggregate((done.args, dict(done.kwargs)), note)
    return list(names)


def _part(whole: Tensor, layout: Layout, coordinates: Mapping[str, int], value: Value, program: Program) -> Tensor:
    """The elements that the rank at `coordinates` holds; a symbolic factor of a split dim is outermost.

    A dim that runs over a rank's own rows has the rank's own size already.
    """
    for dim, split in enumerate(layout.dims):
        if not isinstance(split, Split):
            continue
        static = evaluate(value.shape[dim], _ones(program))
        held = split.at(program.mesh, coordinates)
        if held.size and held.is_interval and whole.shape[dim] == static:  # as most are: no indices are written out
            ((start, _),) = held.intervals
            whole = whole.narrow(dim, start, held.size).contiguous()
            continue
        outer = torch.arange(whole.shape[dim] // max(static, 1)) * static
        whole = whole.index_select(dim, (outer[:, None] + torch.tensor(held.indices(), dtype=torch.int64)).flatten())
    return whole


_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}


def _integer(program: Program, node: fx.Node, symbols: Mapping[Any, int], coordinates: Mapping[str, int]) -> int:
    """An integer node at given symbols, with the local integers in its arguments."""
    if node.op == "call_function" and node.target in _ARITHMETIC:
        args = fx.node.map_aggregate(
            node.args,
            lambda v: (
                _integer(program, v, symbols, coordinates)
                if isinstance(v, fx.Node)
                else program.at(v, coordinates)
                if isinstance(v, PerRankInt)
                else v
            ),
        )
        return int(node.target(*args))
    return evaluate(node.meta["val"], symbols)
