"""Reading data that may be hostile: every value is asked for by its kind, and an error names where it lies.

record = Record.parse(text, "manifest.json")
record.integer("schema", low=1)
record.done()                            what nobody asked for is refused as well
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch

from partitioner.errors import BundleError

__all__ = [
    "CONTROL",
    "DOTTED",
    "DTYPES",
    "HEXADECIMAL",
    "IDENTIFIER",
    "Record",
    "dtype_name",
    "parse",
    "short",
    "whole_number",
]

T = TypeVar("T")

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
DOTTED = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,50}")
"""A name of a weight, or of a module."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What would steer a terminal that shows a text, or could not be shown at all."""
_PLAIN = re.compile(r"[A-Za-z0-9_./\-]{1,100}")
HEXADECIMAL = re.compile(r"[0-9a-f]{64}")
"""A SHA-256."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_LARGEST = 2**62
_DEEPEST = 40


def dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BundleError(f"a bundle cannot hold the dtype {dtype}; it can hold {', '.join(DTYPES)}")
    return name


def whole_number(value: object, *, low: int = 0, high: int = _LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


class Record:
    """A JSON object of which fields are asked for by kind; `where` is how errors call it."""

    def __init__(self, data: object, where: str) -> None:
        self.where = where
        if not isinstance(data, dict):
            raise BundleError(f"{where} must be an object, got {short(data)}")
        self._data: dict[str, Any] = data
        self._asked: set[str] = set()

    @classmethod
    def parse(cls, text: bytes, where: str) -> Record:
        return cls(parse(text, where), where)

    def fail(self, name: str, required: str) -> NoReturn:
        raise BundleError(f"{self.where}: {short(name)} must be {required}, got {short(self._data.get(name))}")

    def any(self, name: str) -> Any:
        if name not in self._data:
            raise BundleError(f"{self.where} has no {short(name)}")
        self._asked.add(name)
        return self._data[name]

    def text(self, name: str, pattern: re.Pattern[str] | None = None, *, longest: int = 10_000) -> str:
        value = self.any(name)
        if not isinstance(value, str) or len(value) > longest or CONTROL.search(value):
            self.fail(name, f"a text of at most {longest} characters, without control characters")
        if pattern is not None and not pattern.fullmatch(value):
            self.fail(name, "a plain name (letters, digits, underscores and dots)")
        return value

    def one_of(self, name: str, known: dict[str, T]) -> T:
        value = self.any(name)
        if not isinstance(value, str) or value not in known:
            self.fail(name, f"one of {', '.join(known)}")
        return known[value]

    def digest(self, name: str) -> str:
        value = self.any(name)
        if not isinstance(value, str) or not HEXADECIMAL.fullmatch(value):
            self.fail(name, "64 hexadecimal digits")
        return value

    def integer(self, name: str, *, low: int = 0, high: int = _LARGEST) -> int:
        value = self.any(name)
        if not whole_number(value, low=low, high=high):
            self.fail(name, f"a whole number from {low} to {high}")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.any(name)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def maybe(self, name: str, read: Callable[[str], T]) -> T | None:
        """None where the field is null."""
        return None if self.any(name) is None else read(name)

    def list(self, name: str) -> list[Any]:
        value = self.any(name)
        if not isinstance(value, list):
            self.fail(name, "a list")
        return value

    def integers(self, name: str, *, low: int = 0, high: int = _LARGEST) -> tuple[int, ...]:
        value = self.any(name)
        if not isinstance(value, list) or not all(whole_number(item, low=low, high=high) for item in value):
            self.fail(name, f"a list of whole numbers from {low} to {high}")
        return tuple(value)

    def texts(self, name: str, pattern: re.Pattern[str] | None = None) -> tuple[str, ...]:
        value = self.any(name)
        if not isinstance(value, list) or not all(
            isinstance(item, str)
            and len(item) < 10_000
            and not CONTROL.search(item)
            and (pattern is None or pattern.fullmatch(item))
            for item in value
        ):
            self.fail(name, "a list of names" if pattern else "a list of texts")
        return tuple(value)

    def intervals(self, name: str, place: int) -> tuple[tuple[int, int], ...]:
        """The `place`-th entry of a list: half-open, ascending, apart from each other."""
        value, last = self.any(name)[place], -1
        if not isinstance(value, list):
            self.fail(name, "lists of intervals")
        for item in value:
            if not isinstance(item, list) or len(item) != 2 or not all(map(whole_number, item)):
                self.fail(name, "lists of intervals [start, stop]")
            if not last < item[0] < item[1]:
                self.fail(name, "lists of intervals, ascending and apart")
            last = item[1]
        return tuple((a, b) for a, b in value)

    def record(self, name: str) -> Record:
        # names are data too, as those of files are
        return Record(self.any(name), f"{self.where}: {name if _PLAIN.fullmatch(name) else short(name)}")

    def records(self, name: str) -> Iterator[Record]:
        value = self.any(name)
        if not isinstance(value, list):
            self.fail(name, "a list")
        return (Record(item, f"{self.where}: {name}[{index}]") for index, item in enumerate(value))

    def has(self, name: str) -> bool:
        return name in self._data

    def fields(self) -> tuple[str, ...]:
        """Their names, where those are data too."""
        return tuple(self._data)

    def done(self) -> None:
        extra = sorted(set(self._data) - self._asked)
        if extra:
            raise BundleError(f"{self.where} has the unknown field {short(extra[0])}")


def parse(text: bytes, where: str) -> Any:
    """Strict JSON: UTF-8, no name twice, no number that JSON does not have or that is infinite, little nesting."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(found)
        if len(data) != len(found):
            raise ValueError("a name stands twice in one object")
        return data

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    def number(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError("a number is too long")
        return int(digits)

    def real(digits: str) -> float:
        if len(digits) > 40 or not math.isfinite(float(digits)):
            raise ValueError("a number is too large or too long")
        return float(digits)

    hooks: dict[str, Any] = {
        "object_pairs_hook": pairs, "parse_constant": constant, "parse_int": number, "parse_float": real
    }  # fmt: skip
    try:
        data = json.loads(text.decode(), **hooks)
        if text.count(b"[") + text.count(b"{") > _DEEPEST and _is_deep(data):
            raise ValueError("it is nested too deeply")
        return data
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {error}") from None


def _is_deep(data: Any) -> bool:
    """Deeper than anything that is written; so deep that printing it might fail."""
    level = [data]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, (list, dict))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


def short(value: object) -> str:
    """A value as errors show it: on one line, without control characters, of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
