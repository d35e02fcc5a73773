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

from partitioner.capture.overheads.internals import internal

__all__ = ["about_size", "asked_once", "version_of_equal_sizes"]

_OPERATIONS = (
    "add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "sym_min", "sym_max", "int_floordiv", "and_", "or_"
)  # fmt: skip
"""Those of two operands whose result depends on nothing else. Not "mod": it looks at how small the sizes can be."""

_NODE, _SIZES = "torch.fx.experimental.sym_node.SymNode", "torch.fx.experimental.symbolic_shapes.ShapeEnv"
_PROXY = "torch._C._TorchDispatchModeKey.PROXY"
_RECORDING, _RECORDING_EARLY = "torch._C._get_dispatch_mode", "torch._ops._get_dispatch_mode_pre_dispatch"
_OF_A_NODE = ("shape_env", "_expr", "pytype", "_hint", "_optimized_summation")


@contextmanager
def asked_once() -> Iterator[None]:
    """Within this context, arithmetic on sizes that are not recorded as nodes is done once.

    It is done as ever where this torch does not say what an answer follows from.
    """
    parts: list[Any] = [internal(path) for path in (_NODE, _PROXY, _RECORDING, _RECORDING_EARLY)]
    node, proxy, recording, recording_early = parts
    version = version_of_equal_sizes()
    if version is None or None in parts:
        yield
        return

    def is_recorded() -> bool:
        return recording(proxy) is not None or recording_early(proxy) is not None

    known: dict[Any, Any] = {}
    before = {name: vars(node)[name] for name in _OPERATIONS if name in vars(node)}
    for name, own in before.items():
        setattr(node, name, _remembered(own, known, version, is_recorded))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(node, name, own)


def version_of_equal_sizes() -> str | None:
    """The name of what counts, in the environment of a trace's sizes, each time that some are found to be equal; None
    where this torch lacks it, or anything else that is looked at.
    """
    node, sizes = internal(_NODE), internal(_SIZES)
    return None if node is None or sizes is None else _version_of_equal_sizes(node, sizes)


@functools.cache
def _version_of_equal_sizes(node_class: Any, sizes_class: Any) -> str | None:
    try:
        sizes = sizes_class()
        node = node_class(sympy.Integer(1), sizes, int, 1)
    except TypeError:  # made in another way
        return None
    if not (all(hasattr(node, name) for name in _OF_A_NODE) and hasattr(sizes, "_translation_validation_enabled")):
        return None
    # up to 2.12 all that torch itself remembers goes by the second one, which counts whatever else is found as well
    names = ("_replacements_version_counter", "_version_counter")
    return next((name for name in names if hasattr(sizes, name)), None)


def _remembered(
    own: Callable[[Any, Any], Any], known: dict[Any, Any], version: str, is_recorded: Callable[[], bool]
) -> Callable[[Any, Any], Any]:
    @functools.wraps(own)
    def operation(self: Any, other: Any) -> Any:
        sizes = self.shape_env
        if (
            type(other) is not type(self)
            or other.shape_env is not sizes
            or sizes is None
            or sizes._translation_validation_enabled  # it wants a node of each
            or is_recorded()
        ):
            return own(self, other)
        key = own, sizes, getattr(sizes, version), about_size(self), about_size(other)
        found = known.get(key)
        if found is None:
            found = known[key] = own(self, other)
        return found

    return operation


def about_size(node: Any) -> tuple[Any, ...]:
    """What all that is asked of a size follows from, together with which sizes are known to be equal."""
    # 1, 1.0 and True are equal: the type tells them apart
    return node._expr, node.pytype, node._hint, node._optimized_summation
