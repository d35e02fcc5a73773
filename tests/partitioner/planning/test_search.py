"""Summaries, prices and the search: against exhaustive search, against what is compiled, and what is refused."""

import dataclasses
import functools
import itertools
import math
import re

import pytest

from partitioner import Plan
from partitioner.errors import InputError, PlanError
from partitioner.planning.cluster import Cluster, Device, Dimension
from partitioner.planning.explain import cards_for_weights, reason
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stage_split import split_layers
from partitioner.planning.quantities import Price, Workload
from partitioner.planning.search import broken_limits, choose_plan, longest_prompt, plans, search
from partitioner.planning.summary import Summary, summarize_program
from tests.support.partitioned import compiled_for, traced

SMALL = Device("small", 4 << 20, 1 << 10, 1e9, {"float64": 1e10})


def cluster(*sizes: int, memory: int = 4 << 20) -> Cluster:
    links = ((1e9, 1e-6), (1e8, 1e-5), (1e7, 1e-4))
    dimensions = tuple(Dimension(f"link{i}", n, *links[i]) for i, n in enumerate(sizes))
    return Cluster("toy", dimensions, (dataclasses.replace(SMALL, memory_bytes=memory),))


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *(pytest.param("llama", plan, marks=pytest.mark.slow) for plan in ("tp=2", "tp=4")),
        ("mixtral", "tp=2"),
        ("llama", "tp=3"),
    ],
)
def test_weights_and_cache_are_those_of_the_fullest_rank(name: str, plan: str) -> None:
    found = summary(name)
    compiled = compiled_for(name, plan)
    workload = Workload(prompt=20, new=4, batch=3)
    memory = Pricer(found, cluster(4)).memory(Plan.parse(plan), workload, (found.num_layers,))
    assert memory.weights == pytest.approx(max(compiled.report.bytes_per_rank), rel=0.002)
    ranks = range(compiled.mesh.world_size)
    held = max(sum(math.prod(s.shape) * s.dtype.itemsize for s in compiled.entry("decode", r).states) for r in ranks)
    assert memory.cache == 24 * 3 * held


def exhaustive(found: Summary, where: Cluster, workload: Workload, goal: str) -> Price:
    """Every combination of degrees that a mesh takes, each priced with nothing remembered of the others."""
    pricer = Pricer(found, where)
    best: list[tuple[int, float, Price]] = []
    sizes = range(1, where.size + 1)
    experts = found.experts.count if found.experts is not None else 1
    for dp, pp, tp in itertools.product(sizes, repeat=3):
        if where.size % (dp * pp * tp) or dp > workload.batch:
            continue
        for ep, etp in itertools.product(range(1, experts + 1), sizes):
            try:
                plan = Plan(dp=dp, pp=pp, tp=tp, ep=ep, etp=etp)
            except PlanError:
                continue
            if etp not in (1, tp) or (etp > 1 and (ep == 1 or dp % ep)) or (etp == 1 and ep % tp and tp % ep):
                continue
            pricer._costs.clear()
            price = pricer.price(plan, workload)
            if not price.refused:
                wanted = -price.tokens_per_s if goal == "throughput" else price.latency_s
                best.append((len(broken_limits(price)), wanted, price))
    return min(best, key=lambda each: each[:2])[2]


CASES = [
    (name, sizes, Workload(*shape), goal)
    for (name, sizes), (shape, goal) in itertools.product(
        [("llama", (2,)), ("llama", (4,)), ("llama", (2, 2)), ("mixtral", (2, 2)), ("mixtral", (4,))],
        [((8, 4, 1), "latency"), ((64, 8, 4), "throughput"), ((128, 2, 2), "latency"), ((16, 16, 8), "throughput")],
    )
]


@pytest.mark.parametrize(
    ("name", "sizes", "workload", "goal"),
    # in the quick suite each goal, cluster and model
    [pytest.param(*case, id=str(i), marks=pytest.mark.slow if i % 3 else ()) for i, case in enumerate(CASES)],
)
def test_the_optimum_is_that_of_exhaustive_search(
    name: str, sizes: tuple[int, ...], workload: Workload, goal: str
) -> None:
    where = cluster(*sizes, memory=16 << 20)
    best = search(summary(name), where, workload, goal=goal, frontier=False).best
    wanted = exhaustive(summary(name), where, workload, goal)
    assert best.latency_s == pytest.approx(wanted.latency_s, rel=1e-9)


def test_what_does_not_fit_is_refused_with_its_bytes() -> None:
    where = cluster(2, memory=400_000)  # the weights are 625,216 bytes
    choice = search(summary("llama"), where, Workload(4, 2, 1))
    assert all(each.plan.mesh.world_size == 1 for each in choice.refused if "too much" in each.refused)
    nothing = search(summary("llama"), cluster(2, memory=100_000), Workload(4, 2, 1))
    assert not nothing.ranked
    with pytest.raises(PlanError, match=r"no plan fits; the closest is .* GB too much"):
        nothing.best  # noqa: B018


def test_broken_limits_rank_behind() -> None:
    where = cluster(4)
    fast = search(summary("llama"), where, Workload(64, 8, 4), goal="latency", frontier=False).best
    limited = Workload(64, 8, 4, tpot_s=fast.tpot_s * 1.0001)
    choice = search(summary("llama"), where, limited, goal="throughput", frontier=False)
    broken = [len(broken_limits(each)) for each in choice.ranked]
    assert broken == sorted(broken)
    assert broken[0] == 0
    assert broken[-1] > 0


def test_context_is_the_longest_prompt_that_fits() -> None:
    found, where, workload = summary("llama"), cluster(2), Workload(1, 4, 1)
    pricer = Pricer(found, where)
    longest = longest_prompt(pricer, Plan(tp=2), workload)
    assert longest > longest_prompt(pricer, Plan(), workload) > 0
    assert pricer.price(Plan(tp=2), dataclasses.replace(workload, prompt=longest)).refused == ""
    too_long = dataclasses.replace(workload, prompt=longest + longest // 100 + 2)
    assert "too much" in pricer.price(Plan(tp=2), too_long).refused
    choice = search(found, where, workload, goal="context")
    assert choice.contexts[0][1] >= longest


def test_the_longest_prompt_is_bounded_by_memory_alone() -> None:
    """Of a small model on a large card: no number of tokens ends the search."""
    pricer, workload = Pricer(summary("llama"), cluster(1, memory=80 << 30)), Workload(1, 4, 1)
    longest = longest_prompt(pricer, Plan(), workload)
    too_long = dataclasses.replace(workload, prompt=longest + longest // 100)
    assert longest > 1 << 25
    assert "too much" in pricer.price(Plan(), too_long).refused


def test_a_context_is_shared_out_whatever_prompt_is_given() -> None:
    """Over ranks of sp, where neither heads nor layers divide."""
    found, where = summary("llama"), cluster(7)
    choice = search(found, where, Workload(1, 4, 1), goal="context")
    plan, longest = choice.contexts[0]
    assert reason(choice.ranked[0], where, found).startswith(f"sp=7 for prompts of {longest} tokens")
    assert plan == "sp=7"
    assert longest > 3 * dict(choice.contexts)["tp=1"]


def test_reasons_name_the_degrees_and_plan_auto_gives_the_best() -> None:
    found, where, workload = summary("mixtral"), cluster(2, 2), Workload(64, 8, 8)
    choice = search(found, where, workload, goal="throughput")
    assert Plan.auto(found, where, workload, goal="throughput") == choice.best.plan
    assert choose_plan(found, "8xH100", workload).mesh.world_size <= 8
    said = reason(choice.best, where, found)
    for axis in ("tp", "pp", "dp"):
        degree = choice.best.plan.mesh.size(axis)
        assert (f"{axis}={degree}" in said) == (degree > 1)
    assert choice.frontier
    pace = [each.tpot_s for each in choice.frontier]
    assert pace == sorted(pace)


def test_all_plans_are_of_meshes_that_divide_the_cluster() -> None:
    found = list(plans(summary("mixtral"), cluster(2, 2), Workload(8, 2, 4)))
    assert len(set(map(str, found))) == len(found)
    assert all(4 % plan.mesh.world_size == 0 for plan in found)
    assert Plan(dp=2, tp=2, ep=4) in found
    assert all(plan.ep * plan.etp == 1 for plan in plans(summary("llama"), cluster(2, 2), Workload(8, 2, 4)))


def test_uneven_stages_are_the_best_cut() -> None:
    costs = [3.0, 1.0, 1.0, 1.0, 4.0, 2.0]
    for count in (1, 2, 3, 6):
        cut = split_layers(costs, count)
        ends = list(itertools.accumulate(cut))
        slowest = max(sum(costs[end - n : end]) for end, n in zip(ends, cut, strict=True))
        ways = itertools.combinations(range(1, len(costs)), count - 1)
        best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *way, len(costs)))) for way in ways)
        assert slowest == pytest.approx(best)
    with pytest.raises(PlanError):
        split_layers(costs, 7)


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(InputError):
        Workload(0, 1, 1)
    with pytest.raises(InputError):
        Workload(1, 1, 1, tpot_s=0)
    with pytest.raises(InputError, match="latency, throughput, context"):
        search(summary("llama"), cluster(2), Workload(1, 1, 1), goal="glory")


@pytest.mark.parametrize(("parameters", "cards"), [(70_553_706_496, 2), (405_853_388_800, 10), (671_026_419_200, 17)])
def test_cards_for_the_weights_alone(parameters: int, cards: int) -> None:
    """In bfloat16, on cards of 80 GB of which 78 GiB are usable."""
    assert cards_for_weights(2 * parameters, 78 << 30) == cards


def test_plans_are_written_as_the_command_line_takes_them() -> None:
    for plan in plans(summary("mixtral"), cluster(2, 2), Workload(8, 2, 4)):
        assert Plan.parse(str(plan)) == plan
        assert re.fullmatch(r"(\w+=\d+)(,\w+=\d+)*", str(plan))
