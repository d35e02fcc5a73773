"""Tokens that ranks share out: each belongs to one rank, work is even, and rows come back in order."""

import itertools

import pytest
import torch
from torch import Tensor

from partitioner.errors import LayoutError
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.rows.share_rows import collect_rows, own_last_token, row_counts, take_rows
from runtime.ops.rows.token_order import TokenOrder
from tests.runtime.communication.channels.threads import run


def work(order: TokenOrder) -> list[int]:
    """How many keys the queries of each rank see."""
    return [sum(position + 1 for position in order.positions(rank)) for rank in range(order.parts)]


@pytest.mark.parametrize("kind", ["zigzag", "blocks"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_each_token_has_one_place(kind: str, parts: int) -> None:
    for total in (*range(40), 97, 1000):
        order = TokenOrder.of(total, parts, kind)
        held = [order.positions(rank) for rank in range(parts)]
        assert sorted(itertools.chain(*held)) == list(range(total))
        assert [len(mine) for mine in held] == list(order.counts)
        for rank, mine in enumerate(held):
            assert mine == sorted(mine)
            assert [order.place(position) for position in mine] == [(rank, index) for index in range(len(mine))]
            assert len(order.runs[rank]) <= 2
        if kind == "zigzag":
            assert max(order.counts) - min(order.counts) <= 2
            assert max(order.counts) == -(-total // parts)
        else:
            assert list(order.counts) == row_counts(total, parts)
    with pytest.raises(LayoutError, match="no position 5 among 5"):
        TokenOrder.of(5, parts, kind).place(5)


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(LayoutError, match="not 'striped'"):
        TokenOrder.of(4, 2, "striped")


@pytest.mark.parametrize("parts", [2, 3, 4, 8, 16])
def test_work_per_rank_is_within_2_percent_from_90_tokens_a_rank(parts: int) -> None:
    for total in [*range(90 * parts, 92 * parts + 1), 200 * parts + 1, 1000 * parts - 1]:
        each = work(TokenOrder.of(total, parts))
        mean = sum(each) / parts
        assert 0.98 * mean <= min(each) <= max(each) <= 1.02 * mean, (total, each)


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_work_is_the_same_where_chunks_are(parts: int) -> None:
    for size in (1, 2, 7):
        assert len(set(work(TokenOrder.of(2 * parts * size, parts)))) == 1
    # the control: in blocks the last rank has nearly twice the mean
    each = work(TokenOrder.of(2 * parts * 50, parts, "blocks"))
    assert max(each) > 1.4 * sum(each) / parts


@pytest.mark.parametrize("order", ["zigzag", "blocks"])
@pytest.mark.parametrize(("parts", "total"), [(2, 1), (3, 2), (3, 11), (4, 16), (1, 5)])
def test_rows_come_back_in_order(order: str, parts: int, total: int) -> None:
    x = torch.randn(2, total, 3)
    last = torch.tensor([total - 1, total // 2])

    def rank(number: int) -> object:
        def body(communicator: ThreadCommunicator) -> tuple[Tensor, Tensor]:
            mine = take_rows(x, number, parts=parts, axes=("sp",), dim=1, kind="sequence", order=order)
            channel = communicator.channel("sp", node="n")
            options = {"dim": 1, "order": order}
            whole = COMMUNICATING[collect_rows].run(channel, mine, total, **options)
            found = own_last_token(mine, last, total, number, parts=parts, axes=("sp",), order=order)
            return whole, channel.all_reduce(found)

        return body

    for found in run(ThreadGroup(Mesh.of(sp=parts)), *map(rank, range(parts))):  # type: ignore[arg-type]
        assert isinstance(found, tuple)
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], x[torch.arange(2), last][:, None])


def test_what_other_ranks_rows_hold_does_not_reach_the_last_token() -> None:
    rows = torch.full((1, 2, 3), torch.nan)
    found = own_last_token(rows, torch.tensor([7]), 8, 1, parts=2, axes=("sp",))
    assert torch.equal(found, torch.zeros(1, 1, 3))
