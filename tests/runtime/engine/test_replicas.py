"""Rows dealt to replicas, their steps put together, and results told through a launcher's store."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from partitioner import Plan
from partitioner.errors import InputError, RankLost
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import Meeting
from runtime.engine.replicas import ReplicaResults, deal, merged
from runtime.generation.generation_request import Generated, Step
from runtime.processes.heartbeat import Heartbeat
from runtime.processes.place import Place
from tests.support.generated import prompts
from tests.support.partitioned import compiled


def test_the_longest_first_to_the_least_loaded() -> None:
    assert deal([5, 9, 1, 7], replicas=2) == [[1, 2], [0, 3]]
    assert deal([5, 9, 1, 7], replicas=2, loads=[100, 0]) == [[], [0, 1, 2, 3]]
    assert deal([4], replicas=3) == [[0], [], []]
    assert deal([], replicas=2) == [[], []]


@given(st.lists(st.integers(1, 999), max_size=40), st.integers(1, 9))
def test_every_row_once_and_no_replica_far_ahead(work: list[int], replicas: int) -> None:
    dealt = deal(work, replicas=replicas)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(work)))
    loads = [sum(work[row] for row in rows) for rows in dealt]
    assert max(loads) - min(loads) <= max(work, default=0)
    assert dealt == deal(tuple(work), replicas=replicas)


def test_a_row_whose_replica_has_no_more_steps_has_ended() -> None:
    a = [Step((1, 2), None), Step((None, 3), None)]
    b = [Step((4,), None)]
    assert merged([a, b], [[0, 2], [1]]) == [Step((1, 4, 2), None), Step((None, None, 3), None)]
    assert merged([[], []], [[], []]) == []
    scored = merged([[Step((1,), (-0.5,))], []], [[0], []])
    assert scored == [Step((1,), (-0.5,))]


@functools.cache
def parts_of(plan: str) -> Any:
    asked = Plan.parse(plan)
    return compiled("llama", asked.tp, dp=asked.dp, pp=asked.pp)


@pytest.mark.parametrize("plan", ["dp=2", "dp=3,pp=2"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "do_sample": True, "seed": 3, "logprobs": True},
        {"max_length": 12},
        {"min_length": 10, "max_new_tokens": 6, "eos_token_id": [3, 16]},
    ],
    ids=["greedy", "sampled", "max_length", "min_length"],
)
def test_simulated_replicas_say_what_one_says(plan: str, options: dict[str, Any]) -> None:
    """Options that count from the width of the whole batch, too, in which rows of other replicas may be the longest."""
    texts = prompts("llama", (4, 7, 2, 5, 3))
    given_options = {"eos_token_id": [], **options}
    asked = Plan.parse(plan)
    alone, many = parts_of("dp=1"), parts_of(plan)
    assert many.replicas == asked.dp
    found, expected = many.generate(texts, **given_options), alone.generate(texts, **given_options)
    if isinstance(found, Generated):
        torch.testing.assert_close(found.logprobs, expected.logprobs)
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    steps = [step.tokens for step in many.stream(texts, **given_options)]
    assert steps == [step.tokens for step in alone.stream(texts, **given_options)]


def test_tokens_depend_on_which_row_of_all_they_are() -> None:
    """The control: without the rows' own numbers, a replica would draw other noise."""
    texts = prompts("llama", (4, 4, 4, 4))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "temperature": 5.0, "eos_token_id": []}
    parts = parts_of("dp=1")
    all_rows = parts.generate(texts, **options)
    assert not torch.equal(parts.generate(texts[2:], **options), all_rows[2:])
    assert torch.equal(parts.generate(texts[2:], request_ids=[2, 3], **options), all_rows[2:])


def test_whole_texts_are_run_by_every_replica() -> None:
    parts = compiled("llama", 2, dp=2)
    results = parts.simulate_ranks(input_ids=torch.tensor([[3, 4, 5]]))
    assert len(results) == 4
    assert all(torch.equal(each, results[0]) for each in results[1:])


def test_a_replica_that_fails_lets_the_others_finish() -> None:
    parts = parts_of("dp=2")
    first, second = parts._simulators
    done = []
    run = second.run
    second.run = lambda work: done.append(run(work)) or done[-1]  # type: ignore[method-assign]
    first.run = lambda work: (_ for _ in ()).throw(RankLost("rank 0 is lost"))  # type: ignore[method-assign]
    try:
        with pytest.raises(RankLost, match="rank 0 is lost") as raised:
            parts.generate(prompts("llama", (4, 7)), max_new_tokens=2)
    finally:
        del first.run, second.run
    assert raised.value.__notes__ == ["replica 0"]
    assert len(done[0][0]) == 2


def meetings(store: HashStore, replicas: int) -> list[Meeting]:
    mesh = Mesh.of()
    own = [Heartbeat(0, 1, key=b"") for _ in range(replicas)]
    return [Meeting(Place(mesh, 0, number, replicas), 0, store, own[number]) for number in range(replicas)]


def test_results_are_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    found: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}
    gone = threading.Event()

    def run(number: int, meeting: Meeting) -> None:
        # the second is on the same host, which its environment says for both here
        results = ReplicaResults(meeting, timeout_s=20)
        try:
            steps = [Step((number, None), (-1.5, None))]
            found[number] = [results.exchange(steps), results.exchange([])]
            if number == 1:
                results.failed(ValueError("a fault of its own"))
                return
            gone.wait(10)
            results.exchange([])
        except BaseException as error:
            errors[number] = error
        finally:
            results.close()
            meeting.heartbeat.close()
            gone.set()

    store = HashStore()
    places = meetings(store, 2)
    monkeypatch.setattr(Place, "main_host", "")
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = [[Step((0, None), (-1.5, None))], [Step((1, None), (-1.5, None))]]
    assert found[0] == found[1] == [expected, [[], []]]
    assert isinstance(errors.pop(0), RankLost)
    assert not errors


def test_a_request_that_one_replica_refuses_is_refused() -> None:
    with pytest.raises(InputError, match="prompt 1 holds a token out of range"):
        parts_of("dp=2").generate([[3], [10**6]], max_new_tokens=2)
