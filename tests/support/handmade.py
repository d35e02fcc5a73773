"""A small model partitioned by hand, so that what runs programs can be tested without what makes them.

embedding, position, up (column-parallel), relu, down (row-parallel), residual, head (gathered, uneven)
"""

import itertools

import sympy
import torch
from torch import fx

from partitioner.program.program import Entry, Input, Program, Value, Weight
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split
from partitioner.sharding.mesh import Mesh
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.rows import take_rows

aten = torch.ops.aten

VOCABULARY, HIDDEN, FFN = 11, 6, 10
BATCH, SEQUENCE = sympy.Symbol("batch"), sympy.Symbol("sequence")


def cut(total: int, n: int) -> tuple[IndexSet, ...]:
    ends = [total * i // n for i in range(n + 1)]
    return tuple(IndexSet.range(a, b) for a, b in itertools.pairwise(ends))


def input_ids(batch: int = 2, length: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length), device="cpu")


def _empty(mesh: Mesh) -> Program:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed.weight": (VOCABULARY, HIDDEN),
        "model.up.weight": (FFN, HIDDEN),
        "model.down.weight": (HIDDEN, FFN),
        "head.weight": (VOCABULARY, HIDDEN),
    }
    values = {name: torch.randn(s, dtype=torch.float64, generator=generator) for name, s in shapes.items()}
    weights = {name: Weight(name, shape, torch.float64, "checkpoint") for name, shape in shapes.items()}
    inputs = (
        Input("input_ids", Value((BATCH, SEQUENCE), torch.int64), "required"),
        Input("position_ids", Value((BATCH, SEQUENCE), torch.int64), "arange"),
    )
    return Program(fx.Graph(), inputs, weights, values, {"batch": BATCH, "sequence": SEQUENCE}, mesh, "Handmade")


class _Builder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph

    def weight(self, name: str) -> fx.Node:
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        weight = self.program.weights[name]
        node.meta["val"] = Value(weight.shape, weight.dtype)
        return node

    def inputs(self) -> list[fx.Node]:
        nodes = [self.graph.placeholder(given.name) for given in self.program.inputs]
        for node, given in zip(nodes, self.program.inputs, strict=True):
            node.meta["val"] = given.value
        return nodes

    def call(self, name, target, args, layout=None, size=HIDDEN, dtype=torch.float64, **kwargs) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["val"] = Value((BATCH, SEQUENCE, size), dtype)
        node.meta["layout"] = layout or REPLICATED(3)
        node.meta["path"] = "model"
        return node


def traced() -> Program:
    program = _empty(Mesh.of())
    b = _Builder(program)
    ids, positions = b.inputs()
    embedding = b.call("embedding", aten.embedding.default, (b.weight("model.embed.weight"), ids))
    where = b.call("where", aten.unsqueeze.default, (positions, -1), size=1, dtype=torch.int64)
    hidden = b.call("hidden", aten.add.Tensor, (embedding, where))
    up = b.call("up", aten.linear.default, (hidden, b.weight("model.up.weight")), size=FFN)
    flat = b.call("flat", aten.reshape.default, (up, [-1, 1, FFN]), size=FFN)
    act = b.call("act", aten.relu.default, (flat,), size=FFN)
    down = b.call("down", aten.linear.default, (act, b.weight("model.down.weight")))
    back = b.call("back", aten.reshape.default, (down, [2, -1, HIDDEN]))
    residual = b.call("residual", aten.add.Tensor, (hidden, back))
    b.graph.output(b.call("logits", aten.linear.default, (residual, b.weight("head.weight")), size=VOCABULARY))
    return program


def plain() -> Program:
    """The same without its reshapes, which hold for a batch of 2 only."""
    program = traced()
    for node in list(program.graph.nodes):
        if node.target is aten.reshape.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def insert(program: Program, target: object, args: tuple[object, ...], value: Value, **options: object) -> fx.Node:
    """A call at the insertion point, in the module "model"."""
    node = program.graph.call_function(target, args, options)
    node.meta = {"val": value, "path": "model"}
    return node


def rows_of(program: Program, x: fx.Node, axes: tuple[str, ...], *, dim: int = 1, kind: str = "sequence") -> fx.Node:
    """Each rank's rows of `x`, taken at the insertion point."""
    parts = program.mesh.size(*axes)
    index = program.local("row_index", Entry(0, axes, tuple(range(parts))))
    return insert(program, take_rows, (x, index), x.meta["val"], parts=parts, axes=list(axes), dim=dim, kind=kind)


def partitioned(n: int) -> Program:
    program = _empty(Mesh.of(tp=n))
    vocabulary, ffn = Split(("tp",), cut(VOCABULARY, n)), Split(("tp",), cut(FFN, n))
    program.weight_layouts.update(
        {
            "model.embed.weight": Layout((vocabulary, None)),
            "model.up.weight": Layout((ffn, None)),
            "model.down.weight": Layout((None, ffn)),
            "head.weight": Layout((vocabulary, None)),
        }
    )
    starts = tuple(owned.intervals[0][0] if owned.intervals else 0 for owned in vocabulary.owned)
    start = program.local("start", Entry(0, ("tp",), starts))
    width = program.local("width", Entry(FFN, ("tp",), ffn.sizes))
    last, partial = Layout((None, None, ffn)), Layout((None,) * 3, frozenset({"tp"}))
    b = _Builder(program)
    ids, positions = b.inputs()
    rows = b.weight("model.embed.weight")
    embedding = b.call("embedding", vocab_parallel_embedding, (ids, rows), partial, start=start)
    embedding.meta["why"] = "vocabulary over tp"
    embedded = b.call("embedded", all_reduce, (embedding, "tp"))
    where = b.call("where", aten.unsqueeze.default, (positions, -1), size=1, dtype=torch.int64)
    hidden = b.call("hidden", aten.add.Tensor, (embedded, where))
    up = b.call("up", aten.linear.default, (hidden, b.weight("model.up.weight")), last, FFN)
    flat = b.call("flat", aten.reshape.default, (up, [-1, 1, width]), last, FFN)
    act = b.call("act", aten.relu.default, (flat,), last, FFN)
    down = b.call("down", aten.linear.default, (act, b.weight("model.down.weight")), partial)
    reduced = b.call("reduced", all_reduce, (down, "tp"))
    back = b.call("back", aten.reshape.default, (reduced, [2, -1, HIDDEN]))
    residual = b.call("residual", aten.add.Tensor, (hidden, back))
    local = Layout((None, None, vocabulary))
    logits = b.call("logits", aten.linear.default, (residual, b.weight("head.weight")), local, VOCABULARY)
    sizes = list(vocabulary.sizes)
    b.graph.output(b.call("gathered", all_gather, (logits, "tp"), size=VOCABULARY, dim=-1, sizes=sizes))
    return program
