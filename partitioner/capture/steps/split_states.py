"""One tensor that holds a state of every layer becomes a state for each.

    s = READ [B, H, L]    a = select(s, 2, 0) .. t = select_scatter(s, x, 2, 0)    b = select(t, 2, 1) ..    written: t
    s.0 = READ [B, H]     a = s.0 ..   written: x         s.1 = READ [B, H]        b = s.1 ..

What is read at one index says nothing of the others, so that layers are told apart; otherwise each would seem to wait
for all that the ones before it remember.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from partitioner.capture.steps.traced_cache import TracedState
from partitioner.capture.trace.transformers_hooks import READ
from partitioner.program.program import Value

__all__ = ["split_states"]

aten = torch.ops.aten
_ALL = 2**63 - 1
_SELECT, _PUT = aten.select.int, aten.select_scatter.default


def split_states(
    graph: fx.Graph, states: Sequence[TracedState], written: Sequence[fx.Node]
) -> tuple[list[TracedState], list[fx.Node]]:
    """Rewrites `graph`; the states then, with what is written of those per sequence, in their order."""
    written = _without_whole_slices(graph, written)
    kept, values = [state for state in states if state.per_token], list[fx.Node]()
    reads = {int(node.args[3]): node for node in graph.nodes if node.target is READ}
    last = iter(written)
    numbers: dict[fx.Node, TracedState] = {
        reads[number]: state for number, state in enumerate(states) if state.per_token and number in reads
    }
    for number, state in enumerate(states):
        if state.per_token:
            continue
        value = next(last)
        of_one_layer = state.layer >= 0
        parts = None if of_one_layer else _split(graph, reads.get(number), value, state)
        if parts is None:
            kept.append(state)
            values.append(value)
            if number in reads:
                numbers[reads[number]] = state
            continue
        for part, read, result in parts:
            kept.append(part)
            values.append(result)
            numbers[read] = part
    place = {state.name: number for number, state in enumerate(kept)}
    for node, state in numbers.items():
        node.args = (*node.args[:3], place[state.name])
    # what appends says its state by its number too
    for node in graph.nodes:
        if node.target is not READ and node.op == "call_function" and node.target.__name__ == "append.default":
            node.args = (*node.args[:2], place[states[int(node.args[2])].name])
    return kept, values


def _without_whole_slices(graph: fx.Graph, written: Sequence[fx.Node]) -> list[fx.Node]:
    """What is put in the place of all of a tensor is the tensor from then on."""
    found = list(written)
    for node in list(graph.nodes):
        if node.target is not aten.slice_scatter.default:
            continue
        given: list[Any] = [*node.args, *(0, 0, _ALL, 1)[len(node.args) - 2 :]]
        base, put, _, start, end, step = given
        if (start or 0, step) == (0, 1) and end in (None, _ALL) and base.meta["val"].shape == put.meta["val"].shape:
            node.replace_all_uses_with(put)
            found = [put if each is node else each for each in found]
            graph.erase_node(node)
    return found


def _split(
    graph: fx.Graph, read: fx.Node | None, value: fx.Node, state: TracedState
) -> list[tuple[TracedState, fx.Node, fx.Node]] | None:
    """The states of its indices with their reads and values; None where it is not read and written by index."""
    if read is None:
        return None
    base, begins = read, None
    (only,) = read.users if len(read.users) == 1 else (None,)
    if only is not None and only.target is aten.masked_fill.Scalar:
        base, begins = only, only
    chain, dim = {base: True}, None
    for node in graph.nodes:  # in order: a member comes before those made of it
        if node in chain:
            for user in node.users:
                if user.target not in (_SELECT, _PUT) or user.args[0] is not node:
                    if not (user.op == "output" and node is value):
                        return None
                    continue
                at = int(user.args[1 if user.target is _SELECT else 2]) % len(base.meta["val"].shape)
                if dim not in (None, at) or at == 0:
                    return None
                dim = at
                if user.target is _PUT:
                    chain[user] = True
    if dim is None or value not in chain or value is base:
        return None
    size = state.shape[dim - 1]
    shape = (*state.shape[: dim - 1], *state.shape[dim:])
    held = {base: [_read(graph, read, shape, begins, dim) for _ in range(size)]}
    firsts = [each for each, _ in held[base]]
    current: dict[fx.Node, list[fx.Node]] = {base: [each for _, each in held[base]]}
    for node in list(graph.nodes):
        if node.target is _PUT and node.args[0] in current and node in chain:
            index = int(node.args[3]) % size
            current[node] = list(current[node.args[0]])
            current[node][index] = node.args[1]
        elif node.target is _SELECT and node.args[0] in current:
            node.replace_all_uses_with(current[node.args[0]][int(node.args[2]) % size])
    found = []
    for index, (first, now) in enumerate(zip(firsts, current[value], strict=True)):
        if now in current[base]:
            return None
        found.append((replace(state, name=f"{state.name}.{index}", shape=shape), first, now))
    return found


def _read(
    graph: fx.Graph, read: fx.Node, shape: tuple[int, ...], begins: fx.Node | None, dim: int
) -> tuple[fx.Node, fx.Node]:
    """A read of one index, and what stands for it where the first token is told apart."""
    value = read.meta["val"]
    with graph.inserting_before(read.next if begins is None else begins):
        made = graph.call_function(READ, (read.args[0], list(shape), *read.args[2:]))
        made.meta = {**read.meta, "val": Value((value.shape[0], *shape), value.dtype)}
        if begins is None:
            return made, made
        given: Any = begins.args
        _, first, number = given
        place = graph.call_function(_SELECT, (first, dim, 0))
        asked = first.meta["val"]
        place.meta = {**begins.meta, "val": Value((*asked.shape[:dim], *asked.shape[dim + 1 :]), asked.dtype)}
        chosen = graph.call_function(aten.masked_fill.Scalar, (made, place, number))
        chosen.meta = {**begins.meta, "val": made.meta["val"]}
    return made, chosen
