"""A cache whose tokens ranks share out: texts in pieces and steps, the same as in one cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from partitioner.errors import CommunicationError, InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.cache_size import bytes_needed, tokens_that_fit
from runtime.kv_cache.sharded_cache import ShardedCache, cache_for
from runtime.kv_cache.sharded_slots import FAR, sharded_slots
from runtime.ops.cached_attention import cached_attention
from runtime.program.rank_program import RankProgram
from tests.runtime.kv_cache.sharded_cases import (
    CPU,
    HEADS,
    HOWS,
    KV,
    VALUE,
    WIDTH,
    Run,
    check,
    on_one,
    on_sharded,
    states,
    text,
    tokens,
)
from tests.runtime.ops.rows.sp_cases import Counting, drawn


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("parts", "prompts"), [(1, (5,)), (2, (1,)), (3, (2,)), (2, (16, 16)), (3, (5, 17, 1))])
@pytest.mark.parametrize("step", [40, 6])
def test_prompts_and_steps(how: str, parts: int, prompts: tuple[int, ...], step: int) -> None:
    caches = check(text(prompts, step, 4), len(prompts), parts, how)
    for row, length in enumerate(prompts):  # each token is kept once, and filling is not
        seen = [
            cache.kept.held[count][rank, row, :count] for rank, cache in enumerate(caches) for count in cache.kept.held
        ]
        kept = torch.cat(seen)
        assert sorted(kept[kept < FAR].tolist()) == list(range(length + 4))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "options", [{"window": 5}, {"window": 1}, {"chunk": 7}, {"softcap": 2.0}, {"kv_map": [0, 1, 1, 1]}]
)
@pytest.mark.parametrize("step", [pytest.param(40, marks=pytest.mark.slow), 6])
def test_options(how: str, options: dict[str, Any], step: int) -> None:
    check(text((5, 23), step, 9), 2, 3, how, **options)
    sees = options.get("window") or options.get("chunk")
    if sees:  # what nobody sees any more is given up
        caches = check(text((5, 23), 6, 30), 2, 3, how, sees=sees, step=6, **options)
        assert caches[0].buffers["s.key"].shape[2] <= sees + 2 + 1


@pytest.mark.parametrize("how", HOWS)
def test_sinks_and_masks(how: str) -> None:
    check(text((5, 17), 6, 3), 2, 3, how, sinks=drawn(HEADS, seed=7))
    check(
        text((5, 17), 6, 3),
        2,
        3,
        how,
        sinks=drawn(1, HEADS, 1, 1, seed=7),
        mask=drawn(1, HEADS, 1, 1, seed=8),
        softcap=1.5,
    )
    without, _ = on_sharded(text((5,), 6, 1), 1, 3, how)  # the control
    assert not torch.allclose(without[-1][0], on_one(text((5,), 6, 1), 1, sinks=drawn(HEADS, seed=7))[-1][0])


def test_the_order_in_blocks() -> None:
    for how in HOWS:
        check(text((5, 17), 6, 3), 2, 3, how, order="blocks")


def test_a_ring_of_groups_that_exchange_heads() -> None:
    for step in (40, 6):
        check(text((5, 23), step, 3), 2, 4, "ring-ulysses", neighbours=2)


@pytest.mark.parametrize("how", HOWS)
def test_groups_of_rows_take_turns(how: str) -> None:
    first, second = text((9, 4), 6, 5), text((11, 2), 6, 5)
    runs = []
    for one, other in zip(first, second, strict=True):
        runs += [replace(one, rows=slice(0, 2)), replace(other, rows=slice(2, 4))]
    check(runs, 2, 3, how)


@pytest.mark.parametrize("how", HOWS)
def test_another_text_in_the_same_cache(how: str) -> None:
    """Without `start`, and with prompts behind tokens of steps: a conversation that goes on."""
    more = Run((21, 9), (7, 3), (True, True))
    steps = [Run((28 + at, 12 + at), (1, 1), (True, True), decode=True) for at in range(3)]
    check([*text((17, 5), 6, 4), more, *steps, *text((3, 8), 6, 2)], 2, 3, how)


def test_a_step_that_is_run_again_changes_nothing() -> None:
    """Also of a row that has ended, which stays at its last token."""
    runs = text((17, 5), 6, 4)
    again = [run for run in runs for _ in range(2 if run.decode else 1)]
    ended = [Run((20, 9 + at), (1, 1), (False, True), decode=True) for at in range(3)]
    caches = check([*again, *ended], 2, 3, "ring")
    assert [caches[0].kept.count(rank, 0, 21) for rank in range(3)] == [
        int((caches[0].kept.held[count][rank, 0, :count] < FAR).sum())
        for rank in range(3)
        for count in caches[0].kept.held
    ]


def test_fixed_steps_are_those_of_a_host_that_knows() -> None:
    """As they are captured: what the host knows is only that positions are below a number."""
    runs = text((17, 5), 6, 4)
    prompts, steps = [run for run in runs if not run.decode], [run for run in runs if run.decode]

    class Fixed(ShardedCache):
        def begin(self, tokens: Batch, *, rows: slice | None = None, decode: bool = False) -> None:
            if decode:
                self.begin_fixed(tokens.positions, self.max_length)
            else:
                super().begin(tokens, rows=rows)

    for options in ({}, {"window": 4, "sees": 4}):
        check([*prompts, *steps], 2, 3, "ring", of=Fixed, **options)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_rank_keeps_its_share(parts: int) -> None:
    """About 1/n of the tokens, however they come; the rest is what one run may bring."""
    (key, *_), limited = states(), states(100)[0]
    for length, step in ((8192, 512), (131072, 512), (10000, 96), (1000, 1000)):
        slots = sharded_slots(key, max_length=length, step=step, parts=parts)
        assert length / parts <= slots <= length / parts + step / parts + 34 + (length / step if step % parts else 0)
        assert sharded_slots(limited, max_length=length, step=step, parts=parts) <= 99 + -(-step // parts)
    assert sharded_slots(key, max_length=5, step=4, parts=parts) == 5


@pytest.mark.parametrize("parts", [2, 3])
def test_there_is_room_for_rows_of_any_length(parts: int) -> None:
    """Up to the longest text, with prompts that end anywhere; a cache of the fewest slots."""
    for prompts in ((1, 13), (30, 12)):
        check(text(prompts, 12, 80 - max(prompts)), 2, parts, "ring", step=12)


def test_bytes_of_a_step_and_of_a_later_piece() -> None:
    group = Counting(Mesh.of(sp=3))
    on_sharded(text((18,), 40, 1), 1, 3, "ring", group=group)
    local = KV * (18 // 3) * (WIDTH + VALUE) * 8
    assert group.sent == {
        (rank, kind): sent
        for rank in range(3)
        for kind, sent in (("permute", 2 * local), ("all_gather", 2 * HEADS * (VALUE + 1) * 8))
    }
    later = Counting(Mesh.of(sp=3))
    on_sharded(text((24,), 12, 0), 1, 3, "ring", group=later)
    # the first 12 tokens, then these and 12 more
    assert later.sent[0, "permute"] == 2 * KV * (4 + 8) * (WIDTH + VALUE) * 8


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"chunk": 30}, {"softcap": 2.0}, {"kv_map": [0, 0, 0, 1]}])
def test_queries_travel_to_a_long_past(options: dict[str, Any]) -> None:
    """A short piece behind a long one, also of rows that stand elsewhere; less leaves a rank than by keys."""
    runs = [Run((0,), (36,)), Run((36,), (3,)), Run((39,), (2,)), Run((41,), (1,), decode=True)]
    group = Counting(Mesh.of(sp=3))
    check(runs, 1, 3, "ring", group=group, **options)
    # one token of each of the two others, then one of one other
    assert group.sent[0, "all_to_all"] == 3 * HEADS * (VALUE + 1) * 8
    if not options:
        prompt, queries = KV * 12 * (WIDTH + VALUE) * 8, HEADS * WIDTH * 8
        assert group.sent[0, "permute"] == 2 * (prompt + queries + queries)
    sinks = drawn(HEADS, seed=7)
    check([Run((0, 0), (36, 20)), Run((36, 20), (2, 3)), Run((38, 23), (1, 2))], 2, 3, "ring", sinks=sinks, **options)
    # the control: a long piece behind a short one sends keys
    other = Counting(Mesh.of(sp=3))
    check([Run((0,), (3,)), Run((3,), (36,))], 1, 3, "ring", group=other, **options)
    assert (0, "all_to_all") not in other.sent


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}, {"kv_map": [0, 0, 0, 1]}])
def test_queries_travel_to_a_long_past_in_the_place_of_heads(options: dict[str, Any]) -> None:
    """By ulysses, which has no permutes of its own."""
    runs = [Run((0,), (36,)), Run((36,), (3,)), Run((39,), (2,)), Run((41,), (1,), decode=True)]
    group, whole = Counting(Mesh.of(sp=3)), Counting(Mesh.of(sp=3))
    check(runs, 1, 3, "ulysses", group=group, **options)
    assert group.sent[0, "permute"] == 2 * 2 * HEADS * WIDTH * 8
    sinks = drawn(HEADS, seed=7)
    check(
        [Run((0, 0), (36, 20)), Run((36, 20), (2, 3)), Run((38, 23), (1, 2))], 2, 3, "ulysses", sinks=sinks, **options
    )
    # the controls: a long piece behind a short one exchanges heads, and a gather what is cached
    check([Run((0,), (3,)), Run((3,), (36,))], 1, 3, "ulysses", group=whole, **options)
    assert (0, "permute") not in whole.sent
    gathered = Counting(Mesh.of(sp=3))
    check(runs, 1, 3, "gather", group=gathered, **options)
    assert {kind for _, kind in gathered.sent} == {"all_gather"}


def test_what_such_a_cache_does_not_do_is_refused() -> None:
    cache = ShardedCache(states(), max_batch=1, max_length=8, step=8, device=CPU, parts=2, coordinate=0)
    with pytest.raises(InputError, match="cached_attention of 's' keeps what it is given on one rank"):
        cache.bind(cached_attention, "s", {"scale": 1.0})
    channel = ThreadGroup(Mesh.of(sp=2)).communicator(0).channel("sp", node="n")
    given = {"state": "s", "how": "ring", "scale": 1.0}
    with pytest.raises(InputError, match="node 'n' is not causal"):
        cache.bind_over_ranks(channel, {**given, "parts": 2, "causal": False})
    with pytest.raises(CommunicationError, match="between 3 ranks"):
        cache.bind_over_ranks(channel, {**given, "parts": 3})
    cache.bind_over_ranks(channel, {**given, "parts": 2})
    with pytest.raises(InputError, match="in the order 'blocks', others 'zigzag'"):
        cache.bind_over_ranks(channel, {**given, "parts": 2, "order": "blocks"})
    cache.begin(Run((0,), (5,)).batch())
    merge = cache.bind_over_ranks(channel, {**given, "parts": 2, "how": "merge"})
    with pytest.raises(InputError, match="the tokens of this one are dealt out"):
        merge(*tokens(Run((0,), (5,)), 1), None, None, None)
    with pytest.raises(InputError, match=r"row 0 .* goes on at position 5, not at 3"):
        cache.begin(Run((3,), (2,)).batch())


def test_a_cache_that_runs_out_of_slots_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.kv_cache.sharded_slots._UNEVEN_RUNS", 0)
    cache = ShardedCache(states(), max_batch=1, max_length=40, step=2, device=CPU, parts=2, coordinate=0)
    for start in range(21):
        cache.begin(Run((start,), (1,)).batch())  # one token at a time: all of them go to the first rank
    with pytest.raises(InputError, match="multiples of the 2 ranks"):
        cache.begin(Run((21,), (1,)).batch())


def test_sizes_know_how_many_ranks_share_out_the_tokens() -> None:
    """What is set aside is what was said, longer texts take no less, and twice as many ranks have room for more."""

    def program(parts: int) -> RankProgram:
        mesh = Mesh.of(sp=parts)
        return RankProgram(fx.Graph, mesh, mesh.coordinates(0), (), (), states=tuple(states()))

    for parts in (2, 3):
        for length, step in ((8, 8), (40, 7), (300, 100)):
            given: dict[str, Any] = {"max_batch": 2, "max_length": length}
            cache = cache_for(program(parts), **given, step=step, device=CPU)
            assert isinstance(cache, ShardedCache)
            assert cache.bytes == bytes_needed(program(parts), **given, prefill_step=step)
    each = [bytes_needed(program(4), max_batch=1, max_length=length, prefill_step=100) for length in range(1, 400)]
    assert each == sorted(each)
    one, two, four = (tokens_that_fit(program(parts), 10**8, max_batch=1) for parts in (1, 2, 4))
    assert one is not None
    assert two is not None
    assert four is not None
    assert 1.98 < two / one <= 2
    assert 3.9 < four / one <= 4


def test_pieces_are_as_many_tokens_for_each_rank() -> None:
    cache = ShardedCache(states(), max_batch=1, max_length=40, step=16, device=CPU, parts=3, coordinate=0)
    assert [cache.piece_size(*given) for given in ((16, 40), (20, 40), (16, 16), (7, 40), (2, 40))] == [
        15,
        15,
        16,
        6,
        2,
    ]
