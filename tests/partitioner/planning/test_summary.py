"""Summaries: kinds of layers once, what a deeper model of the same kinds has, and models that are refused."""

import functools

import pytest

from benchmarks.planning.models import deepened
from partitioner import Plan
from partitioner.compile.partition import trace
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
    deep, few = of_depth(5), deepened(of_depth(3), 5)
    assert few.num_layers == deep.num_layers == 5
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
