"""Random small models, ranks and inputs: the simulated ranks compute what the model computes, in float64.

pytest tests/equivalence/test_random_models.py                                    20 models and a few examples more
pytest tests/equivalence/test_random_models.py --hypothesis-profile=full          1,000
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from partitioner import Plan
from partitioner.analysis.labels.assign_owners import divide
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import PlanError
from partitioner.proof.float64 import in_float64
from partitioner.sharding.index_set import IndexSet
from tests.support import reference
from tests.support.partitioned import sized

FAMILIES = [
    "llama", "gpt2", "gptj", "gpt_neox", "phi3", "bloom", "falcon", "cohere", "olmo2", "qwen3", "gemma2", "mixtral",
    "gpt_oss", "deepseek_v3", "stablelm", "bitnet", "granitemoe", "masked:bert",
]  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An architecture and sizes, none of them chosen to be convenient."""
    name = draw(st.sampled_from(FAMILIES))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(2, 5))
    hidden = heads * head_dim
    sizes = {
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "head_dim": head_dim,
        "intermediate_size": draw(st.integers(3, 70)),
        "vocab_size": draw(st.integers(20, 97)),
    }
    return name, sizes


CASE = st.tuples(
    models(),
    st.lists(st.integers(2, 6), min_size=1, max_size=2, unique=True),
    st.integers(1, 3),
    st.lists(st.integers(1, 24), min_size=1, max_size=2),
)


@settings(max_examples=min(3, settings().max_examples))
@given(CASE)
def test_a_few_random_models_are_equal(case: Any) -> None:
    is_equal(*case)


@pytest.mark.slow
@settings(max_examples=max(20, settings().max_examples))
@given(CASE)
def test_random_models_are_equal(case: Any) -> None:
    is_equal(*case)


def is_equal(chosen: tuple[str, dict[str, Any]], degrees: list[int], batch: int, lengths: list[int]) -> None:
    name, sizes = chosen
    try:
        model = sized(name, **sizes)
        ids = torch.randint(3, sizes["vocab_size"], (batch, max(lengths)), generator=torch.Generator().manual_seed(1))
        expected = {n: reference.forward(model, lifted=True, input_ids=ids[:, :n]) for n in lengths}
    except (ValueError, RuntimeError, AssertionError):
        assume(False)  # transformers itself refuses these sizes
    traced = in_float64(trace(model))
    for tp in degrees:
        parts = compile_program(traced, Plan(tp=tp))
        for n, logits in expected.items():
            worst = difference(parts.simulate(input_ids=ids[:, :n]), logits)
            assert worst < 1e-10, f"{name} {sizes} tp={tp} length {n}: {worst:.1e}\n{parts.report}"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40), st.integers(1, 8))
def test_atoms_are_dealt_in_order_and_every_rank_has_one(pairs: list[tuple[int, int]], ranks: int) -> None:
    atoms = [frozenset(pair) for pair in pairs]
    assume(len(atoms) >= ranks)
    found = divide(atoms, [1.0] * len(atoms), ranks, lambda label: 1.0)
    assert found == sorted(found)
    assert set(found) == set(range(ranks))


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_index_sets_are_sets(a: set[int], b: set[int]) -> None:
    x, y = IndexSet.of(a), IndexSet.of(b)
    assert x.indices() == sorted(a)
    assert (x & y).indices() == sorted(a & b)
    assert (x <= y) == (a <= b)
    assert all((i in x) == (i in a) for i in range(42))


@given(st.integers(-3, 0))
def test_degrees_below_one_are_refused(tp: int) -> None:
    with pytest.raises(PlanError, match="at least 1"):
        Plan(tp=tp)
