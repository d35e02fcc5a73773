"""In which way keys reach the queries of other ranks with the fewest bytes.

    ring, gather    keys and values of each kv head                          n - 1 of n parts, from each rank
    ulysses         queries, keys, values and result, for some of the heads  (n - 1) / n of a rank's part
    ring-ulysses    n = u x r ranks: u neighbours exchange heads, and r that have the same heads are a ring

All of them compute the same; what is not known here are links, and how much of a ring is hidden behind attention.
"""

from __future__ import annotations

from torch import fx

from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program

__all__ = ["choose_exchange", "neighbours_of"]


def choose_exchange(program: Program, attends: list[fx.Node], axis: str) -> tuple[str, str]:
    """The way with the fewest bytes, and why; Ulysses where they are alike, which merges nothing.

    Per token, over all layers, in units of a head's numbers: n ranks send (n - 1) / n of keys and values in a ring, and
    1/n of that share of queries, keys, values and result to heads.
    """
    ranks = program.mesh.size(axis)
    ring = exchange = 0
    for node in attends:
        a = arguments(node)
        (_, heads, _, size), (_, kv_heads, _, value) = (a[name].meta["val"].shape for name in ("q", "v"))
        fewest = _fewest_heads(node)
        if fewest < ranks:
            return (
                "ring",
                f"{node.name} has {fewest} heads on a rank, fewer than {axis}={ranks}, for Ulysses to deal out",
            )
        copies = max(kv_heads, ranks)  # a kv head goes to every rank whose query heads read it
        ring += ranks * kv_heads * (size + value)
        exchange += (heads + copies) * (size + value)
    how = "ulysses" if exchange <= ring else "ring"
    return how, f"{exchange} against {ring} numbers per token, of heads exchanged and of keys and values in a ring"


def neighbours_of(attends: list[fx.Node], ranks: int) -> int | None:
    """How many of `ranks` ranks exchange heads where others of them are a ring: as many as there are heads for.

    All-to-alls carry less than a ring over the same ranks (arXiv:2405.07719, section 4). None: no factor of the ranks
    but 1 and themselves, or every rank has fewer heads than that.
    """
    heads = min(map(_fewest_heads, attends), default=0)
    return max((each for each in range(2, ranks) if ranks % each == 0 and each <= heads), default=None)


def _fewest_heads(node: fx.Node) -> int:
    """Query heads of the rank that has the fewest."""
    layout = node.meta.get("layout")
    split = None if layout is None else layout.split(1)
    return int(arguments(node)["q"].meta["val"].shape[1]) if split is None else min(split.sizes)
