"""Layouts refuse what no tensor can be."""

import random

import pytest

from partitioner.analysis.layouts.infer_layout import disjoint
from partitioner.errors import LayoutError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Rows, Split

HALVES = (IndexSet.range(0, 2), IndexSet.range(2, 4))


def test_split_and_partial_over_one_axis_is_refused() -> None:
    with pytest.raises(LayoutError, match="both split and a partial sum"):
        Layout((Split(("tp",), HALVES), None), frozenset({"tp"}))
    Layout((Split(("tp",), HALVES), None), frozenset({"dp"}))


def test_equal_numbers_over_another_axis_are_another_layout() -> None:
    assert Split(("tp",), HALVES) != Split(("dp",), HALVES)


def test_a_dim_with_tokens_of_own_sequences_is_merged_of_two() -> None:
    sequences, tokens = Rows(("dp",), "batch"), Rows(("sp",), "sequence", "zigzag")
    both = sequences.again(("sp",), "sequence", "zigzag")
    assert sequences.merged(tokens) == tokens.merged(sequences) == both
    assert both.by_dim == (sequences, tokens)
    assert sequences.merged(sequences) == sequences
    # rows of rows of another kind are of one dim, and no two go together otherwise
    sent = tokens.again(("tp",), "tokens")
    for other in (sent, both, Rows(("dp",), "sequence")):
        assert other.by_dim == (other,) or other == both
        assert tokens.merged(other) is None
    assert sequences.merged(sent) is None


def test_sets_of_indices_are_what_sets_of_numbers_are() -> None:
    draw = random.Random(0)
    for _ in range(300):
        one, other = ({i for i in range(24) if draw.random() < share} for share in (draw.random(), draw.random()))
        a, b = IndexSet.of(one), IndexSet.of(other)
        assert (a | b, a & b, a - b) == (IndexSet.of(one | other), IndexSet.of(one & other), IndexSet.of(one - other))
        assert (a <= b) == (one <= other)


def test_each_index_is_on_the_first_rank_that_holds_it() -> None:
    draw = random.Random(1)
    for _ in range(100):
        ranks = [{i for i in range(24) if draw.random() < 0.4} for _ in range(3)]
        found = disjoint(Split(("tp",), tuple(map(IndexSet.of, ranks))))
        firsts = [mine.difference(*ranks[:rank]) for rank, mine in enumerate(ranks)]
        assert found.owned == tuple(map(IndexSet.of, firsts))
