"""Norms over a row that is split: reduced in parts where that keeps the weights split, at one number per token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.layers import layered, layered_once, partitioned
from tests.support.partitioned import EXACT


class _Heads(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(hidden, 18), nn.Linear(hidden, 18), nn.Linear(hidden, 18)
        self.q_norm, self.k_norm = nn.LayerNorm(18), nn.LayerNorm(18)
        self.o = nn.Linear(18, hidden)

    def attend(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (6, 3)).transpose(1, 2) for y in (q, k, self.v(x)))
        found: Tensor = self.o(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return found


class LayerNorms(_Heads):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q_norm(self.q(x)), self.k_norm(self.k(x)), x)


class RMSNorms(_Heads):
    def forward(self, x: Tensor) -> Tensor:
        q = functional.rms_norm(self.q(x), (18,), self.q_norm.weight, 1e-5)
        return self.attend(q, functional.rms_norm(self.k(x), (18,), eps=1e-5), x)


class VectorNorms(_Heads):
    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        k = k / (1 + torch.linalg.vector_norm(k, dim=-1, keepdim=True))
        return self.attend(functional.normalize(self.q(x), dim=-1), k, x)


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("layer", "small"), [(LayerNorms, 4), (RMSNorms, 2), (VectorNorms, 2)])
def test_norms_across_heads(layer: type[nn.Module], small: int, tp: int) -> None:
    parts, error = partitioned(layered_once(layer, count=3), tp)
    assert error < EXACT
    assert parts.report.whole == ()
    sums = [c for c in parts.report.collectives if c.op == "all_reduce" and c.shape.endswith("sequence, 1]")]
    assert len(sums) == 3 * small


class GatedLinearUnit(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 34), nn.Linear(17, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.glu(self.up(x), dim=-1))


@pytest.mark.parametrize("tp", [2, 3])
def test_a_gate_and_what_it_gates_go_together(tp: int) -> None:
    parts, error = partitioned(layered(GatedLinearUnit, count=3), tp)
    assert error < EXACT
    assert parts.report.whole == ()
    assert set(parts.report.per_layer("all_reduce").values()) == {1}


class SequenceRolled(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 17), nn.Linear(17, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).roll(1, 1).relu())


@pytest.mark.parametrize("tp", [2, 3])
def test_a_roll_along_the_sequence_leaves_the_rest_split(tp: int) -> None:
    parts, error = partitioned(layered(SequenceRolled), tp)
    assert error < EXACT
    assert parts.report.whole == ()
