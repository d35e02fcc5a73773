"""What each of three processes checks of attention over tokens that they share out. Started by test_over_gloo.py.

Its argument is whether to share memory ("on", "off"), or "compiled".
"""

import sys
import warnings

import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.traceable import Traceable
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.ops.attention import attention
from runtime.ops.rows.sequence_attention import sequence_attention
from runtime.ops.rows.token_order import TokenOrder
from runtime.processes.launch import begin_worker
from tests.runtime.kv_cache import sharded_cases
from tests.runtime.ops.rows import sp_cases

HOWS = ("ring", "gather", "ulysses")
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def whole_texts(groups: ProcessGroups) -> None:
    for how in HOWS:
        for size in (1, 2, 23):
            for options in ({}, {"window": 5}):
                groups.begin_run(new_shapes=True)
                given = sp_cases.tensors(2, size)
                expected = attention(*given, scale=0.4, causal=True, **options)
                found = sp_cases.on_rank(groups, given, how=how, scale=0.4, causal=True, **options)
                own = TokenOrder.of(size, 3).positions(groups.rank)
                torch.testing.assert_close(found, expected[:, :, own], **CLOSE)


def prompts_and_steps(groups: ProcessGroups) -> None:
    runs = sharded_cases.text((5, 17), 6, 3)
    expected = sharded_cases.on_one(runs, 2)
    for how in HOWS:
        groups.begin_run(new_shapes=True)
        found, _ = sharded_cases.on_rank(groups, runs, 2, how)
        for run, out, wanted in zip(runs, found, expected, strict=True):
            if not run.decode:
                continue
            for one, other in zip(sharded_cases.of_tokens(run, out), wanted, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)


def as_the_compiler_sees_them(groups: ProcessGroups) -> None:
    """A whole text, and a step over a cache, each as one graph."""
    groups.begin_run(new_shapes=False)
    given, options = sp_cases.tensors(2, 13), {"parts": 3, "how": "ring", "scale": 0.4, "causal": True}
    expected = sp_cases.on_rank(groups, given, how="ring", scale=0.4, causal=True)
    traced = Traceable(groups).bind(sequence_attention, "sp", node="traced", options=options)
    own = [sp_cases.mine(x, groups.rank, 3, "zigzag") for x in given]
    compiled = torch.compile(lambda q, k, v: traced(q, k, v, 13, None, None) + 0, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*own), expected)
    a_compiled_step(groups)


def a_compiled_step(groups: ProcessGroups) -> None:
    runs = sharded_cases.text((5, 17), 40, 3)
    cache = ShardedCache(
        sharded_cases.states(), max_batch=2, max_length=40, step=40, device=torch.device("cpu"), parts=3,
        coordinate=groups.rank,
    )  # fmt: skip
    options = {"state": "s", "parts": 3, "scale": 0.4}
    prefill = cache.bind_over_ranks(groups.channel("sp", node="prefill"), {**options, "how": "ring"})
    traced = cache.bind_over_ranks(Traceable(groups).channel("sp", node="step"), {**options, "how": "merge"})
    step = torch.compile(lambda *given: traced(*given, None, None) + 0, backend="aot_eager", fullgraph=True)
    graphs = 0
    for run, wanted in zip(runs, sharded_cases.on_one(runs, 2), strict=True):
        whole, batch = sharded_cases.tokens(run, 2), run.batch()
        if run.decode:
            cache.begin_fixed(batch.positions, 40)
            out = step(*whole, batch.positions)
            for one, other in zip(sharded_cases.of_tokens(run, out), wanted, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
            graphs = max(graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"])
            continue
        own = TokenOrder.of(max(run.counts), 3).positions(groups.rank)
        cache.begin(batch)
        prefill(*(each[:, :, own] for each in whole), batch.positions[:, own], None, None)
    assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2


if __name__ == "__main__":
    warnings.simplefilter("error")
    begin_worker()
    groups = ProcessGroups.connect(Mesh.of(sp=3), timeout_s=60, shared_memory="on" if sys.argv[1] == "on" else "off")
    if sys.argv[1] == "compiled":
        warnings.simplefilter("ignore")  # of the compiler's own imports
        as_the_compiler_sees_them(groups)
    else:
        whole_texts(groups)
        prompts_and_steps(groups)
    groups.barrier()
    groups.close()
