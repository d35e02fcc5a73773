"""In-place ops become pure ones, whatever looks at the memory that they write."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from partitioner.capture.trace.functionalize import functionalize, is_in_place
from partitioner.errors import CaptureError


def plain(x: Tensor) -> Tensor:
    return (x * 2).add_(1).mul_(3)


def base_read_later(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 7
    return y + 1


def view_read_later(x: Tensor) -> Tensor:
    y = x * 2
    view = y[:, 1:3]
    y.add_(1)
    return view * y.sum()


def two_views(x: Tensor) -> Tensor:
    y = (x * 2).view(-1, 2, 2).transpose(1, 2)
    y[:, 0, :] += 5
    y[:, :, 1].mul_(y[:, 0, :].sum())
    return y.reshape(-1)


def pieces(x: Tensor) -> Tensor:
    y = x * 2
    first, second = y.split([1, 3], dim=1)
    first.zero_()
    second[:, 1:].fill_(2)
    return y


def a_loop(x: Tensor) -> Tensor:
    y = x * 1
    for i in range(1, 4):
        row = y[..., i].clone()
        y[..., i] = row + (y[..., :i] * row[..., None]).sum(-1)
    return y


def narrower(x: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y.add_(torch.ones(4, dtype=torch.float64))
    return y


# torch 2.13 warns about its own use of a deprecated class
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@pytest.mark.parametrize("function", [plain, base_read_later, view_read_later, two_views, pieces, a_loop, narrower])
def test_same_values_without_a_write(function: Callable[[Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = torch.randn(3, 4, dtype=torch.float64)
    exported = torch.export.export(Module(), (x,), strict=False)
    before = exported.module()(x)
    assert any(is_in_place(node) for node in exported.graph.nodes)
    same = functionalize(exported)
    assert same is exported  # without a second trace
    assert not any(is_in_place(node) for node in same.graph.nodes)
    same.graph.lint()
    same.graph_module.recompile()
    after = same.module()(x)
    assert after.dtype == before.dtype
    assert torch.equal(after, before)
    assert torch.equal(after, function(x))


def test_what_the_tables_do_not_hold_is_left_to_torch() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.diagonal().zero_()
            return y

    x = torch.randn(4, 4)
    exported = functionalize(torch.export.export(Module(), (x,), strict=False))
    assert not any(is_in_place(node) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), Module()(x))


def test_a_write_to_a_weight_is_refused() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    exported = torch.export.export(Module(), (torch.randn(4),), strict=False)
    with pytest.raises(CaptureError, match=r"writes to the weight 'b_calls'"):
        functionalize(exported)


class _Writes(nn.Module):
    def forward(self, y: Tensor) -> None:
        y[:, 0].copy_(y[:, 1] + 1)


def test_what_a_module_writes_into_a_tensor_of_another_is_of_that_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _Writes()

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            self.inner(y)
            return y

    graph = functionalize(torch.export.export(Model(), (torch.ones(2, 3),), strict=False)).graph
    (put_back,) = (node for node in graph.nodes if node.target is torch.ops.aten.select_scatter.default)
    assert list(put_back.meta["nn_module_stack"].values())[-1][0].endswith("inner")
