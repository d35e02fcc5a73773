"""Calls of tools: the form found from a template, read from text as it comes, and as a grammar."""

from __future__ import annotations

import json
import random
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoTokenizer

from partitioner.errors import InputError
from partitioner.serving.grammar.vocabulary import vocabulary_of
from partitioner.serving.text.chat_template import TemplateFailed
from partitioner.serving.tools.call_form import CallForm
from partitioner.serving.tools.call_grammar import call_grammar, marks_of
from partitioner.serving.tools.call_reader import CallReader
from partitioner.serving.tools.find_form import find_form
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.sampling.grammar import Grammars, among
from tests.partitioner.serving.tools.call_templates import FORMS, MARKS, NO_FORM

USER = {"role": "user", "content": "what is it like in zqfirst?"}
CALLS: list[tuple[str, Any]] = [
    ("weather", {"city": 'Köln "am" } Rhein\\', "days": [1, {"a": None}], "deep": {"{": "}]"}}),
    ("now", {}),
    ("weather", {"city": "\u6771\u4eac", "days": []}),
]


def renderer(template: str) -> Any:
    """As `Renderer.render`, without a process."""

    def fail(message: str) -> None:
        raise TemplateFailed(message)

    def to_json(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    compiled = environment.from_string(template)

    def render(messages: Any, *, tools: Any = None, prompt: bool = True) -> str:
        try:
            return compiled.render(messages=messages, tools=tools, add_generation_prompt=prompt, raise_exception=fail)
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateFailed(str(error)) from error

    return render


def form_of(name: str) -> CallForm:
    return find_form(renderer(FORMS[name]), ["<|end|>"])


def written(name: str, content: str, calls: list[tuple[str, Any]]) -> str:
    """What a model would write, as the template puts it after the prompt."""
    form, render = form_of(name), renderer(FORMS[name])
    made = [
        {
            "id": f"abcdefgh{number}",
            "type": "function",
            "function": {
                "name": called,
                "arguments": given if form.arguments_as == "object" else json.dumps(given, ensure_ascii=False),
            },
        }
        for number, (called, given) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": content or form.empty, "tool_calls": made}
    text: str = render([USER, message], prompt=False)
    start = len(render([USER], prompt=True).removesuffix("<think>\n"))
    return text[start:].removesuffix("<|end|>\n").rstrip()


def read(reader: CallReader, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call with its arguments."""
    text = ""
    calls: list[list[str]] = []
    for some in (*map(reader.feed, pieces), reader.end()):
        text += some.text
        for delta in some.calls:
            if delta.id is not None:
                assert len(delta.id) == 9
                assert delta.name is not None
                calls.append([delta.name, ""])
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    return text, [(name, arguments) for name, arguments in calls]


def cut(text: str, seed: int) -> list[str]:
    draw, found = random.Random(seed), []
    while text:
        size = draw.choice((1, 1, 2, 5, 30))
        found.append(text[:size])
        text = text[size:]
    return found


@pytest.mark.parametrize("name", FORMS)
def test_what_a_template_writes_is_read_again(name: str) -> None:
    form = form_of(name)
    assert form.has_results
    assert (form.next is None) == (name == "bare")
    assert form.arguments_as == ("text" if name == "fenced" else "object")
    most = 1 if form.next is None else 3
    for content in ("", "Let me look {it} up.", 'It is {"name": "no such tool", "arguments": {}}: <tool_call> no.'):
        for count in range(1, most + 1):
            text = written(name, content, CALLS[:count])
            expected = [(called, given) for called, given in CALLS[:count]]
            for seed in range(4):
                reader = CallReader(form, ["weather", "now"], many=True)
                said, calls = read(reader, cut(text, seed) if seed else [text])
                assert said == (f" {content}" if content and name == "spaced" else content)
                assert [(called, json.loads(given)) for called, given in calls] == expected
                assert reader.calls == count


@pytest.mark.parametrize("name", FORMS)
def test_text_stays_as_it_is(name: str) -> None:
    form = form_of(name)
    call = written(name, "", CALLS[:1])
    broken = call.replace("weather", "whether")
    for text in ("", " a\n\n b ", '{"name": 1}\n', broken, call[: call.index("weather") + 3], "<", "\n{"):
        for seed in range(4):
            reader = CallReader(form, ["weather", "now"], many=True)
            assert read(reader, cut(text, seed)) == (text, [])


def test_one_call_where_one_is_wanted() -> None:
    text = written("marked", "", CALLS)
    reader = CallReader(form_of("marked"), ["weather", "now"], many=False)
    said, calls = read(reader, cut(text, 1))
    assert (said, [called for called, _ in calls], reader.is_done) == ("", ["weather"], True)


def test_other_spaces_and_words_between() -> None:
    text = (
        'One.\n<tool_call> {"name":"now","arguments":{ }}</tool_call>\n\nAnd two. '
        '<tool_call>{ "name" : "now", "arguments"\n: {}} </tool_call>\n'
    )
    reader = CallReader(form_of("marked"), ["now"], many=True)
    said, calls = read(reader, cut(text, 3))
    assert calls == [("now", "{ }"), ("now", "{}")]
    assert said.split() == ["One.", "And", "two."]


def test_a_call_that_is_cut_off_is_told_as_far_as_it_goes() -> None:
    reader = CallReader(form_of("marked"), ["weather"], many=True)
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "K'
    assert read(reader, cut(text, 1)) == ("", [("weather", '{"city": "K')])


def test_a_prompt_that_leads_into_thoughts() -> None:
    """A call that must be made begins where the prompt ends."""
    assert form_of("thinking").opening == form_of("marked").opening
    assert form_of("marked").opening[0].startswith("<tool_call>")


@pytest.mark.parametrize("why", NO_FORM)
def test_templates_without_a_form_are_refused(why: str) -> None:
    with pytest.raises(InputError, match=why) as found:
        find_form(renderer(NO_FORM[why]), ["<|end|>"])
    assert "--chat-template FILE" in str(found.value)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    found.add_tokens(list(MARKS))
    return found


@pytest.mark.parametrize("name", FORMS)
def test_the_grammar_has_what_the_template_writes(name: str, tokenizer: Any) -> None:
    form = form_of(name)
    value = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array"}, "deep": {}}}
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    text = call_grammar(form, [("weather", value), ("now", nothing)], many=True, marks=marks_of(tokenizer))
    grammars = Grammars(vocabulary_of(tokenizer))

    def follows(said: str) -> int:
        """How many tokens the grammar has of it; the end is one."""
        matcher = grammars.matcher(text, ends=[tokenizer.eos_token_id])
        tokens = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        for count, token in enumerate(tokens):
            if not among(matcher.allowed(), torch.tensor([token])).item():
                return count - len(tokens)
            matcher.learn(token)
        return 0

    most = 1 if form.next is None else 3
    for count in range(1, most + 1):
        said = written(name, "", CALLS[:count])
        assert follows(said) == 0
        assert follows(said.replace("weather", "whether")) < 0
        assert follows(said + "x") < 0
        assert follows(said[:-1]) < 0
        assert follows(said.replace("city", "town")) < 0
    if name == "marked":  # the mark is one token, never its letters
        parts = [tokenizer.convert_tokens_to_ids("<tool_call>"), *tokenizer("<")["input_ids"]]
        allowed = grammars.matcher(text, ends=[tokenizer.eos_token_id]).allowed()
        assert among(allowed, torch.tensor(parts)).tolist() == [True, False]
    if most > 1:
        one = call_grammar(form, [("weather", value)], many=False, marks=marks_of(tokenizer))
        assert "call rest" in one
        text = one
        assert follows(written(name, "", CALLS[:1])) == 0
        assert follows(written(name, "", [CALLS[0], CALLS[2]])) < 0


def test_a_schema_that_cannot_be_obeyed_is_refused_by_the_tool(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"parameters of 'now': .*'pattern' is not offered"):
        call_grammar(form_of("bare"), [("now", {"type": "string", "pattern": "a"})], many=True, marks={})
