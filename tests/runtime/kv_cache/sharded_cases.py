"""Texts in pieces and steps, over a cache that ranks share out and over one of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partitioner.sharding.mesh import Mesh
from runtime.communication.communicator import Communicator
from runtime.communication.thread_communicator import ThreadGroup
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.ops.cached_attention import cached_attention
from runtime.ops.rows.token_order import TokenOrder
from runtime.program.shards import StateShard
from tests.runtime.ops.rows.sp_cases import drawn, on_ranks

CPU = torch.device("cpu")
F64 = torch.float64
HEADS, KV, WIDTH, VALUE = 4, 2, 6, 4
HOWS = ("ring", "gather", "ulysses")


@dataclass(frozen=True)
class Run:
    """What one run takes of each row: where it starts, and how many tokens."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    active: tuple[bool, ...] = ()
    decode: bool = False
    rows: slice | None = None

    def batch(self) -> Batch:
        last = torch.tensor(self.counts)[:, None] - 1
        positions = torch.tensor(self.starts)[:, None] + torch.arange(max(self.counts)).minimum(last)
        return Batch(positions, self.starts, self.counts, self.active)


def text(prompts: Sequence[int], step: int, steps: int) -> list[Run]:
    """Prompts in pieces of `step` tokens, as a conversation cuts them, and `steps` tokens behind each."""
    runs = []
    for start in range(0, max(prompts), step):
        starts = tuple(min(start, length - 1) for length in prompts)
        counts = tuple(max(1, min(length - at, step)) for length, at in zip(prompts, starts, strict=True))
        runs.append(Run(starts, counts, tuple(start < length for length in prompts)))
    ones = (1,) * len(prompts)
    return runs + [
        Run(tuple(p + at for p in prompts), ones, (True,) * len(prompts), decode=True) for at in range(steps)
    ]


def tokens(run: Run, rows: int, *, heads: int = HEADS, kv: int = KV) -> list[Tensor]:
    """q, k and v of a run's tokens; those of a position are the same whenever they come."""
    first = 0 if run.rows is None else run.rows.start
    size, found = max(run.counts), []
    for seed, shape in enumerate(((heads, WIDTH), (kv, WIDTH), (kv, VALUE))):
        all_tokens = drawn(8, 80, *shape, seed=seed)[first : first + rows]
        at = run.batch().positions
        found.append(all_tokens[torch.arange(rows)[:, None], at].transpose(1, 2))
        assert found[-1].shape[2] == size
    return found


def states(sees: int | None = None) -> list[StateShard]:
    shape = {"key": (KV, WIDTH), "value": (KV, VALUE)}
    return [StateShard(f"s.{name}", each, F64, sees, token_axes=("sp",)) for name, each in shape.items()]


def of_tokens(run: Run, out: Tensor) -> list[Tensor]:
    """Without filling, and without rows that take no token."""
    active = run.active or (True,) * len(run.counts)
    return [out[row, :, :count] for row, count in enumerate(run.counts) if active[row]]


def on_one(runs: Sequence[Run], rows: int, *, sees: int | None = None, **options: Any) -> list[list[Tensor]]:
    mask, sinks = options.pop("mask", None), options.pop("sinks", None)
    cache = Cache(states(sees), max_batch=8, max_length=80, step=40, device=CPU)
    attend = cache.bind(cached_attention, "s", {"scale": 0.4, **options}, masked=mask is not None)
    found = []
    for run in runs:
        cache.begin(run.batch(), rows=run.rows)
        found.append(of_tokens(run, attend(*tokens(run, rows), run.batch().positions, mask, sinks)))
    return found


def on_rank(
    communicator: Communicator,
    runs: Sequence[Run],
    rows: int,
    how: str,
    *,
    sees: int | None = None,
    order: str = "zigzag",
    step: int = 40,
    of: type[ShardedCache] = ShardedCache,
    **options: Any,
) -> tuple[list[Tensor], ShardedCache]:
    """What one rank makes of its part of each run."""
    mask, sinks = options.pop("mask", None), options.pop("sinks", None)
    number, parts = communicator.rank, communicator.mesh.size("sp")
    cache = of(states(sees), max_batch=8, max_length=80, step=step, device=CPU, parts=parts, coordinate=number)
    channel = communicator.channel("sp", node="attend")
    given = {"state": "s", "parts": parts, "scale": 0.4, **options}
    prefill = cache.bind_over_ranks(channel, {**given, "how": how, "order": order})
    decode = cache.bind_over_ranks(channel, {**given, "how": "merge"})
    found = []
    for run in runs:
        cache.begin(run.batch(), rows=run.rows, decode=run.decode)
        whole = tokens(run, rows)
        if run.decode:
            found.append(decode(*whole, run.batch().positions, mask, sinks))
            continue
        own = TokenOrder.of(max(run.counts), parts, order).positions(number)
        mine = [each[:, :, own] for each in whole]
        found.append(prefill(*mine, run.batch().positions[:, own], mask, sinks))
    return found, cache


def on_sharded(
    runs: Sequence[Run], rows: int, parts: int, how: str, *, group: ThreadGroup | None = None, **options: Any
) -> tuple[list[list[Tensor]], list[ShardedCache]]:
    """What all ranks together make of each run, and their caches."""
    each = on_ranks(
        group or ThreadGroup(Mesh.of(sp=parts)),
        *[lambda communicator: on_rank(communicator, runs, rows, how, **options)] * parts,
    )
    order = options.get("order", "zigzag")
    found = []
    for at, run in enumerate(runs):
        outs = [outputs[at] for outputs, _ in each]
        if run.decode:
            assert all(torch.equal(outs[0], out) for out in outs), "not the same bits on all ranks"
            found.append(of_tokens(run, outs[0]))
        else:
            size = max(run.counts)
            whole = torch.empty(rows, HEADS, size, VALUE, dtype=F64)
            for number, out in enumerate(outs):
                whole[:, :, TokenOrder.of(size, parts, order).positions(number)] = out
            found.append(of_tokens(run, whole))
    return found, [cache for _, cache in each]


def check(runs: Sequence[Run], rows: int, parts: int, how: str, **options: Any) -> list[ShardedCache]:
    only = {
        name: value for name, value in options.items() if name not in ("order", "step", "group", "of", "neighbours")
    }
    found, caches = on_sharded(runs, rows, parts, how, **options)
    for run, mine, expected in zip(runs, found, on_one(runs, rows, **only), strict=True):
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text, run=run: f"{run}: {text}")
    return caches
