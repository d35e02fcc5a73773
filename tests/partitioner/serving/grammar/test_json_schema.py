"""Grammars of schemas: every text of one is valid by its schema; what cannot be obeyed is refused, by name."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from partitioner.errors import InputError
from partitioner.serving.grammar.check import Checks
from partitioner.serving.grammar.json_schema import ANY_OBJECT, grammar_of
from partitioner.serving.grammar.vocabulary import vocabulary_of
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.sampling.grammar import Grammars, among
from tests.partitioner.serving.grammar.json_schemas import SCHEMAS, is_valid

TOKENIZER: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
END = TOKENIZER.eos_token_id
VOCABULARY = vocabulary_of(TOKENIZER)
GRAMMARS = Grammars(VOCABULARY)
LINKED = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
        }
    },
}


def walk(schema: Any, seed: int) -> str | None:
    """A text at random, token by token; None where it does not end."""
    draw, matcher = random.Random(seed), GRAMMARS.matcher(grammar_of(schema), ends=[END])
    tokens: list[int] = []
    while len(tokens) < 80:
        left = among(matcher.allowed(), torch.arange(len(TOKENIZER))).nonzero()[:, 0].tolist()
        assert left, tokens
        ends = END in left and (len(left) == 1 or draw.random() < 0.5)
        token = END if ends else draw.choice([each for each in left if each != END])
        matcher.learn(token)
        if ends:
            return str(TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False))
        tokens.append(token)
    return None


@settings(max_examples=40, deadline=None)
@given(SCHEMAS, st.integers(0, 99))
def test_every_text_is_valid(schema: Any, seed: int) -> None:
    text = walk(schema, seed)
    if text is not None:
        assert is_valid(json.loads(text), schema), text


@pytest.mark.parametrize(
    "schema", [LINKED, ANY_OBJECT, {}, {"minLength": 2}, {"required": ["a"], "properties": {"a": {}}}]
)
def test_texts_that_end(schema: Any) -> None:
    found = [text for seed in range(40) if (text := walk(schema, seed)) is not None]
    assert len(set(found)) > 1
    for text in found:
        assert is_valid(json.loads(text), schema), text


def takes(schema: Any, text: str) -> bool:
    matcher = GRAMMARS.matcher(grammar_of(schema), ends=[END])
    for token in [*TOKENIZER(text)["input_ids"], END]:
        if not among(matcher.allowed(), torch.tensor([token])).all():
            return False
        matcher.learn(token)
    return True


PAIR = {"type": "object", "properties": {"a": {"type": "number"}, "\u00e9": {"type": "string", "maxLength": 2}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (PAIR, ['{"a": 1, "\u00e9": "\u00fc "}', '{"a":-0.5e9}', "{}"], ['{"a": 01}', '{"a": 1,}', '{"a": .5}']),
        (PAIR, ['{"\u00e9": "\U0001f600\u00e9"}'], ['{"\u00e9": "abc"}', '{"\u00e9": "\\ud83d"}', '{"\u00e9": "\t"}']),
        (PAIR, [], ["{ }", '{"b": 1}', '{"a": 1, "a": 2}', '{"\u00e9": "", "a": 2}', "[]"]),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, ["[]", "[null]"], ["[null, null]", "[", "[]]"]),
        ({"type": "string"}, ['"a\\"b"', '""', '"\\u00e9\\n"'], ['"\\ud83d"', '"\t"', '"a', '"\\x"', '"\x00"']),
        (LINKED, ['{"value": 3, "next": {"value": -4, "next": null}}'], ['{"value": 3}', '{"value": 3.5}']),
        ({"enum": [1, "b"]}, ["1", '"b"'], ["2", "1 ", '"c"']),
    ],
)  # fmt: skip
def test_texts(schema: Any, right: list[str], wrong: list[str]) -> None:
    assert all(takes(schema, text) for text in right)
    assert not any(takes(schema, text) for text in wrong)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "pattern": "a"}, "'pattern' is not offered"),
        ({"type": "object", "properties": {"a": {"type": "number", "minimum": 1}}}, r"#\.properties\.a: 'minimum'"),
        ({"oneOf": [{}]}, "'oneOf'"),
        ({"not": {}}, "'not'"),
        ({"anyOf": [{}], "type": "string"}, "'type' beside 'anyOf'"),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, "beside properties"),
        ({"type": "object", "required": ["a"]}, "properties does not have it"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "nothing is valid"),
        ({"type": "array", "maxItems": 10**9}, "up to 1000"),
        ({"type": "array", "maxItems": True}, "up to 1000"),
        ({"type": "text"}, "must be one of"),
        ({"type": "integer", "enum": ["a"]}, "not of the type"),
        ({"enum": []}, "not empty"),
        ({"items": 3, "type": "array"}, "must be an object"),
        ({"$ref": "https://example.com/schema"}, "of the same schema"),
        ({"$ref": "#/$defs/none"}, "has nothing at"),
        ({"$ref": ["#"]}, "of the same schema"),
        ({"$ref": "#"}, "stands for itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "stands for itself"),
        ({"enum": ["a" * 70_000]}, "may have 65536"),
        ({"type": "array", "items": {"anyOf": [{}] * 5000}}, "rules"),
        (False, "must be an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        grammar_of(schema)


WORDS = ["$ref", "$defs", "anyOf", "oneOf", "enum", "const", "type", "properties", "required", "additionalProperties"]
WORDS += ["items", "minItems", "maxItems", "minLength", "maxLength", "title", "", "x" * 1000]
LEAVES = [0, -1, 2**70, 1.5, True, None, "#", "#/$defs/x", "#/a~", "object", "array", "string", "integer", "y" * 1000]


def at_random(draw: random.Random, depth: int = 0) -> Any:
    """JSON whose words are those of schemas."""
    kind = draw.randrange(4) if depth < 5 else 0
    if kind < 2:
        return draw.choice(LEAVES)
    times = range(draw.randrange(4))
    if kind == 2:
        return [at_random(draw, depth + 1) for _ in times]
    return {draw.choice(WORDS): at_random(draw, depth + 1) for _ in times}


def test_whatever_is_asked_for_is_a_grammar_or_refused() -> None:
    """By an error of ours, which shows little of what was asked for."""
    said = []
    for seed in range(5000):
        try:
            grammar_of(at_random(random.Random(seed)))
        except InputError as error:
            said.append(str(error))
    assert 1000 < len(said) < 5000
    assert max(map(len, said)) < 1000


def test_depth_is_bounded() -> None:
    deep: Any = {"type": "null"}
    for _ in range(80):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InputError, match="nested more than"):
        grammar_of({"anyOf": [deep]} | {"$defs": {"a": deep}})
    chain = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(900)} | {"a900": {"type": "null"}}
    with pytest.raises(InputError, match="stand for each other"):
        grammar_of({"$ref": "#/$defs/a0", "$defs": chain})


def test_compiling_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Grammars.compiled

    def slow(self: Grammars, text: str) -> Any:
        if "hang" in text:
            time.sleep(30)
        if "large" in text:
            bytearray(8 << 30)
        return compiled(self, text)

    monkeypatch.setattr(Grammars, "compiled", slow)
    checks = Checks(VOCABULARY, timeout_s=1)
    try:
        began = time.monotonic()
        with pytest.raises(InputError, match="did not end within 1 s"):
            checks.grammar({"const": "hang"})
        assert time.monotonic() - began < 10
        with pytest.raises(InputError, match="MemoryError"):
            checks.grammar({"const": "large"})
        assert checks.grammar(LINKED) == checks.grammar(LINKED) == grammar_of(LINKED)
    finally:
        checks.close()
