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

import torch
from torch.fx.experimental import sym_node

__all__ = ["asked_once"]

_OPERATIONS = (
    "add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "sym_min", "sym_max", "int_floordiv", "and_", "or_"
)  # fmt: skip
"""Those of two operands whose result depends on nothing else. Not "mod": it looks at how small the sizes can be."""

_NODE: Any = sym_node.SymNode
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_recording: Any = torch._C._get_dispatch_mode
_recording_early: Any = torch._ops._get_dispatch_mode_pre_dispatch


@contextmanager
def asked_once() -> Iterator[None]:
    """Within this context, arithmetic on sizes that are not recorded as nodes is done once."""
    known: dict[Any, Any] = {}
    before = {name: vars(_NODE)[name] for name in _OPERATIONS if name in vars(_NODE)}
    for name, own in before.items():
        setattr(_NODE, name, _remembered(own, known))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(_NODE, name, own)


def _remembered(own: Callable[[Any, Any], Any], known: dict[Any, Any]) -> Callable[[Any, Any], Any]:
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
        # each time that sizes are found to be equal, the version counts
        key = own, sizes, sizes._replacements_version_counter, _about(self), _about(other)
        found = known.get(key)
        if found is None:
            found = known[key] = own(self, other)
        return found

    return operation


def _about(node: Any) -> tuple[Any, ...]:
    # 1, 1.0 and True are equal: the type tells them apart
    return node._expr, node.pytype, node._hint, node._optimized_summation
