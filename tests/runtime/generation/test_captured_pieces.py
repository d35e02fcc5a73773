"""Pieces of prompts that come again are replayed, and say what they say node by node."""

import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from partitioner import Plan, partition
from runtime.communication.thread_communicator import ThreadCommunicator
from runtime.execution.prompts import agreed_ways, captured_pieces, piece
from runtime.execution.prompts.captured_pieces import asks_host
from runtime.execution.prompts.piece import places
from runtime.generation import steps
from runtime.generation.steps import Steps
from tests.runtime.generation.replayed import Replayed, capturing_prompts, replaying
from tests.support import zoo
from tests.support.partitioned import compiled

OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": [], "logprobs": True}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replayed]]:
    """What is captured, whatever the device and the communicator."""
    monkeypatch.setattr(piece, "_LEAST_PLACES", 12)
    with capturing_prompts() as found:
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


@pytest.mark.slow
def test_experts_of_a_replayed_piece_are_those_of_its_own_tokens(
    graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that fill a piece's places, and shorter ones, whose last token stands there more than once."""
    # the host is asked here, where it computes: what is replayed runs anew
    ours = captured_pieces._OURS | captured_pieces._OF_EXPERTS
    plain = compiled("mixtral", 1)
    given = [texts(length, seed=seed) for seed, length in enumerate((12, 9, 12, 7, 11))]
    wanted = [plain.generate(each, **OPTIONS) for each in given]
    assert not graphs
    monkeypatch.setattr(captured_pieces, "_OURS", ours)
    parts = compiled("mixtral", 1)
    for each, one in zip(given, wanted, strict=True):
        assert_alike(parts.generate(each, **OPTIONS), one)
    assert [graph.count for graph in graphs] == [3]


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
    assert [graph.count for graph in graphs] == [0, 2], "what comes again is captured at once in another cache"


def captured_as(key: int, *, pieces: captured_pieces.CapturedPieces) -> str:
    """How a piece of this key runs."""
    ran: list[str] = []

    def runnable(how: str) -> captured_pieces.Runnable:
        def run() -> torch.Tensor:
            ran.append(how)
            return torch.zeros(())

        return captured_pieces.Runnable([], lambda: None, run, lambda: torch.ones(()))

    found = pieces(
        key, place=None, first=lambda: runnable("node by node"), again=lambda: runnable("about to be captured"),
        varying=list,
    )  # fmt: skip
    return ran[0] if ran else f"replayed {found.item():g}"


def all_captured() -> captured_pieces.CapturedPieces:
    return captured_pieces.CapturedPieces(lambda run: (SimpleNamespace(replay=lambda: None, reset=lambda: None), run()))


def test_what_came_most_often_stays_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_pieces, "MOST", 2)
    pieces = all_captured()
    nodes, about, replayed = "node by node", "about to be captured", "replayed 1"
    for keys, wanted in (
        ([1, 2, 3], [nodes] * 3),
        ([1, 2, 3], [about, about, nodes]),
        ([1, 2, 3, 1, 2, 3], [replayed, replayed, nodes] * 2),  # three in turn do not push each other out
        ([3, 3, 3], [nodes, about, replayed]),  # 3 has come more often than 1 by now
        ([1, 2], [nodes, replayed]),
    ):
        assert [captured_as(key, pieces=pieces) for key in keys] == wanted


def test_what_came_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_pieces, "MOST", 1)
    monkeypatch.setattr(captured_pieces, "MOST_REMEMBERED", 4)
    pieces = all_captured()
    for _ in range(9):
        captured_as(1, pieces=pieces)
    for key in range(10, 30):
        assert captured_as(key, pieces=pieces) == "node by node"
    assert len(pieces._came) <= 4 + 1
    assert [captured_as(2, pieces=pieces) for _ in range(3)][-1] == "replayed 1"


def test_another_place_is_captured_anew() -> None:
    reset: list[int] = []
    made = itertools.count()

    def capture(run: Any) -> Any:
        number = next(made)
        return SimpleNamespace(replay=lambda: None, reset=lambda: reset.append(number)), run()

    pieces = captured_pieces.CapturedPieces(capture)
    once = lambda: captured_pieces.Runnable([], lambda: None, lambda: torch.zeros(()), lambda: torch.ones(()))  # noqa: E731
    for place in (1, 1, 1, 2, 2):
        pieces(0, place=place, first=once, again=once, varying=list)
    assert reset == [0]
    assert next(made) == 2


def test_ranks_compare_nothing_while_they_capture(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """What they would say to each other comes from the host, which no graph reads."""
    told: list[bool] = []
    monkeypatch.setattr(ThreadCommunicator, "begin_run", lambda self, *, new_shapes: told.append(new_shapes))
    captured_when: list[bool] = []
    original = steps.captured

    def captured(run: Any, pool: Any) -> Any:
        captured_when.append(told[-1])
        return original(run, pool)

    monkeypatch.setattr(steps, "captured", captured)
    parts = compiled("llama", 1)
    for seed in range(3):
        parts.generate(texts(9, seed=seed), **OPTIONS)
    assert True in told  # the run before it is compared
    assert captured_when == [False]


LENGTHS = [(9,), (7,), (9,), (4,), (8,), (1,)]


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_captured_piece_serves_shorter_ones(
    in_turns: bool, graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_turns:
        monkeypatch.setattr(steps, "TURNS_ON", frozenset({"cpu"}))
        monkeypatch.setattr(steps, "CAPTURED_TURNS_FROM", 6)
    parts = compiled("llama", 2 if in_turns else 1)
    for seed, lengths in enumerate(LENGTHS):
        given = texts(*lengths, seed=seed)
        assert_alike(parts.generate(given, **OPTIONS), node_by_node(given, **OPTIONS))
    if in_turns:  # two ranks; the halves of 12 places, and of up to 5 tokens the whole, which come twice
        assert [graph.count for graph in graphs] == [2, 2, 0, 0]
    else:
        assert [graph.count for graph in graphs] == [4]


def test_rows_of_any_lengths_have_the_same_places(graphs: list[Replayed]) -> None:
    parts = compiled("llama", 1)
    for seed, lengths in enumerate([(5, 9, 1), (9, 9, 9), (1, 2, 8), (9, 1, 3)]):
        given = texts(*lengths, seed=seed)
        assert_alike(parts.generate(given, **OPTIONS), node_by_node(given, **OPTIONS))
    assert [graph.count for graph in graphs] == [2]


def test_a_shorter_piece_ends_at_its_own_last_token(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(steps, "last_of", lambda parts, last: [[8]] * len(parts))
    parts = compiled("llama", 1)
    found = [parts.generate(texts(*lengths, seed=0), **OPTIONS) for lengths in [(9,), (9,), (6,)]]
    wanted = node_by_node(texts(6, seed=0), **OPTIONS)
    assert not torch.allclose(found[2].logprobs, wanted.logprobs)


@pytest.mark.slow
def test_windows_have_no_places_for_more(graphs: list[Replayed]) -> None:
    parts = compiled("gemma3_text", 1)
    alone = compiled("gemma3_text", 1)
    for seed, length in enumerate([9, 9, 8, 8, 8, 9]):
        given = texts(length, seed=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "CAPTURED_ON", frozenset())
            wanted = alone.generate(given, **OPTIONS)
        assert_alike(parts.generate(given, **OPTIONS), wanted)
    assert [graph.count for graph in graphs] == [1, 1]


@pytest.mark.parametrize(
    ("tokens", "found"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (2049, 2112), (4096, 4096), (4097, 4224)]
)
def test_places(tokens: int, found: int) -> None:
    assert places(tokens) == found


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
    assert asks_host(compiled(name, 1).entry("prefill", 0), torch.device("cpu")) == asks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "has_kernel", "asks"),
    [(torch.bfloat16, True, False), (torch.float32, True, True), (torch.bfloat16, False, True)],
)
def test_experts_ask_for_their_rows_unless_torch_takes_all_at_once(
    dtype: torch.dtype, has_kernel: bool, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured_pieces, "multiplies_at_once", lambda device: has_kernel)
    program = partition(zoo.tiny("qwen3_moe")[0].to(dtype), Plan(tp=2, ep=2)).entry("prefill", 0)
    assert asks_host(program, torch.device("cuda")) == asks


def test_ranks_that_meet_on_the_host_capture_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CAPTURED_ON", frozenset({"cpu"}))
    with replaying() as graphs:
        parts = compiled("llama", 2)
        for seed in range(3):
            parts.generate(texts(9, seed=seed), **OPTIONS)
    assert not graphs


def test_without_memory_to_spare_nothing_is_captured(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "can_spare", lambda *given, **options: False)
    parts = compiled("llama", 1)
    for seed in range(3):
        given = texts(9, seed=seed)
        assert_alike(parts.generate(given, **OPTIONS), node_by_node(given, **OPTIONS))
    assert not graphs


def test_room_is_asked_for_what_comes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's pieces would have to be millions of tokens long to keep a GPU busy."""
    asked: list[int] = []
    monkeypatch.setattr(steps, "CAPTURED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(steps, "can_spare", lambda *given, rows: asked.append(rows) or True)
    compiled("llama", 1).generate(texts(9, seed=0), **OPTIONS)
    assert 0 < max(asked) < 1000


def test_ranks_with_uneven_parts_do_the_same(graphs: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    """From how many tokens on a piece keeps a GPU busy depends on what a rank multiplies."""
    own, found = [], []
    alone, init = agreed_ways.turns_from, Steps.__init__

    def told(program: Any) -> int:
        own.append(alone(program))
        return own[-1]

    def made(each: Steps, *given: Any, **named: Any) -> None:
        init(each, *given, **named)
        found.append(each._turns_from)

    monkeypatch.setattr(agreed_ways, "turns_from", told)
    monkeypatch.setattr(Steps, "__init__", made)
    compiled("llama", 3).generate(texts(9, seed=0), **OPTIONS)
    assert len(set(own)) > 1
    assert set(found) == {max(own)}
