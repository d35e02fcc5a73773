"""In which way keys reach the queries of other ranks soonest: what each way takes beside attention itself, in seconds.

    ring, gather    keys and values of each kv head                          n - 1 of n parts, from each rank
    ulysses         queries, keys, values and result, for some of the heads  (n - 1) / n of a rank's part
    ring-ulysses    n = u x r ranks: u neighbours exchange heads, and r that have the same heads are a ring

All of them compute the same pairs. One program serves all lengths, so one length decides, `TOKENS` on each rank, causal
and in two bytes a number. The prices are those of two H200 of one host with NVLink, from `benchmarks/gpu/sequences.py`
(32 heads, 8 kv heads of 128, milliseconds at 16k, 32k and 64k tokens a rank: half of the heads alone 7.69, 29.7 and
125.3, ring 7.16, 29.0 and 115.8; heads for tokens and back, without attention, 0.78, 1.40 and 2.74):

    ulysses   its bytes, which each rank writes straight to where they belong in the others' memory
    ring      what of its bytes attention does not hide, and a merge of each block but the first. Its blocks are as fast
              as the kernel for all tokens, or faster: those without a mask do no work that is thrown away

Where no kernel takes an attention, ulysses writes out the scores of all tokens, a ring those of a tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program

__all__ = ["Exchanged", "cheapest", "choose_exchange", "neighbours_of"]

TOKENS, ITEM = 16384, 2
FLOPS_PER_S, MEMORY_BYTES_PER_S = 6.5e14, 4.0e12
"""Of cuDNN's causal kernel, and of the GPU's own memory."""
EXCHANGE_BYTES_PER_S, PERMUTE_BYTES_PER_S = 2.3e11, 1.6e11
"""Of heads for tokens and back: 336 MB that leave a rank took 1.4 ms. A permute, and of its message the copies."""


@dataclass(frozen=True)
class Exchanged:
    """One attention on a rank of tp. size, value: of a key and of a value."""

    heads: float
    kv_heads: float
    size: float
    value: float
    has_kernel: bool = True
    """Whether one kernel takes all of it: no window or chunk, soft cap or sinks."""

    def attention_s(self, ranks: int) -> float:
        """Of a rank's share of the pairs."""
        pairs = (TOKENS * ranks) ** 2 / 2 / ranks
        return 2 * pairs * self.heads * (self.size + self.value) / FLOPS_PER_S

    def ulysses_s(self, ranks: int) -> float:
        copies = max(self.kv_heads, ranks)  # a kv head goes to every rank whose query heads read it
        width = (self.heads + copies) * (self.size + self.value)
        return TOKENS * (ranks - 1) / ranks * width * ITEM / EXCHANGE_BYTES_PER_S

    def ring_s(self, ranks: int) -> float:
        attention, others = self.attention_s(ranks), ranks - 1
        travels = others * TOKENS * self.kv_heads * (self.size + self.value) * ITEM / PERMUTE_BYTES_PER_S
        # of each block half of the queries, or all of them, see some: read twice and written
        merges = others * TOKENS / 2 * self.heads * self.value * 3 * ITEM / MEMORY_BYTES_PER_S
        return max(0.0, travels - attention * others / ranks) + merges

    def why_ring(self, ranks: int) -> str:
        """Why Ulysses is not to be; "": it may."""
        if self.heads < ranks:
            return f"{self.heads:g} heads on a rank, fewer than {ranks} for Ulysses to deal out"
        if not self.has_kernel:
            return "a window, chunk, soft cap or sinks, for which Ulysses would write out the scores of all tokens"
        return ""


def cheapest(attentions: list[Exchanged], ranks: int) -> tuple[str, str]:
    """The way that takes least over all layers, and why; Ulysses where they are alike, which merges nothing."""
    for each in attentions:
        if why := each.why_ring(ranks):
            return "ring", why
    ulysses, ring = sum(each.ulysses_s(ranks) for each in attentions), sum(each.ring_s(ranks) for each in attentions)
    alone = sum(each.attention_s(ranks) for each in attentions)
    how = "ulysses" if ulysses <= ring else "ring"
    return how, (
        f"{TOKENS:,} tokens a rank on GPUs of one host are {alone * 1e3:.3g} ms of attention, and besides it "
        f"{ulysses * 1e3:.3g} ms to exchange heads (ulysses) or {ring * 1e3:.3g} ms for merges and waits (ring)"
    )


def choose_exchange(program: Program, attends: list[fx.Node], axis: str) -> tuple[str, str]:
    """The way for all attentions of a program, and why."""
    found = []
    for node in attends:
        a = arguments(node)
        (_, _, _, size), (_, kv_heads, _, value) = (a[name].meta["val"].shape for name in ("q", "v"))
        fewest = _fewest_heads(node)
        kv_heads = kv_heads * fewest / int(a["q"].meta["val"].shape[1])
        has_kernel = all(a[name] is None for name in ("window", "chunk", "softcap", "sinks"))
        found.append(Exchanged(float(fewest), max(1.0, float(kv_heads)), float(size), float(value), has_kernel))
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
