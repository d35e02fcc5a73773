"""Two views of one set of ranks: attention's and the experts'."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.errors import PlanError
from partitioner.sharding.mesh import AXES, EXPERT_AXES, Mesh


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    sizes = {axis: draw(st.integers(1, 4)) for axis in AXES}
    within = sizes["dp"] * sizes["sp"] * sizes["tp"]
    ep = draw(st.sampled_from([n for n in range(1, within + 1) if within % n == 0]))
    etp = draw(st.sampled_from([n for n in range(1, within // ep + 1) if (within // ep) % n == 0]))
    return Mesh.of(**sizes, ep=ep, etp=etp)


@given(meshes())
def test_each_view_names_every_rank_once(mesh: Mesh) -> None:
    ranks = range(mesh.world_size)
    for view in (AXES, EXPERT_AXES):
        assert math.prod(mesh.size(axis) for axis in view) == mesh.world_size
        named = [mesh.rank({axis: mesh.coordinates(rank)[axis] for axis in view}) for rank in ranks]
        assert named == list(ranks)
    assert all(mesh.index(AXES, mesh.coordinates(rank)) == rank for rank in ranks)


@given(meshes(), st.data())
def test_the_groups_of_axes_part_the_ranks(mesh: Mesh, data: st.DataObject) -> None:
    view = data.draw(st.sampled_from([AXES, EXPERT_AXES]))
    axes = tuple(data.draw(st.lists(st.sampled_from(view), unique=True, min_size=1)))
    groups = {mesh.group(axes, rank) for rank in range(mesh.world_size)}
    assert sorted(itertools.chain(*groups)) == list(range(mesh.world_size))
    for group in groups:
        assert [mesh.index(axes, mesh.coordinates(rank)) for rank in group] == list(range(mesh.size(*axes)))
        assert [mesh.at(axes, index) for index in range(len(group))] == [
            {axis: mesh.coordinates(rank)[axis] for axis in axes} for rank in group
        ]


def test_experts_divide_the_ranks_of_a_stage_anew() -> None:
    mesh = Mesh.of(dp=2, pp=2, tp=2, ep=4)
    assert mesh.size("edp") == 1
    assert mesh.group(("tp",), 0) == (0, 1)
    # ranks 2 and 3 are the second stage of dp 0; within a stage, dp and tp number the experts' ranks
    assert mesh.group(("ep",), 0) == (0, 1, 4, 5)
    assert mesh.group(("ep",), 2) == (2, 3, 6, 7)
    assert mesh.coordinates(5) | {"ep": 3, "etp": 0, "edp": 0} == mesh.coordinates(5)


def test_the_seeds_arrangement_of_a_large_mixture() -> None:
    mesh = Mesh.of(dp=32, tp=8, ep=32, etp=8)
    assert mesh.world_size == 256
    assert mesh.group(("etp",), 9) == mesh.group(("tp",), 9)
    assert mesh.group(("ep",), 9) == mesh.group(("dp",), 9)


@pytest.mark.parametrize("axes", [("tp", "ep"), ("dp", "etp"), ("edp", "sp")])
def test_axes_of_two_views_are_refused(axes: tuple[str, str]) -> None:
    """Their sizes may be equal, and a group of the wrong view would only sum other ranks' numbers."""
    with pytest.raises(PlanError, match="two views"):
        Mesh.of(dp=2, tp=2, ep=2, etp=2).group(axes, 0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match=r"ep x etp = 3 x 1 .* must divide the dp x sp x tp = 2 x 1 x 2 = 4 ranks"):
        Mesh.of(dp=2, tp=2, ep=3)
    with pytest.raises(PlanError, match="unknown mesh axis 'edp'"):
        Mesh.of(edp=2)
    with pytest.raises(PlanError, match="stands twice"):
        Mesh.of(tp=2).group(("tp", "tp"), 0)


def test_an_experts_axis_goes_by_the_name_of_the_same_groups() -> None:
    for degrees, axis, names in (
        ({"tp": 2, "ep": 2}, "ep", ("tp",)),
        ({"dp": 2, "ep": 2}, "ep", ("dp",)),
        ({"dp": 2, "tp": 2, "ep": 4}, "ep", ("dp", "tp")),
        ({"dp": 4, "tp": 2, "ep": 4, "etp": 2}, "etp", ("tp",)),
        ({"dp": 4, "tp": 2, "ep": 4, "etp": 2}, "ep", ("dp",)),
        ({"dp": 3, "tp": 2, "ep": 3}, "ep", ("ep",)),  # no two of its ranks are a group of attention's
        ({"dp": 2, "sp": 2, "tp": 2, "pp": 2, "ep": 4}, "ep", ("sp", "tp")),
        ({"tp": 4, "ep": 2, "etp": 2}, "etp", ("etp",)),
        ({"sp": 4, "tp": 3, "ep": 2, "etp": 3}, "ep", ("ep",)),
        ({"sp": 4, "tp": 3, "ep": 2, "etp": 3}, "etp", ("etp",)),  # not tp: ep divides the same weights
    ):
        mesh = Mesh.of(**degrees)
        assert mesh.in_attention_view(axis) == names, degrees
        for rank in range(mesh.world_size):
            assert mesh.group((axis,), rank) == mesh.group(names, rank)
