"""What stages hand on and when, played through before anything runs; see `proof.meetings` for the game.

    timeline of a stage    its actions, each with what it exchanges; the nodes of its graph in place of a `Run`

The ranks of one stage run one graph: at each event all are at the same one. So one rank stands for its stage, and what
its ranks do among themselves is proven when the graph is. `events` of the stages' graphs may be given all the same,
with the whole mesh, which proves every rank one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partitioner.program.node_arguments import node_values
from partitioner.program.program import Program
from partitioner.program.stages import crossings
from partitioner.proof.meetings import Event, play
from partitioner.sharding.mesh import Mesh
from runtime.ops.communicating import Meeting
from runtime.pipeline.schedule import Action, Head, Receive, Run, Send, Shift, Timelines, chain, relay, ring

__all__ = ["Boundary", "boundaries_of", "play_schedule", "prove_stages"]

Boundary = tuple[Event, ...]
"""What goes over one boundary, as the sender's events of one piece."""


def prove_stages(program: Program) -> None:
    """Raises `RankMismatch` where the stages of a program would not come through; nothing, where there is one stage."""
    if program.stages is None:
        return
    count, shares_head = program.stages.count, program.stages.shares_head
    boundaries = boundaries_of(program)
    for pieces in (1, 2 * count + 1):
        for early in (True, False):
            heads = range(pieces) if shares_head else ()
            play_schedule(chain(count, pieces, heads=heads, early=early), boundaries)
    play_schedule(ring(count, count, 3 * count, shares_head=shares_head), boundaries)
    for groups in (count, count + 1):
        play_schedule(relay(count, groups, 3 * groups, shares_head=shares_head), boundaries)


def boundaries_of(program: Program) -> tuple[Boundary, ...]:
    """What the stages of a program hand on; the last one too, where they share out the vocabulary head."""
    assert program.stages is not None
    found = []
    for stage, nodes in enumerate(crossings(program.graph, program.stages.parts)):
        values = [(node.name, node_values(node)[0]) for node in nodes]
        found.append(
            tuple(Event(name, Meeting("send", ("pp",), v.shape, v.dtype, peer=stage + 1)) for name, v in values)
        )
    return tuple(found)


def play_schedule(
    timelines: Timelines,
    boundaries: Sequence[Boundary],
    *,
    mesh: Mesh | None = None,
    events: Mapping[int, Sequence[Event]] | None = None,
) -> None:
    """Raises `RankMismatch` where these timelines wait for ever. events: by rank of the mesh, those of its graph."""
    count = len(timelines)
    mesh = Mesh.of(pp=count) if mesh is None else mesh
    played = {}
    for rank in range(mesh.world_size):
        stage = mesh.coordinates(rank)["pp"]
        own = () if events is None else events[rank]
        played[rank] = tuple(
            event
            for action in timelines[stage]
            for event in _events(action, stage, count, boundaries, own)
        )  # fmt: skip
    play(mesh, played)


def _events(
    action: Action, stage: int, count: int, boundaries: Sequence[Boundary], own: Sequence[Event]
) -> Sequence[Event]:
    match action:
        case Run(piece):
            return [Event(e.node, e.meeting, e.options, f"stage {stage}, piece {piece}") for e in own]
        case Shift():
            message = Meeting("permute", ("pp",), ("bytes",), "uint8")
            return [Event("shift", message, (("shift", 1),), f"stage {stage}")]
        case Head(piece):
            # what the last stage has made, to all; then what they gather of their logits
            told = (
                Event(e.node, Meeting("all_reduce", ("pp",), e.meeting.shape, e.meeting.dtype)) for e in boundaries[-1]
            )
            logits = Event("logits", Meeting("all_gather", ("pp",), ("batch",), "float64"))
            return [Event(f"{e.node}, piece {piece}", e.meeting, (), f"stage {stage}") for e in (*told, logits)]
        case Send(piece) | Receive(piece):
            sends = isinstance(action, Send)
            # of a ring, whose last stage tells the first: what else there is to send
            crossing = boundaries[min((stage if sends else stage - 1) % count, len(boundaries) - 1)]
            peer = (stage + 1 if sends else stage - 1) % count
            return [
                Event(
                    f"{e.node}, piece {piece}",
                    Meeting("send" if sends else "receive", ("pp",), e.meeting.shape, e.meeting.dtype, peer=peer,
                            sizes_from=f"piece {piece}"),
                    (),
                    f"stage {stage}",
                )
                for e in crossing
            ]  # fmt: skip
