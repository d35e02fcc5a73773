"""Steps of this product, where they were measured: what streams, what does not, and measured steps held out."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.planning.own_steps import fitted, pricers_in, steps
from partitioner import Plan
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import sureness
from partitioner.planning.pricing.own_steps import OwnSteps, StepShares, met_of_fullest, own_steps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Price, Workload
from partitioner.planning.summary import Summary, summarize
from tests.support import zoo

WITHIN = 0.08
SLOW, FAST = (OwnSteps(1.0, StepShares(share), StepShares(share)) for share in (0.4, 0.8))
LAYERS = 2


@functools.cache
def summary(family: str = "llama") -> Summary:
    return summarize(zoo.tiny(family)[0].to(torch.bfloat16))


def price(
    own: bool | OwnSteps, *, rows: int = 2, device: str = "H200", plan: str = "tp=2", family: str = "llama"
) -> Price:
    pricer = Pricer(summary(family), Cluster.parse(f"2x{device}"), own=own)
    return pricer.price(Plan.parse(plan), Workload(64, 8, rows))


def beside(family: str = "llama", plan: str = "tp=1", rows: int = 2, **times: float) -> float:
    """Seconds of a step that these times add."""
    own, shares = {}, {}
    for name, value in times.items():
        (shares if hasattr(SLOW.one, name) else own)[name] = value
    step = replace(SLOW.one, **shares)
    slower = replace(SLOW, one=step, several=step, **own)
    return (
        price(slower, plan=plan, rows=rows, family=family).tpot_s
        - price(SLOW, plan=plan, rows=rows, family=family).tpot_s
    )


def test_prompts_go_at_this_product_s_speed_and_links_as_they_are() -> None:
    found = own_steps("h200_sxm")
    assert found is not None
    own, tables = (price(each).prefill for each in (True, False))
    assert own is not None
    assert tables is not None
    assert own.memory + own.products == pytest.approx((tables.memory + tables.products) / found.prefill)
    assert own.links == tables.links
    assert own.waiting > found.first_s
    assert "this product's own" in sureness(Cluster.parse("2xH200"), summary(), tables={"linear": True})


def test_steps_of_few_rows_stream_their_weights() -> None:
    slow, fast, tables = (price(each).decode for each in (SLOW, FAST, False))
    assert slow is not None
    assert fast is not None
    assert tables is not None
    assert slow.memory > fast.memory
    assert slow.links == fast.links == tables.links
    assert slow.waiting == fast.waiting < tables.waiting  # what a kernel takes besides is given, and is nothing here
    # twice as fast is half of what streams; attention is no part of it
    slower = price(OwnSteps(1.0, StepShares(0.2), StepShares(0.2)))
    assert slower.tpot_s - slow.total == pytest.approx(2 * (slow.total - fast.total))


def test_each_kernel_takes_its_time_besides() -> None:
    """By what the graph has: two layers of four products (q, k and v are one, gate and up another) and a head, an
    attention each; no norms of each head.
    """
    assert beside(product_s=1e-3) == pytest.approx((4 * LAYERS + 1) * 1e-3)
    assert beside(attention_s=1e-3) == pytest.approx(LAYERS * 1e-3)
    assert beside(norm_s=1e-3) == pytest.approx(0, abs=1e-12)
    assert beside(step_s=1e-3) == pytest.approx(1e-3)


@pytest.mark.slow
def test_norms_of_each_head_and_experts_take_their_time_besides() -> None:
    assert beside("qwen3", norm_s=1e-3) == pytest.approx(2 * LAYERS * 1e-3)
    assert beside("qwen3_moe", experts_s=1e-3) == pytest.approx(LAYERS * 1e-3)


def test_what_ranks_wait_for_is_priced_where_they_meet() -> None:
    all_reduces = price(SLOW).decode.links  # type: ignore[union-attr]
    assert beside(plan="tp=2", reduces=2.0) == pytest.approx(-all_reduces / 2)
    assert beside(reduces=2.0) == 0
    # one row waits for all stages and the way back; of two groups, both for a host that is slower than a stage
    assert beside(plan="pp=2", rows=1, message_s=1e-3) == pytest.approx(2e-3)
    assert beside(plan="pp=2", rows=1, turn_s=1.0) == pytest.approx(1.0, rel=1e-2)
    assert beside(plan="pp=2", rows=4, turn_s=1.0) == pytest.approx(2.0, rel=1e-2)
    assert beside(plan="pp=2", rows=4, turn_s=1e-9) == 0
    assert beside(turn_s=1e-3) == beside(message_s=1e-3) == 0


@pytest.mark.parametrize(("count", "chosen", "ranks"), [(128, 8, 2), (64, 6, 4), (16, 4, 8)])
def test_a_step_waits_for_the_rank_whose_experts_are_chosen_most(count: int, chosen: int, ranks: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    held, rows = count // ranks, 3
    most = []
    for _ in range(2000):
        choices = torch.rand(rows, count, generator=drawn).topk(chosen).indices.unique()
        most.append(int(torch.bincount(choices // held, minlength=ranks).max()))
    mean = held * (1 - (1 - chosen / count) ** rows)
    assert met_of_fullest(mean, held, ranks) == pytest.approx(sum(most) / len(most), rel=0.1)
    assert met_of_fullest(mean, held, 1) == mean < 0.9 * sum(most) / len(most)
    assert met_of_fullest(held, held, ranks) == held


def test_the_host_s_part_of_prompts() -> None:
    """Ops that are launched one by one take the host longer than a GPU, unless they are captured."""
    slow_host = replace(SLOW, op_s=1e-3, first_s=0.5)
    captured, eager = (price(slow_host, plan=plan).ttft_s for plan in ("tp=2", "pp=2"))
    assert 0.5 < captured < 0.51
    assert eager == pytest.approx(0.5 + summary().num_ops * 1e-3, rel=0.01)


@pytest.mark.slow
def test_prompts_of_ranks_with_sequences_of_their_own_are_not_captured() -> None:
    slow_host = replace(SLOW, op_s=1e-3, first_s=0.5)
    with_experts = [price(slow_host, family="qwen3_moe", plan=plan).ttft_s for plan in ("tp=2,ep=2", "dp=2,ep=2")]
    assert with_experts[0] < 0.51 < with_experts[1]


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
    pricers = pricers_in(tmp_path)
    assert known == fitted(pricers, measured)
    held_out = [each for each in measured if not each.is_fitted and each.entry == "decode"]
    assert len(held_out) >= 30
    assert max(abs(each.off(pricers, known)) for each in held_out) <= WITHIN
    assert sum(abs(each.off(pricers, None)) <= WITHIN for each in held_out) < 0.5 * len(held_out)
