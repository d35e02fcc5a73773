"""The table of communicating ops: what it says before anything runs is what happens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner.errors import CommunicationError
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.simulator import Simulator
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import COMMUNICATING, Communicating, Meeting, as_axes, named_axes, read_call
from runtime.program.rank_program import RankProgram, RunInput


def mixed(x: Tensor, y: Tensor, axis: str | tuple[str, ...], *, shift: int, counts: list[int]) -> Tensor:
    """An op of several primitives, as a package could add one."""
    raise NotImplementedError


def _run(channel: Channel, x: Tensor, y: Tensor, *, shift: int, counts: list[int]) -> Tensor:
    begun = channel.permute_begin(y, shift)
    exchanged = channel.all_to_all(x, counts, [counts[channel.coordinate]] * len(counts))
    return exchanged.sum(0) + begun.finish()


def _meetings(node: fx.Node) -> tuple[Meeting, ...]:
    call = read_call(node)
    return tuple(Meeting(kind, call.axes, None, None) for kind in ("permute", "all_to_all"))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMUNICATING, mixed, Communicating(_run, _meetings))


def ranks(mesh: Mesh, build: Callable[[fx.Graph, fx.Node], fx.Node]) -> list[RankProgram]:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    inputs = (RunInput("x", torch.float64, (4, 2), "required"),)
    return [RankProgram(lambda: graph, mesh, at, (), inputs) for at in mesh]


def both(graph: fx.Graph, x: fx.Node) -> fx.Node:
    counts = [3, 1]
    first = graph.call_function(
        mixed, (x, graph.call_function(torch.sum, (x, 0)), "tp"), {"shift": 1, "counts": counts}
    )
    return graph.call_function(all_reduce, (first, "tp"))


def test_an_op_of_several_primitives_runs_as_declared() -> None:
    x = torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
    # coordinate 0 gets the first 3 rows twice, coordinate 1 the last one twice; each adds the other's column sums
    expected = 2 * x[:3].sum(0) + 2 * x[3:].sum(0) + 2 * x.sum(0)
    for found in Simulator(ranks(Mesh.of(tp=2), both))(x=x):
        assert torch.equal(found, expected)


def test_a_profile_shows_it_and_still_counts_the_meetings_of_others() -> None:
    simulator = Simulator(ranks(Mesh.of(tp=2), both))
    with simulator.profile() as trace:
        simulator(x=torch.ones(4, 2, dtype=torch.float64))
    events = [event for event in trace.events() if event["ph"] == "X" and event["tid"] == 2]
    assert {event["name"] for event in events} == {"mixed", "all_reduce"}
    several = [event for event in events if event["name"] == "mixed"]
    assert [event["args"]["meetings"] for event in several] == [[[[0, 1], 0], [[0, 1], 1]]] * 2
    assert {event["args"]["meeting"] for event in events if event["name"] == "all_reduce"} == {2}


def test_a_group_of_several_axes_is_one_reduction() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(all_reduce, (x, ("dp", "tp")))

    programs = ranks(Mesh.of(dp=2, tp=2), build)
    assert str(next(node for node in programs[0].graph.nodes if node.op == "call_function").args) == "(x, ('dp', 'tp'))"
    x = torch.ones(4, 2, dtype=torch.float64)
    simulator = Simulator(programs)
    with simulator.profile() as trace:
        for found in simulator(x=x):
            assert torch.equal(found, 4 * x)
    met = {str(e["args"]["ranks"]) + e["args"]["op"] for e in trace.events() if "ranks" in e.get("args", {})}
    assert met == {"[0, 1, 2, 3]all_reduce over dp x tp"}


def test_what_a_node_does_is_known_before_it_runs() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    once = graph.call_function(all_reduce, (x, "tp"))
    joined = graph.call_function(all_gather, (once, ("dp", "tp")), {"dim": 1, "sizes": [1, 2]})
    graph.output(joined)
    assert COMMUNICATING[all_reduce].meetings(once) == (Meeting("all_reduce", ("tp",), (2, 3), torch.bfloat16),)
    # nobody has said what the sum looks like
    assert COMMUNICATING[all_gather].meetings(joined) == (Meeting("all_gather", ("dp", "tp"), None, None),)
    assert read_call(joined) == ((once,), ("dp", "tp"), {"dim": 1, "sizes": [1, 2]})
    assert named_axes([graph]) == (("dp", "tp"), ("tp",))


def test_options_are_fixed_in_the_graph() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(all_gather, (x, "tp"), {"dim": 0, "sizes": [1, x]})
    with pytest.raises(CommunicationError, match=r"option 'sizes' of all_gather must be fixed in the graph"):
        read_call(node)


@pytest.mark.parametrize("axis", [3, None, ("tp", 1), {"tp"}])
def test_what_names_no_axes_is_refused(axis: Any) -> None:
    with pytest.raises(CommunicationError, match="a mesh axis or a tuple of axes"):
        as_axes(axis)


@pytest.mark.parametrize(
    ("axis", "why"),
    [
        ("px", "unknown mesh axis 'px'"),
        (("tp", "px"), "unknown mesh axis 'px'"),
        ((), "no axis"),
        (("tp", "tp"), "stands twice"),
        (("tp", "ep"), "two views"),
    ],
)
def test_axes_that_a_mesh_has_not_are_refused(axis: Any, why: str) -> None:
    with pytest.raises(CommunicationError, match=why):
        ThreadGroup(Mesh.of(tp=2)).communicator(0).channel(axis, node="n")
