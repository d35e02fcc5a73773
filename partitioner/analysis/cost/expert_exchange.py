"""In which way tokens that ranks have as their own come to experts and back soonest, in seconds for each layer.

    gather     every rank of dp gets the tokens of all, sums are scattered; over tp, where they are alike, all-reduced
    exchange   a token goes to each rank that has one of its experts, and a row comes back from there; over tp, each
               rank sends its part of them and collects what came back

Both move rows as wide as a token. An exchange moves fewer, and costs more of the host: counts are exchanged first, it
waits for them to make room, and it packs, unpacks and adds up. One program serves all prompts, so one length decides,
`TOKENS` on each rank of dp, as many on each. `CALL_S` is the mean over 14 rows of `benchmarks/gpu/experts.py` on two
H200 of one host (1 to 8,192 tokens a rank, hidden 2048 and 7168: 0.39 to 0.80 ms more for an exchange).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["OwnTokens", "destinations"]

TOKENS = 4096
CALL_S = 5.4e-4
HOST_RANKS = 8
LINK_BYTES_PER_S, NETWORK_BYTES_PER_S = 2.9e11, 5.0e10
"""Of a rank, each way: over NVLink, from an all-reduce of 32 MB in 109 us; and between hosts, 400 Gbit/s."""


def destinations(ranks: int, num_experts: int, choices: int) -> float:
    """On how many other ranks a token has experts, of uniform routing."""
    each = num_experts / ranks
    none_here = math.prod((num_experts - each - i) / (num_experts - i) for i in range(choices))
    return (ranks - 1) * (1 - max(none_here, 0.0))


@dataclass(frozen=True)
class OwnTokens:
    """One layer's experts, dealt to `ranks`; as many as `own` of these share out the sequences, the others have the
    same ones. row_bytes: of a token.
    """

    ranks: int
    own: int
    num_experts: int
    choices: int
    row_bytes: int

    def gather_s(self) -> float:
        same = self.ranks // self.own
        return self._seconds(2 * (self.own - 1) + 2 * (same - 1) / same)

    def exchange_s(self) -> float:
        same = self.ranks // self.own
        met = destinations(self.ranks, self.num_experts, self.choices)
        return self._seconds((2 * met + same - 1) / same) + CALL_S

    def cheapest(self) -> str:
        return "gather" if self.gather_s() <= self.exchange_s() else "exchange"

    def _seconds(self, rows: float) -> float:
        """rows: that a rank sends for each token of its own, there and back."""
        rate = LINK_BYTES_PER_S if self.ranks <= HOST_RANKS else NETWORK_BYTES_PER_S
        return TOKENS * rows * self.row_bytes / rate
