"""Sums of few rows with residual and norm behind them, in Triton's interpreter: two ranks, one after the other."""

import pytest

from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

CODE = """
import ctypes

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle
from runtime.communication.peer_memory import small_kernel
from runtime.communication.peer_memory.rows import few_row_sums_kernel as kernel

UNITS, BLOCKS = 4, 64
AREA = 2 * BLOCKS * UNITS * 16
MUST = False

def each(*given):
    arrays = [np.asarray(x.handle.data) for x in given]
    return zip(*(x.reshape(-1).tolist() for x in np.broadcast_arrays(*arrays)))

def put_words(address, low, high, number, ok):
    for at, first, second, count, sends in each(address, low, high, number, ok):
        if sends:
            ctypes.memmove(int(at), np.array([first, count, second, count], np.int32).ctypes.data, 16)

def await_words(address, number, ok, late, abandoned, patience_ns):
    words = np.zeros((len(address.handle.data), 2), np.int32)
    for place, (at, count, awaits) in enumerate(each(address, number, ok)):
        first, one, second, two = (ctypes.c_int32 * 4).from_address(int(at))
        if awaits:
            assert not MUST or one == two == count, "it has not come"
            words[place] = first, second
    of = tl.block_type(tl.int32, [len(words)])
    return tuple(tl.tensor(TensorHandle(words[:, half].copy(), tl.int32), of) for half in (0, 1))

for each_kernel in (kernel, small_kernel):
    each_kernel.put_words, each_kernel.await_words = put_words, await_words

def off(rows, width, dtype, weighted, calls=3):
    global MUST
    torch.manual_seed(0)
    memory = [torch.zeros(2 * AREA, dtype=torch.uint8) for _ in range(2)]
    table = torch.tensor([each.data_ptr() for each in memory])
    counters = [torch.zeros(BLOCKS, dtype=torch.int32) for _ in range(2)]
    worst = 0.0
    for call in range(calls):
        xs = [torch.randn(rows, width).to(dtype) for _ in range(2)]
        residual, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
        words = [x.view(-1).view(torch.int64) for x in (residual, weight)]
        made = {}

        def run(rank):
            out = [torch.empty(rows, width, dtype=dtype) for _ in range(2)]
            kernel.sum_norm_of_few[(rows,)](
                xs[rank].view(-1).view(torch.int64), *words, *(x.view(-1).view(torch.int64) for x in out), table,
                counters[rank], 0, 0, 0, width // 4, 1e-5, RANK=rank, RANKS=2, WEIGHTED=weighted,
                KIND=str(dtype).partition(".")[2], UNITS=UNITS, BLOCKS=BLOCKS,
                PADDED=1 << (width // 4 - 1).bit_length(), EARLY=False,
            )
            made[rank] = out

        before = counters[0].clone()
        MUST = False
        run(0)  # which reads what the other rank has not sent yet
        counters[0].copy_(before)
        MUST = True
        run(1)
        run(0)
        total = (xs[0].float() + xs[1].float() + residual.float()).to(dtype)
        exact = total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + 1e-5)
        exact = exact * weight.double() if weighted else exact
        for found, normed in made.values():
            # the interpreter cuts bfloat16 off where GPUs round
            torch.testing.assert_close(found, total, rtol=0.0 if dtype == torch.float16 else 2**-7, atol=0.0)
            worst = max(worst, float((normed.double() - exact).abs().max()))
        assert all(torch.equal(*both) for both in zip(*made.values()))
        used = rows * width // 16
        assert all((each[:used] == call + 1).all() and not each[used:].any() for each in counters)
    return worst

def off_with_residual(numbers, dtype, adds=True):
    global MUST
    torch.manual_seed(0)
    memory = [torch.zeros(2 * AREA, dtype=torch.uint8) for _ in range(2)]
    table = torch.tensor([each.data_ptr() for each in memory])
    counters = [torch.zeros(BLOCKS, dtype=torch.int32) for _ in range(2)]
    xs, residual = [torch.randn(numbers).to(dtype) for _ in range(2)], torch.randn(numbers).to(dtype)
    made = {}

    def run(rank):
        made[rank], piece = torch.empty(numbers, dtype=dtype), numbers // 4
        small_kernel.small[(-(-piece // UNITS),)](
            *(x.view(torch.int64) for x in (xs[rank], made[rank], residual)), table, counters[rank], 0, 0, 0, piece,
            piece, RANK=rank, RANKS=2, SPREADS=False, KIND=str(dtype).partition(".")[2], ADDS=adds, SHIFT=0,
            UNITS=UNITS, BLOCKS=BLOCKS, EARLY=False,
        )

    MUST = False
    run(0)  # which reads what the other rank has not sent yet
    counters[0].zero_()
    MUST = True
    run(1)
    run(0)
    assert torch.equal(made[0], made[1])
    exact = xs[0].double() + xs[1].double() + residual.double()
    return float((made[0].double() - exact).abs().max())
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["3, 64, torch.bfloat16, True", "2, 48, torch.float16, False", "1, 16, torch.bfloat16, False"]
)
def test_sums_with_their_norms(case: str) -> None:
    assert_interpreted(f"{CODE}\nassert off({case}) < 0.05")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_takes_the_residual(dtype: str) -> None:
    # the interpreter cuts bfloat16 off where GPUs round
    assert_interpreted(
        f"{CODE}\nassert off_with_residual(36, torch.{dtype}) < {0.04 if dtype == 'bfloat16' else 0.003}\n"
        f"assert off_with_residual(36, torch.{dtype}, adds=False) > 0.1"
    )


@needs_triton
@pytest.mark.slow
def test_a_word_that_has_not_come_is_noticed() -> None:
    """The negative control."""
    lost = "put_words = lambda *given: None\nkernel.put_words = put_words"
    assert_interpreted(
        f"{CODE}\n{lost}\ntry:\n    off(3, 64, torch.bfloat16, True)\nexcept Exception as error:\n"
        "    assert 'has not come' in f'{error.__cause__} {error}', error\nelse:\n    raise AssertionError"
    )
