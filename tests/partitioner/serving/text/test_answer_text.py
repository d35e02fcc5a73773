"""Text that comes token by token is the text of all tokens, cut before a stop string, wherever the pieces end."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from partitioner.serving.text.answer_text import AnswerText
from partitioner.storage.example import EXAMPLE_MODEL

TOKENIZER: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
LETTERS = st.text(alphabet="ab .é漢😀\n", max_size=30)


def streamed(prompt: list[int], tokens: list[int], stops: tuple[str, ...]) -> tuple[list[str], AnswerText]:
    text = AnswerText(TOKENIZER, prompt, stops)
    pieces = []
    for token in tokens:
        text.add(token)
        pieces.append(text.take())
        if text.stopped:
            break
    pieces.append(text.end())
    return pieces, text


@settings(max_examples=60)
@given(prompt=LETTERS.filter(bool), answer=LETTERS, stops=st.lists(LETTERS.filter(bool), max_size=3))
def test_pieces_add_up(prompt: str, answer: str, stops: list[str]) -> None:
    ids, tokens = TOKENIZER(prompt)["input_ids"], TOKENIZER(answer)["input_ids"]
    pieces, text = streamed(ids, tokens, tuple(stops))
    places = [answer.find(stop) for stop in stops if stop in answer]
    assert text.stopped == bool(places)
    # of several stop strings, the one that is complete first ends the text
    first = min((answer.find(stop) + len(stop) for stop in stops if stop in answer), default=len(answer))
    begun = answer[:first]
    ends = [begun.find(stop) for stop in stops if stop in begun]
    assert text.text.startswith(answer[: min(places, default=len(answer))])
    assert len(text.text) <= min(ends, default=len(answer))
    assert "".join(pieces) == text.text
    assert not any(stop in text.text for stop in stops)


def test_half_a_letter_waits_for_its_other_bytes() -> None:
    tokens = TOKENIZER("漢")["input_ids"]
    assert len(tokens) > 1, "negative control: a letter of several tokens"
    pieces, _ = streamed([5], tokens, ())
    assert pieces == [""] * (len(tokens) - 1) + ["漢", ""]
    # what never becomes a letter is told at the end
    pieces, _ = streamed([5], tokens[:1], ())
    assert pieces == ["", "\ufffd"]


def test_what_may_be_a_stop_string_is_held_back() -> None:
    tokens = [TOKENIZER(letter)["input_ids"][0] for letter in "xabay"]
    pieces, text = streamed([5], tokens, ("abac",))
    assert pieces == ["x", "", "", "", "abay", ""]
    assert not text.stopped


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_say_nothing(special: bool) -> None:
    tokens = [*TOKENIZER(" the value")["input_ids"], *([0] if special else [])]
    _, text = streamed(TOKENIZER("If")["input_ids"], tokens, ())
    assert text.text == " the value"
