"""A cache in blocks against one of rows: the same runs, whichever blocks they come to lie in, give the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch, PagedRows
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.paged_cache import PagedCache
from runtime.ops.cached_attention import cached_attention
from runtime.ops.state import cache_append, state_read, state_write
from runtime.program.shards import StateShard

CPU = torch.device("cpu")
F64 = torch.float64
ROWS, LENGTH, SIZE = 4, 40, 4
STATES = (
    StateShard("s.key", (2, 6), F64, None),
    StateShard("s.value", (2, 5), F64, None),
    StateShard("index", (3,), F64, None),
    StateShard("memory", (2, 3), F64, None, per_token=False),
)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


class Both:
    """The same runs over both caches; blocks are dealt as they are needed, in an order of their own."""

    def __init__(self, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        given: dict[str, Any] = {"max_batch": ROWS, "max_length": LENGTH, "step": LENGTH, "device": CPU}
        self.rows = Cache(STATES, **given, slots=LENGTH)
        blocks = ROWS * LENGTH // SIZE
        self.paged = PagedCache(STATES, blocks=blocks, block_size=SIZE, **given)
        self.free = random.Random(seed).sample(range(blocks), blocks)
        self.tables: dict[int, list[int]] = {row: [] for row in range(ROWS)}
        masked = "mask" in options
        self.options = {"scale": 0.4, **options}
        self.attend = [
            cache.bind(cached_attention, "s", self.options, masked=masked) for cache in (self.rows, self.paged)
        ]

    def begin(self, starts: dict[int, int], counts: dict[int, int]) -> tuple[Batch, list[int]]:
        numbers = sorted(starts)
        for row in numbers:
            while len(self.tables[row]) * SIZE < starts[row] + counts[row]:
                self.tables[row].append(self.free.pop())
        last = torch.tensor([counts[row] for row in numbers])[:, None] - 1
        offsets = torch.arange(max(counts.values())).minimum(last)
        positions = torch.tensor([starts[row] for row in numbers])[:, None] + offsets
        batch = Batch(positions, tuple(starts[r] for r in numbers), tuple(counts[r] for r in numbers))
        tables = tuple(tuple(self.tables[row]) for row in numbers)
        self.rows.begin(batch, rows=slice(numbers[0], numbers[0] + len(numbers)))
        self.paged.begin(batch, rows=PagedRows(tuple(numbers), tables))
        return batch, numbers

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        rows, size = batch.positions.shape
        return draw(rows, 4, size, 6), draw(rows, 2, size, 6), draw(rows, 2, size, 5)


def repeated(x: Tensor, batch: Batch) -> Tensor:
    """What fills a row up is its last token again."""
    index = batch.positions - torch.tensor(batch.starts)[:, None]
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"chunk": 6}, {"softcap": 2.0}, {"kv_map": [0, 1, 1, 1]}, {"sinks": draw(4)}],
    ids=["plain", "window", "chunk", "softcap", "kv_map", "sinks"],
)
def test_runs_of_any_rows(options: dict[str, Any]) -> None:
    given = random.Random(3)
    sinks = options.pop("sinks", None)
    both, lengths = Both(3, **options), dict.fromkeys(range(ROWS), 0)
    for _ in range(25):
        first = given.randrange(ROWS)
        rows = range(first, given.randint(first + 1, ROWS))
        counts = {row: given.choice((1, 1, given.randint(1, 6))) for row in rows}
        if any(lengths[row] + counts[row] > LENGTH for row in rows):
            continue
        batch, numbers = both.begin({row: lengths[row] for row in rows}, counts)
        q, k, v = (repeated(x, batch) for x in both.tokens(batch))
        expected, found = (attend(q, k, v, batch.positions, None, sinks) for attend in both.attend)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for row in numbers:
            lengths[row] += counts[row]


@pytest.mark.parametrize("worth", [0, 6, 1e9])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"kv_map": [0, 1, 1, 1]}, {"sinks": draw(1, 4, 1, 1)}])
def test_packed_rows_and_rows_of_unlike_lengths(options: dict[str, Any], worth: float) -> None:
    """Tokens behind each other, and parts of a batch, give what rows of their own give."""
    given = random.Random(3)
    options = dict(options)
    sinks = options.pop("sinks", None)
    both, lengths = Both(3, **options), dict.fromkeys(range(ROWS), 0)
    both.paged._worth = worth
    for step in range(20):
        rows = range(given.randrange(2), ROWS)
        counts = {row: 1 if step % 2 else given.choice((1, 1, 3, given.randint(1, 6))) for row in rows}
        if any(lengths[row] + counts[row] > LENGTH for row in rows):
            continue
        batch, numbers = both.begin({row: lengths[row] for row in rows}, counts)
        q, k, v = (repeated(x, batch) for x in both.tokens(batch))
        expected = both.attend[0](q, k, v, batch.positions, None, sinks)
        if step % 2 == 0:
            real = [(at, token) for at, count in enumerate(batch.counts) for token in range(count)]
            at, token = (torch.tensor(each) for each in zip(*real, strict=True))
            packed = Batch(batch.positions[at, token][None], batch.starts, batch.counts, packed=True)
            both.paged.begin(packed, rows=PagedRows(tuple(numbers), tuple(tuple(both.tables[row]) for row in numbers)))
            q, k, v = (x[at, :, token].transpose(0, 1)[None] for x in (q, k, v))
            expected = expected[at, :, token].transpose(0, 1)[None]
            batch = packed
        found = both.attend[1](q, k, v, batch.positions, None, sinks)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert both.paged._batch is batch, "the run goes on as a whole"
        for row in numbers:
            lengths[row] += counts[row]
    assert len(both.paged._parts) == {0: ROWS, 6: 2, 1e9: 0}[worth] or worth == 6


@pytest.mark.parametrize("options", [{}, {"window": 5}], ids=["plain", "window"])
def test_a_step_from_fixed_memory_is_a_step(options: dict[str, Any]) -> None:
    both = Both(5, **options)
    prompts = {0: 9, 1: 3, 2: 14}
    batch, numbers = both.begin(dict.fromkeys(prompts, 0), prompts)
    prefix = [repeated(x, batch) for x in both.tokens(batch)]
    for attend in both.attend:
        attend(*prefix, batch.positions)
    ones = dict.fromkeys(prompts, 1)
    batch, numbers = both.begin(prompts, ones)
    q, k, v = both.tokens(batch)
    expected = both.attend[0](q, k, v, batch.positions)
    with pytest.raises(InputError, match="named before"):
        both.paged.begin_fixed(batch.positions, 16)
    both.paged.fix(PagedRows(tuple(numbers), tuple(tuple(both.tables[row]) for row in numbers)), 4)
    filled = [torch.cat([x, torch.zeros_like(x[:1])]) for x in (q, k, v, batch.positions)]
    both.paged.begin_fixed(filled[3], 16)
    found = both.attend[1](*filled)
    torch.testing.assert_close(found[:3], expected, rtol=1e-12, atol=1e-12)
    # and what it has written, the next run reads
    batch, _ = both.begin({row: length + 1 for row, length in prompts.items()}, ones)
    q, k, v = both.tokens(batch)
    expected, found = (attend(q, k, v, batch.positions) for attend in both.attend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_appended_lies_at_its_position_and_rows_share_it() -> None:
    both = Both(7)
    append = both.paged.bind(cache_append, "index", {})
    batch, _ = both.begin({0: 0}, {0: 8})
    x = draw(1, 8, 3)
    append(x, batch.positions, torch.arange(9))
    both.tables[1] = both.tables[0][:1]  # the first four tokens are the same
    batch, _ = both.begin({1: 4}, {1: 1})
    y = draw(1, 1, 3)
    found = append(y, batch.positions, torch.arange(6))
    assert torch.equal(found[0, :4], x[0, :4])
    assert torch.equal(found[0, 4], y[0, 0])
    batch, _ = both.begin({0: 8}, {0: 1})
    assert torch.equal(append(y, batch.positions, torch.arange(10))[0, :8], x[0])


def test_a_state_is_that_of_its_row_and_begins_from_nothing() -> None:
    paged = Both(7).paged
    read, write = paged.bind(state_read, "memory", {}), paged.bind(state_write, "memory", {})

    def run(rows: tuple[int, ...], starts: tuple[int, ...]) -> Tensor:
        positions = torch.tensor(starts)[:, None]
        batch = Batch(positions, starts, (1,) * len(rows), (True,) * len(rows))
        paged.begin(batch, rows=PagedRows(rows, ((0,) * 9,) * len(rows)))
        before = read(positions)
        write(before + 1 + torch.tensor(rows)[:, None, None], torch.ones(len(rows), dtype=torch.bool))
        return before[:, 0, 0]

    assert run((3, 1), (0, 0)).tolist() == [0, 0]
    assert run((1,), (1,)).tolist() == [2]
    assert run((1, 3), (2, 1)).tolist() == [4, 4]
    assert run((3,), (0,)).tolist() == [0], "another sequence"


def test_a_run_says_where_its_rows_lie() -> None:
    both = Both(1)
    batch = Batch(torch.zeros(1, 1, dtype=torch.int64), (0,), (1,))
    with pytest.raises(InputError, match="which rows"):
        both.paged.begin(batch)
    with pytest.raises(InputError, match="no blocks to name"):
        both.rows.begin(batch, rows=PagedRows((0,), ((0,),)))


def test_what_is_cleared_is_zero() -> None:
    both = Both(2)
    batch, _ = both.begin({0: 0}, {0: 5})
    both.attend[1](*both.tokens(batch), batch.positions)
    first, second = both.tables[0]
    both.paged.clear([second])
    assert bool(both.paged.buffers["s.key"][:, first].any())
    assert not bool(both.paged.buffers["s.key"][:, second].any())
