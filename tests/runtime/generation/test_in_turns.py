"""A large piece of prompts as two halves in turn: one sums over the ranks while the other computes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import Plan
from runtime.communication.channels import Channel, Handle
from runtime.generation import steps
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import CacheSize
from tests.support.generated import prompts
from tests.support.partitioned import compiled

LENGTHS = [(9,), (2,), (5, 9, 1), (6, 6)]
FAMILIES = ["llama", "mistral", "mixtral", "falcon_h1", "qwen3_next", "deepseek_v3"]


@pytest.fixture
def in_turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Turns are taken whatever the device and the size; which node of which rank has begun a sum, in order."""
    monkeypatch.setattr(steps, "TURNS_ON", frozenset({"cpu"}))
    monkeypatch.setattr(steps, "TURNS_FROM", 2)
    begun: list[tuple[str, int]] = []
    original = Channel.all_reduce_begin

    def begin(channel: Channel, x: Tensor, *, overwrite: bool = False) -> Handle:
        begun.append((channel.node, channel.rank))
        return original(channel, x, overwrite=overwrite)

    monkeypatch.setattr(Channel, "all_reduce_begin", begin)
    return begun


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_in_turn_say_what_a_whole_piece_says(family: str, tp: int, in_turns: list[tuple[str, int]]) -> None:
    parts, alone = compiled(family, tp), compiled(family, 1)
    for lengths in LENGTHS:
        texts = prompts(family, lengths)
        wanted = alone.generate(texts, max_new_tokens=6, eos_token_id=[], logprobs=True)
        assert not in_turns  # one rank waits for nobody
        found = parts.generate(texts, max_new_tokens=6, eos_token_id=[], logprobs=True)
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-10, atol=1e-10)
        of_rank = [node for node, rank in in_turns if rank == 0]
        assert of_rank
        assert of_rank[0::2] == of_rank[1::2]  # each half's sums stand beside the other's
        in_turns.clear()


def test_many_requests_in_blocks_say_the_same(in_turns: list[tuple[str, int]]) -> None:
    parts = compiled("llama", 2)
    texts = prompts("llama", (9, 3, 12))
    wanted = [compiled("llama", 1).generate([text], max_new_tokens=5, eos_token_id=[])[0].tolist() for text in texts]
    size = CacheSize(max_batch=3, max_length=32)
    found = parts.generate(texts, max_new_tokens=5, eos_token_id=[])
    assert [row[-len(text) - 5 :] for row, text in zip(found.tolist(), texts, strict=True)] == wanted
    assert in_turns
    assert size.max_batch == 3


def test_each_half_is_run_with_what_the_cache_knows_of_it(
    in_turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    texts = prompts("llama", (9,))
    wanted = compiled("llama", 1).generate(texts, max_new_tokens=6, eos_token_id=[])
    monkeypatch.setattr(Cache, "resume", lambda self, run: None)
    found: Any = compiled("llama", 2).generate(texts, max_new_tokens=6, eos_token_id=[])
    assert not torch.equal(found, wanted)


def test_small_pieces_and_single_tokens_take_no_turns(
    in_turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TURNS_FROM", 100)
    compiled("llama", 2).generate(prompts("llama", (9,)), max_new_tokens=6, eos_token_id=[])
    assert not in_turns


def test_on_a_cpu_turns_are_left_to_who_has_another_processor_for_sums() -> None:
    assert {"cuda"} == steps.TURNS_ON
    assert Plan(tp=2).tp == 2
