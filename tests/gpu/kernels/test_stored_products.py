"""The kernel for weights that are held as codes and scales, against the plain form, on a GPU."""

import functools
import itertools

import pytest
import torch

from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.experts import grouped_linear
from runtime.ops.kernels.stored.few_rows import Stored, few_rows, sum_for_norm
from runtime.ops.kernels.stored.scales import largest_of, run_of
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear, stored_weight
from tests.partitioner.compile.test_hold_stored import folder
from tests.runtime.ops.test_stored import CODES, held

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "run"),
    [(1, 70, 131, 0), (1, 1000, 4096, 128), (1, 40, 416, 32), (5, 70, 640, 64), (17, 256, 512, 0), (130, 33, 65, 32)],
)
@pytest.mark.parametrize("code", CODES)
def test_the_kernels_are_the_product_with_the_numbers(
    code: str, tokens: int, rows: int, cols: int, run: int, dtype: torch.dtype
) -> None:
    parts, _ = held(code, rows, cols, run=run)
    parts = tuple(None if part is None else part.cuda() for part in parts)
    x, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((tokens, cols), (rows,)))
    weight = stored_weight(*parts, code=code, computed_in=torch.float32, dtype=dtype)
    expected = x.double() @ weight.double().T + bias.double()
    found = stored_linear(x, *parts, bias, code=code, computed_in=torch.float32)
    assert relative(found, expected) < TOLERANCE[dtype]
    compiled = torch.compile(stored_linear, dynamic=False)
    assert torch.equal(compiled(x, *parts, bias, code=code, computed_in=torch.float32), found)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("code", CODES)
def test_few_rows_with_what_stands_around_them(code: str, dtype: torch.dtype) -> None:
    draw = functools.partial(torch.randn, device="cuda", dtype=dtype)
    shapes = [(13, 64, 32), (70, 416, 32), (1000, 4096, 128), (48, 14336, 64)]
    largest = torch.finfo(dtype).max  # gated sums of 14,336 go beyond float16's
    for (number, (num_out, inner, run)), way in itertools.product(enumerate(shapes), range(4)):
        rows = 1 + (number + way) % 3
        parts, gates = (
            tuple(None if part is None else part.cuda() for part in held(code, num_out, inner, run=run, seed=seed)[0])
            for seed in (0, 1)
        )
        weight, gate = (
            stored_weight(*each, code=code, computed_in=torch.float32, dtype=torch.float64) for each in (parts, gates)
        )
        x, added, bias, scale = draw(rows, inner), draw(rows, inner), draw(num_out), draw(inner)
        total = x + added if way >= 2 else x
        h = total.double()
        if way:
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * (scale.double() if way == 2 else 1.0)
        wanted = h @ weight.T + (0.0 if way else bias.double())
        if way in (1, 3):
            wanted = wanted * torch.nn.functional.silu(h @ gate.T)
        found = few_rows(
            x, Stored(*parts, code), None if way else bias, norm=(scale if way == 2 else None, 1e-5) if way else None,
            gate=Stored(*gates, code) if way in (1, 3) else None, act="silu" if way in (1, 3) else "",
            added=added if way >= 2 else None,
        )  # fmt: skip
        if way >= 2:
            assert torch.equal(found[0], total)
            found = found[1]
        assert relative(found.clamp(-largest, largest), wanted.clamp(-largest, largest)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("code", CODES)
def test_a_chain_of_few_rows_in_a_graph_is_one_after_the_other(code: str, rows: int) -> None:
    """Kernels that are launched before their predecessor's end read what it wrote, many times."""
    parts, _ = held(code, 2048, 2048, run=128)
    weight = Stored(*(None if part is None else part.cuda() for part in parts), code)
    x, scale = torch.randn(rows, 2048, device="cuda").bfloat16(), torch.ones(2048, device="cuda").bfloat16()

    def chain() -> torch.Tensor:
        total, y = x, x
        for _ in range(12):
            total, y = few_rows(total, weight, added=y, norm=(scale, 1e-5))
        return y

    wanted = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(200):
        graph.replay()
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("code", "first"), [("int4", "int4"), ("int4", "float8"), ("float8", "float8")])
def test_rows_made_ready_for_their_norm_in_a_graph(code: str, first: str, gated: bool) -> None:
    """Of numbers, and of what reads them before its predecessor has ended, many times."""
    width, inner = 1024, 640
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    held_by = functools.partial(_on_gpu, width=width, inner=inner)
    (of_h, first_numbers), (weight, numbers), (gate, gates) = held_by(first, 0), held_by(code, 1), held_by(code, 2)
    h, x, scale = draw(1, inner), draw(1, width), draw(width)
    behind = gate if gated else None
    if code == "float8" and not gated:
        assert sum_for_norm(h, of_h, x, scale, weight, None) is None, "not worth it"
        return

    def both(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = sum_for_norm(h, of_h, x, scale, weight, behind)
        assert made is not None
        total, ready = made
        y = few_rows(total, weight, gate=behind, act="silu" if gated else "", norm=(scale, 1e-5), ready=ready)
        return total, y

    total, y = both(scale)
    assert relative(total, x.double() + h.double() @ first_numbers.T) < TOLERANCE[torch.bfloat16]
    normed = total.double() * torch.rsqrt(total.double().square().mean() + 1e-5) * scale.double()
    wanted = normed @ numbers.T
    if gated:
        wanted = wanted * torch.nn.functional.silu(normed @ gates.T)
    assert relative(y, wanted) < 2 * TOLERANCE[torch.bfloat16]
    assert relative(both(scale.flip(0))[1], wanted) > 0.1, "another weight of the norm would not be noticed"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [both(scale) for _ in range(12)]
    for _ in range(200):
        graph.replay()
        assert all(torch.equal(a, total) and torch.equal(b, y) for a, b in found)


def _on_gpu(code: str, seed: int, *, width: int, inner: int) -> tuple[Stored, torch.Tensor]:
    """The first weight leads to the width, others away from it."""
    shape = (width, inner) if seed == 0 else (inner, width)
    parts, numbers = held(code, *shape, run=128, seed=seed)
    return Stored(*(None if part is None else part.cuda() for part in parts), code), numbers.cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[0, 2, 0, 1, 1], [40, 0, 3, 100, 1], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("code", CODES)
def test_experts_from_counts_on_the_device(code: str, counts: list[int], dtype: torch.dtype) -> None:
    parts, _ = held(code, 5, 96, 256, run=32)
    parts = tuple(None if part is None else part.cuda() for part in parts)
    tokens = sum(counts) + 2
    x, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((tokens, 256), (5, 96)))
    weight = stored_weight(*parts, code=code, computed_in=torch.float32, dtype=torch.float64)
    on_device = torch.tensor(counts, device="cuda")
    expected = grouped_linear(x.double(), weight, on_device, bias.double())
    run_of(parts[-1])
    largest_of(parts[1])
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
    try:
        found = stored_grouped_linear(x, *parts, on_device, bias, code=code, computed_in=torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative(found, expected) < TOLERANCE[dtype] or not sum(counts)
    assert not found[sum(counts) :].any()


@pytest.mark.parametrize(
    ("name", "form"),
    [("llama", "fp8"), ("llama", "awq"), ("llama", "gptq-ordered"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")],
)
def test_a_model_says_on_a_gpu_what_it_says_on_a_cpu(name: str, form: str) -> None:
    parts = partition(folder(name, form)[0], Plan(weights="stored"), dtype=torch.float32)
    ids = torch.arange(3, 14)[None]
    said = []
    for device, captured in (("cpu", False), ("cuda", False), ("cuda", True)):
        alone = ThreadGroup(Mesh.of()).communicator(0)
        engine = parts.engine(0, alone, device=device, cuda_graph=captured)
        said.append(engine.generate(ids, max_new_tokens=12, eos_token_id=[]).tolist())
        engine._generate_loop.release()
    assert said[0] == said[1] == said[2]
