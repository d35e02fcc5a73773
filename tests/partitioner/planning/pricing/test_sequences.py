"""Plans that share out tokens over sp: priced as what is compiled declares, and proposed where they win."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import sympy

from partitioner import Parts, Plan
from partitioner.analysis.cost.program_cost import program_cost
from partitioner.planning.cluster import Cluster, Device, Dimension
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.sequences import Attending
from partitioner.planning.quantities import Seconds, Workload
from partitioner.planning.search import search
from partitioner.planning.summary import Summary, summarize_program
from tests.support.partitioned import compiled_for, traced

TOKENS = 48
DEVICE = Device("toy", 1 << 30, 0, 1e11, {"float64": 1e10})


def cluster(ranks: int, *, memory: int = 1 << 30, bytes_per_s: float = 1e10) -> Cluster:
    link = Dimension("link", ranks, bytes_per_s, 1e-6)
    return Cluster("toy", (link,), (dataclasses.replace(DEVICE, memory_bytes=memory),))


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


@functools.cache
def compiled(name: str, plan: str) -> Parts[Any]:
    return compiled_for(name, plan)


def attending(name: str, plan: Plan, *, entry: str, length: int, past: int) -> list[Attending]:
    """Of all layers, of all tokens."""
    pricer, found = Pricer(summary(name), cluster(plan.mesh.world_size)), []
    values = pricer._values(plan, 1, length, past, alike=entry == "decode")
    for part in summary(name).order:
        for node in summary(name).parts[part].nodes[entry]:
            if node.kind == "attention":
                product = [float(sympy.sympify(each).subs(values)) for each in node.product]
                found.append(Attending.of(product, 8))
    return found


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", "sp=3,sp_attention=gather"),
        ("llama", "sp=2,sp_attention=ulysses"),
        *(
            pytest.param(name, plan, marks=pytest.mark.slow)
            for name, plan in (("llama", "sp=2,sp_attention=ring"), ("llama", "tp=2,sp=2"), ("gpt2", "sp=4"))
        ),
        ("mixtral", "tp=2,sp=2,sp_attention=ring"),
    ],
)
def test_exchanges_are_those_that_the_compiled_program_declares(name: str, plan: str) -> None:
    chosen = Plan.parse(plan)
    for entry, length, past in (("prefill", TOKENS, 0), ("decode", 1, TOKENS)):
        program = compiled(name, plan).program_of(entry)  # type: ignore[arg-type]
        given = {"batch": 1, "sequence": length, "past": past}
        cost = program_cost(program, {"sp": 0}, given)
        attends = [node for node in cost.nodes if "attention" in str(node.op)]
        every = attending(name, chosen, entry=entry, length=length, past=past)
        assert len(attends) == len(every) == summary(name).num_layers
        for node, each in zip(attends, every, strict=True):
            meetings = list(each.meetings(chosen, steps=entry == "decode"))
            declared = [meeting.bytes for meeting in node.meetings]
            assert [meeting.kind for meeting in node.meetings] == [k for k, _, times in meetings for _ in range(times)]
            assert declared == pytest.approx([size for _, size, times in meetings for _ in range(times)], rel=0.35)
            assert sum(declared) == pytest.approx(sum(size * times for _, size, times in meetings), rel=0.05)


def test_products_of_a_prompt_are_the_share_of_a_rank() -> None:
    whole = program_cost(compiled("llama", "sp=1").program_of("prefill"), {}, {"batch": 1, "sequence": TOKENS})
    pricer = Pricer(summary("llama"), cluster(4))
    for sp in (2, 4):
        program = compiled("llama", f"sp={sp}").program_of("prefill")
        each = [program_cost(program, {"sp": rank}, {"batch": 1, "sequence": TOKENS}).flops for rank in range(sp)]
        assert max(each) < 1.1 * whole.flops / sp
        part = summary("llama").order[0]
        one, shared = (pricer.part_seconds(part, "prefill", Plan(sp=n), 1, TOKENS, 0) for n in (1, sp))
        assert shared.products + shared.memory == pytest.approx((one.products + one.memory) / sp, rel=0.35)


def test_a_rank_keeps_its_share_of_the_cache() -> None:
    workload = Workload(prompt=4096, new=64, batch=2)
    pricer = Pricer(summary("llama"), cluster(4))
    layers = (summary("llama").num_layers,)
    one, shared = (pricer.memory(Plan(sp=sp), workload, layers) for sp in (1, 4))
    assert shared.cache == one.cache / 4
    assert shared.weights == one.weights
    assert shared.activations < 0.3 * one.activations
    held = compiled("llama", "sp=4").cache_bytes(max_batch=2, max_length=4160, prefill_step=128)
    assert shared.cache == pytest.approx(max(held), rel=0.1)  # there is room for a piece more


def test_sp_is_proposed_where_it_wins() -> None:
    """A long prompt, more ranks than heads for tp: what is left can share out tokens, or stand idle."""
    where, found = cluster(8), summary("llama")
    long = search(found, where, Workload(prompt=65536, new=2, batch=1), goal="latency", frontier=False)
    assert long.best.plan.sp > 1
    without = min((each for each in long.ranked if each.plan.sp == 1), key=lambda each: each.latency_s)
    assert long.best.latency_s < 0.9 * without.latency_s
    short = search(found, where, Workload(prompt=64, new=64, batch=1), goal="latency", frontier=False)
    assert all(each.plan.sp == 1 for each in (*short.ranked, *short.refused))


def test_sp_is_not_proposed_over_slow_links_for_few_new_bytes() -> None:
    where = cluster(8, bytes_per_s=1e5)
    choice = search(summary("llama"), where, Workload(prompt=8192, new=2, batch=1), frontier=False)
    assert choice.best.plan.sp == 1


def test_sp_makes_a_prompt_fit() -> None:
    one = Pricer(summary("llama"), cluster(1))
    workload = Workload(prompt=1 << 16, new=2, batch=1)
    needed = one.memory(Plan(tp=1), workload, (summary("llama").num_layers,)).total
    where = cluster(4, memory=int(0.6 * needed))
    pricer = Pricer(summary("llama"), where)
    assert "too much" in pricer.price(Plan(tp=1), workload).refused
    assert pricer.price(Plan(sp=4), workload).refused == ""


def test_a_prompt_with_fewer_tokens_than_ranks_is_refused() -> None:
    price = Pricer(summary("llama"), cluster(4)).price(Plan(sp=4), Workload(prompt=3, new=2))
    assert "no work for sp=4" in price.refused


def test_experts_of_own_tokens_and_of_all() -> None:
    """In prompts ranks of sp have other tokens, in steps the same ones: there they sum what their experts make."""
    pricer = Pricer(summary("mixtral"), cluster(4))
    plan = Plan(sp=2, tp=2, ep=4)
    workload = Workload(prompt=4096, new=8, batch=1)
    price = pricer.price(plan, workload)
    assert price.refused == ""
    assert price.exchange.endswith("then replicate")
    assert isinstance(price.prefill, Seconds)
    assert price.prefill.by_collective.keys() & {"exchange", "gather"}
