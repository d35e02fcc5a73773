"""The scheduler by itself: whatever comes and goes, it keeps to its limits, serves in order, and all come to an end."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.errors import InputError
from runtime.generation.batching.chosen_steps import next_behind
from runtime.generation.batching.prefixes.blocks import BlockPool, key_of
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.work import Limits, Work


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    packs = draw(st.booleans())
    return Limits(
        rows=draw(st.integers(1, 5)),
        blocks=draw(st.integers(4, 20)),
        block_size=draw(st.sampled_from([1, 2, 4])),
        budget=draw(st.integers(1, 16)),
        beside=draw(st.sampled_from([None, 1, 5])),
        piece=draw(st.sampled_from([None, 1, 3])),
        packs=packs,
        alike=not packs and draw(st.booleans()),
        keeps_prefixes=draw(st.booleans()),
        sees=draw(st.sampled_from([None, 1, 3, 7])),
        groups=draw(st.integers(1, 3)),
    )


@dataclass
class World:
    """Plays the ranks: says a token for every turn that samples, and checks each step."""

    scheduler: Scheduler
    texts: dict[int, list[int]] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    cache: dict[int, list[int]] = field(default_factory=dict)
    """By block, what was written to it: the tokens, as a prefix from the first of the sequence."""
    under_way: dict[int, Work] = field(default_factory=dict)
    admissions: dict[int, int] = field(default_factory=dict)
    """Of each, which row given it was in when it first ran."""
    slot: int = 0
    preemptions: int = 0
    """Before the step that is checked."""

    def _waits_for_a_token(self, number: int, text: list[int]) -> bool:
        """Whether all its tokens but the last lie in the cache, in the row that it has."""
        sequence = self.scheduler._running.get(number)
        return number in self.left and sequence is not None and sequence.computed == len(text) - 1

    def add(self, number: int, prompt: list[int], new: int) -> None:
        most = len(prompt) + new - 1
        limits = self.scheduler.limits
        room = limits.longest or limits.blocks * limits.block_size
        if most > room:
            with pytest.raises(InputError, match=f"room for {room} of one request"):
                self.scheduler.add(number, prompt, most=most)
            return
        # requests ask for pieces of their own
        self.scheduler.add(number, prompt, most=most, piece=(None, 1, 2, 4)[(len(prompt) + new) % 4])
        self.texts[number], self.left[number] = list(prompt), new

    def cancel(self, number: int) -> None:
        self.scheduler.cancel(number)
        self.left.pop(number, None)

    def step(self) -> bool:
        """Whether something ran."""
        group = self.slot % self.scheduler.limits.groups
        self.slot += 1
        done = self.under_way.pop(group, None)
        if done is not None:
            self._finish(done)
        before = self.preemptions = self.scheduler.counts.preemptions
        free, running = self.scheduler.pool.free, self.scheduler.running
        work = self.scheduler.next(group)
        if self.scheduler.counts.preemptions > before:
            assert running > 1, "one alone always has room"
            assert free < self.scheduler.limits.blocks
        if work is not None:
            self._check(work)
            self.under_way[group] = work
        return work is not None or done is not None

    def _check(self, work: Work) -> None:
        given, size = self.scheduler.limits, self.scheduler.limits.block_size
        assert self.scheduler.running <= given.rows
        numbers, rows = [turn.number for turn in work.turns], [turn.row for turn in work.turns]
        busy = [turn.number for each in self.under_way.values() for turn in each.turns]
        assert len(set(numbers)) == len(numbers)
        assert len(set(rows)) == len(rows)
        assert not {*numbers} & {*busy} or any(number not in self.left for number in numbers)
        assert work.packed == (given.packs and not work.decode)
        if work.packed:
            pieces = [len(turn.tokens) for turn in work.turns if len(turn.tokens) > 1 or not turn.samples]
            assert sum(pieces) <= given.budget
            waiting = {number for number, text in self.texts.items() if self._waits_for_a_token(number, text)}
            if not {*busy} and given.groups == 1 and self.scheduler.counts.preemptions == self.preemptions:
                assert waiting <= {*numbers}, "who waits for a token takes it in every step"
        elif not work.decode:
            width = max(len(turn.tokens) for turn in work.turns)
            assert width * len(work.turns) <= given.budget
            assert not given.alike or all(len(turn.tokens) == width for turn in work.turns)
        writes: Counter[int] = Counter()
        for turn in work.turns:
            end = turn.start + len(turn.tokens)
            assert given.piece is None or len(turn.tokens) <= given.piece
            assert work.decode <= (len(turn.tokens) == 1)
            text = self.texts[turn.number]
            assert list(turn.tokens) == text[turn.start : end]
            assert turn.samples == (end == len(text))
            assert len(turn.table) == -(-end // size)
            self.admissions.setdefault(turn.number, turn.admission)
            writes.update({turn.table[at // size] for at in range(turn.start, end)})
            # what it is to read was written as its own text has it, and is nobody's who writes now
            for index, block in enumerate(turn.table):
                if block == given.blocks:  # given back: not even its last position is seen
                    assert given.sees is not None
                    assert (index + 1) * size - 1 <= turn.start - given.sees
                    continue
                seen = min(size, turn.start - index * size)
                if seen > 0:
                    assert self.cache[block][: index * size + seen] == text[: index * size + seen]
            for at in range(turn.start, end):
                self.cache[turn.table[at // size]] = text[: at + 1]
        assert set(writes.values()) <= {1}, "two write to one block"

    def _finish(self, work: Work) -> None:
        chosen, ended = {}, set()
        for turn in work.turns:
            if not turn.samples or turn.number not in self.left:
                continue
            chosen[turn.number] = (7 * len(self.texts[turn.number])) % 3
            self.texts[turn.number].append(chosen[turn.number])
            self.left[turn.number] -= 1
            if not self.left[turn.number]:
                ended.add(turn.number)
                del self.left[turn.number]
        self.scheduler.learn(work, chosen, ended)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 10)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.integers(1, 4)),
    ),
    max_size=60,
)


@given(limits(), EVENTS)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes(given: Limits, events: list[tuple[str, list[int] | int, int]]) -> None:
    world, count = World(Scheduler(given)), 0
    for kind, what, amount in events:
        if kind == "add":
            assert isinstance(what, list)
            world.add(count, what, amount)
            count += 1
        elif kind == "cancel":
            if what in world.left:
                world.cancel(what)  # type: ignore[arg-type]
        else:
            for _ in range(amount):
                world.step()
    most = 50 * (1 + sum(len(text) + world.left.get(number, 0) for number, text in world.texts.items()))
    idle = 0
    for _ in range(most):
        idle = 0 if world.step() else idle + 1
        if idle > given.groups and not world.left:
            break
    assert not world.left, "all come to their end"
    scheduler = world.scheduler
    assert (scheduler.running, scheduler.waiting, scheduler.pool.free) == (0, 0, given.blocks)
    assert not scheduler._pending
    kept = given.keeps_prefixes
    assert scheduler.tokens_cached == (scheduler.pool.holding * given.block_size if kept else 0)
    rows_given = [world.admissions[number] for number in sorted(world.admissions)]
    assert rows_given == sorted(rows_given), "rows are given in the order in which sequences come"


def test_two_schedulers_that_are_told_the_same_do_the_same() -> None:
    given = Limits(rows=3, blocks=8, block_size=2, budget=6)
    worlds = [World(Scheduler(given)) for _ in range(2)]
    for world in worlds:
        for number in range(6):
            world.add(number, [number % 2] * (1 + number), 5)
    for _ in range(200):
        first, second = (world.step() for world in worlds)
        assert first == second
        assert worlds[0].under_way == worlds[1].under_way


@pytest.mark.parametrize(("sees", "most"), [(5, 4), (1, 2), (None, 20)])
def test_blocks_behind_a_window_are_given_back(sees: int | None, most: int) -> None:
    """39 tokens in blocks of 2, run by 4 or one at a time: a window touches few of them."""
    scheduler = Scheduler(Limits(rows=2, blocks=30, block_size=2, budget=4, keeps_prefixes=False, sees=sees))
    scheduler.add(0, [1] * 20, most=39)
    held, written = [], 0
    while (work := scheduler.next()) is not None:
        held.append(scheduler.limits.blocks - scheduler.pool.free)
        scheduler.learn(work, {0: 9} if work.turns[0].samples else {}, {0} if written == 19 else set())
        written += work.turns[0].samples
    assert written == 20
    assert max(held) == most
    assert scheduler.pool.free == scheduler.limits.blocks
    assert scheduler.counts.blocks_behind == (0 if sees is None else (39 - sees + 1) // 2)


def test_short_prompts_and_single_tokens_run_in_one_step() -> None:
    """Prompts of 3, 1 and 9 tokens beside one that writes: none is filled up, and the last takes what is left."""
    scheduler = Scheduler(Limits(rows=4, blocks=80, block_size=1, budget=16, beside=8, packs=True))
    scheduler.add(0, [1, 2], most=8)
    first = scheduler.next()
    assert first is not None
    scheduler.learn(first, {0: 9})
    for number, length in enumerate((3, 1, 9), 1):
        scheduler.add(number, [10 * number] * length, most=length + 3)
    steps = []
    for _ in range(3):
        work = scheduler.next()
        assert work is not None
        steps.append({turn.number: len(turn.tokens) for turn in work.turns})
        scheduler.learn(work, {turn.number: 9 for turn in work.turns if turn.samples})
    assert steps == [{0: 1, 1: 3, 2: 1, 3: 5}, {0: 1, 1: 1, 2: 1, 3: 4}, {0: 1, 1: 1, 2: 1, 3: 1}]
    assert work is not None
    assert work.decode
    assert not work.packed


@pytest.mark.parametrize(("beside", "longest"), [(4, 4), (None, 16), (20, 16)])
def test_a_long_prompt_takes_less_at_a_time_while_others_write(beside: int | None, longest: int) -> None:
    scheduler = Scheduler(Limits(rows=3, blocks=80, block_size=1, budget=16, beside=beside))
    scheduler.add(0, [1, 2], most=8)
    scheduler.add(1, [3] * 50, most=50)
    first = scheduler.next()
    assert first is not None
    scheduler.learn(first, {0: 9})
    pieces: list[tuple[bool, int]] = []
    written = 1
    while (work := scheduler.next()) is not None:
        if not work.decode:
            pieces.append((written < 7, max(len(turn.tokens) for turn in work.turns)))
        written += work.decode and any(turn.number == 0 for turn in work.turns)
        ended = {turn.number for turn in work.turns if turn.samples and (turn.number == 1 or written == 7)}
        scheduler.learn(work, {turn.number: 9 for turn in work.turns if turn.samples}, ended)
    assert written == 7
    assert max(size for beside_others, size in pieces if beside_others) == longest
    assert max(size for beside_others, size in pieces if not beside_others) == 16 if beside == 4 else True


def test_the_last_that_came_gives_way() -> None:
    scheduler = Scheduler(Limits(rows=3, blocks=6, block_size=1, budget=6, keeps_prefixes=False))
    for number in range(2):
        scheduler.add(number, [1, 2], most=6)
    seen: list[int] = []
    for _ in range(30):
        work = scheduler.next()
        if work is None:
            break
        seen += [turn.number for turn in work.turns if turn.start + 1 >= 5]
        chosen = {turn.number: 0 for turn in work.turns if turn.samples}
        ended = {turn.number for turn in work.turns if turn.start + len(turn.tokens) == 6}
        scheduler.learn(work, chosen, ended)
    assert scheduler.counts.preemptions == 1
    assert seen[0] == 0, "the first to come is the first to end"
    assert seen[-1] == 1


def test_a_prefix_is_found_while_it_is_used_and_after() -> None:
    scheduler = Scheduler(Limits(rows=2, blocks=10, block_size=2, budget=20))
    scheduler.add(0, [1, 2, 3, 4, 5], most=6)
    work = scheduler.next()
    assert work is not None
    scheduler.add(1, [1, 2, 3, 4, 6], most=6)
    scheduler.learn(work, {0: 9}, ())
    scheduler.next()
    work = scheduler.next()
    assert work is not None
    (second,) = (turn for turn in work.turns if turn.number == 1)
    assert (second.start, second.tokens) == (4, (6,))
    assert scheduler.counts.prefix_hits == 4
    scheduler.cancel(0)
    scheduler.cancel(1)
    scheduler.add(2, [1, 2, 3, 4], most=4)  # its last token is run in any case
    work = scheduler.next()
    assert work is not None
    assert [(turn.number, turn.start) for turn in work.turns] == [(2, 2)]


def test_blocks_are_given_up_from_the_end_and_the_oldest_first() -> None:
    pool = BlockPool(3)
    first, second, third = (pool.take() for _ in range(3))
    assert (first, second, third, pool.take()) == (0, 1, 2, None)
    a = key_of(b"", [1])
    b = key_of(a, [1])
    assert a != b
    pool.keep(0, a)
    pool.keep(1, b)
    assert pool.release([0, 1]) == [1, 0]
    assert (pool.free, pool.holding) == (2, 3)
    assert pool.take() == 1  # the prefix's end
    assert not pool.has(b)
    assert pool.share(a) == 0
    assert pool.share(a) == 0
    assert pool.release([0]) == []
    assert pool.release([0], keep=False) == [0]
    assert not pool.has(a)


@given(
    limits=limits().map(lambda each: replace(each, groups=1)),
    prompts=st.lists(st.tuples(st.integers(1, 6), st.integers(2, 12)), min_size=1, max_size=6),
    ranks=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_what_runs_behind_a_step_is_what_would_run_next(
    limits: Limits, prompts: list[tuple[int, int]], ranks: int
) -> None:
    """Before it is known what the step yields, where it is said at all; blocks are kept under the same keys."""
    schedulers, left, behind = [Scheduler(limits) for _ in range(ranks)], {}, None
    for number, (length, new) in enumerate(prompts):
        if length + new - 1 <= limits.blocks * limits.block_size:
            schedulers[number % ranks].add(number, [number] * length, most=length + new - 1)
            left[number] = new

    def run(these: list[Scheduler], works: list[Work | None], step: int) -> None:
        for scheduler, work in zip(these, works, strict=True):
            if work is not None:
                chosen = {turn.number: 10 + step for turn in work.turns if turn.samples}
                scheduler.learn(work, chosen, {number for number in chosen if left[number] == 1})

    for step in range(300):
        works = [scheduler.next() for scheduler in schedulers] if behind is None else behind
        if not any(works):
            break
        plain = copy.deepcopy(schedulers)
        run(plain, works, step)
        expected = [scheduler.next() for scheduler in plain]
        before = copy.deepcopy(schedulers)
        behind = next_behind(schedulers, works)
        if behind is None:  # then nothing is taken for it on any rank
            for scheduler, other in zip(schedulers, before, strict=True):
                assert (scheduler.pool.free, scheduler.counts) == (other.pool.free, other.counts)
        run(schedulers, works, step)
        for turn in [turn for work in works if work is not None for turn in work.turns]:
            left[turn.number] -= turn.samples
        for one, other in zip(expected, behind or (), strict=False):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert [turn._replace(tokens=(), keys=(), table=()) for turn in one.turns] == [
                    turn._replace(tokens=(), keys=(), table=()) for turn in other.turns
                ]
                assert [len(turn.table) for turn in one.turns] == [len(turn.table) for turn in other.turns]
        if behind is not None:
            assert [each.counts for each in schedulers] == [each.counts for each in plain]
    assert not any(scheduler.running for scheduler in schedulers)


def test_nothing_is_said_of_the_next_step_where_rows_may_come_or_must_go() -> None:
    scheduler = Scheduler(Limits(rows=2, blocks=4, block_size=2, budget=8, packs=True))

    def behind(work: Work) -> Work | None:
        found = next_behind([scheduler], [work])
        return None if found is None else found[0]

    scheduler.add(0, [5], most=4)
    scheduler.add(1, [6], most=3)
    first = scheduler.next()
    assert first is not None
    assert first.decode
    second = behind(first)
    assert second is not None
    assert [turn.start for turn in second.turns] == [1, 1]
    scheduler.learn(first, {0: 7, 1: 8})
    scheduler.add(2, [9], most=1)  # there is no row for it
    third = behind(second)
    assert third is not None
    assert behind(third) is None  # number 1 ends with it, and number 2 has its row then
    scheduler.cancel(2)
    assert next_behind([scheduler], [third], more_than=1) is None
    fourth = behind(third)
    assert fourth is not None
    assert [turn.number for turn in fourth.turns] == [0]
    scheduler.learn(second, {0: 7, 1: 8})
    scheduler.add(3, [9], most=1)
    scheduler.cancel(1)
    assert behind(third) is None  # number 3 has a row now


def test_nothing_is_said_of_the_next_step_where_another_rank_has_something_new() -> None:
    limits = Limits(rows=1, blocks=4, block_size=2, budget=8, packs=True)
    one, other = Scheduler(limits), Scheduler(limits)
    one.add(0, [5], most=6)
    work = one.next()
    assert work is not None
    found = next_behind([one, other], [work, None])
    assert found is not None
    assert found[1] is None
    other.add(1, [6], most=3)
    assert next_behind([one, other], [found[0], None]) is None
