"""Sites whose labels follow each other, against the same sites looked at index by index."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import fx

from partitioner import Plan, partition
from partitioner.analysis.labels import choose_splits, split_classes
from partitioner.analysis.labels.index_sets import Lattice
from partitioner.analysis.labels.label_state import Labels, Site
from partitioner.analysis.labels.site_indices import runs_of
from tests.support import zoo

NODE = fx.Graph().placeholder("x")


def site(labels: Labels, *operands: list[int]) -> Site:
    """Index i depends on the i-th label of each operand."""
    ids = torch.zeros(len(operands[0]), dtype=torch.int64)
    for operand in operands:
        ids = labels.lattice.merge(ids, labels.lattice.singletons(torch.tensor(operand)))
    return Site(NODE, "contract", "k", ids)


def two_weights() -> Labels:
    labels = Labels(Lattice())
    labels.base("gate", 0, 40)
    labels.base("up", 0, 40)
    return labels


def test_runs_side_by_side() -> None:
    labels = two_weights()
    assert runs_of(site(labels, list(range(40))), labels) == (range(40),)
    assert runs_of(site(labels, list(range(10, 40)), list(range(50, 80))), labels) == (range(10, 40), range(50, 80))
    fused = site(labels, list(range(20)), list(range(20, 40)), list(range(40, 60)))
    assert runs_of(fused, labels) == (range(20), range(20, 40), range(40, 60))


@pytest.mark.parametrize(
    "operands",
    [
        [[0, 1, 2, 4]],  # a gap
        [[38, 39, 40, 41]],  # from one weight into the next
        [[78, 79, 80, 81]],  # beyond the last weight
        [[0, 1, 2, 3], [40, 42, 41, 43]],  # one of them out of order
        [[0, 1, 2, 3], [2, 3, 4, 5]],  # a label in two indices
        [[0, 1, 2, 3], [40, 40, 41, 41]],  # shared, as kv heads are
        [[0, 1, 2, 3], [40, 41, 42, 2]],  # one index with fewer
        [[0, 0, 0, 0], [40, 40, 40, 40]],  # one atom
    ],
)
def test_other_sites_have_none(operands: list[list[int]]) -> None:
    labels = two_weights()
    assert runs_of(site(labels, *operands), labels) == ()


@pytest.mark.parametrize(("name", "ranks"), [("llama", 2), ("mixtral", 3)])
def test_the_placement_is_that_of_indices_one_by_one(name: str, ranks: int) -> None:
    model, _ = zoo.tiny(name)
    plan = Plan.parse(f"tp={ranks}")
    found = partition(model, plan).program
    with patch.object(choose_splits, "runs_of", _none), patch.object(split_classes, "runs_of", _none):
        expected = partition(model, plan).program
    assert found.weight_layouts == expected.weight_layouts
    assert found.split_classes == expected.split_classes
    assert found.split_classes


def _none(site: Site, labels: Labels) -> tuple[range, ...]:
    return ()
