"""Rows of several sequences along one dim: each rank takes, collects and sums its own of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.rows.share_rows import collect, scatter, take_rows
from tests.runtime.ops.rows.sp_cases import on_ranks

BATCH, WIDTH = 2, 3


def on_all(parts: int, body: Any) -> list[Any]:
    return on_ranks(
        ThreadGroup(Mesh.of(sp=parts)), *[lambda communicator: body(communicator.channel("sp", node="rows"))] * parts
    )


@pytest.mark.parametrize("order", ["blocks", "zigzag"])
@pytest.mark.parametrize(("parts", "size"), [(2, 7), (3, 2), (3, 12), (2, 1)])
def test_several_sequences_along_one_dim_are_as_if_apart(parts: int, size: int, order: str) -> None:
    x = torch.arange(BATCH * size * WIDTH, dtype=torch.float64).reshape(BATCH, size, WIDTH)
    flat = x.flatten(0, 1)
    options: Any = {"parts": parts, "axes": ("sp",), "kind": "sequence", "order": order}
    taken = [take_rows(flat, rank, BATCH, dim=0, **options) for rank in range(parts)]
    for rank, mine in enumerate(taken):
        assert torch.equal(mine, take_rows(x, rank, dim=1, **options).flatten(0, 1))
    if parts * 2 <= size:
        assert not torch.equal(taken[0], take_rows(flat, 0, dim=0, **options))  # of all tokens as if they were one's

    def together(channel: Any) -> Any:
        return collect(channel, taken[channel.coordinate], size, BATCH, dim=0, order=order)

    assert all(torch.equal(each, flat) for each in on_all(parts, together))


@pytest.mark.parametrize("order", ["blocks", "zigzag"])
@pytest.mark.parametrize(("parts", "size"), [(2, 7), (3, 2), (4, 8)])
def test_a_sum_is_dealt_out_in_either_order(parts: int, size: int, order: str) -> None:
    x = torch.randn(parts, BATCH * size, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    options: Any = {"kind": "sequence", "order": order, "dim": 0}

    def own(channel: Any) -> Any:
        return scatter(channel, x[channel.coordinate], BATCH, **options)

    found = on_all(parts, own)
    for rank, mine in enumerate(found):
        wanted = take_rows(x.sum(0), rank, BATCH, parts=parts, axes=("sp",), **options)
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
