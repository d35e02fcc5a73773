"""The proof that only attention mixes tokens, on modules made to break it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partitioner.analysis.tokens.token_mixing import why_rows_mix, why_tokens_mix
from partitioner.compile.partition import trace
from partitioner.program import Program
from tests.support import zoo


class _Meddling(nn.Module):
    """Stands in for a layer's MLP."""

    def __init__(self, inner: nn.Module, meddle: Any) -> None:
        super().__init__()
        self.inner, self.meddle = inner, meddle
        self.table = nn.Parameter(torch.ones(200, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.meddle(self.inner(x), self.table)


def _traced(meddle: Any) -> Program:
    model = zoo.tiny("llama")[0]
    model.model.layers[1].mlp = _Meddling(model.model.layers[1].mlp, meddle).double()
    return trace(model)


def _verdict(meddle: Any) -> str | None:
    return why_tokens_mix(_traced(meddle))


def test_each_token_by_itself_is_fine() -> None:
    assert _verdict(lambda x, table: torch.tanh(x) * 2 + table[0]) is None
    assert _verdict(lambda x, table: x + x.new_zeros(x.shape[0], x.shape[1], 1)) is None
    assert _verdict(lambda x, table: (x.flatten(0, 1) * 3).view(x.shape)) is None


@pytest.mark.parametrize(
    "meddle",
    [
        lambda x, table: x + x.mean(1, keepdim=True),
        lambda x, table: x.cumsum(1),
        lambda x, table: torch.cat([x[:, :1] * 0, x[:, :-1]], 1),
        lambda x, table: x.flip(1),
        lambda x, table: torch.softmax(x, 1),
        lambda x, table: x * table[: x.shape[1]],
        lambda x, table: x + torch.arange(x.shape[1])[None, :, None],
        lambda x, table: x.roll(1, 1),
        lambda x, table: torch.cat([x[:, 1:2], x[:, 1:]], 1),
        lambda x, table: x @ (x.transpose(1, 2) @ x),
    ],
    ids=["mean", "cumsum", "shift", "flip", "softmax", "index", "arange", "roll", "neighbour", "linear attention"],
)
def test_what_looks_at_other_tokens_is_found(meddle: Any) -> None:
    found = _verdict(meddle)
    assert found is not None
    assert "model.layers.1" in found


@pytest.mark.parametrize(
    "meddle",
    [lambda x, table: x - x.mean(0), lambda x, table: x.flip(0)],
    ids=["mean of the batch", "flip of the batch"],
)
def test_what_looks_at_other_sequences_is_found(meddle: Any) -> None:
    program = _traced(meddle)
    assert why_tokens_mix(program) is None
    assert "model.layers.1" in str(why_rows_mix(program))


def test_each_sequence_by_itself_is_fine() -> None:
    assert why_rows_mix(_traced(lambda x, table: torch.softmax(x, 1) + x.cumsum(2))) is None


def test_a_weight_repeated_for_each_sequence_is_fine() -> None:
    def meddle(x: Tensor, table: Tensor) -> Tensor:
        """As rotary frequencies are made."""
        return x + (table[:3][None].exp().expand(x.shape[0], -1, 1) @ x[:, :1, :1]).sum(1, keepdim=True)

    assert why_rows_mix(_traced(meddle)) is None


def test_rows_that_are_counted_are_not_repeated_weights() -> None:
    def meddle(x: Tensor, table: Tensor) -> Tensor:
        counted = torch.arange(x.shape[0]).view(-1, 1, 1).double().expand(-1, 3, 1)
        return x + (counted @ x[:, :1, :1]).sum(1, keepdim=True)

    assert "counts sequences from the start" in str(why_rows_mix(_traced(meddle)))
