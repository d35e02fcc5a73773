"""Floating-point operations of matrix products, from index notation: 2 x the product of all letters.

    linear          x[a b k] w[n k] -> [a b n]           2 abnk
    grouped linear  x[t k] w[e n k] -> [t n]             2 tnk: each routed row meets one expert, e is chosen
    attention       q[b h s d] k[b h t d] v[b h t e]     2 bh (d + e) x the pairs of query and key that the mask leaves
    convolution     x[b k l] w[c k w] -> [b c l]         2 bclkw; without k where each channel has its own window

Only what multiplies two tensors along a summed letter counts: sums, norms, softmax, look-ups and element-wise ops are
priced by their bytes. A causal text of s tokens has s (s + 1) / 2 pairs; a query sees min(window, position + 1) keys.
A multiply and an add count as two, as in torch.utils.flop_counter, which counts all s x t pairs of attention.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from partitioner.analysis.cost.local_sizes import RankSizes
from partitioner.analysis.rules.notation import Notation, Operand
from partitioner.program.node_arguments import arguments, operation
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention

aten = torch.ops.aten

__all__ = ["ATTENTION", "attention_limits", "keys_read", "pairs_seen", "product_flops"]

ATTENTION = (attention, cached_attention, aten.scaled_dot_product_attention)
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.convolution)


def product_flops(node: fx.Node, found: Notation, sizes: RankSizes) -> int:
    """Of one rank. `found`: the node's notation."""
    op = operation(node)
    if op in ATTENTION:
        batch, heads, _, width = sizes.shapes(node)[0]
        return 2 * batch * heads * (sizes.shapes(found.operands[0].node)[0][3] + width) * _pairs(node, found, sizes)
    letter_sizes = _letter_sizes(node, found, sizes)
    if op in _CONVOLUTIONS:
        window = [name for name in found.operands[1].letters if name is not None and name not in found.outputs[0]]
        return 2 * math.prod(letter_sizes[name] for name in (*_names(found.outputs[0]), *window))
    for term in found.terms:
        operands = [found.operands[index] for index in term]
        if found.sums & _shared(operands):
            chosen = {name for operand in operands for name in operand.letters} - set(found.outputs[0]) - found.sums
            names = {name for operand in operands for name in _names(operand.letters)} - chosen
            return 2 * math.prod(letter_sizes[name] for name in names)
    return 0


def _names(letters: tuple[str | None, ...]) -> list[str]:
    return [name for name in letters if name is not None]


def _shared(operands: list[Operand]) -> set[str]:
    """Letters that more than one of the operands has."""
    names = [name for operand in operands for name in set(_names(operand.letters))]
    return {name for name in names if names.count(name) > 1}


def _letter_sizes(node: fx.Node, found: Notation, sizes: RankSizes) -> dict[str, int]:
    """On this rank; what the result says goes before what an operand does (a padded convolution)."""
    result: dict[str, int] = {}
    shapes = [(letters, shape) for letters, shape in zip(found.outputs, sizes.shapes(node), strict=True)]
    shapes += [(operand.letters, sizes.shapes(operand.node)[0]) for operand in found.operands]
    for letters, shape in shapes:
        for name, size in zip(letters, shape, strict=True):
            if name is not None:
                result.setdefault(name, size)
    return result


def attention_limits(node: fx.Node) -> tuple[bool, int | None, int | None]:
    a = arguments(node)
    if operation(node) is aten.scaled_dot_product_attention:
        return bool(a["is_causal"]), None, None
    return bool(a["causal"]), a["window"], a["chunk"]


def _extent(node: fx.Node, found: Notation, sizes: RankSizes) -> tuple[int, int, int]:
    """The position of the first query, the number of queries, and the number of keys."""
    queries = sizes.shapes(found.operands[0].node)[0][2]
    if operation(node) is cached_attention:
        return sizes.past, queries, sizes.past + queries
    return 0, queries, sizes.shapes(found.operands[1].node)[0][2]


def _pairs(node: fx.Node, found: Notation, sizes: RankSizes) -> int:
    return pairs_seen(*_extent(node, found, sizes), *attention_limits(node))


def keys_read(node: fx.Node, found: Notation, sizes: RankSizes) -> int:
    """How many keys of a row at least one query of the node sees."""
    first, queries, keys = _extent(node, found, sizes)
    if not queries:
        return 0
    lower, _ = _seen(first, 1, keys, *attention_limits(node))
    _, upper = _seen(first + queries - 1, 1, keys, *attention_limits(node))
    return max(0, int(upper) - int(lower))


@functools.lru_cache(maxsize=1024)
def pairs_seen(first: int, queries: int, keys: int, causal: bool, window: int | None, chunk: int | None) -> int:
    """How many keys the queries at `first`, `first` + 1, ... see together; see `runtime.ops.attention.allowed`."""
    lower, upper = _seen(first, queries, keys, causal, window, chunk)
    return int((upper - lower).clamp(min=0).sum())


def _seen(first: int, queries: int, keys: int, causal: bool, window: int | None, chunk: int | None) -> Any:
    """The first key that each query sees, and the one after the last."""
    position = torch.arange(first, first + queries, device="cpu")
    lower, upper = torch.zeros_like(position), torch.full_like(position, keys)
    if causal:
        upper = torch.minimum(upper, position + 1)
    if window is not None:
        lower = torch.maximum(lower, position - window + 1)
        upper = torch.minimum(upper, position + window)
    if chunk is not None:
        start = position // chunk * chunk
        lower, upper = torch.maximum(lower, start), torch.minimum(upper, start + chunk)
    return lower, upper
