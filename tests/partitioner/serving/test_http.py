"""The server over a model that says what the test tells it to: limits, keys, clients that leave, the end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from transformers import AutoTokenizer

from partitioner import RankLost
from partitioner.errors import InputError
from partitioner.serving.http.keys import API_KEY, Keys
from partitioner.serving.http.limits import Limits
from partitioner.serving.http.service import Service
from partitioner.serving.openai.answers import CompletionAnswer, ScoredToken, Usage
from partitioner.storage.example import EXAMPLE_MODEL
from tests.partitioner.serving.scripted_model import ScriptedModel
from tests.partitioner.serving.served import TEMPLATE, in_thread

TOKENIZER: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
TOKENIZER.chat_template = TEMPLATE.read_text()
ASKED = {"model": "m", "prompt": "If", "max_tokens": 4}
PATH = "/v1/completions"


@contextmanager
def serving(
    model: ScriptedModel, *, keys: Keys | None = None, **limits: Any
) -> Iterator[tuple[str, Service, asyncio.AbstractEventLoop]]:
    service = Service(
        model,  # type: ignore[arg-type]
        TOKENIZER,
        name="m",
        limits=Limits(**{"max_length": 100, **limits}),
        keys=keys,
    )
    with in_thread(service) as (url, loop):
        yield url, service, loop


def says(text: str) -> Callable[[list[int], dict[str, Any]], list[int]]:
    tokens: list[int] = TOKENIZER(text)["input_ids"]
    return lambda prompt, options: tokens[: options["max_new_tokens"]]


def refused(answer: httpx2.Response, status: int, code: str | None = None) -> str:
    error: dict[str, Any] = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return str(error["message"])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ScriptedModel(says(" the value of it")), max_body_bytes=5000, max_choices=6) as (found, *_):
        yield found


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "parse the JSON"),
        (b"{", "parse the JSON"),
        (b"[1]", "Invalid request: Input should be an object"),
        (b"[" * 4000, "parse the JSON"),
        (b'{"model": "m", "prompt": "\\ud800"}', "parse the JSON"),
        (b'{"model": "m", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "m", "prompt": "a", "temperature": "1"}', "temperature"),
        (b'{"model": "m", "prompt": "a", "max_tokens": 1e99}', "max_tokens"),
        (b'{"model": "m", "prompt": "a", "max_tokens": true}', "max_tokens"),
        (b'{"model": "m", "prompt": {"a": 1}}', "prompt"),
        # of several kinds of value, what is wrong with the one that it is of
        (b'{"model": "m", "prompt": [-1]}', "'prompt[0]': Input should be greater than or equal to 0"),
        (b'{"model": "m", "prompt": "a", "stop": [' + b", ".join([b'"b"'] * 17) + b"]}", "at most 16 items"),
        (b'{"model": "m"}', "Missing required parameter: 'prompt'"),
        (b'{"model": "m", "prompt": "a", "n": 7}', "6 choices"),
        (b'{"model": "m", "prompt": ["a", "b", "c", "d"], "n": 2}', "6 choices"),
        (b'{"model": "m", "prompt": "a", "stream_options": {"include_usage": true}}', "request: stream_options"),
        (b"\xff\xfe", "parse the JSON"),
    ],
)
def test_malformed_bodies(url: str, body: bytes, said: str) -> None:
    answer = httpx2.post(url + PATH, content=body, headers={"content-type": "application/json"})
    assert said in refused(answer, 400, answer.json()["error"]["code"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}),
        ("functions", [{}]),
        ("audio", {}),
        ("reasoning_effort", "high"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(url: str, field: str, value: Any) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "If"}], field: value}
    answer = httpx2.post(f"{url}/v1/chat/completions", json=chat)
    assert field in refused(answer, 400, "unsupported_parameter")


def test_what_asks_for_nothing_changes_nothing(url: str) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "If"}]}], "max_tokens": 3}
    plain = httpx2.post(f"{url}/v1/chat/completions", json=chat).json()
    extra = {"tools": [], "response_format": {"type": "text"}, "user": "me", "store": False, "n": None, "stop": None}
    same = httpx2.post(f"{url}/v1/chat/completions", json={**chat, **extra}).json()
    assert plain["choices"] == same["choices"]
    assert plain["choices"][0]["message"]["content"] == TOKENIZER.decode(TOKENIZER(" the value of it")["input_ids"][:3])


def test_bodies_are_bounded_however_they_come(url: str) -> None:
    large = json.dumps({**ASKED, "prompt": "a" * 6000}).encode()
    kind = {"content-type": "application/json"}
    assert "5000 bytes" in refused(httpx2.post(url + PATH, content=large, headers=kind), 413)
    # in pieces, without a length
    answer = httpx2.post(url + PATH, content=iter([large[:2000], large[2000:]]), headers=kind)
    assert "5000 bytes" in refused(answer, 413)
    assert "Content-Type" in refused(httpx2.post(url + PATH, content=b"{}"), 415)
    assert httpx2.post(url + PATH, json=ASKED).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with serving(ScriptedModel(says("a")), body_s=0.2) as (url, *_):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n".encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_other_paths_and_methods(url: str) -> None:
    refused(httpx2.get(url + "/v1/nothing"), 404)
    refused(httpx2.get(url + PATH), 405)
    refused(httpx2.get(url + "/health?every=maybe"), 400)
    refused(httpx2.get(url + "/../../etc/passwd"), 404)
    refused(httpx2.get(url + "/v1/models/%2e%2e%2fetc%2fpasswd"), 404, "model_not_found")
    refused(httpx2.get(url + "/docs"), 404)
    assert httpx2.get(url + "/openapi.json").json()["paths"][PATH]["post"]["requestBody"]


def test_metrics(url: str) -> None:
    httpx2.post(url + PATH, json=ASKED)
    httpx2.get(url + "/v1/unheard/of")
    text = httpx2.get(url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values[f'partitioner_requests_total{{path="{PATH}",status="200"}}']) >= 1
    assert float(values["partitioner_generation_tokens_total"]) >= 4
    assert values["partitioner_rows"] == "0.0"
    assert values['partitioner_replicas{state="serving"}'] == "1.0"
    assert float(values['partitioner_replica_running{replica="0"}']) >= 1
    assert "unheard" not in text


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("first-key-0\n\nsecond-key\n")
    with pytest.raises(InputError, match="chmod 600"):
        Keys.found(str(file))
    file.chmod(0o600)
    monkeypatch.setenv(API_KEY, "of-the-environment")
    keys = Keys.found(str(file))
    assert API_KEY not in os.environ  # ranks do not get it
    with serving(ScriptedModel(says("a b")), keys=keys) as (url, *_):
        for header in (None, "first-key-0", "Bearer", "Bearer wrong-key", "Basic first-key-0", "Bearer first-key-00"):
            given = {} if header is None else {"authorization": header}
            for answer in (
                httpx2.post(url + PATH, json=ASKED, headers=given),
                httpx2.get(url + "/v1/models", headers=given),
            ):
                assert answer.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
                assert answer.status_code == 401
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="another-key", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as raised,
        ):
            client.completions.create(model="m", prompt="If", stream=True)
        assert raised.value.code == "invalid_api_key"
        for key in ("first-key-0", "second-key", "of-the-environment"):
            answer = httpx2.post(url + PATH, json=ASKED, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        assert httpx2.get(url + "/health").status_code == 200
    for wrong in ("short", "with space here", ""):
        file.write_text(wrong)
        with pytest.raises(InputError):
            Keys.found(str(file))


def test_a_client_that_goes_away_frees_its_row() -> None:
    model = ScriptedModel()
    with serving(model) as (url, service, _):
        # a stream, after its first event
        telling = threading.Thread(target=tell_first, args=(model,))
        telling.start()
        with httpx2.Client() as client, client.stream("POST", url + PATH, json={**ASKED, "stream": True}) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        model.wait_for(lambda: model.calls[0].is_left)
        # a whole answer, and a stream before its first event
        for number, stream in ((1, False), (2, True)):
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(url + PATH, json={**ASKED, "stream": stream}, timeout=0.3)
            model.wait_for(lambda number=number: model.calls[number].is_left)  # type: ignore[misc]
        until(lambda: service.health(every=True)[1]["rows"] == 0)
    assert len(model.calls) == 3


def test_more_than_is_taken_is_refused_at_once() -> None:
    model = ScriptedModel()
    with serving(model, max_requests=2) as (url, *_), httpx2.Client() as client:
        with asked_in_thread(url, {**ASKED, "n": 2}) as come:
            model.wait_for(lambda: len(model.calls) == 2)
            answer = client.post(url + PATH, json=ASKED)
            assert "2 rows" in refused(answer, 429, "queue_full")
            assert answer.headers["retry-after"] == "1"
            for call in model.calls:
                call.say(5, 6, over=True)
        assert come[0].status_code == 200
        with asked_in_thread(url, ASKED) as come:
            model.wait_for(lambda: len(model.calls) == 3)
            model.calls[2].say(5, over=True)
        assert come[0].status_code == 200


def test_a_request_that_takes_too_long_is_ended() -> None:
    model = ScriptedModel()
    with serving(model, request_s=0.3) as (url, *_):
        refused(httpx2.post(url + PATH, json=ASKED), 504, "timeout")
        model.wait_for(lambda: model.calls[0].is_left)


def test_an_error_in_the_middle_is_an_event() -> None:
    model = ScriptedModel()
    with serving(model) as (url, *_), httpx2.Client() as client:
        telling = threading.Thread(target=tell_first, args=(model,))
        telling.start()
        with client.stream("POST", url + PATH, json={**ASKED, "stream": True}) as answer:
            model.calls[0].say(failure=RankLost("rank 1 was ended by SIGKILL"))
            events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
        assert "choices" in events[0]
        assert events[-1]["error"]["code"] == "replica_lost"
        model.lost = {0: RankLost("rank 1 was ended by SIGKILL")}
        assert "SIGKILL" in refused(client.post(url + PATH, json=ASKED), 503, "replica_lost")
        assert client.get(url + "/health").status_code == 503
        model.replicas = 2
        assert client.get(url + "/health").json()["status"] == "degraded"
        assert client.get(url + "/health").status_code == 200
        assert client.get(url + "/health?every=1").status_code == 503


def test_our_own_faults_are_not_told() -> None:
    def broken(prompt: list[int], options: dict[str, Any]) -> list[int]:
        raise KeyError("/a/path/of/ours")

    with serving(ScriptedModel(broken)) as (url, *_):
        answer = httpx2.post(url + PATH, json=ASKED)
        assert "path" not in refused(answer, 500)


@pytest.mark.parametrize("grace_s", [5.0, 0.1])
def test_the_end(grace_s: float) -> None:
    """What runs is finished within the grace time, or told why not; what comes meanwhile is sent elsewhere."""
    model = ScriptedModel()
    with serving(model) as (url, service, loop):
        with asked_in_thread(url, ASKED) as come:
            model.wait_for(lambda: len(model.calls) == 1)
            ending = asyncio.run_coroutine_threadsafe(service.drain(grace_s), loop)
            until(lambda: service.health(every=False)[1]["status"] == "ending")
            answer = httpx2.post(url + PATH, json=ASKED)
            refused(answer, 503, "shutting_down")
            assert answer.headers["connection"] == "close"
            assert httpx2.get(url + "/health").status_code == 503
            if grace_s > 1:
                model.calls[0].say(5, over=True)
        ending.result(10)
        if grace_s > 1:
            assert come[0].json()["choices"][0]["finish_reason"] == "length"
        else:
            refused(come[0], 503, "shutting_down")
            assert model.calls[0].is_left


@contextmanager
def asked_in_thread(url: str, body: dict[str, Any]) -> Iterator[list[httpx2.Response]]:
    come: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: come.append(httpx2.post(url + PATH, json=body, timeout=20)))
    thread.start()
    yield come
    thread.join(20)
    assert come


def tell_first(model: ScriptedModel) -> None:
    """A token of the first row, once there is one."""
    model.wait_for(lambda: bool(model.calls))
    model.calls[0].say(5)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_tokens_that_say_the_same_the_likeliest_is_listed() -> None:
    """Bytes that are no letter alone are all written as one sign, by which the form of completions knows them."""
    token = ScoredToken("\ufffd", 0, -0.5, (("\ufffd", -0.5), (" a", -1.0), ("\ufffd", -3.0)))
    assert CompletionAnswer("m", Usage(), True, False)._scores([token])["top_logprobs"] == [
        {"\ufffd": -0.5, " a": -1.0}
    ]
