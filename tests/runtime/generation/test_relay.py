"""Captured and compiled decode steps of pipeline stages: the tokens of one rank, whatever is in flight when it ends."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from partitioner import Plan
from partitioner.compile.generation import compile_steps
from partitioner.errors import RankMismatch, SamplingError
from runtime.generation.decode_graphs.stage_decoder import StageDecoder
from runtime.kv_cache.cache_size import CacheSize
from runtime.pipeline.message import Box
from runtime.pipeline.schedule import Run, groups_of, relay, ring
from runtime.pipeline.timing import time_of
from runtime.program.rank_program import Crossing
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.replayed import captured, decoding
from tests.support import stepping
from tests.support.generated import prompts
from tests.support.partitioned import compiled

PLANS = ("pp=2", "pp=3", "tp=2,pp=2")
SHARED_HEAD = "pp=2,pipeline.share_head=true"


@functools.cache
def parts(name: str, plan: str) -> Any:
    given = Plan.parse(plan)
    return compiled(name, given.tp, pp=given.pp, passes=given.passes)


def same(plan: str, texts: Any, *, name: str = "llama", **options: Any) -> bool:
    given = {"eos_token_id": [], **options}
    one = parts(name, "tp=1").generate(texts, **{key: v for key, v in given.items() if key != "pipeline_groups"})
    return torch.equal(one, parts(name, plan).generate(texts, **given))


@pytest.mark.parametrize(
    "plan", [*(pytest.param(plan, marks=pytest.mark.slow) for plan in PLANS[:2]), PLANS[2], SHARED_HEAD]
)
def test_captured_stages_write_what_one_rank_writes(plan: str) -> None:
    texts = prompts("llama", (4, 7, 2, 5, 3))
    with captured(parts("llama", plan)) as graphs:
        for rows in (1, 2, 5):
            assert same(plan, texts[:rows], max_new_tokens=9)
        assert any(graph.count > 5 for graph in graphs)
        assert same(plan, texts, max_new_tokens=1)
        assert same(plan, texts, max_new_tokens=2)


@pytest.mark.parametrize("groups", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 5, 8))])
def test_any_number_of_groups(groups: int) -> None:
    texts = prompts("llama", (4, 7, 2, 5, 3))
    for plan in ("pp=2", "pp=3", SHARED_HEAD, "pp=3,pipeline.share_head=true"):
        assert same(plan, texts, max_new_tokens=6, pipeline_groups=groups)
        with captured(parts("llama", plan)):
            assert same(plan, texts, max_new_tokens=6, pipeline_groups=groups)
            assert same(plan, texts, max_new_tokens=6, pipeline_groups=groups, repetition_penalty=1.3)


@pytest.mark.parametrize(
    "plan", ["pp=2", "pp=3", *(pytest.param(p, marks=pytest.mark.slow) for p in ("tp=2,pp=2", f"tp=2,{SHARED_HEAD}"))]
)
def test_sequences_end_at_different_times(plan: str) -> None:
    texts = prompts("llama", (4, 7, 2))
    free = parts("llama", "tp=1").generate(texts, max_new_tokens=12, eos_token_id=[])
    with captured(parts("llama", plan)):
        for ends in ([int(free[0, -12])], [int(free[1, -9])], [int(free[0, -7]), int(free[2, -10])]):
            assert same(plan, texts, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
            assert same(plan, texts, max_new_tokens=12, eos_token_id=ends, pad_token_id=0, pipeline_groups=4)


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "seed": 3, "top_k": 20}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3}]
)
def test_what_is_asked_of_the_host_is_not_relayed(options: dict[str, Any]) -> None:
    texts = prompts("llama", (4, 7, 2))
    for plan in (*PLANS, SHARED_HEAD):
        with captured(parts("llama", plan)):
            assert same(plan, texts, max_new_tokens=7, **options)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_windows_and_tables_of_positions(name: str) -> None:
    texts = prompts(name, (4, 7, 2))
    with captured(parts(name, "pp=2")):
        assert same("pp=2", texts, name=name, max_new_tokens=8)
        assert same("pp=2", texts[:1], name=name, max_new_tokens=8)


def test_states_per_sequence() -> None:
    texts = stepping.prompts("mamba")[:3]
    one, two = (
        stepping.compiled("mamba", 1),
        stepping.parts_of(*compile_steps(stepping.traced("mamba")[1], Plan(pp=2))),
    )
    with captured(two):
        for rows in (3, 1):
            given = {"max_new_tokens": 8, "eos_token_id": []}
            assert torch.equal(one.generate(texts[:rows], **given), two.generate(texts[:rows], **given))


@pytest.mark.parametrize("plan", ["pp=2", "pp=3", SHARED_HEAD])
def test_many_requests_over_captured_stages(plan: str) -> None:
    """Groups take turns at one captured step of each size, whose rows are those that come and go."""
    cases = many_requests.mixed(10, longest=12, new=6)
    with captured(parts("llama", plan)) as graphs:
        found = many_requests.on_all_ranks(parts("llama", plan), cases, CacheSize(max_batch=8, max_length=96))
        assert found.status["why_eager"] == ""
    many_requests.assert_as_alone(cases, found, many_requests.alone(parts("llama", "tp=1"), cases))
    assert any(graph.count > 1 for graph in graphs)


def test_compiled_stages_write_what_one_rank_writes() -> None:
    texts = prompts("llama", (4, 7, 2))
    made: list[Any] = []

    def compile(function: Any, **_: Any) -> Any:
        made.append(function)
        return function

    with mock.patch.object(torch, "compile", compile), decoding(parts("llama", "tp=2,pp=2"), compile=True):
        assert same("tp=2,pp=2", texts, max_new_tokens=6)
        assert made


@pytest.mark.slow
def test_through_the_compiler() -> None:
    texts = prompts("llama", (4, 7, 2, 5))
    with decoding(parts("llama", "pp=2"), compile=True):
        assert same("pp=2", texts, max_new_tokens=6)


@pytest.mark.parametrize("plan", ["pp=3", SHARED_HEAD])
def test_streams_can_be_left_and_overtaken(plan: str) -> None:
    staged, texts = parts("llama", plan), prompts("llama", (4, 7, 2))
    with captured(staged):
        whole = staged.generate(texts, max_new_tokens=16, eos_token_id=[])
        assert torch.equal(whole, parts("llama", "tp=1").generate(texts, max_new_tokens=16, eos_token_id=[]))
        steps = [step.tokens for step in staged.stream(texts, max_new_tokens=16, eos_token_id=[])]
        assert torch.equal(torch.tensor(steps).t(), whole[:, -16:])

        def left(engine: Any) -> Any:
            stream = engine.stream(texts, max_new_tokens=16, eos_token_id=[])
            found = [next(stream).tokens for _ in range(4)]
            stream.close()
            return found, engine.generate(texts, max_new_tokens=16, eos_token_id=[])

        def overtaken(engine: Any) -> Any:
            stream = engine.stream(texts, max_new_tokens=16, eos_token_id=[])
            found = [next(stream).tokens for _ in range(4)]
            return found, engine.generate(texts, max_new_tokens=16, eos_token_id=[])

        for leave in (left, overtaken):
            for found, then in staged._simulator.run(leave):
                assert torch.equal(torch.tensor(found).t(), whole[:, -16:][:, :4])
                assert torch.equal(then, whole)


def test_logits_that_leave_no_choice_end_all_ranks_alike() -> None:
    staged, texts = parts("llama", "pp=2"), prompts("llama", (4, 7))
    best = StageDecoder._turn
    turns = {"left": 9}

    def spoilt(self: StageDecoder, seen: int) -> None:
        best(self, seen)
        turns["left"] -= self._is_last
        if self._is_last and turns["left"] < 0:
            self.outbox.said[1] = torch.nan

    def wrong(engine: Any) -> str:
        with pytest.raises(SamplingError, match="no token can be chosen"):
            engine.generate(texts, max_new_tokens=20, eos_token_id=[])
        return "told"

    with captured(staged):
        with mock.patch.object(StageDecoder, "_turn", spoilt):
            assert staged._simulator.run(wrong) == ["told", "told"]
        # and nothing is left under way
        for engine in staged._simulator.engines:
            engine._generate_loop.release()
            engine.__dict__.pop("_generate_loop")
        assert same("pp=2", texts, max_new_tokens=8)


def test_what_a_graph_yields_is_gone_with_the_next_replay() -> None:
    """The negative control of the captured tests: a stage that hands on what the graph yielded, too late."""
    staged, texts = parts("llama", "pp=2"), prompts("llama", (4, 7))

    def late(self: StageDecoder, seen: int) -> None:
        self._inputs["input_ids"].copy_(self.inbox.said[0, :, None])
        made = self._run(seen)
        assert self._choose is not None
        self.outbox.said.copy_(self._choose(made) if self._is_last else self.inbox.said)
        self._inputs["position_ids"].add_(1)

    with captured(staged), mock.patch.object(StageDecoder, "_turn", late):
        assert not same("pp=2", texts, max_new_tokens=8)


def test_stages_that_are_given_other_prompts_are_told() -> None:
    staged = parts("llama", "pp=2")

    def run(engine: Any) -> Any:
        lengths = (4, 7) if engine.program.rank else (4, 6)
        return engine.generate(prompts("llama", lengths), max_new_tokens=3, eos_token_id=[])

    with pytest.raises(RankMismatch):
        staged._simulator.run(run)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_one_more_group_than_stages_hides_what_a_transfer_takes(stages: int) -> None:
    def per_turn(timelines: Any) -> float:
        times = [time_of(timelines(turns), [[1.0]] * stages, transfer=0.2).stop for turns in (60, 120)]
        return (times[1] - times[0]) / 60

    assert per_turn(lambda turns: relay(stages, stages + 1, turns)) == pytest.approx(1.0)
    assert per_turn(lambda turns: relay(stages, stages, turns)) == pytest.approx(1.2)
    assert per_turn(lambda turns: ring(stages, stages + 1, turns)) == pytest.approx(1.2)
    assert [action for action in relay(stages, stages, 2)[0] if isinstance(action, Run)] == [Run(0), Run(1)]


def test_a_box_holds_its_values_side_by_side() -> None:
    crossings = (
        Crossing("hidden", ("batch", "sequence", 3), torch.float32),
        Crossing("residual", ("batch", "sequence", 5), torch.float64),
    )
    given, taken = (Box(crossings, 3, torch.device("cpu")) for _ in range(2))
    values = (torch.rand(3, 1, 3), torch.rand(3, 1, 5, dtype=torch.float64))
    given.said.copy_(torch.arange(6.0).view(2, 3))
    for held, value in zip(given.values, values, strict=True):
        held.copy_(value)
    taken.packed.copy_(given.packed)
    assert torch.equal(taken.said, given.said)
    assert all(torch.equal(a, b) for a, b in zip(taken.values, values, strict=True))
    assert all(value.data_ptr() % 16 == 0 for value in taken.values)


def test_groups_may_be_more_than_stages() -> None:
    assert [(group.start, group.stop) for group in groups_of(5, 2, groups=3)] == [(0, 1), (1, 3), (3, 5)]
    assert [(group.start, group.stop) for group in groups_of(4, 3, groups=1)] == [(0, 4), (4, 4), (4, 4)]
