"""Chains of moves on windows against the same moves on tensors."""

import math
import random

import pytest
import torch
from torch import Tensor

from partitioner.storage.checkpoint.strided_windows import Moved, concatenate, narrow, permute, piece, reshape, whole
from runtime.program.shards import Piece, at
from runtime.weights.strided_reads import Strided


def evaluate(moved: Moved, files: dict[str, Tensor]) -> Tensor:
    out = torch.full(moved.shape, -1)
    for window in moved.windows:
        counts = [stop - start for start, stop in window.block]
        target = out[at(window.block)]
        assert (target == -1).all(), "windows overlap"
        target.copy_(files[window.tensor].reshape(-1).as_strided(counts, window.strides, window.offset))
    return out


def read(pieces: list[Piece], shape: tuple[int, ...], files: dict[str, Tensor], limit: int, shortest: int) -> Tensor:
    """As the runtime reads: strips, runs, a buffer."""
    out = torch.full(shape, -1)
    for part in pieces:
        flat = files[part.tensor].reshape(-1)
        spot = Strided.of(part, tuple(files[part.tensor].shape))
        assert spot is not None
        for strip in spot.strips(limit, shortest):
            plan = strip.plan(shortest)
            buffer = torch.cat([flat[first : first + length] for first, length in plan.runs])
            assert plan.elements == buffer.numel()
            counts = [stop - start for start, stop in strip.destination]
            out[at(strip.destination)] = buffer.as_strided(counts, plan.strides)
    return out


def factors(count: int, draw: random.Random) -> list[int]:
    found: list[int] = []
    while count > 1 and len(found) < 4:
        found.append(draw.choice([n for n in range(1, count + 1) if count % n == 0]))
        count //= found[-1]
    return [*found, count]


def any_move(moved: Moved, tensor: Tensor, draw: random.Random) -> tuple[Moved, Tensor]:
    kind = draw.choice(["permute", "reshape", "narrow"])
    dims = list(range(tensor.ndim))
    if kind == "permute":
        draw.shuffle(dims)
        return permute(moved, dims), tensor.permute(dims)
    if kind == "narrow" and dims:
        dim, step = draw.choice(dims), draw.choice([1, 1, 2])
        start = draw.randrange(tensor.shape[dim])
        stop = draw.randint(start + 1, tensor.shape[dim])
        return narrow(moved, dim, start, stop, step=step), tensor[(slice(None),) * dim + (slice(start, stop, step),)]
    shape = factors(tensor.numel(), draw)
    return reshape(moved, shape), tensor.reshape(shape)


@pytest.mark.parametrize("seed", range(300))
def test_any_chain_of_moves(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.choice([1, 2, 3, 4, 6]) for _ in range(draw.randint(1, 3)))
    count = math.prod(shape)
    files = {f"t{i}": torch.arange(count).reshape(shape) + 1000 * i for i in range(draw.randint(1, 3))}
    dim = draw.randrange(len(shape))
    moved = concatenate([whole(name, shape) for name in files], dim)
    tensor = torch.cat(list(files.values()), dim)
    for _ in range(draw.randint(0, 6)):
        moved, tensor = any_move(moved, tensor, draw)
    assert moved.shape == tuple(tensor.shape)
    assert torch.equal(evaluate(moved, files), tensor)

    block = tuple((low := draw.randrange(size), draw.randint(low + 1, size)) for size in tensor.shape)
    pieces = [piece(window, shape, [0] * len(block)) for window in moved.block(block)]
    wanted = tensor[at(block)]
    for part in pieces:
        inside = files[part.tensor][at(part.source)]
        values = wanted[at(part.destination)]
        assert torch.isin(values.contiguous(), inside.contiguous()).all(), "the source block says where they lie"
        if part.strides is None:
            assert torch.equal(inside.reshape(values.shape), values)
    for limit, shortest in ((1, 1), (5, 2), (100, 8), (7, 100)):
        assert torch.equal(read(pieces, tuple(wanted.shape), files, limit, shortest), wanted)


def test_one_tensor_per_expert_is_one_plain_piece_each() -> None:
    stacked = concatenate([reshape(whole(f"e{i}", (4, 6)), (1, 4, 6)) for i in range(3)], 0)
    (window,) = stacked.block(((1, 2), (0, 2), (0, 6)))
    assert piece(window, (4, 6), (5, 0, 0)) == Piece("e1", ((0, 2), (0, 6)), ((5, 6), (0, 2), (0, 6)))


def test_a_transposed_block_says_its_steps() -> None:
    (window,) = permute(whole("w", (4, 6)), (1, 0)).block(((2, 4), (0, 4)))
    assert piece(window, (4, 6), (0, 0)) == Piece("w", ((0, 4), (2, 4)), ((0, 2), (0, 4)), 2, (1, 6))


def test_rows_in_pairs_become_two_windows_per_head() -> None:
    """Rotary rows: interleaved pairs become halves."""
    rows, heads, half = 8, 2, 2
    moved = reshape(permute(reshape(whole("w", (rows, 3)), (heads, half, 2, 3)), (0, 2, 1, 3)), (rows, 3))
    assert len(moved.windows) == 2 * heads
    tensor = torch.arange(rows * 3).reshape(rows, 3)
    expected = tensor.view(heads, half, 2, 3).transpose(1, 2).reshape(rows, 3)
    assert torch.equal(evaluate(moved, {"w": tensor}), expected)


@pytest.mark.parametrize(
    "part",
    [
        Piece("w", ((0, 5),), ((0, 5),)),
        Piece("w", ((0, 5), (0, 6)), ((0, 5), (0, 6))),
        Piece("w", ((0, 4), (0, 6)), ((0, 6), (0, 4))),
        Piece("w", ((0, 4), (0, 6)), ((0, 6), (0, 4)), 1, (1, 6)),
        Piece("w", ((0, 4), (0, 6)), ((0, 6), (0, 4)), 0, (1,)),
        Piece("w", ((0, 4), (0, 6)), ((0, 6), (0, 4)), 23, (-1, -6)),
    ],
    ids=["dims", "rows", "extents", "offset", "strides", "negative"],
)
def test_a_piece_that_reaches_beyond_its_tensor_is_none(part: Piece) -> None:
    assert Strided.of(part, (4, 6)) is None
