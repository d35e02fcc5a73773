"""What sharing out the tokens of each sequence over sp costs: what travels for queries to meet other ranks' keys.

    ring           n - 1 permutes of a rank's keys and values
    gather         one all-gather of them
    ulysses        an all-to-all of queries, keys and values, for some of the heads, and one of the result
    ring-ulysses   that between neighbours, and a ring of those that have the same heads
    merge          of a single token, which all ranks have: one all-gather of parts with their log-sum-exp

In prompts a rank attends with its share of the queries to all keys, in steps with all queries to its share of the keys:
1/n of the pairs either way. The bytes are those that the compiled program declares (`runtime/ops/communicating.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from partitioner.analysis.cost.attention_exchange import Exchanged, cheapest
from partitioner.planning.collectives import Hop, collective_seconds
from partitioner.planning.quantities import Seconds
from partitioner.planning.summary import Part
from partitioner.program.plan import Plan

__all__ = ["Attending", "shares_out"]

_FLOAT32 = 4
_CAUSAL = 0.49
"""Of all pairs of queries and keys, those that causal attention has, and a little less."""


def shares_out(part: Part) -> bool:
    """Whether the tokens of a part meet in attention over a cache only, whose tokens ranks can keep a share of."""
    nodes = [node for nodes in part.nodes.values() for node in nodes if node.kind == "attention"]
    return all(kept.per_token for kept in part.kept) and all(node.op == "cached_attention" for node in nodes)


@dataclass(frozen=True)
class Attending:
    """One attention of all tokens, on a rank's heads. size: of a key and a value together. item: bytes of a number."""

    rows: float
    heads: float
    kv_heads: float
    size: float
    queries: float
    keys: float
    pairs: float
    item: int

    @classmethod
    def of(cls, product: Sequence[float], item: int) -> Attending:
        """product: as a `NodeExpression` of attention has it; what follows is not read."""
        rows, heads, kv_heads, size, queries, keys, pairs = product[:7]
        return cls(rows, heads, kv_heads, size, queries, keys, pairs, item)

    def way(self, plan: Plan) -> str:
        """As `analysis.cost.attention_exchange` chooses where the plan does not say.

        A window or a chunk is known by the pairs that it leaves; of a soft cap and of sinks nothing is known here.
        """
        if plan.sp_attention != "auto":
            return plan.sp_attention
        half = self.size / 2
        has_kernel = self.pairs >= _CAUSAL * self.queries * self.keys
        return cheapest([Exchanged(self.heads, self.kv_heads, half, half, has_kernel)], plan.sp)[0]

    def on_a_rank(self, plan: Plan, *, steps: bool) -> list[float]:
        """The product of one of the ranks: a share of the queries, or of the keys."""
        queries = self.queries if steps else self.queries / plan.sp
        keys = self.keys / plan.sp if steps else self.keys
        return [self.rows, self.heads, self.kv_heads, self.size, queries, keys, self.pairs / plan.sp]

    def meet(
        self, found: Seconds, plan: Plan, links: Sequence[Hop], of_all: Sequence[float], *, steps: bool
    ) -> tuple[float, float]:
        """Adds what its exchange takes; the products and bytes that are left for one rank, of those of all tokens."""
        for kind, size, times in self.meetings(plan, steps=steps):
            whole = size * plan.sp if kind == "all_gather" else size
            found.link(kind, times * collective_seconds(kind, links, whole))
        others = 0.0 if steps else self.key_bytes * (plan.sp - 1) / plan.sp
        return of_all[0] / plan.sp, of_all[1] / plan.sp + others

    @property
    def key_bytes(self) -> float:
        """Keys and values of all tokens."""
        return self.rows * self.kv_heads * self.keys * self.size * self.item

    def held(self, plan: Plan) -> float:
        """Bytes of other ranks' keys and values that a rank has at the same time, and its own."""
        way = self.way(plan)
        if way == "gather":
            return self.key_bytes
        if way == "ulysses":
            return self.key_bytes * max(1.0, plan.sp / self.kv_heads) / plan.sp
        return 2 * self.key_bytes / plan.sp

    def meetings(self, plan: Plan, *, steps: bool) -> Iterator[tuple[str, float, int]]:
        """Kind, bytes that a rank brings, and how often."""
        n, way = plan.sp, self.way(plan)
        width = self.size / 2
        if steps:
            lse = self.rows * self.heads * self.queries * (width + 1)
            yield "all_gather", lse * max(self.item, _FLOAT32), 1
        elif way == "gather":
            yield "all_gather", self.key_bytes / n, 1
        elif way == "ring":
            yield "permute", self.key_bytes / n, n - 1
        else:
            if way == "ring-ulysses":
                yield "permute", self.key_bytes / n, n // self._neighbours(n) - 1
            copies = max(1.0, (n if way == "ulysses" else self._neighbours(n)) / self.kv_heads)
            half = self.rows * self.heads * self.queries / n * width * self.item
            yield "all_to_all", half + copies * self.key_bytes / n, 1
            yield "all_to_all", half, 1

    def _neighbours(self, ranks: int) -> int:
        return max((u for u in range(2, ranks) if ranks % u == 0 and u <= self.heads), default=1)
