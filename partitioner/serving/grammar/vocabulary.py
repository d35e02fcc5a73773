"""What the tokens of a tokenizer say, byte by byte, as ranks need it for grammars."""

from __future__ import annotations

from typing import Any

from partitioner.errors import InputError

__all__ = ["vocabulary_of"]

_IN_NO_TEXT = b"\xff"
"""No letter's bytes in UTF-8. What has no bytes at all could not be named either."""


def vocabulary_of(tokenizer: Any) -> str:
    """For `launch(vocabulary=)`; a text may end behind the tokenizer's own ends.

    Special and added tokens are in no text of a grammar, but it may name them by their ids. Needs the extra
    `partitioner[grammar]`; raises InputError without it, and for a tokenizer of which xgrammar does not know how it
    writes bytes.
    """
    try:
        import xgrammar
    except ModuleNotFoundError as error:
        raise InputError(
            f"grammars need {error.name}, which is not there: pip install 'partitioner[grammar]'"
        ) from error
    from runtime.sampling.grammar import vocabulary_text

    own = tokenizer.eos_token_id
    stops = sorted(set(own if isinstance(own, list) else () if own is None else (own,)))
    try:
        words = list(xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=stops or [0]).decoded_vocab)
    except Exception as error:  # what xgrammar raises has no class of its own
        raise InputError(f"xgrammar cannot read this tokenizer: {error}") from error
    for token in (*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids):
        if token < len(words):
            words[token] = b"" if token in stops else _IN_NO_TEXT
    return vocabulary_text(words, stops or [0])
