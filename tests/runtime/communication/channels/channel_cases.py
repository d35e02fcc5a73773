"""What every implementation of `Channel` must do: the same cases run over threads, gloo, shared memory and NCCL.

Each rank calls `every_primitive` with its own channel; what all bring is known to all.
"""

import pytest
import torch
from torch import Tensor

from partitioner.errors import CommunicationError
from runtime.communication.channels import Channel

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def piece(coordinate: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What a rank brings: whole numbers, so that every order of summing gives the same."""
    drawn = torch.randint(-50, 50, shape, generator=torch.Generator("cpu").manual_seed(100 + coordinate), device="cpu")
    return drawn.to(dtype).to(torch.get_default_device())


def every_primitive(channel: Channel) -> None:
    for dtype in DTYPES:
        _sums_and_gathers(channel, dtype)
        _exchanges(channel, dtype)
        _permutes(channel, dtype)
    sends(channel)
    refusals(channel)


def _sums_and_gathers(channel: Channel, dtype: torch.dtype) -> None:
    num_ranks, own = len(channel.ranks), channel.coordinate
    brought = [piece(i, 4, 2 * num_ranks, 3, dtype=dtype) for i in range(num_ranks)]
    total = torch.stack(brought).sum(0, dtype=dtype)
    mine = brought[own].clone()
    assert torch.equal(channel.all_reduce(mine), total)
    assert torch.equal(mine, brought[own]), "the operand has other readers"
    for dim in (0, 1, -1):
        assert torch.equal(channel.all_gather(mine, dim), torch.cat(brought, dim))
    found = channel.reduce_scatter(mine, 1)
    assert torch.equal(found, total.split(2, 1)[own])
    assert torch.equal(channel.reduce_scatter(mine.transpose(0, 1), 0), total.transpose(0, 1).split(2, 0)[own])
    for sizes in ([2, 1, 0, 3][:num_ranks], [0, 5, 0, 1][:num_ranks]):
        for dim in (0, 1, -1):
            shape = [3, 3, 3]
            shape[dim] = sum(sizes)
            whole = [piece(i, *shape, dtype=dtype) for i in range(num_ranks)]
            mine = whole[own].split(sizes, dim)[own]
            joined = torch.cat([each.split(sizes, dim)[i] for i, each in enumerate(whole)], dim)
            assert torch.equal(channel.all_gather(mine, dim, sizes), joined)
            scattered = torch.stack(whole).sum(0, dtype=dtype).split(sizes, dim)[own]
            assert torch.equal(channel.reduce_scatter(whole[own], dim, sizes), scattered)


def _exchanges(channel: Channel, dtype: torch.dtype) -> None:
    num_ranks, own = len(channel.ranks), channel.coordinate
    tables = [
        [[2] * num_ranks] * num_ranks,
        [[(i + 2 * j) % 3 for j in range(num_ranks)] for i in range(num_ranks)],  # uneven, with zeros
        [[0] * num_ranks] * num_ranks,
    ]
    for counts in tables:
        rows = [piece(i, sum(counts[i]), 2, dtype=dtype) for i in range(num_ranks)]
        received = [counts[i][own] for i in range(num_ranks)]
        found = channel.all_to_all(rows[own], counts[own], received, sizes_from="counts")
        assert torch.equal(found, torch.cat([rows[i].split(counts[i])[own] for i in range(num_ranks)]))


def _permutes(channel: Channel, dtype: torch.dtype) -> None:
    num_ranks, own = len(channel.ranks), channel.coordinate
    for rows in (3, 0):
        brought = [piece(i, 2, rows, dtype=dtype).t() for i in range(num_ranks)]
        for shift in (1, -1, 2, 0):
            mine = brought[own].clone()
            handle = channel.permute_begin(mine, shift)
            found = handle.finish()
            assert torch.equal(found, brought[(own - shift) % num_ranks])
            assert handle.finish() is found
    # several at once, finished in another order than begun
    first, second = channel.permute_begin(piece(own, 2), 1), channel.permute_begin(piece(own, 5), -1)
    assert torch.equal(second.finish(), piece((own + 1) % num_ranks, 5))
    assert torch.equal(first.finish(), piece((own - 1) % num_ranks, 2))
    for shift in (1, -1, 0):
        _permutes_again(channel, dtype, shift)


def _permutes_again(channel: Channel, dtype: torch.dtype, shift: int) -> None:
    """From memory that is written to between the turns; what came stays for one turn more."""
    num_ranks, own = len(channel.ranks), channel.coordinate
    memory = torch.empty(5, dtype=dtype)
    again, before = channel.persistent_permute(memory, shift), None
    for turn in range(5):
        memory.copy_(piece(10 * turn + own, 5, dtype=dtype))
        again.begin()
        beside = channel.permute_begin(memory + 1, shift)  # which comes behind it
        found = again.finish()
        sender = (own - shift) % num_ranks
        assert torch.equal(found, piece(10 * turn + sender, 5, dtype=dtype))
        assert torch.equal(beside.finish(), found + 1)
        if shift and before is not None:
            assert torch.equal(before, piece(10 * (turn - 1) + sender, 5, dtype=dtype))
        before = found


def sends(channel: Channel) -> None:
    """Along the chain of coordinates, two pieces each, the second begun before the first is finished."""
    own, last = channel.coordinate, len(channel.ranks) - 1
    for dtype, shape in ((torch.float64, (2, 3)), (torch.bfloat16, (4,)), (torch.int64, (0, 2))):
        if own > 0:
            coming = [channel.receive_begin(shape, dtype, own - 1) for _ in range(2)]
            for number, handle in reversed([*enumerate(coming)]):
                found = handle.finish()
                assert torch.equal(found, piece(10 * number + own - 1, *shape, dtype=dtype))
        if own < last:
            going = [channel.send_begin(piece(10 * n + own, *shape, dtype=dtype), own + 1) for n in range(2)]
            for handle in going:
                handle.finish().zero_()  # which the receiver must not see


def refusals(channel: Channel) -> None:
    """On every rank alike, before anything is exchanged."""
    num_ranks, own = len(channel.ranks), channel.coordinate
    with pytest.raises(CommunicationError, match=r"scatters dim 0 of .* as equal pieces"):
        channel.reduce_scatter(torch.ones(num_ranks + 1), 0)
    with pytest.raises(CommunicationError, match="which are not 3 together"):
        channel.reduce_scatter(torch.ones(3), 0, [1] * (num_ranks - 1) + [3])
    with pytest.raises(CommunicationError, match="it must send 3 rows"):
        channel.all_to_all(torch.ones(3), [1] * num_ranks + [0], [1] * num_ranks)
    with pytest.raises(CommunicationError, match="what it sends itself"):
        channel.all_to_all(torch.ones(num_ranks), [1] * num_ranks, [2] * num_ranks)
    for wrong in (own, num_ranks, -1):
        with pytest.raises(CommunicationError, match=f"names coordinate {wrong} over"):
            channel.send_begin(torch.ones(1), wrong)
        with pytest.raises(CommunicationError, match=f"names coordinate {wrong} over"):
            channel.receive_begin((1,), torch.float32, wrong)
