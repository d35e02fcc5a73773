"""One token per row over cached latents: the kernel against float64, and captured steps over such a cache."""

import pytest
import torch

from partitioner import CacheSize, Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.attention import allowed
from runtime.ops.kernels.decode.latent_decode import latent_decode
from runtime.ops.kernels.float8_rows import from_float8, to_float8
from tests.support import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


CASES = [
    (128, 512, 64, 9000, [0, 1, 63, 64, 4095, 8999], 0, {}),
    (16, 512, 64, 4096, [0, 31, 32, 4095], 64, {}),
    (5, 160, 32, 1600, [40, 1400], 16, {"chunk": 512}),
    (40, 512, 64, 3000, [2999, 5], 0, {"sinks": True}),
    (3, 40, 8, 700, [699, 5], 0, {"softcap": 3.0}),
    (70, 256, 0, 1500, [40, 1400, 2000], 0, {"window": 100}),
]
KINDS = [
    *((torch.bfloat16, held, case) for held in ("numbers", "float8") for case in CASES),
    *(
        (dtype, held, case)
        for dtype in (torch.float16, torch.float32)
        for held in ("numbers", "float8")
        for case in CASES[1:3]
    ),
]


@pytest.mark.parametrize(("dtype", "held", "case"), KINDS)
def test_one_token_per_row(dtype, held, case):
    heads, latent, carried, slots, positions, block, options = case
    torch.manual_seed(0)
    batch, width, given = len(positions), latent + carried, dict(options)
    draw = lambda *shape: torch.randn(shape, device="cuda").to(dtype)  # noqa: E731
    q, row, rows = draw(batch, heads, 1, width), draw(batch, 1, width), draw(batch, 1, slots, width)
    sinks = draw(heads) if given.pop("sinks", False) else None
    at, scale = torch.tensor(positions, device="cuda")[:, None], width**-0.5
    parts = [rows.clone()] if held == "numbers" else [part.contiguous() for part in to_float8(rows)]
    numbers = rows.double() if held == "numbers" else from_float8(*parts, torch.float64)
    own = row.double() if held == "numbers" else from_float8(*to_float8(row), torch.float64)
    for each, position in enumerate(positions):
        numbers[each, :, position % slots] = own[each]
        for part in parts:  # what nobody may look at
            part[each, :, position + 1 :] = 0x7F if part.dtype == torch.uint8 else float("nan")
    cached, table = parts, None
    if block:
        count = slots // block
        table = torch.randperm(batch * count + 3, device="cuda")[: batch * count].view(batch, count)
        cached = []
        for part in parts:
            buffer = torch.zeros(1, batch * count + 3, block, part.shape[-1], device="cuda", dtype=part.dtype)
            buffer[:, table] = part.unflatten(2, (count, block)).transpose(0, 1)
            cached.append(buffer)
    out, lse = latent_decode(
        q, row, at, cached[0], sinks, latent=latent, scale=scale, return_lse=True, table=table,
        scales=None if held == "numbers" else cached[1], **given,
    )  # fmt: skip
    if table is not None:
        cached = [part[:, table].transpose(0, 1).flatten(2, 3) for part in cached]
    for each, position in enumerate(positions):
        slot = torch.arange(slots, device="cuda")
        lies = position - (position - slot) % slots
        seen = allowed(at[each], lies, causal=True, window=given.get("window"), chunk=given.get("chunk"))
        scores = q[each, :, 0].double() @ numbers[each, 0].T * scale
        if "softcap" in given:
            scores = torch.tanh(scores / given["softcap"]) * given["softcap"]
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], -1)
        wanted = torch.softmax(scores, -1)[:, :slots] @ numbers[each, 0, :, :latent].nan_to_num()
        error = (out[each, :, 0].double() - wanted).norm() / wanted.norm()
        assert float(error) < 2 * TOLERANCE[dtype], (each, position)
        assert float((lse[each].double() - torch.logsumexp(scores, -1)).abs().max()) < 3e-2
        mine = [part[each, :, position % slots] for part in cached]
        if held == "numbers":
            assert torch.equal(mine[0], row[each])
        else:  # the last digit of a scale may differ, and with it a number that lies between two codes
            kept, wanted = from_float8(*mine, torch.float32), own[each].float()
            assert float(((kept - wanted).abs() > 1e-5).float().mean()) < 0.02


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    # without experts: those of float32 are found by the host
    model = zoo.tiny("deepseek_v3", first_k_dense_replace=2)[0]
    return partition(model.float().eval(), Plan(cache="latent"))


@pytest.mark.parametrize("dtype", [None, "fp8"])
@pytest.mark.parametrize("options", [{}, {"compile": True}], ids=["captured", "compiled"])
def test_captured_steps_over_latents(parts, options, dtype):
    prompts = [list(range(1, 20)), [3] * 40, [7, 8]]
    cache = CacheSize(max_batch=3, max_length=80, dtype=dtype)
    found = []
    for device, given in (("cuda", {"cuda_graph": True, **options}), ("cuda", {}), ("cpu", {})):
        made = parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device=device, **given)
        made.reserve(cache)
        assert made._generate_loop.cache.any_length == (device == "cuda")
        found.append(made.generate(prompts, max_new_tokens=20, eos_token_id=[], logprobs=True))
    captured, plain, host = found
    assert torch.equal(captured.sequences, plain.sequences)
    assert torch.allclose(captured.logprobs, plain.logprobs, atol=1e-3)
    close = 0.05 if dtype else 1e-3
    assert torch.allclose(host.logprobs[:, :2], plain.logprobs.cpu()[:, :2], atol=close)
    if dtype is None:
        assert torch.equal(host.sequences, plain.sequences.cpu())
