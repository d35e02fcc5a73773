"""Arithmetic on symbolic sizes, done once for each question.

For each op that torch traces, it multiplies and compares the sizes and strides of all operands, some sixty times, and
nearly always the same ones: a sixth of the time of a trace. An answer follows from the operation, from the two
expressions, from what the sizes are in the example, and from which sizes are known to be equal by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.fx.experimental import sym_node, symbolic_shapes

__all__ = ["asked_once"]

_OPERATIONS = (
    "add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "sym_min", "sym_max", "int_floordiv", "and_", "or_"
)  # fmt: skip
"""Those of two operands whose result depends on nothing else. Not "mod": it looks at how small the sizes can be."""

_NODE: Any = sym_node.SymNode
_OF_A_NODE = ("shape_env", "_expr", "pytype", "_hint", "_optimized_summation")
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_recording: Any = torch._C._get_dispatch_mode
_recording_early: Any = torch._ops._get_dispatch_mode_pre_dispatch


@contextmanager
def asked_once() -> Iterator[None]:
    """Within this context, arithmetic on sizes that are not recorded as nodes is done once.

    It is done as ever where this torch does not say what an answer follows from.
    """
    version = _version_of_equal_sizes()
    if version is None:
        yield
        return
    known: dict[Any, Any] = {}
    before = {name: vars(_NODE)[name] for name in _OPERATIONS if name in vars(_NODE)}
    for name, own in before.items():
        setattr(_NODE, name, _remembered(own, known, version))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(_NODE, name, own)


@functools.cache
def _version_of_equal_sizes() -> str | None:
    """The name of what counts each time that sizes are found to be equal; None where this torch lacks it, or anything
    else that is looked at.
    """
    sizes: Any = symbolic_shapes.ShapeEnv()
    node = _NODE(sympy.Integer(1), sizes, int, 1)
    if not (all(hasattr(node, name) for name in _OF_A_NODE) and hasattr(sizes, "_translation_validation_enabled")):
        return None
    # up to 2.12 all that torch itself remembers goes by the second one, which counts whatever else is found as well
    names = ("_replacements_version_counter", "_version_counter")
    return next((name for name in names if hasattr(sizes, name)), None)


def _remembered(own: Callable[[Any, Any], Any], known: dict[Any, Any], version: str) -> Callable[[Any, Any], Any]:
    @functools.wraps(own)
    def operation(self: Any, other: Any) -> Any:
        sizes = self.shape_env
        if (
            type(other) is not _NODE
            or other.shape_env is not sizes
            or sizes is None
            or sizes._translation_validation_enabled  # it wants a node of each
            or _recording(_PROXY) is not None
            or _recording_early(_PROXY) is not None
        ):
            return own(self, other)
        key = own, sizes, getattr(sizes, version), _about(self), _about(other)
        found = known.get(key)
        if found is None:
            found = known[key] = own(self, other)
        return found

    return operation


def _about(node: Any) -> tuple[Any, ...]:
    # 1, 1.0 and True are equal: the type tells them apart
    return node._expr, node.pytype, node._hint, node._optimized_summation
