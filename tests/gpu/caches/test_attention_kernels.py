"""Attention by kernels against the written-out one in float64: one token per row, and tokens behind a past."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import CacheSize, Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.attention import allowed
from runtime.ops.kernels.decode.few_rows import MOST_ROWS
from runtime.ops.kernels.decode_attention import decode_attention
from runtime.ops.kernels.flash_attention import flash_rows
from runtime.ops.kernels.float8_rows import from_float8, to_float8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]


def exact(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of one row: q [H, S, D], keys [G, T, D], seen [S, T]; the result and the log-sum-exp, in float64."""
    group = q.shape[0] // keys.shape[0]
    k, v = keys.double().repeat_interleave(group, 0), values.double().repeat_interleave(group, 0)
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, q.shape[1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : keys.shape[1]]
    return weights @ v, torch.logsumexp(scores, -1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "slots", "positions", "options"),
    [
        (32, 8, 128, 128, 9000, [0, 1, 63, 64, 4095, 8999], {}),
        (4, 4, 64, 64, 700, [699, 5], {}),
        (6, 2, 80, 80, 700, [699, 5], {"softcap": 20.0}),
        (16, 1, 96, 64, 3000, [2999, 64], {"sinks": True}),
        (8, 2, 128, 128, 1500, [40, 1400, 20_000], {"window": 1000}),
        (8, 2, 256, 256, 1500, [40, 1400], {"window": 100, "sinks": True}),
        (8, 2, 128, 128, 1500, [40, 1400], {"chunk": 512}),
    ],
)
def test_one_token_per_row(dtype, heads, kv_heads, width, value_width, slots, positions, options):
    torch.manual_seed(0)
    batch = len(positions)
    draw = lambda *shape: torch.randn(shape, device="cuda").to(dtype)  # noqa: E731
    q, k, v = draw(batch, heads, 1, width), draw(batch, kv_heads, 1, width), draw(batch, kv_heads, 1, value_width)
    keys, values = draw(batch, kv_heads, slots, width), draw(batch, kv_heads, slots, value_width)
    given = dict(options)
    sinks = draw(heads) if given.pop("sinks", False) else None
    at = torch.tensor(positions, device="cuda")[:, None]
    scale = width**-0.5
    expected_keys, expected_values = keys.clone(), values.clone()
    for row, position in enumerate(positions):
        # what nobody may look at
        keys[row, :, position + 1 :] = float("nan")
        values[row, :, position + 1 :] = float("nan")
        expected_keys[row, :, position % slots] = k[row, :, 0]
        expected_values[row, :, position % slots] = v[row, :, 0]
    out, lse = decode_attention(q, k, v, at, keys, values, sinks, scale=scale, return_lse=True, **given)
    for row, position in enumerate(positions):
        slot = torch.arange(slots, device="cuda")
        held = position - (position - slot) % slots
        seen = allowed(
            at[row], held, causal=True, window=given.get("window"), chunk=given.get("chunk")
        )[None]  # fmt: skip
        result, sums = exact(
            q[row], expected_keys[row], expected_values[row], seen, scale, given.get("softcap"), sinks
        )  # fmt: skip
        assert relative(out[row], result) < TOLERANCE[dtype], (row, position)
        assert float((lse[row].double() - sums[:, 0]).abs().max()) < 1e-2
        assert torch.equal(keys[row, :, position % slots], k[row, :, 0])
        assert torch.equal(values[row, :, position % slots], v[row, :, 0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "slots", "positions", "block", "options"),
    [
        (32, 8, 128, 128, 9000, [0, 1, 63, 64, 4095, 8999], 0, {}),
        (32, 8, 128, 128, 4096, [0, 63, 64, 4095], 64, {}),
        (6, 2, 80, 64, 700, [699, 5], 0, {"softcap": 20.0}),
        (8, 2, 256, 200, 1500, [40, 1400, 2000], 0, {"window": 100}),
        (8, 2, 64, 256, 1600, [40, 1400], 16, {"chunk": 512}),
    ],
)
def test_one_token_per_row_over_float8(dtype, heads, kv_heads, width, value_width, slots, positions, block, options):
    torch.manual_seed(0)
    batch = len(positions)
    draw = lambda *shape: torch.randn(shape, device="cuda").to(dtype)  # noqa: E731
    q, k, v = draw(batch, heads, 1, width), draw(batch, kv_heads, 1, width), draw(batch, kv_heads, 1, value_width)
    parts = [
        part.contiguous() for size in (width, value_width) for part in to_float8(draw(batch, kv_heads, slots, size))
    ]
    numbers = [from_float8(*parts[at : at + 2], torch.float64) for at in (0, 2)]
    new = [to_float8(each) for each in (k, v)]
    at = torch.tensor(positions, device="cuda")[:, None]
    for row, position in enumerate(positions):
        for kept, own in zip(numbers, new, strict=True):
            kept[row, :, position % slots] = from_float8(*own, torch.float64)[row, :, 0]
        for part in parts:  # what nobody may look at
            part[row, :, position + 1 :] = 0x7F if part.dtype == torch.uint8 else float("nan")
    given, table = parts, None
    if block:
        count = slots // block
        table = torch.randperm(batch * count + 3, device="cuda")[: batch * count].view(batch, count)
        given = []
        for part in parts:
            buffer = torch.zeros(kv_heads, batch * count + 3, block, part.shape[-1], device="cuda", dtype=part.dtype)
            buffer[:, table] = part.unflatten(2, (count, block)).transpose(0, 1)
            given.append(buffer)
    out, lse = decode_attention(
        q, k, v, at, given[0], given[2], scale=width**-0.5, return_lse=True, table=table,
        key_scales=given[1], value_scales=given[3], **options,
    )  # fmt: skip
    if table is not None:
        given = [part[:, table].transpose(0, 1).flatten(2, 3) for part in given]
    for row, position in enumerate(positions):
        slot = torch.arange(slots, device="cuda")
        held = position - (position - slot) % slots
        seen = allowed(at[row], held, causal=True, window=options.get("window"), chunk=options.get("chunk"))[None]
        result, sums = exact(q[row], *(kept[row] for kept in numbers), seen, width**-0.5, options.get("softcap"), None)
        assert relative(out[row], result) < 2 * TOLERANCE[dtype], (row, position)
        assert float((lse[row].double() - sums[:, 0]).abs().max()) < 1e-2
        for held_codes, held_scales, own in ((*given[:2], new[0]), (*given[2:], new[1])):
            assert torch.equal(held_codes[row, :, position % slots], own[0][row, :, 0])
            assert torch.equal(held_scales[row, :, position % slots], own[1][row, :, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("by_cudnn", [False, True])
@pytest.mark.parametrize(("starts", "counts"), [((300, 300), (70, 70)), ((0, 0), (70, 20)), ((0, 513), (70, 1))])
def test_tokens_behind_a_past(dtype, window, by_cudnn, starts, counts, monkeypatch):
    monkeypatch.setattr("runtime.ops.kernels.flash_attention._CUDNN_FROM", 0 if by_cudnn else 1 << 62)
    torch.manual_seed(0)
    heads, kv_heads, width = 8, 2, 128
    size = max(counts)
    q = torch.randn(len(starts), heads, size, width, device="cuda").to(dtype)
    keys, values = (torch.randn(len(starts), kv_heads, 600, width, device="cuda").to(dtype) for _ in range(2))
    for row, count in enumerate(counts):
        q[row, :, count:] = q[row, :, count - 1 : count]
    found = flash_rows(q, keys, values, starts, counts, scale=0.1, window=window)
    slots = torch.arange(600, device="cuda")
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        positions = torch.arange(size, device="cuda").clamp(max=count - 1) + start
        seen = allowed(positions[:, None], slots, causal=True, window=window)
        result, _ = exact(q[row], keys[row], values[row], seen, 0.1, None, None)
        assert relative(found[row], result) < TOLERANCE[dtype], row


@pytest.fixture(scope="module")
def parts():
    return compiled_for(torch.bfloat16)


def compiled_for(dtype: torch.dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, initializer_range=0.2, max_position_embeddings=4096,
    )  # fmt: skip
    return partition(LlamaForCausalLM(config).to(dtype).eval(), Plan())


def engine(parts, **options):
    return parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device="cuda", **options)


def test_prompts_in_pieces_say_what_prompts_in_one_piece_say(parts):
    prompts = [list(range(1, 50)), [3] * 300, [7, 8]]
    whole = engine(parts).generate(prompts, max_new_tokens=3, eos_token_id=[], prefill_step=512, logprobs=True)
    pieces = engine(parts).generate(prompts, max_new_tokens=3, eos_token_id=[], prefill_step=64, logprobs=True)
    assert torch.equal(whole.sequences[:, -3], pieces.sequences[:, -3])
    assert torch.allclose(whole.logprobs[:, 0], pieces.logprobs[:, 0], atol=0.05)


def test_a_longer_text_compiles_nothing():
    parts = compiled_for(torch.float32)  # in bfloat16 near ties fall either way
    compiled = engine(parts, compile=True, cuda_graph=True)
    plain = engine(parts)
    # of fewer sequences, steps are kernels of ours and nothing is compiled
    short, long = [[5, 6, 7]] * (MOST_ROWS + 1), [list(range(1, 60)) * 20] * (MOST_ROWS + 1)
    compiled.generate(short, max_new_tokens=20, eos_token_id=[])
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted > 0
    found = compiled.generate(long, max_new_tokens=20, eos_token_id=[])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    assert torch.equal(found, plain.generate(long, max_new_tokens=20, eos_token_id=[]))
    # other numbers of sequences keep their steps as well
    compiled.generate(short + short, max_new_tokens=5, eos_token_id=[])
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled.generate(short, max_new_tokens=5, eos_token_id=[])
    compiled.generate(short + short, max_new_tokens=5, eos_token_id=[])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


@pytest.mark.parametrize("options", [{}, {"compile": True}])
def test_a_cache_of_float8_is_read_by_the_kernel(options):
    parts = compiled_for(torch.float32)
    prompts = [list(range(1, 50)), [3] * 300, [7, 8]]
    cache = CacheSize(max_batch=3, max_length=400, dtype="fp8")
    found = []
    for given in ({"cuda_graph": True, **options}, {}):
        made = engine(parts, **given)
        made.reserve(cache)
        assert made._generate_loop.cache.any_length
        found.append(made.generate(prompts, max_new_tokens=20, eos_token_id=[], logprobs=True))
    captured, plain = found
    assert torch.equal(captured.sequences, plain.sequences)
    assert torch.allclose(captured.logprobs, plain.logprobs, atol=1e-3)
    # against the graph without kernels
    host = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))
    host.reserve(cache)
    wanted = host.generate(prompts, max_new_tokens=20, eos_token_id=[], logprobs=True)
    same = (wanted.sequences[:, -20:] == plain.sequences.cpu()[:, -20:]).float().mean()
    assert same > 0.8
    assert torch.allclose(wanted.logprobs[:, :2], plain.logprobs.cpu()[:, :2], atol=0.02)
