"""Keys and values as float8: the model whose keys and values are rounded so, whatever the pieces and the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import CacheSize
from partitioner.cli.actions.verify import cache_losses
from partitioner.cli.jobs.compile import Compile
from partitioner.cli.jobs.verify import Case
from partitioner.errors import InputError
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.communication.thread_communicator import ThreadGroup
from runtime.kv_cache.buffers import StateRows, buffers_of
from runtime.ops.attention import attention
from runtime.ops.kernels.float8_rows import from_float8, to_float8
from runtime.program.shards import StateShard
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import assert_as_alone, mixed, on_all_ranks
from tests.support import interpret, stepping
from tests.support.generated import prompts
from tests.support.partitioned import EXACT, compiled_once, tokens, traced

SLOW = pytest.mark.slow


def rounded(x: Tensor) -> Tensor:
    return from_float8(*to_float8(x), x.dtype)


def rounding_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    return attention(q, rounded(k), rounded(v), *rest, **options)


def expected(name: str, ids: Tensor) -> Tensor:
    """Log-probabilities [B, L - 1] by the graph of the whole text, whose attentions round what they read."""
    program = traced(name)[1].copy()
    for node in program.graph.nodes:
        if node.target is attention:
            node.target = rounding_attention
    logits = interpret.run(program, lifted=True, input_ids=ids)
    return torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", {"tp": 1}),
        ("llama", {"tp": 2}),
        ("gemma2", {"tp": 1}),  # windows
        pytest.param("gpt_oss", {"tp": 2}, marks=SLOW),  # sinks
        pytest.param("llama", {"tp": 1, "pp": 2}, marks=SLOW),
        pytest.param("llama", {"tp": 2, "pp": 2}, marks=SLOW),
        ("llama", {"tp": 1, "sp": 2}),
        pytest.param("gemma2", {"tp": 1, "sp": 3}, marks=SLOW),
    ],
)
def test_it_is_attention_over_rounded_keys_and_values(name: str, plan: dict[str, int]) -> None:
    ids = tokens(name, 30)
    parts = compiled_once(name, **plan)
    parts.reserve(CacheSize(max_batch=2, max_length=30, dtype="fp8"))
    wanted = expected(name, ids)
    assert (parts.log_probabilities(ids.tolist()) - wanted).abs().max() < EXACT
    parts.reserve(CacheSize(max_batch=2, max_length=30))
    assert (parts.log_probabilities(ids.tolist()) - wanted).abs().max() > 1e-4, "it rounds nothing"


def test_the_latent_is_rounded_too() -> None:
    name = "deepseek_v3"
    parts = compiled_once(name, 2)
    exact = parts.log_probabilities(tokens(name, 20).tolist())
    parts.reserve(CacheSize(max_batch=2, max_length=20, dtype="fp8"))
    found = parts.log_probabilities(tokens(name, 20).tolist())
    assert 1e-4 < (found - exact).abs().max() < 1
    each = compiled_once(name, 1)
    each.reserve(CacheSize(max_batch=2, max_length=20, dtype="fp8"))
    assert (each.log_probabilities(tokens(name, 20).tolist()) - found).abs().max() < EXACT


def test_pieces_of_a_prompt_change_nothing() -> None:
    parts, found = compiled_once("llama", 1), []
    for step in (5, 64):
        parts.reserve(CacheSize(max_batch=4, max_length=48, dtype="fp8", prefill_step=step))
        found.append(parts.generate(prompts("llama"), max_new_tokens=8, eos_token_id=[], logprobs=True))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert (found[0].logprobs - found[1].logprobs).abs().max() < EXACT


@pytest.mark.parametrize("plan", [{}, pytest.param({"sp": 2}, marks=SLOW)])
def test_many_requests_at_once(plan: dict[str, int]) -> None:
    parts, cases = compiled_once("llama", 1), mixed(8, longest=20, new=6)
    size = CacheSize(max_batch=4, max_length=48, prefill_step=8, dtype="fp8")
    found = on_all_ranks(compiled_once("llama", 1, **plan), cases, size)
    parts.reserve(CacheSize(max_batch=1, max_length=48, dtype="fp8"))
    assert_as_alone(cases, found, many_requests.alone(parts, cases))


def said(parts: Any, name: str, step: int | None, *, dtype: str | None = "fp8") -> Any:
    parts.reserve(CacheSize(max_batch=4, max_length=48, dtype=dtype, prefill_step=step))
    return parts.generate(prompts(name), max_new_tokens=4, eos_token_id=[], logprobs=True)


@pytest.mark.parametrize(
    ("name", "sp", "how"),
    [
        ("llama", 2, "ring"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                ("llama", 3, "ring"),
                ("llama", 2, "gather"),
                ("llama", 2, "ulysses"),
                ("llama", 4, "ring-ulysses"),
                ("gemma2", 2, "ring"),
                ("gpt_oss", 2, "ulysses"),
                ("deepseek_v3", 2, "ring"),
                ("deepseek_v3", 3, "gather"),
            )
        ),
    ],
)
def test_ranks_that_share_out_tokens_keep_what_one_keeps(name: str, sp: int, how: str) -> None:
    """Prompts of uneven lengths at once and in pieces: keys travel as they lie, and are rounded once."""
    parts = compiled_once(name, 1, sp=sp, sp_attention=how)
    for step in (5, 64):
        wanted, found = (said(each, name, step) for each in (compiled_once(name, 1), parts))
        assert torch.equal(found.sequences, wanted.sequences)
        assert (found.logprobs - wanted.logprobs).abs().max() < EXACT
    exact = said(parts, name, None, dtype=None)
    assert (found.logprobs - exact.logprobs).abs().max() > 1e-5, "it rounds nothing"


def test_what_travels_are_codes_and_scales() -> None:
    """Of a prompt's later piece, a rank sends the used part of its cache: a byte per number, and a scale per row."""
    state = StateShard("s.key", (2, 200), torch.float64, None, token_axes=("sp",), float8=True)
    buffers = buffers_of(state, (3, 2, 9, 200), torch.device("cpu"))
    rows = StateRows(state, lambda: buffers)
    x = torch.randn(2, 2, 4, 200, dtype=torch.float64)
    slots = torch.tensor([[0, 2, 5, 8], [1, 3, 4, 8]])
    kept = rows.put(slice(1, 3), slots, x)
    assert torch.equal(kept, rounded(x))
    message = rows.packed(slice(1, 3), 6)
    assert (message.dtype, message.shape[-1]) == (torch.uint8, 200 + 2 * 4)
    assert rows.row_bytes == rows.packed_width == message.shape[-1]
    found = rows.unpacked(message)
    assert torch.equal(found, rows.read(slice(1, 3), 6))
    assert torch.equal(found[0, :, [0, 2, 5]], kept[0, :, :3])
    assert torch.equal(found[1, :, [1, 3, 4]], kept[1, :, :3])


def test_bytes_are_counted_with_their_scales() -> None:
    for name, widths in (("llama", (16, 16)), ("deepseek_v3", (32,))):
        parts = compiled_once(name, 1)
        heads = 2 if name == "llama" else 1
        each = 2 * heads * sum(width + 4 for width in widths)  # two layers
        assert parts.cache_bytes(max_batch=3, max_length=10, dtype="fp8") == [3 * 10 * each]
        rank = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))
        room = rank.reserve(CacheSize(max_batch=3, max_length=10, dtype="fp8"))
        assert room.tokens is None or room.tokens >= 10
        assert rank._generate_loop.cache.bytes == 3 * 10 * each
        assert parts.tokens_that_fit(3 * 10 * each, max_batch=3, dtype="fp8") == [10]
        assert parts.generation_report.float8_per_token == (each,)
        assert f", in fp8 {each} B" in str(parts.generation_report)


def test_states_that_are_no_keys_and_values_are_refused() -> None:
    with pytest.raises(InputError, match="the dtype of a cache must be None, that of the model, or 'fp8'; got 'int4'"):
        CacheSize(max_length=4, dtype="int4")
    held = stepping.compiled("mamba2", 1)
    with pytest.raises(InputError, match=r"for keys and values: '.*' is a state per sequence"):
        held.reserve(CacheSize(max_length=8, dtype="fp8"))
    with pytest.raises(InputError, match="texts must be of one length"):
        compiled_once("llama", 1).log_probabilities([[3], [4]])


def test_verify_measures_the_loss() -> None:
    (found,) = cache_losses(Case(str(EXAMPLE_MODEL), Compile(tp=2), lengths=(1, 12), cache_dtype="fp8"))
    assert found.length == 12
    assert 0 < abs(found.found - found.expected) < 0.2
    assert "cache in fp8 against bfloat16, texts of 12 tokens: loss" in str(found)
