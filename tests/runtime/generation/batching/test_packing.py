"""Pieces of prompts and single tokens of others in one step: each sequence is told what it is told alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from partitioner import Plan
from runtime.generation.batching.work import Turn
from runtime.kv_cache.batch import Part
from runtime.kv_cache.cache_size import CacheSize
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, Outcome, assert_as_alone, mixed, on_all_ranks
from tests.support import stepping
from tests.support.partitioned import compiled

ROOMY = CacheSize(max_batch=6, max_length=64, prefill_step=32)


def parts(plan: str, name: str = "llama", **options: Any) -> Any:
    given = Plan.parse(plan)
    return compiled(name, given.tp, pp=given.pp, sp=given.sp, ep=given.ep, passes=given.passes, **options)


def served(made: Any, cases: Sequence[Case], size: CacheSize, *, beside: int) -> tuple[Outcome, list[list[Turn]]]:
    """And the steps that were packed, as rank 0 was told them. beside: tokens of prompts while others write."""
    steps: list[list[Turn]] = []

    def work(engine: Any) -> Outcome:
        batching = engine.batching

        def noted(*given: Any, **named: Any) -> Any:
            loop = batching(*given, **named)
            loop._block_size = 4
            set_aside = loop._set_aside

            def limited() -> None:
                set_aside()
                loop.scheduler.limits = replace(loop.scheduler.limits, beside=beside)
                following = loop.scheduler.next

                def told(group: int = 0) -> Any:
                    found = following(group)
                    if found is not None and found.packed and engine.program.rank == 0:
                        steps.append(list(found.turns))
                    return found

                loop.scheduler.next = told

            loop._set_aside = limited
            return loop

        engine.batching = noted
        try:
            return many_requests.serve(engine, cases, size)
        finally:
            engine.batching = batching

    first, *others = made._simulator.run(work)
    assert all(other.tokens == first.tokens and other.status == first.status for other in others)
    return first, steps


def lengths(steps: Sequence[Sequence[Turn]]) -> list[list[int]]:
    return [sorted(len(turn.tokens) for turn in step) for step in steps]


@pytest.mark.parametrize(
    ("plan", "beside"),
    [
        ("tp=1", 7),
        ("tp=2", 5),
        *(
            pytest.param(plan, beside, marks=pytest.mark.slow)
            for plan, beside in [
                ("tp=1", 1), ("tp=1", 2), ("tp=1", 32), ("tp=3", 6), ("pp=2", 6), ("pp=3", 3), ("tp=2,pp=2", 5),
                ("pp=2,pipeline.share_head=true", 6), ("tp=2,pp=2,pipeline.share_head=true", 7),
            ]
        ),
    ],
)  # fmt: skip
def test_whatever_runs_together(plan: str, beside: int) -> None:
    cases = mixed(14, longest=30, new=8, seed=beside)
    found, steps = served(parts(plan), cases, ROOMY, beside=beside)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert found.status["why_not_packed"] == ""
    sizes = lengths(steps)
    assert beside == 1 or any(size[0] == 1 < size[-1] for size in sizes), "single tokens beside a piece"
    assert beside < 5 or any(len(set(size) - {1}) > 1 for size in sizes), "pieces of several lengths"


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",  # the latent cache, experts
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gpt_oss", "gemma3_text", "qwen3_moe")),
    ],
)
def test_other_attentions(name: str) -> None:
    """Windows, sinks, soft caps, narrow keys; and experts, whose tokens come from all sequences as before."""
    cases = mixed(8, longest=24, new=6, seed=2)
    whole = parts("tp=1", name)
    found, steps = served(whole, cases, ROOMY, beside=6)
    assert_as_alone(cases, found, many_requests.alone(whole, cases))
    assert any(size[0] == 1 < size[-1] for size in lengths(steps))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan"), [("llama", "tp=3"), ("gpt_oss", "tp=2"), ("deepseek_v3", "tp=2")])
def test_odd_sizes_over_ranks(name: str, plan: str) -> None:
    # their vocabulary has a token less
    cases = [replace(case, prompt=[token % 127 for token in case.prompt]) for case in mixed(10, longest=24, new=6)]
    found, steps = served(parts(plan, name, odd=True), cases, ROOMY, beside=6)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1", name, odd=True), cases))
    assert steps


@pytest.mark.slow
def test_a_float8_cache_is_read_in_parts() -> None:
    """What is told differs from the cache in full, but not by who else runs."""
    size = replace(ROOMY, dtype="fp8")
    whole = parts("tp=1")
    cases = [Case([5 + n, *range(7, 9 + 3 * n)], {"max_new_tokens": 6, "eos_token_id": []}, n) for n in range(6)]
    found, steps = served(whole, cases, size, beside=5)
    for number, case in enumerate(cases):
        one, _ = served(whole, [replace(case, arrival=0)], size, beside=5)
        assert one.tokens[0] == found.tokens[number]
    assert any(step[0] == 1 < step[-1] for step in lengths(steps))


def test_one_alone_and_pieces_of_one_token() -> None:
    """A batch of one; and a prompt of which each piece is a token, beside one that writes: no step has to be packed."""
    whole = parts("tp=1")
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}
    (case,) = cases = [Case(list(range(3, 20)), options)]
    found, steps = served(whole, cases, ROOMY, beside=4)
    assert_as_alone(cases, found, many_requests.alone(whole, cases))
    assert lengths(steps) == [[17]]
    cases = [Case([5, 6], options), Case(case.prompt, {**options, "prefill_step": 1}, arrival=1)]
    found, steps = served(whole, cases, ROOMY, beside=4)
    assert_as_alone(cases, found, many_requests.alone(whole, cases))
    assert lengths(steps) == [[2]]


def test_a_prefix_and_its_tails_beside_one_that_writes() -> None:
    whole = parts("tp=1")
    prefix = [3 + number % 50 for number in range(29)]
    cases = [
        Case([9, 8], {"max_new_tokens": 20, "eos_token_id": []}),
        *(Case([*prefix, 60 + n], {"max_new_tokens": 3, "eos_token_id": []}, arrival=2 + n // 2) for n in range(5)),
    ]
    found, steps = served(whole, cases, replace(ROOMY, max_length=96), beside=8)
    assert_as_alone(cases, found, many_requests.alone(whole, cases))
    assert found.status["prefix_hits"] == 4 * 28
    assert any(size[0] == 1 < size[-1] for size in lengths(steps))


def test_a_part_that_reads_the_blocks_of_its_neighbour_says_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    take = Part.take

    def shifted(self: Part, x: Tensor, dim: int, *, packed: bool) -> Tensor:
        return take(self, x.roll(1, dim) if packed and dim == 2 else x, dim, packed=packed)

    whole = parts("tp=1")
    cases = mixed(10, longest=30, new=8, seed=7)
    expected = many_requests.alone(whole, cases)
    monkeypatch.setattr(Part, "take", shifted)
    found, steps = served(whole, cases, ROOMY, beside=6)
    assert steps
    with pytest.raises(AssertionError):
        assert_as_alone(cases, found, expected)


@pytest.mark.parametrize(
    ("name", "plan", "why"),
    [
        ("mamba2", "tp=1", "state per sequence"),
        ("llama", "sp=2", "share out the tokens"),
        ("bloom", "tp=1", "than tok"),
    ],
)
def test_why_steps_are_not_packed_is_said(name: str, plan: str, why: str) -> None:
    made = parts(plan, name) if name == "llama" else stepping.compiled(name, 1)
    cases = mixed(4, longest=9, new=4)
    found = on_all_ranks(made, cases, ROOMY)
    assert_as_alone(cases, found, many_requests.alone(made, cases))
    assert why in found.status["why_not_packed"]
