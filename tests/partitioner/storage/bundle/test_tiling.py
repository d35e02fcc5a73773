"""Blocks that fill a shape, against counting."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from partitioner.storage.bundle.format.tiling import is_filled
from runtime.program.shards import Block, at


def counted(shape: tuple[int, ...], blocks: list[Block]) -> bool:
    times = torch.zeros(shape, dtype=torch.int64)
    for block in blocks:
        times[at(block)] += 1
    return bool((times == 1).all())


@st.composite
def cut(draw: st.DrawFn, block: Block) -> list[Block]:
    """The block in parts, cut again and again in some dim."""
    dims = [dim for dim, (start, stop) in enumerate(block) if stop - start > 1]
    if not dims or draw(st.integers(0, 3)) == 0:
        return [block]
    dim = draw(st.sampled_from(dims))
    start, stop = block[dim]
    middle = draw(st.integers(start + 1, stop - 1))
    halves = [(start, middle), (middle, stop)]
    return [part for half in halves for part in draw(cut((*block[:dim], half, *block[dim + 1 :])))]


@given(st.data())
def test_against_counting(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    blocks = data.draw(st.permutations(data.draw(cut(tuple((0, size) for size in shape)))))
    assert is_filled(shape, blocks)
    assert not is_filled(shape, blocks[1:])
    assert not is_filled(shape, [*blocks, blocks[0]])
    # as many elements, but elsewhere
    moved = [
        tuple(
            (a, b) if b == size or data.draw(st.booleans()) else (a + 1, b + 1)
            for (a, b), size in zip(block, shape, strict=True)
        )
        for block in blocks
    ]
    assert is_filled(shape, moved) == counted(shape, moved)


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=2), max_size=5))
def test_blocks_from_nowhere(given: list[list[tuple[int, int]]]) -> None:
    blocks: list[Block] = [tuple((min(ends), max(ends)) for ends in block) for block in given]
    assert is_filled((3, 3), blocks) == counted((3, 3), blocks)


def test_nothing_and_scalars() -> None:
    assert is_filled((0, 4), [])
    assert is_filled((), [()])
    assert not is_filled((), [])
    assert not is_filled((), [(), ()])
    assert not is_filled((2,), [])


@pytest.mark.parametrize("dims", [1, 2])
def test_many_blocks(dims: int) -> None:
    ends = list(itertools.pairwise(range(0, 4001, 100 if dims == 2 else 1)))
    blocks = list(itertools.product(ends, repeat=dims))
    assert math.prod([len(ends)] * dims) == len(blocks)
    assert is_filled((4000,) * dims, blocks)
    assert not is_filled((4000,) * dims, blocks[:-1])
