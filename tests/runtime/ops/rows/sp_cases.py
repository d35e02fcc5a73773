"""Attention over tokens that ranks share out, and over all of them on one rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from partitioner.sharding.mesh import Mesh
from runtime.communication.communicator import Communicator
from runtime.communication.matching_calls import Call
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.rows.sequence_attention import sequence_attention
from runtime.ops.rows.share_rows import in_order, take_rows
from runtime.ops.rows.token_order import TokenOrder
from tests.runtime.communication.channels.threads import run

F64 = torch.float64


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def tensors(
    batch: int, size: int, *, heads: int = 4, kv: int = 2, width: int = 6, value: int = 6, dtype: torch.dtype = F64
) -> list[Tensor]:
    """q, k and v of all tokens."""
    shapes = [(batch, heads, size, width), (batch, kv, size, width), (batch, kv, size, value)]
    return [drawn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


class Counting(ThreadGroup):
    """Counts the bytes that leave each rank, by kind, and how often ranks meet."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.sent: dict[tuple[int, str], int] = {}
        self.met: dict[tuple[int, str], int] = {}

    def exchange(self, members: tuple[int, ...], call: Call, x: Tensor) -> list[tuple[Call, Tensor]]:
        key = (call.rank, call.kind)
        leaving = x.nbytes
        if call.kind == "all_to_all":
            assert call.counts is not None
            row = x.element_size() * math.prod(x.shape[1:])
            leaving = row * sum(n for rank, n in zip(members, call.counts[0], strict=True) if rank != call.rank)
        elif call.kind == "all_gather":
            leaving *= len(members) - 1
        self.sent[key] = self.sent.get(key, 0) + leaving
        self.met[key] = self.met.get(key, 0) + 1
        return super().exchange(members, call, x)


def on_ranks(group: ThreadGroup, *bodies: Any) -> list[Any]:
    found = run(group, *bodies)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def mine(x: Tensor, rank: int, parts: int, order: str, dim: int = 2) -> Tensor:
    return take_rows(x, rank, parts=parts, axes=("sp",), dim=dim, kind="sequence", order=order)


def on_rank(
    communicator: Communicator,
    given: list[Tensor],
    *,
    order: str = "zigzag",
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """What one rank makes of its part of q, k and v."""
    number, parts, total = communicator.rank, communicator.mesh.size("sp"), given[0].shape[2]
    q, k, v = (mine(x, number, parts, order) for x in given)
    # heads come with all queries, and then a mask has all of them too
    is_whole = options["how"] == "ulysses" or mask is None or mask.dim() < 2 or mask.shape[-2] == 1
    rows = mask if is_whole else mine(mask, number, parts, order, -2)
    given_options = {"parts": parts, "order": order, **options}
    run = communicator.bind(sequence_attention, "sp", node="attend", options=given_options)
    return run(q, k, v, total, rows, sinks)  # type: ignore[no-any-return]


def over_ranks(given: list[Tensor], parts: int, *, group: ThreadGroup | None = None, **options: Any) -> Tensor:
    """What all ranks together make of it, in order of position."""
    found = on_ranks(
        group or ThreadGroup(Mesh.of(sp=parts)), *[lambda communicator: on_rank(communicator, given, **options)] * parts
    )
    return in_order(torch.cat(found, 2), TokenOrder.of(given[0].shape[2], parts, options.get("order", "zigzag")), 2)
