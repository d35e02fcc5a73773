"""The layout of what a data-movement op yields: it runs as itself on marks (present, absent, don't care).

per coordinate     a tensor of marks for each operand goes through the op; what comes out must be a product of
                   index sets again
rows               a dim that runs over a rank's own rows goes where its symbol goes, and nothing may work along it
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.analysis.labels.index_sets import compact
from partitioner.analysis.layouts.infer_layout import Inference, Layouts, layout_of, sizes_read
from partitioner.analysis.rules.data_movement import IDENTITIES, run_move
from partitioner.errors import PlanError
from partitioner.program.node_arguments import (
    arguments,
    evaluate,
    map_nodes,
    node_values,
    operation,
    shape_at,
    symbols_of,
)
from partitioner.program.program import Program
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Rows, Split, in_order, points
from partitioner.sharding.mesh import Mesh

aten = torch.ops.aten

__all__ = ["infer_move"]

_FREE, _PRESENT, _ABSENT = 0, 1, 2


def infer_move(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    """For a move."""
    sources = [n for n in node.all_input_nodes if node_values(n)]
    values = node_values(node)
    if node.target is operator.getitem and isinstance(layouts[sources[0]], tuple):
        picked = layouts[sources[0]][node.args[1]]
        return Inference((picked,), ())
    given = {n: layout_of(layouts, n) for n in sources}
    partial = {n: layout.partial for n, layout in given.items()}
    axes = frozenset().union(*partial.values())
    if axes and any(p != axes for p in partial.values()):
        axes = frozenset()  # a partial sum beside a free value: completed first
    requires = tuple((n, Layout(layout.dims, axes)) for n, layout in given.items())
    rows = _row_dims(program, node, sources, layouts)
    if isinstance(rows, str):
        return Inference((), requires, rows)
    if all(not layout.split_dims for layout in given.values()):
        whole = [Layout((None,) * len(v.shape), axes) for v in values]
        return Inference(tuple(_with_rows(layout, rows[i]) for i, layout in enumerate(whole)), requires)
    split_axes = in_order(axis for layout in given.values() for dim in layout.split_dims for axis in _axes(layout, dim))
    try:
        places = points(program.mesh, split_axes)
    except PlanError as error:
        return Inference((), requires, f"operands are split over axes that do not go together: {error}")
    ones = dict.fromkeys(program.symbols.values(), 1)
    per_place = []
    known: dict[Any, Any] = {}
    for place in places:
        held = {n: _held(given[n], program.mesh, place) for n in sources}
        key = tuple(held.values())
        if key not in known:  # the splits of two dims are independent: many coordinates, few different parts
            found = _moved(program, node, held, ones)
            if isinstance(found, str):
                return Inference((), requires, found)
            known[key] = found
        per_place.append(known[key])
    layouts_out = []
    for i, value in enumerate(values):
        dims: list[Split | Rows | None] = []
        for dim, size in enumerate(shape_at(value, ones)):
            owned = tuple(sets[i][dim] for sets in per_place)
            split = None if all(o.size == size for o in owned) else Split(split_axes, owned)
            dims.append(None if split is None else _over_fewest_axes(split, program.mesh))
        if any(dims[dim] is not None for dim in rows[i]):
            return Inference((), requires, "a dim would be split and run over a rank's own rows")
        layouts_out.append(_with_rows(Layout(tuple(dims), axes), rows[i]))
    if operation(node) is aten.stack and layouts_out[0].dims[arguments(node)["dim"]] is not None:
        return Inference(
            (), requires, "some ranks have nothing of some operands, and stack takes operands of one shape"
        )
    if len(sources) > 1:
        requires = tuple((n, _beside(node, n, layout, layouts_out[0])) for n, layout in requires)
    return Inference(tuple(layouts_out), requires)


def _beside(node: fx.Node, source: fx.Node, layout: Layout, output: Layout) -> Layout:
    """What one of several operands must be: split as the result is, except along the dim where they are put
    together.
    """
    op, a = operation(node), arguments(node)
    if "dim" not in a:  # expand_as and its like: the second operand gives the shape
        return Layout(output.dims, layout.partial) if source is a.get("other") else layout
    dim = a["dim"] % len(output.dims)
    dims = list(output.dims)
    if op is aten.stack or (op is aten.select_scatter and source is a["src"]):
        del dims[dim]
    elif dim < len(layout.dims):
        dims[dim] = layout.dims[dim]
    return Layout(tuple(dims), layout.partial)


def _axes(layout: Layout, dim: int) -> tuple[str, ...]:
    split = layout.split(dim)
    return () if split is None else split.axes


def _held(layout: Layout, mesh: Mesh, place: dict[str, int]) -> tuple[IndexSet | None, ...]:
    """Per dim the indices that the rank at `place` holds; None: all of them."""
    return tuple(dim.at(mesh, place) if isinstance(dim, Split) else None for dim in layout.dims)


Sets = list[list[IndexSet]]
_known: dict[Any, Sets | str] = {}
"""What moves yielded, by all that it follows from: layers are alike, and so are the programs of one model."""
_KEPT = 1 << 12


def _moved(program: Program, node: fx.Node, held: dict[fx.Node, tuple[IndexSet | None, ...]], ones: Any) -> Sets | str:
    """Per output, per dim, the indices that come out of what a rank holds; or why they are no product."""
    operands = [(sets, shape_at(n.meta["val"], ones)) for n, sets in held.items()]
    places = {n: _Operand(i) for i, n in enumerate(held)}

    def argument(n: fx.Node) -> Any:
        return places[n] if n in places else evaluate(n.meta["val"], ones)

    args, kwargs = map_nodes(program.whole((node.args, dict(node.kwargs))), argument)
    key = node.target, repr((args, kwargs)), tuple(operands)
    found = _known.get(key)
    if found is None:
        marks = [_marks(sets, shape) for sets, shape in operands]
        if len(_known) >= _KEPT:
            _known.clear()
        found = _known[key] = _run_on(node, marks, args, kwargs)
    return found


@dataclass(frozen=True)
class _Operand:
    """Stands for the i-th tensor."""

    place: int


def _run_on(node: fx.Node, marks: list[Tensor], args: Any, kwargs: Any) -> Sets | str:
    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: marks[a.place] if isinstance(a, _Operand) else a)
    try:
        found = run_move(node, args, kwargs)
    except (RuntimeError, IndexError, ValueError) as error:
        return f"sizes that depend on data: {error}"
    sets = [_product(output) for output in (found if isinstance(found, (list, tuple)) else [found])]
    whole = [each for each in sets if each is not None]
    return whole if len(whole) == len(sets) else "what a rank would hold is not a product of index sets"


def _over_fewest_axes(split: Split, mesh: Mesh) -> Split:
    """Over those of its axes on which it depends; over the first where it depends on none."""
    axes = split.axes
    for axis in split.axes:
        fewer = tuple(other for other in axes if other != axis)
        if not fewer:
            break
        # the indices at the other axes' coordinates do not change along this one
        kinds: dict[tuple[int, ...], set[IndexSet]] = {}
        for place in points(mesh, split.axes):
            kinds.setdefault(tuple(place[other] for other in fewer), set()).add(split.at(mesh, place))
        if all(len(kind) == 1 for kind in kinds.values()):
            axes = fewer
    if axes == split.axes:
        return split
    first = dict.fromkeys(split.axes, 0)
    return Split(axes, tuple(split.at(mesh, first | place) for place in points(mesh, axes)))


# -- rows --------------------------------------------------------------------------------------------------------------

_KEEPS_ORDER = {
    *IDENTITIES,
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.expand,
    aten.expand_as,
    aten.view_as,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.mT,
    aten.numpy_T,
    aten.movedim,
    aten.swapaxes,
    aten.unsqueeze,
    aten.squeeze,
}
"""Moves that leave the rows along a dim in place, one after the other."""


def _row_dims(program: Program, node: fx.Node, sources: list[fx.Node], layouts: Layouts) -> list[dict[int, Rows]] | str:
    """Per output the dims that run over a rank's own rows: those whose size has the rows' symbol."""
    outputs: list[dict[int, Rows]] = [{} for _ in node_values(node)]
    op, a = operation(node), arguments(node)
    for source in sources:
        shape = source.meta["val"].shape
        for dim in layout_of(layouts, source).row_dims:
            own = layout_of(layouts, source).dims[dim]
            assert isinstance(own, Rows)
            along = _repeated(a["repeats"], len(shape)) if op is aten.repeat else _along(a, len(shape))
            if op not in _KEEPS_ORDER and dim in along:
                return f"works along dim {dim}, over which each rank has {own} of its own"
            for rows in own.by_dim:
                if (whole := _whole_size(program, node, rows, layouts)) is not None:
                    return (
                        f"takes a size from {whole.name!r}, which has all rows, where each rank has {rows} of its own"
                    )
                for output, value in zip(outputs, node_values(node), strict=True):
                    dims = [i for i, size in enumerate(value.shape) if _runs_over(program, size, shape[dim], rows)]
                    found = _merged(output.get(dims[0]), rows) if len(dims) == 1 else None
                    if found is None:
                        return f"mixes dim {dim}, over which each rank has {rows} of its own, with others"
                    output[dims[0]] = found
    if "dim" not in a and (other := a.get("other")) is not None:  # expand_as and its like: both have the same rows
        for source, rows in ((s, rows) for s in sources for own in outputs[0].values() for rows in own.by_dim):
            if _has_all(program, source, rows, layouts):
                why = f"{source.name!r} has all rows, where each rank has {rows} of its own"
                return f"takes the shape of {other.name!r}, and {why}"
    return outputs


def _has_all(program: Program, source: fx.Node, rows: Rows, layouts: Layouts) -> bool:
    """Whether a value that runs over what `rows` are of has those of all ranks."""
    symbol = program.symbols.get(rows.kind)
    held = [rows in dim.by_dim for dim in layout_of(layouts, source).dims if isinstance(dim, Rows)]
    return any(symbol in symbols_of(size) for size in source.meta["val"].shape) and not any(held)


def _merged(before: Rows | None, rows: Rows) -> Rows | None:
    """What a dim runs over that runs over both."""
    if before is None or rows in before.by_dim:
        return before or rows
    return before.merged(rows)


def _repeated(repeats: Sequence[Any], rank: int) -> set[int]:
    """The dims of which a repeat yields more than once; new ones come first."""
    return {dim for dim, times in enumerate(repeats[len(repeats) - rank :]) if times != 1}


def _along(a: dict[str, Any], rank: int) -> set[int]:
    """The dims along which a move works: all where its arguments do not say."""
    named = a["dim"] if a.get("dim") is not None else a.get("dims")
    if isinstance(pad := a.get("pad"), (list, tuple)):
        return {rank - 1 - i for i in range(len(pad) // 2)}
    dims = [named] if isinstance(named, int) else named
    if not isinstance(dims, (list, tuple)) or not dims or not all(isinstance(dim, int) for dim in dims):
        return set(range(rank))
    return {dim % rank for dim in dims}


def _runs_over(program: Program, size: Any, source: Any, rows: Rows) -> bool:
    """Whether a dim of this size goes over `rows`, as one of size `source` does."""
    symbol = program.symbols.get(rows.kind)
    return bool(size == source) if symbol is None else symbol in symbols_of(size)


def _whole_size(program: Program, node: fx.Node, rows: Rows, layouts: Layouts) -> fx.Node | None:
    """A tensor from which an argument of the move takes a number of rows, and that has those of all ranks."""
    symbol = program.symbols.get(rows.kind)
    for read, dim in sizes_read(node):
        size = read.meta["val"].shape[dim]
        held = layout_of(layouts, read).dims[dim]
        if (symbol is None or symbol in symbols_of(size)) and not (isinstance(held, Rows) and rows in held.by_dim):
            return read
    return None


def _with_rows(layout: Layout, rows: dict[int, Rows]) -> Layout:
    for dim, each in rows.items():
        layout = layout.with_dim(dim, each)
    return layout


# -- marks -------------------------------------------------------------------------------------------------------------


def _marks(held: tuple[IndexSet | None, ...], shape: tuple[int, ...]) -> Tensor:
    """Present or absent for each element of one rank; all free for an operand that every rank holds whole."""
    divided = [dim for dim, indices in enumerate(held) if indices is not None]
    marks = torch.full([1] * len(shape), _PRESENT if divided else _FREE, dtype=torch.int8)
    for dim in divided:
        indices = held[dim]
        assert indices is not None
        vector = torch.full((shape[dim],), _ABSENT, dtype=torch.int8)
        for a, b in indices.intervals:
            vector[a:b] = _PRESENT
        marks = torch.maximum(marks, vector.view([-1 if d == dim else 1 for d in range(len(shape))]))
    return marks.expand(shape)


def _product(marks: Tensor) -> list[IndexSet] | None:
    """Per dim the indices to hold: those with a present element, or with nothing but free ones. None: not a product."""
    if not marks.numel():
        return [IndexSet.range(0, size) for size in marks.shape]
    small = compact(marks).numpy()
    present, taken, absent = small == _PRESENT, small != _FREE, small == _ABSENT
    keep = []
    for dim, size in enumerate(marks.shape):
        if small.shape[dim] == 1 and size != 1:
            keep.append(IndexSet.range(0, size))
            continue
        others = tuple(d for d in range(marks.ndim) if d != dim)
        keep.append(IndexSet.where(present.any(others) | ~taken.any(others)))
    if absent.any() and not present.any():
        return _nothing(small.shape, marks)
    for dim, indices in enumerate(keep):
        if indices.size != small.shape[dim] and small.shape[dim] == marks.shape[dim]:
            absent = absent.take(indices.indices(), dim)
    return None if absent.any() else keep


def _nothing(small: tuple[int, ...], marks: Tensor) -> list[IndexSet]:
    """A rank that holds nothing: empty along the innermost dim that tells absent from free, whole along the others.

    `symbols are 1`: a dim of size 1 is taken only where no larger one was split, and never an expanded one.
    """
    own = [d for d in range(marks.ndim) if small[d] == marks.shape[d]]
    empty = max((d for d in own if marks.shape[d] > 1), default=own[-1])
    return [IndexSet.range(0, 0 if d == empty else size) for d, size in enumerate(marks.shape)]
