"""The vocabulary head whose rows all stages share out: priced as it is compiled, chosen where it pays, and said."""

import dataclasses
import functools

import pytest

from partitioner import Plan
from partitioner.compile.partition import compile_program
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import reason
from partitioner.planning.pricing.price import Pricer, asked_head
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from partitioner.sharding.split_class import SplitClass
from passes.pipeline import Pipeline
from tests.support.partitioned import traced

WORKLOAD = Workload(20, 4, 3)


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


def with_vocabulary(found: Summary, rows: int) -> Summary:
    """Of a model with a larger vocabulary: bytes and products are expressions in it."""
    classes = {
        symbol: (SplitClass(rows, rows) if role == "vocabulary" else kind, role)
        for symbol, (kind, role) in found.classes.items()
    }
    return dataclasses.replace(found, classes=classes)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # of gemma2 the embedding reads the same table
def test_bytes_are_those_of_the_compiled_ranks(name: str) -> None:
    plan = Plan.parse("pp=2,pipeline.share_head=True")
    priced = Pricer(summary(name), Cluster.parse("2xH100")).price(plan, WORKLOAD)
    assert priced.shares_head
    compiled = compile_program(traced(name)[1], plan)
    assert priced.memory.weights == pytest.approx(max(compiled.report.bytes_per_rank), rel=0.002)


def test_a_tied_table_is_on_both_stages_that_read_it() -> None:
    found = summary("gemma2")
    pricer = Pricer(found, Cluster.parse("2xH100"))
    alone, together = (
        pricer.price(Plan.parse(f"pp={stages},pipeline.share_head=False"), WORKLOAD) for stages in (2, 1)
    )
    table = float(found.parts[found.last].tied.subs(found.values(tp=1)))
    assert table > 0
    layer = float(found.parts[found.order[0]].weight_bytes.subs(found.values(tp=1)))
    norm = float(found.parts[found.last].weight_bytes.subs(found.values(tp=1)))
    assert alone.memory.weights == pytest.approx(table + layer + norm, rel=0.01)
    assert together.memory.weights == pytest.approx(table + 2 * layer + norm, rel=0.01)


def test_it_is_chosen_where_a_token_gains_and_said() -> None:
    where = Cluster.parse("4xH100")
    small, large = summary("llama"), with_vocabulary(summary("llama"), 1 << 19)
    assert not Pricer(small, where).price(Plan(pp=2), WORKLOAD).shares_head
    pricer = Pricer(large, where)
    chosen = pricer.price(Plan(pp=2), WORKLOAD)
    assert chosen.shares_head
    assert "share out the vocabulary head" in reason(chosen, where, large)
    alone = pricer.price(Plan.parse("pp=2,pipeline.share_head=False"), WORKLOAD)
    assert not alone.shares_head
    assert "vocabulary head" not in reason(alone, where, large)
    assert chosen.tpot_s < 0.9 * alone.tpot_s


def test_what_a_plan_asks() -> None:
    assert asked_head(Plan(pp=2)) is None
    assert asked_head(Plan.parse("pp=2,pipeline.balance=prefill")) is None
    assert asked_head(Plan.parse("pp=2,pipeline.share_head=False")) is False
    assert asked_head(Plan(pp=2, passes=[Pipeline(share_head=True)])) is True
