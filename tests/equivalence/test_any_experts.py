"""Experts on random meshes of up to 16 ranks, with random routing and its extremes: what one rank says, in float64."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from partitioner import Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import PlanError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from tests.support import zoo
from tests.support.partitioned import EXACT

SIZES = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
SIZES |= {"intermediate_size": 20, "vocab_size": 61, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {"num_experts": 5, "moe_intermediate_size": 14, "shared_expert_intermediate_size": 18},
}
ROUTING = ("as it is", "all to the same", "to few", "to all")

meshes = st.tuples(*(st.integers(1, 4) for _ in range(5)))
plans = st.tuples(meshes, st.sampled_from(["auto", "replicate", "gather", "exchange"]), st.booleans())
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@functools.cache
def traced(name: str) -> tuple[Any, Program, dict[str, Any]]:
    """And the weights of its routers as they were, which the program and the model share."""
    sizes = {key: value for key, value in SIZES.items() if not (name == "qwen2_moe" and key == "head_dim")}
    model, _ = zoo.tiny(name, **sizes, **MODELS[name])
    gates = {key: value.detach().clone() for key, value in model.named_parameters() if key.endswith("mlp.gate.weight")}
    return model, in_float64(trace(model)), gates


def route(name: str, how: str, seed: int) -> None:
    """all to the same: equal scores; to few: a few directions decide; to all: as evenly as chance has it."""
    model, program, gates = traced(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, before in gates.items():
            weight = model.get_parameter(key)
            assert program.weight_data[key].data_ptr() == weight.data_ptr()
            drawn = torch.randn(before.shape, generator=generator, dtype=before.dtype)
            skewed = drawn * torch.logspace(0, -3, len(drawn), dtype=before.dtype)[:, None]
            weight.copy_({"as it is": before, "all to the same": 0 * before, "to few": skewed, "to all": drawn}[how])


def plan_of(case: Any) -> Plan:
    (dp, pp, ep, etp, tp), exchange, rows = case
    assume(ep * etp > 1 and pp <= 2 and math.prod((dp, pp, tp)) <= 16 and (dp * tp) % (ep * etp) == 0)
    passes = [("expert-parallel", {"exchange": exchange}), *(["sequence-parallel"] if rows and tp > 1 else [])]
    return Plan(dp=dp, pp=pp, tp=tp, ep=ep, etp=etp, passes=passes)


def said(name: str, plan: Plan, texts: list[list[int]], ids: torch.Tensor) -> Any:
    parts = compile_program(traced(name)[1], plan)
    new = parts.generate(texts, max_new_tokens=3, eos_token_id=[], prefill_step=4)
    return parts.simulate(input_ids=ids), new, bool(parts.program_of("prefill").batch_axes)


def check_one(seen: Counter[str], name: str, case: Any, how: str, some: list[int], seed: int) -> None:
    plan = plan_of(case)
    route(name, how, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SIZES["vocab_size"], (len(some), max(some)), generator=generator)
    texts = [row[:length].tolist() for row, length in zip(ids, some, strict=True)]
    try:
        found, new, own = said(name, plan, texts, ids)
    except PlanError as refused:
        if "can be cut at" not in str(refused) and "places to cut" not in str(refused):
            raise
        seen["refused"] += 1
        return
    expected, tokens, _ = said(name, Plan(), texts, ids)
    assert difference(found, expected) < EXACT, (name, str(plan), how)
    assert torch.equal(new, tokens), (name, str(plan), how)
    seen["equal"] += 1
    seen["own"] += own


@pytest.mark.slow
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(sorted(MODELS)), plans, st.sampled_from(ROUTING), lengths, st.integers(0, 99))
def test_any_mesh_and_any_routing(name: str, case: Any, how: str, some: list[int], seed: int) -> None:
    check_one(Counter(), name, case, how, some, seed)


@pytest.mark.slow
def test_many_meshes(capsys: pytest.CaptureFixture[str]) -> None:
    """20; --hypothesis-profile=full: 1,000, which takes hours and tells how many there were so far."""
    seen: Counter[str] = Counter()

    @settings(max_examples=max(20, settings().max_examples), suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(sorted(MODELS)), plans, st.sampled_from(ROUTING), lengths, st.integers(0, 99))
    def any_mesh(name: str, case: Any, how: str, some: list[int], seed: int) -> None:
        check_one(seen, name, case, how, some, seed)
        with capsys.disabled():
            print(f"\r{dict(seen)}", end="", flush=True)

    any_mesh()
    with capsys.disabled():
        print(
            f"\nexperts on random meshes: {seen['equal']} equal, {seen['own']} of them with sequences of their own, "
            f"{seen['refused']} refused by name, 0 wrong"
        )
    assert seen["equal"] > seen["refused"]
