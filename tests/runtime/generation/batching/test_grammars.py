"""Rows with a grammar among rows without: what they say is of the grammar, on any plan, whatever runs beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from partitioner import Plan
from partitioner.errors import InputError
from partitioner.serving.grammar.json_schema import grammar_of
from runtime.kv_cache.cache_size import CacheSize
from runtime.sampling.grammar import vocabulary_text
from tests.partitioner.serving.grammar.json_schemas import SCHEMAS, is_valid
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, Outcome, on_all_ranks
from tests.support.partitioned import compiled_once

END = 1
# one token of each letter, and some of several letters, which cross what a grammar tells apart
LONG = (b'{"', b'":', b'", "', b"true", b"fal", b"se", b"null", b"10", b"]}", b"}", b"\xc3", b"\xa9", b'\\"', b"\\u00")
WORDS = [*LONG, *(b"",) * (32 - len(LONG)), *(bytes([each]) for each in range(32, 128))]
VOCABULARY = vocabulary_text([b"" if token == END else word for token, word in enumerate(WORDS)], [END])
ROOMY = CacheSize(max_batch=8, max_length=160, prefill_step=16)
DRAWN: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.5}
NARROW: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 0.8, "logprobs": True}
KINDS: tuple[dict[str, Any], ...] = ({}, DRAWN, NARROW, {"do_sample": True, "top_k": 5, "seed": 3})
LIST = grammar_of({"type": "array", "items": {"enum": ["a", True, 10]}, "minItems": 1, "maxItems": 9})


def parts(plan: str) -> Any:
    wanted = Plan.parse(plan)
    return compiled_once("llama", wanted.tp, pp=wanted.pp)


def told(plan: str, cases: list[Case], size: CacheSize = ROOMY) -> Outcome:
    return on_all_ranks(parts(plan), cases, size, vocabulary=VOCABULARY)


def text(tokens: list[int]) -> str:
    return b"".join(WORDS[token] for token in tokens if token != END).decode()


def asking(grammar: str | None, new: int = 120, **options: Any) -> Case:
    return Case([5, 9], {"max_new_tokens": new, "eos_token_id": [END], "grammar": grammar, **options})


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS)
def test_whatever_ends_is_valid(schema: Any) -> None:
    cases = [asking(grammar_of(schema), new=60, **kind) for kind in KINDS]
    found = told("tp=1", cases)
    assert not found.errors
    for tokens in found.tokens.values():
        if tokens[-1] == END:
            assert is_valid(json.loads(text(tokens)), schema), text(tokens)
    assert told("tp=2", cases).tokens == found.tokens


MIXED = [asking(LIST if number % 2 else None, new=40, **KINDS[number // 2 % 4]) for number in range(8)]


@pytest.mark.parametrize("plan", [*(pytest.param(plan, marks=pytest.mark.slow) for plan in ("tp=1", "pp=2")), "tp=2"])
def test_rows_with_and_without_beside_each_other(plan: str) -> None:
    alone = many_requests.alone(parts("tp=1"), [Case(case.prompt, without(case)) for case in MIXED])
    found = told(plan, MIXED)
    values = []
    for number in range(len(MIXED)):
        tokens = found.tokens[number]
        if number % 2:
            assert tokens[-1] == END
            values.append(json.loads(text(tokens)))
            with pytest.raises(ValueError):  # the control: what the model says by itself
                json.loads(b"".join(WORDS[token] for token in alone[number] if token != END))
        else:
            assert tokens == alone[number]
    assert all(value and set(map(str, value)) <= {"a", "True", "10"} for value in values)
    assert len({json.dumps(value) for value in values}) > 1


def without(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.options.items() if name != "grammar"}


def test_a_row_that_lost_its_place_goes_on_in_its_grammar() -> None:
    expected = told("tp=1", MIXED)
    tight = told("tp=2", MIXED, CacheSize(max_batch=6, max_length=12, prefill_step=16))
    assert tight.tokens == expected.tokens
    assert tight.status["preemptions"] > 0


def test_what_leaves_no_token_ends_its_row_alone() -> None:
    never = 'root ::= "\\x01"'  # no token says it
    only = 'root ::= "true"'
    letters = [token for token, word in enumerate(WORDS) if word[:1] == b"t"]
    cases = [asking(never), asking(LIST), asking(only, suppress_tokens=letters), asking(only)]
    for plan in ("tp=1", "tp=2"):
        found = told(plan, cases)
        assert set(found.errors) == {0, 2}
        for error in found.errors.values():
            assert isinstance(error, InputError)
            assert "leave no token for new token 1" in str(error)
        assert text(found.tokens[3]) == "true"
        assert found.tokens[1][-1] == END


def test_where_it_cannot_be_used() -> None:
    for case, said in (
        (asking('root ::= "a'), "cannot be compiled"),
        (asking("root ::= other"), "cannot be compiled"),
        (Case([5], {"eos_token_id": [], "grammar": LIST}), "must name one"),
        (Case([5], {"eos_token_id": [4000], "grammar": LIST}), "must name one"),
    ):
        with pytest.raises(InputError, match=said):
            told("tp=1", [case])
    with pytest.raises(InputError, match="launch"):
        on_all_ranks(parts("tp=1"), [asking(LIST)], ROOMY)
    with pytest.raises(InputError, match="leave it out here"):
        parts("tp=1").generate([[5]], grammar=LIST)
    with pytest.raises(InputError, match="up to"):
        parts("tp=1").generate([[5]], grammar=5)


@pytest.mark.parametrize("end", [END, 100])
def test_the_end_is_where_the_grammar_ends(end: int) -> None:
    """100 is a letter as well, which says nothing where it ends a row."""
    case = asking('root ::= "true"', eos_token_id=[end], logit_bias={end: 1000.0})
    (tokens,) = told("tp=2", [case]).tokens.values()
    assert tokens[-1] == end
    assert b"".join(WORDS[token] for token in tokens[:-1]) == b"true"
