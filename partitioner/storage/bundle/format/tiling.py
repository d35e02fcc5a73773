"""Whether blocks fill a shape, each element once: what no block fills would be whatever the memory held before."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

from runtime.program.shards import Block

__all__ = ["is_filled"]


def is_filled(shape: Sequence[int], blocks: Sequence[Block]) -> bool:
    """`blocks` lie within `shape`: per dim, where they start and stop."""
    if not shape:
        return len(blocks) == 1
    if 0 in shape:
        return True
    inner: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for (start, stop), *rest in blocks:
        if start < stop:
            inner[start, stop].append(tuple(rest))
    if any(stop > start for (_, stop), (start, _) in itertools.pairwise(sorted(inner))):
        # they overlap in this dim, and may not in the others: cut all at every end
        ends = sorted({end for interval in inner for end in interval})
        cut = {
            (a, b): [block for (start, stop), some in inner.items() if start <= a and b <= stop for block in some]
            for a, b in itertools.pairwise(ends)
        }
        inner = defaultdict(list, cut)
    meet = [(0, 0), *sorted(inner), (shape[0], shape[0])]
    return all(one[1] == other[0] for one, other in itertools.pairwise(meet)) and all(
        is_filled(shape[1:], some) for some in inner.values()
    )
