"""Replicas, stages, shared-out tokens, tensor and expert parallelism in one plan: what one rank says, in float64."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from partitioner import Parts, Plan, partition
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import LayoutError, PlanError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from partitioner.proof.layouts import check
from partitioner.proof.rows import check_rows
from partitioner.storage.bundle.bundle import load
from runtime.ops.collectives import all_reduce
from runtime.ops.expert_exchange import expert_return
from runtime.ops.rows import collect_rows, scatter_rows
from tests.support import generated
from tests.support.partitioned import EXACT, compiled_for, error, sized, tokens, traced
from tests.support.processes import forked

VOCABULARY = 61
ALL = "pp=2,sp=2,tp=2,ep=4"


@functools.cache
def compiled(name: str, plan: str) -> Parts[Any]:
    return compiled_for(name, plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("mixtral", f"{ALL},expert-parallel.exchange=exchange"),
        pytest.param("mixtral", f"{ALL},expert-parallel.exchange=replicate", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", f"{ALL},sp_attention=ring", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", f"{ALL},sequence-parallel,sp_attention=gather", marks=pytest.mark.slow),
        pytest.param("mixtral", "pp=2,sp=2,ep=4,etp=2", marks=pytest.mark.slow),  # ep over dp: own sequences
        pytest.param("mixtral", f"dp=2,{ALL}", marks=pytest.mark.slow),  # replicas: worlds of their own
    ],
)
def test_texts_prompts_and_new_tokens(name: str, plan: str) -> None:
    parts = compiled(name, plan)
    for length, batch in ((1, 1), (9, 3)):
        assert error(name, parts, length, batch=batch) < EXACT
    assert generated.error(name, parts, generated.prompts(name, (1, 4, 11)), new=4) < 1e-9
    assert generated.error(name, parts, generated.prompts(name, (3, 11)), new=2, prefill_step=4) < 1e-9


@pytest.mark.slow  # bundles of fewer axes: test_experts.py, test_sequences.py, test_sequence_stages.py
def test_a_bundle_holds_them_all(tmp_path: Any) -> None:
    parts = partition(traced("mixtral")[0], Plan.parse(f"{ALL},expert-parallel.exchange=exchange"))
    ids = tokens("mixtral", 7)
    parts.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    assert torch.equal(loaded.simulate(input_ids=ids), parts.simulate(input_ids=ids))
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), parts.generate(ids, max_new_tokens=3))  # type: ignore[arg-type]


@pytest.mark.processes
def test_processes_over_gloo_say_what_one_does(pytestconfig: pytest.Config) -> None:
    """Two ranks of each axis that has messages of its own; more plans and ranks, each an interpreter: slow tests of
    test_generation.py, test_stages.py and test_experts.py.
    """
    said = run_forked(pytestconfig, "tp=2", "llama", "pp=2", "llama", "tp=2,ep=2,expert-parallel.exchange=exchange,"
                      "sequence-parallel", "mixtral", "ep=2,expert-parallel.exchange=exchange", "mixtral")  # fmt: skip
    assert said.count("2 of 2 ranks agree with one process") == 4


def run_forked(pytestconfig: pytest.Config, *pairs: str) -> str:
    command = ["-m", "tests.equivalence.ranks.forked_ranks", *pairs]
    environment = {"PYTHONPATH": str(pytestconfig.rootpath), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = forked.run(command, env={**os.environ, **environment})
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    "plan",
    [
        "dp=2,pp=2,sp=2,tp=2,ep=8,expert-parallel.exchange=exchange",  # experts over all ranks of a stage, of both dp
        "dp=2,pp=2,sp=2,tp=2,ep=4,sp_attention=ring",  # replicas of eight ranks
    ],
)
def test_sixteen_processes_with_every_axis_say_what_one_does(plan: str, pytestconfig: pytest.Config) -> None:
    assert "16 of 16 ranks agree with one process" in run_forked(pytestconfig, plan, "mixtral")


# -- any plan ----------------------------------------------------------------------------------------------------------


@functools.cache
def small(name: str, layers: int) -> Program:
    """Three experts of five."""
    model = sized(name, num_hidden_layers=layers, hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=6, intermediate_size=20, vocab_size=VOCABULARY)  # fmt: skip
    return in_float64(trace(model))


def depth(plan: Plan) -> int:
    """So that every stage has something."""
    return max(2, plan.pp)


@functools.cache
def alone(name: str, layers: int) -> Parts[Any]:
    return compile_program(small(name, layers), Plan())


@functools.lru_cache(maxsize=16)  # a collection of garbage looks at all that is kept
def parts_of(name: str, plan: Plan) -> Parts[Any] | PlanError:
    try:
        return compile_program(small(name, depth(plan)), plan)
    except PlanError as refused:
        return refused


DENSE = ("llama", "gpt2")
DEGREES = st.tuples(*(st.integers(1, 4) for _ in range(6)))
plans = st.tuples(
    DEGREES,
    st.sampled_from(["auto", "ring", "gather", "ulysses", "ring-ulysses"]),
    st.sampled_from(["auto", "replicate", "exchange"]),
    st.booleans(),
)


def plan_of(case: Any, name: str) -> Plan:
    (dp, pp, sp, tp, ep, etp), way, exchange, rows = case
    if name in DENSE:
        ep = etp = 1
    assume(math.prod((dp, pp, sp, tp)) <= 16 and (dp * sp * tp) % (ep * etp) == 0)
    passes = [
        *([("expert-parallel", {"exchange": exchange})] if ep > 1 else []),
        *(["sequence-parallel"] if rows else []),
    ]
    try:
        return Plan(dp=dp, pp=pp, sp=sp, tp=tp, ep=ep, etp=etp, passes=passes, sp_attention=way if sp > 1 else "auto")
    except PlanError:
        assume(False)
        raise


def what_it_says(name: str, plan: Plan, lengths: list[int], piece: int) -> str:
    """equal, or refused with what; raises where it says something else than one rank."""
    found, one = parts_of(name, plan), alone(name, depth(plan))
    if isinstance(found, PlanError):
        return str(found)
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    assert difference(found.simulate(input_ids=ids), one.simulate(input_ids=ids)) < EXACT, str(plan)
    texts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    said = [each.generate(texts, max_new_tokens=3, prefill_step=piece) for each in (found, one)]
    assert torch.equal(*map(torch.as_tensor, said)), str(plan)
    return "equal"


REFUSED = ("can be cut at", "places to cut", "divides routed experts", "heads on a rank", "ring-ulysses", "Ulysses")
"""What a plan may be refused for: more stages than there are places, or experts where there are none."""


def counted(seen: Counter[str], said: str) -> None:
    assert said == "equal" or any(reason in said for reason in REFUSED), said
    seen["equal" if said == "equal" else "refused"] += 1


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 9))
def test_any_plan_says_the_same(case: Any, lengths: list[int], piece: int) -> None:
    counted(Counter(), what_it_says("mixtral", plan_of(case, "mixtral"), lengths, piece))


@pytest.mark.slow
def test_many_plans_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """20; --hypothesis-profile=full: 1,000, which takes hours and tells how many there were so far."""
    seen: Counter[str] = Counter()
    different: set[str] = set()

    @settings(max_examples=max(20, settings().max_examples), suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from([*DENSE, "mixtral", "qwen3_moe"]),
        plans,
        st.lists(st.integers(1, 9), min_size=1, max_size=5),
        st.integers(1, 9),
    )
    def any_plan(name: str, case: Any, lengths: list[int], piece: int) -> None:
        plan = plan_of(case, name)
        counted(seen, what_it_says(name, plan, lengths, piece))
        different.add(f"{name} {plan}")
        if seen.total() % 50 == 0:
            tell()

    def tell() -> None:
        said = f"{seen['equal']} equal, {seen['refused']} refused by name, 0 wrong; {len(different)} different plans"
        with capsys.disabled():
            print(f"\n{seen.total()} examples over all axes: {said}", flush=True)

    any_plan()
    tell()
    assert seen["equal"] > seen["refused"]


# -- negative controls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["text", "prefill", "decode"])
def test_a_program_without_one_of_its_meetings_is_refused(entry: Any) -> None:
    """Each op that communicates is needed: without it, the proof says so."""
    whole = compiled("mixtral", f"{ALL},expert-parallel.exchange=exchange").program_of(entry)
    check(whole)
    if entry != "text":
        check_rows(whole)
    kinds = {n.target for n in whole.graph.nodes} & {all_reduce, collect_rows, scatter_rows, expert_return}
    assert all_reduce in kinds
    for kind in kinds:
        program = whole.copy()
        node = next(n for n in program.graph.nodes if n.target is kind)
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
        for each in program.graph.nodes:
            each.meta = {key: value for key, value in each.meta.items() if key != "layout"}
        with pytest.raises(LayoutError):
            check(program)
