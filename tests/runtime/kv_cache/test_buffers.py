"""A cache takes memory when it is written to, not before."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from runtime.kv_cache.batch import Batch
from runtime.kv_cache.buffers import untouched_zeros
from runtime.kv_cache.cache import Cache
from runtime.ops.state import cache_append
from runtime.program.shards import StateShard

CPU = torch.device("cpu")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_pages_come_when_they_are_written_to(dtype: torch.dtype) -> None:
    before = resident()
    found = untouched_zeros((4, 1 << 16, 256), dtype=dtype, device=CPU)
    assert found.nbytes >= 1 << 27
    assert resident() - before < found.nbytes // 8
    assert not found[1, ::1000].any()
    found[2].fill_(1)
    assert resident() - before > found.nbytes // 5
    assert found.sum(dtype=torch.float64) == found[0].numel()


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (1 << 18, 2)])
def test_they_are_zeros_of_their_shape(shape: tuple[int, ...]) -> None:
    found = untouched_zeros(shape, dtype=torch.float32, device=CPU)
    assert torch.equal(found, torch.zeros(shape))


def test_more_than_there_is_fails_as_torch_does() -> None:
    with pytest.raises((RuntimeError, MemoryError)):
        untouched_zeros((1 << 40, 1 << 10), dtype=torch.float32, device=CPU)


def test_a_cache_of_which_little_is_used_takes_little() -> None:
    """What is appended is zero again for the next text, without all of it being written."""
    state = StateShard("s", (2, 64), torch.float32, per_token=True, sees=None)
    before = resident()
    cache = Cache([state], max_batch=1, max_length=1 << 20, step=8, device=CPU)
    append = cache.bind(cache_append, "s", {})
    assert cache.bytes == 1 << 29
    for value in (1.0, 2.0):
        cache.start()
        assert not cache.buffers["s"].narrow(2, 0, 1000).any()
        cache.begin(Batch(torch.arange(8)[None], (0,), (8,), (True,)))
        held = append(torch.full((1, 2, 8, 64), value), torch.arange(8)[None], torch.arange(10))
        assert held[0, 0, :, 0].tolist() == [value] * 8 + [0.0] * 2
    assert resident() - before < cache.bytes // 8
