"""What each pipeline stage has: its layers, bytes, and share of the time that costs foresee."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from partitioner.program.node_arguments import layer_of, node_values
from partitioner.program.program import Program
from partitioner.program.stages import crossings, stages_of, table_of
from partitioner.sharding.layout import Layout
from runtime.kv_cache.device_memory import readable

__all__ = ["StageReport", "StageRow", "stage_report"]


@dataclass(frozen=True)
class StageRow:
    """layers: paths, in order. bytes: of weights on its fullest rank. share: of the time of all stages; hands_on: what
    goes to the next stage.
    """

    layers: tuple[str, ...]
    bytes: int
    share: float
    hands_on: tuple[str, ...]

    def __str__(self) -> str:
        first, last = (self.layers[0], self.layers[-1]) if self.layers else ("no layer", "")
        layers = first if last in ("", first) else f"{first} to {last}"
        share = f", {self.share:.1%} of the time" if self.share else ""
        counts = Counter(self.hands_on).items()
        sent = ", ".join(f"{count} x {value}" if count > 1 else value for value, count in counts)
        return f"{layers}: {readable(self.bytes)} per rank{share}" + (f"; sends {sent}" if sent else "")


@dataclass(frozen=True)
class StageReport:
    """places: how many there were to cut at. balance: for what the stages were made alike, "prefill" or "decode".

    shared: weights that several stages hold, with their numbers. head: weights of the vocabulary head, where all stages
    share out its rows, and how many rows each has; evenness_alone: what evenness would be if the last stage had them
    all, 0 where that was not asked; why_alone: why it has them.
    """

    rows: tuple[StageRow, ...]
    places: int
    balance: str
    shared: tuple[tuple[str, tuple[int, ...]], ...] = ()
    head: tuple[str, ...] = ()
    head_rows: tuple[int, ...] = ()
    evenness_alone: float = 0.0
    why_alone: str = ""

    @property
    def evenness(self) -> float:
        """The mean over the slowest stage, which all others wait for: 1 where stages take equally long."""
        return _evenness([row.share for row in self.rows])

    def lines(self) -> list[str]:
        how = f"by {self.balance}" if self.balance == "stage_starts" else f"for {self.balance}"
        found = [f"stages, cut {how}, at {self.places} possible places; mean over slowest {self.evenness:.1%}:"]
        found += [f"  {stage}: {row}" for stage, row in enumerate(self.rows)]
        found += [f"  {name} is on stages {', '.join(map(str, held))}" for name, held in self.shared]
        if self.head:
            rows = ", ".join(map(str, self.head_rows))
            alone = f"; mean over slowest {self.evenness_alone:.1%} if the last had all" if self.evenness_alone else ""
            found.append(f"  all stages share out the rows of {' and '.join(self.head)}, {rows}{alone}")
        if self.why_alone:
            found.append(f"  the last stage has all of the vocabulary head: {self.why_alone}")
        found.append("  a single sequence is no faster for it: stages gain by working on several at a time")
        return found


def _evenness(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares) / max(shares) if any(shares) else 1.0


def stage_report(program: Program, bytes_per_rank: tuple[int, ...]) -> StageReport | None:
    """None where there is one stage."""
    table = program.stages
    if table is None or program.mesh.size("pp") == 1:
        return None
    layers: list[dict[str, None]] = [{} for _ in range(table.count)]
    for node in program.graph.nodes:
        layer = layer_of(str(node.meta.get("path") or ""))
        if node.op == "call_function" and layer and len(stages_of(node)) == 1:
            layers[min(stages_of(node))][layer] = None
    cuts = [*crossings(program.graph, table.parts), ()]
    total = sum(table.costs)
    rows = tuple(
        StageRow(
            tuple(layers[stage]),
            max(held for rank, held in enumerate(bytes_per_rank) if program.mesh.coordinates(rank)["pp"] == stage),
            table.costs[stage] / total if total else 0.0,
            tuple(str(node_values(node)[0]) for node in cuts[stage]),
        )
        for stage in range(table.count)
    )
    held = table_of(program.graph, table.count).of_weight
    of_head = {name: layout for name, layout in program.weight_layouts.items() if "pp" in layout.axes}
    shared = tuple(
        (name, tuple(sorted(stages)))
        for name, stages in held.items()
        if len(stages) > 1 and program.weights[name].source == "checkpoint" and name not in of_head
    )
    return StageReport(
        rows,
        table.places,
        table.balance,
        shared,
        tuple(of_head),
        _rows_per_stage(program, next(iter(of_head.values()))) if of_head else (),
        _evenness(table.costs_alone) if table.costs_alone else 0.0,
        table.why_alone,
    )


def _rows_per_stage(program: Program, layout: Layout) -> tuple[int, ...]:
    split = layout.split(0)
    assert split is not None
    mesh = program.mesh
    ranks = {mesh.index(split.axes, at): at["pp"] for at in mesh}
    return tuple(
        sum(split.sizes[index] for index, stage in ranks.items() if stage == wanted)
        for wanted in range(mesh.size("pp"))
    )
