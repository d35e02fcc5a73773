"""`tools` of chats: what the model is told, what its answer becomes, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from transformers import AutoTokenizer

import partitioner
from partitioner import Plan
from partitioner.serving.grammar.check import Checks
from partitioner.serving.grammar.vocabulary import vocabulary_of
from partitioner.serving.http.limits import Limits
from partitioner.serving.http.service import Service
from partitioner.storage.example import EXAMPLE_MODEL
from tests.partitioner.serving.grammar.json_schemas import is_valid
from tests.partitioner.serving.scripted_model import ScriptedModel
from tests.partitioner.serving.served import TEMPLATE, in_thread
from tests.partitioner.serving.tools.call_templates import BARE, MARKED, NO_FORM

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "the sky", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
ASK = {"role": "user", "content": "Is it warm?"}
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def tokenizer_with(template: str) -> Any:
    """Marks of calls are tokens of their own, of which one is special."""
    found = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    found.add_tokens(["</tool_call>"])
    found.add_special_tokens({"additional_special_tokens": ["<tool_call>", "<|pad|>"]})
    found.chat_template = template
    return found


class Says(ScriptedModel):
    """Its next answers say `text`."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(lambda prompt, options: [*tokenizer(self.text)["input_ids"], 0][: options["max_new_tokens"]])
        self.text = ""
        self.longest = 4000


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[openai.OpenAI, Says, Any]]:
    tokenizer = tokenizer_with(MARKED)
    model = Says(tokenizer)
    checks = Checks(vocabulary_of(tokenizer))
    service = Service(model, tokenizer, name="m", limits=Limits(max_length=4000), checks=checks)  # type: ignore[arg-type]
    with (
        in_thread(service) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client, model, tokenizer


def ask(client: openai.OpenAI, **asked: Any) -> Any:
    given: dict[str, Any] = {"model": "m", "messages": [ASK], "tools": [WEATHER, NOW], **asked}
    return client.chat.completions.create(**given).choices[0]


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """The text, the calls, the reason: put together as the client's own helper does."""
    given: dict[str, Any] = {"model": "m", "messages": [ASK], "tools": [WEATHER, NOW], **asked}
    try:
        with client.chat.completions.stream(**given) as events:
            whole = events.get_final_completion().choices[0]
    except openai.LengthFinishReasonError as cut_off:
        whole = cut_off.completion.choices[0]  # type: ignore[assignment]
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls or ()]
    return whole.message.content or "", calls, whole.finish_reason


def calls_of(choice: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        ("It is warm.", "It is warm.", []),
        (ROME, "", [("weather", '{"city": "Rome"}')]),
        (f"Let me see.\n{ROME}\n{CLOCK}", "Let me see.", [("weather", '{"city": "Rome"}'), ("now", "{}")]),
        (ROME.replace("weather", "whether"), ROME.replace("weather", "whether"), []),
        ("A<|pad|>B", "AB", []),
    ],
)
def test_what_the_model_wrote(
    scripted: tuple[openai.OpenAI, Says, Any], said: str, text: str, calls: list[tuple[str, str]]
) -> None:
    client, model, _ = scripted
    model.text = said
    whole = ask(client)
    assert (whole.message.content or "", calls_of(whole)) == (text, calls)
    assert (whole.message.content is None) == bool(calls and not text)
    assert whole.finish_reason == ("tool_calls" if calls else "stop")
    assert len({call.id for call in whole.message.tool_calls or ()}) == len(calls)
    assert streamed(client) == (text, calls, whole.finish_reason)
    assert "grammar" not in model.calls[-1].options


def test_the_model_is_told_of_tools_and_of_what_came_of_them(scripted: tuple[openai.OpenAI, Says, Any]) -> None:
    client, model, tokenizer = scripted
    model.text = ROME
    first = ask(client).message
    prompt = tokenizer.decode(model.calls[-1].prompt)
    assert '"name": "weather"' in prompt
    assert '"description": "the sky"' in prompt
    assert '"enum": ["Rome", "Oslo"]' in prompt
    answer = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "18 degrees"}
    model.text = "Yes."
    assert ask(client, messages=[ASK, first, answer]).message.content == "Yes."
    prompt = tokenizer.decode(model.calls[-1].prompt)
    assert f"<|assistant|>\n{ROME}<|end|>" in prompt
    assert "<|tool|>\n18 degrees<|end|>" in prompt
    ask(client, messages=[ASK, first, answer], tools=openai.NOT_GIVEN)  # no tool any more, and they are told still
    assert ROME in tokenizer.decode(model.calls[-1].prompt)


def test_who_chooses(scripted: tuple[openai.OpenAI, Says, Any]) -> None:
    client, model, tokenizer = scripted
    model.text = ROME
    none = ask(client, tool_choice="none")
    assert (none.message.tool_calls, none.finish_reason) == (None, "stop")
    assert "weather" not in tokenizer.decode(model.calls[-1].prompt)
    must = ask(client, tool_choice="required")
    assert (calls_of(must), must.finish_reason) == ([("weather", '{"city": "Rome"}')], "tool_calls")
    assert '"weather" between' in model.calls[-1].options["grammar"]
    assert '"now" between' in model.calls[-1].options["grammar"]
    named = ask(client, tool_choice={"type": "function", "function": {"name": "weather"}})
    assert (calls_of(named), named.finish_reason) == ([("weather", '{"city": "Rome"}')], "stop")
    assert '"now" between' not in model.calls[-1].options["grammar"]
    assert "now" in tokenizer.decode(model.calls[-1].prompt)
    model.text = f"{ROME}\n{CLOCK}"
    assert len(calls_of(ask(client))) == 2
    assert len(calls_of(ask(client, parallel_tool_calls=False))) == 1
    assert len(streamed(client, parallel_tool_calls=False)[1]) == 1
    assert len(streamed(client, tool_choice="required")[1]) == 2


def test_what_is_cut_off(scripted: tuple[openai.OpenAI, Says, Any]) -> None:
    client, model, tokenizer = scripted
    model.text = ROME
    short = len(tokenizer(ROME)["input_ids"]) - 4
    choice = ask(client, max_tokens=short)
    assert choice.finish_reason == "length"
    ((name, arguments),) = calls_of(choice)
    assert name == "weather"
    assert '{"city": "Rome"}'.startswith(arguments)
    choice = ask(client, logprobs=True, top_logprobs=0)
    assert len(choice.logprobs.content) == len(tokenizer(ROME)["input_ids"])


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type", "function"),
        ({"tools": [WEATHER, WEATHER]}, "", "the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [], "tool_choice": "required"}, "", "there are none"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "", "'other'"),
        ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
        ({"tool_choice": "required", "ignore_eos": True}, "", "ignore_eos"),
        ({"response_format": {"type": "json_object"}}, "", "response_format beside tools"),
        ({"messages": [ASK, {"role": "tool", "content": "a"}]}, "messages[1]", "tool_call_id"),
        (
            {"messages": [ASK, {"role": "tool", "content": "a", "tool_call_id": "b"}]},
            "messages[1]",
            "no message before",
        ),
    ],
)
def test_what_is_wrong_is_refused(
    scripted: tuple[openai.OpenAI, Says, Any], asked: dict[str, Any], param: str, said: str
) -> None:
    client = scripted[0]
    given = {"model": "m", "messages": [ASK], "tools": [WEATHER], **asked}
    answer = httpx2.post(f"{client.base_url}chat/completions", json=given)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert (error["param"] or "").startswith(param)


def test_schemas_and_arguments_that_cannot_be_used(scripted: tuple[openai.OpenAI, Says, Any]) -> None:
    client, model, _ = scripted
    model.text = "a"
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "string", "pattern": "a"}}}
    assert ask(client, tools=[odd]).message.content == "a"  # nothing is promised
    with pytest.raises(openai.BadRequestError, match=r"parameters of 'odd'.*'pattern' is not offered"):
        ask(client, tools=[odd], tool_choice="required")
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "[1"}}
    with pytest.raises(openai.BadRequestError, match="must be a JSON object"):
        ask(client, messages=[ASK, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(("why", "template"), [*NO_FORM.items(), ("does not tell the model", TEMPLATE.read_text())])
def test_a_template_without_tools_is_named(why: str, template: str) -> None:
    tokenizer = tokenizer_with(template)
    service = Service(Says(tokenizer), tokenizer, name="m", limits=Limits(max_length=400))  # type: ignore[arg-type]
    with in_thread(service) as (url, _):
        answer = httpx2.post(
            f"{url}/v1/chat/completions", json={"model": "m", "messages": [ASK], "tools": [WEATHER]}
        ).json()["error"]
    assert (answer["param"], answer["code"]) == ("tools", "unsupported_parameter")
    assert why in answer["message"]
    assert "--chat-template FILE" in answer["message"]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("template", [MARKED, BARE])
def test_the_example_model_calls_when_it_must(template: str, pytestconfig: pytest.Config) -> None:
    """Its marks are letters: no token of it is another model's."""
    tokenizer: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    tokenizer.chat_template = template
    vocabulary = vocabulary_of(tokenizer)
    found: list[Any] = []
    for plan in (Plan(), Plan(tp=2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
            with partitioner.launch(EXAMPLE_MODEL, plan, vocabulary=vocabulary) as llm:
                limits = Limits(max_length=512)
                with (
                    in_thread(Service(llm, tokenizer, name="m", limits=limits, checks=Checks(vocabulary))) as (url, _),
                    openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
                ):
                    said = []
                    for seed in range(6):
                        how: dict[str, Any] = {"seed": seed, "temperature": seed % 3 * 0.6, "max_tokens": 150}
                        free = ask(client, **how)
                        assert free.message.tool_calls is None  # the control: it never does by itself
                        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
                            must = ask(client, tool_choice=choice, **how)
                            parts = streamed(client, tool_choice=choice, **how)
                            assert parts == (must.message.content or "", calls_of(must), must.finish_reason)
                            if must.finish_reason != "length":
                                assert must.message.content is None
                                for name, arguments in calls_of(must):
                                    assert name in ("weather", "now")
                                    given = json.loads(arguments)
                                    assert is_valid(given, CITY) if name == "weather" else given == {}
                            said.append((parts, free.message.content))
                    found.append(said)
    assert found[0] == found[1]
    assert any(calls for (_, calls, reason), _ in found[0] if reason != "length")
