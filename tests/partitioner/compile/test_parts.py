import pytest
import torch

from partitioner.compile.parts import Parts
from partitioner.errors import CommunicationError, PlanError
from runtime.communication.thread_communicator import ThreadGroup
from tests.support import handmade


@pytest.mark.parametrize("n", [1, 2, 4])
def test_simulate_returns_what_the_whole_returns(n: int) -> None:
    ids = handmade.input_ids()
    whole = Parts(handmade.traced(), None).simulate(input_ids=ids)
    parts = Parts(handmade.partitioned(n), "a report")
    for length in (1, 3, 3):
        ids = handmade.input_ids(length=length)
        whole = Parts(handmade.traced(), None).simulate(input_ids=ids)
        torch.testing.assert_close(parts.simulate(input_ids=ids), whole, rtol=1e-12, atol=1e-12)
    assert parts.report == "a report"
    assert parts.mesh.world_size == n


def test_ranks_are_emitted_once_and_engines_are_yours_to_make() -> None:
    parts = Parts(handmade.partitioned(1), None)
    assert parts.rank(0) is parts.rank(0)
    engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))
    ids = handmade.input_ids()
    assert torch.equal(engine(input_ids=ids), parts.simulate(input_ids=ids))


@pytest.mark.parametrize("rank", [3, -1, "a", None, 1.0, True])
def test_a_rank_that_is_none_is_refused(rank: object) -> None:
    with pytest.raises(PlanError, match="the ranks of this mesh are 0 to 2; got"):
        Parts(handmade.partitioned(3), None).rank(rank)


@pytest.mark.parametrize("entry", ["txt", "", None, 0, ["text"]])
def test_an_entry_that_is_none_is_refused(entry: object) -> None:
    parts = Parts(handmade.partitioned(1), None)
    for ask in (parts.program_of, lambda name: parts.entry(name, 0), parts.cost):
        with pytest.raises(PlanError, match="the entries of a program are text, prefill, decode; got"):
            ask(entry)
    assert parts.program_of("text") is parts.program


def test_ranks_that_return_different_results_are_refused() -> None:
    broken = handmade.partitioned(2)
    for node in broken.graph.nodes:
        if node.name == "reduced":
            node.replace_all_uses_with(node.args[0])
    output = next(node for node in broken.graph.nodes if node.op == "output")
    output.args = (next(node for node in broken.graph.nodes if node.name == "residual"),)
    with pytest.raises(CommunicationError, match="ranks 0 and 1 return different results"):
        Parts(broken, None).simulate(input_ids=handmade.input_ids())
    output.args = (next(node for node in broken.graph.nodes if node.name == "logits"),)
    with pytest.raises(CommunicationError, match=r"different shapes: \[2, 3, 5\] and \[2, 3, 6\]"):
        Parts(broken, None).simulate(input_ids=handmade.input_ids())
