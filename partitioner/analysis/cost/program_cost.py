"""What a program costs one rank in all: by layer, by stage, and in seconds on a device, with what binds.

    cost = program_cost(parts.program_of("decode"), {"tp": 0}, {"batch": 1, "sequence": 1, "past": 1023})
    cost.flops, cost.bytes_read, cost.per_layer()["model.layers.0"].flops
    cost.seconds(device).binds          "memory", "products" or "links"

A node takes the longer of its bytes and its products; meetings come on top, for nothing overlaps yet. Nodes run one
after the other: of a pipeline, add up one stage (`of_stage`) and send what crosses (`crossing_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from partitioner.analysis.cost.device import Device
from partitioner.analysis.cost.local_sizes import RankSizes, bytes_of
from partitioner.analysis.cost.node_cost import NodeCost, node_costs
from partitioner.program.node_arguments import layer_of, node_values
from partitioner.program.program import Program
from partitioner.program.stages import crossings

__all__ = ["ProgramCost", "Seconds", "program_cost"]


@dataclass(frozen=True)
class Seconds:
    """Of nodes whose bytes take longest, of nodes whose products do, and of what ranks do together."""

    memory: float
    products: float
    links: float

    @property
    def total(self) -> float:
        return self.memory + self.products + self.links

    @property
    def binds(self) -> str:
        """The largest of the three."""
        return max(("memory", "products", "links"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class ProgramCost:
    """The costs of nodes, in graph order, and what they are together.

    crossing_bytes: per boundary between two stages, what goes over it.
    """

    nodes: tuple[NodeCost, ...]
    crossing_bytes: tuple[int, ...] = ()

    @property
    def flops(self) -> int:
        return sum(node.flops for node in self.nodes)

    @property
    def bytes_read(self) -> int:
        return sum(node.bytes_read for node in self.nodes)

    @property
    def bytes_written(self) -> int:
        return sum(node.bytes_written for node in self.nodes)

    @property
    def meeting_bytes(self) -> int:
        """What the rank brings to all its meetings."""
        return sum(meeting.bytes for node in self.nodes for meeting in node.meetings)

    @property
    def unsure(self) -> tuple[str, ...]:
        """What could not be said exactly: "node: why"."""
        return tuple(f"{node.name}: {node.unsure}" for node in self.nodes if node.unsure)

    def per_layer(self) -> dict[str, ProgramCost]:
        """By the layer's path; "" for what stands outside layers."""
        found: dict[str, list[NodeCost]] = {}
        for node in self.nodes:
            found.setdefault(layer_of(node.path), []).append(node)
        return {layer: ProgramCost(tuple(nodes)) for layer, nodes in found.items()}

    def of_stage(self, stage: int) -> ProgramCost:
        """What the stage computes, also where other stages compute it too."""
        return ProgramCost(tuple(node for node in self.nodes if stage in node.stages))

    def per_stage(self) -> tuple[ProgramCost, ...]:
        return tuple(self.of_stage(stage) for stage in range(len(self.crossing_bytes) + 1))

    def seconds(self, device: Device, *, ranks_per_host: int | None = None) -> Seconds:
        """Raises `InputError` where the device lacks a number that is needed."""
        memory = products = links = 0.0
        for node in self.nodes:
            reading = device.read_seconds(node.bytes_read + node.bytes_written)
            multiplying = device.product_seconds(node.flops, node.dtype)
            if multiplying > reading:
                products += multiplying
            else:
                memory += reading
            links += sum(device.meeting_seconds(each, ranks_per_host=ranks_per_host) for each in node.meetings)
        return Seconds(memory, products, links)


def program_cost(program: Program, coordinates: Mapping[str, int], sizes: Mapping[str, int]) -> ProgramCost:
    """Of a program that is laid out, or not divided at all, on the rank at `coordinates`."""
    nodes = node_costs(program, coordinates, sizes)
    at = RankSizes(program, coordinates, sizes)
    count, parts = (1, 1) if program.stages is None else (program.stages.count, program.stages.parts)
    sent = tuple(
        sum(
            bytes_of(shape, value)
            for node in values
            for shape, value in zip(at.shapes(node), node_values(node), strict=True)
        )
        for values in crossings(program.graph, parts)[: count - 1]
    )
    return ProgramCost(nodes, sent)
