"""Costs of collectives: formulas against their closed forms, fitted curves against their own rules."""

import pytest

from partitioner.errors import InputError
from partitioner.planning.collectives import (
    Curve,
    FittedLinks,
    Hop,
    collective_seconds,
    fitted_links,
    formula_seconds,
)

LINK = {"bytes_per_s": 1e9, "latency_s": 1e-6}


def test_ring_and_tree() -> None:
    large, small = 1 << 30, 64
    assert formula_seconds("all_reduce", 4, large, **LINK) == pytest.approx(2 * 3 * (1e-6 + large / 4 / 1e9))
    assert formula_seconds("all_reduce", 64, small, **LINK) == pytest.approx(2 * 6 * 1e-6 + 2 * small / 1e9)
    assert formula_seconds("all_gather", 4, large, **LINK) == pytest.approx(3 * (1e-6 + large / 4 / 1e9))
    assert formula_seconds("send", 2, large, **LINK) == pytest.approx(1e-6 + large / 1e9)
    assert formula_seconds("all_reduce", 1, large, **LINK) == 0
    with pytest.raises(InputError):
        formula_seconds("gossip", 4, 1, **LINK)


def test_nested_groups_send_less_over_the_outer_link() -> None:
    inner, outer = Hop(8, 450e9, 3e-6), Hop(4, 50e9, 1e-5)
    size = 1 << 28
    nested = collective_seconds("all_reduce", [inner, outer], size)
    flat = collective_seconds("all_reduce", [Hop(32, 50e9, 1e-5)], size)
    assert collective_seconds("all_reduce", [inner], size) < nested < flat
    assert collective_seconds("all_reduce", [], size) == 0
    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        assert collective_seconds(kind, [inner, outer], size) > collective_seconds(kind, [inner], size)


def test_curves_follow_their_segments() -> None:
    curve = Curve(((1024.0, 5e-6, 0.0), (1e6, 4e-6, 1e-12), (1e9, 0.0, 2e-12)))
    assert curve.seconds(100) == 5e-6
    assert curve.seconds(1e5) == pytest.approx(4e-6 + 1e-7)
    assert curve.seconds(1e10) == pytest.approx(2e-2)
    links = FittedLinks("here", {("all_reduce", 4): curve})
    assert links.seconds("all_reduce", 4, 100) == 5e-6
    assert links.seconds("all_to_all", 4, 100) is None
    more = links.seconds("all_reduce", 16, 100)
    assert more is not None
    assert more == pytest.approx(10e-6)  # twice as deep a tree


def test_measured_hosts_are_there_and_unknown_ones_are_not() -> None:
    links = fitted_links("h100_sxm")
    assert links is not None
    seconds = links.seconds("all_reduce", 8, 1 << 28)
    assert seconds is not None
    assert 0.5e-3 < seconds < 2e-3  # 256 MiB over 450 GB/s: 1.04 ms if nothing is lost
    assert fitted_links("abacus") is None
