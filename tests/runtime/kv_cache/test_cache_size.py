"""Caches sized beforehand: what fits into so much memory, on all ranks the same; tasks that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from partitioner import CacheSize, Plan, partition
from partitioner.errors import InputError
from runtime.kv_cache import cache_size
from runtime.kv_cache import device_memory as memory
from runtime.kv_cache.device_memory import Amount
from tests.support import stepping, zoo
from tests.support.generated import prompts
from tests.support.partitioned import compiled

STEPS = ("mamba2", "jamba", "gpt_neox_japanese")
"""Models traced with their own cache."""
MEMINFO = "MemTotal:       2000 kB\nMemAvailable:    1000 kB\n"


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("gemma2", 2),
        ("mamba2", 2),
        ("gpt_neox_japanese", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("gemma2", "mamba2")),
        *(pytest.param(name, tp, marks=pytest.mark.slow) for name in ("llama", "jamba") for tp in (1, 2)),
        pytest.param("gpt_neox_japanese", 2, marks=pytest.mark.slow),
    ],
)
def test_what_fits_is_the_most_that_does(name: str, tp: int) -> None:
    parts = (stepping.compiled if name in STEPS else compiled)(name, tp)
    sizes = {"max_batch": 3, "prefill_step": 4}
    room = max(parts.cache_bytes(max_length=40, **sizes)) + 1
    for rank, fits in enumerate(parts.tokens_that_fit(room, **sizes)):
        if fits is None:
            assert name == "mamba2", "only a state per sequence does not grow"
            continue
        assert fits >= 40
        assert parts.cache_bytes(max_length=fits, **sizes)[rank] <= room
        assert parts.cache_bytes(max_length=fits + 1, **sizes)[rank] > room
    assert parts.tokens_that_fit(1, **sizes) == [0] * tp
    assert parts.tokens_that_fit(f"{room} B", **sizes) == parts.tokens_that_fit(room, **sizes)


def test_no_more_fits_than_the_model_takes() -> None:
    parts = compiled("gpt2", 1)
    limit = cache_size.longest_text(parts.entry("decode", 0))
    assert limit is not None
    assert parts.tokens_that_fit("1 TB") == [limit]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_cache_sized_by_memory_serves_what_it_says_and_nothing_longer(tp: int) -> None:
    parts = partition(zoo.tiny("llama")[0], Plan(tp=tp))
    text = prompts("llama", (5,))
    expected = parts.generate(text, max_new_tokens=8, eos_token_id=[])
    room = parts.cache_bytes(max_batch=1, max_length=40)
    said = parts.reserve(CacheSize(memory=max(room)))
    assert said.tokens == 40
    assert str(said).startswith("40 tokens fit in ")
    held = [engine._generate_loop.cache for engine in parts._simulator.engines]
    assert [cache.bytes for cache in held] == room
    assert torch.equal(parts.generate(text, max_new_tokens=8, eos_token_id=[]), expected)
    assert parts.generate(text, max_new_tokens=36, eos_token_id=[]).shape == (1, 41)
    assert [engine._generate_loop.cache for engine in parts._simulator.engines] == held
    with pytest.raises(InputError, match=r"holds 1 sequences of 40 tokens; this task needs 1 of 41.*40 tokens fit in"):
        parts.generate(text, max_new_tokens=37, eos_token_id=[])
    with pytest.raises(InputError, match=r"needs 2 of 6, .*fewer or shorter prompts"):
        parts.generate(text * 2, max_new_tokens=2, eos_token_id=[])


def test_prompts_run_in_pieces_that_the_cache_was_made_for() -> None:
    parts = partition(zoo.tiny("gemma2")[0], Plan(tp=1))
    text = prompts("gemma2", (23,))
    expected = parts.generate(text, max_new_tokens=8, eos_token_id=[])
    parts.reserve(CacheSize(max_length=30, prefill_step=5))
    assert torch.equal(parts.generate(text, max_new_tokens=8, eos_token_id=[], prefill_step=16), expected)


def test_a_state_that_does_not_grow_has_room_for_any_text() -> None:
    parts = stepping.parts_of(stepping.compiled("mamba2", 2).program_of("decode"))  # with engines of its own
    said = parts.reserve(CacheSize(max_batch=2, memory="1 MB"))
    assert said.tokens is None
    assert str(said) == "a text of any length fits in 1 MB"
    assert parts.generate([[5, 6], [7]], max_new_tokens=70, eos_token_id=[]).shape == (2, 72)


def test_ranks_that_share_memory_get_even_shares_and_agree_on_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = partition(zoo.tiny("llama")[0], Plan(tp=2))
    each = max(parts.cache_bytes(max_batch=1, max_length=50))
    monkeypatch.setattr(cache_size, "free_bytes", lambda device: 4 * each + 8)
    assert parts.reserve(CacheSize(memory="0.5 of free")).tokens == 50
    # elsewhere: two machines, one of which has less
    import threading

    def two_machines(device: torch.device) -> int:
        return int(threading.current_thread().name.removeprefix("rank "))

    monkeypatch.setattr(cache_size, "_number_of", two_machines)
    monkeypatch.setattr(cache_size, "free_bytes", lambda device: each * (1 + two_machines(device)))
    assert parts.reserve(CacheSize(memory="1 of free")).tokens == 50


def test_a_task_that_does_not_fit_into_free_memory_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = partition(zoo.tiny("llama")[0], Plan(tp=2))
    room = 2 * max(parts.cache_bytes(max_batch=1, max_length=20))
    monkeypatch.setattr(cache_size, "free_bytes", lambda device: room)
    assert parts.generate([[5, 6, 7]], max_new_tokens=18, eos_token_id=[]).shape == (1, 21)
    with pytest.raises(InputError, match=r"one sequence of 21 tokens.* does not fit: 20 tokens fit in .*more ranks"):
        parts.generate([[5, 6, 7]], max_new_tokens=19, eos_token_id=[])
    with pytest.raises(InputError, match="0 tokens in each of 900 sequences fit"):
        parts.reserve(CacheSize(max_batch=900, max_length=20))
    monkeypatch.setattr(cache_size, "free_bytes", lambda device: None)
    assert parts.generate([[5, 6, 7]], max_new_tokens=19, eos_token_id=[]).shape == (1, 22)
    with pytest.raises(InputError, match="does not say how much of 'cpu' is free"):
        parts.reserve(CacheSize(memory="0.9 of free"))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({}, "give max_length, or memory"),
        ({"max_length": 0}, "max_length must be a whole number"),
        ({"max_batch": True, "max_length": 3}, "max_batch must be"),
        ({"memory": "much"}, "such as \"0.9 of free\"; got 'much'"),
        ({"memory": "1.5 of free"}, "an amount of memory"),
        ({"memory": "0.0 GB"}, "an amount of memory"),
        ({"memory": -1}, "an amount of memory"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(size, says) -> None:
    with pytest.raises(InputError, match=says):
        CacheSize(**size)


def test_amounts() -> None:
    assert Amount.of("1.5 GB").bytes == 1_500_000_000
    assert Amount.of("2 MiB").bytes == 2 * 2**20
    assert Amount.of("0.25 of free").within(1000) == 250
    assert Amount.of(7).within(None) == 7


def test_free_memory_is_what_the_kernel_and_the_groups_leave(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert memory._available(tmp_path / "meminfo") == 1000 * 1024
    own, root = tmp_path / "cgroup", tmp_path / "groups"
    own.write_text("0::/outer/inner\n")
    assert memory._left_by_cgroups(own, root) is None
    inner, outer = root / "outer/inner", root / "outer"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("100\n")
    assert memory._left_by_cgroups(own, root) is None, "no limit"
    (outer / "memory.max").write_text("1000\n")
    (outer / "memory.current").write_text("700\n")
    (outer / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._left_by_cgroups(own, root) == 450
    own.write_text("5:cpu,memory:/a\n4:pids:/a\n")
    (root / "memory").mkdir()
    (root / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "memory/memory.usage_in_bytes").write_text("5\n")
    assert memory._left_by_cgroups(own, root) is None, "version 1 says no limit by a number"
    (root / "memory/memory.limit_in_bytes").write_text("50\n")
    assert memory._left_by_cgroups(own, root) == 45


def test_this_machine_says_what_is_free() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
