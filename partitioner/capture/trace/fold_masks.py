"""Put the meaning of each mask on the attention that uses it, and rewrite both to our runtime ops.

An attention whose mask is one we recognised gets keywords (causal, window, chunk) in place of a [B, 1, S, T] operand.
Whatever else a model does with a mask (mixing it with an index, slicing it per layer) sees it as a tensor, made at
run time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from partitioner.capture.trace.recognise_masks import MaskKind
from partitioner.capture.trace.transformers_hooks import ATTENTION, MASK
from runtime.ops.attention import attention
from runtime.ops.mask import attention_mask

__all__ = ["fold_masks", "keywords", "kind_of", "rewrite_attention"]

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.expand.default}


def fold_masks(graph: fx.Graph, kinds: list[MaskKind | None]) -> None:
    reference = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.target is ATTENTION:
            rewrite_attention(graph, node, kinds)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is MASK:
            _, q_length, kv_length, padding, index, dtype = node.args
            kwargs: dict[str, Any] = {"dtype": dtype, **keywords(kinds[index])}
            node.target, node.args, node.kwargs = attention_mask, (reference, q_length, kv_length, padding), kwargs
    graph.eliminate_dead_code()


def rewrite_attention(graph: fx.Graph, node: fx.Node, kinds: list[MaskKind | None], *, fold: bool = True) -> None:
    """To the runtime op; `fold`: a mask of a known kind becomes keywords."""
    q, k, v, mask, bias, sinks, scale, causal, softcap = node.args
    kwargs: dict[str, Any] = {"scale": scale}
    kind = kind_of(mask, kinds) if fold else None
    if kind is not None:
        kwargs |= keywords(kind)
        mask = bias
    elif bias is not None and mask is not None:
        with graph.inserting_before(node):
            total = graph.call_function(aten.add.Tensor, (bias, mask))
        total.meta = {**node.meta, "val": _broadcast(bias.meta["val"], mask.meta["val"])}  # type: ignore[union-attr]
        mask = total
    elif bias is not None:
        mask = bias
    if causal:
        kwargs["causal"] = True
    if softcap is not None:
        kwargs["softcap"] = softcap
    node.target, node.kwargs = attention, kwargs
    node.args = (q, k, v) if mask is None and sinks is None else (q, k, v, mask, sinks)


def keywords(kind: MaskKind | None) -> dict[str, Any]:
    assert kind is not None
    found = {"causal": kind.causal or None, "window": kind.window, "chunk": kind.chunk}
    return {key: value for key, value in found.items() if value is not None}


def kind_of(mask: Any, kinds: list[MaskKind | None]) -> MaskKind | None:
    while isinstance(mask, fx.Node) and mask.target in _CASTS:
        mask = mask.args[0]
    if isinstance(mask, fx.Node) and mask.target is MASK and mask.args[3] is None:
        return kinds[mask.args[4]]  # type: ignore[index]
    return None


def _broadcast(a: Any, b: Any) -> Any:
    shape = []
    for one, other in zip(a.shape[::-1], b.shape[::-1], strict=False):
        shape.append(other if one == 1 else one)
    longer = a.shape if len(a.shape) >= len(b.shape) else b.shape
    shape += longer[::-1][len(shape) :]
    return type(a)(tuple(shape[::-1]), torch.promote_types(a.dtype, b.dtype))
