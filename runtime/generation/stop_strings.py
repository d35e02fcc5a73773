"""Texts after which a sequence ends, found in what its tokens say: the prompt's among them.

A stop string may begin in the prompt and within a token, and ends in the newest one. A token is read as the tokenizer
writes it after those that stand before it: alone, many drop the space that they begin with.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from partitioner.errors import InputError

__all__ = ["StopStrings"]

_TOKENS_PER_CHARACTER = 4  # of UTF-8, where each byte is a token
_SPARE = 8  # tokens that say nothing, and one before the string


class StopStrings:
    """`tokenizer`: what decodes a list of ids."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        decode = getattr(tokenizer, "decode", None)
        if not callable(decode):
            raise InputError(
                "stop_strings need a tokenizer to decode with, such as AutoTokenizer.from_pretrained(...) yields; "
                f"got tokenizer={tokenizer!r}"
            )
        self.strings = tuple(strings)
        self._decode: Callable[..., str] = decode
        parameters = inspect.signature(decode).parameters
        as_written = "clean_up_tokenization_spaces"  # which would take spaces out between tokens
        accepts = as_written in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._options = {as_written: False} if accepts else {}
        self._looks_at = _SPARE + _TOKENS_PER_CHARACTER * max(map(len, self.strings), default=0)

    def end(self, tokens: Sequence[int]) -> bool:
        """Whether one of the strings ends in the last of `tokens`."""
        recent = list(tokens[-self._looks_at :])
        text, before = self._decode(recent, **self._options), self._decode(recent[:-1], **self._options)
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, before, strict=False))
        start = sum(1 for _ in alike)
        # an occurrence that ends after `start` begins after start - length
        return any(text.find(string, max(start - len(string) + 1, 0)) >= 0 for string in self.strings)
