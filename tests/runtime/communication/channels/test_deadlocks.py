"""Ranks that do not fit together, run with no proof before: the simulator tells each at once, also while others run.

Every case is a list of what the ranks do, as steps on one channel each; the same with one step put right runs through.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from partitioner.errors import RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup
from tests.runtime.communication.channels.threads import run

Step = tuple[Any, ...]
X = torch.ones(4)
SOON_S = 3.0
"""Far below the group's timeout, of a minute; far above what a loaded machine takes to switch threads."""


def perform(steps: Sequence[Step], axes: str = "tp") -> Callable[[ThreadCommunicator], None]:
    """Steps: ("send", to), ("receive", from), ("permute", shift), or a collective; the node is named for it."""

    def body(comm: ThreadCommunicator) -> None:
        for number, (kind, *options) in enumerate(steps):
            over = options.pop() if options and isinstance(options[-1], str) else axes
            channel = comm.channel(over, node=f"{kind}_{comm.rank}_{number}")
            if kind == "receive":
                channel.receive_begin(X.shape, X.dtype, *options).finish()
            elif kind in ("send", "permute"):
                getattr(channel, f"{kind}_begin")(X, *options).finish()
            elif kind == "exchange":
                channel.all_to_all(X, *(options or [[4 // len(channel.ranks)] * len(channel.ranks)] * 2))
            else:
                getattr(channel, kind)(X, *([] if kind == "all_reduce" else [0]))

    return body


CASES: dict[str, tuple[list[list[Step]], list[list[Step]], list[str]]] = {
    # what is wrong, what is right, which nodes must be named
    "swapped sends": (
        [[("send", 1), ("receive", 1)], [("send", 0), ("receive", 0)]],
        [[("send", 1), ("receive", 1)], [("receive", 0), ("send", 0)]],
        ["send_0_0", "send_1_0"],
    ),
    "a dropped receive": (
        [[("send", 1), ("send", 1)], [("receive", 0)]],
        [[("send", 1), ("send", 1)], [("receive", 0), ("receive", 0)]],
        ["send_0_1", "rank 1: has ended"],
    ),
    "a cycle of three": (
        [[("send", 1), ("receive", 2)], [("send", 2), ("receive", 0)], [("send", 0), ("receive", 1)]],
        [[("send", 1), ("receive", 2)], [("receive", 0), ("send", 2)], [("receive", 1), ("send", 0)]],
        ["send_0_0", "send_1_0", "send_2_0"],
    ),
    "a cycle of receives": (
        [[("receive", 2)], [("receive", 0)], [("receive", 1)]],
        [[("permute", 1)], [("permute", 1)], [("permute", 1)]],
        ["receive_0_0", "receive_1_0", "receive_2_0"],
    ),
    "a gather against a reduce-scatter": (
        [[("all_gather",)], [("reduce_scatter",)]],
        [[("reduce_scatter",)], [("reduce_scatter",)]],
        ["all_gather_0_0", "reduce_scatter_1_0"],
    ),
    "a gather against an exchange": (
        [[("all_gather",)], [("exchange",)]],
        [[("exchange",)], [("exchange",)]],
        ["all_gather_0_0", "exchange_1_0"],
    ),
    "a reversed ring": (
        [[("permute", 1)], [("permute", 1)], [("permute", -1)]],
        [[("permute", -1)], [("permute", -1)], [("permute", -1)]],
        ["permute_2_0"],
    ),
    "counts that do not fit": (
        [[("exchange", [1, 3], [1, 2])], [("exchange", [2, 2], [4, 2])]],
        [[("exchange", [1, 3], [1, 2])], [("exchange", [2, 2], [3, 2])]],
        ["exchange_0_0", "exchange_1_0", "rank 0 sends 3 rows to rank 1, which expects 4"],
    ),
    "one piece more": (
        [[("send", 1)] * 3, [("receive", 0), ("send", 2)] * 2, [("receive", 1)] * 2],
        [[("send", 1)] * 2, [("receive", 0), ("send", 2)] * 2, [("receive", 1)] * 2],
        ["send_0_2", "rank 1: has ended"],
    ),
    "a send into a collective": (
        [[("send", 1)], [("all_reduce",)]],
        [[("send", 1), ("all_reduce",)], [("receive", 0), ("all_reduce",)]],
        ["send_0_0", "all_reduce_1_0"],
    ),
    "a send into a collective of more": (
        [[("all_reduce",)], [("send", 2)], [("all_reduce",)]],
        [[("all_reduce",)], [("all_reduce",), ("send", 2)], [("all_reduce",), ("receive", 1)]],
        ["send_1_0", "all_reduce_2_0"],  # these two wait for each other, whether or not rank 0 has come
    ),
    "groups in another order": (
        # 0 waits for 1 along tp, 1 for 3 along dp, 3 for 2 along tp, 2 for 0 along dp
        [[("all_reduce", axis), ("all_reduce", "dp" if axis == "tp" else "tp")] for axis in ("tp", "dp", "dp", "tp")],
        [[("all_reduce", "dp"), ("all_reduce", "tp")]] * 4,
        [f"all_reduce_{rank}_0" for rank in range(4)],
    ),
}


def _mesh(num_ranks: int) -> Mesh:
    return Mesh.of(dp=2, tp=2) if num_ranks == 4 else Mesh.of(tp=num_ranks)


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_at_once_and_names_every_node(case: str) -> None:
    wrong, _, named = CASES[case]
    started = time.monotonic()
    outcomes = run(ThreadGroup(_mesh(len(wrong))), *map(perform, wrong))
    assert time.monotonic() - started < SOON_S
    told = [str(outcome) for outcome in outcomes if isinstance(outcome, RankMismatch)]
    assert told, outcomes
    for name in named:
        assert name.lower() in told[0].lower(), told[0]


@pytest.mark.parametrize("case", CASES)
def test_put_right_it_runs_through(case: str) -> None:
    _, right, _ = CASES[case]
    outcomes = run(ThreadGroup(_mesh(len(right))), *map(perform, right))
    assert outcomes == [None] * len(right), outcomes


@pytest.mark.parametrize("case", CASES)
def test_a_stuck_subset_is_told_while_others_run(case: str) -> None:
    """Beside each case, a rank that is busy and has nothing to do with it."""
    wrong, _, _ = CASES[case]
    if len(wrong) == 4:
        pytest.skip("on this mesh every rank takes part")
    mesh = Mesh.of(dp=2, tp=len(wrong))
    over = threading.Event()
    told: dict[int, float] = {}
    started = time.monotonic()

    def until_told(rank: int) -> Callable[[ThreadCommunicator], None]:
        def body(comm: ThreadCommunicator) -> None:
            try:
                perform(wrong[rank])(comm)
            except RankMismatch:
                told[rank] = time.monotonic() - started
                over.set()
                raise

        return body

    def busy(comm: ThreadCommunicator) -> bool:
        return over.wait(20)

    outcomes = run(ThreadGroup(mesh), *map(until_told, range(len(wrong))), *[busy] * len(wrong))
    assert told, outcomes
    assert min(told.values()) < SOON_S
    assert outcomes[len(wrong) :] == [True] * len(wrong), "those were still at work"


def test_waiting_for_one_that_runs_is_no_deadlock() -> None:
    """A chain of ranks that wait, the last for one that is slow."""
    slow = perform([("send", 2)])

    def late(comm: ThreadCommunicator) -> None:
        time.sleep(0.2)
        slow(comm)

    ranks = [perform([("receive", 1)]), perform([("receive", 2), ("send", 0)]), perform([("receive", 3), ("send", 1)])]
    assert run(ThreadGroup(Mesh.of(tp=4)), *ranks, late) == [None] * 4


def test_what_is_begun_may_be_finished_in_any_order_and_late() -> None:
    def body(comm: ThreadCommunicator) -> list[float]:
        channel = comm.channel("tp", node="n")
        begun = [channel.permute_begin(torch.tensor([10.0 * i + comm.rank]), i) for i in range(5)]
        channel.all_reduce(X)
        return [handle.finish().item() for handle in reversed(begun)][::-1]

    found = run(ThreadGroup(Mesh.of(tp=3)), body, body, body)
    assert found == [[10.0 * i + (rank - i) % 3 for i in range(5)] for rank in range(3)]
