"""The form in which a chat template writes calls of tools, found by what it makes of a call that is known.

A template is a program, and each model has its own. So a conversation with one call, whose name, arguments and id stand
nowhere else, is rendered, and the text around them is the form. The same without calls says where an answer begins and
ends; the same with two calls, what stands between them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from partitioner.errors import InputError
from partitioner.serving.text.chat_template import Renderer, TemplateFailed
from partitioner.serving.tools.call_form import CallForm, Pieces

__all__ = ["CallForms", "find_form"]

_USER: dict[str, Any] = {"role": "user", "content": "zqask"}
_SAID = "zqsaid"
_NAMES = ("zqfirst", "zqsecond")
_IDS = ("zqAid0001", "zqBid0002")
_ARGUMENTS = ({"zqkey": "zqone"}, {"zqkey": "zqtwo"})
_RESULT = "zqresult"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "zqabout",
            "parameters": {"type": "object", "properties": {"zqkey": {"type": "string"}}, "required": ["zqkey"]},
        },
    }
    for name in _NAMES
]
_MEND = "start the server with --chat-template FILE of a template that does, in the form the model was trained on"

Render = Callable[..., str]


class CallForms:
    """The form of one server's template, looked for when it is first needed. Any thread may ask."""

    def __init__(self, renderer: Renderer, ends: Sequence[str]) -> None:
        """ends: texts of the tokens that end an answer."""
        self._renderer, self._ends = renderer, ends
        self._lock = threading.Lock()
        self._found: CallForm | InputError | None = None

    def form(self) -> CallForm:
        """Raises InputError where there is none: what the template lacks, and what to do."""
        with self._lock:
            if self._found is None:
                try:
                    self._found = find_form(self._renderer.render, self._ends)
                except InputError as error:
                    self._found = error
        if isinstance(self._found, InputError):
            raise self._found
        return self._found


def find_form(render: Render, ends: Sequence[str]) -> CallForm:
    """render: as `Renderer.render`. Raises InputError where there is none: what the template lacks, and what to do."""
    prompt = _rendered(render, [_USER], prompt=True)
    if prompt is None or _NAMES[0] not in prompt:
        raise InputError(f"the chat template does not tell the model of tools: {_MEND}")
    plain = _rendered(render, [_USER, {"role": "assistant", "content": _SAID}])
    head, said, tail = (plain or "").rpartition(_SAID)
    if not said:
        raise InputError(f"the chat template does not write what the assistant has said: {_MEND}")
    kinds: tuple[Literal["object", "text"], ...] = ("object", "text")
    for kind, empty in product(kinds, ("", None)):
        one = _rendered(render, [_USER, _calls(1, kind, empty)])
        # what stands before an answer may end with space that does not stand before a call
        heads = [start for each in (prompt, head) for start in (each, each.rstrip())]
        starts = [start for start in heads if one is not None and one.startswith(start)]
        if one is None or not starts:
            continue
        start = len(max(starts, key=len))
        found = _call(one, start, 0)
        if found is None:
            continue
        opening = _without_lead(render, kind, one[start : found.start])
        forced = one[len(prompt) : found.start] if one.startswith(prompt) else opening
        return CallForm(
            opening=_pieces(opening),
            forced=_pieces(forced),
            between=_pieces(one[found.between]),
            closing=_pieces(_until_end(one[found.end :], tail, ends)),
            next=_next(render, kind, empty, one[: found.end]),
            arguments_first=found.arguments_first,
            arguments_as=kind,
            empty=empty,
            has_results=_has_results(render, kind, empty),
        )
    raise InputError(
        f"the chat template writes no calls of tools, or not by their names with arguments as JSON: {_MEND}"
    )


def _rendered(render: Render, messages: list[dict[str, Any]], *, prompt: bool = False) -> str | None:
    try:
        return render(messages, tools=_TOOLS, prompt=prompt)
    except TemplateFailed:
        return None


def _calls(count: int, kind: str, content: str | None) -> dict[str, Any]:
    calls = [
        {
            "id": _IDS[number],
            "type": "function",
            "function": {
                "name": _NAMES[number],
                "arguments": _ARGUMENTS[number] if kind == "object" else json.dumps(_ARGUMENTS[number]),
            },
        }
        for number in range(count)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@dataclass(frozen=True)
class _Call:
    """Where a call stands in a text, from the first of its name and its arguments to the other."""

    start: int
    between: slice
    end: int
    arguments_first: bool


def _call(text: str, start: int, number: int) -> _Call | None:
    name = text.find(_NAMES[number], start)
    at = text.find("{", start)
    while name >= 0 and at >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            found, end = None, at
        if found == _ARGUMENTS[number]:
            name_end = name + len(_NAMES[number])
            if end <= name:
                return _Call(at, slice(end, name), name_end, arguments_first=True)
            return _Call(name, slice(name_end, at), end, arguments_first=False)
        at = text.find("{", at + 1)
    return None


def _without_lead(render: Render, kind: str, opening: str) -> str:
    """The part of an opening that stands there after other words of the answer, too."""
    text = _rendered(render, [_USER, _calls(1, kind, _SAID)])
    _, said, after = (text or "").rpartition(_SAID)
    found = _call(after, 0, 0)
    if not said or found is None:
        return opening
    other = after[: found.start]
    same = 0
    while same < min(len(opening), len(other)) and opening[-1 - same] == other[-1 - same]:
        same += 1
    return opening[len(opening) - same :].lstrip() or opening


def _until_end(text: str, tail: str, ends: Sequence[str]) -> str:
    """What the model writes of the text after a call; tail: what stands after an answer without calls."""
    places = [place for place in (text.find(end) for end in ends if end) if place >= 0]
    if places:
        text = text[: min(places)]
    elif tail and text.endswith(tail):
        text = text[: -len(tail)]
    return text.rstrip()


def _next(render: Render, kind: str, empty: str | None, one: str) -> Pieces | None:
    """one: the text up to the end of the first call's name and arguments."""
    two = _rendered(render, [_USER, _calls(2, kind, empty)])
    if two is None or not two.startswith(one):
        return None
    found = _call(two, len(one), 1)
    return None if found is None else _pieces(two[len(one) : found.start])


def _has_results(render: Render, kind: str, empty: str | None) -> bool:
    result = {"role": "tool", "tool_call_id": _IDS[0], "name": _NAMES[0], "content": _RESULT}
    text = _rendered(render, [_USER, _calls(1, kind, empty), result], prompt=True)
    return text is not None and _RESULT in text


def _pieces(text: str) -> Pieces:
    for call in _IDS[1:]:
        text = text.replace(call, _IDS[0])
    return tuple(text.split(_IDS[0]))
