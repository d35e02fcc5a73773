"""Pieces of prompts captured as CUDA graphs say what they say node by node."""

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from partitioner import CacheSize, Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.generation import steps
from runtime.generation.steps import Steps
from runtime.ops.kernels.flash_attention import flash_attention, flash_behind
from tests.runtime.generation.batching.many_requests import Case, serve
from tests.support import zoo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": [], "logprobs": True}


def on_gpu(parts: Any) -> Engine:
    return parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device="cuda")  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(33,), (20, 33, 1)])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_replays_say_the_same(
    name: str, lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = partition(zoo.tiny(name)[0].to(dtype), Plan())
    plain, replaying = on_gpu(parts), on_gpu(parts)
    close = 1e-9 if dtype == torch.float64 else 4e-2  # bfloat16 logits of about 3 are 0.016 apart
    for seed in range(5):
        drawn = torch.Generator().manual_seed(seed)
        texts = [torch.randint(2, 60, (length,), generator=drawn).tolist() for length in lengths]
        for options in (OPTIONS, {**OPTIONS, "prefill_step": 16}):
            with monkeypatch.context() as patch:
                patch.setattr(steps, "CAPTURED_ON", frozenset())
                wanted = plain.generate(texts, **options)
            found = replaying.generate(texts, **options)
            torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=close, atol=close)  # type: ignore[union-attr]
    bound = replaying._generate_loop._bound
    assert bound is not None
    # 33 at once, twice 16 and one more; of several rows only pieces that all have tokens of. Without windows a first
    # piece of 16 has the places of one of 33
    windows = name == "gemma3_text"
    assert len(bound._pieces._captured) == (3 if len(lengths) == 1 else 1) + windows


def test_experts_of_replays_are_those_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt chooses others, and a piece has places for tokens that nobody has."""
    parts = partition(zoo.tiny("qwen3_moe")[0].bfloat16(), Plan())
    plain, replaying = on_gpu(parts), on_gpu(parts)
    for seed, length in enumerate((60, 60, 60, 37, 59, 2)):
        text = torch.randint(2, 60, (1, length), generator=torch.Generator().manual_seed(seed))
        with monkeypatch.context() as patch:
            patch.setattr(steps, "CAPTURED_ON", frozenset())
            wanted = plain.generate(text, **OPTIONS)
        found = replaying.generate(text, **OPTIONS)
        torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=4e-2, atol=4e-2)  # type: ignore[union-attr]
    bound = replaying._generate_loop._bound
    assert bound is not None
    assert len(bound._pieces._captured) == 1


def test_a_captured_piece_serves_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = partition(zoo.tiny("llama")[0].double(), Plan())
    plain, replaying = on_gpu(parts), on_gpu(parts)
    monkeypatch.setattr(steps, "CAPTURED_ON", frozenset())
    lengths = (60, 60, 60, 37, 59, 2)
    texts = [torch.randint(2, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths]
    wanted = [plain.generate(text[None], **OPTIONS) for text in texts]
    monkeypatch.undo()
    for text, one in zip(texts, wanted, strict=True):
        found = replaying.generate(text[None], **OPTIONS)
        torch.testing.assert_close(found.logprobs, one.logprobs, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]
    bound = replaying._generate_loop._bound
    assert bound is not None
    assert len(bound._pieces._captured) == 1


@pytest.mark.parametrize("window", [None, 100])
def test_attention_behind_as_many_tokens_as_the_device_knows(window: int | None) -> None:
    drawn = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 8, 64, 64, device="cuda", dtype=torch.bfloat16, generator=drawn)
    k, v = torch.randn(2, 1, 2, 512, 64, device="cuda", dtype=torch.bfloat16, generator=drawn)
    for end in (64, 65, 300, 512):
        lengths = torch.tensor([[0, 64], [0, end]], dtype=torch.int32, device="cuda")
        found = flash_behind(q, k, v, lengths, scale=0.2, window=window)
        expected = flash_attention(q, k[:, :, :end], v[:, :, :end], scale=0.2, window=window)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        other = flash_attention(q, k[:, :, : end - 1], v[:, :, : end - 1], scale=0.2, window=window)
        assert (other - found).abs().max() > 0.05  # the control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 200])
@pytest.mark.parametrize("window", [None, 100])
def test_prompts_amid_rows_are_captured(window: int | None, prefix: int, dtype: torch.dtype) -> None:
    """Of ever other lengths, among them some of over a thousand tokens, which other kernels attend to; and behind
    tokens that the cache holds of others.
    """
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=61, initializer_range=0.5, max_position_embeddings=4096, sliding_window=window,
    )  # fmt: skip
    parts = partition(MistralForCausalLM(config).to(dtype).eval(), Plan())
    lengths = [(5, 70, 1, 300, 33, 1100)[number % 6] + number for number in range(30)]
    options = {"max_new_tokens": 9, "eos_token_id": []}
    cases = [
        Case(
            [*(4 + at % 40 for at in range(prefix)), *(3 + (7 * number + at) % 50 for at in range(length))],
            options,
            2 * number,
        )
        for number, length in enumerate(lengths)
    ]
    size = CacheSize(max_batch=1, max_length=20000)
    plain = serve(on_gpu(parts), cases, size, block_size=16)
    engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device="cuda", cuda_graph=True)
    with pytest.MonkeyPatch.context() as patch:
        captured = []
        capture = Steps._capture
        patch.setattr(Steps, "_capture", lambda steps, run: captured.append(capture(steps, run)) or captured[-1])
        found = serve(engine, cases, size, block_size=16)
    firsts = sum(found.tokens[number][0] == plain.tokens[number][0] for number in range(30))
    assert firsts > 26 if dtype == torch.bfloat16 else found.tokens == plain.tokens  # near-ties may fall either way
    assert 3 < len(captured) < 12 + 4 * bool(prefix)
