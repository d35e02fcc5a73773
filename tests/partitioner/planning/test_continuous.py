"""Requests that come as others end: closed forms where there are some, and a simulation of the queue."""

import functools
import random
from dataclasses import replace

import pytest

from partitioner import Plan
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.continuous import Steps, _queue, steps_of
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from tests.support.partitioned import traced

STEPS = Steps(decode=0.01, prefill=0.1, stall=0.1, requests=8, running=8, met=8, together=1, new=100)


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


def test_one_request_waits_for_nobody() -> None:
    alone = replace(STEPS, requests=1, running=1, met=1).served()
    assert alone.tpot_s == STEPS.decode
    assert alone.ttft_s == pytest.approx(STEPS.prefill + STEPS.decode)


def test_each_token_waits_for_its_part_of_the_others_prompts() -> None:
    assert STEPS.served(waves=1e12).tpot_s == pytest.approx(0.01 + 7 / 100 * 0.1)
    assert STEPS.served(waves=1).tpot_s == pytest.approx(0.01 + 0.5 * 7 / 100 * 0.1)
    assert STEPS.served(waves=1).ttft_s == pytest.approx(0.1 * (8 + 1) / 2 + 0.01)


def test_who_finds_no_room_waits_as_little_says() -> None:
    crowded = replace(STEPS, requests=24).served()
    rate = 8 / (100 * crowded.tpot_s)
    waited = crowded.ttft_s - STEPS.served().ttft_s
    assert rate * waited == pytest.approx(24 - 8)


def test_faster_kernels_and_overhead() -> None:
    plain, fast = STEPS.served(), STEPS.served(efficiency=2.0, overhead_s=1.0)
    assert fast.tpot_s == pytest.approx(plain.tpot_s / 2)
    assert fast.ttft_s == pytest.approx(plain.ttft_s / 2 + 1.0)


@pytest.mark.parametrize(("customers", "service", "thinking"), [(1, 1.0, 3.0), (5, 1.0, 10.0), (12, 1.0, 6.0)])
def test_the_queue_is_that_of_a_simulation(customers: int, service: float, thinking: float) -> None:
    draw = random.Random(0)
    arrivals = sorted(draw.expovariate(1 / thinking) for _ in range(customers))
    free = total = 0.0
    for _ in range(60_000):
        arrival = arrivals.pop(0)
        free = max(free, arrival) + draw.expovariate(1 / service)
        total += free - arrival
        arrivals.append(free + draw.expovariate(1 / thinking))
        arrivals.sort()
    assert _queue(customers, service, thinking) == pytest.approx(total / 60_000, rel=0.03)


def test_steps_are_those_of_the_plan() -> None:
    pricer = Pricer(summary("llama"), Cluster.parse("4xH100"))
    one = steps_of(pricer, Plan(tp=2), Workload(64, 8, 6))
    two = steps_of(pricer, Plan(tp=2, dp=2), Workload(64, 8, 6))
    assert (one.running, one.met, two.running, two.met) == (6, 6, 6, 3)
    assert two.decode < one.decode * 1.0001
    staged = steps_of(pricer, Plan(pp=2), Workload(64, 8, 6))
    assert staged.stall < staged.prefill


def test_running_is_what_the_cache_has_room_for() -> None:
    pricer = Pricer(summary("llama"), Cluster.parse("H100"))
    found = steps_of(pricer, Plan(), Workload(1 << 20, 8, 1 << 20))
    assert 1 <= found.running < found.requests
    layers = pricer.even_stages(Plan())
    fits = pricer.memory(Plan(), Workload(1 << 20, 4, found.running), layers)
    assert fits.fits
