"""The fuse pass: what becomes fewer ops, what is left alone, and that the results stay equal to the last bit."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner.compile.parts import Parts
from partitioner.compile.tracing.trace import trace
from partitioner.program.node_arguments import operation
from partitioner.program.plan import Plan
from partitioner.program.program import Input, Program, Value
from partitioner.proof.layouts import check
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split
from partitioner.sharding.mesh import Mesh
from passes.fuse import Fuse
from passes.tensor_parallel import TensorParallel
from tests.support import zoo

aten = torch.ops.aten

SHAPE = (2, 3, 8)


class Sketch:
    """A program of one input `x` (and more), written op by op; shapes and dtypes come from running each op."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.graph = fx.Graph()
        self.known: dict[fx.Node, Any] = {}
        self.inputs: dict[str, Tensor] = {}
        for i, shape in enumerate(shapes or (SHAPE,)):
            node = self.graph.placeholder(f"x{i}")
            self.inputs[f"x{i}"] = self.known[node] = (torch.randn(shape, generator=generator) * 8).to(dtype)
            node.meta = {"val": Value(shape, dtype), "layout": REPLICATED(len(shape))}
        self.x, *self.others = self.known

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), self.known.__getitem__)
        self.known[node] = result = target(*values[0], **values[1])
        one = isinstance(result, Tensor)
        values = [Value(tuple(r.shape), r.dtype) for r in ([result] if one else result)]
        node.meta = {"val": values[0] if one else values}
        if one:
            node.meta["layout"] = REPLICATED(result.dim())
        return node

    def fused(self, *results: fx.Node) -> Counter[str]:
        """Fuses; the ops after it. The results must be the same to the last bit."""
        self.graph.output(results)
        inputs = tuple(Input(name, Value(tuple(x.shape), x.dtype), "required") for name, x in self.inputs.items())
        program = Program(self.graph, inputs, {}, {}, {}, Mesh.of())
        names = [node.name for node in results]
        expected = [self.known[node] for node in results]
        Fuse().run(program)
        check(program)
        found = Parts(program, None).simulate_ranks(**self.inputs)[0]
        for name, a, b in zip(names, found, expected, strict=True):
            assert torch.equal(a, b), name
        return ops(program)


def ops(program: Program) -> Counter[str]:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return Counter(str(operation(node)).removeprefix("aten.") for node in calls)


# -- norms -------------------------------------------------------------------------------------------------------------


def norm(s: Sketch, x: fx.Node, *, eps: Any = 1e-6, dims: Any = (-1,), square: Any = None) -> fx.Node:
    squared = (square or (lambda x: s(aten.pow.Tensor_Scalar, x, 2)))(x)
    mean = s(aten.mean.dim, squared, list(dims), True)
    return s(aten.mul.Tensor, x, s(aten.rsqrt.default, s(aten.add.Tensor, mean, eps)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "square",
    [
        lambda s: lambda x: s(aten.pow.Tensor_Scalar, x, 2),
        lambda s: lambda x: s(aten.mul.Tensor, x, x),
        lambda s: lambda x: s(aten.square.default, x),
    ],
)
def test_a_norm_and_its_weight_become_one_op(square: Callable[..., Any], first: bool) -> None:
    s = Sketch(SHAPE, SHAPE[-1:])
    (weight,) = s.others
    scaled = norm(s, s.x, square=square(s))
    assert s.fused(s(aten.mul.Tensor, *((weight, scaled) if first else (scaled, weight)))) == {"rms_norm": 1}


def test_a_weight_with_one_added_stays_an_op() -> None:
    s = Sketch(SHAPE, SHAPE[-1:])
    plus = s(aten.add.Tensor, s.others[0], 1.0)
    assert s.fused(s(aten.mul.Tensor, norm(s, s.x), plus)) == {"rms_norm": 1, "add": 1}


def test_a_norm_without_a_weight() -> None:
    s = Sketch()
    assert s.fused(norm(s, s.x)) == {"rms_norm": 1}


def test_a_norm_that_others_read_before_its_weight_is_fused_up_to_there() -> None:
    s = Sketch(SHAPE, SHAPE[-1:])
    inner = norm(s, s.x)
    assert s.fused(s(aten.mul.Tensor, s.others[0], inner), inner) == {"rms_norm": 1, "mul": 1}


def test_a_detour_through_float32_goes_into_the_op_and_the_weight_does_not() -> None:
    s = Sketch(SHAPE, SHAPE[-1:], dtype=torch.bfloat16)
    back = s(aten.to.dtype, norm(s, s(aten.to.dtype, s.x, torch.float32)), torch.bfloat16)
    assert s.fused(s(aten.mul.Tensor, s.others[0], back)) == {"rms_norm": 1, "mul": 1}


def test_a_detour_that_goes_on_in_float32_is_kept() -> None:
    s = Sketch(SHAPE, SHAPE[-1:], dtype=torch.bfloat16)
    wide = [s(aten.to.dtype, x, torch.float32) for x in (s.x, s.others[0])]
    scaled = s(aten.mul.Tensor, norm(s, wide[0]), wide[1])
    assert s.fused(s(aten.to.dtype, scaled, torch.bfloat16)) == {"rms_norm": 1, "to": 3}


def unlike_norms(s: Sketch) -> dict[str, fx.Node]:
    y = s.others[0]
    inner = norm(s, s.x)
    root = inner.args[1]
    assert isinstance(root, fx.Node)
    return {
        "over another dim": norm(s, s.x, dims=(1,)),
        "over two dims": norm(s, s.x, dims=(1, 2)),
        "of another value": norm(s, s.x, square=lambda x: s(aten.pow.Tensor_Scalar, y, 2)),
        "with another power": norm(s, s.x, square=lambda x: s(aten.pow.Tensor_Scalar, x, 4)),
        "with a tensor added": norm(s, s.x, eps=s(aten.abs.default, y)),
        "through float32": norm(s, s(aten.to.dtype, s.x, torch.float32)),
        "with a root that is read elsewhere": s(aten.add.Tensor, inner, root),
    }


@pytest.mark.parametrize("kind", unlike_norms(Sketch(SHAPE, SHAPE)))
def test_what_is_not_such_a_norm_stays(kind: str) -> None:
    s = Sketch(SHAPE, SHAPE)
    result = unlike_norms(s)[kind]
    assert s.fused(result)["rms_norm"] == 0


def test_a_norm_over_a_split_dim_stays() -> None:
    s = Sketch()
    result = norm(s, s.x)
    split = Split(("tp",), (IndexSet.range(0, 4), IndexSet.range(4, 8)))
    s.x.meta["layout"] = Layout((None, None, split))
    assert "rms_norm" not in s.fused(result)


# -- rotations ---------------------------------------------------------------------------------------------------------


def halves(s: Sketch, x: fx.Node, at: int) -> tuple[fx.Node, fx.Node]:
    return s(aten.slice.Tensor, x, 2, 0, at), s(aten.slice.Tensor, x, 2, at, 2**63 - 1)


def rotated(s: Sketch, x: fx.Node, sin: fx.Node, at: int = 4) -> fx.Node:
    lower, upper = halves(s, x, at)
    return s(aten.mul.Tensor, s(aten.cat.default, [s(aten.neg.default, upper), lower], -1), sin)


@pytest.mark.parametrize("at", [4, 3])
def test_a_rotation_becomes_a_roll_and_the_sign_is_taken_once(at: int) -> None:
    s = Sketch(SHAPE, SHAPE, (1, 3, 8))
    other, sin = s.others
    sin = s(aten.sin.default, sin)
    found = s.fused(*(rotated(s, x, sin, at) for x in (s.x, other, s.x)))
    assert found == {"sin": 1, "roll": 2, "mul": 2, "slice": 2, "neg": 1, "cat": 1}


def test_a_rotation_of_pieces_of_a_split_becomes_a_roll() -> None:
    s = Sketch(SHAPE, (8,))
    sin = s(aten.sin.default, s.others[0])
    lower, upper = (s(operator.getitem, s(aten.split.Tensor, s.x, 4, -1), i) for i in (0, 1))
    turned = s(aten.cat.default, [s(aten.neg.default, upper), lower], 2)
    assert s.fused(s(aten.mul.Tensor, sin, turned))["roll"] == 1


def unlike_rotations(s: Sketch) -> dict[str, fx.Node]:
    lower, upper = halves(s, s.x, 4)
    large, sin = s(aten.sin.default, s.x), s(aten.sin.default, s.others[0])

    def turned(*pieces: fx.Node, by: fx.Node = sin) -> fx.Node:
        return s(aten.mul.Tensor, s(aten.cat.default, list(pieces), -1), by)

    negative = s(aten.neg.default, upper)
    return {
        "with halves in order": turned(lower, negative),
        "with the other sign": turned(upper, s(aten.neg.default, lower)),
        "by a factor as large": rotated(s, s.x, large),
        "of half and half": turned(negative, s(aten.slice.Tensor, s.x, 2, 0, 3), by=s(aten.slice.Tensor, sin, 0, 0, 7)),
        "of two values": turned(negative, s(aten.slice.Tensor, large, 2, 0, 4)),
    }


@pytest.mark.parametrize("kind", unlike_rotations(Sketch(SHAPE, (8,))))
def test_what_is_not_such_a_rotation_stays(kind: str) -> None:
    s = Sketch(SHAPE, (8,))
    assert s.fused(unlike_rotations(s)[kind])["roll"] == 0


# -- what changes nothing, and what is computed twice ------------------------------------------------------------------


def test_what_changes_nothing_goes() -> None:
    s = Sketch()
    y = s(aten.cos.default, s.x)
    same = s(
        aten.dropout.default,
        s(aten.to.dtype, s(aten.div.Tensor, s(aten.mul.Tensor, y, 1.0), 1), torch.float64),
        0.5,
        False,
    )
    assert s.fused(s(aten.neg.default, same)) == {"cos": 1, "neg": 1}


def test_what_changes_the_dtype_or_the_value_stays() -> None:
    s = Sketch(SHAPE, dtype=torch.int64)
    assert s.fused(s(aten.mul.Tensor, s.x, 1.0), s(aten.mul.Tensor, s.x, 2)) == {"mul": 2}


def test_the_same_op_on_the_same_operands_runs_once() -> None:
    s = Sketch()
    again = [s(aten.add.Tensor, s(aten.cos.default, s.x), 1) for _ in range(3)]
    other = s(aten.add.Tensor, s(aten.cos.default, s.x), True)
    result = s(aten.cat.default, [*again, other, s(aten.add.Tensor, s(aten.cos.default, s.x), 1.0)], 0)
    assert s.fused(result) == {"cos": 1, "add": 3, "cat": 1}


def test_random_numbers_are_drawn_each_time() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = Value(SHAPE, torch.float32)
    drawn = [graph.call_function(aten.bernoulli.default, (x,)) for _ in range(2)]
    graph.output(tuple(drawn))
    program = Program(graph, (), {}, {}, {}, Mesh.of())
    assert ops(Fuse().run(program)) == {"bernoulli": 2}


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # one dtype of each, which is a trace, in the quick suite: that of other tests where no norm detours through
        # float32; qwen3's norms are as olmo2's, mixtral's as llama's
        pytest.param(name, dtype, marks=() if dtype is quick else pytest.mark.slow)
        for name, quick in (
            ("llama", torch.bfloat16),
            ("gemma2", torch.bfloat16),
            ("qwen3", None),
            ("olmo2", torch.float32),
            ("gpt_neox", torch.float64),
            ("mixtral", None),
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        if dtype is not torch.float64 or quick is dtype
    ],
)
def test_models_compute_the_same_bits_with_fewer_ops(name: str, tp: int, dtype: torch.dtype) -> None:
    model, ids = zoo.tiny(name)
    traced = trace(model.to(dtype))
    programs = [traced.copy(Plan(tp=tp).mesh) for _ in range(2)]
    for program in programs if tp > 1 else []:
        TensorParallel().run(program)
    plain, fused = programs
    Fuse().run(fused)
    check(fused)
    before, after = ops(plain), ops(fused)
    assert after.total() < before.total()
    assert (after["rms_norm"] > 2) == (name != "gpt_neox")
    assert after["roll"] == 4  # two layers, queries and keys
    assert after["linear"] == before["linear"]
    results = [Parts(program, None).simulate(input_ids=ids) for program in programs]
    assert torch.equal(*results)


def test_a_wrong_norm_is_seen() -> None:
    """The negative control: the comparison above would notice another eps."""
    model, ids = zoo.tiny("llama")
    traced = trace(model.to(torch.float32))
    program = Fuse().run(traced.copy())
    expected = Parts(traced, None).simulate(input_ids=ids)
    assert torch.equal(Parts(program, None).simulate(input_ids=ids), expected)
    node = next(node for node in program.graph.nodes if node.target is aten.rms_norm.default)
    node.args = (*node.args[:3], 1e-2)
    assert not torch.equal(Parts(program, None).simulate(input_ids=ids), expected)
