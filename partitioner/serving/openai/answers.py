"""What is answered, as OpenAI's clients read it: whole answers, and the events of a stream.

Piece     what has been added to one choice: text, its tokens, and why it ended where it did
Usage     tokens of the prompt and of all choices
chat_*, completion_*     the two forms
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Answer",
    "CallDelta",
    "ChatAnswer",
    "CompletionAnswer",
    "Piece",
    "Reason",
    "ScoredToken",
    "Usage",
    "model_list",
]

Reason = Literal["stop", "length", "tool_calls"]
Data = dict[str, Any]


@dataclass(frozen=True)
class ScoredToken:
    """A token's text, where it begins in the answer, its log-probability, and the most probable ones in its place."""

    text: str
    offset: int
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class CallDelta:
    """What has been added to a call of a tool: its id and name as it begins, then its arguments piece by piece."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    @property
    def data(self) -> Data:
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        called = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": called}


@dataclass(frozen=True)
class Piece:
    """What has been added to a choice."""

    index: int
    text: str
    tokens: tuple[ScoredToken, ...] = ()
    reason: Reason | None = None
    calls: tuple[CallDelta, ...] = ()


@dataclass
class Usage:
    """Counted as the tokens come."""

    prompt: int = 0
    completion: int = 0

    @property
    def data(self) -> Data:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass
class Answer:
    """One answer: `events` of a stream, or `whole`."""

    model: str
    usage: Usage
    scored: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix = ""
    kind = ""
    chunk_kind = ""

    def whole(self, choices: Sequence[Sequence[Piece]]) -> Data:
        """choices: the pieces of each."""
        return {**self._head(self.kind), "choices": [*map(self._choice, choices)], "usage": self.usage.data}

    def first(self, index: int) -> Data | None:
        """What a choice begins with, before its first token."""
        return None

    def event(self, piece: Piece) -> Data:
        return self._event([self._part(piece)])

    def last(self) -> Data | None:
        """After all choices: how many tokens there were, where that was asked for."""
        return {**self._event([]), "usage": self.usage.data} if self.with_usage else None

    def _event(self, choices: list[Data]) -> Data:
        usage = {"usage": None} if self.with_usage else {}
        return {**self._head(self.chunk_kind), "choices": choices, **usage}

    def _head(self, kind: str) -> Data:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _choice(self, pieces: Sequence[Piece]) -> Data:
        raise NotImplementedError

    def _part(self, piece: Piece) -> Data:
        raise NotImplementedError


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def first(self, index: int) -> Data | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _part(self, piece: Piece) -> Data:
        delta: Data = {"content": piece.text} if piece.text or (piece.tokens and not piece.calls) else {}
        if piece.calls:
            delta["tool_calls"] = [call.data for call in piece.calls]
        scores = self._scores(piece.tokens) if piece.tokens else None
        return {"index": piece.index, "delta": delta, "logprobs": scores, "finish_reason": piece.reason}

    def _choice(self, pieces: Sequence[Piece]) -> Data:
        text, calls = "".join(piece.text for piece in pieces), _calls(pieces)
        message: Data = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        scores = self._scores([token for piece in pieces for token in piece.tokens]) if self.scored else None
        last = pieces[-1]
        return {"index": last.index, "message": message, "logprobs": scores, "finish_reason": last.reason}

    def _scores(self, tokens: Sequence[ScoredToken]) -> Data:
        said = [
            {**_entry(token.text, token.logprob), "top_logprobs": [_entry(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": said, "refusal": None}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def _part(self, piece: Piece) -> Data:
        scores = self._scores(piece.tokens) if piece.tokens else None
        return {"index": piece.index, "text": piece.text, "logprobs": scores, "finish_reason": piece.reason}

    def _choice(self, pieces: Sequence[Piece]) -> Data:
        scores = self._scores([token for piece in pieces for token in piece.tokens]) if self.scored else None
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        return {"index": last.index, "text": text, "logprobs": scores, "finish_reason": last.reason}

    def _scores(self, tokens: Sequence[ScoredToken]) -> Data:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            # the likeliest first, which stays where several tokens say the same: bytes that are no letter alone
            "top_logprobs": [{text: _number(value) for text, value in reversed(token.top)} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def model_list(name: str, created: int) -> Data:
    """The answer of /v1/models: one model."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "partitioner"}]}


def _calls(pieces: Sequence[Piece]) -> list[Data]:
    """Whole, from their parts."""
    found: list[Data] = []
    for delta in (call for piece in pieces for call in piece.calls):
        if delta.id is not None:
            called = {"name": delta.name, "arguments": ""}
            found.append({"id": delta.id, "type": "function", "function": called})
        found[delta.index]["function"]["arguments"] += delta.arguments
    return found


def _entry(text: str, logprob: float) -> Data:
    # a part of a letter has no text of its own, so its bytes are not known from it
    known = list(text.encode()) if "\ufffd" not in text else None
    return {"token": text, "logprob": _number(logprob), "bytes": known}


def _number(logprob: float) -> float:
    """JSON has no infinity: what OpenAI writes for a token that is out of the question."""
    return max(logprob, -9999.0)
