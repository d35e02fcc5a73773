import time

import pytest
import torch

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup
from runtime.ops.collectives import all_gather, all_reduce
from tests.runtime.communication.channels.threads import run


def reduce(x: torch.Tensor, axis: str = "tp", node: str = "sum"):
    return lambda comm: comm.bind(all_reduce, axis, node=node, options={})(x)


def gather(x: torch.Tensor, node: str = "join", **options: object):
    return lambda comm: comm.bind(all_gather, "tp", node=node, options={"dim": 0, **options})(x)


def test_sum_and_gather() -> None:
    pieces = [torch.full((2,), float(i)) for i in range(3)]
    sums = run(ThreadGroup(Mesh.of(tp=3)), *map(reduce, pieces))
    assert [total.tolist() for total in sums] == [[3, 3]] * 3
    assert pieces[0].tolist() == [0, 0]
    sums[0].zero_()
    assert sums[1].tolist() == [3, 3]
    parts = [torch.arange(n) for n in (2, 0, 1)]
    for joined in run(ThreadGroup(Mesh.of(tp=3)), *(gather(part, sizes=[2, 0, 1]) for part in parts)):
        assert joined.tolist() == [0, 1, 0]


def test_sums_do_not_depend_on_who_comes_first() -> None:
    values = [torch.tensor([1e16]), torch.tensor([1.0]), torch.tensor([-1e16])]
    results = set()
    for late in range(3):

        def delayed(rank: int, late: int = late):
            def body(comm: ThreadCommunicator):
                time.sleep(0.02 if rank == late else 0)
                return reduce(values[rank].double())(comm)

            return body

        results |= {total.item() for total in run(ThreadGroup(Mesh.of(tp=3)), *map(delayed, range(3)))}
    assert len(results) == 1


@pytest.mark.parametrize(
    "other",
    [gather(torch.ones(2)), reduce(torch.ones(3), node="b"), reduce(torch.ones(2, dtype=torch.float64), node="b")],
    ids=["operation", "shape", "dtype"],
)
def test_disagreement_is_named_on_every_rank(other) -> None:
    results = run(ThreadGroup(Mesh.of(tp=2)), reduce(torch.ones(2)), other)
    assert all(isinstance(error, RankMismatch) for error in results), results
    assert "rank 0: node 'sum', all_reduce" in str(results[0])
    assert "rank 1: node " in str(results[0])


def test_ranks_that_wait_for_each_other_are_told_at_once() -> None:
    def diagonal(axis: str):
        return reduce(torch.ones(1), axis, node=f"over_{axis}")

    # 0 waits for 1 along tp, 1 for 3 along dp, 3 for 2 along tp, 2 for 0 along dp
    ring = [diagonal(axis) for axis in ("tp", "dp", "dp", "tp")]
    started = time.monotonic()
    results = run(ThreadGroup(Mesh.of(dp=2, tp=2)), *ring)
    assert time.monotonic() - started < 5
    assert all(isinstance(error, RankMismatch) for error in results)
    assert "none can go on" in str(results[0])
    assert "over_tp" in str(results[0])
    assert "over_dp" in str(results[0])


def test_a_rank_that_ends_early_is_named() -> None:
    results = run(ThreadGroup(Mesh.of(tp=2)), reduce(torch.ones(1)), lambda comm: None)
    assert isinstance(results[0], RankMismatch)
    assert "rank 1: has ended" in str(results[0])


def test_a_rank_that_raises_wakes_the_others() -> None:
    def fail(comm: ThreadCommunicator) -> None:
        time.sleep(0.05)
        raise ZeroDivisionError("own fault")

    started = time.monotonic()
    results = run(ThreadGroup(Mesh.of(tp=3)), reduce(torch.ones(1)), fail, reduce(torch.ones(1)))
    assert time.monotonic() - started < 5
    assert isinstance(results[1], ZeroDivisionError)
    for waiting in (results[0], results[2]):
        assert isinstance(waiting, RankLost)
        assert "rank 1 failed" in str(waiting)
        assert "own fault" in str(waiting)


def test_a_rank_that_hangs_is_named_at_the_deadline() -> None:
    results = run(ThreadGroup(Mesh.of(tp=2), timeout_s=0.1), reduce(torch.ones(1)), lambda comm: time.sleep(0.4))
    assert isinstance(results[0], RankLost)
    assert "no answer from rank 1 within 0.1 s" in str(results[0])


def test_a_piece_of_the_wrong_size_and_unknown_names_are_refused() -> None:
    results = run(ThreadGroup(Mesh.of(tp=2)), gather(torch.ones(2), sizes=[1, 1]), gather(torch.ones(1), sizes=[1, 1]))
    assert "must bring 1; its tensor is [2]" in str(results[0])
    comm = ThreadGroup(Mesh.of(tp=2)).communicator(0)
    with pytest.raises(CommunicationError, match="unknown mesh axis"):
        comm.bind(all_reduce, "px", node="n", options={})
    with pytest.raises(CommunicationError, match="has no operation"):
        comm.bind(torch.add, "tp", node="n", options={})
