"""Products of several rows in Triton's interpreter, against float64; what takes them, and how they are shared out."""

import pytest
import torch

from runtime.ops.kernels.tiles import several_rows as kernels
from runtime.ops.kernels.tiles.several_rows import takes
from runtime.ops.kernels.triton_needs import replayed
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

CODE = """
import torch
from runtime.execution.fusion.operations import ACTIVATIONS
from runtime.ops.kernels.tiles import several_rows as kernels

def off(rows, num_out, inner, *, gated=False, bias=False, act="silu", pad=0, cut=0, processors=132, wrong=False):
    torch.manual_seed(0)
    kernels._processors = lambda device: processors
    draw = lambda *shape: torch.randn(*shape).half()  # the interpreter has no products of tiles of bfloat16
    x, (weight, gate) = draw(rows, inner + cut)[:, cut:], draw(2, num_out, inner + pad)[..., :inner] / inner**0.5
    added = draw(num_out) if bias else None
    exact = x.double() @ weight.double().T
    if gated:
        exact = exact * ACTIVATIONS[act](x.double() @ gate.double().T)
    if bias:
        exact = exact + added.double()
    weight = weight.flip(0) if wrong else weight
    for _ in range(2):  # what a call leaves behind serves the next one
        found = kernels.several_rows(x, weight, added, gate=gate if gated else None, act=act if gated else "")
    assert not kernels._counters(x.device).any()
    return float((found.double() - exact).abs().max() / exact.abs().max())
"""
CASES = [
    "3, 200, 576, bias=True, cut=8",
    "33, 100, 264, gated=True, pad=8",
    "17, 130, 1024, gated=True, act='gelu', processors=8",
    "64, 72, 1032, bias=True, processors=9",
]


@needs_triton
def test_products_are_those_of_float64() -> None:
    checks = "\n".join(f"assert off({case}) < 1e-3, {case!r}" for case in CASES)
    assert_interpreted(f"{CODE}\n{checks}\nassert off({CASES[0]}, wrong=True) > 0.1")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", ["sums += tl.load(parts", "sums *= activated("])
def test_a_part_that_is_left_out_is_noticed(part: str) -> None:
    """The negative control."""
    source = f"""
import pathlib, sys, tempfile, importlib.util
from runtime.ops.kernels.tiles import several_rows_kernel as kernel
text = pathlib.Path(kernel.__file__).read_text()
assert {part!r} in text
file = pathlib.Path(tempfile.mkdtemp(), "several_rows_kernel.py")
file.write_text(text.replace({part!r}, {part!r}.replace("+=", "=").replace("*=", "=")))
spec = importlib.util.spec_from_file_location(kernel.__name__, file)
spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
kernel.several_rows = module.several_rows
"""
    assert_interpreted(f"{CODE}\n{source}\nassert off({CASES[2]}) > 0.1")


def test_the_kernel_is_not_for_this_device() -> None:
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(128, 64).bfloat16()
    with replayed():
        assert not takes(x, weight, None, None)


@pytest.mark.parametrize(
    ("tiles", "steps", "splits"), [(64, 64, 2), (48, 64, 2), (112, 64, 1), (200, 64, 1), (32, 5, 1), (1, 224, 16)]
)
def test_every_processor_has_a_program(tiles: int, steps: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_processors", lambda device: 132)
    assert kernels._splits(tiles, steps, torch.device("cpu")) == splits
