"""A summary as engines run it that keep one latent of each token instead of keys and values of every head.

    cache            kv_lora_rank + qk_rope_head_dim numbers of a token, the same on every rank of tp
    a single token   attends to the latents themselves: one kv head, of which keys and values are the same numbers
    a prompt         as before: keys and values are made of the latents

DeepSeek-V2 (arXiv:2405.04434), section 2.1.3: the matrices that make keys and values are absorbed into those of
queries and of the output, which stay as many numbers. The product itself keeps keys and values of every head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partitioner.analysis.cost.expressions import NodeExpression
from partitioner.planning.pricing.stored_format import ITEM
from partitioner.planning.summary import Kept, Part, Summary

__all__ = ["with_latent_cache"]


def with_latent_cache(summary: Summary, fields: Mapping[str, Any]) -> Summary:
    """fields: of the model's configuration; the summary itself where it has no latent."""
    rank, rope = fields.get("kv_lora_rank"), fields.get("qk_rope_head_dim")
    if not rank or not rope:
        return summary
    return replace(summary, parts=[_part(part, int(rank), int(rope), ITEM[summary.dtype]) for part in summary.parts])


def _part(part: Part, rank: int, rope: int, item: int) -> Part:
    if not part.kept:
        return part
    decode = [_absorbed(node, rank, rope) if node.kind == "attention" else node for node in part.nodes["decode"]]
    return replace(part, nodes={**part.nodes, "decode": decode}, kept=[Kept((rank + rope) * item)])


def _absorbed(node: NodeExpression, rank: int, rope: int) -> NodeExpression:
    rows, heads, _, _, queries, keys, pairs = node.product
    item, width = ITEM[node.dtype], rank + rope
    return replace(
        node,
        flops=2 * rows * heads * pairs * (width + rank),
        read=item * rows * (keys * width + heads * queries * width),
        written=item * rows * heads * queries * rank,
        product=(rows, heads, 1, width, queries, keys, pairs),
    )
