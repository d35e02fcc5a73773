"""Steps of this product, where they were measured: shares of the tables' speed, and measured steps held out."""

import functools
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.planning.models import summary_of
from benchmarks.planning.own_steps import MODEL, Step, steps, worst
from partitioner import Plan
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import sureness
from partitioner.planning.kernels import own_shares
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from tests.support.partitioned import traced

WITHIN = 0.08


@functools.cache
def summary() -> Summary:
    return summarize_program(traced("llama")[1])


def test_kernels_go_at_this_product_s_speed_and_links_as_they_are() -> None:
    cluster, workload = Cluster.parse("2xH200"), Workload(64, 8, 2)
    own, tables = (Pricer(summary(), cluster, own=each).price(Plan(tp=2), workload) for each in (True, False))
    for entry, share in own_shares("h200_sxm").items():
        mine, theirs = getattr(own, entry), getattr(tables, entry)
        assert mine.memory + mine.products == pytest.approx((theirs.memory + theirs.products) / share)
        assert (mine.links, mine.waiting) == (theirs.links, theirs.waiting)
    assert "this product's own" in sureness(cluster, summary(), tables={"linear": True})


def test_where_nothing_was_measured_kernels_are_those_of_the_tables() -> None:
    cluster, workload = Cluster.parse("H100"), Workload(64, 8, 2)
    own, tables = (Pricer(summary(), cluster, own=each).price(Plan(), workload) for each in (True, False))
    assert not own_shares("h100_sxm")
    assert (own.ttft_s, own.tpot_s) == (tables.ttft_s, tables.tpot_s)
    assert "this product's own" not in sureness(cluster, summary(), tables={"linear": True})


@pytest.mark.slow  # traces layers of an 8B shape
def test_measured_steps_of_two_gpus_that_nothing_was_fitted_on(tmp_path: Path) -> None:
    shares = own_shares("h200_sxm")

    def off(mine: list[Step], shares: Mapping[str, float]) -> float:
        return max(worst([each], shares[each.entry]) for each in mine)

    measured = steps(summary_of(MODEL, tmp_path))
    held_out = [each for each in measured if each.gpus > 1]
    assert len(held_out) >= 6
    assert off(measured, shares) <= WITHIN
    assert off(held_out, {"prefill": 1.0, "decode": 1.0}) > WITHIN
