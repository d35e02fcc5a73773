"""The text of a plan: items with commas between, `name` or `name=value`; lists in brackets.

tp=2,keep_whole=[lm_head*,wte]      [("tp", "2"), ("keep_whole", "[lm_head*,wte]")]
"""

from __future__ import annotations

import re
from typing import Any

from partitioner.errors import PlanError

__all__ = ["items", "read_value", "shown", "write_value"]

_INTEGER = re.compile(r"[+-]?\d{1,1000}\Z")  # Python reads no more than some 4000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\Z", re.IGNORECASE)
_PLAIN = re.compile(r"[^\[\],=\s\"']+\Z")
_DEEPEST = 8
"""Brackets in brackets. Nothing that a plan takes has more than two."""
_WORDS = {"true": True, "false": False, "none": None}


def items(text: str) -> list[tuple[str, str | None]]:
    """Name and value of each item; no value where there is no `=`."""
    found: list[tuple[str, str | None]] = []
    for part in _parts(text, text):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not name or (equals and not value):
            raise PlanError(f"the plan {shown(text)} has {shown(part.strip())}; required: NAME=VALUE, such as tp=2")
        found.append((name, value if equals else None))
    return found


def read_value(text: str) -> Any:
    """A whole number, a number, true, false, none, a list of these in brackets; otherwise the text."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return tuple(read_value(part) for part in _parts(text[1:-1], text))
    if text[:1] in ("'", '"') and text.endswith(text[0]) and len(text) > 1:
        return text[1:-1]
    if _INTEGER.match(text):
        return int(text)
    if _NUMBER.match(text):
        return float(text)
    return _WORDS.get(text.lower(), text)


def write_value(value: Any) -> str:
    """What `read_value` reads as `value`."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(write_value, value))}]"
    if isinstance(value, str):
        is_plain = _PLAIN.match(value) and read_value(value) == value
        return value if is_plain else f'"{value}"' if '"' not in value else f"'{value}'"
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def _parts(text: str, whole: str) -> list[str]:
    """Between the commas that stand outside of brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "[":
            depth += 1
            if depth > _DEEPEST:
                raise PlanError(f"in {shown(whole)}, brackets stand more than {_DEEPEST} deep in each other")
        elif character == "]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth or quote:
        raise PlanError(f"in {shown(whole)}, a {'quote' if quote else 'bracket'} is not closed")
    rest = text[start:]
    return [*parts, rest] if parts or rest.strip() else []


def shown(text: str) -> str:
    """For a message: no more than a line or two of it."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
