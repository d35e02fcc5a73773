"""The ops that communicate: one table that execution, proof, report and profile read.

    COMMUNICATING[op].run(channel, *operands, **options)   what the op does over a group of ranks
    COMMUNICATING[op].meetings(node)                       what it exchanges with them, in order, before anything runs

The signature of such an op says what is known when:

    positional parameters   operands, known when the graph runs
    axis                    the group: a mesh axis, or a tuple of axes for the ranks that differ in any of them
    keyword-only ones       options, fixed in the graph

A `channel` (`runtime.communication.channels`) offers the primitives, which are those of the MPI standard.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from partitioner.errors import CommunicationError
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.expert_exchange import expert_return, expert_send, receive_from_experts, send_to_experts
from runtime.ops.rows.partial_attention import accumulating
from runtime.ops.rows.sequence_attention import (
    attend_over_ranks,
    cached_sequence_attention,
    sequence_attention,
    without_cache,
)
from runtime.ops.rows.share_rows import collect, collect_rows, scatter, scatter_rows
from runtime.ops.rows.ulysses import heads_of
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention, without_latent_cache

__all__ = [
    "COMMUNICATING",
    "Axes",
    "Communicating",
    "Kind",
    "Meeting",
    "as_axes",
    "axes_text",
    "axis_argument",
    "named_axes",
    "read_call",
]

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute", "send", "receive"]
"""A primitive of a channel."""

Axes = str | tuple[str, ...]
"""One mesh axis or several."""


@dataclass(frozen=True)
class Meeting:
    """One primitive that a node performs together with other ranks.

    `shape` and `dtype` are those of what a rank brings, as the graph has them: sizes may be expressions, and what a
    rank holds of a split dim is said by the layout. Both are None where the graph does not record them. `peer`: of a
    send or receive, the other rank's coordinate in the group. `sizes_from`: the node whose result holds the sizes,
    where they depend on data; both sides must read the same one.
    """

    kind: Kind
    axes: tuple[str, ...]
    shape: tuple[Any, ...] | None
    dtype: Any
    peer: int | None = None
    sizes_from: str | None = None


@dataclass(frozen=True)
class Communicating:
    """One row of the table. `primitive`: the one primitive that the op is, with the same operands and options.

    Such an op is bound to the primitive itself, without `run` in between.
    """

    run: Callable[..., Any]
    meetings: Callable[[fx.Node], tuple[Meeting, ...]]
    primitive: Kind | None = None


class CommunicatingCall(NamedTuple):
    """The arguments of a node, as the op's signature sorts them."""

    operands: tuple[Any, ...]
    axes: tuple[str, ...]
    options: dict[str, Any]


def as_axes(axis: Axes) -> tuple[str, ...]:
    found = (axis,) if isinstance(axis, str) else axis
    if not isinstance(found, (tuple, list)) or not all(isinstance(each, str) for each in found):
        raise CommunicationError(f"a group is named by a mesh axis or a tuple of axes, got {axis!r}")
    return tuple(found)


def axis_argument(axes: tuple[str, ...]) -> Axes:
    """As graphs name a group: one axis by its name, several as a tuple. `as_axes` reads it."""
    return axes[0] if len(axes) == 1 else axes


def axes_text(axis: Axes) -> str:
    """As messages name a group: tp, or dp x tp."""
    return " x ".join(as_axes(axis))


def read_call(node: fx.Node) -> CommunicatingCall:
    """How `node` calls its communicating op."""
    assert callable(node.target)
    signature = inspect.signature(node.target)
    given = signature.bind(*node.args, **node.kwargs).arguments
    axes = as_axes(given.pop("axis"))
    operands: list[Any] = []
    options: dict[str, Any] = {}
    for name, value in given.items():
        if signature.parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
            operands.append(value)
            continue
        if any(isinstance(leaf, fx.Node) for leaf in (value if isinstance(value, (list, tuple)) else [value])):
            raise CommunicationError(
                f"node {node.name!r}: the option {name!r} of {node.target.__name__} must be fixed in the graph, "
                f"got {value}: what is known only at run time must be a positional parameter of the op"
            )
        options[name] = list(value) if isinstance(value, (list, tuple)) else value
    return CommunicatingCall(tuple(operands), axes, options)


def named_axes(graphs: Iterable[fx.Graph]) -> tuple[tuple[str, ...], ...]:
    """The axis tuples that the communicating nodes of `graphs` name, sorted: the groups that a rank needs."""
    found = {
        meeting.axes
        for graph in graphs
        for node in graph.nodes
        if node.op == "call_function" and node.target in COMMUNICATING
        for meeting in COMMUNICATING[node.target].meetings(node)
    }
    return tuple(sorted(found))


def _one(kind: Kind) -> Callable[[fx.Node], tuple[Meeting, ...]]:
    """The meeting of an op that brings its first operand to one primitive."""

    def meetings(node: fx.Node) -> tuple[Meeting, ...]:
        operands, axes, _ = read_call(node)
        value = operands[0].meta.get("val") if isinstance(operands[0], fx.Node) else None
        shape = None if value is None else tuple(value.shape)
        return (Meeting(kind, axes, shape, None if value is None else value.dtype),)

    return meetings


def _primitive(kind: Kind) -> Communicating:
    """The row of an op that is one primitive."""

    def run(channel: Any, x: Tensor, **options: Any) -> Tensor:
        return getattr(channel, kind)(x, **options)  # type: ignore[no-any-return]

    return Communicating(run, _one(kind), kind)


def _meetings_of_send(node: fx.Node) -> tuple[Meeting, ...]:
    """The counts, and rows of bytes as many as they say."""
    operands, axes, options = read_call(node)
    values = [operand.meta.get("val") for operand in operands[:3]]
    shape = None
    if None not in values:  # a bundle's graph does not record them
        hidden, index, gates = values
        choices = index.shape[1] * (torch.int32.itemsize + gates.dtype.itemsize)
        shape = (hidden.shape[0], hidden.shape[1] * hidden.dtype.itemsize + choices)
    counts = Meeting("all_to_all", axes, (len(options["counts"]),), torch.int64)
    return counts, Meeting("all_to_all", axes, shape, torch.uint8, sizes_from=node.name)


def _meetings_of_return(node: fx.Node) -> tuple[Meeting, ...]:
    (rows, back), axes, _ = read_call(node)
    send = back.args[0] if back.target is operator.getitem else back
    value = rows.meta.get("val")
    shape, dtype = (None, None) if value is None else (tuple(value.shape), value.dtype)
    return (Meeting("all_to_all", axes, shape, dtype, sizes_from=send.name),)


def _meetings_of_latent(node: fx.Node) -> tuple[Meeting, ...]:
    """As of attention: the narrow value takes the place of keys and values."""
    operands, axes, options = read_call(node)
    how, parts = options["how"], options["parts"]
    q, _, latent, carried, _, value_weight = (
        operand.meta.get("val") if isinstance(operand, fx.Node) else None for operand in operands[:6]
    )
    kind: Kind = "permute" if how == "ring" else "all_gather"
    count = parts - 1 if how == "ring" else 1
    if q is None or latent is None or value_weight is None:
        return (Meeting(kind, axes, None, None),) * count
    (batch, heads, size, _), dtype = q.shape, q.dtype
    if how == "merge":
        shape = (1, batch, heads, size, value_weight.shape[1] + 1)
        return (Meeting("all_gather", axes, shape, accumulating(dtype)),)
    width = latent.shape[2] + (0 if carried is None else carried.shape[2])
    return (Meeting(kind, axes, (batch, 1, size, width), dtype),) * count


def _meetings_of_attention(node: fx.Node) -> tuple[Meeting, ...]:
    """By `how`, of a run that comes first. How much lies in a cache, and whether queries travel to it, is not known."""
    operands, axes, options = read_call(node)
    how, parts = options["how"], options["parts"]
    values = [operand.meta.get("val") for operand in operands[:3]]
    by_how: dict[str, tuple[Kind, int]] = {
        "ring": ("permute", parts - 1),
        "gather": ("all_gather", 1),
        "ulysses": ("all_to_all", 2),
        "merge": ("all_gather", 1),
    }
    if how == "ring-ulysses":
        ring = parts // options.get("neighbours", 1) - 1
        kinds: list[Kind] = ["all_to_all", *["permute"] * ring, "all_to_all"]  # type: ignore[list-item]
    else:
        kinds = [by_how[how][0]] * by_how[how][1]
    if None in values:  # a bundle's graph does not record them
        return tuple(Meeting(kind, axes, None, None) for kind in kinds)
    (batch, heads, size, width), (_, kv_heads, _, _), value_width = (*(v.shape for v in values[:2]), values[2].shape[3])
    dtype = values[0].dtype
    if how == "merge":
        return (Meeting("all_gather", axes, (1, batch, heads, size, value_width + 1), accumulating(dtype)),)
    rows = batch * size
    sent = _kv_heads_sent(operands[0], heads, kv_heads, parts if how == "ulysses" else options.get("neighbours", 1))
    exchanged = [rows * (heads * width + sent * (width + value_width)), rows * heads * value_width]
    keys = Meeting("permute", axes, (batch, kv_heads, size, width + value_width), dtype)
    return tuple(
        Meeting(kind, axes, (exchanged.pop(0),), dtype) if kind == "all_to_all" else replace(keys, kind=kind)
        for kind in kinds
    )


def _kv_heads_sent(q: fx.Node, heads: Any, kv_heads: Any, ranks: int) -> Any:
    """Of all ranks with heads of their own; one that query heads of several of `ranks` read goes to each of them."""
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or not kv_heads or heads % kv_heads:
        return kv_heads
    layout = q.meta.get("layout")
    split = None if layout is None else layout.split(1)
    sizes = [heads] if split is None or sum(split.sizes) != heads else list(split.sizes)
    read, first, found = tuple(head * kv_heads // heads for head in range(heads)), 0, 0
    for size in sizes:
        found += sum(len(share.kv) for share in heads_of(ranks, size, read[first : first + size]))
        first += size
    return found


COMMUNICATING: dict[Any, Communicating] = {
    all_reduce: _primitive("all_reduce"),
    all_gather: _primitive("all_gather"),
    collect_rows: Communicating(collect, _one("all_gather")),
    scatter_rows: Communicating(scatter, _one("reduce_scatter")),
    expert_send: Communicating(send_to_experts, _meetings_of_send),
    expert_return: Communicating(receive_from_experts, _meetings_of_return),
    sequence_attention: Communicating(attend_over_ranks, _meetings_of_attention),
    cached_sequence_attention: Communicating(without_cache, _meetings_of_attention),
    latent_sequence_attention: Communicating(without_latent_cache, _meetings_of_latent),
}
"""Every op of the graph that communicates."""
