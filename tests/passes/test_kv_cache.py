"""The kv-cache pass, and what is generated with it, on real architectures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from partitioner.analysis.tokens.token_mixing import why_tokens_mix
from partitioner.errors import LayoutError, PlanError
from partitioner.proof.layouts import check
from partitioner.sharding.layout import REPLICATED
from runtime.communication.thread_communicator import ThreadGroup
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.cache import Cache
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from tests.support.generated import error, prompts
from tests.support.partitioned import EXACT, compiled, traced

ARCHITECTURES = ["llama", "gpt2", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "llama4_text", "olmo2"]
# sinks, latents and chunks; windows: test_generation.py; mixtral's and olmo2's attention is as llama's
QUICK = {"llama": (1, 3), "gpt2": (3,), "gpt_oss": (3,), "deepseek_v3": (3,), "llama4_text": (3,)}


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(name, tp, marks=() if tp in QUICK.get(name, ()) else pytest.mark.slow)
        for name in ARCHITECTURES
        for tp in (1, 2, 3)
    ],
)
def test_prompts_of_any_lengths_are_continued_as_each_alone(name: str, tp: int) -> None:
    # in pieces of 7, so that windows of 8 and prompts of 30 end in the middle of one
    assert error(name, compiled(name, tp), prompts(name), prefill_step=7) < EXACT


@pytest.mark.parametrize("tp", [1, 2])
def test_prompts_of_one_length_take_the_way_without_a_mask(tp: int) -> None:
    parts = compiled("llama", tp)
    same = prompts("llama", (9, 9))
    assert error("llama", parts, same) < EXACT
    assert error("llama", parts, same[:1], new=1) < EXACT


def test_every_attention_becomes_a_cached_one_with_the_heads_of_its_rank() -> None:
    parts = compiled("llama", 2)
    whole = [node.target for node in parts.program.graph.nodes]
    cached = [node.target for node in parts.program_of("decode").graph.nodes]
    assert whole.count(attention) == cached.count(cached_attention) == 2
    assert cached.count(attention) == 0
    heads = compiled("llama", 1).entry("decode", 0).states[0].shape[0]
    assert [parts.entry("decode", rank).states[0].shape[0] for rank in (0, 1)] == [heads // 2] * 2


def test_layers_with_a_window_keep_no_more_than_they_see() -> None:
    states = compiled("gemma2", 1).program_of("decode").states.values()
    assert {state.sees for state in states} == {None, 8}
    rank = compiled("gemma2", 1).entry("decode", 0)
    cache = Cache(rank.states, max_batch=3, max_length=50, step=4, device=torch.device("cpu"))
    assert {buffer.shape[2] for buffer in cache.buffers.values()} == {50, 8 + 4 - 1}
    assert cache.bytes == compiled("gemma2", 1).cache_bytes(max_batch=3, max_length=50, prefill_step=4)[0]
    assert cache.bytes == sum(
        3 * (50 if state.sees is None else 11) * state.shape[0] * state.shape[1] * 8 for state in rank.states
    )


# torch counts no operations of its fused attention on the CPU; the other writes its two products out
@pytest.mark.parametrize(("name", "attention_ops"), [("llama", set()), ("gpt_oss", {"aten.bmm"})])
def test_a_decode_step_does_no_work_that_grows_with_the_prefix_but_attention(name, attention_ops) -> None:
    parts = compiled(name, 1)

    def flops(length: int) -> dict[str, int]:
        engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))  # in this thread, where they are counted
        steps = engine.stream(prompts(name, (length,)), max_new_tokens=3, eos_token_id=[])
        next(steps)
        with FlopCounterMode(display=False) as counter:
            next(steps)
        return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}

    short, long = flops(10), flops(90)
    assert {op for op in long if long[op] != short[op]} == attention_ops
    assert long.get("aten.addmm", 0) + long.get("aten.mm", 0) > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("masked:bert", "not causal"),
        ("mamba2", "conv1d"),
        ("roberta", "cumsum"),
    ],
)
def test_what_mixes_tokens_in_another_way_is_refused_with_the_op(name: str, reason: str) -> None:
    found = why_tokens_mix(traced(name)[1])
    assert found is not None
    assert reason in found
    with pytest.raises(PlanError, match="cannot generate"):
        compiled(name, 1).generate([[3, 4]])


def test_a_cache_of_other_heads_than_the_rank_computes_is_refused() -> None:
    program = compiled("llama", 2).program_of("decode")
    name, state = next(iter(program.states.items()))
    broken = program.copy()
    broken.states[name] = type(state)(name, state.shape, state.dtype, REPLICATED(2), state.sees)
    with pytest.raises(LayoutError, match="writes"):
        check(broken)


def test_a_cache_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Cache.begin

    def forgetful(self: Cache, tokens: Batch, *, rows: slice | None = None, decode: bool = False) -> None:
        for buffer in self.buffers.values():
            buffer[:, :, 3] = 0
        begin(self, tokens, rows=rows, decode=decode)

    monkeypatch.setattr(Cache, "begin", forgetful)
    assert error("llama", compiled("llama", 1), prompts("llama"), prefill_step=7) > 1e-6
