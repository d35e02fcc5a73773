"""A plan under steady load: whose steps requests share, and the closed formula it is held beside."""

import functools
import random

import pytest

from benchmarks.planning.silicon.queue_formula import by_queues, queue_seconds
from partitioner import Plan
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.batching import Load, Scheduler
from partitioner.planning.pricing.continuous import shared_steps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from tests.support.partitioned import traced


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


def test_steps_are_those_of_the_plan() -> None:
    pricer = Pricer(summary("llama"), Cluster.parse("4xH100"))
    one = shared_steps(pricer, Plan(tp=2), Workload(64, 8, 6))
    two = shared_steps(pricer, Plan(tp=2, dp=2), Workload(64, 8, 6))
    assert (one.requests, one.worlds, two.requests, two.worlds) == (6, 1, 3, 2)
    assert two.served().running == 6
    layers = pricer.even_stages(Plan(tp=2))
    for rows, past in ((1, 72), (4, 36), (8, 72)):
        priced = pricer.step_seconds(Plan(tp=2), rows, past, layers)
        assert one.seconds.tokens(rows, past) == pytest.approx(priced, rel=0.02)
    assert one.seconds.prompts(64) == pytest.approx(pricer.run_seconds(Plan(tp=2), 1, 64, 0, layers)[0])
    staged = shared_steps(pricer, Plan(pp=2), Workload(64, 8, 6))
    assert staged.seconds.drain > 0


def test_replicas_with_experts_among_them_run_in_step() -> None:
    pricer = Pricer(summary("mixtral"), Cluster.parse("4xH100"))
    apart = shared_steps(pricer, Plan(dp=2), Workload(64, 8, 6))
    together = shared_steps(pricer, Plan(dp=2, ep=2), Workload(64, 8, 6))
    assert (apart.requests, apart.worlds, apart.replicas) == (3, 2, 1)
    assert (together.requests, together.worlds, together.replicas) == (6, 1, 2)
    assert together.seconds.tokens(6, 64) == pytest.approx(
        pricer.step_seconds(Plan(dp=2, ep=2), 3, 64, pricer.even_stages(Plan())), rel=0.02
    )


def test_running_is_what_the_cache_has_room_for() -> None:
    pricer = Pricer(summary("llama"), Cluster.parse("H100"))
    found = shared_steps(pricer, Plan(), Workload(1 << 20, 8, 1 << 20))
    assert 1 <= found.slots < found.requests
    layers = pricer.even_stages(Plan())
    assert pricer.memory(Plan(), Workload(1 << 20, 4, found.slots), layers).fits


def test_alone_a_request_has_what_the_plan_is_priced_at() -> None:
    pricer = Pricer(summary("llama"), Cluster.parse("H100"))
    steps = shared_steps(pricer, Plan(), Workload(64, 8))
    played, formula = steps.served(Scheduler(), Load()), by_queues(steps)
    layers = pricer.even_stages(Plan())
    assert played.ttft_s == pytest.approx(pricer.run_seconds(Plan(), 1, 64, 0, layers)[0])
    assert played.tpot_s == pytest.approx(pricer.step_seconds(Plan(), 1, 68, layers), rel=0.02)
    assert formula.tpot_s == pytest.approx(played.tpot_s, rel=0.02)


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
    assert queue_seconds(customers, service, thinking) == pytest.approx(total / 60_000, rel=0.03)
