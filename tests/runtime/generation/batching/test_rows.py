"""Many requests over ranks that share out the tokens of each: prompts that run together, and prefixes taken over."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner import Plan
from partitioner.errors import InputError
from runtime.generation.batching.prefixes.row_texts import RowTexts, SharedOut, alike
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.work import Limits
from runtime.kv_cache.cache_size import CacheSize
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.kv_cache.sharded_slots import FAR, uneven_prefix
from runtime.ops.rows.token_order import TokenOrder
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.runtime.generation.batching.test_scheduler import EVENTS, World
from tests.runtime.kv_cache.sharded_cases import CPU, Run, states
from tests.support.partitioned import compiled

ROOMY = CacheSize(max_batch=8, max_length=96, prefill_step=64)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": []}
SYSTEM = [3 + number * 7 % 50 for number in range(50)]
"""What many prompts begin with; the first 48 of them are a prefix that rows take over."""


def parts(plan: str, name: str = "llama") -> Any:
    found = Plan.parse(plan)
    return compiled(name, found.tp, pp=found.pp, sp=found.sp, sp_attention=found.sp_attention)


@functools.cache
def alone(count: int) -> tuple[list[Case], list[list[int]]]:
    """Prompts that begin alike, some at the same time and some later."""
    cases = [
        Case(SYSTEM + [60 + number] * (1 + number % 5), GREEDY, arrival=(0, 0, 9)[number % 3])
        for number in range(count)
    ]
    return cases, many_requests.alone(parts("tp=1"), cases)


@pytest.mark.parametrize("plan", ["sp=2", pytest.param("sp=3", marks=pytest.mark.slow)])
def test_a_prefix_is_run_once_and_changes_no_token(plan: str) -> None:
    cases, expected = alone(12)
    found = on_all_ranks(parts(plan), cases, ROOMY)
    assert_as_alone(cases, found, expected)
    assert found.status["prefixes_kept"]
    assert found.status["prefix_hits"] == 11 * 48
    assert found.status["prefill_tokens"] == sum(len(case.prompt) for case in cases) - 11 * 48


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=2,sp=2", "pp=2,sp=2", "sp=4,sp_attention=ulysses", "sp=2,sp_attention=gather"])
def test_a_prefix_on_other_plans(plan: str) -> None:
    cases, expected = alone(12)
    found = on_all_ranks(parts(plan), cases, ROOMY)
    assert_as_alone(cases, found, expected)
    assert found.status["prefix_hits"] >= 10 * 48


def test_a_conversation_goes_on_behind_its_own_row() -> None:
    """Each prompt is the one before, its answer, and more; one row only, so that the row takes over its own."""
    held, whole = parts("sp=2"), parts("tp=1")
    prompt, hits = SYSTEM[:20], 0
    size = CacheSize(max_batch=1, max_length=96, prefill_step=16)

    def converse(engine: Any) -> list[list[int]]:
        loop, said = engine.batching(size), []
        text = list(prompt)
        for turn in range(3):
            loop.add(turn, many_requests.request(Case(text, {"max_new_tokens": 9, "eos_token_id": []})))
            tokens: list[int] = []
            while len(tokens) < 9:
                tokens += [told.token for told in loop.step()]
            said.append(tokens)
            text = [*text, *tokens, 70 + turn, 5]
        nonlocal hits
        hits = loop.status()["prefix_hits"]
        return said

    first, other = held._simulator.run(converse)
    assert first == other
    text = list(prompt)
    for turn, tokens in enumerate(first):
        assert tokens == many_requests.alone(whole, [Case(text, {"max_new_tokens": 9, "eos_token_id": []})])[0]
        text = [*text, *tokens, 70 + turn, 5]
    assert hits == 16 + 32  # of 28 and of 39 tokens that the row had


def test_a_row_that_took_over_what_is_not_its_own_says_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with the keys of other tokens in the first slots, tokens are others."""
    take_over = ShardedCache.take_over

    def wrong(self: ShardedCache, row: int, source: int, length: int) -> None:
        take_over(self, row, source, length)
        for name, buffer in self.buffers.items():
            if name.endswith(".key"):  # values that came along would be the same set of tokens
                buffer[row, :, : length // 3] = buffer[row, :, : length // 3].roll(1, 1)

    monkeypatch.setattr(ShardedCache, "take_over", wrong)
    cases, expected = alone(12)
    found = on_all_ranks(parts("sp=2"), cases, ROOMY)
    assert list(found.tokens.values()) != expected


def test_prompts_run_together_where_they_are_as_far() -> None:
    """Eight short prompts at once are one step, and the first tokens of a longer one come with them."""
    held = parts("sp=2")
    cases = [Case([5 + n, 7, 9 + n, 11, 13, n + 3], GREEDY) for n in range(8)] + [Case(list(range(3, 41)), GREEDY)]
    size = CacheSize(max_batch=9, max_length=60, prefill_step=60)

    def first_steps(engine: Any) -> list[list[tuple[int, int]]]:
        loop = engine.batching(size)
        for number, case in enumerate(cases):
            loop.add(number, many_requests.request(case))
        found, run = [], loop.run

        def noted(given: Any, received: Any = ()) -> Any:
            found.append([(turn.number, len(turn.tokens)) for turn in given.work.turns if not given.work.decode])
            return run(given, received)

        loop.run = noted
        for _ in range(3):
            loop.step()
        return found

    first, other = held._simulator.run(first_steps)
    assert first == other == [[(number, 6) for number in range(9)], [], [(8, 32)]]
    found = on_all_ranks(held, cases, size)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))


@pytest.mark.slow
def test_windows_keep_no_prefix_and_say_so() -> None:
    held = parts("sp=2", "mistral")
    cases = [Case([*SYSTEM[:20], 60 + n], GREEDY, arrival=3 * n) for n in range(3)]
    found = on_all_ranks(held, cases, ROOMY)
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1", "mistral"), cases))
    assert found.status["prefix_hits"] == 0
    assert "sees some tokens back" in found.status["why_not_kept"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plan", ["sp=2", "sp=3", "pp=2,sp=2"])
def test_whatever_comes_and_goes(plan: str, seed: int) -> None:
    """Half of them begin alike."""
    cases = [
        replace(case, prompt=[*SYSTEM[: 17 + 8 * (number % 5)], *case.prompt] if number % 2 else case.prompt)
        for number, case in enumerate(mixed(24, longest=20, new=14, seed=seed))
    ]
    found = on_all_ranks(parts(plan), cases, CacheSize(max_batch=5, max_length=96, prefill_step=16))
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert found.status["prefix_hits"] > 0


# -- the scheduler, and what it knows of rows --------------------------------------------------------------------------


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    rows, parts = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return Limits(
        rows=rows,
        blocks=rows,
        block_size=30,
        budget=draw(st.integers(parts, 16)),
        piece=draw(st.sampled_from([None, 1, 3])),
        alike=True,
        keeps_prefixes=False,
        shared_out=SharedOut(parts, draw(st.booleans()), draw(st.integers(0, 3)), draw(st.integers(1, 3))),
        longest=30,
        groups=draw(st.integers(1, 3)),
    )


class Rows(World):
    """A row is written from the start, and may begin with the tokens of another."""

    def _check(self, work: Any) -> None:
        shared = self.scheduler.limits.shared_out
        assert shared is not None
        for turn in work.turns:
            (row,) = turn.table
            if turn.source is not None:
                assert turn.start == turn.source[1] > 0
                assert shared.keeps
                self.cache[row] = self.cache[turn.source[0]][: turn.start]
            elif turn.start == 0:
                self.cache[row] = []
            assert self.cache[row][: turn.start] == self.texts[turn.number][: turn.start]
            self.cache[row] = self.texts[turn.number][: turn.start + len(turn.tokens)]
        if not work.decode and len(work.turns) > 1:
            rows = sorted(turn.table[0] for turn in work.turns)
            assert rows == list(range(rows[0], rows[0] + len(rows)))
            assert len({(turn.start, len(turn.tokens)) for turn in work.turns}) == 1
        for turn in () if work.decode else work.turns:
            is_last = turn.start + len(turn.tokens) == len(self.texts[turn.number])
            piece = self.scheduler.limits.piece or shared.parts
            assert is_last or piece < shared.parts or len(turn.tokens) % shared.parts == 0
        # the last of them wrote what stands there now; `World` sees rows that are not written twice
        written = dict(self.cache)
        for turn in work.turns:
            self.cache[turn.table[0]] = self.texts[turn.number][: turn.start]
        super()._check(work)
        assert self.cache == written


@given(limits(), EVENTS)
@settings(max_examples=30, deadline=None)
def test_rows_hold_what_the_scheduler_says(given: Limits, events: list[tuple[str, Any, int]]) -> None:
    world, count = Rows(Scheduler(given)), 0
    for kind, what, amount in events:
        if kind == "add":
            world.add(count, what, amount)
            count += 1
        elif kind == "cancel":
            if what in world.left:
                world.cancel(what)
        else:
            for _ in range(amount):
                world.step()
    idle = 0
    for _ in range(5000):
        idle = 0 if world.step() else idle + 1
        if idle > given.groups and not world.left:
            break
    assert not world.left, "all come to their end"
    assert world.scheduler.pool.free == given.blocks


@pytest.mark.parametrize(("length", "piece", "parts"), [(2, 1, 3), (5, 4, 6), (7, 2, 5)])
def test_pieces_that_ranks_cannot_share_evenly(length: int, piece: int, parts: int) -> None:
    """A request may ask for pieces of fewer tokens than there are ranks; its last piece has what is left."""
    world = Rows(Scheduler(Limits(rows=2, blocks=2, block_size=30, budget=16, alike=True, shared_out=SharedOut(parts))))
    world.scheduler.add(0, list(range(length)), most=length, piece=piece)
    world.texts[0], world.left[0] = list(range(length)), 1
    while world.left:
        assert world.step()


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_a_row_that_is_taken_over_knows_who_has_what(
    parts: int, runs: list[tuple[int, bool]], length: int, more: list[tuple[int, bool]]
) -> None:
    """A cache that took a prefix over says of each rank what the scheduler's own count says, now and later."""
    cache = ShardedCache(states(), max_batch=2, max_length=80, step=9, device=CPU, parts=parts, coordinate=0)
    texts = RowTexts(SharedOut(parts, least=1, uneven=80))

    def go_on(row: int, start: int, todo: list[tuple[int, bool]]) -> int:
        texts_start = start
        for count, decode in todo:
            for size in [1] * count if decode else [count]:
                group = slice(row, row + 1)
                cache.begin(Run((start,), (size,), (True,)).batch(), rows=group, decode=decode)
                texts.add(row, start, range(start, start + size), dealt_out=not decode)
                start += size
        assert start >= texts_start
        return start

    texts.begin(0, None)
    end = go_on(0, 0, runs)
    length = min(length, end)
    if not length:
        return
    assert texts.longest([*range(length), -1]) == (0, length)
    for row in (1, 0):  # from another row, then from itself
        cache.take_over(row, 0, length)
        texts.begin(row, (0, length))
        stop = go_on(row, length, more)
        for held in cache.kept.held.values():
            counts = (held[:, row, :-1] < FAR).sum(1).tolist()
            assert counts == texts._rows[row].counts(parts)
            assert sorted(held[:, row, :-1][held[:, row, :-1] < FAR].tolist()) == list(range(stop))


def test_a_prefix_that_is_too_uneven_is_cut_shorter() -> None:
    texts = RowTexts(SharedOut(4, uneven=2, least=1))
    texts.begin(0, None)
    texts.add(0, 0, range(64), dealt_out=True)
    assert max(TokenOrder.of(64, 4).counts) == 16
    assert texts.longest([*range(20), -1]) == (0, 3)  # all of them are on the first rank: 8 of 20 would be
    assert texts.longest([*range(64), -1]) == (0, 64)
    texts.forget(0)
    assert texts.longest(list(range(64))) is None


def test_how_far_two_texts_are_alike() -> None:
    one = list(range(200))
    for at in (0, 1, 63, 64, 65, 130, 199):
        other = [*one[:at], -1, *one[at + 1 :]]
        assert alike(one, other, 200) == at
        assert alike(one, other, 50) == min(at, 50)
    assert alike(one, one, 1000) == 200
    assert alike([], one, 5) == 0


def test_rows_without_a_turn_write_nothing() -> None:
    """A single token of others is nothing that a row has, also where all that it has came one by one."""
    cache = ShardedCache(states(), max_batch=2, max_length=20, step=9, device=CPU, parts=2, coordinate=0)
    rows = slice(0, 2)
    cache.begin(Run((0, 0), (1, 1), (True, True), decode=True).batch(), rows=rows, decode=True)
    held = {count: each.clone() for count, each in cache.kept.held.items()}
    slots = {count: each.clone() for count, each in cache._run.slots.items()}  # type: ignore[union-attr]
    cache.begin(Run((1, 0), (1, 1), (True, False), decode=True).batch(), rows=rows, decode=True)
    for count, each in cache.kept.held.items():
        assert torch.equal(each[:, 1, :count], held[count][:, 1, :count])
        assert slots[count][1, 0] == 0
        assert cache._run.slots[count][1, 0] == count  # type: ignore[union-attr]


def test_a_prompts_step_of_nobody_changes_no_row() -> None:
    """A row that a rank takes because others have prompts: one that another group has under way, or a free one."""
    cache = ShardedCache(states(), max_batch=2, max_length=20, step=9, device=CPU, parts=2, coordinate=0)
    attend = cache.bind_over_ranks(_Alone(), {"state": "s", "parts": 2, "scale": 0.4, "how": "gather"})
    for buffer in cache.buffers.values():
        buffer.copy_(torch.rand(buffer.shape, dtype=buffer.dtype))
    cache.begin(Run((0,), (5,), (True,)).batch(), rows=slice(0, 1))
    held = {count: each.clone() for count, each in cache.kept.held.items()}
    before = {name: buffer.clone() for name, buffer in cache.buffers.items()}
    ends, kept = list(cache.kept.ends), [list(each) for each in cache.kept.kept]
    for start in (0, 4):
        cache.begin(Run((start,), (1,), (False,)).batch(), rows=slice(0, 1))
        q, k, v = (torch.rand(1, heads, 1, width, dtype=torch.float64) for heads, width in ((4, 6), (2, 6), (2, 4)))
        attend(q, k, v, torch.tensor([[start]]), None, None)
        assert (cache.kept.ends, cache.kept.kept) == (ends, kept)
        for count, each in cache.kept.held.items():
            assert torch.equal(each[:, 0, :count], held[count][:, 0, :count])
        for name, buffer in cache.buffers.items():
            assert torch.equal(buffer[:, :, :-1], before[name][:, :, :-1])


class _Alone:
    """A channel whose other rank has nothing."""

    node, coordinate, ranks = "attend", 0, (0, 1)

    def all_gather(self, x: torch.Tensor, *, dim: int, sizes: list[int] | None = None) -> torch.Tensor:
        if sizes is not None:
            return torch.cat([x, x.new_zeros(*x.shape[:dim], sizes[1], *x.shape[dim + 1 :])], dim)
        return torch.cat([x, torch.zeros_like(x)], dim)


def chain(monkeypatch: pytest.MonkeyPatch, parts: int, *, step: int, uneven: int | None = None) -> None:
    """Texts each of which begins like the one before it and a few tokens more, which are all on the first rank."""
    monkeypatch.setattr("runtime.kv_cache.sharded_slots._UNEVEN_RUNS", 4)
    longest = 20 * step // parts
    cache = ShardedCache(states(), max_batch=2, max_length=longest, step=step, device=CPU, parts=parts, coordinate=0)
    texts = RowTexts(SharedOut(parts, least=1, uneven=uneven_prefix(step, parts) if uneven is None else uneven))
    before, at = list[int](), 0
    for number in range(40):
        row, text = number % 2, before[: at + step // (2 * parts)]
        text += [1000 * number + place for place in range(longest - len(text))]
        source = texts.longest(text)
        if source is None:
            cache.start(slice(row, row + 1))
        else:
            cache.take_over(row, *source)
        texts.begin(row, source)
        start = at = 0 if source is None else source[1]
        while start < longest:
            size = min(step, longest - start)
            cache.begin(Run((start,), (size,), (True,)).batch(), rows=slice(row, row + 1))
            texts.add(row, start, text[start : start + size], dealt_out=True)
            start += size
        before = text


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_behind_any_prefix_there_is_room_for_the_longest_text(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(monkeypatch, parts, step=4 * parts)
    with pytest.raises(InputError, match="slots for each sequence"):  # the control: prefixes as uneven as they come
        chain(monkeypatch, parts, step=4 * parts, uneven=1000)
