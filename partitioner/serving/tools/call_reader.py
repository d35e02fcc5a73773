"""Calls of tools in an answer while its text comes: what is text, which tool is called, with what.

    reader = CallReader(form, names, many=True)
    reader.feed(text)       Read(text, deltas): what has become certain
    reader.end()            the rest, where nothing follows
    reader.calls            how many have begun
    reader.is_done          no more calls are wanted: what follows is not read

What looks like a call but names no tool of `names` is text. Nothing of a call is told before its name and the beginning
of its arguments are there; of the arguments each piece as it comes, as the model writes them, JSON or not. Where the
name comes after them, all is told at once.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from partitioner.serving.openai.answers import CallDelta
from partitioner.serving.tools.call_form import ID_LENGTH, MORE, CallForm, Pieces, matched

__all__ = ["CallReader", "Read", "joined"]

_NAME = re.compile(r"\s*([A-Za-z0-9_-]*)")
_LONGEST_NAME = 64


@dataclass(frozen=True)
class _Head:
    """A call that has begun: its name, its arguments where all are there, and where the text goes on."""

    name: str
    arguments: str
    end: int


class _Braces:
    """Where an object ends, looked for piece by piece."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._is_escaped = 0, False, False

    def end(self, text: str, at: int = 0) -> int | None:
        """After the object; None: not in this piece."""
        for place in range(at, len(text)):
            letter = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
            if self._depth == 0:
                return place + 1
        return None


@dataclass(frozen=True)
class Read:
    """What has been added: text, and parts of calls."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class CallReader:
    """See the module's docstring."""

    def __init__(self, form: CallForm, names: Collection[str], *, many: bool) -> None:
        self._form, self._names, self._many = form, frozenset(names), many
        self._held = ""
        """What was written and is not told yet."""
        self._state: Literal["text", "arguments", "after"] = "text"
        self._braces = _Braces()
        self.calls = 0
        self.is_done = False

    def feed(self, text: str) -> Read:
        """More of the answer."""
        self._held += text
        return self._read(is_last=False)

    def end(self) -> Read:
        """Nothing follows."""
        return self._read(is_last=True)

    def _read(self, *, is_last: bool) -> Read:
        said: list[str] = []
        deltas: list[CallDelta] = []
        going = True
        while going and not self.is_done:
            if self._state == "text":
                going = self._text(said, deltas, is_last=is_last)
            elif self._state == "arguments":
                going = self._arguments(deltas)
            else:
                going = self._after(deltas, is_last=is_last)
        return Read("".join(said), tuple(deltas))

    def _text(self, said: list[str], deltas: list[CallDelta], *, is_last: bool) -> bool:
        held = self._held
        for at, letter in enumerate(held):
            if letter.isspace():
                continue
            found = self._header(self._form.opening, held, at)
            if found is None or (is_last and found == MORE):
                continue
            said.append(held[:at].rstrip())
            if isinstance(found, int):
                # the space before it belongs to the call, if it is one
                self._held = held[len(said[-1]) :]
                return False
            self._begin(deltas, found)
            return True
        text = held if is_last else held.rstrip()
        self._held = "" if is_last else held[len(text) :]
        said.append("" if self.calls and not text.strip() else text)
        return False

    def _arguments(self, deltas: list[CallDelta]) -> bool:
        end = self._braces.end(self._held)
        if end != 0 and self._held:
            deltas.append(CallDelta(self.calls - 1, arguments=self._held[:end]))
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return False
        self._complete()
        return True

    def _complete(self) -> None:
        """A call is whole."""
        self._state = "after"
        self.is_done = not self._many or self._form.next is None

    def _after(self, deltas: list[CallDelta], *, is_last: bool) -> bool:
        """One more call, or what stands after the last, which is left out."""
        assert self._form.next is not None
        found = self._header(self._form.next, self._held, 0)
        if isinstance(found, _Head):
            self._begin(deltas, found)
            return True
        if found == MORE and not is_last:
            return False
        end = matched(self._form.closing, self._held, 0)
        if end == MORE and not is_last:
            return False
        if end == MORE:
            self._held = ""
        elif end is not None:
            self._held = self._held[end:]
        self._state = "text"
        return True

    def _begin(self, deltas: list[CallDelta], found: _Head) -> None:
        deltas.append(CallDelta(self.calls, _new_id(), found.name))
        self.calls += 1
        self._held = self._held[found.end :]
        if found.arguments:
            deltas.append(CallDelta(self.calls - 1, arguments=found.arguments))
            self._complete()
        else:
            self._state, self._braces = "arguments", _Braces()

    def _header(self, before: Pieces, text: str, at: int) -> _Head | int | None:
        """The call that begins at `at`; None: none does; or MORE."""
        end = matched(before, text, at)
        if end is None or end == MORE:
            return end
        if self._form.arguments_first:
            return self._reversed(text, end)
        name = self._name(text, end)
        if not isinstance(name, re.Match):
            return name
        end = _opened(text, matched(self._form.between, text, name.end()))
        return end if end is None or end == MORE else _Head(name[1], "", end)

    def _reversed(self, text: str, at: int) -> _Head | int | None:
        """As `_header`, from the arguments on, which come first."""
        begin = _opened(text, at)
        if begin is None or begin == MORE:
            return begin
        end = _Braces().end(text, begin)
        after = MORE if end is None else matched(self._form.between, text, end)
        if after is None or after == MORE:
            return after
        name = self._name(text, after)
        return _Head(name[1], text[begin:end], name.end()) if isinstance(name, re.Match) else name

    def _name(self, text: str, at: int) -> re.Match[str] | int | None:
        """That of a tool."""
        name = _NAME.match(text, at)
        assert name is not None
        if name.end() == len(text):
            return MORE if len(name[1]) <= _LONGEST_NAME else None
        return name if name[1] in self._names else None


def _opened(text: str, at: int | None) -> int | None:
    """Where an object begins, from `at` on."""
    if at is None or at == MORE:
        return at
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text):
        return MORE
    return at if text[at] == "{" else None


def joined(first: Read, second: Read) -> Read:
    """One after the other."""
    return Read(first.text + second.text, first.calls + second.calls)


def _new_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LENGTH))
