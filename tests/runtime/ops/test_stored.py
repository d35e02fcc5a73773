"""Products with weights that are held as codes and scales, against the weights as numbers."""

import pytest
import torch
from torch import Tensor

from runtime.ops.experts import grouped_linear
from runtime.ops.kernels.stored.codes import FLOAT4, Stored, nibbles, pack_nibbles
from runtime.ops.kernels.stored.dot_rows import takes
from runtime.ops.kernels.stored.scales import run_of
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear, stored_weight
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

CODES = ("float8", "float4", "int4")
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def held(code: str, *shape: int, seed: int = 0, run: int = 0) -> tuple[Parts, Tensor]:
    """Codes and scales of a random weight [.., N, K], with rows and columns in any order; and its numbers, float64.

    run: so many columns, one after the other, share their scale.
    """
    draw = torch.Generator().manual_seed(seed)
    *lead, rows, cols = shape
    kinds, groups = 3, -(-cols // 8)
    row = torch.randint(0, kinds, (*lead, rows), generator=draw, dtype=torch.int32)
    column = torch.randint(0, groups, (cols,), generator=draw, dtype=torch.int32)
    if run:
        column = (torch.arange(cols) // run * 5 % groups).to(torch.int32)
    zeros = None
    if code == "float8":
        codes = torch.randn(*shape, generator=draw).to(torch.float8_e4m3fn)
        numbers = codes.double()
    else:
        plain = torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
        codes = pack_nibbles(plain)
        numbers = torch.tensor(FLOAT4, dtype=torch.float64)[plain.long()] if code == "float4" else plain.double()
    scales = torch.rand(kinds, groups, generator=draw) + 0.5
    factors = scales.double()
    if code == "float4":
        scales = torch.randint(124, 131, (kinds, groups), generator=draw, dtype=torch.uint8)
        factors = 2.0 ** (scales.double() - 127)
    place = row.long()[..., None], column.long()
    if code == "int4":
        zeros = torch.randint(0, 17, (kinds, groups), generator=draw, dtype=torch.uint8)
        numbers = numbers - zeros.double()[place]
    return (codes, scales, zeros, row, column), numbers * factors[place]


@pytest.mark.parametrize("cols", [1, 7, 32])
@pytest.mark.parametrize("code", CODES)
def test_a_weight_is_its_codes_times_its_scales(code: str, cols: int) -> None:
    parts, numbers = held(code, 5, cols)
    found = stored_weight(*parts, code=code, computed_in=torch.float64, dtype=torch.float64)
    torch.testing.assert_close(found, numbers, rtol=0, atol=0)
    turned = stored_weight(*parts, code=code, computed_in=torch.float64, dtype=torch.float64, turned=True)
    assert torch.equal(turned, found.T)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_linears_are_those_of_the_numbers(code: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, numbers = held(code, 9, 14)
    x = torch.randn(2, tokens, 14, dtype=torch.float64)
    bias = torch.randn(9, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, numbers, bias)
    options = {"code": code, "computed_in": torch.float64}
    torch.testing.assert_close(stored_linear(x, *parts, bias, **options), expected)
    monkeypatch.setattr("runtime.ops.kernels.stored.stored_linear._STRIP", 40)  # two rows at a time
    torch.testing.assert_close(stored_linear(x, *parts, bias, **options), expected)
    codes, scales, *rest = parts
    if tokens:
        wrong = stored_linear(x, codes, scales.flip(0), *rest, bias, **options)
        assert not torch.allclose(wrong, expected), "another scale would not be noticed"


@pytest.mark.parametrize("code", CODES)
def test_experts_are_those_of_the_numbers(code: str) -> None:
    parts, numbers = held(code, 4, 6, 10)
    counts = torch.tensor([2, 0, 3, 1])
    x = torch.randn(8, 10, dtype=torch.float64)  # two rows of no expert
    bias = torch.randn(4, 6, dtype=torch.float64)
    found = stored_grouped_linear(x, *parts, counts, bias, code=code, computed_in=torch.float64)
    torch.testing.assert_close(found, grouped_linear(x, numbers, counts, bias))


def test_codes_survive_packing() -> None:
    codes = torch.arange(45, dtype=torch.uint8).reshape(3, 15) % 16
    assert torch.equal(nibbles(pack_nibbles(codes), 0, 15), codes)
    words = (torch.arange(7)[None] * 0x1234567).to(torch.int32)
    assert torch.equal(nibbles(words.T, 0, 8), nibbles(torch.stack(list(words.T)), 0, 8))
    for part in (
        words[:, :1].T,
        words[:1],
        words[:, :1],
        words[:1].T,
    ):  # a column, of which each stride may be anything
        assert torch.equal(
            nibbles(part, 0, 8 * part.shape[1]), nibbles(part.clone().contiguous(), 0, 8 * part.shape[1])
        )


@pytest.mark.parametrize(
    ("columns", "run"),
    [
        ([0] * 7, 128),
        ([0] * 128 + [1] * 5, 128),
        ([0] * 64 + [1] * 128 + [0] * 128, 64),  # a shard that begins within a block
        ([3] * 32 + [1] * 32, 32),
        ([0] * 31 + [1] * 32, 0),
        ([0, 1, 0, 1], 0),
    ],
)
def test_runs_of_columns_with_one_scale(columns: list[int], run: int) -> None:
    given = torch.tensor(columns, dtype=torch.int32)
    assert run_of(given) == run
    assert run_of(given) == run, "remembered"


INTERPRETED = """
import torch
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear
from runtime.ops.kernels.stored.stored_products import product
from tests.runtime.ops.test_stored import CODES, CASES, held

torch.manual_seed(0)
for code in CODES:
    for tokens, rows, cols, run, dtype in CASES:
        parts, _ = held(code, rows, cols, run=run)
        x, bias = torch.randn(tokens, cols).to(dtype), torch.randn(rows).to(dtype)
        options = {"code": code, "computed_in": torch.float32}
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
        found = product(x, *parts, bias, None, code)
        expected = stored_linear(x.float(), *parts, bias.float(), **options).to(dtype)
        torch.testing.assert_close(found, expected, **tolerance)
        wrong = product(x, parts[0], parts[1].flip(1), *parts[2:], bias, None, code)
        assert not torch.allclose(wrong, expected, **tolerance) or len(parts[4].unique()) == 1

        parts, _ = held(code, 5, rows, cols, run=run)
        counts = torch.tensor([tokens // 2, 0, 1, tokens // 3, 0])
        x, bias = torch.randn(tokens + 2, cols).to(dtype), torch.randn(5, rows).to(dtype)
        found = product(x, *parts, bias, counts, code)
        expected = stored_grouped_linear(x.float(), *parts, counts, bias.float(), **options).to(dtype)
        torch.testing.assert_close(found, expected, **tolerance)
        assert not found[int(counts.sum()) :].any()
"""
CASES = [
    (1, 70, 131, 0, torch.float32),
    (20, 33, 65, 32, torch.float32),
    (1, 70, 256, 64, torch.bfloat16),
    (1, 13, 226, 32, torch.float16),
    (9, 5, 96, 32, torch.float16),  # the interpreter has no products of tiles of bfloat16
]
"""Tokens, rows, columns, how many of these share their scale, and what is multiplied."""


@pytest.mark.slow
@needs_triton
def test_the_kernel_is_the_plain_form_in_tritons_interpreter() -> None:
    assert_interpreted(INTERPRETED)


FEW_ROWS = """
import itertools

import torch
from runtime.execution.fusion.operations import ACTIVATIONS
from runtime.ops.kernels.stored.few_rows import Stored, few_rows
from tests.runtime.ops.test_stored import CODES, held

torch.manual_seed(0)
for code, rows, (num_out, inner, run), way in itertools.product(CODES, (1, 2), [(13, 64, 32), (9, 4160, 64)], range(4)):
    weight, numbers = held(code, num_out, inner, run=run)
    gate, others = held(code, num_out, inner, run=run, seed=1)
    x, added = torch.randn(2, rows, inner)
    norm = (torch.randn(inner) if way == 2 else None, 1e-5) if way else None
    bias = torch.randn(num_out) if way == 0 else None
    total = x + added if way >= 2 else x
    h = total.double()
    if norm is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * (1.0 if norm[0] is None else norm[0].double())
    wanted = h @ numbers.T + (0.0 if bias is None else bias.double())
    if way in (1, 3):
        wanted = wanted * ACTIVATIONS["silu"](h @ others.T)
    named = {"gate": Stored(*gate, code), "act": "silu"} if way in (1, 3) else {}
    named |= {"added": added} if way >= 2 else {}

    def product(scales):
        found = few_rows(x, Stored(weight[0], scales, *weight[2:], code), bias, norm=norm, **named)
        if way >= 2:
            assert torch.equal(found[0], total)
            found = found[1]
        return float((found.double() - wanted).abs().max() / wanted.abs().max())

    assert product(weight[1]) < 3e-6, (code, rows, num_out, way)
    assert product(weight[1].flip(0)) > 1e-3
"""


@pytest.mark.slow
@needs_triton
def test_products_of_few_rows_are_those_of_the_numbers_in_tritons_interpreter() -> None:
    assert_interpreted(FEW_ROWS, timeout_s=900)


DOT_ROWS = """
import torch
from runtime.execution.fusion.operations import ACTIVATIONS
from runtime.ops.kernels.stored.codes import Stored
from runtime.ops.kernels.stored.dot_rows import _are_wide as are_wide, dot_rows
from runtime.ops.kernels.stored.stored_linear import stored_weight
from tests.runtime.ops.test_stored import held

torch.manual_seed(0)

def in_order(parts, dtype):
    codes, scales, zeros, rows, columns = parts
    groups = len(columns) // 128
    zeros = None if zeros is None else zeros[:, :groups].contiguous()
    columns = (torch.arange(len(columns)) // 128).to(torch.int32)
    parts = (codes, scales[:, :groups].to(dtype).contiguous(), zeros, rows, columns)
    return parts, stored_weight(*parts, code="int4", computed_in=torch.float64, dtype=torch.float64)

for code, rows, num_out, inner, way, dtype in [
    ("float8", 1, 37, 640, 2, None), ("float8", 3, 5, 1024, 3, None), ("int4", 1, 20, 640, 3, None),
    ("int4", 8, 37, 2048, 0, None), ("int4", 2, 16, 128, 1, None), ("int4", 1, 3, 1024, 2, torch.float16),
    ("int4", 1, 17, 768, 3, torch.bfloat16),
]:
    weight, numbers = held(code, num_out, inner, run=128)
    gate, others = held(code, num_out, inner, run=128, seed=1)
    if dtype is not None:
        (weight, numbers), (gate, others) = in_order(weight, dtype), in_order(gate, dtype)
        assert are_wide(Stored(*weight, code))
    x, added = torch.randn(2, rows, inner).bfloat16()
    norm = (torch.randn(inner).bfloat16() if way == 2 else None, 1e-5) if way else None
    bias = torch.randn(num_out).bfloat16() if way == 0 else None
    total = x + added if way >= 2 else x
    h = total.double()
    if norm is not None:
        factor = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
        h = factor * (h if norm[0] is None else (total * norm[0]).double())
    wanted = h @ numbers.T + (0.0 if bias is None else bias.double())
    if way in (1, 3):
        wanted = wanted * ACTIVATIONS["silu"](h @ others.T)
    named = {"gate": Stored(*gate, code), "act": "silu"} if way in (1, 3) else {}
    named |= {"added": added} if way >= 2 else {}

    def error(scales):
        found = dot_rows(x, Stored(weight[0], scales, *weight[2:], code), bias, norm=norm, **named)
        if way >= 2:
            assert torch.equal(found[0], total)
            found = found[1]
        return float(((found.double() - wanted).abs() / (wanted.abs() + 1e-3 * wanted.abs().max())).max())

    assert error(weight[1]) < 2**-7, (code, rows, num_out, way)
    assert error(weight[1].flip(0)) > 2**-4
"""


@pytest.mark.slow
@needs_triton
def test_products_by_tensor_cores_are_those_of_the_numbers_in_tritons_interpreter() -> None:
    assert_interpreted(DOT_ROWS, timeout_s=900)


READY_ROWS = """
import torch
from runtime.ops.kernels.stored.codes import Stored
from runtime.ops.kernels.stored.dot_rows import dot_rows, sum_for_norm, takes_ready
from tests.runtime.ops.test_stored import held

torch.manual_seed(0)
for code, num_out, width, gated, first, inner in [
    ("float8", 40, 640, True, "int4", 384), ("int4", 37, 640, False, "float8", 256),
    ("int4", 20, 1024, True, "int4", 128),
]:
    (weight, numbers), (gate, gates) = (held(code, num_out, width, run=128, seed=seed) for seed in (0, 1))
    of_h, first_numbers = held(first, width, inner, run=128, seed=2)
    h, x, scale = torch.randn(1, inner).bfloat16(), torch.randn(1, width).bfloat16(), torch.randn(width).bfloat16()
    weight, gate, of_h = Stored(*weight, code), Stored(*gate, code), Stored(*of_h, first)
    behind = {"gate": gate, "act": "silu"} if gated else {}
    assert takes_ready(h, of_h, weight, gate if gated else None)

    def error(scale):
        total, ready = sum_for_norm(h, of_h, x, scale, code)
        sums = x.double() + h.double() @ first_numbers.T
        assert (total.double() - sums).norm() < 6e-3 * sums.norm()
        return (dot_rows(total, weight, norm=(scale, 1e-5), ready=ready, **behind).double() - wanted(total)).norm()

    def wanted(total):
        normed = total.double() * torch.rsqrt(total.double().square().mean() + 1e-5) * scale.double()
        found = normed @ numbers.T
        return found * torch.nn.functional.silu(normed @ gates.T) if gated else found

    size = wanted(sum_for_norm(h, of_h, x, scale, code)[0]).norm()
    assert error(scale) < 2e-2 * size  # the interpreter cuts what a GPU rounds
    assert error(scale.flip(0)) > 0.1 * size
"""


@pytest.mark.slow
@needs_triton
def test_rows_made_ready_for_their_norm_in_tritons_interpreter() -> None:
    assert_interpreted(READY_ROWS, timeout_s=900)


DOT_EXPERTS = """
import torch
from runtime.ops.experts import grouped_linear
from runtime.ops.kernels.stored import dot_rows
from runtime.ops.kernels.stored.codes import Stored
from runtime.ops.kernels.stored.stored_linear import stored_weight
from tests.runtime.ops.test_stored import held

torch.manual_seed(0)
for num_out, inner in [(20, 160), (37, 1184)]:
    parts, _ = held("float4", 5, num_out, inner, run=32)
    assert not dot_rows.takes_experts(torch.zeros(4, inner).bfloat16(), Stored(*parts, "float4")), "scales above 2"
    parts = (parts[0], parts[1].clamp(max=128), *parts[2:])
    numbers = stored_weight(*parts, code="float4", computed_in=torch.float64, dtype=torch.float64)
    counts = torch.tensor([1, 0, 2, 0, 1])
    x, bias = torch.randn(5, inner).bfloat16(), torch.randn(5, num_out).bfloat16()
    wanted = grouped_linear(x.double(), numbers, counts, bias.double())

    def error(scales):
        weight = Stored(parts[0], scales, *parts[2:], "float4")
        assert dot_rows.takes_experts(x, weight)
        found = dot_rows.dot_experts(x, weight, bias, counts)
        assert not found[4:].any()
        return float((found.double() - wanted)[:4].abs().max() / wanted.abs().max())

    assert error(parts[1]) < 2**-7
    assert error(parts[1].flip(1)) > 2**-4
"""


@pytest.mark.slow
@needs_triton
def test_experts_by_tensor_cores_are_those_of_the_numbers_in_tritons_interpreter() -> None:
    assert_interpreted(DOT_EXPERTS, timeout_s=900)


def test_which_products_tensor_cores_take() -> None:
    def taken(code: str, rows: int, inner: int, run: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return takes(torch.zeros(rows, inner, dtype=dtype), Stored(*held(code, 4, inner, run=run)[0], code))

    assert taken("float8", 2, 640, 64)
    assert taken("int4", 8, 640, 128)
    assert taken("int4", 1, 8192, 128)
    assert not taken("int4", 1, 4096, 128), "too short for one row"
    assert not taken("int4", 2, 640, 64)
    assert not taken("float8", 2, 640, 32)
    assert not taken("int4", 2, 704, 128)
    assert not taken("int4", 9, 640, 128)
    assert not taken("int4", 2, 640, 128, torch.float16)
    assert not taken("float4", 2, 640, 128)
