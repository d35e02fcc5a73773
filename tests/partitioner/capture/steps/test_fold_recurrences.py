"""Recurrences that begin at what is remembered: as a whole, head by head, and where that cannot be told."""

import operator

import torch
from torch import fx

from partitioner.capture.steps.fold_recurrences import fold_recurrences
from partitioner.capture.trace.recurrence_hooks import OPS
from partitioner.program.program import State, Value
from partitioner.sharding.layout import REPLICATED
from runtime.ops.state import selective_scan, state_read, state_write

BATCH, SIZE, CHANNELS, WIDTH, HEADS = 2, 5, 4, 3, 2
SCAN = next(op for op, ours in OPS.items() if ours is selective_scan)


class Layer:
    """A graph of scans that begin at nothing, and what is made of their last states."""

    def __init__(self, count: int) -> None:
        self.graph = fx.Graph()
        self.ids = self.given("input_ids", BATCH, SIZE)
        self.active = self.given("active", BATCH)
        sizes = ((BATCH, CHANNELS, SIZE), (BATCH, CHANNELS, SIZE), (CHANNELS, WIDTH), *[(BATCH, WIDTH, SIZE)] * 2)
        operands = [[self.given(f"x{i}_{j}", *size) for j, size in enumerate(sizes)] for i in range(count)]
        self.scans = [self.graph.call_function(SCAN, (*each, None)) for each in operands]
        self.lasts = [self.graph.call_function(operator.getitem, (scan, 1)) for scan in self.scans]
        for last in self.lasts:
            last.meta["val"] = Value((BATCH, CHANNELS, WIDTH), torch.float32)

    def given(self, name: str, *shape: int) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = Value(shape, torch.float32)
        return node

    def write(self, value: fx.Node, name: str) -> None:
        self.graph.call_function(state_write, (value, self.active), {"state": name})

    def folded(self, *shapes: tuple[int, ...]) -> list[fx.Node | None]:
        """Where each scan begins, with states of these shapes."""
        states = [State(f"s{i}", shape, torch.float32, REPLICATED(len(shape))) for i, shape in enumerate(shapes)]
        fold_recurrences(self.graph, {state.name: state for state in states}, self.ids)
        assert all(scan.target is selective_scan for scan in self.scans)
        return [scan.args[-1] for scan in self.scans]  # type: ignore[misc]


def test_a_recurrence_begins_at_the_state_that_it_leaves_behind() -> None:
    layer = Layer(1)
    layer.write(layer.lasts[0], "s0")
    (begin,) = layer.folded((CHANNELS, WIDTH))
    assert begin is not None
    assert begin.target is state_read
    assert begin.kwargs["state"] == "s0"
    assert begin.meta["val"].shape == (BATCH, CHANNELS, WIDTH)


def test_each_head_begins_at_its_own_part_of_the_state() -> None:
    for dim, shape in ((1, (HEADS, CHANNELS, WIDTH)), (-1, (CHANNELS, WIDTH, HEADS))):
        layer = Layer(HEADS)
        layer.write(layer.graph.call_function(torch.ops.aten.stack.default, (layer.lasts, dim)), "s0")
        for head, begin in enumerate(layer.folded(shape)):
            assert begin is not None
            assert begin.target is torch.ops.aten.select.int
            read, at, index = begin.args
            assert isinstance(read, fx.Node)
            assert read.target is state_read
            assert read.kwargs["state"] == "s0"
            assert (at, index) == (dim % 4, head)
            assert begin.meta["val"].shape == (BATCH, CHANNELS, WIDTH)


def test_one_that_leaves_two_states_behind_begins_at_nothing() -> None:
    layer = Layer(1)
    layer.write(layer.lasts[0], "s0")
    layer.write(layer.graph.call_function(torch.ops.aten.stack.default, ([layer.lasts[0]] * 2, 1)), "s1")
    assert layer.folded((CHANNELS, WIDTH), (2, CHANNELS, WIDTH)) == [None]


def test_one_whose_last_state_is_changed_before_it_is_kept_begins_at_nothing() -> None:
    layer = Layer(1)
    layer.write(layer.graph.call_function(torch.ops.aten.neg.default, (layer.lasts[0],)), "s0")
    assert layer.folded((CHANNELS, WIDTH)) == [None]
