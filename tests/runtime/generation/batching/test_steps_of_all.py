"""Captured steps of ranks that have sequences of their own: none waits for another's host, and each is told the same.

What a GPU captures runs here as it is whenever it is replayed: the same ops on the same tensors.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from partitioner import CacheSize
from partitioner.errors import RankMismatch
from runtime.generation.batching import chosen_steps
from runtime.generation.batching.chosen_steps import StepsAhead
from runtime.generation.batching.own_batches import OwnBatches
from runtime.generation.batching.places import Run
from runtime.generation.decode_graphs import decoder
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.sampling import row_sampler
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.runtime.generation.replayed import captured
from tests.support.partitioned import compiled_for

NAME = "qwen3_moe"
ROOMY = CacheSize(max_batch=8, max_length=96, prefill_step=16)
FULL = CacheSize(max_batch=2, max_length=40, prefill_step=16)
GREEDY = {"max_new_tokens": 12, "eos_token_id": []}


@functools.cache
def parts(plan: str) -> Any:
    return compiled_for(NAME, plan)


@functools.cache
def free(rows: int) -> list[list[int]]:
    """What texts become that nothing ends early."""
    return many_requests.alone(parts("tp=1"), [Case([3 + n, 5], GREEDY) for n in range(rows)])


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of rank 0: steps that began before the one before them was read, and meetings of the hosts."""
    found: Counter[str] = Counter()
    begin_next, tell = StepsAhead.begin_next, OwnBatches.tell

    def began(steps: StepsAhead, latest: Any) -> Any:
        begun = begin_next(steps, latest)
        found["ahead"] += begun is not None and steps._own == 0
        found["behind"] += begun is None and steps._own == 0
        return begun

    def told(own: OwnBatches, numbers: Sequence[Sequence[int]], choices: Any) -> Any:
        found["told"] += any(numbers) and own._index == 0
        return tell(own, numbers, choices)

    monkeypatch.setattr(StepsAhead, "begin_next", began)
    monkeypatch.setattr(OwnBatches, "tell", told)
    return found


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        ("ep=2", FULL),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("ep=2", ROOMY), ("tp=2,ep=4", FULL), ("ep=3", ROOMY), ("ep=3", FULL))
        ),
    ],
)
def test_each_is_told_what_it_is_told_alone(plan: str, size: CacheSize, counts: Counter[str]) -> None:
    """Rows that end, come, are cancelled, or are chosen by hosts meanwhile; in a cache that is full now and then."""
    cases = mixed(7, longest=20, new=8)
    drawn = {"max_new_tokens": 12, "do_sample": True, "seed": 3, "logprobs": True, "eos_token_id": []}
    cases += [Case([3 + n, 5, 7 + n % 3], drawn, 4 + 5 * n) for n in range(3)]
    alone = many_requests.alone(parts("tp=1"), cases)
    held = parts(plan)
    with captured(held) as graphs:
        found = on_all_ranks(held, cases, size)
    assert_as_alone(cases, found, alone)
    assert counts["ahead"] > 5
    assert sum(graph.count for graph in graphs) > 10


def test_hosts_meet_for_prompts_alone(counts: Counter[str]) -> None:
    """Uneven numbers of rows, a rank with none, and rows that are over before others; a smaller step begins anew."""
    held = parts("ep=2")
    for lengths, begun in (([12], 1), ([12, 12, 12], 1), ([5, 12, 3, 12, 12, 12], 1), ([5, 12, 3, 12], 2)):
        cases = [Case([3 + n, 5], {**GREEDY, "max_new_tokens": new}) for n, new in enumerate(lengths)]
        counts.clear()
        with captured(held):
            found = on_all_ranks(held, cases, ROOMY)
        assert_as_alone(cases, found, [text[:new] for text, new in zip(free(6), lengths, strict=False)])
        assert counts == {"told": 1, "ahead": 11 - begun, "behind": begun}


@pytest.mark.slow
def test_rows_of_nobody_stay_within_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long others go on."""
    size = CacheSize(max_batch=6, max_length=28, prefill_step=80)
    cases = [Case([3, *[5] * 49], {**GREEDY, "max_new_tokens": 10})] * 2
    cases += [Case([3 + n], {**GREEDY, "max_new_tokens": 40}) for n in range(4)]
    alone, held = many_requests.alone(parts("tp=1"), cases), parts("ep=2")
    with captured(held):
        assert_as_alone(cases, on_all_ranks(held, cases, size), alone)
    # the control: positions run on from where texts have ended
    again = Decoder.again
    monkeypatch.setattr(Decoder, "again", lambda decoder, begun, **given: again(decoder, begun))
    with captured(held), pytest.raises(RuntimeError, match="out of bounds"):
        on_all_ranks(held, cases, size)


def test_texts_that_end_at_different_steps(counts: Counter[str]) -> None:
    """The rank whose texts are over goes along as long as another's are not, and a stream says so step by step."""
    held, whole = parts("ep=2"), free(3)
    texts = [[3 + n, 5] for n in range(3)]
    with captured(held):
        for ends in ([whole[0][2]], [whole[1][3]], [whole[2][1], whole[0][7]]):
            options = {**GREEDY, "eos_token_id": ends, "pad_token_id": 0}
            expected = [step.tokens for step in parts("tp=1").stream(texts, **options)]
            assert [step.tokens for step in held.stream(texts, **options)] == expected
    assert counts["ahead"] > 10


def test_a_stream_that_is_left_leaves_room_for_the_next() -> None:
    """Closed, or overtaken by another task: the step that is under way is nobody's then."""
    held = parts("ep=2")

    def left(engine: Any, *, closes: bool) -> list[list[int]]:
        stream = engine.stream([[5, 6], [8, 9]], **GREEDY)
        for _ in range(3):
            next(stream)
        if closes:
            stream.close()
        said: list[list[int]] = engine.generate([[3, 5], [4, 5]], **GREEDY)[:, 2:].tolist()
        return said

    with captured(held):
        for closes in (True, False):
            assert held._simulator.run(functools.partial(left, closes=closes)) == [free(3)[:2]] * 2


def test_all_ranks_look_at_as_many_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they capture a step for more of them at the same time: each would wait for the others' else."""
    monkeypatch.setattr(decoder, "_ROUND_TO", 4)
    cases = [Case([3] * length, {**GREEDY, "max_new_tokens": 8}) for length in (9, 2, 4)]
    alone, held = many_requests.alone(parts("tp=1"), cases), compiled_for(NAME, "ep=2")
    with captured(held) as graphs:
        assert_as_alone(cases, on_all_ranks(held, cases, ROOMY), alone)
        assert len(graphs) > 4
    # the control: each goes by its own rows
    monkeypatch.setattr(Run, "latest", 0)
    with captured(held), pytest.raises(RankMismatch):
        on_all_ranks(held, cases, ROOMY)


def test_steps_are_captured_before_requests_come() -> None:
    """Of a few numbers of rows, on all ranks at once."""
    held, cases = parts("ep=2"), [Case([3 + n, 5], GREEDY, arrival=n) for n in range(3)]

    def served(engine: Any) -> tuple[list[Any], int, int]:
        loop = engine.batching(None, rows=6)
        loop.reserve(CacheSize(max_batch=6, max_length=400, prefill_step=16))
        engine._generate_loop.communicator.barrier()
        before = len(graphs)
        for number, case in enumerate(cases):
            loop.add(number, many_requests.request(case))
        told: list[list[int]] = [[] for _ in cases]
        while sum(map(len, told)) < 36:
            for each in loop.step():
                told[each.number].append(each.token)
        return told, before, len(graphs)

    with captured(held) as graphs:
        for told, before, after in held._simulator.run(served):
            assert told == free(3)
            assert after == before == 2 * 2  # for one row, and for three


def test_another_order_of_ranks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: tokens that are taken for another rank's give other texts."""
    chosen = Decoder._chosen

    def turned(decoder: Decoder, *given: Any, **options: Any) -> Any:
        logits, said = chosen(decoder, *given, **options)
        return logits, said.flip(0)

    monkeypatch.setattr(Decoder, "_chosen", turned)
    held, cases = parts("ep=2"), [Case([3 + n, 5], GREEDY) for n in range(2)]
    with captured(held):
        found = on_all_ranks(held, cases, ROOMY)
    with pytest.raises(AssertionError):
        assert_as_alone(cases, found, free(2))


def test_rows_that_were_not_certain_are_run_again(monkeypatch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
    """On all ranks, whoever has them: their hosts choose, tell the others, and all begin from there."""
    drawn = {**GREEDY, "do_sample": True, "top_k": 0, "top_p": 0.95}
    cases = [Case([3 + n, 5], {**drawn, "seed": n, "top_p": 0.95 if n % 3 else 1e-6}) for n in range(4)]
    alone = many_requests.alone(parts("tp=1"), cases)
    monkeypatch.setattr(row_sampler, "_LOOK", 4)
    monkeypatch.setattr(row_sampler, "_LEAST", 2)
    held = parts("ep=2")
    with captured(held):
        assert_as_alone(cases, on_all_ranks(held, cases, ROOMY), alone)
    assert counts["ahead"] > 4
    assert counts["told"] > 4
    # what began with another token has to count for nothing
    monkeypatch.setattr(chosen_steps.UnderWay, "void", property(lambda _: set(), lambda *_: None), raising=False)
    with captured(held), pytest.raises(AssertionError):
        assert_as_alone(cases, on_all_ranks(held, cases, ROOMY), alone)


@pytest.mark.parametrize("broken_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_logits_that_are_no_numbers_are_those_of_one_row(broken_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case([3 + n, 5], GREEDY) for n in range(4)]
    run, seen = Decoder._run, Counter[str]()

    def broken(decoder: Decoder, at: int) -> Tensor:
        logits = run(decoder, at)
        seen["runs"] += decoder._program.rank == broken_rank
        if seen["runs"] == 9 and decoder._program.rank == broken_rank:
            logits[1] = float("nan")
        return logits  # type: ignore[no-any-return]

    monkeypatch.setattr(Decoder, "_run", broken)
    held = parts("ep=2")
    with captured(held):
        found = on_all_ranks(held, cases, ROOMY)
    assert len(found.errors) == 1
    (number, error), *_ = found.errors.items()
    assert "no token can be chosen" in str(error)
    for other in {0, 1, 2, 3} - {number}:
        assert found.tokens[other] == free(4)[other]
    assert found.tokens[number] == free(4)[number][: len(found.tokens[number])]


@pytest.mark.parametrize("failing_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ranks_fail_together(failing_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step is under way that others have begun as well."""
    read, steps = StepsAhead.read, Counter[str]()

    def failing(chosen: StepsAhead, latest: Any, behind: Any) -> Any:
        steps["read"] += chosen._own == failing_rank
        if steps["read"] == 4 and chosen._own == failing_rank:
            raise RuntimeError("this rank has had enough")
        return read(chosen, latest, behind)

    monkeypatch.setattr(StepsAhead, "read", failing)
    held = compiled_for(NAME, "ep=2")
    with captured(held), pytest.raises(RuntimeError, match="had enough"):
        held.generate([[5, 6, 7], [8, 9]], **GREEDY)


def test_a_measured_step_is_none_that_has_begun(counts: Counter[str]) -> None:
    """From where a recording begins, hosts choose; what is under way then is told as it is."""
    held, cases = parts("ep=2"), [[3 + n, 5] for n in range(2)]

    def recorded(engine: Any) -> list[Any]:
        request = engine.request(cases, **GREEDY)
        found = []
        for at, step in enumerate(engine.steps(request)):
            found.append(step.tokens)
            if at == 3:
                engine._generate_loop._profiler.start(by_node=False)
            if at == 7:
                engine._generate_loop._profiler.stop()
        return found

    with captured(held):
        for said in held._simulator.run(recorded):
            assert [list(row) for row in zip(*said, strict=True)] == free(3)[:2]
    assert counts["told"] > 3
    assert counts["ahead"] > 4
