"""What ranks bring to every primitive, and what must come back to each: the same on every rank, from seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.ops.communicating import Kind

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = (0, 1, 3, 4, 7, 4096, 4100, 100_003, 262_144, 3_000_001)


@dataclass
class Case:
    """`brought[rank]`, and what must come back there; `operands[rank]`: what the primitive is called with besides."""

    kind: Kind
    brought: list[Tensor]
    expected: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    operands: Sequence[tuple[Any, ...]] = ()

    def __str__(self) -> str:
        x = self.brought[0]
        return f"{self.kind} {self.options or ''} of {list(x.shape)} {x.dtype} {self.operands or ''}"

    def check(self, rank: int, found: Tensor, how: str) -> None:
        expected = self.expected[rank]
        assert found.shape == expected.shape, (f"rank {rank}, {how}: {self}", found.shape, expected.shape)
        wrong = int((found != expected).sum())
        assert not wrong, f"rank {rank}, {how}: {self}: {wrong} of {found.numel()} wrong"


def brought(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)
    return torch.randint(-100, 100, shape, generator=generator, device="cuda").to(dtype)


def summed(parts: list[Tensor]) -> Tensor:
    """In order of rank; halves in float32, rounded once."""
    dtype = parts[0].dtype
    total = parts[0].float() if dtype in (torch.bfloat16, torch.float16) else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def sums(num_ranks: int) -> Iterator[Case]:
    for seed, size in enumerate(SIZES):
        for dtype in (*FLOATS, torch.int32, torch.int64):
            parts = [brought(rank, (size,), dtype, seed) for rank in range(num_ranks)]
            yield Case("all_reduce", parts, [summed(parts)] * num_ranks)
    # no wide load may begin here, and not on all ranks
    parts = [brought(rank, (4096,), torch.bfloat16, 3) for rank in range(num_ranks)]
    shifted = [torch.cat([x.new_zeros(1 + rank), x])[1 + rank :] for rank, x in enumerate(parts)]
    yield Case("all_reduce", shifted, [summed(parts)] * num_ranks)
    parts = [brought(rank, (64, 33), torch.bfloat16, 4).t() for rank in range(num_ranks)]
    yield Case("all_reduce", parts, [summed(parts)] * num_ranks)
    parts = [brought(rank, (5000,), torch.bfloat16, 5) for rank in range(num_ranks)]
    yield Case("all_reduce", parts, [summed(parts)] * num_ranks, {"overwrite": True})


def pieces(num_ranks: int) -> Iterator[Case]:
    for seed, (shape, at) in enumerate([((8,), 0), ((3, 5), 0), ((4, 6, 7), 1), ((1, 2048), 1), ((999, 700), 1)]):
        for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.uint8):
            parts = [brought(rank, shape, dtype, seed) for rank in range(num_ranks)]
            yield Case("all_gather", parts, [torch.cat(parts, at)] * num_ranks, {"dim": at})
            yield Case("permute", parts, [parts[rank - 1] for rank in range(num_ranks)], {"shift": 1})
        sizes = [rank + 1 for rank in range(num_ranks)]
        uneven = [brought(rank, _with(shape, at, rank + 1), torch.bfloat16, seed) for rank in range(num_ranks)]
        yield Case("all_gather", uneven, [torch.cat(uneven, at)] * num_ranks, {"dim": at, "sizes": sizes})
        whole = _with(shape, at, 5 * num_ranks)
        parts = [brought(rank, whole, torch.float32, seed) for rank in range(num_ranks)]
        total = summed(parts)
        yield Case("reduce_scatter", parts, list(total.chunk(num_ranks, at)), {"dim": at})
        sizes = [5 * num_ranks - (num_ranks - 1) * 3, *[3] * (num_ranks - 1)]
        yield Case("reduce_scatter", parts, list(total.split(sizes, at)), {"dim": at, "sizes": sizes})


def exchanges(num_ranks: int) -> Iterator[Case]:
    ranks = range(num_ranks)
    tables = [
        [[2] * num_ranks] * num_ranks,
        [[i * j % 5 for j in ranks] for i in ranks],
        [[300 * i + 50 * j + 1 for j in ranks] for i in ranks],
    ]
    for seed, width in enumerate((1, 7, 4096)):
        for counts in tables:
            rows = [brought(rank, (sum(counts[rank]), width), torch.bfloat16, seed) for rank in ranks]
            received = [[counts[source][rank] for source in ranks] for rank in ranks]
            expected = [torch.cat([rows[source].split(counts[source])[rank] for source in ranks]) for rank in ranks]
            yield Case("all_to_all", rows, expected, {}, [(counts[rank], received[rank]) for rank in ranks])


def _with(shape: tuple[int, ...], at: int, size: int) -> tuple[int, ...]:
    return (*shape[:at], size, *shape[at + 1 :])
