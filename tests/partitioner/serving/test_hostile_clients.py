"""Clients that mean harm: what each costs is bounded, and others are answered meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from partitioner.serving.http import prepare
from partitioner.serving.openai.errors import of_validation
from partitioner.serving.openai.requests import ChatRequest, CompletionRequest
from partitioner.serving.text.answer_text import AnswerText
from tests.partitioner.serving.scripted_model import ScriptedModel
from tests.partitioner.serving.test_http import ASKED, PATH, TOKENIZER, refused, says, serving, until


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ScriptedModel(says(" the value of it"))) as (found, *_):
        yield found


def many(item: str) -> str:
    return f"[{','.join([item] * 20_000)}]"


@pytest.mark.parametrize(
    ("kind", "field", "wrong"),
    [
        (CompletionRequest, "prompt", many("null")),
        (CompletionRequest, "prompt", many("1.5")),
        (CompletionRequest, "prompt", many("[null]")),
        (CompletionRequest, "stop", many("1")),
        (ChatRequest, "messages", many("{}")),
        (ChatRequest, "messages", '[{"role": "user", "content": ' + many("{}") + "}]"),
        (ChatRequest, "messages", '[{"role": "assistant", "tool_calls": ' + many("{}") + "}]"),
        (ChatRequest, "tools", many("{}")),
        (ChatRequest, "modalities", many("1")),
    ],
)
def test_a_wrong_body_costs_no_more_than_its_size(kind: Any, field: str, wrong: str) -> None:
    """An error for each wrong entry took 3 kB: gigabytes for the largest body that is taken."""
    rest = '"messages": [{"role": "user", "content": "a"}], ' if field in ("tools", "modalities") else ""
    body = f'{{"model": "m", {rest}"{field}": {wrong}}}'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(ValidationError) as raised:
            kind.model_validate_json(body)
        said = of_validation(raised.value)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert raised.value.error_count() < 10
    assert most < 40 * len(body)
    assert field in said.message


def test_errors_repeat_little_of_what_was_sent(url: str) -> None:
    name = "x" * 100_000
    for body in ({**ASKED, "model": name}, {**ASKED, name: 1}, {**ASKED, "user": [name]}):
        answer = httpx2.post(url + PATH, json=body)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 1000
        assert "xxx..." in answer.text
    assert len(httpx2.get(f"{url}/v1/{name[:9000]}").content) < 1000


def test_texts_that_cannot_fit_are_not_made_into_tokens(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million letters take a second of a processor."""
    seen: list[Any] = []
    ids, decoded = prepare._ids, prepare._decoded
    monkeypatch.setattr(prepare, "_ids", lambda *given: seen.append(given) or ids(*given))
    monkeypatch.setattr(prepare, "_decoded", lambda *given: seen.append(given) or decoded(*given))
    for prompt in ("a" * 6401, ["b", "a" * 6401], [5] * 100, [[5], [6] * 100]):
        answer = httpx2.post(url + PATH, json={**ASKED, "prompt": prompt, "echo": True})
        assert "prompt" in refused(answer, 400, "context_length_exceeded")
    assert not seen
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "a" * 4000}, {"role": "user", "content": "b" * 4000}],
    }
    assert "messages" in refused(httpx2.post(f"{url}/v1/chat/completions", json=chat), 400, "context_length_exceeded")
    httpx2.post(url + PATH, json={**ASKED, "prompt": " " * 1000}).raise_for_status()  # 16 letters a token
    assert len(seen) == 1


def test_long_texts_hold_up_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """While as many are made into tokens as will, rows begin and are left."""
    ids, hold = prepare._ids, threading.Event()

    def slow(tokenizer: Any, prompt: Any) -> list[int]:
        if prompt == "slow":
            hold.wait(20)
        return ids(tokenizer, prompt)

    monkeypatch.setattr(prepare, "_ids", slow)
    model = ScriptedModel(says(" the value"))
    with serving(model) as (url, service, _):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**ASKED, "prompt": "slow"}).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        clients = [socket.create_connection((host, int(port)), timeout=20) for _ in range(40)]
        try:
            for client in clients:
                client.sendall(head.encode() + body)
            until(lambda: service._texts._work_queue.qsize() > 30)
            # what needs no tokens to be made goes on: ids, streams, ends
            answer = httpx2.post(url + PATH, json={**ASKED, "prompt": [5, 6]}, timeout=10)
            assert answer.status_code == 200
            assert not hold.is_set()
        finally:
            hold.set()
            for client in clients:
                client.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_reads_nothing_is_given_up(stream: bool) -> None:
    """19 MB wait for it: its rows are free, and its connection is closed before it has all of them."""
    model = ScriptedModel()
    with serving(model, send_s=0.5, max_length=20_000) as (url, service, _), socket.socket() as client:
        host, port = url.removeprefix("http://").split(":")
        client.settimeout(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        asked = {**ASKED, "prompt": " " * 300_000, "echo": True, "n": 64, "stream": stream}
        body = json.dumps(asked).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        model.wait_for(lambda: len(model.calls) == 64)
        if stream:
            model.wait_for(lambda: all(call.is_left for call in model.calls))
        else:
            for call in model.calls:
                call.say(5, over=True)
        until(lambda: service.health(every=True)[1]["rows"] == 0)
        time.sleep(1)
        read = 0
        with contextlib.suppress(ConnectionResetError):
            while come := client.recv(1 << 20):
                read += len(come)
        assert read < 64 * 300_000


def test_half_a_head_is_not_waited_for() -> None:
    """Of the first request of a connection and of a further one, also where a letter comes now and then."""
    with serving(ScriptedModel(says("a")), body_s=0.6) as (url, *_):
        host, port = url.removeprefix("http://").split(":")
        for before in (b"", f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()):
            with socket.create_connection((host, int(port)), timeout=10) as client:
                if before:
                    client.sendall(before)
                    assert client.recv(4096).startswith(b"HTTP/1.1 200")
                start = time.monotonic()
                client.sendall(b"GET / HTTP/1.1\r\n")
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() < start + 10:
                        client.sendall(b"x")
                        time.sleep(0.05)
                assert time.monotonic() < start + 8
        with socket.create_connection((host, int(port)), timeout=10) as client:  # says nothing at all
            assert _closed(client)
        with httpx2.Client() as client:  # and one that asks stays, however long it has nothing to ask
            for _ in range(3):
                assert client.get(f"{url}/v1/models").status_code == 200
                time.sleep(0.5)
            assert len(client._transport._pool.connections) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00" * 20,  # as TLS begins
        b"GET /health\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -4\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["TLS", "no version", "negative length", "two lengths", "chunk of no size", "long head"],
)
def test_what_is_no_http_is_told_of_in_the_form_of_errors(url: str, said: bytes) -> None:
    """uvicorn answers with plain text, which OpenAI's clients show as an error without a message."""
    host, port = url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            while come := client.recv(1 << 16):
                found += come
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head.lower()
    assert json.loads(body)["error"] == {
        "message": "Invalid HTTP request received.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert httpx2.get(f"{url}/health").status_code == 200


def _closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_bodies_together_are_bounded() -> None:
    """What others hold is refused at once, and free again when they are gone."""
    with serving(ScriptedModel(says("a")), max_body_bytes=10_000, max_bodies=2) as (url, *_):
        host, port = url.removeprefix("http://").split(":")
        head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n"
        clients = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2)]
        for client in clients:
            client.sendall(head.encode() + b"{" * 9998)
        asked = {**ASKED, "user": "u" * 100}

        def status() -> int:
            return httpx2.post(url + PATH, json=asked).status_code

        until(lambda: status() == 429)
        answer = httpx2.post(url + PATH, json=asked)
        assert "bodies of other requests" in refused(answer, 429, "queue_full")
        assert answer.headers["retry-after"] == "1"
        assert httpx2.get(f"{url}/health").status_code == 200
        for client in clients:
            client.close()
        until(lambda: status() == 200)


@pytest.mark.parametrize("stop", ["x" * 990, "va" * 400 + "!", "e" * 900])
def test_long_stop_strings_cost_a_token_little(stop: str) -> None:
    """Each token looks at the end of the text once for each stop string, not once for each of its letters."""
    stops = [f"{stop}{number}" for number in range(16)]
    looked = 0

    class Counted(str):
        def startswith(self, *given: Any) -> bool:
            nonlocal looked
            looked += 1
            return str.startswith(self, *given)

    text = AnswerText(TOKENIZER, [5], [Counted(each) for each in stops])
    tokens = TOKENIZER(" the value of it and more of the same")["input_ids"] * 40
    said = ""
    for token in tokens:
        text.add(token)
        said += text.take()
    said += text.end()
    assert said == TOKENIZER.decode(tokens)
    assert looked < 16 * 130 * len(tokens)


@pytest.mark.parametrize("length", range(1, 12))
def test_what_may_begin_a_stop_string_is_held_back(length: int) -> None:
    """The longest end of the text that is the beginning of one, whatever it repeats."""
    for stop in ("aab", "aabaaa", "abab", "b" * 5, "ab" * 4 + "c"):
        for number in range(2**length):
            written = "".join("ab"[number >> place & 1] for place in range(length))
            text = AnswerText(TOKENIZER, [5], [stop])
            text.text = written
            expected = max(
                (count for count in range(1, min(len(stop) - 1, length) + 1) if stop.startswith(written[-count:])),
                default=0,
            )
            assert text._held() == expected
