"""What each pipeline stage has: its layers, bytes, and share of the time that costs foresee."""

from __future__ import annotations

from dataclasses import dataclass

from partitioner.program.node_arguments import layer_of, node_values
from partitioner.program.program import Program
from partitioner.program.stages import crossings, stages_of, table_of
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
        hands = f"; hands on {' and '.join(self.hands_on)}" if self.hands_on else ""
        return f"{layers}: {readable(self.bytes)} per rank{share}{hands}"


@dataclass(frozen=True)
class StageReport:
    """places: how many there were to cut at. balance: for what the stages were made alike, "prefill" or "decode".

    shared: weights that several stages hold, with their numbers.
    """

    rows: tuple[StageRow, ...]
    places: int
    balance: str
    shared: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def evenness(self) -> float:
        """The mean over the slowest stage, which all others wait for: 1 where stages take equally long."""
        shares = [row.share for row in self.rows]
        return sum(shares) / len(shares) / max(shares) if any(shares) else 1.0

    def lines(self) -> list[str]:
        how = f"by {self.balance}" if self.balance == "stage_starts" else f"for {self.balance}"
        found = [f"stages, cut {how}, at {self.places} possible places; mean over slowest {self.evenness:.1%}:"]
        found += [f"  {stage}: {row}" for stage, row in enumerate(self.rows)]
        found += [f"  {name} is on stages {', '.join(map(str, held))}" for name, held in self.shared]
        found.append("  one sequence takes as long as on one rank of each stage in turn: stages serve more at a time")
        return found


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
    cuts = [*crossings(program.graph, table.count), ()]
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
    shared = tuple(
        (name, tuple(sorted(stages)))
        for name, stages in held.items()
        if len(stages) > 1 and program.weights[name].source == "checkpoint"
    )
    return StageReport(rows, table.places, table.balance, shared)
