"""Attention to parts of the keys by kernels of GPUs, and a cache that ranks share out, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.ops.attention import attention
from runtime.ops.kernels.merge.merge_part import can_merge
from runtime.ops.rows.partial_attention import Merged, partial_attention
from runtime.ops.rows.token_order import TokenOrder
from runtime.program.shards import StateShard
from tests.runtime.kv_cache.sharded_cases import of_tokens, on_one, text, tokens
from tests.runtime.ops.rows.sp_cases import drawn, on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "value"), [(128, 128), (96, 64), (20, 12)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"masked": True}, {"softcap": 20.0}])
def test_parts_are_the_whole(dtype: torch.dtype, width: int, value: int, options: dict[str, Any]) -> None:
    size, heads, kv = 131, 8, 2
    q, k, v = drawn(2, heads, size, width), drawn(2, kv, size, width, seed=1), drawn(2, kv, size, value, seed=2)
    q, k, v = (each.to(dtype).double() for each in (q, k, v))
    options, mask = dict(options), None
    if options.pop("masked", False):
        mask = torch.zeros(2, 1, size, size, dtype=torch.float64)
        mask[:, :, 7, :100] = -torch.inf  # sees nothing of the first part
        mask[:, :, 9] = -torch.inf
        mask[:, :, 9, 120] = 0
    expected = attention(q, k, v, mask, scale=0.1, **options)
    merged, on_gpu = Merged(q.to("cuda", dtype), value), [each.to("cuda", dtype) for each in (q, k, v)]
    causal = options.pop("causal", False)
    for part in (slice(0, 100), slice(100, size)):
        for rows in (slice(0, 100), slice(100, size)):
            if causal and part.start > rows.start:
                continue
            shown = None if mask is None else mask[..., rows, part].to("cuda", dtype)
            found = partial_attention(
                on_gpu[0][:, :, rows], on_gpu[1][:, :, part], on_gpu[2][:, :, part],
                scale=0.1, mask=shown, causal=causal and part == rows, **options,
            )  # fmt: skip
            merged.add(*found, rows)
    assert can_merge(merged.out, merged.out)
    assert relative(merged.out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("prompts", [(1,), (5, 17)])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"softcap": 2.0}])
def test_steps_from_fixed_memory(prompts: tuple[int, ...], options: dict[str, Any]) -> None:
    runs, rows, parts = text(prompts, 40, 4), len(prompts), 3
    expected = on_one(runs, rows, **options)

    def body(communicator: ThreadCommunicator) -> list[Tensor]:
        states = [
            StateShard(f"s.{name}", (2, width), torch.float32, None, token_axes=("sp",))
            for name, width in (("key", 6), ("value", 4))
        ]
        cache = ShardedCache(
            states, max_batch=2, max_length=80, step=40, device=torch.device("cuda"), parts=parts,
            coordinate=communicator.rank,
        )  # fmt: skip
        channel = communicator.channel("sp", node="attend")
        given = {"state": "s", "parts": parts, "scale": 0.4, **options}
        prefill = cache.bind_over_ranks(channel, {**given, "how": "ring"})
        decode = cache.bind_over_ranks(channel, {**given, "how": "merge"})
        found = []
        for run in runs:
            whole = [each.float().cuda() for each in tokens(run, rows)]
            positions = run.batch().positions.cuda()
            if run.decode:
                cache.begin_fixed(positions, 80)
                found.append(decode(*whole, positions, None, None))
                continue
            own = TokenOrder.of(max(run.counts), parts).positions(communicator.rank)
            cache.begin(run.batch())
            prefill(*(each[:, :, own] for each in whole), positions[:, own], None, None)
        return found

    each = on_ranks(ThreadGroup(Mesh.of(sp=parts)), *[body] * parts)
    steps = [(run, wanted) for run, wanted in zip(runs, expected, strict=True) if run.decode]
    for outs in zip(*each, strict=True):
        assert all(torch.equal(outs[0], out) for out in outs)
    for out, (run, wanted) in zip(each[0], steps, strict=True):
        for one, other in zip(of_tokens(run, out), wanted, strict=True):
            assert relative(one, other) < 1e-4
