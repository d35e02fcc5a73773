"""Products that push their partial sums to all ranks and take the sums there, in Triton's interpreter: however far one
rank is ahead of another, all get the bits of an all-reduce. The words of PTX that wait are stood in for: they look.
"""

from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

INTERPRETED = """
import ctypes, random
import numpy as np
import torch
from triton.runtime.errors import InterpreterError
from runtime.ops.kernels.decode import few_rows_kernel, partial_sums_kernel
from runtime.ops.kernels.decode.few_rows import PartialSums, few_rows, push_few_rows

class NotThere(Exception):
    pass

def await_units(address, ones, tops, late, abandoned, patience_ns):
    for at in np.unique(address.handle.data.reshape(-1)):
        words = np.frombuffer((ctypes.c_uint32 * 4).from_address(int(at)), dtype=np.uint32)
        if (words == 2**32 - 1).any():
            raise NotThere

partial_sums_kernel.await_units = await_units
CALLS, WIDTHS, PART = 5, (16, 8), 4 * 2 * 16

def check(count, rows, seed, waits=True, slots=3):
    partial_sums_kernel._SLOTS.value = slots
    random.seed(seed)
    torch.manual_seed(seed)
    memory = [torch.full((64 + 3 * count * PART,), 255, dtype=torch.uint8) for _ in range(count)]
    table = torch.tensor([each.data_ptr() for each in memory])
    ends = [PartialSums(table, torch.zeros(4, dtype=torch.int64), 64, PART, rank, count, 0, 0, 0)
            for rank in range(count)]
    given = []
    for call in range(CALLS):
        width = WIDTHS[call % 3 == 2]
        # uneven shards, of which one has nothing
        shards = [(torch.randn(rows, 8 * rank), torch.randn(width, 8 * rank)) for rank in range(count)]
        given.append((shards, torch.randn(rows, width), torch.randn(3, width), torch.randn(width)))
    done, found = [0] * count, [[] for _ in range(count)]
    while min(done) < 2 * CALLS:
        rank = random.randrange(count)
        call, pulls = divmod(done[rank], 2)
        if call == CALLS or (waits and pulls and min(done) < done[rank]):
            continue  # it is through, or waits for what another has not pushed
        shards, residual, weight, norm = given[call]
        if pulls:
            found[rank].append(few_rows(residual, weight, added=ends[rank], norm=(norm, 1e-5)))
        else:
            push_few_rows(ends[rank], *shards[rank])
        done[rank] += 1
    for call, (shards, residual, weight, norm) in enumerate(given):
        parts = [x @ w.T for x, w in shards]
        exact = residual + sum(parts)
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * norm
        for total, out in (found[rank][call] for rank in range(count)):
            assert torch.equal(total, found[0][call][0])
            torch.testing.assert_close(total, exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out, normed @ weight.T, rtol=1e-4, atol=1e-4)

check(2, 1, 0)
check(3, 2, 1)

def fails(*given, **named):
    try:
        check(*given, **named)
    except (InterpreterError, AssertionError):
        return True
    return False

# negative controls: nobody waits; two slots, of which one is cleared while another rank may have pushed there
assert fails(2, 1, 0, waits=False)
assert fails(2, 1, 2, slots=2)
"""


@needs_triton
def test_ranks_that_are_ahead_of_others_get_the_same_sums() -> None:
    assert_interpreted(INTERPRETED)
