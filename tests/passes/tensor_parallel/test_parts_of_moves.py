"""Moves that give some ranks nothing, and those that cannot be made local: the rest of the model is split still."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from partitioner.errors import LayoutError
from partitioner.proof.layouts import check
from runtime.ops.local import shard
from tests.support.layers import layered, layered_once, partitioned
from tests.support.partitioned import EXACT


class _Wide(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 36)
        self.down = nn.Linear(36, hidden)
        self.down_half = nn.Linear(18, hidden)


class SplitUnevenly(_Wide):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.up(x).split([7, 11, 18], -1)
        return self.down_half(torch.cat([a, b], -1) * c)


class PiecesSwapped(_Wide):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.up(x).split([9, 9, 18], -1)
        return self.down_half(torch.cat([b, a], -1) * c)


class SlicesPutTogether(_Wide):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(torch.cat([y[..., :-12], y[..., -12:]], -1))


class Narrowed(_Wide):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_half(self.up(x).narrow(-1, 5, 18))


class SlicesAssigned(_Wide):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        y[..., :18] *= 2
        y[..., 27:] += 1
        return self.down(y)


class HeadsPutTogether(_Wide):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (6, 6)).transpose(1, 2)
        one = functional.scaled_dot_product_attention(y[:, :4], y[:, :4], y[:, :4], is_causal=True)
        other = functional.scaled_dot_product_attention(y[:, 4:], y[:, 4:], y[:, 4:])
        return self.down(torch.cat([other, one], 1).transpose(1, 2).flatten(2))


class GateOfHeads(nn.Module):
    """Each head is normed as a whole, and its gate may be divided within it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.gate, self.out = nn.Linear(hidden, 18), nn.Linear(hidden, 18), nn.Linear(18, hidden)

    def forward(self, x: Tensor) -> Tensor:
        heads, gate = self.up(x).view(-1, 6), self.gate(x).view(-1, 6)
        heads = heads.exp() / heads.exp().sum(-1, keepdim=True)
        return self.out((heads * gate.sigmoid()).view(*x.shape[:2], -1))


@pytest.mark.parametrize("tp", [3, 4])
def test_more_ranks_than_heads_divide_what_is_computed_within_a_head(tp: int) -> None:
    parts, error = partitioned(layered_once(GateOfHeads), tp)
    assert error < EXACT
    assert {"layers.0.gate.weight", "layers.0.out.weight"} <= parts.program.weight_layouts.keys()


def test_a_part_that_no_rank_keeps_is_refused() -> None:
    program = partitioned(layered_once(GateOfHeads), 4)[0].program.copy()
    (name,) = {node.args[1].name for node in program.graph.nodes if node.target is shard and node.kwargs["dim"] == 1}
    *others, last = program.table[name].values  # head 2 is with the last two ranks
    assert last == (5, 6)
    program.table[name] = replace(program.table[name], values=(*others, (4, 5)))
    for node in program.graph.nodes:
        node.meta.pop("layout", None)
    with pytest.raises(LayoutError, match="what some ranks give up no other one keeps"):
        check(program)


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 3, 5])
@pytest.mark.parametrize(
    "layer", [SplitUnevenly, PiecesSwapped, SlicesPutTogether, Narrowed, SlicesAssigned, HeadsPutTogether]
)
def test_a_rank_may_hold_nothing_of_a_piece(layer: type[nn.Module], tp: int) -> None:
    parts, error = partitioned(layered_once(layer), tp)
    assert error < EXACT
    assert parts.report.whole == ()


class OneHeadByItself(_Wide):
    """Selecting one of several heads leaves nothing that the other ranks could hold a part of."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).unflatten(-1, (6, 6))
        return self.down((y * y.select(-2, 2).unsqueeze(-2)).flatten(-2))


class DelayedByOne(nn.Module):
    """At a sequence of one, which is what labels see, nothing is left of x[:, :-1]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.now, self.before = nn.Linear(hidden, 18), nn.Linear(hidden, 18)
        self.down = nn.Linear(18, hidden)
        self.gate, self.up, self.out = nn.Linear(hidden, 9), nn.Linear(hidden, 9), nn.Linear(9, hidden)

    def forward(self, x: Tensor) -> Tensor:
        before = functional.pad(self.before(x)[:, :-1], (0, 0, 1, 0))
        x = x + self.down(self.now(x) * before)
        return self.out(self.gate(x).sigmoid() * self.up(x))


@pytest.mark.parametrize("tp", [2, 3])
def test_what_cannot_be_made_local_is_whole_and_nothing_else_is(tp: int) -> None:
    parts, error = partitioned(layered(DelayedByOne, count=3), tp)
    assert error < EXACT
    (whole,) = parts.report.whole
    assert whole.names == tuple(f"layers.{i}.before.weight" for i in range(3))
    assert whole.reason.startswith("slice in layers.0: a rank's part of it cannot be made")


@pytest.mark.parametrize("tp", [2, 3])
def test_a_model_is_never_refused_for_one_op(tp: int) -> None:
    parts, error = partitioned(layered(OneHeadByItself, count=3), tp)
    assert error < EXACT
    reasons = {row.pattern: row.reason for row in parts.report.whole}
    assert reasons["layers.*.up.weight"].startswith("select in layers.0: a rank's part of it cannot be made")
    assert reasons["layers.*.down.weight"] == "feeds linear in layers.1.up, whose weight is whole"
    assert len(reasons) == 2
