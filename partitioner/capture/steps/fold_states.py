"""From the trace of a step to our runtime ops.

attention(q, append(k), append(v), mask)   ->  attention(q, k, v, causal=True)    the kv-cache pass gives it its cache
append(x, slots)                           ->  cache_append(x, position_ids, slots)
read, and what became of it                ->  state_read, state_write(value, active)
mask                                       ->  position_mask(position_ids, slots)
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from partitioner.capture.steps.position_tables import cut_by_position
from partitioner.capture.steps.traced_cache import TracedState
from partitioner.capture.trace.fold_masks import keywords, kind_of, rewrite_attention
from partitioner.capture.trace.recognise_masks import MaskKind
from partitioner.capture.trace.transformers_hooks import APPEND, ATTENTION, MASK, READ
from partitioner.errors import CaptureError
from partitioner.program.program import Value
from runtime.ops.state import cache_append, position_mask, state_read, state_write

aten = torch.ops.aten

__all__ = ["fold_steps"]

_FILLED = {aten.ones.default, aten.new_ones.default, aten.ones_like.default}
_CASTS = {aten.to.dtype, aten.to.device, aten._to_copy.default, aten.expand.default, aten.reshape.default}


def fold_steps(
    graph: fx.Graph,
    kinds: list[MaskKind | None],
    states: list[TracedState],
    written: tuple[fx.Node, ...],
    symbols: dict[str, sympy.Symbol],
) -> dict[str, fx.Node]:
    """Rewrites `graph`; `written`: the new values of the states per sequence, in order. Returns the inputs by name."""
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    rows = inputs["input_ids"].meta["val"]
    if "position_ids" not in inputs:
        inputs["position_ids"] = _placeholder(graph, "position_ids", Value(rows.shape, torch.int64))
    _writes(graph, [state for state in states if not state.per_token], written, inputs, rows.shape[0])
    for node in list(graph.nodes):
        if node.target is MASK and _is_all_ones(node.args[3]):
            node.args = (*node.args[:3], None, *node.args[4:])
    for node in list(graph.nodes):
        if node.target is ATTENTION:
            _attention(graph, node, kinds)
    graph.eliminate_dead_code()  # what is folded appends by itself
    for node in list(graph.nodes):
        if node.target is READ:
            _, shape, dtype, number = node.args
            if number < 0:
                raise CaptureError("the model reads what it keeps of all sequences together, not one row of each")
            first = min(node.users, key=list(graph.nodes).index, default=None)
            node.target, node.args = state_read, (inputs["input_ids"],)
            node.kwargs = {"state": states[number].name, "shape": list(shape), "dtype": dtype}
            if first is not None:
                first.prepend(node)  # beside the layer that reads it
                node.meta["path"] = first.meta.get("path", "")
        elif node.target is APPEND:
            x, slots, number = node.args
            node.target, node.args = cache_append, (x, inputs["position_ids"], slots)
            node.kwargs = {"state": states[number].name}
        elif node.target is MASK:
            _, _, _, padding, index, dtype = node.args
            kind = kinds[index]
            node.target, node.args = position_mask, (inputs["position_ids"], inputs["slots"], padding)
            node.kwargs = {"dtype": dtype, **keywords(kind)}
    cut_by_position(graph, inputs["position_ids"], symbols)
    graph.eliminate_dead_code()
    for name, node in list(inputs.items()):
        if name in ("slots", "active") and not node.users:
            graph.erase_node(node)
            del inputs[name]
    graph.lint()
    return inputs


def _placeholder(graph: fx.Graph, name: str, value: Value) -> fx.Node:
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        made = graph.placeholder(name)
    made.meta["val"] = value
    return made


def _attention(graph: fx.Graph, node: fx.Node, kinds: list[MaskKind | None]) -> None:
    q, k, v, mask, *_ = node.args
    causal = node.args[7]
    if causal:
        # left to the implementation: with tokens before it, a query's place is not known from the sizes
        raise CaptureError(f"attention at {node.meta.get('path')} has no mask, with earlier tokens in its cache")
    straight = all(isinstance(x, fx.Node) and x.target is APPEND for x in (k, v))
    if straight and kind_of(mask, kinds) is not None:
        # the cache is added to and read where it attends
        node.args = (q, k.args[0], v.args[0], *node.args[3:])  # type: ignore[union-attr]
        rewrite_attention(graph, node, kinds)
    else:
        rewrite_attention(graph, node, kinds, fold=False)


def _writes(
    graph: fx.Graph, states: list[TracedState], written: tuple[fx.Node, ...], inputs: dict[str, fx.Node], batch: Any
) -> None:
    inputs["active"] = active = _placeholder(graph, "active", Value((batch,), torch.bool))
    for state, value in zip(states, written, strict=True):
        shape = value.meta["val"].shape
        if value.target is READ or shape[1:] != state.shape:
            raise CaptureError(
                f"the state {state.name!r} is not the same kind of thing after a token: {list(state.shape)}, then "
                f"{list(map(str, shape[1:]))}"
            )
        with graph.inserting_after(value):
            made = graph.call_function(state_write, (value, active), {"state": state.name})
        made.meta = {"val": value.meta["val"], "path": value.meta.get("path", "")}


def _is_all_ones(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target in _CASTS:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in _FILLED
