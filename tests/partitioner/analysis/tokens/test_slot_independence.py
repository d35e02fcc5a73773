"""A graph that reads slots without a token, or counts them, is found out."""

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import fx

from partitioner.analysis.tokens.slot_independence import why_slots_matter
from partitioner.program.program import Input, Program, Value
from partitioner.sharding.mesh import Mesh
from runtime.ops.state import cache_append, position_mask

aten = torch.ops.aten
B, S, T = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "sequence", "slots"))


class Sketch:
    """A graph of one query, key and value per token, [B, 2, S, 4] each, which `build` continues."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.put(self.graph.placeholder("x"), (B, 2, S, 4), torch.float32)
        self.positions = self.put(self.graph.placeholder("position_ids"), (B, S), torch.int64)
        self.slots = self.put(self.graph.placeholder("slots"), (T,), torch.int64)
        self.keys = self.call(cache_append, (self.x, self.positions, self.slots), (B, 2, T, 4), state="keys")
        self.turned = self.call(aten.transpose.int, (self.keys, -1, -2), (B, 2, 4, T))
        self.scores = self.call(aten.matmul.default, (self.x, self.turned), (B, 2, S, T))
        mask = (self.positions, self.slots)
        self.mask = self.call(position_mask, mask, (B, 1, S, T), dtype=torch.float32, causal=True)
        self.masked = self.call(aten.add.Tensor, (self.scores, self.mask), (B, 2, S, T))

    def put(self, node: fx.Node, shape: Any, dtype: torch.dtype) -> fx.Node:
        node.meta["val"] = Value(shape, dtype)
        return node

    def call(self, target: Any, args: Any, shape: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, {"dtype": dtype, **kwargs} if "causal" in kwargs else kwargs)
        return self.put(node, shape, dtype)

    def integer(self, target: Any, args: Any, value: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = value
        return node

    def attend(self, scores: fx.Node) -> fx.Node:
        weights = self.call(aten.softmax.int, (scores, -1), (B, 2, S, T))
        return self.call(aten.matmul.default, (weights, self.keys), (B, 2, S, 4))

    def why(self, result: fx.Node) -> str | None:
        self.graph.output(result)
        inputs = [Input(str(n.target), n.meta["val"], "required") for n in self.graph.nodes if n.op == "placeholder"]
        symbols = {"batch": B, "sequence": S, "slots": T}
        return why_slots_matter(Program(self.graph, tuple(inputs), {}, {}, symbols, Mesh.of()))


def alibi(sketch: Sketch, *, from_the_end: bool) -> fx.Node:
    """Distances of the slots, from the first or to the last."""
    count = sketch.integer(aten.sym_size.int, (sketch.slots, 0), T)
    line = sketch.call(aten.arange.default, (count,), (T,), torch.int64)
    if from_the_end:
        line = sketch.call(aten.sub.Tensor, (line, count), (T,), torch.int64)
    return sketch.call(aten.mul.Tensor, (line, 0.5), (T,))


RIGHT: dict[str, Callable[[Sketch], fx.Node]] = {
    "mask": lambda s: s.attend(s.masked),
    "fill": lambda s: s.attend(
        s.call(
            aten.masked_fill.Scalar,
            (s.scores, s.call(aten.to.dtype, (s.mask, torch.bool), (B, 1, S, T), torch.bool), -1e30),
            (B, 2, S, T),
        )
    ),
    "scaled": lambda s: s.attend(s.call(aten.div.Tensor, (s.masked, 8.0), (B, 2, S, T))),
    "alibi": lambda s: s.attend(s.call(aten.add.Tensor, (s.masked, alibi(s, from_the_end=False)), (B, 2, S, T))),
    "shifted": lambda s: s.attend(s.call(aten.add.Tensor, (s.masked, alibi(s, from_the_end=True)), (B, 2, S, T))),
}
WRONG: dict[str, tuple[Callable[[Sketch], fx.Node], str]] = {
    "no mask": (lambda s: s.attend(s.scores), "weighs slots that hold no token"),
    "no softmax": (lambda s: s.call(aten.matmul.default, (s.masked, s.keys), (B, 2, S, 4)), "reads slots that hold no"),
    "shrunk": (lambda s: s.attend(s.call(aten.mul.Tensor, (s.masked, 1e-30), (B, 2, S, T))), "weighs slots"),
    "filled with little": (
        lambda s: s.attend(
            s.call(
                aten.masked_fill.Scalar,
                (s.scores, s.call(aten.to.dtype, (s.mask, torch.bool), (B, 1, S, T), torch.bool), -1.0),
                (B, 2, S, T),
            )
        ),
        "weighs slots",
    ),
    "sum": (lambda s: s.call(aten.sum.dim_IntList, (s.keys, [2]), (B, 2, 4)), "reads slots"),
    "last slot": (lambda s: s.call(aten.select.int, (s.keys, 2, -1), (B, 2, 4)), "takes some of the slots"),
    "reversed": (lambda s: s.attend(s.call(aten.flip.default, (s.masked, [3]), (B, 2, S, T))), "moves slots"),
    "count": (
        lambda s: s.call(aten.mul.Tensor, (s.x, s.integer(aten.sym_size.int, (s.slots, 0), T)), (B, 2, S, 4)),
        "depends on how many slots there are",
    ),
    "distance to the last slot, times the scores": (
        lambda s: s.attend(
            s.call(
                aten.add.Tensor,
                (s.call(aten.mul.Tensor, (s.scores, alibi(s, from_the_end=True)), (B, 2, S, T)), s.mask),
                (B, 2, S, T),
            )
        ),
        "change with the number of slots",
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_slots_that_weigh_nothing(case: str) -> None:
    sketch = Sketch()
    assert sketch.why(RIGHT[case](sketch)) is None


@pytest.mark.parametrize("case", WRONG)
def test_slots_that_matter(case: str) -> None:
    build, why = WRONG[case]
    sketch = Sketch()
    found = sketch.why(build(sketch))
    assert found is not None
    assert why in found
