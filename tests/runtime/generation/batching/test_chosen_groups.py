"""Groups of rows on stages whose devices choose tell each what it is told alone, and what hosts of stages would tell.

What a GPU captures runs here as it is whenever it is replayed: the same ops on the same tensors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from partitioner import CacheSize
from runtime.generation.batching import chosen_steps, places
from runtime.generation.batching.chosen_steps import StepsAhead
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.stages import chosen_groups
from runtime.generation.batching.stages.chosen_groups import ChosenGroups
from runtime.generation.batching.stages.staged_steps import StagedSteps
from runtime.generation.decode_graphs.stage_decoder import StageDecoder
from runtime.sampling import row_sampler
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.runtime.generation.batching.test_chosen_steps import PENALTIES, ending_early
from tests.runtime.generation.replayed import captured
from tests.support.partitioned import compiled_for

ROOMY = CacheSize(max_batch=8, max_length=96, prefill_step=16)
FULL = CacheSize(max_batch=2, max_length=40, prefill_step=16)
SHARED = "pp=2,pipeline.share_head=true"
OWN = "pp=2,pipeline.share_head=false"


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in steps of their own, so that many steps are of single tokens."""
    monkeypatch.setattr(places, "why_not_packed", lambda *given: "not here")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of rank 0: steps that began before the one before them was read, those that did not, tokens that hosts told."""
    found: Counter[str] = Counter()
    begin_next, tell = StepsAhead.begin_next, StagedSteps.tell

    def began(steps: StepsAhead, latest: Any) -> Any:
        begun = begin_next(steps, latest)
        is_first = latest.decoder._program.rank == 0
        found["ahead"] += begun is not None and is_first
        found["behind"] += begun is None and is_first
        return begun

    def told(staged: StagedSteps, numbers: Any, choices: Any) -> Any:
        found["told"] += len(numbers) if staged._stage.index == 0 else 0
        return tell(staged, numbers, choices)

    monkeypatch.setattr(StepsAhead, "begin_next", began)
    monkeypatch.setattr(StagedSteps, "tell", told)
    return found


def several() -> list[Case]:
    """Drawn and greedy, with penalties and rules; they come and end at different steps, some are cancelled."""
    drawn = {"max_new_tokens": 14, "do_sample": True, "seed": 3, "eos_token_id": []}
    cases = [Case([3 + n, 5, 7 + n % 3], {**drawn, **PENALTIES[n % 4], "logprobs": True}, 3 * n) for n in range(8)]
    cases += [
        Case(list(range(2, 12 + n)), {"max_new_tokens": 16, "eos_token_id": []}, n, cancelled=(None, 7)[n % 2])
        for n in range(4)
    ]
    return [*cases, Case([4, 4], {"max_new_tokens": 9, "no_repeat_ngram_size": 2, "eos_token_id": []}, 12)]


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        (OWN, ROOMY),
        (SHARED, FULL),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((OWN, FULL), (SHARED, ROOMY), ("pp=3", ROOMY), ("pp=3", FULL), ("tp=2,pp=2", ROOMY))
        ),
    ],
)
def test_each_is_told_what_it_is_told_alone(plan: str, size: CacheSize, counts: Counter[str]) -> None:
    whole, parts = compiled_for("llama", "tp=1"), compiled_for("llama", plan)
    cases = several()
    cases = ending_early(cases, many_requests.alone(whole, cases))
    alone = many_requests.alone(whole, cases)
    plain = on_all_ranks(parts, cases, size)
    assert not counts["ahead"]
    told = counts.pop("told", 0)
    with captured(parts):
        found = on_all_ranks(parts, cases, size)
    assert_as_alone(cases, found, alone)
    assert counts["ahead"] > 20
    assert counts["told"] < told / 2 or plan == SHARED  # first tokens, and those of rules that the host applies
    assert found.status["why_chosen_behind"] == "no_repeat_ngram_size"
    for number, scores in plain.logprobs.items():
        assert found.logprobs[number] == pytest.approx(scores, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [OWN, SHARED, "pp=3"])
def test_mixed_requests(plan: str, counts: Counter[str]) -> None:
    cases = mixed(20, longest=40, new=12)
    alone = many_requests.alone(compiled_for("llama", "tp=1"), cases)
    parts = compiled_for("llama", plan)
    with captured(parts):
        assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)
    assert counts["ahead"] > 5


@pytest.mark.parametrize("plan", [OWN, pytest.param(SHARED, marks=pytest.mark.slow)])
def test_rows_that_were_not_certain_are_run_again(
    plan: str, monkeypatch: pytest.MonkeyPatch, counts: Counter[str]
) -> None:
    drawn = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "top_p": 0.95, "eos_token_id": []}
    cases = [Case([3 + n, 5], {**drawn, "seed": n, "top_p": 0.95 if n % 2 else 1e-6}) for n in range(4)]
    alone = many_requests.alone(compiled_for("llama", "tp=1"), cases)
    parts = compiled_for("llama", plan)
    monkeypatch.setattr(row_sampler, "_LOOK", 4)
    monkeypatch.setattr(row_sampler, "_LEAST", 2)
    with captured(parts):
        assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)
    assert counts["ahead"] > 2
    # what began with another token has to count for nothing
    monkeypatch.setattr(chosen_steps.UnderWay, "void", property(lambda _: set(), lambda *_: None), raising=False)
    with captured(parts), pytest.raises(AssertionError):
        assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)


def test_logits_that_are_no_numbers_are_those_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case([3 + n, 5], {"max_new_tokens": 6, "eos_token_id": [], "do_sample": n == 1}) for n in range(3)]
    alone = many_requests.alone(compiled_for("llama", "tp=1"), cases)
    parts, run, broken = compiled_for("llama", OWN), StageDecoder.run, list[int]()

    def spoiled(decoder: StageDecoder, received: Any) -> Any:
        made = run(decoder, received)
        if decoder._is_last and not broken:
            broken.append(decoder.group)
            logits, said = decoder._chosen_by_own  # type: ignore[misc]
            logits[0], said[1, 0] = torch.nan, torch.nan
        return made

    monkeypatch.setattr(StageDecoder, "run", spoiled)
    with captured(parts):
        found = on_all_ranks(parts, cases, ROOMY)
    (number,) = found.errors
    assert "no token can be chosen" in str(found.errors[number])
    others = [each for each in range(3) if each != number]
    assert [found.tokens[each] for each in others] == [alone[each] for each in others]


def test_what_is_read_late_is_read_in_its_order(monkeypatch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
    """Controls: a step that begins behind takes the tokens of its own group, and blocks of its own."""
    cases = [Case([3 + n, 5 + n], {"max_new_tokens": 10, "eos_token_id": []}) for n in range(4)]
    parts = compiled_for("llama", OWN)
    alone = many_requests.alone(compiled_for("llama", "tp=1"), cases)
    with captured(parts):
        assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)
    learn = StageDecoder.learn
    with monkeypatch.context() as inner:
        inner.setattr(StageDecoder, "learn", lambda decoder, said: learn(decoder, said.flip(1)))
        with captured(parts), pytest.raises(AssertionError):
            assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)
    with monkeypatch.context() as inner:
        inner.setattr(chosen_groups.InBlocks, "fix", lambda *_: None)
        with captured(parts), pytest.raises(AssertionError):
            assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)


def test_a_group_waits_only_for_those_who_may_come_to_it() -> None:
    """Where another group has less to do, one that waits is given a row there: this one goes on without being read."""
    for lengths, goes_on in (((40, 12), [True, False]), ((12, 12), [False, False]), ((12, 13), [False, False])):
        found = []
        for group in (0, 1):
            limits = places.Limits(rows=4, blocks=64, block_size=4, budget=16, groups=2, keeps_prefixes=False)
            scheduler = Scheduler(limits)
            for number, most in enumerate(lengths):
                scheduler.add(number, [5, 6], most=most)
                work = scheduler.next(number)
                assert work is not None
                scheduler.learn(work, {number: 9})
            works = [scheduler.next(each) for each in (0, 1)]
            scheduler.add(7, [3, 4], most=8)
            found.append(chosen_steps.next_behind([scheduler], [works[group]]) is not None)
        # at a group's turn its last step is not learnt: it counts as having that much less to do
        assert found == goes_on


@pytest.mark.parametrize("plan", [OWN, pytest.param("pp=3", marks=pytest.mark.slow)])
def test_one_that_comes_amid_long_ones_does_not_wait_for_their_end(plan: str, counts: Counter[str]) -> None:
    def first_told(engine: Any) -> list[int]:
        loop = engine.batching(CacheSize(max_batch=16, max_length=200, prefill_step=32), rows=16)
        long = Case([5, 6, 7], {"max_new_tokens": 150, "eos_token_id": []})
        for number in range(8):
            loop.add(number, many_requests.request(long))
        for _ in range(30):
            loop.step()
        found = []
        for number in range(8, 12):
            loop.add(number, many_requests.request(Case([9, number], {"max_new_tokens": 40, "eos_token_id": []})))
            waited = 1
            while number not in {told.number for told in loop.step()}:
                waited += 1
                assert waited < 100
            found.append(waited)
        loop.release()
        return found

    parts = compiled_for("llama", plan)
    with captured(parts):
        found = parts._simulator.run(first_told)
    assert all(each == found[0] for each in found)
    assert max(found[0]) < 12
    assert counts["ahead"] > 20


def test_steps_of_all_groups_are_captured_before_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = compiled_for("llama", OWN)
    keys: dict[int, Any] = {}

    def reserved(engine: Any) -> None:
        size = CacheSize(max_batch=1, max_length=120, prefill_step=32)
        loop = engine.batching(size, rows=10)
        loop.reserve(size)
        assert isinstance(loop.in_steps, ChosenGroups)
        keys[engine.program.rank] = sorted((batch, group) for batch, _, group in loop._steps._decoders)
        loop.release()

    with captured(parts):
        parts._simulator.run(reserved)
    expected = [(rows, group) for rows in (1, 4, 5, 10) for group in (0, 1)]
    assert keys == {0: expected, 1: expected}
