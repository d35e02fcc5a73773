"""Steps of this product, where they were measured: what streams, what does not, and measured steps held out."""

import functools
from pathlib import Path

import pytest
import torch

from benchmarks.planning.own_steps import fitted, shapes_of, steps
from partitioner import Plan
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import sureness
from partitioner.planning.kernels import Grid, OwnSteps, StepShares, own_steps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Price, Workload
from partitioner.planning.summary import Summary, summarize
from tests.support import zoo

WITHIN = 0.08
SLOW, FAST = (OwnSteps(1.0, Grid(((0.0,),), [share])) for share in (0.4, 0.8))


@functools.cache
def summary() -> Summary:
    return summarize(zoo.tiny("llama")[0].to(torch.bfloat16))


def price(own: bool | OwnSteps, *, rows: int = 2, device: str = "H200") -> Price:
    return Pricer(summary(), Cluster.parse(f"2x{device}"), own=own).price(Plan(tp=2), Workload(64, 8, rows))


def test_prompts_go_at_this_product_s_speed_and_links_as_they_are() -> None:
    found = own_steps("h200_sxm")
    assert found is not None
    own, tables = (price(each).prefill for each in (True, False))
    assert own is not None
    assert tables is not None
    assert own.memory + own.products == pytest.approx((tables.memory + tables.products) / found.prefill)
    assert (own.links, own.waiting) == (tables.links, tables.waiting)
    assert "this product's own" in sureness(Cluster.parse("2xH200"), summary(), tables={"linear": True})


def test_steps_of_few_rows_stream_their_weights() -> None:
    slow, fast, tables = (price(each).decode for each in (SLOW, FAST, False))
    assert slow is not None
    assert fast is not None
    assert tables is not None
    assert slow.memory > fast.memory
    assert slow.links == fast.links == tables.links
    assert slow.waiting == fast.waiting < tables.waiting  # products do not wait for the kernel before them
    # twice as fast is half of what streams; attention is no part of it
    assert price(OwnSteps(1.0, Grid(((0.0,),), [0.2]))).tpot_s - slow.total == pytest.approx(
        2 * (slow.total - fast.total)
    )


def test_caches_are_read_no_slower_than_the_tables_say() -> None:
    """What was measured behind short caches is a kernel's start as well."""
    slow = OwnSteps(1.0, Grid(((0.0,),), [0.8]), attention=1e-6)
    found, tables = (price(own).decode for own in (slow, False))
    assert found is not None
    assert tables is not None
    assert found.memory < 2 * (tables.memory + tables.waiting)


def test_many_rows_and_wide_numbers_are_priced_by_the_tables() -> None:
    assert price(SLOW, rows=65).tpot_s == price(False, rows=65).tpot_s
    assert price(SLOW, rows=64).tpot_s != price(False, rows=64).tpot_s
    assert SLOW.of_step("decode", 64, "bfloat16") == StepShares(0.4)
    assert SLOW.of_step("decode", 2, "float32") is None
    assert SLOW.of_step("prefill", 2, "bfloat16") is None
    assert OwnSteps.from_json(SLOW.to_json()) == SLOW


def test_where_nothing_was_measured_kernels_are_those_of_the_tables() -> None:
    assert own_steps("h100_sxm") is None
    own, tables = (price(each, device="H100") for each in (True, False))
    assert (own.ttft_s, own.tpot_s) == (tables.ttft_s, tables.tpot_s)
    assert "this product's own" not in sureness(Cluster.parse("2xH100"), summary(), tables={"linear": True})


@pytest.mark.slow  # traces layers of four shapes
def test_measured_steps_of_two_gpus_that_nothing_was_fitted_on(tmp_path: Path) -> None:
    known, measured = own_steps("h200_sxm"), steps()
    shapes = shapes_of(measured, tmp_path)
    assert known == fitted(shapes, measured)
    held_out = [each for each in measured if each.gpus > 1 and each.model == "llama-3.1-8b"]
    assert len(held_out) >= 5
    assert max(abs(each.off(shapes, known)) for each in held_out) <= WITHIN
    assert max(abs(each.off(shapes, False)) for each in held_out) > WITHIN
