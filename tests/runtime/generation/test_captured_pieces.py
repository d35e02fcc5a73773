"""Pieces of prompts that come again are replayed, and say what they say node by node."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from runtime.communication.thread_communicator import ThreadCommunicator
from runtime.execution.prompts import captured_pieces
from runtime.execution.prompts.captured_pieces import asks_host
from runtime.generation import steps
from tests.runtime.generation.replayed import Replayed, replaying
from tests.support.partitioned import compiled

OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": [], "logprobs": True}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replayed]]:
    """What is captured, whatever the device and the communicator."""
    monkeypatch.setattr(steps, "CAPTURED_ON", frozenset({"cpu"}))
    original = ThreadCommunicator.__init__

    def made(communicator: ThreadCommunicator, *given: Any) -> None:
        original(communicator, *given)
        communicator.can_be_captured = True

    monkeypatch.setattr(ThreadCommunicator, "__init__", made)
    with replaying() as found:
        yield found


def texts(*lengths: int, seed: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 60, (length,), generator=drawn).tolist() for length in lengths]


@functools.cache
def alone() -> Any:
    return compiled("llama", 1)


def node_by_node(given: list[list[int]], **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "CAPTURED_ON", frozenset())
        return alone().generate(given, **options)


def assert_alike(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [pytest.param((9,), marks=pytest.mark.slow), (5, 9, 1)])
def test_a_piece_that_comes_again_is_replayed(lengths: tuple[int, ...], graphs: list[Replayed]) -> None:
    parts = compiled("llama", 1)
    for seed in range(4):
        given = texts(*lengths, seed=seed)
        assert_alike(parts.generate(given, **OPTIONS), node_by_node(given, **OPTIONS))
        assert [graph.count for graph in graphs] == [[], [0], [1], [2]][seed]


def test_pieces_of_other_sizes_and_places_are_others(graphs: list[Replayed]) -> None:
    parts = compiled("llama", 1)
    for seed in range(3):
        given = texts(10, seed=seed)
        wanted = node_by_node(given, **OPTIONS)
        assert_alike(parts.generate(given, prefill_step=4, **OPTIONS), wanted)
    assert [graph.count for graph in graphs] == [1, 1, 1]  # 4, 4 behind these, and 2


def test_halves_in_turn_are_replayed_with_what_both_read(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "TURNS_ON", frozenset({"cpu"}))
    monkeypatch.setattr(steps, "CAPTURED_TURNS_FROM", 4)
    parts = compiled("llama", 2)
    for seed in range(4):
        given = texts(9, seed=seed)
        wanted = node_by_node(given, **OPTIONS)
        assert_alike(parts.generate(given, **OPTIONS), wanted)
    assert [graph.count for graph in graphs] == [2, 2]  # of two ranks


def test_a_replay_reads_the_tokens_of_its_own_piece(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(steps.Steps, "_ids", lambda self, piece, size: torch.full((1, size), 7))
    parts = compiled("llama", 1)
    found = [parts.generate(texts(9, seed=seed), **OPTIONS) for seed in range(3)]
    assert graphs
    monkeypatch.undo()
    wanted = node_by_node(texts(9, seed=2), **OPTIONS)
    assert not torch.allclose(found[2].logprobs, wanted.logprobs)


@pytest.mark.slow
def test_a_longer_text_captures_anew(graphs: list[Replayed]) -> None:
    parts = compiled("llama", 1)
    for seed, new in enumerate([3, 3, 80, 80, 80]):  # another cache
        given, options = texts(9, seed=seed), {**OPTIONS, "max_new_tokens": new}
        assert_alike(parts.generate(given, **options), node_by_node(given, **options))
    assert [graph.count for graph in graphs] == [0, 1]


@pytest.mark.slow
def test_the_pieces_that_came_last_stay_captured(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_pieces, "MOST", 2)
    parts = compiled("llama", 1)
    lengths = [6, 4, 4, 5, 5, 4, 6, 4, 5]  # the longest first: a longer one has another cache
    for seed, length in enumerate(lengths):
        given = texts(length, seed=seed)
        assert_alike(parts.generate(given, **OPTIONS), node_by_node(given, **OPTIONS))
    assert [graph.count for graph in graphs] == [2, 0, 0, 0]  # 4, 5, 6 in the place of 5, and 5 anew


def test_what_cannot_be_captured_runs_all_the_same(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(run: Any, pool: Any) -> Any:
        raise RuntimeError("out of memory\nor so")

    monkeypatch.setattr(steps, "captured", refused)
    parts = compiled("llama", 1)
    for seed in range(4):
        given = texts(9, seed=seed)
        assert_alike(parts.generate(given, **OPTIONS), node_by_node(given, **OPTIONS))
    told = [record.message for record in caplog.records if "node by node" in record.message]
    assert told == ["pieces of prompts run node by node: out of memory"]


@pytest.mark.slow
def test_a_profile_sees_every_node(graphs: list[Replayed]) -> None:
    parts = compiled("llama", 1)
    for seed in range(3):
        parts.generate(texts(9, seed=seed), **OPTIONS)
    (graph,) = graphs
    with parts.profile() as trace:
        parts.generate(texts(9, seed=3), **OPTIONS)
    assert graph.count == 1
    assert any("linear" in str(event) for event in trace.events())


@pytest.mark.parametrize(
    ("name", "asks"),
    [("llama", False), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("gpt2", False), ("mixtral", True)))],
)
def test_which_programs_ask_the_host(name: str, asks: bool) -> None:
    assert asks_host(compiled(name, 1).entry("prefill", 0)) == asks


def test_ranks_that_meet_on_the_host_capture_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CAPTURED_ON", frozenset({"cpu"}))
    with replaying() as graphs:
        parts = compiled("llama", 2)
        for seed in range(3):
            parts.generate(texts(9, seed=seed), **OPTIONS)
    assert not graphs
