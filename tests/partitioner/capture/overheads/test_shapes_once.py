"""What an op makes of shapes is found out once, and is what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from partitioner.capture.overheads.shapes_once import shapes_found_once

Op = Callable[[Tensor, Tensor], Any]
OPS: dict[str, Op] = {
    "sum": lambda x, y: x + y,
    "broadcast": lambda x, y: x[:, :1] * y,
    "whole number": lambda x, y: x.long() + 1,
    "fraction": lambda x, y: x.long() + 1.0,
    "truth": lambda x, y: x.long() + True,
    "product": lambda x, y: x @ y.t(),
    "view": lambda x, y: x.view(-1),
    "pieces": lambda x, y: x.split(2, dim=1),
    "normalised": lambda x, y: torch.ops.aten.native_layer_norm(x, [6], None, None, 1e-5),
    "largest": lambda x, y: x.topk(2),
    "transposed": lambda x, y: x.t().contiguous(),
    "joined": lambda x, y: torch.cat([x, y]),
    "made": lambda x, y: x.new_zeros(y.shape[0] + 1),
    "written to": lambda x, y: x.clone().add_(y),
    "squeezed in place": lambda x, y: x.unsqueeze(0).squeeze_(0),
    "sum of all": lambda x, y: x.sum() + y,
    "looked up": lambda x, y: torch.ops.aten.index.Tensor(x, [y.long()[:, 0]]),
}


def example(mode: FakeTensorMode, *shapes: tuple[int, ...]) -> list[Any]:
    """Tensors of symbolic sizes; equal ones are one size."""
    return [
        mode.from_tensor(
            torch.empty(shape),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK, DimDynamic.STATIC]),  # type: ignore[no-untyped-call]
        )
        for shape in shapes
    ]


def told(result: Any, *given: Tensor) -> list[Any]:
    """All that a trace sees of a result."""
    each = result if isinstance(result, (list, tuple)) else [result]
    return [
        (
            str(tuple(one.shape)), str(one.stride()), str(one.storage_offset()), one.dtype, one.device, type(one),
            [one.untyped_storage()._cdata == other.untyped_storage()._cdata for other in given],
        )
        for one in each
    ]  # fmt: skip


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops of which torch itself finds out the shapes."""
    found: list[str] = []
    own = FakeTensorMode.dispatch

    def dispatch(mode: Any, func: Any, *args: Any) -> Any:
        found.append(str(func))
        return own(mode, func, *args)

    monkeypatch.setattr(FakeTensorMode, "dispatch", dispatch)
    return found


def test_an_op_is_asked_once_for_each_of_its_operands(done: list[str]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x, y, z = example(mode, (5, 6), (5, 6), (7, 6))
    with mode, shapes_found_once():
        for _ in range(3):
            x + y, y + x, z + z
    assert done.count("aten.add.Tensor") == 2
    with mode:
        x + y
    assert done.count("aten.add.Tensor") == 3


@pytest.mark.parametrize("name", OPS)
def test_answers_are_those_of_torch(name: str) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    plainly, first, again = (example(mode, (5, 6), (5, 6)) for _ in range(3))
    with mode:
        plain = told(OPS[name](*plainly), *plainly)
        with shapes_found_once():
            for own in (first, again):
                assert told(OPS[name](*own), *own) == plain


def test_the_memory_of_a_result_is_its_own() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    (x,) = example(mode, (5, 6))
    with mode, shapes_found_once():
        one, other = x + 1, x + 1
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_what_is_given_sizes_that_are_found_to_be_equal_is_asked_anew(done: list[str]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x, y = example(mode, (6, 6), (7, 6))
    with mode, shapes_found_once():
        for _ in range(2):
            torch.cat([x, y])
        assert done.count("aten.cat.default") == 1
        torch._check(x.shape[0] + 1 == y.shape[0])
        assert str(torch.cat([x, y]).shape[0]) == str(2 * x.shape[0] + 1)
    assert done.count("aten.cat.default") == 2


def test_what_data_decides_is_another_size_each_time() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    (x,) = example(mode, (5, 6))
    with mode, shapes_found_once():
        one, other = ((x + 1).nonzero() for _ in range(2))
        more = [each.float() * 2 for each in (one, other)]
    assert str(one.shape[0]) != str(other.shape[0])
    assert [str(each.shape) for each in more] == [str(one.shape), str(other.shape)]


def test_torch_has_its_own_back() -> None:
    before = FakeTensorMode.dispatch
    with shapes_found_once():
        assert FakeTensorMode.dispatch is not before
    assert FakeTensorMode.dispatch is before
