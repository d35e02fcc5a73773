"""The static check: layouts inferred anew from the rewritten graph, so that a missing collective is an error, not a
hang.

Nothing that a pass wrote about layouts is believed. Each node's layout is inferred from its operands by the rule
table, each requirement must be met as it stands, each move with local sizes is proved on element numbers, and the
integers that differ between ranks must be those that the layouts imply. All ranks of a mesh axis run one graph, in
one order, with the same shapes at every collective: so they cannot wait for one another in a circle.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import FILLED, Inference, Layouts, disjoint, sizes_read
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.analysis.layouts.propagate_layouts import batched, state_layout
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import is_move
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments, describe, evaluate, node_values, operation
from partitioner.program.program import PerRankInt, Program, Value
from partitioner.proof.dealt_rows import ROWS
from partitioner.proof.experts import EXPERT_CHECKS
from partitioner.proof.per_rank_integers import INTEGERS, Checks, at, expect, sizes_entry
from partitioner.proof.sequences import SEQUENCE_CHECKS
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Rows, Split, in_order, points
from runtime.ops.cached_attention import cached_attention
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import as_axes, read_call
from runtime.ops.local import once, reorder, shard
from runtime.ops.rows.sequence_attention import cached_sequence_attention
from runtime.ops.state import cache_append, state_read, state_write
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

aten = torch.ops.aten

__all__ = ["SPECIAL", "check", "check_entries", "infer_layouts", "layout_or_problem"]


def check(program: Program) -> None:
    """Raises `LayoutError` at the first node, in graph order, whose operands are not laid out as it requires."""
    layouts: Layouts = {}
    inferrer = Inferrer(program)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            layouts[node] = program.given(node.meta["val"])
        elif node.op == "get_attr":
            layouts[node] = program.layout_of(str(node.target))
        elif node.op == "output":
            for source in node.all_input_nodes:
                _require(node, source, layouts[source], program.output or program.given(source.meta["val"]))
        elif node.op == "call_function" and node_values(node):
            layouts[node] = _infer(program, node, layouts, inferrer)
            stated = node.meta.get("layout")
            if stated is not None and stated != layouts[node]:
                raise LayoutError(f"{at(node)}: the pass says {stated}, its operands give {layouts[node]}{_cure(node)}")


def check_entries(prefill: Program, decode: Program) -> None:
    """Raises `LayoutError` where what one entry writes is not what the other reads: they share states and weights."""
    for what, one, other in (
        ("state", prefill.states, decode.states),
        ("weight", prefill.weight_layouts, decode.weight_layouts),
    ):
        for name in sorted({*one, *other}):
            if one.get(name) != other.get(name):
                raise LayoutError(
                    f"the programs for prompts and for single tokens share the {what} {name!r}, but hold it as "
                    f"{one.get(name)} and as {other.get(name)}"
                )
    if prefill.batch_axes != decode.batch_axes:
        raise LayoutError(
            "the programs for prompts and for single tokens share states of sequences, which ranks of "
            f"{prefill.batch_axes or 'no axis'} have of their own in one, and of {decode.batch_axes or 'no axis'} in "
            "the other"
        )
    for name, stages in _stages_of_states(prefill).items():
        if stages != (others := _stages_of_states(decode).get(name)):
            raise LayoutError(
                f"the programs for prompts and for single tokens share the state {name!r}, but keep it on the stages "
                f"{sorted(stages)} and {sorted(others or ())}"
            )


def _stages_of_states(program: Program) -> dict[str, frozenset[int]]:
    """Where nodes are marked: the stages that read or write each state."""
    found: dict[str, frozenset[int]] = {}
    for node in program.graph.nodes:
        if "state" in node.kwargs and "stages" in node.meta:
            name = str(node.kwargs["state"])
            found[name] = found.get(name, frozenset()) | node.meta["stages"]
    return found


def _infer(program: Program, node: fx.Node, layouts: Layouts, inferrer: Inferrer) -> Any:
    special = SPECIAL.get(node.target)
    if special is not None:
        return special(program, node, layouts)
    found = inferrer.infer(node, layouts)
    if found.problem:
        raise LayoutError(f"{at(node)}: {found.problem}")
    for source, wanted in found.requires:
        _require(node, source, layouts[source], wanted)
    _require_all_named(node, found, layouts)
    _require_own_sizes(node, found, layouts)
    if is_move(node) and any(layouts[n].split_dims for n, _ in found.requires):  # noqa: SIM102 - two questions
        if not inferrer.moves_alike(node, layouts, found.outputs):
            raise LayoutError(f"{at(node)}: on some rank the move does not give {found.outputs[0]} of the whole result")
    for checks in _CHECKS:
        if (also := checks.get(operation(node))) is not None:
            also(program, node, layouts)
    return found.outputs[0] if isinstance(node.meta["val"], Value) else found.outputs


def layout_or_problem(
    program: Program, node: fx.Node, layouts: Layouts, inferrer: Inferrer
) -> tuple[Any, tuple[tuple[fx.Node, Layout], ...]] | str:
    """What `node` yields and what it requires, for passes that place nodes; or what is in the way."""
    special = SPECIAL.get(node.target)
    if special is not None:
        try:
            return special(program, node, layouts), ()
        except LayoutError as error:
            return str(error)
    found = inferrer.infer(node, layouts)
    if found.problem:
        return found.problem
    return (found.outputs[0] if isinstance(node.meta["val"], Value) else found.outputs), found.requires


def infer_layouts(program: Program, inferrer: Inferrer) -> Layouts:
    """The layout of every value of a program as it stands, for passes that place nodes anew.

    Raises `LayoutError` where a rule has a problem; what operands must be is not looked at, as `check` does.
    """
    layouts: Layouts = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            layouts[node] = program.given(node.meta["val"])
        elif node.op == "get_attr":
            layouts[node] = program.layout_of(str(node.target))
        elif node.op == "call_function" and node_values(node):
            found = layout_or_problem(program, node, layouts, inferrer)
            if isinstance(found, str):
                raise LayoutError(f"{node.name}: {found}")
            layouts[node] = found[0]
    return layouts


def _require_all_named(node: fx.Node, found: Inference, layouts: Layouts) -> None:
    """An operand that the rule does not speak of must not matter to a rank's part, not by its size either."""
    if node.target is operator.getitem or not any(output.split_dims for output in found.outputs):
        return
    named = {source for source, _ in found.requires}
    for source in node.all_input_nodes:
        if source not in named and isinstance(layouts.get(source), Layout):
            raise LayoutError(
                f"{at(node)}: its result is {found.outputs[0]}, and the layout rule of {describe(node)} does not say "
                f"how its operand {source.name!r} ({layouts[source]}) must be held: add the operand to the rule"
            )


def _require_own_sizes(node: fx.Node, found: Inference, layouts: Layouts) -> None:
    """What has the rows of all ranks must not be as long as those of one."""
    several = [layouts[source] for source in node.all_input_nodes if isinstance(layouts.get(source), Layout)]
    held = several if operation(node) not in FILLED else found.outputs
    rows = {one for layout in held for each in layout.dims if isinstance(each, Rows) for one in each.by_dim}
    for read, dim in sizes_read(node):
        own = layouts[read].dims[dim]
        if isinstance(own, Rows) and not rows.issuperset(own.by_dim):
            raise LayoutError(
                f"{at(node)} takes a size from {read.name!r}, of which each rank has {own} of its own, but none of "
                "its operands has those rows: read the size from what has the rows of all ranks"
            )


def _cure(node: fx.Node) -> str:
    return f": complete {', '.join(map(str, node.all_input_nodes))} with an all_reduce, if a partial sum was not meant"


def _require(node: fx.Node, source: fx.Node, got: Any, wanted: Layout) -> None:
    if got == wanted:
        return
    if isinstance(got, Layout) and got.partial - wanted.partial:
        cure = "complete it with an all_reduce before this use"
    elif isinstance(got, Layout) and wanted.partial - got.partial:
        cure = (
            "it is the same on every rank and would be summed once per rank: complete the partial sum that it is added "
            "to with an all_reduce first, or add it on one rank only (once)"
        )
    else:
        cure = "insert an all_gather or a shard before this use"
        if node.op == "call_function" and not is_move(node) and notation(node).opaque:
            cure += f"; {describe(node)} has no layout rule, and so needs all of every operand"
    raise LayoutError(f"{at(node)} requires its operand {source.name!r} to be {wanted}, got {got}: {cure}")


# -- what passes insert ------------------------------------------------------------------------------------------------


def _all_reduce(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    source, axes = node.args[0], read_call(node).axes
    layout: Layout = layouts[source]  # type: ignore[index]
    if missing := [axis for axis in axes if axis not in layout.partial]:
        raise LayoutError(
            f"{at(node)} sums {source} over {missing[0]!r}, but it is {layout}: not a partial sum over that axis"
        )
    return Layout(layout.dims, layout.partial - set(axes))


def _all_gather(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    source, axes = node.args[0], read_call(node).axes
    layout: Layout = layouts[source]  # type: ignore[index]
    dim, sizes = node.kwargs["dim"], node.kwargs["sizes"]
    split = layout.dims[dim]  # type: ignore[index]
    others = {a for i, s in enumerate(layout.dims) if s is not None and i != dim % len(layout.dims) for a in s.axes}  # type: ignore[operator]
    if not isinstance(split, Split) or split.axes != axes or layout.partial or others & set(axes):
        over = repr(axes[0]) if len(axes) == 1 else axes
        raise LayoutError(f"{at(node)} gathers dim {dim} of {source} over {over}, but it is {layout}")
    if disjoint(split) != split or split.sizes != tuple(sizes):  # type: ignore[arg-type]
        raise LayoutError(
            f"{at(node)}: pieces of sizes {sizes} do not make up dim {dim} of {source}, which is {layout}"
        )
    intervals = [interval for owned in split.owned for interval in owned.intervals]
    if intervals != sorted(intervals):  # none meets another
        order = [i for owned in split.owned for i in owned.indices()]
        users = list(node.users)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        if len(users) != 1 or users[0].target is not reorder or users[0].args[1] != inverse:
            raise LayoutError(f"{at(node)}: the pieces interleave and are not put back in order")
    return layout.with_dim(dim, None)  # type: ignore[arg-type]


def _shard(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    a = arguments(node)
    layout: Layout = layouts[a["x"]]
    entry = program.table[a["ranges"].name] if isinstance(a["ranges"], PerRankInt) else None
    if entry is None:
        return layout
    size = evaluate(a["x"].meta["val"].shape[a["dim"]], dict.fromkeys(program.symbols.values(), 1))
    old = layout.split(a["dim"])
    axes = entry.axes if old is None else in_order((*old.axes, *entry.axes))
    others = {axis for i, s in enumerate(layout.dims) if s is not None and i != a["dim"] for axis in s.axes}
    misfit = f"{at(node)}: ranges {entry} do not fit dim {a['dim']} of {layout}"
    if entry.whole != (0, size) or entry.axes != axes:
        raise LayoutError(misfit)
    if size != a["x"].meta["val"].shape[a["dim"]]:
        expect(program, node, "period", a["period"], size if old is None else sizes_entry(old))
    owned = []
    for ranges, place in zip(entry.values, points(program.mesh, axes), strict=True):
        held = range(size) if old is None else old.at(program.mesh, place).indices()
        assert isinstance(ranges, tuple)
        owned.append(
            IndexSet.of(held[j] for a_, b in zip(ranges[::2], ranges[1::2], strict=True) for j in range(a_, b))
        )
    if old is None and others & set(axes) and _loses(program, layout, axes, owned, size):
        raise LayoutError(f"{misfit}: what some ranks give up no other one keeps")
    return layout.with_dim(a["dim"], Split(axes, tuple(owned)))


def _loses(program: Program, layout: Layout, axes: tuple[str, ...], owned: list[IndexSet], size: int) -> bool:
    """Whether ranks that hold the same of the other dims, and all of this one, together keep less than all of it."""
    kept: dict[tuple[Any, ...], set[int]] = {}
    together = in_order((*axes, *layout.axes))
    of_axes = {tuple(place.values()): mine for place, mine in zip(points(program.mesh, axes), owned, strict=True)}
    for place in points(program.mesh, together):
        same = tuple(dim.at(program.mesh, place) for dim in layout.dims if isinstance(dim, Split))
        kept.setdefault(same, set()).update(of_axes[tuple(place[axis] for axis in axes)].indices())
    return any(len(mine) < size for mine in kept.values())


def _once(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    source = node.all_input_nodes[0]
    first: Any = node.args[1]
    layout: Layout = layouts[source]
    entry = program.table[first.name] if isinstance(first, PerRankInt) else None
    if (
        entry is None
        or layout.partial & set(entry.axes)
        or layout.axes & set(entry.axes)
        or sorted(map(str, entry.values)) != ["0"] * (len(entry.values) - 1) + ["1"]
    ):
        raise LayoutError(f"{at(node)} must count {source} ({layout}) on exactly one rank, got {entry}")
    return Layout(layout.dims, layout.partial | set(entry.axes))


# -- caches and states -------------------------------------------------------------------------------------------------


def _check_states(program: Program, node: fx.Node, layouts: Layouts) -> None:
    """A cache must hold what the rank writes to it: the same heads."""
    a = arguments(node)
    for operand, part in (("k", "key"), ("v", "value")):
        name, layout = f"{a['state']}.{part}", layouts[a[operand]]
        state, axes = program.states.get(name), as_axes(a["axis"]) if "axis" in a else ()
        wanted = Layout((layout.dims[1], layout.dims[3]))
        if state is None or (state.layout, state.token_axes) != (wanted, axes):
            got = "no such state" if state is None else f"{state.layout}, tokens over {state.token_axes}"
            raise LayoutError(f"{at(node)} writes {layout} to the state {name!r}, which is {got}")


def _check_latent(program: Program, node: fx.Node, layouts: Layouts) -> None:
    """Every rank keeps all of what all heads read, of its own tokens where these are shared out."""
    a = arguments(node)
    axes = as_axes(a["axis"]) if "axis" in a else ()
    name = f"{a['state']}.latent"
    width = sum(a[part].meta["val"].shape[2] for part in ("latent", "carried") if a[part] is not None)
    state, wanted = program.states.get(name), (1, width)
    if state is None or (state.shape, state.layout, state.token_axes) != (wanted, REPLICATED(2), axes):
        got = "no such state" if state is None else f"{state.shape}, {state.layout}, tokens over {state.token_axes}"
        raise LayoutError(f"{at(node)} writes {wanted} for each token to the state {name!r}, which is {got}")


def _through_state(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    """A state must be read, and written, as the ranks hold it."""
    a = arguments(node)
    name = str(a["state"])
    state = program.states.get(name)
    per_token = node.target is cache_append
    if state is None or state.per_token is not per_token:
        raise LayoutError(f"{at(node)} uses the state {name!r}, but the program has no such state of that kind")
    if node.target is state_read:
        return batched(state.layout, program.own_batch)
    found = Inferrer(program).infer(node, layouts)
    layout = layouts[a["x"] if per_token else a["value"]]
    for source, wanted in found.requires[1:]:
        _require(node, source, layouts[source], wanted)
    if (
        layout.partial
        or layout.dims[0] != program.own_batch
        or state_layout(layout, per_token=per_token) != state.layout
    ):
        raise LayoutError(f"{at(node)} writes {layout} to the state {name!r}, which is held as {state.layout}")
    return layout  # type: ignore[no-any-return]


_CACHES: Checks = {
    cached_attention: _check_states,
    cached_sequence_attention: _check_states,
    latent_attention: _check_latent,
    latent_sequence_attention: _check_latent,
}
_CHECKS = (INTEGERS, _CACHES, EXPERT_CHECKS, SEQUENCE_CHECKS)
"""By op, what must hold besides what its rule says."""

SPECIAL = {
    all_reduce: _all_reduce,
    all_gather: _all_gather,
    shard: _shard,
    once: _once,
    **ROWS,
    cache_append: _through_state,
    state_read: _through_state,
    state_write: _through_state,
}
"""Ops whose layouts are not a matter of index notation."""
