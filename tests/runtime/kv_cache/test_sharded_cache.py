"""A cache whose tokens ranks share out: texts in pieces and steps, the same as in one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner.errors import CommunicationError, InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import bytes_needed, tokens_that_fit
from runtime.kv_cache.sharded_cache import ShardedCache, cache_for
from runtime.kv_cache.sharded_slots import FAR, sharded_slots
from runtime.ops.cached_attention import cached_attention
from runtime.ops.rows.token_order import TokenOrder
from runtime.program.rank_program import RankProgram
from runtime.program.shards import StateShard
from tests.runtime.ops.rows.sp_cases import Counting, drawn, on_ranks

CPU = torch.device("cpu")
F64 = torch.float64
HEADS, KV, WIDTH, VALUE = 4, 2, 6, 4
HOWS = ("ring", "gather", "ulysses")


@dataclass(frozen=True)
class Run:
    """What one run takes of each row: where it starts, and how many tokens."""

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    active: tuple[bool, ...] = ()
    decode: bool = False
    rows: slice | None = None

    def batch(self) -> Batch:
        last = torch.tensor(self.counts)[:, None] - 1
        positions = torch.tensor(self.starts)[:, None] + torch.arange(max(self.counts)).minimum(last)
        return Batch(positions, self.starts, self.counts, self.active)


def text(prompts: Sequence[int], step: int, steps: int) -> list[Run]:
    """Prompts in pieces of `step` tokens, as a conversation cuts them, and `steps` tokens behind each."""
    runs = []
    for start in range(0, max(prompts), step):
        starts = tuple(min(start, length - 1) for length in prompts)
        counts = tuple(max(1, min(length - at, step)) for length, at in zip(prompts, starts, strict=True))
        runs.append(Run(starts, counts, tuple(start < length for length in prompts)))
    ones = (1,) * len(prompts)
    return runs + [
        Run(tuple(p + at for p in prompts), ones, (True,) * len(prompts), decode=True) for at in range(steps)
    ]


def tokens(run: Run, rows: int, *, heads: int = HEADS, kv: int = KV) -> list[Tensor]:
    """q, k and v of a run's tokens; those of a position are the same whenever they come."""
    first = 0 if run.rows is None else run.rows.start
    size, found = max(run.counts), []
    for seed, shape in enumerate(((heads, WIDTH), (kv, WIDTH), (kv, VALUE))):
        all_tokens = drawn(8, 80, *shape, seed=seed)[first : first + rows]
        at = run.batch().positions
        found.append(all_tokens[torch.arange(rows)[:, None], at].transpose(1, 2))
        assert found[-1].shape[2] == size
    return found


def states(sees: int | None = None) -> list[StateShard]:
    shape = {"key": (KV, WIDTH), "value": (KV, VALUE)}
    return [StateShard(f"s.{name}", each, F64, sees, token_axes=("sp",)) for name, each in shape.items()]


def of_tokens(run: Run, out: Tensor) -> list[Tensor]:
    """Without filling, and without rows that take no token."""
    active = run.active or (True,) * len(run.counts)
    return [out[row, :, :count] for row, count in enumerate(run.counts) if active[row]]


def on_one(runs: Sequence[Run], rows: int, *, sees: int | None = None, **options: Any) -> list[list[Tensor]]:
    mask, sinks = options.pop("mask", None), options.pop("sinks", None)
    cache = Cache(states(sees), max_batch=8, max_length=80, step=40, device=CPU)
    attend = cache.bind(cached_attention, "s", {"scale": 0.4, **options}, masked=mask is not None)
    found = []
    for run in runs:
        cache.begin(run.batch(), rows=run.rows)
        found.append(of_tokens(run, attend(*tokens(run, rows), run.batch().positions, mask, sinks)))
    return found


def on_sharded(
    runs: Sequence[Run],
    rows: int,
    parts: int,
    how: str,
    *,
    sees: int | None = None,
    order: str = "zigzag",
    step: int = 40,
    group: ThreadGroup | None = None,
    of: type[ShardedCache] = ShardedCache,
    **options: Any,
) -> tuple[list[list[Tensor]], list[ShardedCache]]:
    mask, sinks = options.pop("mask", None), options.pop("sinks", None)

    def rank(number: int) -> Any:
        def body(communicator: ThreadCommunicator) -> tuple[list[Tensor], ShardedCache]:
            cache = of(states(sees), max_batch=8, max_length=80, step=step, device=CPU, parts=parts, coordinate=number)
            channel = communicator.channel("sp", node="attend")
            given = {"state": "s", "parts": parts, "scale": 0.4, **options}
            prefill = cache.bind_over_ranks(channel, {**given, "how": how, "order": order})
            decode = cache.bind_over_ranks(channel, {**given, "how": "merge"})
            found = []
            for run in runs:
                cache.begin(run.batch(), rows=run.rows, decode=run.decode)
                whole = tokens(run, rows)
                if run.decode:
                    found.append(decode(*whole, run.batch().positions, mask, sinks))
                    continue
                own = TokenOrder.of(max(run.counts), parts, order).positions(number)
                mine = [each[:, :, own] for each in whole]
                found.append(prefill(*mine, run.batch().positions[:, own], mask, sinks))
            return found, cache

        return body

    each = on_ranks(group or ThreadGroup(Mesh.of(sp=parts)), *map(rank, range(parts)))
    found = []
    for at, run in enumerate(runs):
        outs = [outputs[at] for outputs, _ in each]
        if run.decode:
            assert all(torch.equal(outs[0], out) for out in outs), "not the same bits on all ranks"
            found.append(of_tokens(run, outs[0]))
        else:
            size = max(run.counts)
            whole = torch.empty(rows, HEADS, size, VALUE, dtype=F64)
            for number, out in enumerate(outs):
                whole[:, :, TokenOrder.of(size, parts, order).positions(number)] = out
            found.append(of_tokens(run, whole))
    return found, [cache for _, cache in each]


def check(runs: Sequence[Run], rows: int, parts: int, how: str, **options: Any) -> list[ShardedCache]:
    only = {name: value for name, value in options.items() if name not in ("order", "step", "group", "of")}
    found, caches = on_sharded(runs, rows, parts, how, **options)
    for run, mine, expected in zip(runs, found, on_one(runs, rows, **only), strict=True):
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text, run=run: f"{run}: {text}")
    return caches


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
@pytest.mark.parametrize("step", [40, 6])
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
    on_sharded(text((18,), 12, 0), 1, 3, "ring", group=later)
    # the first 12 tokens, then these and 6 more
    assert later.sent[0, "permute"] == 2 * KV * (4 + 6) * (WIDTH + VALUE) * 8


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
