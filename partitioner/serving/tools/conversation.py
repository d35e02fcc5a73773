"""Messages and tools of a request as a chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from partitioner.serving.openai.errors import invalid
from partitioner.serving.openai.requests import Message
from partitioner.serving.openai.tools import MadeCall
from partitioner.serving.tools.call_form import CallForm

__all__ = ["has_calls", "template_messages"]


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether the template must be able to write calls, or what came of them."""
    return any(message.tool_calls or message.role == "tool" for message in messages)


def template_messages(messages: Sequence[Message], form: CallForm | None) -> list[dict[str, Any]]:
    """form: where messages have calls. Raises ApiError where a message answers no call, or is not to be written."""
    called: dict[str, str] = {}
    found = []
    for number, message in enumerate(messages):
        # newer clients say developer where templates say system
        said: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        said["content"] = message.text
        if message.name is not None:
            said["name"] = message.name
        if message.role == "tool":
            _add_result(said, message, called, form, f"messages[{number}]")
        if message.tool_calls:
            assert form is not None
            said["content"] = message.text or form.empty
            said["tool_calls"] = [
                _call(call, form, f"messages[{number}].tool_calls[{place}]")
                for place, call in enumerate(message.tool_calls)
            ]
            called |= {call.id: call.function.name for call in message.tool_calls}
        found.append(said)
    return found


def _add_result(
    said: dict[str, Any], message: Message, called: dict[str, str], form: CallForm | None, where: str
) -> None:
    assert message.tool_call_id is not None
    if message.tool_call_id not in called:
        raise invalid(
            f"{where} answers the call {message.tool_call_id!r}, which no message before it has made.", param=where
        )
    if form is not None and not form.has_results:
        raise invalid("The model's chat template does not write what tools have answered.", param=where)
    said["tool_call_id"] = message.tool_call_id
    said["name"] = called[message.tool_call_id]  # which some templates write


def _call(call: MadeCall, form: CallForm, where: str) -> dict[str, Any]:
    given: Any = call.function.arguments
    if form.arguments_as == "object":
        try:
            given = json.loads(given or "{}")
        except ValueError:
            given = None
        if not isinstance(given, dict):
            where += ".function.arguments"
            raise invalid(f"{where} must be a JSON object, as this model's chat template takes it.", param=where)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": given}}
