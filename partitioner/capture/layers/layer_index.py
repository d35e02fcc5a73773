"""A layer's number in place of the integer, while the layer is traced: it tells whether the code does anything with it.

Layers that differ in nothing but their number compute the same, unless their code reads the number: to look something
up in a list, to compare it, to scale by it. Handing it on (to a cache, which knows what to do with it) is no reading.
It is no `int`, so that list look-ups and torch's ops have to ask it for its value.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["LayerIndex", "plain"]


class LayerIndex:
    """Behaves as the integer `value`; `read` is told where each use of it stands."""

    def __init__(self, value: int, read: Callable[[str], None]) -> None:
        self._value, self._read = value, read

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self._read(_caller())
        return int

    def __getattr__(self, name: str) -> Any:
        self._read(_caller())
        return getattr(self._value, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerIndex:
        return self


def _caller() -> str:
    """The line of code that uses the number: "file.py:12"."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def plain(value: Any) -> Any:
    """The integer, for those who may know it; anything else as it is."""
    return value._value if type(value) is LayerIndex else value


def _forwarded(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: LayerIndex, *others: Any) -> Any:
        self._read(_caller())
        operands = (self._value, *map(plain, others))
        return function(*(operands[::-1] if reflected else operands))

    return method


_BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor",
)  # fmt: skip
_COMPARING = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert")
_OTHERS: dict[str, Callable[..., Any]] = {
    "index": operator.index, "int": int, "float": float, "complex": complex, "bool": bool, "hash": hash,
    "repr": repr, "str": str, "format": format, "round": round, "divmod": divmod,
}  # fmt: skip
_OTHERS |= {name: getattr(operator, name) for name in _COMPARING}
for _name in _BINARY:
    _bare = _name.rstrip("_")
    setattr(LayerIndex, f"__{_bare}__", _forwarded(getattr(operator, _name)))
    setattr(LayerIndex, f"__r{_bare}__", _forwarded(getattr(operator, _name), reflected=True))
for _name, _function in _OTHERS.items():
    setattr(LayerIndex, f"__{_name}__", _forwarded(_function))
