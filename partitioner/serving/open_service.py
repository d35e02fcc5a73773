"""From a model's folder and its running ranks to what HTTP routes stand on; for the command, and for other hosts of it.

tokenizer, notes = read_tokenizer(folder, chat_template)
vocabulary, why_not = read_vocabulary(tokenizer)           for `launch(vocabulary=)`
service = open_service(llm, folder, tokenizer, ...)        each replica has written a token by then
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.grammar.check import Checks
from partitioner.serving.grammar.vocabulary import vocabulary_of
from partitioner.serving.http.keys import Keys
from partitioner.serving.http.limits import Limits
from partitioner.serving.http.service import Service
from partitioner.serving.text.chat_template import TemplateFailed, render
from partitioner.serving.text.tokenizer import context_length, load_tokenizer
from runtime.launching.launched import Launched

__all__ = ["open_service", "read_tokenizer", "read_vocabulary"]

_LENGTH = 4096
"""Tokens of a text, where nothing of the model says how many it takes."""


def read_tokenizer(model: str, chat_template: str | None) -> tuple[Any, list[str]]:
    """The tokenizer of a folder, with the template of a file where one is given; what is to be said about it."""
    tokenizer, note = load_tokenizer(model)
    notes = [note] if note else []
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the chat template {chat_template!r} cannot be read: {error}") from error
    if tokenizer.chat_template is None:
        notes.append(
            "the tokenizer has no chat template, so /v1/chat/completions is refused: give --chat-template FILE"
        )
    elif why := _fault(tokenizer):
        if chat_template is not None and why.startswith("TemplateSyntaxError"):
            raise InputError(f"the chat template {chat_template!r} is none of jinja: {why}")
        notes.append(f"the chat template refuses a message of a user, and so will /v1/chat/completions: {why}")
    return tokenizer, notes


def _fault(tokenizer: Any) -> str:
    """Why the chat template takes no message at all; "": it does."""
    try:
        render(tokenizer, [{"role": "user", "content": "a"}])
    except TemplateFailed as error:
        return str(error)
    return ""


def read_vocabulary(tokenizer: Any) -> tuple[str | None, str]:
    """What the tokens say, or why it is not known."""
    try:
        return vocabulary_of(tokenizer), ""
    except InputError as error:
        return None, str(error)


def open_service(
    llm: Launched,
    model: str,
    tokenizer: Any,
    *,
    vocabulary: str | None,
    why_not: str,
    limits: Mapping[str, Any],
    max_context: int | None,
    name: str | None,
    keys: Keys | None = None,
) -> Service:
    """limits: fields of `Limits`, but for the length of texts: what the model takes, or max_context.

    name: by default the folder's.

    Raises InputError for a max_context that the model does not take, or the cache, and for what its generation config
    asks in vain.
    """
    length = _max_length(model, llm, max_context)
    # one token of each replica, which sets its cache aside
    llm.generate([[0]] * llm.replicas, max_new_tokens=1, stop_strings=None)
    bounds = Limits(max_length=_that_fits(length, llm, is_asked=max_context is not None), **limits)
    checks = why_not if vocabulary is None else Checks(vocabulary)
    served = name or Path(model).resolve().name
    return Service(llm, tokenizer, name=served, limits=bounds, keys=keys, checks=checks)


def _max_length(model: str, llm: Launched, asked: int | None) -> int:
    """What was asked for, within what the model takes."""
    known = [length for length in (llm.longest, context_length(model)) if length is not None]
    longest = min(known, default=None)
    if asked is not None and longest is not None and asked > longest:
        raise InputError(f"--max-context {asked} is more than the {longest} tokens that {model!r} takes")
    return asked if asked is not None else longest or _LENGTH


def _that_fits(length: int, llm: Launched, *, is_asked: bool) -> int:
    """At most what each replica's cache has room for: an answer that may be as long as is left would be refused."""
    room = min((each.longest_that_fits or length for each in llm.status().replicas), default=length)
    if is_asked and room < length:
        raise InputError(
            f"--max-context {length} does not fit: the cache of a rank has room for {room} tokens of one text; give "
            "less, or a larger --cache-memory"
        )
    return min(room, length)
