"""The kernels of the likeliest token in Triton's interpreter, against torch op by op."""

from __future__ import annotations

import pytest

from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

CODE = """
import torch
from runtime.sampling.likeliest import likeliest_kernel
from runtime.sampling.likeliest.likeliest_tokens import best, largest
from runtime.sampling.vocabulary_search import _first_best

def same(found, wanted):
    return torch.equal(found.double().nan_to_num(7e7), wanted.double().nan_to_num(7e7))

torch.manual_seed(0)
for rows, columns in ((1, 5000), (3, 1500), (2, 7)):
    logits = torch.randn(rows, columns + 3)[:, :columns]
    logits[0, 5] = logits[0, columns - 1] = logits[0].max() + 1  # the first of equal ones
    if rows == 3:
        logits[1, 40], logits[2] = float("nan"), -torch.inf
    tokens = torch.arange(columns) * 3 + 5
    message, (values, places) = largest(logits, tokens), logits.max(1)
    assert same(message[0, :, 0], values)
    assert same(message[0, :, 1], tokens[places])
assert largest(torch.tensor([[-0.0, 0.0, -1.0]]), torch.arange(3))[0, 0, 1] == 0
for ranks, rows in ((1, 1), (3, 5), (2, 3)):
    messages = torch.stack([torch.randint(0, 3, (ranks, rows)), torch.randint(0, 99, (ranks, rows))], -1).double()
    if ranks == 2:
        messages[0, 1, 0] = float("nan")
    told = best(messages)
    assert same(told[0], _first_best(*messages.unbind(2))[0])
    assert same(told[1], messages[..., 0].amax(0))
    assert told[2].eq(1).all()
    assert told[3].eq(0).all()
ids, positions, steps = torch.zeros(3, 1).long(), torch.ones(3, 1).long(), torch.zeros(3, 3).long()
told = torch.tensor([[5.0, 7.0, 9.0]] * 4).double()
likeliest_kernel.advance[(1,)](told, ids, positions, steps[2], ROWS=3, ROWS_PADDED=4)
assert ids[:, 0].tolist() == [5, 7, 9]
assert positions[:, 0].tolist() == [2, 2, 2]
assert steps.tolist() == [[0] * 3, [0] * 3, [1] * 3]
"""


@needs_triton
@pytest.mark.slow
def test_kernels_say_what_the_ops_say() -> None:
    assert_interpreted(CODE)


@needs_triton
@pytest.mark.slow
def test_the_last_of_equal_ones_is_noticed() -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match="AssertionError"):
        assert_interpreted(CODE.replace("logits.max(1)\n", "logits.flip(1).max(1)\n"))
