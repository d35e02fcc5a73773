"""Random plans of replicas, stages, groups and pieces, of up to 16 ranks, say what one rank says."""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partitioner import Parts, Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import PlanError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from tests.support.partitioned import EXACT, sized

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


degrees = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)).filter(lambda d: math.prod(d) <= 16)
"""dp, pp, tp"""
cases: dict[str, Any] = {
    "name": st.sampled_from(["llama", "gpt2", "mixtral"]),
    "degrees": degrees,
    "balance": st.sampled_from(["prefill", "decode"]),
    "share_head": st.booleans(),
    "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=6),
    "piece": st.integers(1, 9),
    "new": st.integers(1, 5),
    "seed": st.integers(0, 99),
}


def is_refused_or_says_the_same(
    name: str,
    degrees: tuple[int, int, int],
    balance: str,
    share_head: bool,
    lengths: list[int],
    piece: int,
    new: int,
    seed: int,
) -> bool:
    """Whether the model has too few places to cut; otherwise logits and tokens must be those of one rank."""
    dp, pp, tp = degrees
    staged = parts(
        name, Plan(dp=dp, pp=pp, tp=tp, passes=[("pipeline", {"balance": balance, "share_head": share_head})])
    )
    alone = parts(name, Plan(tp=1))
    assert alone is not None
    if staged is None:
        assert pp > 1
        return True
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    assert difference(staged.simulate(input_ids=ids), alone.simulate(input_ids=ids)) < EXACT
    texts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    ends = ids[0, :1].tolist()
    options: dict[str, Any] = {"eos_token_id": ends, "prefill_step": piece, "do_sample": seed % 2 == 1, "seed": seed}
    found, expected = (each.generate(texts, max_new_tokens=new, **options) for each in (staged, alone))
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    return False


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(**cases)
def test_any_plan_says_the_same(**case: Any) -> None:
    is_refused_or_says_the_same(**case)


@pytest.mark.slow
def test_many_plans_say_the_same() -> None:
    """20; --hypothesis-profile=full: 1,000, which takes an hour and tells on stderr how many there were so far."""
    seen: Counter[str] = Counter()

    @settings(max_examples=max(20, settings().max_examples), suppress_health_check=list(HealthCheck), database=None)
    @given(**cases)
    def any_plan(**case: Any) -> None:
        seen["refused" if is_refused_or_says_the_same(**case) else "equal"] += 1
        if sum(seen.values()) % 25 == 0:
            print(f"plans of replicas, stages and tp: {dict(seen)}, 0 mismatches", file=sys.stderr, flush=True)

    any_plan()
    assert seen["equal"] > seen["refused"]
