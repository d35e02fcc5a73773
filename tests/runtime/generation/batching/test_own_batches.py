"""Ranks of dp that share out experts run sequences of their own: each is told what it is told alone, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from partitioner import CacheSize, Plan, partition
from partitioner.errors import InputError
from runtime.generation.batching import own_batches
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.batching.own_batches import DealtScheduler, OwnBatches
from runtime.generation.batching.scheduler import Limits
from runtime.ops.expert_exchange import expert_send
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.support import generated, zoo
from tests.support.partitioned import compiled_for

NAME = "qwen3_moe"
SIZE = CacheSize(max_batch=8, max_length=64, prefill_step=8)
GREEDY = {"max_new_tokens": 4, "eos_token_id": []}


@functools.cache
def parts(plan: str) -> Any:
    return compiled_for(NAME, plan)


@pytest.mark.parametrize(
    "plan",
    [
        "ep=2",
        "tp=2,ep=4",
        *(
            pytest.param(plan, marks=pytest.mark.slow)
            for plan in (
                "sp=2,ep=4",
                "pp=2,ep=2",
                "ep=3",
                "tp=2,ep=2,etp=2",
                "ep=2,expert-parallel.exchange=gather",
                "ep=2,expert-parallel.exchange=exchange",
                "etp=2",
                "pp=3,ep=2",
                "pp=2,ep=2,expert-parallel.exchange=gather",
                "pp=2,ep=2,pipeline.share_head=true",
                "sp=3,ep=6",
                "sp=2,tp=2,ep=8,sp_attention=ulysses",
                "sp=2,ep=2,etp=2",
                "pp=2,sp=2,ep=4,sp_attention=gather",
            )
        ),
    ],
)
def test_a_batch_is_dealt_out(plan: str) -> None:
    """Uneven numbers of rows and lengths; fewer rows than ranks, so that some have none."""
    assert parts(plan).entry("decode", 0).batch_axes == ("dp",)
    texts = generated.prompts(NAME, (1, 7, 3, 12, 5))
    for some in (texts, texts[3:4], texts[:2]):
        assert generated.error(NAME, parts(plan), some, new=3, prefill_step=4) < 1e-9


def test_another_ranks_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what is told in the wrong order gives other texts."""
    tell = OwnBatches.tell

    def turned(self: Any, asked: Any, choices: Any) -> Any:
        found = tell(self, asked, choices)
        numbers = [number for each in found for number in each]
        if len(numbers) < 2:
            return found
        every = {number: choice for each in found for number, choice in each.items()}
        shifted = dict(zip(numbers, [every[number] for number in numbers[1:] + numbers[:1]], strict=True))
        return [{number: shifted[number] for number in each} for each in found]

    monkeypatch.setattr(OwnBatches, "tell", turned)
    assert generated.error(NAME, parts("ep=2"), generated.prompts(NAME, (1, 7, 3)), new=3) > 1e-3


@pytest.mark.parametrize(
    "plan",
    [
        "ep=2",
        *(
            pytest.param(plan, marks=pytest.mark.slow)
            for plan in (
                "sp=2,ep=4",
                "ep=2,expert-parallel.exchange=gather",
                "pp=2,ep=2",
                "pp=2,ep=2,expert-parallel.exchange=gather",
                "pp=3,tp=2,ep=4",
                "pp=2,ep=2,pipeline.share_head=true",
                "sp=3,ep=6",
                "pp=2,sp=2,ep=4",
            )
        ),
    ],
)
def test_each_is_told_what_it_is_told_alone(plan: str) -> None:
    cases = mixed(14, longest=30, new=6)
    found = on_all_ranks(parts(plan), cases, SIZE)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert found.status["tokens_that_fit"] == 8 * 64


@pytest.mark.parametrize(
    "plan", ["ep=2", *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("sp=2,ep=4", "pp=2,sp=2,ep=4"))]
)
def test_a_rank_with_nothing_goes_along(plan: str) -> None:
    cases = [Case([5, 6, 7], GREEDY, arrival=3), Case([9] * 20, {**GREEDY, "max_new_tokens": 9})]
    found = on_all_ranks(parts(plan), cases, SIZE)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))


def test_single_tokens_from_fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As captured and compiled steps take them, which have as many rows on each rank."""
    monkeypatch.setattr(BatchLoop, "_from_fixed_memory", True)
    cases = [Case([5 + n, 7, 9][: 1 + n % 3], {**GREEDY, "max_new_tokens": 3 + n}) for n in range(5)]
    found = on_all_ranks(parts("ep=2"), cases, SIZE)
    monkeypatch.undo()
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))


def test_full_caches_cost_time_and_no_request() -> None:
    cases = [Case([5 + n, 7, 9][: 1 + n % 3], {"max_new_tokens": 20, "eos_token_id": []}) for n in range(8)]
    found = on_all_ranks(parts("ep=2"), cases, CacheSize(max_batch=6, max_length=10, prefill_step=16))
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert found.status["preemptions"] > 0


def test_all_ranks_run_the_same_program_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has a prompt to run, the other single tokens: both run the program for prompts."""
    ran: dict[int, list[tuple[bool, int]]] = {0: [], 1: []}
    advance = OwnBatches.advance

    def watched(self: Any, given: Any) -> Any:
        run = self._run

        def noted(given: Any, *rest: Any) -> Any:
            if given is not None:
                ran[self._index].append((given.work.decode, len(given.work.turns)))
            return run(given, *rest)

        self._run = noted
        try:
            return advance(self, given)
        finally:
            self._run = run

    monkeypatch.setattr(OwnBatches, "advance", watched)
    on_all_ranks(parts("ep=2"), [Case([5], {**GREEDY, "max_new_tokens": 8}), Case([9] * 30, GREEDY, arrival=2)], SIZE)
    assert [decode for decode, _ in ran[0]] == [decode for decode, _ in ran[1]]
    both = list(zip(ran[0], ran[1], strict=True))
    assert any(not one[0] and one[1] and other[1] for one, other in both), "together, in the program for prompts"
    assert any(not one[1] for pair in both for one in pair), "a rank with nothing to run"


@pytest.mark.slow
def test_shared_out_sequences_run_single_tokens_apart_from_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's step would deal a token out otherwise than it is kept: on one rank, whichever position it has."""
    cases = [
        Case([5], {**GREEDY, "max_new_tokens": 12}),
        *(Case([9 + n] * 30, GREEDY, arrival=2 * n) for n in range(4)),
    ]
    kinds: list[set[bool]] = []
    run_of = OwnBatches.run_of

    def watched(self: Any, works: Any) -> Any:
        kinds.append({work.decode for work in works if work is not None})
        return run_of(self, works)

    monkeypatch.setattr(OwnBatches, "run_of", watched)
    found = on_all_ranks(parts("sp=2,ep=4"), cases, SIZE)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert max(map(len, kinds)) == 1
    # the control: otherwise there are steps of both kinds
    monkeypatch.setattr(own_batches, "next_alike", lambda each, group: [one.next(group) for one in each])
    on_all_ranks(parts("sp=2,ep=4"), cases, SIZE)
    assert max(map(len, kinds)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["sp=2,ep=4", "pp=2,sp=2,ep=4"])
def test_a_prefix_is_taken_over_where_it_lies(plan: str) -> None:
    start = [3 + number * 7 % 50 for number in range(26)]
    cases = [Case([*start, 60 + n, 61], GREEDY, arrival=(0, 0, 9)[n % 3]) for n in range(8)]
    found = on_all_ranks(parts(plan), cases, CacheSize(max_batch=8, max_length=64, prefill_step=8))
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert found.status["prefix_hits"] > 0


def test_most_probable_tokens_of_other_ranks() -> None:
    options = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    cases = [Case([5, 6], options), Case([7, 8, 9], {**options, "top_logprobs": 1}), Case([4], GREEDY)]

    def tops(engine: Any) -> list[Any]:
        loop = engine.batching(SIZE)
        for number, case in enumerate(cases):
            loop.add(number, many_requests.request(case))
        found = []
        while len(found) < 12:
            found += [(each.number, each.token, each.logprob, each.top) for each in loop.step()]
        loop.release()
        return sorted(found)

    first, other = parts("ep=2")._simulator.run(tops)
    (alone,) = parts("tp=1")._simulator.run(tops)
    assert first == other
    for (number, token, logprob, top), (also, same, known, named) in zip(first, alone, strict=True):
        assert (number, token) == (also, same)
        assert (logprob is None) == (known is None)
        assert logprob is None or abs(logprob - known) < 1e-9
        assert [each for each, _ in top or ()] == [each for each, _ in named or ()]


def test_ranks_fail_together(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OwnBatches.advance

    def failing(self: Any, given: Any) -> Any:
        if self._index == 1 and given.others[0] is not None and given.others[0].decode:
            raise RuntimeError("this rank has had enough")
        return run(self, given)

    monkeypatch.setattr(OwnBatches, "advance", failing)
    with pytest.raises(RuntimeError, match="had enough"):
        parts("ep=2").generate([[5, 6, 7]], **GREEDY)


def test_what_is_reserved_is_each_ranks_share() -> None:
    def reserved(engine: Any) -> Any:
        room = engine.reserve(CacheSize(max_batch=5, max_length=20))
        said = engine.generate([[5, 6], [7]], **GREEDY).tolist()
        with pytest.raises(InputError, match="room for"):
            engine.generate([[5] * 110], **GREEDY)
        return room.max_batch, said

    found = parts("ep=2")._simulator.run(reserved)
    assert found[0] == found[1]
    assert found[0][0] == 3
    assert found[0][1] == parts("tp=1").generate([[5, 6], [7]], **GREEDY).tolist()


def test_an_abandoned_stream_leaves_room_for_the_next() -> None:
    held = parts("ep=2")
    stream = held.stream([[5, 6, 7], [8]], **GREEDY)
    next(stream)
    stream.close()
    assert generated.error(NAME, held, generated.prompts(NAME, (2, 4)), new=3) < 1e-9


def test_a_stream_that_another_task_overtakes_leaves_room_as_well() -> None:
    texts = [[5, 6, 7], [8]]

    def overtaken(engine: Any) -> list[list[int]]:
        stream = engine.stream(texts, **GREEDY)
        next(stream)
        said = engine.generate(texts, **GREEDY)
        with pytest.raises(InputError, match="another text was begun"):
            next(stream)
        return said.tolist()  # type: ignore[no-any-return]

    expected = parts("tp=1").generate(texts, **GREEDY).tolist()
    assert parts("ep=2")._simulator.run(overtaken) == [expected, expected]


@pytest.mark.parametrize(
    "plan", ["ep=2", *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("sp=2,ep=4", "pp=2,ep=2", "tp=2,ep=4"))]
)
def test_log_probabilities_are_of_the_texts_that_are_given(plan: str) -> None:
    texts = [[5 + 7 * row, 9, 60 - row, 4, 33 + row, 8] for row in range(3)]
    found, wanted = (parts(each).log_probabilities(texts) for each in (plan, "tp=1"))
    assert (found - wanted).abs().max() < 1e-9


def test_to_the_rank_with_the_least_work() -> None:
    scheduler = DealtScheduler(Limits(rows=4, blocks=64, block_size=4, budget=16), 3)
    for number, most in enumerate((30, 10, 12, 5, 4)):
        scheduler.add(number, [3] * 2, most=most)
    assert [scheduler.rank_of(number) for number in range(5)] == [0, 1, 2, 1, 2]
    assert [each.left for each in scheduler.each] == [30, 15, 16]
    assert scheduler.cancel(7) == []


@pytest.mark.slow
def test_only_rows_of_somebody_are_counted() -> None:
    """What is routed: a rank with nothing to run routes one token of nobody, and no more."""
    held = parts("ep=2,expert-parallel.exchange=exchange")
    sends = [n for n in held.program_of("prefill").graph.nodes if n.target is expert_send]
    assert sends

    def counted(engine: Any) -> torch.Tensor:
        with engine.routing() as routing:
            engine.generate([[5, 6, 7, 8]], max_new_tokens=1, eos_token_id=[])
        return sum(routing.counts.values())  # type: ignore[return-value]

    total = sum(held._simulator.run(counted))
    choices, layers = 2, len(sends)
    assert int(total.sum()) == (4 + 1) * choices * layers


@pytest.mark.slow
def test_states_per_sequence() -> None:
    """A state sums up a sequence's tokens: rows of nobody have one of their own."""
    model = zoo.tiny("lfm2_moe")[0].double()
    held = partition(model, Plan(ep=2))
    texts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    found = held.generate(texts, **GREEDY, prefill_step=4)
    assert held.program_of("prefill").batch_axes == ("dp",)
    assert torch.equal(found, partition(model, Plan()).generate(texts, **GREEDY, prefill_step=4))
