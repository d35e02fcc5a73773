"""What a cache does for the ops of step graphs: by position, by row, and from nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.sharded_slots import cache_bytes
from runtime.ops.state import cache_append, position_mask, rows_at, state_read, state_write
from runtime.program.shards import StateShard

KEYS = StateShard("keys", (2, 3), torch.float64, None)
INDEX = StateShard("index", (3,), torch.float64, None)
MEMORY = StateShard("memory", (4, 5), torch.float64, None, per_token=False)


def cache(**sizes: int) -> Cache:
    given = {"max_batch": 2, "max_length": 6, "step": 3, "slots": 7, **sizes}
    return Cache([KEYS, INDEX, MEMORY], device=torch.device("cpu"), **given)


def batch(starts: tuple[int, ...], counts: tuple[int, ...], active: tuple[bool, ...] = ()) -> Batch:
    last = torch.tensor(counts)[:, None] - 1
    positions = torch.tensor(starts)[:, None] + torch.arange(max(counts)).minimum(last)
    return Batch(positions, starts, counts, active)


def tokens(shape: tuple[int, ...], value: int) -> Tensor:
    return torch.full(shape, float(value), dtype=torch.float64)


@pytest.mark.parametrize(("state", "shape"), [("keys", (2, 2, 2, 3)), ("index", (2, 2, 3))])
def test_what_is_appended_lies_at_its_position(state: str, shape: tuple[int, ...]) -> None:
    held = cache()
    append: Callable[..., Tensor] = held.bind(cache_append, state, {})
    held.begin(batch((0, 0), (2, 2)))
    assert append(tokens(shape, 1), None, torch.arange(4)).shape == (*shape[:-2], 4, 3)
    run = batch((2, 1), (2, 1))  # the second row is filled up
    held.begin(run)
    x = tokens(shape, 2)
    x[0, ..., 1, :] = 3
    found = append(x, run.positions, torch.arange(6))
    assert found[0].reshape(-1, 6, 3)[0, :, 0].tolist() == [1, 1, 2, 3, 0, 0]
    assert found[1].reshape(-1, 6, 3)[0, :, 0].tolist() == [1, 2, 0, 0, 0, 0]


def test_a_state_is_replaced_for_active_rows_only() -> None:
    held = cache()
    read, write = held.bind(state_read, "memory", {}), held.bind(state_write, "memory", {})
    held.begin(batch((0, 0), (1, 1), (True, True)))
    before = read(torch.zeros(2, 1))
    write(tokens((2, 4, 5), 1), torch.tensor([True, True]))
    assert before.sum() == 0  # whoever has read it still has what it was
    held.begin(batch((1, 0), (1, 1), (True, False)))
    write(tokens((2, 4, 5), 2), torch.tensor([True, False]))
    assert read(torch.zeros(2, 1))[:, 0, 0].tolist() == [2, 1]
    held.start()
    assert read(torch.zeros(2, 1)).sum() == 0
    held.begin(batch((0,), (1,)))
    write(tokens((1, 4, 5), 3), torch.tensor([True]))
    held.start()
    held.begin(batch((0, 0), (1, 1)))
    assert read(torch.zeros(2, 1)).shape == (2, 4, 5)  # a smaller batch leaves no smaller state behind


def test_groups_of_rows_take_turns_in_one_cache() -> None:
    """What each group of two rows sees is what it would see in a cache of its own."""
    together = Cache([KEYS, INDEX, MEMORY], max_batch=4, max_length=6, step=2, device=torch.device("cpu"))
    groups = [(slice(0, 2), cache()), (slice(2, 4), cache())]
    generator = torch.Generator().manual_seed(0)
    for held in (together, groups[0][1], groups[1][1]):
        held.start()
    for start in (0, 2):
        for rows, alone in groups:
            run = batch((start, start // 2), (2, 1 + start // 2))
            x = torch.randn(2, 2, 2, 3, generator=generator, dtype=torch.float64)
            value = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
            said = []
            for held, where in ((together, rows), (alone, None)):
                held.begin(run, rows=where)
                keys = held.bind(cache_append, "keys", {})(x, run.positions, torch.arange(6)).clone()
                before = held.bind(state_read, "memory", {})(torch.zeros(2, 1))
                kept = before.clone()
                held.bind(state_write, "memory", {})(value, torch.tensor([True, True]))
                assert torch.equal(before, kept)  # whoever has read it still has what it was
                said.append((keys, before))
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(*said, strict=True))
    together.start(slice(2, 4))
    assert together.buffers["keys"][:2].abs().sum() > 0
    assert together.buffers["keys"][2:].abs().sum() == 0
    assert together.buffers["memory"][2:].abs().sum() == 0
    with pytest.raises(InputError, match="cannot use the rows 3 to 5"):
        together.begin(batch((0, 0, 0), (1, 1, 1)), rows=slice(3, 5))


def test_bytes_are_those_of_the_buffers() -> None:
    sizes = {"max_batch": 2, "max_length": 7, "step": 3}
    assert cache(max_length=7).bytes == cache_bytes([KEYS, INDEX, MEMORY], **sizes)


def test_a_mask_by_position_hides_slots_without_a_token() -> None:
    positions = torch.tensor([[0, 1], [3, 3]])
    mask = position_mask(positions, torch.arange(5), dtype=torch.float32, causal=True)
    assert (mask[:, 0] == 0).int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
    ]
    window = position_mask(positions, torch.arange(5), dtype=torch.float32, causal=True, window=2)
    assert (window[1, 0, 0] == 0).int().tolist() == [0, 0, 1, 1, 0]
    padded = position_mask(positions, torch.arange(5), torch.tensor([[0, 1, 1, 1, 1]] * 2), dtype=torch.float32)
    assert (padded[0, 0, 0] == 0).int().tolist() == [0, 1, 1, 1, 1]


def test_rows_of_a_table_by_position() -> None:
    table = torch.arange(2 * 5 * 3).view(1, 2, 5, 3)
    positions = torch.tensor([[0, 4], [2, 2], [1, 3]])
    found = rows_at(table, positions, 2)
    assert found.shape == (3, 2, 2, 3)
    for row, where in enumerate(positions.tolist()):
        assert torch.equal(found[row], table[0][:, where])


def test_ops_without_a_cache_say_so() -> None:
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(
        InputError, match=r"cache_append of 'keys' is not bound to a cache: run the rank through Engine"
    ):
        cache_append(x, torch.zeros(1, 1), torch.zeros(1), state="keys")
    with pytest.raises(InputError, match="state_read of 'memory' is not bound"):
        state_read(x, state="memory", shape=[1], dtype=torch.float32)
    with pytest.raises(InputError, match="state_write of 'memory' is not bound"):
        state_write(x, torch.ones(1, dtype=torch.bool), state="memory")
