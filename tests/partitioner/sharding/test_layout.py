"""Layouts refuse what no tensor can be."""

import pytest

from partitioner.errors import LayoutError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split

HALVES = (IndexSet.range(0, 2), IndexSet.range(2, 4))


def test_split_and_partial_over_one_axis_is_refused() -> None:
    with pytest.raises(LayoutError, match="both split and a partial sum"):
        Layout((Split(("tp",), HALVES), None), frozenset({"tp"}))
    Layout((Split(("tp",), HALVES), None), frozenset({"dp"}))


def test_equal_numbers_over_another_axis_are_another_layout() -> None:
    assert Split(("tp",), HALVES) != Split(("dp",), HALVES)
