"""The proof that only attention mixes tokens, on modules made to break it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partitioner import Plan
from partitioner.analysis.tokens.token_mixing import _is_same_rows, why_rows_mix, why_tokens_mix
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.program.program import Program
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split
from runtime.ops.embedding import vocab_parallel_embedding
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
    model = zoo.tiny("llama", num_hidden_layers=1)[0]
    model.model.layers[0].mlp = _Meddling(model.model.layers[0].mlp, meddle).double()
    return trace(model)


def _verdict(meddle: Any) -> str | None:
    return why_tokens_mix(_traced(meddle))


def test_each_token_by_itself_is_fine() -> None:
    def by_itself(x: Tensor, table: Tensor) -> Tensor:
        y = torch.tanh(x) * 2 + table[0]
        y = y + y.new_zeros(y.shape[0], y.shape[1], 1)
        return (y.flatten(0, 1) * 3).view(y.shape)

    assert _verdict(by_itself) is None


@pytest.mark.parametrize(
    "meddle",
    [
        lambda x, table: x + x.mean(1, keepdim=True),
        lambda x, table: x.cumsum(1),
        pytest.param(lambda x, table: torch.cat([x[:, :1] * 0, x[:, :-1]], 1), marks=pytest.mark.slow),
        pytest.param(lambda x, table: x.flip(1), marks=pytest.mark.slow),
        pytest.param(lambda x, table: torch.softmax(x, 1), marks=pytest.mark.slow),
        lambda x, table: x * table[: x.shape[1]],
        lambda x, table: x + torch.arange(x.shape[1])[None, :, None],
        lambda x, table: x.roll(1, 1),
        pytest.param(lambda x, table: torch.cat([x[:, 1:2], x[:, 1:]], 1), marks=pytest.mark.slow),
        lambda x, table: x @ (x.transpose(1, 2) @ x),
    ],
    ids=["mean", "cumsum", "shift", "flip", "softmax", "index", "arange", "roll", "neighbour", "linear attention"],
)
def test_what_looks_at_other_tokens_is_found(meddle: Any) -> None:
    found = _verdict(meddle)
    assert found is not None
    assert "model.layers.0" in found


class _Looking(nn.Module):
    """Stands in for a layer's MLP: adds the rows of a table that `numbers` of a text say."""

    def __init__(self, hidden: int, numbers: Any) -> None:
        super().__init__()
        self.table, self.numbers = nn.Embedding(40, hidden), numbers

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.table(self.numbers(x))
        return x + rows


def test_rows_of_a_table_whose_numbers_are_alike_are_so_where_ranks_share_it_out() -> None:
    def looking(numbers: Any) -> Program:
        model = zoo.tiny("llama", num_hidden_layers=1)[0]
        model.model.layers[0].mlp = _Looking(model.config.hidden_size, numbers)
        return trace(model.double())

    traced = looking(lambda x: torch.zeros(x.shape[:2], dtype=torch.int64))
    one, two = (compile_program(traced, Plan(tp=tp)) for tp in (1, 2))
    tables = [node for node in two.program.graph.nodes if node.target is vocab_parallel_embedding]
    assert any("layers.0" in str(node.meta["path"]) for node in tables)
    texts = [[5, 6, 7], [9]]
    assert torch.equal(*(torch.as_tensor(each.generate(texts, max_new_tokens=3)) for each in (one, two)))
    # and where the numbers count tokens, they are not
    assert "layers.0" in str(why_tokens_mix(looking(lambda x: torch.arange(x.shape[1])[None].expand(x.shape[:2]))))


@pytest.mark.parametrize(
    "meddle",
    [lambda x, table: x - x.mean(0), pytest.param(lambda x, table: x.flip(0), marks=pytest.mark.slow)],
    ids=["mean of the batch", "flip of the batch"],
)
def test_what_looks_at_other_sequences_is_found(meddle: Any) -> None:
    program = _traced(meddle)
    assert why_tokens_mix(program) is None
    assert "model.layers.0" in str(why_rows_mix(program))


def test_each_sequence_by_itself_is_fine() -> None:
    assert why_rows_mix(_traced(lambda x, table: torch.softmax(x, 1) + x.cumsum(2))) is None


@pytest.mark.parametrize("rows", [2, 3], ids=["as many as sequences are tried", "other than"])
def test_a_weight_repeated_for_each_sequence_is_fine(rows: int) -> None:
    def meddle(x: Tensor, table: Tensor) -> Tensor:
        """As rotary frequencies are made."""
        repeated = table[:rows][None].exp().expand(x.shape[0], -1, 1)
        return x + (repeated.mul(2) @ x[:, :1, :1]).sum(1, keepdim=True)

    assert why_rows_mix(_traced(meddle)) is None


@pytest.mark.parametrize("rows", [2, 3], ids=["as many as sequences are tried", "other than"])
def test_rows_that_are_counted_are_not_repeated_weights(rows: int) -> None:
    def meddle(x: Tensor, table: Tensor) -> Tensor:
        counted = torch.arange(x.shape[0]).view(-1, 1, 1).double().expand(-1, rows, 1)
        return x + (counted.mul(2) @ x[:, :1, :1]).sum(1, keepdim=True)

    assert "counts sequences from the start" in str(why_rows_mix(_traced(meddle)))


def test_rows_of_a_weight_that_are_as_many_as_sequences_are_its_own() -> None:
    rows = Layout((Split(("sp",), (IndexSet.range(0, 1), IndexSet.range(1, 2))), None))
    columns = Layout((None, rows.dims[0]))
    assert _is_same_rows(Layout((None, None)), rows, frozenset({0}))
    assert not _is_same_rows(Layout((None, None)), columns, frozenset({0}))
