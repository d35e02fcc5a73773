"""Chains of elementwise ops become one op each, and the graph says what it said."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.execution.executable import bound_graph
from runtime.execution.fusion import operations
from runtime.execution.fusion.fuse_elementwise import fused
from runtime.execution.fusion.operations import added_norm, gated, rotated
from runtime.ops.kernels.triton_needs import replayed
from tests.support import zoo


def traced(function: Callable[..., Any]) -> fx.Graph:
    return fx.symbolic_trace(function).graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", torch.float64, {rotated, gated}),  # its norms go through float32, which float64 keeps written out
        ("llama", torch.float32, {rotated, gated, added_norm}),
        ("gemma", torch.float64, {rotated, gated}),
    ],
)
def test_a_model_says_the_same_with_fewer_ops(name: str, dtype: torch.dtype, expected: set[Any]) -> None:
    model = zoo.tiny(name)[0].to(dtype)
    parts = partition(model, Plan())
    program = parts.rank(0)
    graph = bound_graph(program, ThreadGroup(Mesh.of()).communicator(0), torch.device("cpu"), None)
    after = fused(graph)
    assert expected <= set(targets(after))
    assert len(after.nodes) < len(graph.nodes)
    weights = [model.get_parameter(w.name) if w.source == "checkpoint" else None for w in program.weights]
    engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0))
    given = [w if w is not None else engine.weights[i] for i, w in enumerate(weights)]
    ids = torch.arange(2, 16).reshape(2, 7)
    values = [ids if each.name == "input_ids" else torch.arange(7).expand(2, 7) for each in program.inputs]
    with torch.no_grad():
        said, again = (fx.GraphModule({}, each).forward(*given, *values) for each in (graph, after))
    close = 1e-13 if dtype == torch.float64 else 1e-5
    for one, other in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (said, again)), strict=True):
        torch.testing.assert_close(one, other, rtol=close, atol=close)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(torch.mul(x, cos), torch.mul(torch.roll(x, [-4], [-1]), sin))


def test_a_rotation_is_one_op_in_every_order() -> None:
    def reversed_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.add(torch.mul(sin, torch.roll(x, [-4], [-1])), torch.mul(cos, x))

    x, cos, sin = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    for function in (turned, reversed_order):
        graph = fused(traced(function))
        assert targets(graph) == [rotated]
        torch.testing.assert_close(
            fx.GraphModule({}, graph)(x, cos[:, :1], sin[:1, :1]), turned(x, cos[:, :1], sin[:1, :1])
        )


def of_another(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(torch.mul(y, cos), torch.mul(torch.roll(x, [-4], [-1]), sin))


def along_another_dim(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(torch.mul(x, cos), torch.mul(torch.roll(x, [-4], [-2]), sin))


def with_alpha(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(torch.mul(x, cos), torch.mul(torch.roll(x, [-4], [-1]), sin), alpha=2)


def read_twice(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    straight = torch.mul(x, cos)
    return straight, torch.add(straight, torch.mul(torch.roll(x, [-4], [-1]), sin))


@pytest.mark.parametrize("function", [of_another, along_another_dim, with_alpha, read_twice])
def test_what_is_no_rotation_stays(function: Callable[..., Any]) -> None:
    assert rotated not in targets(fused(traced(function)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda a, b: torch.mul(functional.silu(a), b), "silu"),
        (lambda a, b: torch.mul(b, functional.gelu(a)), "gelu"),
        (lambda a, b: operator.mul(functional.gelu(a, approximate="tanh"), b), "gelu_tanh"),
        (lambda a, b: torch.mul(torch.relu(a), b), "relu"),
        (lambda a, b: torch.mul(torch.sigmoid(a), b), "sigmoid"),
    ],
)
def test_a_gate_is_one_op(function: Callable[..., Tensor], name: str) -> None:
    graph = fused(traced(function))
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    assert (node.target, node.args[2]) == (gated, name)
    a, b = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(fx.GraphModule({}, graph)(a, b), function(a, b))


def test_a_norm_takes_the_sum_before_it_and_its_weight() -> None:
    def block(a: Tensor, b: Tensor, w: Tensor) -> Any:
        total = torch.add(a, b)
        return torch.mul(w, torch.rms_norm(total, [6], None, 1e-6)), torch.neg(total)

    graph = fused(traced(block))
    assert targets(graph) == [added_norm, operator.getitem, operator.getitem, torch.neg]
    a, b, w = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64), torch.rand(6).double()
    for found, wanted in zip(fx.GraphModule({}, graph)(a, b, w), block(a, b, w), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_sum_that_is_read_before_its_norm_is_complete_stays() -> None:
    def block(a: Tensor, b: Tensor, make: Tensor) -> Any:
        total = torch.add(a, b)
        weight = torch.sum(torch.mul(total, make), 0)
        return torch.mul(weight, torch.rms_norm(total, [6], None, 1e-6))

    graph = fused(traced(block))
    a, b, make = (torch.randn(3, 6, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(fx.GraphModule({}, graph)(a, b, make), block(a, b, make))


def test_what_no_kernel_takes_is_computed_as_before() -> None:
    a, b = torch.randn(2, 5, 6), torch.randn(1, 6)
    torch.testing.assert_close(gated(a, b, "silu"), functional.silu(a) * b)
    total, normed = added_norm(a, b, [6], torch.ones(2, 5, 6), 1e-6, scales=True)
    torch.testing.assert_close(total, a + b)
    torch.testing.assert_close(normed, torch.rms_norm(a + b, [6], None, 1e-6))


@pytest.mark.parametrize("scales", [True, False])
def test_a_norm_rounds_as_before_where_no_kernel_takes_it(scales: bool) -> None:
    torch.manual_seed(0)
    a, b, w = (torch.randn(64, 6).bfloat16() for _ in range(3))
    w = w[0]
    once, twice = torch.rms_norm(a + b, [6], w, 1e-6), w * torch.rms_norm(a + b, [6], None, 1e-6)
    assert not torch.equal(once, twice)
    assert torch.equal(added_norm(a, b, [6], w, 1e-6, scales=scales)[1], twice if scales else once)


class OnGpu(torch.Tensor):
    """As far as it says."""

    is_cuda = True


def test_few_tokens_are_for_kernels_only_where_launches_cost_the_host_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "missing_for_triton", lambda: "")
    x = torch.zeros(4, 8).as_subclass(OnGpu)
    assert operations.takes(1024, x)
    assert not operations.takes(1023, x)
    with replayed():
        assert operations.takes(1, x)
    assert not operations.takes(1023, x)
