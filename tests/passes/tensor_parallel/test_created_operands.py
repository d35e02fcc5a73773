"""Operands that the graph makes itself (empty, zeros, full, arange ...) beside ones that are split over ranks.

Their sizes are the whole model's where the trace wrote them down, so each must be cut, or not be read at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partitioner.analysis.rules import RULES
from partitioner.analysis.rules.contractions import matmul
from partitioner.analysis.rules.notation import Notation, value_of
from partitioner.errors import LayoutError
from tests.support.layers import layered, partitioned
from tests.support.partitioned import EXACT

aten = torch.ops.aten
HEADS = 6
Scores = Callable[[Tensor, Tensor], Tensor]


class WrittenOut(nn.Module):
    """Attention as products; `scores` maps queries and transposed keys [B * heads, ..] to [B * heads, S, S]."""

    def __init__(self, hidden: int, scores: Scores) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(hidden, 36) for _ in range(3))
        self.down = nn.Linear(36, hidden)
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, 6)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = self.scores(q.reshape(-1, *q.shape[2:]), k.reshape(-1, *k.shape[2:]).transpose(1, 2))
        weights = scores.view(-1, HEADS, *scores.shape[1:]).softmax(-1)
        found: Tensor = self.down((weights @ v).transpose(1, 2).flatten(2))
        return found


def _empty(q: Tensor, k: Tensor) -> Tensor:
    return torch.empty(q.shape[0], q.shape[1], k.shape[2], dtype=q.dtype)


def _per_head(q: Tensor, k: Tensor) -> Tensor:
    scale = torch.arange(1, HEADS + 1, dtype=q.dtype).repeat(q.shape[0] // HEADS)
    return torch.bmm(q, k) * scale[:, None, None]


def _copied(q: Tensor, k: Tensor) -> Tensor:
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[2])
    scores.copy_(torch.bmm(q, k))
    return scores


def _written_per_head(q: Tensor, k: Tensor) -> Tensor:
    scores, found = q.new_zeros(q.shape[0] // HEADS, HEADS, q.shape[1], k.shape[2]), torch.bmm(q, k)
    for head in range(HEADS):
        scores[:, head] = found.unflatten(0, (-1, HEADS))[:, head] * (head + 1)
    return scores.flatten(0, 1)


SCORES: dict[str, Scores] = {
    "baddbmm of empty": lambda q, k: torch.baddbmm(_empty(q, k), q, k, beta=0, alpha=0.4),
    "baddbmm of nan": lambda q, k: torch.baddbmm(_empty(q, k).fill_(torch.nan), q, k, beta=0),
    "baddbmm of ones": lambda q, k: torch.baddbmm(torch.ones_like(torch.bmm(q, k)), q, k, beta=0.5, alpha=0.4),
    "baddbmm of full": lambda q, k: torch.baddbmm(
        torch.full((q.shape[0], q.shape[1], k.shape[2]), 2.0, dtype=q.dtype), q, k, beta=0.5
    ),
    "bmm into empty": lambda q, k: torch.bmm(q, k, out=_empty(q, k)),
    "copy into empty": _copied,
    "a factor per head": _per_head,
    "zeros written head by head": _written_per_head,
    "where": lambda q, k: torch.where(
        torch.ones(q.shape[0], q.shape[1], k.shape[2], dtype=torch.bool).tril(),
        torch.bmm(q, k),
        torch.full((q.shape[0], q.shape[1], k.shape[2]), -1e9, dtype=q.dtype),
    ),
    "scatter": lambda q, k: torch.zeros(q.shape[0], q.shape[1], k.shape[2], dtype=q.dtype).scatter_add(
        -1, torch.arange(k.shape[2]).expand(q.shape[0], q.shape[1], -1), torch.bmm(q, k)
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_beside_split_heads(name: str) -> None:
    if name == "bmm into empty" and torch.__version__.startswith("2.11."):
        pytest.skip("torch.export of 2.11 takes the sizes of what bmm writes into for fixed ones")
    parts, error = partitioned(layered(lambda hidden: WrittenOut(hidden, SCORES[name])), 2)
    assert error < EXACT
    # writing one head after the other needs all of them where the tensor is
    assert bool(parts.report.whole) == (name == "zeros written head by head")


class LinearAsAddmm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 36), nn.Linear(36, hidden)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        unread = torch.empty(rows.shape[0], 36, dtype=x.dtype)
        y = torch.addmm(unread, rows, self.up.weight.t(), beta=0, alpha=0.5).relu()
        once = torch.ones(rows.shape[0], x.shape[-1], dtype=x.dtype)
        return torch.addmm(once, y, self.down.weight.t()).view(x.shape)


def test_a_linear_written_as_addmm() -> None:
    parts, error = partitioned(layered(LinearAsAddmm), 2)
    assert error < EXACT
    assert parts.report.whole == ()


def test_an_operand_that_a_rule_leaves_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: it would stay whole, and the first run would die of its size."""

    def without_the_first(node: Any, a: dict[str, Any]) -> Notation:
        return matmul(a["batch1"], a["batch2"], None, value_of(node))

    monkeypatch.setitem(RULES, aten.baddbmm, without_the_first)
    model = layered(lambda hidden: WrittenOut(hidden, SCORES["baddbmm of full"]))
    with pytest.raises(LayoutError, match="does not say how its operand 'full_default'"):
        partitioned(model, 2)
