"""Products of few rows: the kernel against float64, what it is not given, and that nothing else decides a result."""

import ctypes
import logging
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from partitioner import Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.execution.executable import build, use_few_rows
from runtime.ops.experts import grouped_linear
from runtime.ops.kernels.native import few_rows
from runtime.ops.kernels.native.few_rows import MOST_ROWS, linear, multiplied, takes
from runtime.weights.load_weights import load_weights
from tests.support import zoo

needs_kernel = pytest.mark.skipif(bool(few_rows.missing()), reason=few_rows.missing() or "it is there")
ROUNDING = 2.0**-24
MOST_SUMMED = 512
"""One after the other, before parts are summed."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(few_rows, "LEAST_OF_ONE_ROW", 0)


def made(
    rows: int, columns: int, inner: int, *, gap: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; gap: between the rows of both."""
    random = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(each, inner + gap, generator=random).to(dtype) for each in (rows, columns, columns))
    return x[:, :inner], weight[:, :inner], bias[:, 0].contiguous()


def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.full((len(x), len(weight) + 3), float("nan"), dtype=x.dtype)
    multiplied(x, weight, bias, out=out[:, : len(weight)])
    assert out[:, len(weight) :].isnan().all()
    return out[:, : len(weight)].clone()


def off(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error, in what rounding explains: 1 is the most."""
    wide = [None if each is None else each.double() for each in (x, weight, bias)]
    exact = functional.linear(*wide)  # type: ignore[arg-type]
    most = functional.linear(*(None if each is None else each.abs() for each in wide))  # type: ignore[arg-type]
    steps = min(MOST_SUMMED, x.shape[1]) + x.shape[1] / MOST_SUMMED + 4
    most *= ROUNDING * steps
    if found.dtype == torch.bfloat16:
        most += (exact.abs() + most) * 2.0**-8
    return float(((found.double() - exact).abs() / (most + 1e-30)).max())


@needs_kernel
@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 70), st.integers(1, 1100), st.integers(0, 9), st.booleans(),
    st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_sizes(
    rows: int, columns: int, inner: int, gap: int, has_bias: bool, threads: int, dtype: torch.dtype
) -> None:
    x, weight, bias = made(rows, columns, inner, gap=gap, seed=rows + columns, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = kernel(x, weight, bias if has_bias else None)
    finally:
        torch.set_num_threads(before)
    assert off(found, x, weight, bias if has_bias else None) < 1


@needs_kernel
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 24, 96])
def test_an_error_of_one_weight_is_found(rows: int) -> None:
    x, weight, _ = made(rows, 33, 777)
    found = kernel(x, weight)
    assert off(found, x, weight) < 1
    wrong = weight.clone()
    wrong[32, 776] += 1
    assert off(found, x, wrong) > 1


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 23, 96])
def test_threads_and_neighbours_change_no_bit(rows: int) -> None:
    x, weight, bias = made(rows, 517, 700)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernel(x, weight, bias)
        torch.set_num_threads(3)
        assert torch.equal(kernel(x, weight, bias), alone)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(kernel(x, weight[5:], bias[5:]), alone[:, 5:])
    assert torch.equal(kernel(x.flip(0), weight, bias), alone.flip(0))


@needs_kernel
@pytest.mark.parametrize(("rows", "inner"), [(1, 13), (3, 1021), (4, 8), (6, 100), (15, 33), (24, 513), (40, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_behind_a_tensor_is_read(rows: int, inner: int, dtype: torch.dtype) -> None:
    def at_the_end(of: Tensor) -> tuple[Tensor, mmap.mmap]:
        """A copy that ends where memory ends that may be read."""
        size = -(-of.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        assert protect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        copy = torch.frombuffer(memory, dtype=of.dtype, count=of.numel(), offset=size - of.nbytes).view(of.shape)
        return copy.copy_(of), memory

    x, weight, bias = made(rows, 11, inner, dtype=dtype)
    (own_x, _), (own_weight, _), (own_bias, _) = map(at_the_end, (x, weight, bias))
    assert torch.equal(kernel(own_x, own_weight, own_bias), kernel(x, weight, bias))


@needs_kernel
@pytest.mark.usefixtures("every_size")
def test_inputs_of_any_dims_and_strides() -> None:
    _, weight, bias = made(1, 20, 48)
    for x in (torch.randn(48), torch.randn(2, 3, 48), torch.randn(48, 5).t(), torch.randn(2, 9, 48)[:, -1:]):
        assert takes(x, weight)
        found = linear(x, weight, bias)
        assert found.shape == (*x.shape[:-1], 20)
        assert off(found.view(-1, 20), x.reshape(-1, 48), weight, bias) < 1
    apart, x = bias.repeat_interleave(2)[::2], torch.ones(7, 48)
    assert torch.equal(linear(x, weight, apart), linear(x, weight, bias))
    assert torch.equal(kernel(x.t().contiguous().t(), weight, bias), kernel(x, weight, bias))


@needs_kernel
@pytest.mark.parametrize("rows", [1, 3, 96])
def test_bfloat16_is_rounded_once_to_the_nearest(rows: int) -> None:
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 16, (rows + 2000,), generator=random) - (1 << 15)
    x, weight = bits.to(torch.int16).view(torch.bfloat16)[:, None].split([rows, 2000])
    # products of two are float32's
    wanted = (x.float() * weight.float().t()).bfloat16()
    torch.testing.assert_close(kernel(x, weight), wanted, rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.usefixtures("every_size")
def test_what_is_torchs() -> None:
    x, weight, bias = made(4, 32, 64)
    assert takes(x, weight)
    fake = FakeTensorMode()
    wanting = weight.clone().requires_grad_()
    others: list[tuple[Tensor, Tensor]] = [
        (x.double(), weight.double()),
        (x.half(), weight.half()),
        (x, torch.randn(64, 32).t()),
        (x[:0], weight),
        (torch.randn(MOST_ROWS[torch.float32] + 1, 64), weight),
        (fake.from_tensor(x), fake.from_tensor(weight)),
        (x.to("meta"), weight.to("meta")),
    ]
    for given_x, given_weight in others:
        assert not takes(given_x, given_weight)
        found = linear(given_x, given_weight)
        assert found.shape == (*given_x.shape[:-1], 32)
        assert type(found) is type(given_x)
    for other in (bias.double(), bias[:1]):
        assert not takes(x, weight, other)
    assert takes(x, wanting, bias)
    with torch.enable_grad():
        assert not takes(x, wanting)
        assert linear(x, wanting, bias).requires_grad
    for wrong in (torch.randn(4, 63), torch.randn(4, 65)):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            linear(wrong, weight)
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(x.bfloat16(), weight)


@needs_kernel
def test_small_products_are_torchs() -> None:
    for rows, columns, is_taken in ((4, 512, False), (4, 1024, True), (1, 8192, False), (1, 16384, True)):
        assert takes(*made(rows, columns, 64)[:2]) is is_taken


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    functions = (few_rows.missing, few_rows._kernel)
    for each in functions:
        each.cache_clear()
    yield
    monkeypatch.undo()
    for each in functions:
        each.cache_clear()


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("CXX", "no-such-compiler")


def other_processor(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


def other_threads(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    def raises() -> None:
        raise AttributeError("undefined symbol: GOMP_parallel")

    monkeypatch.setattr(few_rows, "_parallel", raises)


@pytest.mark.usefixtures("forgotten", "every_size")
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (no_compiler, r"no C\+\+ compiler found \(no-such-compiler\)"),
        (other_processor, r"for CPUs with AVX2 \(torch finds DEFAULT\)"),
        (other_threads, "GOMP_parallel"),
    ],
)
def test_where_there_is_no_kernel_it_is_torchs_and_said(
    spoil: Callable[[pytest.MonkeyPatch, Path], None],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(monkeypatch, tmp_path)
    x, weight, bias = made(4, 32, 64)
    with caplog.at_level(logging.INFO, "partitioner"):
        for _ in range(2):
            assert not takes(x, weight)
            assert torch.equal(linear(x, weight, bias), functional.linear(x, weight, bias))
    (said,) = [each.getMessage() for each in caplog.records]
    assert re.search(why, said)


def graph_of_linear() -> fx.Graph:
    graph = fx.Graph()
    weight, x = graph.placeholder("weight_0"), graph.placeholder("x")
    graph.output(graph.call_function(functional.linear, (x, weight)))
    return graph


@needs_kernel
@pytest.mark.parametrize(
    ("weight", "is_ours"),
    [
        (torch.randn(8, 8), True),
        (torch.randn(8, 8).bfloat16(), True),
        (torch.randn(8, 8, dtype=torch.float64), False),
        (torch.randn(8, 8).t(), False),
        (torch.randn(8), False),
    ],
)
def test_graphs_with_such_weights_get_it(weight: Tensor, is_ours: bool) -> None:
    graph = graph_of_linear()
    use_few_rows(graph, [weight])
    (node,) = [each for each in graph.nodes if each.op == "call_function"]
    wanted: Any = linear if is_ours else functional.linear
    assert node.target is wanted


@needs_kernel
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("has_bias", [True, False])
def test_experts(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 1, 600, 5, 17, 0, 60])
    rows, weight = torch.randn(700, 96, generator=random), torch.randn(7, 40, 96, generator=random)
    bias = torch.randn(7, 40, generator=random) if has_bias else None
    given_to: list[int] = []
    monkeypatch.setattr(
        few_rows, "multiplied", lambda x, *rest, **options: (given_to.append(len(x)), multiplied(x, *rest, **options))
    )
    found = grouped_linear(rows, weight, counts, bias)
    assert given_to == [1, 5, 17, 60]
    wide = grouped_linear(rows.double(), weight.double(), counts, None if bias is None else bias.double())
    assert torch.allclose(found.double(), wide, rtol=1e-5, atol=1e-4)
    assert not found[683:].any()
    transposed = grouped_linear(rows, weight.transpose(1, 2).contiguous(), counts, bias, transposed=True)
    assert len(given_to) == 4
    assert torch.allclose(found, transposed, rtol=1e-5, atol=1e-4)


@needs_kernel
@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_programs_run_by_it_where_torch_compiles_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = few_rows._run
    monkeypatch.setattr(few_rows, "_run", lambda *given: (runs.append(1), run(*given)))
    model = zoo.odd("llama")[0].to(dtype)
    parts = partition(model, Plan())
    ids = torch.randint(0, 100, (2, 5), generator=torch.Generator().manual_seed(0))
    found, expected = parts.simulate(input_ids=ids), model(input_ids=ids).logits
    program = parts.rank(0)
    linears = [node for node in program.graph.nodes if node.target is functional.linear]
    assert linears
    assert len(runs) == (0 if dtype == torch.float64 else len(linears))
    rounding = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)

    runs.clear()
    weights = load_weights(program.weights, program.weight_data, None, torch.device("cpu"))
    bare = build(program, ThreadGroup(program.mesh).communicator(0), torch.device("cpu"), None)
    given_to = {"input_ids": ids, "position_ids": torch.arange(5).expand(2, 5)}
    bare(*weights, *(given_to[each.name] for each in program.inputs))
    assert not runs
