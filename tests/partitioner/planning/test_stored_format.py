"""Weights and caches in fewer bits: bytes to the byte, and what products and attention take."""

import functools

import pytest

from partitioner import Plan
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import ITEM, StoredFormat
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from tests.support.partitioned import traced

WORKLOAD = Workload(8, 4, 1)


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


def matrices(found: Summary, *, experts_only: bool) -> float:
    """How many numbers the layers' matrices have, by the sizes of their products."""
    values, total = found.values(tp=1) | {found.batch: 1, found.sequence: 1}, 0.0
    for part in found.order:
        for node in found.parts[part].nodes["decode"]:
            if node.kind == "experts" or (node.kind == "linear" and not experts_only):
                held = values[next(each for each in values if str(each) == "experts")] if node.kind == "experts" else 1
                total += float((node.product[1] * node.product[2] * held).subs(values))
    return total


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("experts_only", [False, True])
def test_weights_take_the_bits_that_are_said(name: str, experts_only: bool) -> None:
    found, where = summary(name), Cluster.parse("2xH100")
    stored = StoredFormat("four", found.dtype, 4.5, experts_only=experts_only)
    light, heavy = (Pricer(found, where, stored=each) for each in (stored, None))
    layers = light.even_stages(Plan())
    less = heavy.memory(Plan(), WORKLOAD, layers).weights - light.memory(Plan(), WORKLOAD, layers).weights
    assert less == pytest.approx(matrices(found, experts_only=experts_only) * (ITEM[found.dtype] - 4.5 / 8))
    assert (less > 0) is not (experts_only and name == "llama")


def test_steps_read_fewer_bytes_and_expanding_costs_its_share() -> None:
    found, where = summary("llama"), Cluster.parse("H100")
    fast = StoredFormat("four", found.dtype, 4.5)
    slow = StoredFormat("four", found.dtype, 4.5, share=0.25)
    plain, light, heavy = (
        Pricer(found, where, stored=each).price(Plan(), WORKLOAD).tpot_s for each in (None, fast, slow)
    )
    assert light < plain
    assert heavy > light


def test_a_cache_in_one_byte_is_as_much_smaller() -> None:
    found, where = summary("llama"), Cluster.parse("H100")
    plain, half = (Pricer(found, where, cache_dtype=kind) for kind in ("", "float8_e4m3fn"))
    many = Workload(4096, 4, 64)
    layers = plain.even_stages(Plan())
    kept = [each.memory(Plan(), many, layers).cache for each in (plain, half)]
    assert kept[1] == kept[0] / ITEM[found.dtype]
    assert half.price(Plan(), many).tpot_s < plain.price(Plan(), many).tpot_s
    with pytest.raises(InputError, match="int3"):
        Pricer(found, where, cache_dtype="int3")
