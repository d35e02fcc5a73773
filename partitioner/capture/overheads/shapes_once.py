"""What an op makes of shapes, found out once for each op and what it is given.

For each op that torch traces, a Python implementation works out the shape and the strides of the result, size by
symbolic size: a third of the time of a trace. A model calls the same ops on the same shapes again and again: in each
layer, and in the layers that are traced to be compared. What torch itself remembers of that costs more than it saves
(it keeps the steps inside of an implementation too, and tries out each entry), so it is turned off meanwhile.

An answer follows from the op, from sizes, strides, dtypes and flags of the tensors that it is given, from its other
arguments, and from which sizes are known to be equal by then. Of a view, the memory is that of what it is a view of.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from partitioner.capture.overheads.internals import internal
from partitioner.capture.overheads.size_arithmetic import about_size, version_of_equal_sizes

__all__ = ["shapes_found_once"]

_DISPATCH = "torch._subclasses.fake_tensor.FakeTensorMode.dispatch"
_KERNEL = "torch._subclasses.fake_tensor.in_kernel_invocation_manager"
_UNGUARDED = "torch.fx.experimental.symbolic_shapes.ShapeEnv.suppress_guards"
_TORCHS_OWN = "torch._dynamo.config.fake_tensor_cache_enabled"

_CHANGING = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
    torch.Tag.nondeterministic_seeded,
}
_BY_VALUE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_LEFT_OUT = {torch.ops.aten.as_strided.default, torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default}
"""The first looks at the memory of what it is given; the others are quicker done than looked up."""


class _UnknownError(Exception):
    """Something of which an answer is not known to follow."""


@dataclass(frozen=True)
class _Made:
    """A tensor that an op yields. is_view: of the one tensor that the op was given."""

    shape: Any
    strides: Any
    offset: Any
    dtype: torch.dtype
    device: torch.device
    is_view: bool


@contextlib.contextmanager
def shapes_found_once() -> Iterator[None]:
    """Within this context. It is done as ever where this torch does not say what an answer follows from."""
    own, kernel, unguarded = internal(_DISPATCH), internal(_KERNEL), internal(_UNGUARDED)
    version = version_of_equal_sizes()
    if version is None or None in (own, kernel, unguarded, internal(_TORCHS_OWN)):
        yield
        return
    mode: Any = FakeTensorMode
    mode.dispatch = _Remembered(own, kernel, unguarded, version).dispatch()
    try:
        with dynamo_config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        mode.dispatch = own


class _Remembered:
    """`FakeTensorMode.dispatch`, remembering."""

    def __init__(self, own: Any, kernel: Any, unguarded: Any, version: str) -> None:
        self.own, self.kernel, self.unguarded, self.version = own, kernel, unguarded, version
        self._known: dict[Any, Any] = {}
        self._inside = False
        """Whether an implementation is running, of which only the result counts."""

    def dispatch(self) -> Callable[..., Any]:
        @functools.wraps(self.own)
        def dispatch(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self._inside or mode.shape_env is None or not _is_pure(func):
                return self.own(mode, func, types, args, kwargs or {})
            return self._dispatch(mode, func, types, args, kwargs or {})

        return dispatch

    def _dispatch(self, mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors: list[Any] = []
        key: list[Any] = [func, mode, getattr(mode.shape_env, self.version)]
        try:
            self._describe(mode, args, key, tensors)
            self._describe(mode, tuple(kwargs.items()), key, tensors)
        except _UnknownError:
            return self.own(mode, func, types, args, kwargs)
        found = self._known.get(tuple(key))
        if found is None:
            self._inside = True
            try:
                result = self.own(mode, func, types, args, kwargs)
            finally:
                self._inside = False
            # what is known of sizes may have changed meanwhile
            key[2] = getattr(mode.shape_env, self.version)
            with contextlib.suppress(_UnknownError):
                self._known[tuple(key)] = self._made(mode, result, tensors)
            return result
        if isinstance(found, _Made):
            return self._make(mode, found, tensors)
        return tuple(self._make(mode, each, tensors) for each in found)

    def _describe(self, mode: Any, given: Any, key: list[Any], tensors: list[Any]) -> None:
        for leaf in given:
            kind = type(leaf)
            key.append(kind)
            if kind in _VALUES:
                key.append(leaf)
            elif kind is list or kind is tuple:
                key.append(len(leaf))
                self._describe(mode, leaf, key, tensors)
            elif isinstance(leaf, Tensor):
                tensors.append(leaf)
                self._describe_tensor(mode, leaf, key)
            elif kind is torch.SymInt:
                key.append(self._size(mode, leaf))
            elif isinstance(leaf, _BY_VALUE):
                key.append(leaf)
            else:
                raise _UnknownError

    def _describe_tensor(self, mode: Any, tensor: Any, key: list[Any]) -> None:
        if (
            not isinstance(tensor, FakeTensor)
            or tensor.fake_mode is not mode
            or tensor.constant is not None
            or tensor.layout is not torch.strided
            or tensor.requires_grad
            or not (shape := tensor.shape)  # whether it stands for a number of Python's is not told
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            raise _UnknownError
        key += (tensor.dtype, tensor.fake_device, len(shape))
        for size in (*shape, *tensor.stride(), tensor.storage_offset()):
            key.append(size if type(size) is int else self._size(mode, size))

    def _size(self, mode: Any, size: Any) -> Any:
        node = size.node
        # of a size that data decides, more may be known later
        if not hasattr(node, "shape_env") or node.shape_env is not mode.shape_env or node._hint is None:
            raise _UnknownError
        return about_size(node)

    def _made(self, mode: Any, result: Any, tensors: list[Any]) -> Any:
        if isinstance(result, (list, tuple)):
            made = tuple(self._made(mode, each, tensors) for each in result)
            if len({each.untyped_storage()._cdata for each in result}) < sum(not each.is_view for each in made):
                raise _UnknownError  # parts of one memory, which is new
            return made
        if type(result) is not FakeTensor or any(result is given for given in tensors):
            raise _UnknownError
        key: list[Any] = []
        self._describe_tensor(mode, result, key)
        memory = result.untyped_storage()._cdata
        is_view = any(given.untyped_storage()._cdata == memory for given in tensors)
        if (is_view and len(tensors) > 1) or (not is_view and result.storage_offset() != 0):
            raise _UnknownError
        offset = result.storage_offset()
        return _Made(tuple(result.shape), result.stride(), offset, result.dtype, result.fake_device, is_view)

    def _make(self, mode: Any, made: _Made, tensors: list[Any]) -> Any:
        with self.kernel(mode), self.unguarded(mode.shape_env):
            empty = torch.empty_strided(made.shape, made.strides, dtype=made.dtype, device="meta")
            if made.is_view:
                empty.set_(tensors[0].untyped_storage(), made.offset, made.shape, made.strides)
        return FakeTensor(mode, empty, made.device)


_VALUES = frozenset(_BY_VALUE)


@functools.cache
def _is_pure(func: Any) -> bool:
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace in ("aten", "partitioner_capture")
        and not func._schema.is_mutable
        and not _CHANGING.intersection(func.tags)
        and func not in _LEFT_OUT
        and all(str(each.type) in ("Tensor", "List[Tensor]") for each in func._schema.returns)
        and len(func._schema.returns) > 0
    )
