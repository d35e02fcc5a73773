"""Stop strings end a sequence where transformers' own criterion does."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import StopStringCriteria

from partitioner import Plan, partition
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.generation.stop_strings import StopStrings


class Spaced:
    """Writes words with a space before each but the first, as sentencepiece does; 9 says nothing."""

    words = ("Return", "a", "list", "of", "strings", "str", "ings")

    def decode(self, ids: list[int]) -> str:
        glued = {6}
        text = "".join(("" if i in glued else " ") + self.words[i] for i in ids if i != 9)
        return text[1:] if text.startswith(" ") else text


@pytest.mark.parametrize(
    ("stop", "tokens", "ends"),
    [
        ("of strings", [0, 1, 2, 3, 4], True),  # begins in what stood before
        (" strings", [3, 4], True),  # a space that the token alone would not have
        ("f str", [3, 5, 6], False),  # ended before the last token
        ("f string", [3, 5, 6], True),
        ("of strings", [0, 3, 5, 6], True),
        ("list", [0, 1, 2], True),
        ("list", [0, 1, 2, 3], False),
        ("list", [0, 1, 2, 9], False),
        ("ofstrings", [3, 4], False),
        ("Return", [0], True),
    ],
)
def test_where_the_last_token_ends_it(stop: str, tokens: list[int], ends: bool) -> None:
    assert StopStrings([stop], Spaced()).end(tokens) is ends
    assert StopStrings(["nothing", stop], Spaced()).end([0, *tokens]) is ends


def test_the_example_model_stops_where_transformers_does() -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    given = tokenizer("Return a list of", return_tensors="pt")
    ids = given["input_ids"]
    options = {"stop_strings": ["of strings"], "tokenizer": tokenizer, "max_new_tokens": 12}
    expected = model.generate(**given, **options, do_sample=False)
    assert expected.shape[1] < ids.shape[1] + 12
    assert torch.equal(partition(model, Plan(tp=2)).generate(ids, **options), expected)


def test_random_strings_of_random_texts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    chosen = random.Random(0)
    text = "Return a list of strings, sorted; d\u00e9j\u00e0 vu \u2026 \U0001f600 as in the first line.\n    x = 1"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = tokenizer.decode(ids)
    hits = 0
    for _ in range(400):
        start = chosen.randrange(1, len(said) - 1)
        stop = said[start : start + chosen.randint(1, 9)]
        length = chosen.randint(2, len(ids))
        own = bool(StopStringCriteria(tokenizer, [stop])(torch.tensor([ids[:length]]), None)[0])
        assert StopStrings([stop], tokenizer).end(ids[:length]) is own, (stop, tokenizer.decode(ids[:length]))
        hits += own
    assert hits > 3
