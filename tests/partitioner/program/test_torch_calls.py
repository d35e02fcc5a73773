"""Lowering: every call in the tables reaches the very overload that it replaces; the rest of the node is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from partitioner.compile.emit import emit
from partitioner.program.program import Value
from partitioner.program.torch_calls import FUNCTIONS, METHODS, lower
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split
from runtime.engine.simulator import Simulator
from runtime.ops.local import once
from tests.support import handmade

aten = torch.ops.aten

G = torch.Generator().manual_seed(0)
X, Y = torch.rand(2, 3, 4, generator=G), torch.rand(2, 3, 4, generator=G) + 0.5
M, N, V = torch.rand(3, 4, generator=G), torch.rand(4, 5, generator=G), torch.rand(4, generator=G)
IDS = torch.tensor([[[0, 2, 1, 0]]])
MASK = X > 0.5
IMAGE = torch.rand(2, 4, 6, 6, generator=G)

# arguments by overload; all that are missing take one tensor, or two, or a tensor and a number
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.div.Tensor_mode: (X, Y, {"rounding_mode": "floor"}),
    aten.add.Tensor: (X, Y, {"alpha": 2}),
    aten.logical_and.default: (MASK, Y > 1),
    aten.logical_or.default: (MASK, Y > 1),
    aten.bitwise_and.Tensor: (MASK, Y > 1),
    aten.bitwise_or.Tensor: (MASK, Y > 1),
    aten.logical_not.default: (MASK,),
    aten.bitwise_not.default: (MASK,),
    aten.where.self: (MASK, X, Y),
    aten.masked_fill.Scalar: (X, MASK, 2.0),
    aten.masked_fill.Tensor: (X, MASK, torch.tensor(2.0)),
    aten.addcmul.default: (X, X, Y, {"value": 2}),
    aten.lerp.Tensor: (X, Y, MASK.float()),
    aten.clamp.default: (X, 0.2, 0.8),
    aten.clamp_min.default: (X, 0.2),
    aten.clamp_max.default: (X, 0.2),
    aten.gelu.default: (X, {"approximate": "tanh"}),
    aten.softplus.default: (X, 2, 10),
    aten.sum.dim_IntList: (X, [-1], True, {"dtype": torch.float64}),
    aten.mean.dim: (X, [-1], True, {"dtype": torch.float64}),
    aten.amax.default: (X, [1], True),
    aten.amin.default: (X, [1], True),
    aten.argmax.default: (X, -1, True),
    aten.cumsum.default: (X, 1, {"dtype": torch.float64}),
    aten.softmax.int: (X, -1, torch.float64),
    aten.log_softmax.int: (X, -1, torch.float64),
    aten.topk.default: (X, 2, -1, True, False),
    aten.tril.default: (X, 1),
    aten.triu.default: (X, 1),
    aten.layer_norm.default: (X, [4], V, V, 1e-6, True),
    aten.rms_norm.default: (X, [4], V, 1e-6),
    aten.group_norm.default: (IMAGE, 2, V, V, 1e-6, True),
    aten.linear.default: (X, N.t(), N[0]),
    aten.matmul.default: (X, N),
    aten.mm.default: (M, N),
    aten.bmm.default: (X, Y.transpose(1, 2)),
    aten.addmm.default: (N[0], M, N, {"beta": 2, "alpha": 3}),
    aten.baddbmm.default: (X @ Y.transpose(1, 2), X, Y.transpose(1, 2), {"beta": 2}),
    aten.conv1d.default: (IMAGE[0], torch.rand(8, 6, 2), None, [1], [1], [1], 1),
    aten.conv2d.default: (IMAGE, torch.rand(8, 1, 2, 2), None, [1, 1], [1, 1], [1, 1], 4),
    aten.scaled_dot_product_attention.default: (
        IMAGE,
        IMAGE,
        IMAGE,
        None,
        0.0,
        True,
        {"scale": 0.3, "enable_gqa": False},
    ),
    aten.embedding.default: (M, IDS, 1),
    aten.gather.default: (X, 1, IDS),
    aten.scatter.src: (X, 1, IDS, Y),
    aten.scatter.value: (X, 1, IDS, 2.0),
    aten.index_select.default: (X, 1, IDS.flatten()),
    aten.index_add.default: (X, 1, torch.tensor([0, 0, 2]), Y),
    aten.cat.default: ([X, Y], -1),
    aten.stack.default: ([X, Y], 1),
    aten.transpose.int: (X, 1, 2),
    aten.permute.default: (X, [2, 0, 1]),
    aten.unsqueeze.default: (X, -1),
    aten.squeeze.dim: (X[:1], 0),
    aten.t.default: (M,),
    aten.flatten.using_ints: (X, 1, 2),
    aten.select.int: (X, 1, -1),
    aten.narrow.default: (X, 1, 1, 2),
    aten.split_with_sizes.default: (X, [1, 2], 1),
    aten.chunk.default: (X, 2, -1),
    aten.unbind.int: (X, 1),
    aten.flip.default: (X, [1]),
    aten.roll.default: (X, [-1], [-1]),
    aten.clone.default: (X, {"memory_format": torch.contiguous_format}),
    aten.constant_pad_nd.default: (X, [1, 1], 2.0),
    aten.repeat_interleave.self_int: (X, 2, 1),
    aten.reshape.default: (X.transpose(1, 2), [2, -1]),
    aten.view.default: (X, [2, -1]),
    aten.expand.default: (X[:, :1], [-1, 3, 4]),
    aten.repeat.default: (X, [1, 2, 1]),
    aten.contiguous.default: (X.transpose(1, 2),),
    aten.to.dtype: (X, torch.float64, False, True),
    aten.sym_size.int: (X, 1),
}


def arguments_of(overload: Any) -> tuple[list[Any], dict[str, Any]]:
    given = list(ARGUMENTS.get(overload, ()))
    kwargs = given.pop() if given and isinstance(given[-1], dict) else {}
    if not given:
        kinds = [str(a.type) for a in overload._schema.arguments if not a.has_default_value()]
        given = [X, *(Y if kind == "Tensor" else 2.0 for kind in kinds[1:])]
    return given, kwargs


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func, repr(tree_map(lambda x: None if isinstance(x, Tensor) else x, (args, kwargs)))))
        return func(*args, **(kwargs or {}))


def called(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    with Calls() as calls:
        result = function(*args, **kwargs)
    return calls.seen, result


@pytest.mark.parametrize("overload", [*FUNCTIONS, *METHODS], ids=str)
def test_the_same_ops_run(overload: Any) -> None:
    args, kwargs = arguments_of(overload)
    plain = FUNCTIONS.get(overload) or getattr(torch.Tensor, METHODS.get(overload, ""))
    expected, whole = called(overload, args, kwargs)
    seen, result = called(plain, args, kwargs)
    assert seen == expected
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), list_of(result), list_of(whole))


def list_of(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def test_another_overload_is_told_apart() -> None:
    """The negative control of the test above."""
    assert called(torch.mul, [X, Y], {})[0] != called(aten.add.Tensor, [X, Y], {})[0]
    assert called(torch.sum, [X, [0]], {})[0] != called(aten.sum.dim_IntList, [X, [1]], {})[0]


# -- nodes -------------------------------------------------------------------------------------------------------------


def node_of(
    target: Any, *args: Any, shape: tuple[Any, ...] = (2, 8), layout: Layout | None = None, **kwargs: Any
) -> fx.Node:
    """`target` on a placeholder of the given shape and layout, then `args`."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"val": Value(shape, torch.float32), **({"layout": layout} if layout else {})}
    return graph.call_function(target, (x, *args), kwargs)


def test_emitted_graphs_keep_names_and_meta_and_call_torch() -> None:
    program = handmade.partitioned(2)
    rank = emit(program, {"tp": 1})
    assert [node.name for node in rank.graph.nodes] == [node.name for node in program.graph.nodes]
    assert [node.meta.get("layout") for node in rank.graph.nodes] == [n.meta.get("layout") for n in program.graph.nodes]
    code = rank.graph_module.code
    assert "torch.ops" not in code
    assert "up.reshape([-1, 1, 5])" in code
    ids = handmade.input_ids()
    whole = Simulator([emit(handmade.traced(), {})])(input_ids=ids)[0]
    for result in Simulator([emit(program, {"tp": i}) for i in range(2)])(input_ids=ids):
        torch.testing.assert_close(result, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("bounds", "narrow"),
    [((1, 0, 4), (1, 0, 4)), ((-1, 4, 2**63 - 1), (-1, 4, 4)), ((1, 2), (1, 2, 6)), ((0, None, 1), (0, 0, 1))],
)
def test_a_slice_of_known_size_becomes_narrow(bounds: tuple[Any, ...], narrow: tuple[int, ...]) -> None:
    node = lower(node_of(aten.slice.Tensor, *bounds))
    assert node.target is torch.narrow
    assert node.args[1:] == narrow
    x = torch.arange(16.0).reshape(2, 8)
    assert torch.equal(torch.narrow(x, *narrow), aten.slice.Tensor(x, *bounds))


@pytest.mark.parametrize("bounds", [(1, -4), (1, 0, -1), (1, 0, 8, 2), (1, 9, 10), (1, 4, 2)])
def test_other_slices_stay(bounds: tuple[int, ...]) -> None:
    assert lower(node_of(aten.slice.Tensor, *bounds)).target is aten.slice.Tensor


def test_a_slice_of_a_split_or_symbolic_dim_stays() -> None:
    split = Split(("tp",), (IndexSet.range(0, 4), IndexSet.range(4, 8)))
    layout = REPLICATED(2).with_dim(1, split)
    assert lower(node_of(aten.slice.Tensor, 1, 0, 4, layout=layout)).target is aten.slice.Tensor
    assert lower(node_of(aten.slice.Tensor, 0, 0, 1, layout=layout)).target is torch.narrow
    assert lower(node_of(aten.slice.Tensor, 1, 0, 4, shape=(2, handmade.SEQUENCE))).target is aten.slice.Tensor


def test_once_is_nothing_on_the_rank_that_counts() -> None:
    counts, other = node_of(once, 1), node_of(once, 0)
    assert lower(counts) is counts.args[0]
    assert lower(other) is other


def test_what_is_in_no_table_stays() -> None:
    node = node_of(aten.index.Tensor, [None, IDS])
    assert lower(node) is node
    assert node.target is aten.index.Tensor
    number = fx.Graph().call_function(aten.add.Tensor, (2.0, 3.0))
    assert lower(number).target is aten.add.Tensor


def test_a_cast_with_a_memory_format_is_a_method_with_a_keyword() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = Value((2, 3, 4), torch.float64)
    args = (x, torch.float16, False, False, torch.contiguous_format)
    graph.output(lower(graph.call_function(aten.to.dtype, args)))
    found = fx.GraphModule({}, graph)(X.transpose(1, 2))
    assert found.dtype == torch.float16
    assert found.is_contiguous()
