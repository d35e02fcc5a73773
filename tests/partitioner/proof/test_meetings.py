"""Programs and schedules that would hang or mix up: refused before anything runs, and told by the simulator if run."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from partitioner import Plan, partition
from partitioner.errors import CommunicationError, PartitionerError, RankMismatch
from partitioner.proof.meetings import Event, check_meetings, events_of, play
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.communicating import Kind, Meeting
from tests.support import zoo

Line = list[Event]


def meet(
    kind: Kind, axes: str | tuple[str, ...], node: str, *, shape: tuple[int, ...] = (2, 4), **more: object
) -> Event:
    axes = (axes,) if isinstance(axes, str) else axes
    dtype = more.pop("dtype", torch.float32)
    known = {name: more.pop(name) for name in ("peer", "sizes_from") if name in more}
    return Event(node, Meeting(kind, axes, shape, dtype, **known), tuple(sorted(more.items())))


def reduce(axes: str | tuple[str, ...], node: str, **more: object) -> Event:
    return meet("all_reduce", axes, node, **more)


def send(to: int, node: str, axes: str = "pp", **more: object) -> Event:
    return meet("send", axes, node, peer=to, **more)


def receive(from_: int, node: str, axes: str = "pp", **more: object) -> Event:
    return meet("receive", axes, node, peer=from_, **more)


def shift(by: int, node: str, axes: str = "pp") -> Event:
    return meet("permute", axes, node, shift=by)


def exchange(node: str, *, sizes_from: str, rows: int = 4) -> Event:
    return meet("all_to_all", "sp", node, shape=(rows, 3), sizes_from=sizes_from)


# -- what runs through -------------------------------------------------------------------------------------------------


def prefill(stages: int, pieces: int) -> dict[int, Line]:
    """Each piece from stage to stage."""
    return {
        stage: [
            event
            for piece in range(pieces)
            for event in [
                *([receive(stage - 1, f"receive_{piece}")] if stage else []),
                *([send(stage + 1, f"send_{piece}")] if stage + 1 < stages else []),
            ]
        ]
        for stage in range(stages)
    }


def decode_ring(stages: int, slots: int) -> dict[int, Line]:
    return {stage: [shift(1, f"slot_{slot}") for slot in range(slots)] for stage in range(stages)}


def stages_of_two(pieces: int) -> tuple[Mesh, dict[int, Line]]:
    """tp=2 x pp=2: each stage sums over tp, then hands on, each rank to its counterpart."""
    mesh = Mesh.of(pp=2, tp=2)
    lines: dict[int, Line] = {}
    for rank in range(4):
        stage = mesh.coordinates(rank)["pp"]
        lines[rank] = [
            event
            for piece in range(pieces)
            for event in [
                *([receive(0, f"receive_{piece}")] if stage else []),
                reduce("tp", f"sum_{piece}"),
                *([] if stage else [send(1, f"send_{piece}")]),
            ]
        ]
    return mesh, lines


RIGHT: dict[str, tuple[Mesh, dict[int, Line]]] = {
    "a chain of 2": (Mesh.of(pp=2), prefill(2, 3)),
    "a chain of 4": (Mesh.of(pp=4), prefill(4, 5)),
    "a ring of 2": (Mesh.of(pp=2), decode_ring(2, 4)),
    "a ring of 3": (Mesh.of(pp=3), decode_ring(3, 4)),
    "stages of two ranks": stages_of_two(3),
    "both axes in other orders, but no circle": (
        Mesh.of(dp=2, tp=2),
        {
            0: [reduce("tp", "a"), reduce("dp", "b")],
            1: [reduce("dp", "b"), reduce("tp", "a")],
            2: [reduce("tp", "a"), reduce("dp", "b")],
            3: [reduce("tp", "a"), reduce("dp", "b")],
        },
    ),
    "uneven exchanges": (
        Mesh.of(sp=2),
        {
            0: [exchange("send_rows", sizes_from="counts", rows=4)],
            1: [exchange("send_rows", sizes_from="counts", rows=6)],
        },
    ),
}


# -- what does not -----------------------------------------------------------------------------------------------------


def changed(lines: dict[int, Line], rank: int, change: Callable[[Line], Line]) -> dict[int, Line]:
    return {**lines, rank: change(list(lines[rank]))}


def naive_decode(stages: int) -> dict[int, Line]:
    """Stage 0 runs one group after the other; the last stage tells a group's tokens before it takes the next group."""
    lines = prefill(stages, stages)
    lines[0] += [receive(stages - 1, f"tokens_{group}") for group in range(stages)]
    last = lines[stages - 1]
    lines[stages - 1] = [x for group, event in enumerate(last) for x in (event, send(0, f"tokens_{group}"))]
    return lines


TP4, DP2TP2 = Mesh.of(tp=4), Mesh.of(dp=2, tp=2)
SUMS = {rank: [reduce("tp", "first"), reduce("tp", "second")] for rank in range(4)}

BROKEN: dict[str, tuple[Mesh, dict[int, Line], tuple[str, ...]]] = {
    "two sends swapped": (
        Mesh.of(pp=2),
        {
            0: [send(1, "send_b", shape=(9, 9)), send(1, "send_a")],
            1: [receive(0, "receive_a"), receive(0, "receive_b", shape=(9, 9))],
        },
        ("send_b", "receive_a"),
    ),
    "a dropped receive": (
        Mesh.of(pp=2), changed(prefill(2, 3), 1, lambda line: line[:-1]), ("rank 0 waits for rank 1", "send_2"),
    ),
    "a stage with one piece more": (
        Mesh.of(pp=3),
        changed(prefill(3, 2), 2, lambda line: [*line, receive(1, "receive_2")]),
        ("receive_2", "rank 2"),
    ),
    "the obvious order of decode, 2 stages": (Mesh.of(pp=2), naive_decode(2), ("send_1", "tokens_0")),
    "the obvious order of decode, 3 stages": (Mesh.of(pp=3), naive_decode(3), ("circle",)),
    "the obvious order of decode, 4 stages": (Mesh.of(pp=4), naive_decode(4), ("circle",)),
    "cuts that differ": (
        Mesh.of(pp=2), {0: [send(1, "hidden")], 1: [receive(0, "hidden", shape=(2, 8))]}, ("float32[2, 8]",),
    ),
    "counts of another layer": (
        Mesh.of(sp=2),
        {0: [exchange("rows", sizes_from="counts_0")], 1: [exchange("rows", sizes_from="counts_1")]},
        ("counts_0", "counts_1"),
    ),
    "an exchange against a gather": (
        Mesh.of(sp=2),
        {0: [exchange("rows", sizes_from="counts")], 1: [meet("all_gather", "sp", "rows", shape=(4, 3), dim=0)]},
        ("all_to_all", "all_gather"),
    ),
    "a reduce-scatter against an all-reduce": (
        TP4,
        changed(SUMS, 2, lambda line: [meet("reduce_scatter", "tp", "first", dim=0), line[1]]),
        ("reduce_scatter",),
    ),
    "a ring the other way": (
        Mesh.of(pp=3),
        changed(decode_ring(3, 2), 1, lambda line: [line[0], shift(-1, "slot_1")]),
        ("shift=-1", "shift=1"),
    ),
    "a group of the wrong view, of equal size": (
        Mesh.of(dp=2, tp=2, ep=2),
        {rank: [reduce("edp" if rank == 0 else "tp", "sum")] for rank in range(4)},
        ("edp", "'sum'"),
    ),
    "the other axis of equal size": (
        DP2TP2, {rank: [reduce("dp" if rank == 3 else "tp", "sum")] for rank in range(4)}, ("over dp", "over tp"),
    ),
    "one axis of two": (
        DP2TP2, {rank: [reduce("tp" if rank == 1 else ("dp", "tp"), "sum")] for rank in range(4)}, ("dp x tp",),
    ),
    "two sums crossed": (
        DP2TP2,
        {
            rank: [reduce("tp", "a"), reduce("dp", "b")] if rank in (0, 3) else [reduce("dp", "b"), reduce("tp", "a")]
            for rank in range(4)
        },
        ("circle", "'a'", "'b'"),
    ),
    "a circle of three": (
        Mesh.of(sp=3),
        {rank: [send((rank + 1) % 3, "s", "sp"), receive((rank - 1) % 3, "r", "sp")] for rank in range(3)},
        ("ranks 0, 1, 2 wait for each other", "'s'"),
    ),
    "two that listen to each other": (
        Mesh.of(pp=2), {0: [receive(1, "r0"), send(1, "s0")], 1: [receive(0, "r1"), send(0, "s1")]}, ("r0", "r1"),
    ),
    "another dtype": (
        TP4, changed(SUMS, 3, lambda line: [line[0], reduce("tp", "second", dtype=torch.bfloat16)]), ("bfloat16",),
    ),
    "another shape": (TP4, changed(SUMS, 0, lambda line: [reduce("tp", "first", shape=(2, 5)), line[1]]), ("[2, 5]",)),
    "a sum left out": (TP4, changed(SUMS, 1, lambda line: line[:1]), ("second", "rank 1, which has nothing more")),
    "a message to another rank": (
        Mesh.of(pp=3), {0: [send(2, "s")], 1: [receive(0, "r")], 2: []}, ("'s'", "rank 0 waits for rank 2"),
    ),
    "pieces gathered along another dim": (
        TP4,
        {rank: [meet("all_gather", "tp", "g", shape=(4, 4), dim=1 if rank == 2 else 0)] for rank in range(4)},
        ("dim=1", "dim=0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_right_schedules_run_through(what: str) -> None:
    mesh, lines = RIGHT[what]
    play(mesh, lines)
    assert perform(mesh, lines) is None


@pytest.mark.parametrize("what", BROKEN)
def test_broken_schedules_are_refused_before_they_run(what: str) -> None:
    mesh, lines, named = BROKEN[what]
    with pytest.raises(RankMismatch) as error:
        play(mesh, lines)
    assert all(text in str(error.value) for text in named), error.value
    assert str(error.value).count("rank ") >= 2


@pytest.mark.parametrize("what", BROKEN)
def test_broken_schedules_are_told_by_the_simulator(what: str) -> None:
    mesh, lines, _ = BROKEN[what]
    started = time.monotonic()
    assert isinstance(perform(mesh, lines), CommunicationError)
    assert time.monotonic() - started < 5


def perform(mesh: Mesh, lines: dict[int, Line]) -> BaseException | None:
    """Runs the events on one thread per rank; the first error."""
    group = ThreadGroup(mesh, timeout_s=20)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        communicator = group.communicator(rank)
        try:
            for event in lines[rank]:
                meeting, options = event.meeting, dict(event.options)
                channel = communicator.channel(meeting.axes, node=event.node)
                shape, dtype = meeting.shape, meeting.dtype
                assert shape is not None
                x = torch.ones(shape, dtype=dtype)
                if meeting.kind == "all_reduce":
                    channel.all_reduce(x)
                elif meeting.kind == "all_gather":
                    channel.all_gather(x, options["dim"])
                elif meeting.kind == "reduce_scatter":
                    channel.reduce_scatter(x, options["dim"], [1, 1, 0, 0])
                elif meeting.kind == "all_to_all":
                    counts = [shape[0] - 2, 2]
                    mine = [sum(e.meeting.shape[0] - 2 if r == 0 else 2 for e in lines[s][:1]) if rank == 0 else 2
                            for r, s in ((0, 0), (0, 1))]  # fmt: skip
                    channel.all_to_all(x, counts, mine, sizes_from=meeting.sizes_from)
                elif meeting.kind == "permute":
                    channel.permute_begin(x, options["shift"]).finish()
                elif meeting.kind == "send":
                    channel.send_begin(x, meeting.peer).finish()
                else:
                    channel.receive_begin(shape, dtype, meeting.peer).finish()
        except BaseException as error:
            errors.append(error)
            group.abort(rank, error)
        finally:
            group.end(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors[0] if errors else None


def test_a_message_to_oneself_is_refused() -> None:
    with pytest.raises(RankMismatch, match="this is one"):
        play(Mesh.of(pp=2), {0: [send(0, "s")], 1: []})


def test_every_rank_needs_a_program() -> None:
    with pytest.raises(RankMismatch, match="2 ranks, and 1 of them"):
        play(Mesh.of(tp=2), {0: []})


def test_axes_of_two_views_are_refused() -> None:
    mesh = Mesh.of(dp=2, tp=2, ep=2)
    with pytest.raises(PartitionerError, match="two views"):
        play(mesh, {rank: [reduce(("tp", "ep"), "sum")] for rank in range(4)})


def test_the_programs_of_a_real_model_meet() -> None:
    parts = partition(zoo.tiny("llama")[0], Plan(tp=3))
    ranks = [parts.rank(rank) for rank in range(3)]
    check_meetings(ranks)
    events = events_of(ranks[0].graph)
    assert [event.meeting.kind for event in events] == ["all_reduce"] * 5 + ["all_gather"]
    # the negative control: one rank without its second sum
    short = events[:1] + events[2:]
    with pytest.raises(RankMismatch, match=r"which has nothing more to do|disagree"):
        play(parts.mesh, {0: events, 1: short, 2: events})


def test_many_ranks_of_one_graph_cost_what_one_costs() -> None:
    line = [reduce("tp", f"sum_{i}") for i in range(2000)]
    started = time.monotonic()
    play(Mesh.of(dp=32, tp=8), dict.fromkeys(range(256), line))
    assert time.monotonic() - started < 2
