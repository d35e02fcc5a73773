import itertools

import pytest
import torch
from torch.nn import functional

from runtime.ops.embedding import vocab_parallel_embedding
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton


@pytest.mark.parametrize("ends", [[0, 4, 7], [0, 3, 3, 7], [0, 0, 7], [0, 7, 7]])
def test_the_ranks_sum_to_the_whole(ends: list[int]) -> None:
    weight, ids = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    parts = [vocab_parallel_embedding(ids, weight[a:b], start=a) for a, b in itertools.pairwise(ends)]
    assert torch.equal(sum(parts), functional.embedding(ids, weight))


def test_rows_of_another_rank_are_zero() -> None:
    weight = torch.ones(2, 3)
    result = vocab_parallel_embedding(torch.tensor([[3, 4, 5, 6]]), weight, start=4)
    assert result[0, :, 0].tolist() == [0, 1, 1, 0]


@needs_triton
@pytest.mark.slow
def test_the_kernel_says_the_same() -> None:
    assert_interpreted("""
import torch
from runtime.ops.embedding import _by_kernel, vocab_parallel_embedding
weight, ids = torch.randn(7, 1500), torch.tensor([[3, 9], [12, 16]])
assert torch.equal(_by_kernel(ids, weight, 9), vocab_parallel_embedding(ids, weight, start=9))
assert not torch.equal(_by_kernel(ids, weight, 9), vocab_parallel_embedding(ids, weight, start=8))
""")
