"""Linears with the norm before them and the gate behind them become one op, and the graph says what it said."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import linear, silu

from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import AloneChannel
from runtime.communication.thread_communicator import ThreadChannel, ThreadGroup
from runtime.execution.executable import Executable, bound_graph
from runtime.execution.fusion import products
from runtime.execution.fusion.fuse_elementwise import fused
from runtime.execution.fusion.fuse_products import is_mostly_products, with_products
from runtime.execution.fusion.operations import added_norm, gated, rotated
from runtime.execution.fusion.products import chained_product, product
from runtime.generation import steps
from runtime.ops.kernels.stored.stored_linear import stored_linear
from tests.runtime.ops.test_stored import CODES, held
from tests.support import zoo


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]


def traced(function: Callable[..., Any], num_weights: int) -> fx.Graph:
    return with_products(fused(fx.symbolic_trace(function).graph), num_weights)


def agrees(function: Callable[..., Any], num_weights: int, *given: Tensor) -> list[Any]:
    """The ops of the fused graph, which says the same."""
    graph = traced(function, num_weights)
    found, wanted = fx.GraphModule({}, graph)(*given), function(*given)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
    return targets(graph)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "gpt2"])
def test_a_model_says_the_same_with_products(name: str) -> None:
    model = zoo.tiny(name)[0].double()
    parts = partition(model, Plan())
    program = parts.rank(0)
    graph = bound_graph(program, ThreadGroup(Mesh.of()).communicator(0), torch.device("cpu"), None)
    after = with_products(fused(graph), len(program.weights))
    assert product in targets(after)
    assert linear not in targets(after)
    engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0))
    ids = torch.arange(2, 16).reshape(2, 7)
    values = [ids if each.name == "input_ids" else torch.arange(7).expand(2, 7) for each in program.inputs]
    with torch.no_grad():
        said, again = (fx.GraphModule({}, each).forward(*engine.weights, *values) for each in (graph, after))
    for one, other in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (said, again)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tp", [1, 2])
def test_steps_made_of_products_write_the_same(tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As captured steps run, though nothing is captured on a CPU."""
    model = zoo.tiny("llama")[0].float()
    parts = partition(model, Plan(tp=tp))
    ids = torch.tensor([[3, 5, 7, 2], [9, 1, 4, 4]])
    wanted = parts.generate(ids, max_new_tokens=12)
    seen: list[Any] = []

    class Captured(Executable):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "captured": True})
            seen.extend(targets(self._runs))

    monkeypatch.setattr(steps, "Executable", Captured)
    assert torch.equal(partition(model, Plan(tp=tp)).generate(ids, max_new_tokens=12), wanted)
    assert product in seen


def test_a_gate_of_two_linears_and_of_one_with_both() -> None:
    x, g, u = drawn(2, 3, 8), drawn(6, 8), drawn(6, 8)

    def of_two(g: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return torch.mul(silu(linear(x, g)), linear(x, u))

    def of_one(w: Tensor, x: Tensor) -> Tensor:
        first, second = linear(x, w).split([6, 6], -1)[0], linear(x, w).split([6, 6], -1)[1]
        return torch.mul(silu(first), second)

    assert agrees(of_two, 2, g, u, x) == [product]
    w = torch.cat([g, u])
    for act_first in (True, False):
        graph = fx.Graph()
        weight, given = graph.placeholder("w"), graph.placeholder("x")
        split = graph.call_method("split", (graph.call_function(linear, (given, weight)), [6, 6], -1))
        first, second = (graph.call_function(operator.getitem, (split, at)) for at in (0, 1))
        order = (first, second) if act_first else (second, first)
        graph.output(graph.call_function(gated, (*order, "silu")))
        after = with_products(graph, 1)
        assert targets(after) == [product]
        wanted = silu(linear(x, g)) * linear(x, u) if act_first else linear(x, g) * silu(linear(x, u))
        torch.testing.assert_close(fx.GraphModule({}, after)(w, x), wanted)
    assert agrees(of_one, 1, w, x)[-1] is gated  # two products: their halves are not of one


@pytest.mark.parametrize("code", CODES)
def test_weights_that_are_held_as_stored(code: str) -> None:
    (gate, _), (weight, _) = held(code, 6, 16), held(code, 6, 16, seed=1)
    options = {"code": code, "computed_in": torch.float64}
    x, scale, bias, added = drawn(2, 16), drawn(16), drawn(6), drawn(2, 16)

    def by_graph(build: Callable[[Callable[..., fx.Node]], Any], *given: Any) -> list[Any]:
        """What `build` makes of ops on the weight's parts, and of `given`; fused, it says the same."""
        graph = fx.Graph()
        parts = [graph.placeholder(f"w{at}") for at in range(10)]
        others = [graph.placeholder(f"x{at}") for at in range(len(given))]
        graph.output(build(graph.call_function, parts[:5], parts[5:], *others))  # type: ignore[call-arg]
        # the first placeholders are weights, those of `given` that are weights too stand before the rest
        after = with_products(graph, 10 + sum(each is bias for each in given))
        found, wanted = (fx.GraphModule({}, each)(*weight, *gate, *given) for each in (after, graph))
        for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
        return targets(after)

    def with_gate(call: Any, w: Any, g: Any, x: Any) -> Any:
        first, second = (call(stored_linear, (x, *parts), options) for parts in (g, w))
        return call(gated, (first, second, "silu"))

    def with_bias(call: Any, w: Any, g: Any, bias: Any, x: Any) -> Any:
        return call(stored_linear, (x, *w, bias), options)

    def with_norm(call: Any, w: Any, g: Any, x: Any, scale: Any, added: Any) -> Any:
        both = call(added_norm, (x, added, [16], scale, 1e-5), {"scales": False})
        total, normed = (call(operator.getitem, (both, at)) for at in (0, 1))
        return call(stored_linear, (normed, *w), options), total

    def one_with_both(call: Any, w: Any, g: Any, x: Any) -> Any:
        linear = call(stored_linear, (x, *w), options)
        split = linear.graph.call_method("split", (linear, [3, 3], -1))
        return call(gated, (*(call(operator.getitem, (split, at)) for at in (1, 0)), "silu"))

    def of_made(call: Any, w: Any, g: Any, x: Any) -> Any:
        return call(stored_linear, (x, w[0], call(torch.clone, (w[1],)), *w[2:]), options)

    assert by_graph(with_gate, x) == [product]
    assert by_graph(with_bias, bias, x) == [product]
    assert added_norm not in by_graph(with_norm, x, scale, added)
    assert by_graph(one_with_both, x) == [product]
    # what is no weight may still be written when a kernel reads it early
    assert stored_linear in by_graph(of_made, x)


def norm_of_sum(n: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.add(a, b)
    return linear(torch.rms_norm(total, [8], n, 1e-5), w), total


def norm_for_two(n: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    normed = torch.rms_norm(torch.add(a, b), [8], n, 1e-5)
    return linear(normed, w), normed


def norm_alone(n: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return linear(torch.rms_norm(a, [8], n, 1e-5), w) + b[..., :5]


def norm_scaled(n: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return linear(torch.mul(n, torch.rms_norm(a, [8], None, 1e-5)), w) + b[..., :5]


def norm_scaled_for_two(n: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    normed = torch.rms_norm(a, [8], None, 1e-5)
    return linear(torch.mul(normed, n), w), normed


def test_norms_go_into_the_product_that_alone_reads_them() -> None:
    n, w, a, b = drawn(8), drawn(5, 8), drawn(2, 1, 8), drawn(2, 1, 8)
    assert added_norm not in agrees(norm_of_sum, 2, n, w, a, b)
    assert torch.rms_norm not in agrees(norm_alone, 2, n, w, a, b)
    assert torch.rms_norm not in agrees(norm_scaled, 2, n, w, a, b)
    assert torch.rms_norm in agrees(norm_scaled_for_two, 2, n, w, a, b)
    assert added_norm in agrees(norm_for_two, 2, n, w, a, b)


def chain(v: Tensor, n: Tensor, w: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.add(a, linear(h, v))
    return linear(torch.rms_norm(total, [8], n, 1e-5), w), total


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_that_is_added_to_something_adds_that_itself(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called, wrong = list[str](), 0.0

    def by_kernel(
        x: Tensor, weight: Tensor, bias: Tensor | None, gate: None, act: str, added: Tensor | None, norm: Any,
        ready: None = None,
    ) -> Any:  # fmt: skip
        called.append("bias" if bias is not None else "added" if added is not None else "plain")
        total = x if added is None else x + added
        normed = total if norm is None else torch.rms_norm(total, list(x.shape[-1:]), *norm)
        y = linear(normed, weight, None if bias is None else bias * (1.0 - wrong))
        return y if added is None else (total, y)

    given = drawn(8, 6), drawn(8), drawn(5, 8), drawn(rows, 1, 8), drawn(rows, 1, 6)
    assert agrees(chain, 3, *given).count(chained_product) == 1
    monkeypatch.setattr(products, "_by_kernel", by_kernel)
    assert product not in agrees(chain, 3, *given)
    assert called == (["bias", "plain"] if rows == 1 else ["plain", "added"])
    called.clear()
    v, n, w, a, h = (each.bfloat16() for each in given)
    chained_product(a, w, first=(h, v), norm=([8], n, 1e-5))
    assert called == ["plain", "added"]  # its weights take longer to come than what it adds
    wrong = 0.1
    if rows == 1:  # the negative control
        with pytest.raises(AssertionError):
            agrees(chain, 3, *given)


def summed_block(between: bool, size: int = 8) -> tuple[fx.Graph, list[str]]:
    """y = linear(w0 * norm(total)), total = x + all_reduce(h), with the all_reduce bound as an executable binds it."""
    graph, called = fx.Graph(), list[str]()

    class Twice(AloneChannel):
        """All others have what this rank has."""

        def sum_norm(self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
            called.append("sum_norm")
            total = residual + 2 * x
            return total, torch.rms_norm(total, [size], weight, eps)

        def sum_added(self, x: Tensor, residual: Tensor) -> Tensor:
            called.append("sum_added")
            return residual + 2 * x

    def all_reduce(x: Tensor) -> Tensor:
        called.append("all_reduce")
        return 2 * x

    def other(x: Tensor) -> Tensor:
        called.append("other")
        return x

    w, scale, x, h = (graph.placeholder(name) for name in ("w", "scale", "x", "h"))
    reduced = graph.call_function(all_reduce, (h,))
    reduced.meta["channel"] = Twice(("tp",), (0,), 0, node="all_reduce")
    x = graph.call_function(other, (x,)) if between else x
    both = graph.call_function(added_norm, (x, reduced, [size], scale, 1e-6), {"scales": True})
    total, normed = (graph.call_function(operator.getitem, (both, at)) for at in (0, 1))
    graph.output((total, graph.call_function(linear, (normed, w))))
    return graph, called


@pytest.mark.parametrize("rows", [1, 3])
def test_a_sum_over_the_ranks_goes_to_the_norm_that_alone_reads_it(rows: int) -> None:
    given = drawn(5, 8), drawn(8), drawn(rows, 8), drawn(rows, 8)
    for between in (False, True):
        graph, called = summed_block(between)
        wanted = fx.GraphModule({}, graph)(*given)
        after = with_products(graph, 2)
        called.clear()
        for one, other in zip(fx.GraphModule({}, after)(*given), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
        # one row's product takes the norm itself; what might communicate in between keeps its place
        by_one = "sum_norm" if rows > 1 else "sum_added"
        assert called == (["all_reduce", "other"] if between else [by_one])
        assert is_mostly_products(after, [])


def test_steps_over_ranks_take_sums_with_their_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """As captured steps run, though nothing is captured on a CPU, over a channel that has such a way."""
    model = zoo.tiny("llama")[0].float()
    ids, called = torch.tensor([[3, 5, 7, 2], [9, 1, 4, 4]]), 0
    wanted = partition(model, Plan()).generate(ids, max_new_tokens=12)

    class Captured(Executable):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "captured": True})

    def sum_norm(
        self: ThreadChannel, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, wrong: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        nonlocal called
        called += 1
        total = residual + self.all_reduce(x) * (1.0 + wrong)
        return total, torch.rms_norm(total, list(x.shape[-1:]), weight, eps)

    monkeypatch.setattr(steps, "Executable", Captured)
    monkeypatch.setattr(ThreadChannel, "sum_norm", sum_norm)
    assert torch.equal(partition(model, Plan(tp=2)).generate(ids, max_new_tokens=12), wanted)
    assert called
    monkeypatch.setattr(ThreadChannel, "sum_norm", functools.partialmethod(sum_norm, wrong=0.5))
    assert not torch.equal(partition(model, Plan(tp=2)).generate(ids, max_new_tokens=12), wanted)


def test_what_the_graph_makes_of_a_weight_is_no_weight() -> None:
    """A kernel of a product reads weights early: before what computes them would have ended."""

    def made(w: Tensor, x: Tensor) -> Tensor:
        return linear(x, torch.mul(w, 2.0))

    w, x = drawn(5, 8), drawn(2, 8)
    assert product not in agrees(made, 1, w, x)
    assert product not in agrees(lambda w, x: linear(x, w), 0, w, x)
    assert product in agrees(lambda w, x: linear(x, w), 1, w, x)


@pytest.mark.parametrize("does", [True, False])
def test_a_rotation_goes_into_an_attention_that_does_it(does: bool) -> None:
    asked: list[Any] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, rotation: Any = None) -> Tensor:
        asked.append(rotation)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    attend.rotates = lambda q, cos, sin, half: does  # type: ignore[attr-defined]
    graph = fx.Graph()
    q, k, v, cos, sin = (graph.placeholder(name) for name in ("q", "k", "v", "cos", "sin"))
    turned = [graph.call_function(rotated, (x, cos, sin, 4)) for x in (q, k)]
    graph.output(graph.call_function(attend, (*turned, v)))
    after = with_products(graph, 0)
    assert rotated not in targets(after)
    given = [drawn(2, 3, 1, 8) for _ in range(3)] + [drawn(2, 1, 1, 8) for _ in range(2)]
    found, wanted = (fx.GraphModule({}, each)(*given) for each in (after, graph))
    torch.testing.assert_close(found, wanted)
    assert (asked[0] is not None) == does
    # of two different rotations there is not one
    other = fx.Graph()
    q, k, v, cos, sin = (other.placeholder(name) for name in ("q", "k", "v", "cos", "sin"))
    turned = [other.call_function(rotated, (x, *by, 4)) for x, by in ((q, (cos, sin)), (k, (sin, cos)))]
    other.output(other.call_function(attend, (*turned, v)))
    assert targets(with_products(other, 0)).count(rotated) == 2


def test_only_what_was_there_before_the_step_is_read_ahead() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ahead: bool = False) -> Tensor:
        return q * k * v + positions + (100.0 if ahead else 0.0)

    attend.rotates = lambda *given: False  # type: ignore[attr-defined]
    for at, shifts in ((1, False), (1, True), (2, False)):
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in ("given", "positions", "q", "k", "v")]
        positions = graph.call_function(torch.add, (nodes[1], 2)) if shifts else nodes[1]
        graph.output(graph.call_function(attend, (*nodes[2:], positions)))
        # the second placeholder is a weight in the last case, and none of the inputs that a step finds written
        after = with_products(graph, at)
        (node,) = (node for node in after.nodes if node.target is attend)
        assert node.kwargs.get("ahead", False) == (at == 1 and not shifts)
    # an attention without a kernel takes no such word
    del attend.rotates  # type: ignore[attr-defined]
    (node,) = (node for node in with_products(graph, 1).nodes if node.target is attend)
    assert not node.kwargs


def test_what_is_left_for_a_compiler() -> None:
    def long(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.sin(x)
        return linear(x, w)

    weights = [torch.zeros(5, 8)]
    short = traced(lambda w, x: linear(torch.sin(x), w), 1)
    assert is_mostly_products(short, weights)
    assert not is_mostly_products(traced(long, 1), weights)
    assert not is_mostly_products(short, [weights[0].double()])  # no kernel takes it


def test_the_kernel_is_not_for_this_device() -> None:
    from runtime.ops.kernels.decode.few_rows import can_launch_early, takes

    assert not takes(torch.zeros(1, 8), torch.zeros(5, 8))
    assert not can_launch_early(torch.device("cpu"))
