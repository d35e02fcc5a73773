"""One token per row over a cache in blocks: the kernel reads them where they lie, and captured steps say the same."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import CacheSize, Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.engine import Engine
from runtime.generation.generation_request import GenerationRequest
from runtime.ops.kernels.decode_attention import decode_attention

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "positions", "block", "options"),
    [
        (32, 8, 128, 128, [0, 63, 64, 4095], 64, {}),
        (4, 2, 64, 64, [699, 5], 16, {}),
        (6, 2, 80, 64, [699, 5], 16, {"softcap": 20.0}),
        (8, 2, 128, 128, [40, 1400], 64, {"window": 1000}),
        (8, 2, 128, 128, [40, 1400], 64, {"chunk": 512}),
    ],
)
def test_blocks_in_any_order_are_a_row(
    heads: int, kv_heads: int, width: int, value_width: int, positions: list[int], block: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    batch, count = len(positions), -(-(max(positions) + 1) // block)
    table = torch.randperm(batch * count + 3)[: batch * count].view(batch, count)
    kept = [torch.randn(batch, kv_heads, count * block, size) for size in (width, value_width)]
    paged = []
    for rows in kept:
        buffer = torch.zeros(kv_heads, batch * count + 3, block, rows.shape[-1])
        buffer[:, table] = rows.unflatten(2, (count, block)).transpose(0, 1)
        paged.append(buffer.to(DEVICE))
    rows, table = [each.to(DEVICE) for each in kept], table.to(DEVICE)
    q = torch.randn(batch, heads, 1, width, device=DEVICE)
    k, v = (torch.randn(batch, kv_heads, 1, size, device=DEVICE) for size in (width, value_width))
    at = torch.tensor(positions, device=DEVICE)[:, None]
    expected = decode_attention(q, k, v, at, *rows, scale=width**-0.5, **options)
    found = decode_attention(q, k, v, at, *paged, scale=width**-0.5, table=table, **options)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(paged, rows, strict=True):  # the new token lies where it belongs, and nothing else changed
        assert torch.equal(mine[:, table].transpose(0, 1).flatten(2, 3), theirs)


@pytest.mark.parametrize("decoding", [{}, {"cuda_graph": True}], ids=["eager", "captured"])
def test_many_requests_are_told_what_each_is_told_alone(decoding: dict[str, bool]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    parts = partition(LlamaForCausalLM(config), Plan())
    group = ThreadGroup(parts.mesh)
    engine = Engine(
        parts.rank(0), group.communicator(0), device=DEVICE, entries=lambda entry: parts.entry(entry, 0), **decoding
    )
    texts = [[3 + number, 5, 7] * (1 + 9 * number) for number in range(6)]
    asked: list[dict[str, Any]] = [
        {}, {"do_sample": True, "seed": 2}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_p": 0.8},
        {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2},
    ]  # fmt: skip
    asked = [{"max_new_tokens": 12, "eos_token_id": [], **each} for each in asked]
    expected = [
        engine.generate([text], **options)[0, len(text) :].tolist()  # type: ignore[index,arg-type]
        for text, options in zip(texts, asked, strict=True)
    ]
    loop = engine.batching(CacheSize(max_batch=5, max_length=256, prefill_step=64))
    said: dict[int, list[int]] = {number: [] for number in range(len(texts))}
    for number, (text, options) in enumerate(zip(texts, asked, strict=True)):
        loop.add(number, GenerationRequest.of([text], None, options, eos_token_id=()))
    for _ in range(200):
        for told in loop.step():
            said[told.number].append(told.token)
    assert list(said.values()) == expected
    assert loop.status()["why_chosen_behind"] == ("no_repeat_ngram_size" if decoding else "")
    loop.release()
    engine.close()
