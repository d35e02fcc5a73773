"""Floating-point operations of matrix products, from index notation: 2 x the product of all letters.

    linear          x[a b k] w[n k] -> [a b n]           2 abnk
    grouped linear  x[t k] w[e n k] -> [t n]             2 tnk: each routed row meets one expert, e is chosen
    attention       q[b h s d] k[b h t d] v[b h t e]     2 bh (d + e) x the pairs of query and key that the mask leaves
    latent          q[b h s p] c[b t r] k[h p r] v[h v r]   of two ways the one with fewer, see `latent_products`
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
from partitioner.program.node_arguments import arguments, evaluate, operation
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.communicating import as_axes
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

aten = torch.ops.aten

__all__ = [
    "ATTENTION",
    "CACHED",
    "LATENT",
    "SHARED_OUT",
    "attention_limits",
    "kept_operands",
    "keys_read",
    "latent_products",
    "latent_sizes",
    "pairs_seen",
    "product_flops",
]  # fmt: skip

LATENT = (latent_attention, latent_sequence_attention)
"""Attention whose keys and values are made of what is cached."""
SHARED_OUT = (sequence_attention, cached_sequence_attention, latent_sequence_attention)
"""Attention over tokens that ranks share out."""
CACHED = (cached_attention, latent_attention)
"""Attention over what the rank itself has cached."""
ATTENTION = (attention, *CACHED, *SHARED_OUT, aten.scaled_dot_product_attention)
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.convolution)


def product_flops(node: fx.Node, found: Notation, sizes: RankSizes) -> int:
    """Of one rank. `found`: the node's notation."""
    op = operation(node)
    if op in LATENT:
        batch, heads, queries, key, value, latent, carried = latent_sizes(node, sizes)
        keys = _latent_keys(node, found, sizes)
        made = latent * (key + value)
        pairs = _pairs(node, found, sizes)
        ways = latent_products(queries, keys, pairs, made=made, latent=latent, carried=carried, size=key + value)
        return int(2 * batch * heads * min(ways))
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


def kept_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """Of an attention over a cache: what is written to it."""
    a = arguments(node)
    names = ("latent", "carried") if operation(node) in LATENT else ("k", "v")
    return tuple(a[name] for name in names if a[name] is not None)


def latent_sizes(node: fx.Node, sizes: Any) -> tuple[Any, ...]:
    """Of an attention over what keys and values are made of: batch, heads, queries, and the sizes of a key's products,
    of a value, of what they are made of and of what is carried.
    """
    a = arguments(node)
    batch, heads, queries, key = sizes.shapes(a["q"])[0]
    value, latent = sizes.shapes(a["value_weight"])[0][1:]
    return batch, heads, queries, key, value, latent, 0 if a["carried"] is None else sizes.shapes(a["carried"])[0][2]


def latent_products(queries: Any, keys: Any, pairs: Any, *, made: Any, latent: Any, carried: Any, size: Any) -> Any:
    """Multiplications of a head, absorbed and expanded; see `runtime.ops.state.latent_attention`."""
    return queries * made + pairs * (2 * latent + carried), keys * made + pairs * (size + carried)


def _latent_keys(node: fx.Node, found: Notation, sizes: RankSizes) -> int:
    """Of how many cached tokens a rank makes keys and values, if it does."""
    if operation(node) is latent_attention:
        return _extent(node, found, sizes)[2]
    a = arguments(node)
    keys = sizes.past + evaluate(a["q"].meta["val"].shape[2], sizes.symbols)
    return -(-keys // a["parts"]) if a["how"] == "merge" else keys


def _extent(node: fx.Node, found: Notation, sizes: RankSizes) -> tuple[int, int, int]:
    """The position of the first query, the number of queries, and the number of keys."""
    queries = sizes.shapes(found.operands[0].node)[0][2]
    if operation(node) in CACHED:
        return sizes.past, queries, sizes.past + queries
    return 0, queries, sizes.shapes(found.operands[1].node)[0][2]


def _pairs(node: fx.Node, found: Notation, sizes: RankSizes) -> int:
    if operation(node) in SHARED_OUT:
        return _own_pairs(node, sizes)
    return pairs_seen(*_extent(node, found, sizes), *attention_limits(node))


def _own_pairs(node: fx.Node, sizes: RankSizes) -> int:
    """Of own queries and the keys of all ranks; where parts are merged, a share of what all queries see."""
    a = arguments(node)
    parts: int = a["parts"]
    past = 0 if operation(node) is sequence_attention else sizes.past
    total = evaluate(a["q"].meta["val"].shape[2], sizes.symbols)
    if a["how"] == "merge":
        return -(-pairs_seen(past, total, past + total, *attention_limits(node)) // parts)
    index = sizes.program.mesh.index(as_axes(a["axis"]), sizes.coordinates)
    runs = TokenOrder.of(total, parts, a["order"]).runs[index]
    return sum(pairs_seen(past + start, stop - start, past + total, *attention_limits(node)) for start, stop in runs)


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
