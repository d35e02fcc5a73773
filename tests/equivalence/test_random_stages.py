"""Random plans of replicas, stages, groups and pieces, of up to 16 ranks, say what one rank says."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partitioner import Parts, Plan
from partitioner.cli.compare import difference
from partitioner.compile.partition import compile_program, trace
from partitioner.errors import PlanError
from partitioner.program import Program
from partitioner.proof.float64 import in_float64
from tests.support.partitioned import EXACT, sized

EXAMPLES = int(os.environ.get("EXAMPLES", "5"))
VOCABULARY = 61


@functools.cache
def traced(name: str) -> Program:
    """Four layers, so that four stages have something each."""
    model = sized(name, num_hidden_layers=4, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                  intermediate_size=20, vocab_size=VOCABULARY)  # fmt: skip
    return in_float64(trace(model))


@functools.cache
def parts(name: str, plan: Plan) -> Parts[Any] | None:
    try:
        return compile_program(traced(name), plan)
    except PlanError:
        return None  # fewer places to cut than stages


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    name=st.sampled_from(["llama", "gpt2", "mixtral"]),
    degrees=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)).filter(lambda d: math.prod(d) <= 16),
    balance=st.sampled_from(["prefill", "decode"]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    piece=st.integers(1, 9),
    new=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_plan_says_the_same(
    name: str, degrees: tuple[int, int, int], balance: str, lengths: list[int], piece: int, new: int, seed: int
) -> None:
    dp, pp, tp = degrees
    staged = parts(name, Plan(dp=dp, pp=pp, tp=tp, passes=[("pipeline", {"balance": balance})]))
    alone = parts(name, Plan(tp=1))
    assert alone is not None
    if staged is None:
        assert pp > 1
        return
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    assert difference(staged.simulate(input_ids=ids), alone.simulate(input_ids=ids)) < EXACT
    texts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    ends = ids[0, :1].tolist()
    options: dict[str, Any] = {"eos_token_id": ends, "prefill_step": piece, "do_sample": seed % 2 == 1, "seed": seed}
    found, expected = (each.generate(texts, max_new_tokens=new, **options) for each in (staged, alone))
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
