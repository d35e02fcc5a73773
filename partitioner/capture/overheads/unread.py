"""What torch.export writes down for others: nothing of it is read here, so that it is not made while this package
traces.

    tensor metadata     whether the sizes and strides of each result are one of torch's memory formats
    generated code      Python source of each graph on the way, compiled; where it is run after all, it is made then
    packed texts        which tokens of a row belong to one text, for masks that are written out; of masks whose kind
                        is known, the kind tells all
    grad mode           nodes where gradients are turned on and off, at each of which the graph is cut and joined again
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from partitioner.capture.overheads.internals import internal

__all__ = ["unread_left_out"]

_METADATA = "torch.fx.experimental.proxy_tensor._extract_tensor_metadata"
_PACKED = "transformers.masking_utils.find_packed_sequence_indices"
_LAZY_CODE = "torch.fx._lazy_graph_module._use_lazy_graph_module"
_GRAD_MODE, _UNWATCHED = "torch._C._set_grad_enabled", "torch._C.DisableTorchFunction"


@contextmanager
def unread_left_out(traced: nn.Module, mask_known: Callable[[], bool]) -> Iterator[None]:
    """Within this context, what the calling thread traces of `traced` goes without. `mask_known`: whether the kind of
    the mask that it is about to ask for is known.
    """
    with ExitStack() as stack:
        stack.enter_context(_grad_mode_unrecorded(traced))
        if (lazy := internal(_LAZY_CODE)) is not None:
            stack.enter_context(lazy(True))
        stack.enter_context(_without(_METADATA))
        stack.enter_context(_without(_PACKED, mask_known))
        yield


@contextmanager
def _without(path: str, unread: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within it, the calling thread gets None of the function at `path` where that is `unread`."""
    own: Callable[..., Any] | None = internal(path)
    if own is None:
        yield
        return
    holder, _, name = path.rpartition(".")
    module = internal(holder)
    mine = threading.get_ident()

    @functools.wraps(own)
    def left_out(*args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == mine and unread() else own(*args, **kwargs)

    setattr(module, name, left_out)
    try:
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def _grad_mode_unrecorded(traced: nn.Module) -> Iterator[None]:
    """Within this context, `traced` runs in a mode of its own: inside of those of the trace."""
    parts = internal(_GRAD_MODE), internal(_UNWATCHED)
    if None in parts:
        yield
        return
    own = traced.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _GradModeUnrecorded(*parts):
            return own(*args, **kwargs)

    vars(traced)["forward"] = forward
    try:
        yield
    finally:
        del vars(traced)["forward"]


class _GradModeUnrecorded(TorchFunctionMode):
    """Turning gradients on and off has its effect and leaves no node."""

    def __init__(self, setting: Any, unwatched: Any) -> None:
        super().__init__()
        self._setting, self._unwatched = setting, unwatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._setting:
            with self._unwatched():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
