"""Answers in the form of `response_format`: what the ranks are asked for, and what the example model answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import partitioner
from partitioner import Plan
from partitioner.errors import InputError
from partitioner.serving.grammar.check import Checks
from partitioner.serving.grammar.json_schema import grammar_of
from partitioner.serving.grammar.vocabulary import vocabulary_of
from partitioner.serving.http.limits import Limits
from partitioner.serving.http.service import Service
from partitioner.storage.example import EXAMPLE_MODEL
from tests.partitioner.serving.grammar.json_schemas import SCHEMAS, is_valid
from tests.partitioner.serving.scripted_model import ScriptedModel
from tests.partitioner.serving.served import TEMPLATE, in_thread

TOKENIZER: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
TOKENIZER.chat_template = TEMPLATE.read_text()
VOCABULARY = vocabulary_of(TOKENIZER)
SCHEMA = {"type": "object", "properties": {"names": {"type": "array", "items": {"enum": ["if", "for"]}, "maxItems": 3}}}
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Return a list of"}], "max_tokens": 40}


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def service(llm: Any, **more: Any) -> Service:
    return Service(llm, TOKENIZER, name="m", limits=Limits(max_length=512), checks=Checks(VOCABULARY), **more)


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[str, ScriptedModel]]:
    model = ScriptedModel(lambda prompt, options: [5, 0])
    with in_thread(service(model)) as (url, _):
        yield f"{url}/v1/chat/completions", model


def test_the_ranks_are_asked_for_a_grammar(scripted: tuple[str, ScriptedModel]) -> None:
    url, model = scripted
    for asked, grammar in (
        (form(SCHEMA, strict=True, description="d"), grammar_of(SCHEMA)),
        ({"type": "json_object"}, grammar_of({"type": "object"})),
        ({"type": "text"}, None),
    ):
        model.calls.clear()
        assert httpx2.post(url, json={**ASKED, "response_format": asked, "n": 2}).status_code == 200
        assert [call.options.get("grammar") for call in model.calls] == [grammar] * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (form({"type": "string", "pattern": "a"}), "'pattern' is not offered"),
        (form({"$ref": "#"}), "stands for itself"),
        ({"type": "json_schema"}, "needs it"),
        ({"type": "json_object", "json_schema": {"name": "a", "schema": {}}}, "is for the type"),
        ({"type": "grammar"}, "response_format.type"),
        (form([]), "schema"),
        (form({}, other=1), "other"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(scripted: tuple[str, ScriptedModel], given: Any, said: str) -> None:
    answer = httpx2.post(scripted[0], json={**ASKED, "response_format": given})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"].startswith("response_format")


def test_an_answer_that_never_ends_has_no_form(scripted: tuple[str, ScriptedModel]) -> None:
    answer = httpx2.post(scripted[0], json={**ASKED, "response_format": form(SCHEMA), "ignore_eos": True})
    assert answer.status_code == 400
    assert "ignore_eos" in answer.json()["error"]["message"]


def test_without_xgrammar_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(InputError, match=r"pip install 'partitioner\[grammar\]'") as found:
        vocabulary_of(TOKENIZER)
    plain = Service(
        ScriptedModel(),  # type: ignore[arg-type]
        TOKENIZER,
        name="m",
        limits=Limits(max_length=99),
        checks=str(found.value),
    )
    with in_thread(plain) as (url, _):
        answer = httpx2.post(f"{url}/v1/chat/completions", json={**ASKED, "response_format": form(SCHEMA)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert "pip install 'partitioner[grammar]'" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def clients(pytestconfig: pytest.Config) -> Iterator[list[openai.OpenAI]]:
    """Of the model that comes along, on one rank and on two."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
        with (
            partitioner.launch(EXAMPLE_MODEL, Plan(), vocabulary=VOCABULARY) as one,
            partitioner.launch(EXAMPLE_MODEL, Plan(tp=2), vocabulary=VOCABULARY) as two,
            in_thread(service(one)) as (first, _),
            in_thread(service(two)) as (second, _),
        ):
            for url in (first, second):
                found.append(openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=60))
            yield found
            for each in found:
                each.close()


@pytest.mark.slow
@pytest.mark.processes
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS, st.sampled_from([0, 0.7, 1.5]), st.integers(0, 5))
def test_what_ends_is_valid(clients: list[openai.OpenAI], schema: Any, temperature: float, seed: int) -> None:
    asked: Any = {**ASKED, "temperature": temperature, "seed": seed, "n": 2, "top_p": 0.95 if seed % 2 else 1}
    asked["response_format"] = form(schema)
    said = []
    for client in clients:
        choices = client.chat.completions.create(**asked).choices
        for choice in choices:
            if choice.finish_reason == "stop":
                assert is_valid(json.loads(choice.message.content or ""), schema), choice.message.content
        said.append([(choice.message.content, choice.finish_reason) for choice in choices])
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.processes
def test_whole_streamed_and_beside_others(clients: list[openai.OpenAI]) -> None:
    asked: Any = {**ASKED, "temperature": 0, "max_tokens": 60}
    for client in clients:
        free = client.chat.completions.create(**asked).choices[0].message.content
        with pytest.raises(ValueError):  # the control: what the model says by itself
            json.loads(free or "")
        whole = client.chat.completions.create(**asked, response_format=form(SCHEMA)).choices[0]
        assert whole.finish_reason == "stop"
        assert is_valid(json.loads(whole.message.content or ""), SCHEMA)
        plain = client.chat.completions.create(**asked, stream=True)
        streamed = client.chat.completions.create(**asked, response_format=form(SCHEMA), stream=True)
        parts: list[list[str]] = [[], []]
        for two in zip(streamed, plain, strict=False):  # both run at the same time
            for part, event in zip(parts, two, strict=True):
                part.append(event.choices[0].delta.content or "")
        parts[0] += [event.choices[0].delta.content or "" for event in streamed]
        parts[1] += [event.choices[0].delta.content or "" for event in plain]
        assert "".join(parts[0]) == whole.message.content
        object_ = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
        if object_.finish_reason == "stop":
            assert isinstance(json.loads(object_.message.content or ""), dict)
        else:
            assert (object_.message.content or "").startswith("{")
