"""What passes between a process and the ranks that it has started: connections, requests, and what comes of jobs."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partitioner.errors import RankLost
from runtime.generation.generation_request import Generated, GenerationRequest
from runtime.launching.connection import Connection, pair
from runtime.launching.jobs import Call, Job
from runtime.launching.request_data import read_request, request_data

JSON = st.recursive(st.one_of(st.integers(), st.text(), st.none()), lambda inner: st.lists(inner, max_size=3))


@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=5))
def test_messages_come_whole_and_in_order(messages: list[dict[str, Any]]) -> None:
    ours, theirs = pair()
    sender, receiver = Connection(ours), Connection(theirs)
    for message in messages:
        sender.send(message)
    assert [receiver.receive() for _ in messages] == messages
    assert receiver.received() == ([], True)
    sender.close()
    assert receiver.receive() is None
    assert receiver.received() == ([], False)
    receiver.close()


def test_a_message_in_pieces_is_one() -> None:
    ours, theirs = pair()
    receiver = Connection(theirs)
    content = json.dumps({"text": "x" * 100}).encode()
    packed = len(content).to_bytes(8, "big") + content
    for at in (packed[:3], packed[3:50]):
        ours.sendall(at)
        assert receiver.received() == ([], True)
    ours.sendall(packed[50:] + packed[:9])
    assert receiver.received() == ([{"text": "x" * 100}], True)
    ours.close()
    receiver.close()


def test_who_does_not_read_is_not_waited_for() -> None:
    ours, theirs = pair()
    connection = Connection(ours, timeout_s=0.1)
    with pytest.raises(OSError):
        connection.send({"text": "x" * (1 << 24)})
    connection.close()
    theirs.close()


def request(texts: list[list[int]], **options: Any) -> GenerationRequest:
    return GenerationRequest.of(texts, None, options, eos_token_id=(9,))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "seed": 2**40, "logprobs": True, "prefill_step": 3},
        {"bad_words_ids": [[1, 2], [3]], "suppress_tokens": torch.tensor([4]), "min_length": 9, "max_length": 20},
        {"forced_eos_token_id": 3, "no_repeat_ngram_size": 2, "eos_token_id": [], "request_ids": [7, 5]},
    ],
)
def test_a_request_comes_out_as_it_went_in(options: dict[str, Any]) -> None:
    given = request([[1, 2, 3], [4]], **options)
    found = read_request(json.loads(json.dumps(request_data(given))))
    assert (found.prompts, found.settings, found.ids.shape) == (given.prompts, given.settings, given.ids.shape)
    # rules count from the width of all rows
    row = read_request(json.loads(json.dumps(request_data(given.of_rows([1])))))
    assert row.ids.shape == (1, 3)
    assert row.settings.max_new_tokens == given.settings.max_new_tokens


class Words:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + each) for each in ids)


def jobs_of(call: Call) -> list[Job]:
    call.jobs = [Job(call, row) for row in range(len(call.request.prompts))]
    return call.jobs


def test_stop_strings_end_rows_where_tokens_are_heard() -> None:
    call = Call(request([[0, 1], [0]], stop_strings=["cd"], tokenizer=Words(), max_new_tokens=50))
    jobs = jobs_of(call)
    assert jobs[0].said()["request"]["settings"]["stop_strings"] == ()
    for tokens in ([2, 5], [3, 2], [7, 3], [7, 7]):
        for job, token in zip(jobs, tokens, strict=True):
            job.take(token, None)
    assert not any(job.is_wanted for job in jobs)
    assert [future.result(0) for future in call.futures] == [[2, 3], [5, 2, 3]]
    assert torch.equal(call.result()[:, 2:], torch.tensor([[2, 3, 9], [5, 2, 3]]))
    assert [step.tokens for step in call.steps()] == [(2, 5), (3, 2), (None, 3)]


def test_a_future_that_is_cancelled_ends_without_a_word() -> None:
    call = Call(request([[1]], max_new_tokens=200))
    (job,) = jobs_of(call)
    assert call.futures[0].cancel()
    job.take(2, None)
    job.end()
    assert job.is_over
    assert call.futures[0].cancelled()


def test_what_is_left_is_what_loads_a_replica() -> None:
    jobs = jobs_of(Call(request([[1, 2, 3], [4]], max_new_tokens=10)))
    assert [job.left for job in jobs] == [13, 11]
    jobs[0].take(9, None)  # which ends it
    jobs[1].take(2, None)
    assert [job.left for job in jobs] == [0, 9]


def test_one_job_fails_and_the_others_finish() -> None:
    call = Call(request([[1], [2]], max_new_tokens=2, logprobs=True))
    bad, good = jobs_of(call)
    bad.take(5, -1.0)
    good.take(6, -2.0)
    steps = call.steps()
    assert next(steps).tokens == (5, 6)
    bad.end(RankLost("rank 0 is lost"))
    good.take(7, -0.5)
    good.end()
    with pytest.raises(RankLost, match="rank 0 is lost"):
        next(steps)
    with pytest.raises(RankLost, match="rank 0 is lost"):
        call.result()
    with pytest.raises(RankLost):
        call.futures[0].result(0)
    assert call.futures[1].result(0) == [6, 7]


def test_results_carry_logprobs() -> None:
    call = Call(request([[1], [2]], max_new_tokens=2, logprobs=True))
    for job, first in zip(jobs_of(call), (6, 5), strict=True):
        job.take(first, -1.0 * first)
        job.end()
    found = call.result()
    assert isinstance(found, Generated)
    assert found.sequences.tolist() == [[1, 6], [2, 5]]
    assert found.logprobs.tolist() == [[-6.0], [-5.0]]


def test_a_line_is_a_socket_without_a_name() -> None:
    ours, theirs = pair()
    assert ours.family == socket.AF_UNIX
    assert ours.getsockname() == theirs.getsockname() == ""
    ours.close()
    theirs.close()
