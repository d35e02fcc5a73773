"""A large piece of prompts as two halves in turn: one sums over the ranks while the other computes."""

import pytest
import torch
from torch import Tensor

from runtime.communication.channels import Channel, Handle
from runtime.generation import steps
from runtime.generation.batching import places
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import CacheSize
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import assert_as_alone, mixed, on_all_ranks
from tests.support import stepping
from tests.support.generated import prompts
from tests.support.partitioned import compiled

LENGTHS = [(9,), (2,), (5, 9, 1), (6, 6)]
SLOW = ["mistral", "mixtral", "deepseek_v3"]


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


@pytest.mark.parametrize("tp", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2_moe", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def test_states_of_sequences_follow_the_halves(name: str, in_turns: list[tuple[str, int]]) -> None:
    assert stepping.error(name, stepping.compiled_in_pieces(name, 2)) < 1e-9
    assert in_turns


def test_many_requests_in_blocks_say_the_same(in_turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "why_not_packed", lambda *given: "not here")  # what is packed has no halves
    cases = mixed(8, longest=20, new=6)
    alone = many_requests.alone(compiled("llama", 1), cases)
    assert not in_turns
    found = on_all_ranks(compiled("llama", 2), cases, CacheSize(max_batch=4, max_length=64, prefill_step=8))
    assert in_turns
    assert_as_alone(cases, found, alone)


def test_each_half_is_run_with_what_the_cache_knows_of_it(
    in_turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(Cache, "resume", lambda self, run: None)
    texts = prompts("llama", (8,))  # halves of one length, which only their places tell apart
    wanted = compiled("llama", 1).generate(texts, max_new_tokens=6, eos_token_id=[], logprobs=True)
    found = compiled("llama", 2).generate(texts, max_new_tokens=6, eos_token_id=[], logprobs=True)
    assert not torch.allclose(found.logprobs[:, :1], wanted.logprobs[:, :1])


def test_small_pieces_and_single_tokens_take_no_turns(
    in_turns: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TURNS_FROM", 100)
    compiled("llama", 2).generate(prompts("llama", (9,)), max_new_tokens=6, eos_token_id=[])
    assert not in_turns
