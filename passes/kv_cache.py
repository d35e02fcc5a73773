"""The kv-cache pass: attention reads keys and values of earlier tokens from a cache instead of computing them again.

    attention(q, k, v, causal=True)   ->   cached_attention(q, k, v, positions, state="model.layers.0.self_attn")

The positions alone say what a query may see, so one graph serves a whole prompt, part of a prompt, and one token. A
layer's cache holds the heads that the rank computes. Layers that see no further than a window or a chunk say so, and
keep no more. Key-value caching: arXiv:1911.02150, section 2.

Where a sequence is divided over sp, each rank keeps its part of the cache: its own tokens of a prompt
(`sequence_attention`), and in turn of the tokens that come one by one (attention, whose partial results are merged).

Where keys and values are products of a narrower value (`partitioner.analysis.tokens.latent_keys`), that value is cached
in their place if it takes fewer bytes on every rank, or if it is asked for:

    attention(q, k, v, causal=True)   ->   latent_attention(q, carried_q, latent, carried, key_weight, value_weight,
                                                            positions, state="model.layers.0.self_attn")

It has no heads: every rank keeps all of it, and reads it for its own heads; or of its own tokens, where ranks share out
a sequence (`latent_sequence_attention`). Multi-head latent attention: arXiv:2405.04434, section 2.1.

A graph that is right for up to n tokens at once says nothing of longer texts, also in pieces: beyond n the model's own
code may do something else, such as attend to a summary of every n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from partitioner.analysis.tokens.latent_keys import LatentKeys, Projection, find_latent_keys
from partitioner.compile.insert_collectives import Rewriter
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments, describe
from partitioner.program.program import Program, State, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Rows, Split
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.communicating import axis_argument
from runtime.ops.local import reorder
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention
from runtime.ops.rows.share_rows import take_rows
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

aten = torch.ops.aten

__all__ = ["KvCache"]

_POSITIONS, _AXIS = "position_ids", "sp"


@dataclass(frozen=True)
class KvCache:
    """Runs after the pass that splits heads, on a program whose tokens meet in causal attention only.

    cache: "expanded", keys and values as attention has them; "latent", the narrower value that they are made of, or a
    `PlanError` that names an attention that has none; "auto", of both what takes fewer bytes per token.
    """

    cache: str = "auto"
    name: ClassVar[str] = "kv-cache"

    def run(self, program: Program) -> Program:
        # attention that is not causal by itself reads what a graph for single steps has appended and masked already
        nodes = [
            n for n in program.graph.nodes if n.target in (attention, sequence_attention) and arguments(n)["causal"]
        ]
        takes_steps = bool(program.states)  # with the model's own cache: it is right for any text already
        if self.cache == "latent" and not nodes:
            raise PlanError(
                f"cache=latent: {program.name} has no attention that is causal by itself; it generates by its own use "
                "of a cache, which stays as it is: leave cache out"
            )
        # made where the model itself has no use for it
        tokens = next(iter(program.graph.nodes)).meta["val"]
        positions = program.add_input(_POSITIONS, Value(tokens.shape, torch.int64), "arange")
        for node in nodes:
            self._cache(program, node, positions)
        if not takes_steps:
            known = [program.limits.get(size, (1, None))[1] for size in ("sequence", "positions")]
            longest = min((most for most in known if most is not None), default=None)
            program.limits = {**program.limits, "positions": (1, longest)}
        program.graph.eliminate_dead_code()
        program.graph.lint()
        return program

    def _cache(self, program: Program, node: fx.Node, positions: fx.Node) -> None:
        a = arguments(node)
        axes = (_AXIS,) if program.mesh.size(_AXIS) > 1 else ()
        name = str(node.meta.get("path") or node.name)
        if f"{name}.key" in program.states:  # a module that attends twice
            name = f"{name}.{node.name}"
        sees = min((a[limit] for limit in ("window", "chunk") if a[limit] is not None), default=None)
        far = "all earlier tokens" if sees is None else f"the last {sees} tokens"
        found, why = self._latent(program, node)
        where = f", a part of which each rank of {_AXIS} keeps" if axes else ""
        if found is not None:
            _cache_latent(program, node, found, positions, name, sees, axes)
            node.meta["why"] = f"keys and values of {far} are made of what is cached{where}; {why}"
            return
        for operand, part in (("k", "key"), ("v", "value")):
            source = a[operand]
            value, layout = source.meta["val"], source.meta.get("layout") or REPLICATED(4)
            state = State(
                f"{name}.{part}",
                (value.shape[1], value.shape[3]),
                value.dtype,
                Layout((layout.dims[1], layout.dims[3])),
                sees,
                token_axes=axes,
            )
            program.states[state.name] = state
        mask, sinks = a["mask"], a["sinks"]
        options = {k: v for k, v in node.kwargs.items() if k not in ("mask", "sinks")}
        if not axes:
            node.target = cached_attention
            node.args = (a["q"], a["k"], a["v"], positions, *(() if mask is sinks is None else (mask, sinks)))
        else:
            if node.target is attention:
                how: Any = {"how": "merge", "parts": program.mesh.size(_AXIS)}
                options = {**how, **{k: v for k, v in options.items() if k != "written_out"}}
            node.target = cached_sequence_attention
            node.args = (a["q"], a["k"], a["v"], _of_queries(program, a["q"], positions), mask, sinks, _AXIS)
        node.kwargs = {**options, "state": name}
        node.meta["why"] = f"keys and values of {far} come from the cache{where}; {why}"

    def _latent(self, program: Program, node: fx.Node) -> tuple[LatentKeys | None, str]:
        """What is cached in the place of keys and values, if anything, and why."""
        if self.cache == "expanded":
            return None, "expanded, as the plan says"
        found = _usable(program, node)
        if isinstance(found, str):
            if self.cache == "latent":
                raise PlanError(
                    f"cache=latent: the attention {node.name!r} ({describe(node)}) has nothing narrower to cache: "
                    f"{found}; leave cache out, or give cache=auto"
                )
            return None, f"expanded, because {found}"
        a = arguments(node)
        widths = [a[name].meta["val"].shape[3] for name in ("k", "v")]
        expanded = sum(widths) * _most_heads(a["k"])
        counts = f"{found.cached} numbers per token on every rank, against {expanded} of keys and values on one"
        if self.cache == "latent":
            return found, f"latent, as the plan says: {counts}"
        is_less = found.cached < expanded
        return found if is_less else None, f"{'latent' if is_less else 'expanded'}: {counts}"


def _most_heads(k: fx.Node) -> int:
    split = (k.meta.get("layout") or REPLICATED(4)).dims[1]
    heads: int = k.meta["val"].shape[1]
    return max(split.sizes) if isinstance(split, Split) else heads


def _usable(program: Program, node: fx.Node) -> LatentKeys | str:
    """What may be cached in the place of the keys and values of an attention, or why there is nothing."""
    a = arguments(node)
    heads = {a[name].meta["val"].shape[1] for name in ("q", "k", "v")}
    if len(heads) > 1 or a["kv_map"] is not None:
        return "several query heads share keys and values"
    found = find_latent_keys(program, a["k"], a["v"])
    if isinstance(found, str):
        return found
    for value in (found.latent, *(part.source for part in found.carried)):
        layout = value.meta.get("layout")  # own tokens and sequences are told by their rows
        if layout is not None and (layout.split_dims or layout.partial):
            return f"the ranks hold {value.name!r} as {layout}, and not all of it"
    dtypes = {each.meta["val"].dtype for each in (a["q"], a["k"], a["v"], found.latent)}
    if len(dtypes) > 1:
        return f"it mixes dtypes: {', '.join(sorted(map(str, dtypes)))}"
    heads_of = (a["q"].meta.get("layout") or REPLICATED(4)).dims[1]
    for made in (found.keys, found.values):
        rows = program.layout_of(str(made.weight.target)).dims
        if rows != (_rows_of(heads_of, made.each), None):
            return f"the ranks hold other rows of {made.weight.target} than those of their heads"
    return found


def _rows_of(heads: Split | Rows | None, each: int) -> Split | Rows | None:
    """How rows are held, `each` of them for every head."""
    if not isinstance(heads, Split):
        return heads
    owned = tuple(IndexSet(tuple((a * each, b * each) for a, b in own.intervals)) for own in heads.owned)
    return Split(heads.axes, owned)


def _cache_latent(
    program: Program,
    node: fx.Node,
    found: LatentKeys,
    positions: fx.Node,
    name: str,
    sees: int | None,
    axes: tuple[str, ...],
) -> None:
    """Makes `node` attention over what `found` says; axes: those whose ranks share out the tokens."""
    a, make = arguments(node), _Maker(program, node)
    dtype = a["k"].meta["val"].dtype
    state = State(f"{name}.latent", (1, found.cached), dtype, REPLICATED(2), sees, token_axes=axes)
    program.states[state.name] = state
    latent = make.per_token(found.latent, 0, found.width)
    parts = [make.per_token(part.source, part.first, len(part.at)) for part in found.carried]
    carried = parts[0] if len(parts) == 1 else make.joined(parts) if parts else None
    q = make.picked(a["q"], found.projected)
    at = tuple(dim for part in found.carried for dim in part.at)
    carried_q = make.picked(a["q"], at) if at else None
    weights = [make.per_head(made) for made in (found.keys, found.values)]
    without = ("mask", "sinks", "kv_map", "written_out", "neighbours")
    options = {k: v for k, v in node.kwargs.items() if k not in without}
    if not axes:
        more = () if a["mask"] is a["sinks"] is None else (a["mask"], a["sinks"])
        node.args = (q, carried_q, latent, carried, *weights, positions, *more)
        node.target, node.kwargs = latent_attention, {**options, "state": name}
        return
    # what travels has no heads to exchange
    how = "merge" if node.target is attention else "gather" if a["how"] == "gather" else "ring"
    options |= {"how": how, "parts": program.mesh.size(*axes), "state": name}
    own = _of_queries(program, a["q"], positions)
    node.args = (q, carried_q, latent, carried, *weights, own, a["mask"], a["sinks"], axis_argument(axes))
    node.target, node.kwargs = latent_sequence_attention, options


class _Maker:
    """Data-movement ops before a node, with what the passes after this one read of them."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self._program, self._node = program, node

    def per_token(self, source: fx.Node, first: int, count: int) -> fx.Node:
        """Features of a value [B, S, ..] that may have dims of size 1 between: [B, S, count]."""
        shape = source.meta["val"].shape
        dims = (source.meta.get("layout") or REPLICATED(len(shape))).dims
        for dim in reversed([dim for dim, size in enumerate(shape) if size == 1]):
            shape, dims = ((*each[:dim], *each[dim + 1 :]) for each in (shape, dims))
            source = self._made(aten.squeeze.dim, (source, dim), shape, layout=Layout(dims))
        if len(shape) > 3:
            width = 1
            for size in shape[2:]:
                width *= size
            shape = (*shape[:2], width)
            source = self._made(aten.flatten.using_ints, (source, 2, -1), shape, layout=Layout((*dims[:2], None)))
        if (first, count) != (0, shape[2]):
            source = self._made(aten.slice.Tensor, (source, 2, first, first + count), (*shape[:2], count))
        return source

    def joined(self, parts: list[fx.Node]) -> fx.Node:
        shape = parts[0].meta["val"].shape
        width = sum(part.meta["val"].shape[2] for part in parts)
        return self._made(aten.cat.default, (parts, -1), (*shape[:2], width), like=parts[0])

    def picked(self, q: fx.Node, dims: tuple[int, ...]) -> fx.Node:
        """Some dims of queries [B, H, S, D], in that order."""
        shape = (*q.meta["val"].shape[:3], len(dims))
        if dims == tuple(range(dims[0], dims[0] + len(dims))):
            return self._made(aten.slice.Tensor, (q, 3, dims[0], dims[-1] + 1), shape, like=q)
        made = self._made(reorder, (q, list(dims)), shape, like=q)
        made.kwargs = {"dim": 3}
        return made

    def per_head(self, made: Projection) -> fx.Node:
        """Rows of a weight, by head: [H, count, R]."""
        rows, width = made.weight.meta["val"].shape
        layout = self._program.layout_of(str(made.weight.target))
        split = layout.dims[0]
        heads = split
        if isinstance(split, Split):
            owned = (IndexSet(tuple((a // made.each, b // made.each) for a, b in own.intervals)) for own in split.owned)
            heads = Split(split.axes, tuple(owned))
        held = Layout((heads, None, None))
        shape = (rows // made.each, made.each, width)
        found = self._made(aten.reshape.default, (made.weight, [-1, *shape[1:]]), shape, layout=held)
        if made.count == made.each:
            return found
        bounds = (made.first, made.first + made.count)
        return self._made(aten.slice.Tensor, (found, 1, *bounds), (shape[0], made.count, width), layout=held)

    def _made(
        self,
        target: Any,
        args: tuple[Any, ...],
        shape: tuple[Any, ...],
        *,
        like: fx.Node | None = None,
        layout: Layout | None = None,
    ) -> fx.Node:
        source = like or args[0]
        with self._program.graph.inserting_before(self._node):
            made = self._program.graph.call_function(target, args)
        if layout is None:
            layout = Layout((source.meta.get("layout") or REPLICATED(len(shape))).dims)
        made.meta = {
            "val": Value(shape, source.meta["val"].dtype), "layout": layout, "path": self._node.meta.get("path"),
        }  # fmt: skip
        return made


def _of_queries(program: Program, q: fx.Node, positions: fx.Node) -> fx.Node:
    """The positions of a rank's own queries."""
    rows = (q.meta.get("layout") or REPLICATED(4)).dims[2]
    if not isinstance(rows, Rows):
        return positions
    layouts = {node: node.meta["layout"] for node in program.graph.nodes if isinstance(node.meta.get("layout"), Layout)}
    given = program.given(positions.meta["val"])
    wanted = given.with_dim(1, rows)
    for user in positions.users:
        if user.target is take_rows and layouts.get(user) == wanted:
            return user
    return Rewriter(program, {**layouts, positions: given}).converted(positions, wanted)
