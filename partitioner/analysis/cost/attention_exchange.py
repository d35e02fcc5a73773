"""In which way keys reach the queries of other ranks soonest: what each way takes beside attention itself, in seconds.

    ring, gather    keys and values of each kv head                          n - 1 of n parts, from each rank
    ulysses         queries, keys, values and result, for some of the heads  (n - 1) / n of a rank's part
    ring-ulysses    n = u x r ranks: u neighbours exchange heads, and r that have the same heads are a ring

All of them compute the same pairs. One program serves all lengths, so one length decides, `TOKENS` on each rank, causal
and in two bytes a number. The prices are those of GPUs of one host, as `benchmarks/gpu/sequences.py` has measured them:

    ulysses   its bytes over the link: half of them where heads come in groups, of which one is attended to meanwhile
    ring      what of its bytes attention does not hide; a merge of each block but the first; and kernels for blocks,
              which reach a little less than one for all tokens
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program

__all__ = ["Exchanged", "cheapest", "choose_exchange", "neighbours_of"]

TOKENS, ITEM = 16384, 2
FLOPS_PER_S, LINK_BYTES_PER_S, MEMORY_BYTES_PER_S = 6.0e14, 3.3e11, 4.0e12
"""Of cuDNN's causal kernel, of rows written into another GPU's memory, and of this GPU's own: two H200 with NVLink."""
OF_A_BLOCK = 0.97
"""Share of that kernel's speed which kernels for blocks of keys reach."""


@dataclass(frozen=True)
class Exchanged:
    """One attention on a rank of tp. size, value: of a key and of a value."""

    heads: float
    kv_heads: float
    size: float
    value: float

    def attention_s(self, ranks: int) -> float:
        """Of a rank's share of the pairs."""
        pairs = (TOKENS * ranks) ** 2 / 2 / ranks
        return 2 * pairs * self.heads * (self.size + self.value) / FLOPS_PER_S

    def ulysses_s(self, ranks: int) -> float:
        copies = max(self.kv_heads, ranks)  # a kv head goes to every rank whose query heads read it
        width = (self.heads + copies) * (self.size + self.value)
        shown = 0.5 if self.kv_heads >= 2 * ranks else 1.0
        return shown * TOKENS * (ranks - 1) / ranks * width * ITEM / LINK_BYTES_PER_S

    def ring_s(self, ranks: int) -> float:
        attention, others = self.attention_s(ranks), ranks - 1
        travels = others * TOKENS * self.kv_heads * (self.size + self.value) * ITEM / LINK_BYTES_PER_S
        # of each block half of the queries, or all of them, see some: read twice and written
        merges = others * TOKENS / 2 * self.heads * self.value * 3 * ITEM / MEMORY_BYTES_PER_S
        return max(0.0, travels - attention * others / ranks) + merges + attention * (1 / OF_A_BLOCK - 1)

    def why_ring(self, ranks: int) -> str:
        """Why Ulysses cannot be; "": it can."""
        if self.heads >= ranks:
            return ""
        return f"{self.heads:g} heads on a rank, fewer than {ranks} for Ulysses to deal out"


def cheapest(attentions: list[Exchanged], ranks: int) -> tuple[str, str]:
    """The way that takes least over all layers, and why; Ulysses where they are alike, which merges nothing."""
    for each in attentions:
        if why := each.why_ring(ranks):
            return "ring", why
    ulysses, ring, alone = (
        sum(price(each) for each in attentions)
        for price in (
            lambda each: each.ulysses_s(ranks),
            lambda each: each.ring_s(ranks),
            lambda each: each.attention_s(ranks),
        )
    )
    how = "ulysses" if ulysses <= ring else "ring"
    return how, (
        f"{TOKENS:,} tokens a rank on GPUs of one host take {alone * 1e3:.3g} ms of attention, and besides, as priced, "
        f"{ulysses * 1e3:.3g} ms to exchange heads by ulysses, {ring * 1e3:.3g} ms to merge and wait in a ring"
    )


def choose_exchange(program: Program, attends: list[fx.Node], axis: str) -> tuple[str, str]:
    """The way for all attentions of a program, and why."""
    found = []
    for node in attends:
        a = arguments(node)
        (_, _, _, size), (_, kv_heads, _, value) = (a[name].meta["val"].shape for name in ("q", "v"))
        fewest = _fewest_heads(node)
        kv_heads = kv_heads * fewest / int(a["q"].meta["val"].shape[1])
        found.append(Exchanged(float(fewest), max(1.0, float(kv_heads)), float(size), float(value)))
    return cheapest(found, program.mesh.size(axis))


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
