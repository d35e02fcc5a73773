"""OpenAI's own client, and the model that comes along: what it reads is what `generate` says, row by row."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

import partitioner
from partitioner import Plan, partition
from partitioner.serving.http.limits import Limits
from partitioner.serving.http.service import Service
from partitioner.serving.text.answer_text import AnswerText
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.launching.launched import Launched
from tests.partitioner.serving.served import ROOT, TEMPLATE, in_thread

pytestmark = pytest.mark.processes
PROMPT = "Return a list of"
MODEL = "example_model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    found.chat_template = TEMPLATE.read_text()
    return found


@pytest.fixture(scope="module")
def alone() -> Any:
    return partition(EXAMPLE_MODEL, Plan(), dtype=torch.float64)


@pytest.fixture(scope="module")
def llm(alone: Any, pytestconfig: pytest.Config) -> Iterator[Launched]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
        launched = partitioner.launch(alone, Plan(), timeout_s=30)
    with launched:
        yield launched


@pytest.fixture(scope="module")
def url(llm: Launched, tokenizer: Any) -> Iterator[str]:
    with in_thread(Service(llm, tokenizer, name=MODEL, limits=Limits(max_length=512))) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as found:
        yield found


def said_alone(alone: Any, tokenizer: Any, text: str, **options: Any) -> tuple[list[int], str]:
    """The new tokens of one prompt, and their text."""
    prompt = tokenizer(text)["input_ids"]
    new = alone.generate([prompt], **options)[0, len(prompt) :].tolist()
    said = AnswerText(tokenizer, prompt)
    for token in new:
        said.add(token)
    said.end()
    return new, said.text


def test_the_page_as_typed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(from openai.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert "http://127.0.0.1:8000/v1" in code
    exec(code.replace("http://127.0.0.1:8000/v1", url), {})
    assert len(capsys.readouterr().out) > 40


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "partitioner"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_chat_is_the_greedy_continuation_of_its_template(client: openai.OpenAI, alone: Any, tokenizer: Any) -> None:
    messages: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    found = client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=9, temperature=0)
    expected = said_alone(alone, tokenizer, f"Be brief.\n\n{PROMPT}\n\n", max_new_tokens=9)[1]
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected)
    assert choice.finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 9
    assert found.usage.prompt_tokens == len(tokenizer(f"Be brief.\n\n{PROMPT}\n\n")["input_ids"])


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "seed": 4}
    whole = client.chat.completions.create(**asked, logprobs=True)
    events = list(
        client.chat.completions.create(**asked, logprobs=True, stream=True, stream_options={"include_usage": True})
    )
    assert events[-1].usage == whole.usage
    assert not events[-1].choices
    deltas = [event.choices[0] for event in events[:-1]]
    assert "".join(each.delta.content or "" for each in deltas) == whole.choices[0].message.content
    assert [each.finish_reason for each in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert deltas[0].delta.role == "assistant"
    assert len({event.id for event in events}) == 1
    streamed = [token for each in deltas if each.logprobs for token in each.logprobs.content or ()]
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == 12


def test_sampling_options_are_those_of_generate(client: openai.OpenAI, alone: Any, tokenizer: Any) -> None:
    bias = tokenizer(" the")["input_ids"][0]
    for asked, options in (
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}),
        ({"temperature": 1.3, "top_p": 0}, {}),  # as OpenAI has it, the likeliest token alone
        ({"extra_body": {"top_k": 7, "min_p": 0.1}}, {"do_sample": True, "top_k": 7, "min_p": 0.1}),
        (
            {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        ),
        ({"temperature": 0, "logit_bias": {str(bias): -100}}, {"logit_bias": {bias: -100.0}}),
        ({"temperature": 0, "extra_body": {"repetition_penalty": 1.3}}, {"repetition_penalty": 1.3}),
    ):
        given: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "seed": 11, **asked}
        found = client.completions.create(**given).choices[0].text
        assert found == said_alone(alone, tokenizer, PROMPT, max_new_tokens=20, seed=11, **options)[1]
        assert (" the" in found) <= ("logit_bias" not in options)


def test_several_choices_and_prompts(client: openai.OpenAI, alone: Any, tokenizer: Any) -> None:
    prompts = [PROMPT, "If the"]
    found = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=7, seed=5)
    ids = [tokenizer(text)["input_ids"] for text in prompts for _ in range(2)]
    new = [row[-7:].tolist() for row in alone.generate(ids, max_new_tokens=7, do_sample=True, seed=5, top_k=0)]
    for choice, prompt, tokens in zip(found.choices, ids, new, strict=True):
        text = AnswerText(tokenizer, prompt)
        for token in tokens:
            text.add(token)
        text.end()
        assert choice.text == text.text
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, ids[::2]))
    by_ids = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=7, seed=5)
    assert by_ids.choices[0].text == found.choices[0].text
    events = list(client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=7, seed=5, stream=True))
    for choice in found.choices:
        parts = [each.choices[0] for each in events if each.choices[0].index == choice.index]
        assert "".join(each.text for each in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, alone: Any, tokenizer: Any) -> None:
    _, text = said_alone(alone, tokenizer, PROMPT, max_new_tokens=24)
    stop = text[9:14]  # begins and ends within tokens, wherever these are
    before = text[: text.find(stop)]
    asked: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stop": ["\0none", stop]}
    found = client.completions.create(**asked)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (before, "stop")
    parts = [event.choices[0] for event in client.completions.create(**asked, stream=True)]
    assert "".join(part.text for part in parts) == before
    assert parts[-1].finish_reason == "stop"


def test_log_probabilities_are_those_of_generate(client: openai.OpenAI, alone: Any, tokenizer: Any) -> None:
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=0, echo=False)
    prompt = tokenizer(PROMPT)["input_ids"]
    expected = alone.generate([prompt], max_new_tokens=6, logprobs=True)
    scores = found.choices[0].logprobs
    assert scores is not None
    assert scores.token_logprobs == pytest.approx(expected.logprobs[0].tolist(), abs=1e-10)
    assert scores.tokens is not None
    assert "".join(scores.tokens) == found.choices[0].text
    assert scores.text_offset == [len("".join(scores.tokens[:place])) for place in range(6)]
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=4,
        temperature=1.9,  # which changes what is drawn, not what is named
        logprobs=True,
        top_logprobs=3,
    )
    assert chat.choices[0].logprobs is not None
    for place, token in enumerate(chat.choices[0].logprobs.content or ()):
        assert len(token.top_logprobs) == 3
        values = [other.logprob for other in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0]
        if place == 0:
            ids = tokenizer(f"{PROMPT}\n\n")["input_ids"]
            logits = alone.simulate(input_ids=torch.tensor([ids]))
            known = torch.log_softmax(logits[0, -1], dim=0).topk(3).values
            assert values == pytest.approx(known.tolist(), abs=1e-10)
    echoed = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + found.choices[0].text


def test_what_is_wrong_is_said_in_the_clients_own_errors(client: openai.OpenAI) -> None:
    asked: Any
    for asked, kind, param in (
        ({"model": "another"}, openai.NotFoundError, "model"),
        ({"max_tokens": 600}, openai.BadRequestError, "prompt"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"stop": [""]}, openai.BadRequestError, "stop[0]"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"prompt": [10**6]}, openai.BadRequestError, None),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, openai.BadRequestError, None),
        ({"suffix": "."}, openai.BadRequestError, "suffix"),
        ({"extra_body": {"unheard_of": 1}}, openai.BadRequestError, "unheard_of"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as raised:
                client.completions.create(**{"model": MODEL, "prompt": PROMPT, "stream": stream, **asked})
            assert (type(raised.value), raised.value.param) == (kind, param), raised.value
            assert raised.value.type == "invalid_request_error"


def test_many_clients_at_once_and_some_that_leave(url: str, alone: Any, tokenizer: Any) -> None:
    """Mixed: whole and streamed, drawn and greedy, left after a few events."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[int, str]:
        given: Any = {"model": MODEL, "prompt": PROMPT[: 2 + number], "max_tokens": 3 + number, "seed": number}
        given["temperature"] = number % 3 / 2
        if number % 2:
            return number, (await client.completions.create(**given)).choices[0].text
        parts = []
        async with await client.completions.create(**given, stream=True) as events:
            async for event in events:
                parts.append(event.choices[0].text)
                if number % 8 == 0 and len(parts) == 2:
                    return number, "left"
        return number, "".join(parts)

    async def all_of_them() -> list[tuple[int, str]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(16)))

    for number, text in asyncio.run(all_of_them()):
        if text == "left":
            continue
        temperature = number % 3 / 2
        options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        expected = said_alone(alone, tokenizer, PROMPT[: 2 + number], max_new_tokens=3 + number, seed=number, **options)
        assert text == expected[1], number


def test_streams_that_are_cut_midway_free_their_rows_and_change_no_other(
    client: openai.OpenAI, llm: Launched, alone: Any, tokenizer: Any
) -> None:
    """Long ones, beside one that goes on to its end: soon the model runs that one alone."""
    long: Any = {"model": MODEL, "max_tokens": 450, "stream": True, "n": 3, "extra_body": {"ignore_eos": True}}
    left = [client.completions.create(prompt=f"{PROMPT} {number}", **long) for number in range(4)]
    given: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    kept = client.completions.create(**given, stream=True, extra_body={"ignore_eos": True})
    text = next(kept).choices[0].text
    for events in left:
        next(events)
        events.close()
    before = llm.status().replicas[0].decode_tokens
    text += "".join(event.choices[0].text for event in kept)
    assert text == said_alone(alone, tokenizer, PROMPT, max_new_tokens=60, eos_token_id=[])[1]
    deadline = time.monotonic() + 30
    while llm.status().running:
        assert time.monotonic() < deadline, llm.status()
        time.sleep(0.05)
    assert llm.status().replicas[0].decode_tokens - before < 12 * 450 / 2, "who left is run no further"


def test_a_lost_rank_is_told_at_once(client: openai.OpenAI, llm: Launched, url: str) -> None:
    """The last of this file: the model is gone after it."""
    import httpx2

    health = url.replace("/v1", "/health")
    assert httpx2.get(health).json()["status"] == "ok"
    events = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(events)
    os.kill(llm.pids[0][0], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="was ended by SIGKILL"):
        list(events)
    answer = httpx2.get(health)
    assert (answer.status_code, answer.json()["status"]) == (503, "lost")
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model=MODEL, prompt=PROMPT)
    assert (raised.value.status_code, raised.value.code) == (503, "replica_lost")
