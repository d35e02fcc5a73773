"""Summaries: kinds of layers once, what a deeper model of the same kinds has, and models that are refused."""

import functools

import pytest

from benchmarks.planning.models import deepened
from partitioner import Plan
from partitioner.compile.tracing.trace import trace
from partitioner.errors import PlanError
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from tests.support import zoo
from tests.support.partitioned import traced


@functools.cache
def of_depth(layers: int) -> Summary:
    return summarize_program(trace(zoo.tiny("llama", num_hidden_layers=layers)[0]))


def test_a_few_layers_say_what_a_deeper_model_costs() -> None:
    deep, few = of_depth(4), deepened(of_depth(3), 4)
    assert few.num_layers == deep.num_layers == 4
    assert few.num_bytes == deep.num_bytes
    workload = Workload(16, 4, 2)
    for text in ("tp=2", "pp=2"):
        one, other = (Pricer(each, Cluster.parse("2xH100")).price(Plan.parse(text), workload) for each in (few, deep))
        assert one.memory == other.memory
        assert one.latency_s == pytest.approx(other.latency_s, rel=1e-9)
    assert (
        len(deep.parts) == 5
    )  # before and behind the layers, the first layer, and two of the others (see find_blocks)


def test_models_with_a_cache_of_their_own_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"Mamba2ForCausalLM .*"):
        summarize_program(traced("mamba2")[1])


def test_a_latent_cache_takes_fewer_bytes_and_sp_is_priced_without_it() -> None:
    summary = summarize_program(traced("deepseek_v3")[1])
    pricer, workload = Pricer(summary, Cluster.parse("2xH100")), Workload(16, 4, 2)
    one, all_of_it, shared = (
        pricer.price(Plan.parse(text), workload) for text in ("tp=1", "tp=1,cache=expanded", "sp=2")
    )
    # two layers, 20 tokens of two requests, float64
    assert one.memory.cache == 2 * 20 * 2 * 32 * 8
    assert all_of_it.memory.cache == 2 * 20 * 2 * 4 * 40 * 8
    assert not shared.refused
    assert shared.memory.cache == all_of_it.memory.cache / 2
    float8 = Pricer(summary, Cluster.parse("2xH100"), cache_dtype="fp8").price(Plan(), workload)
    assert float8.memory.cache == 2 * 20 * 2 * (32 + 4)
