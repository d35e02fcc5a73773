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

import torch
from torch import nn
from torch.fx import _lazy_graph_module
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

__all__ = ["unread_left_out"]


@contextmanager
def unread_left_out(traced: nn.Module, mask_known: Callable[[], bool]) -> Iterator[None]:
    """Within this context, what the calling thread traces of `traced` goes without. `mask_known`: whether the kind of
    the mask that it is about to ask for is known.
    """
    with ExitStack() as stack:
        stack.enter_context(_grad_mode_unrecorded(traced))
        stack.enter_context(_lazy_graph_module._use_lazy_graph_module(True))
        stack.enter_context(_without(proxy_tensor, "_extract_tensor_metadata"))
        stack.enter_context(_without(masking_utils, "find_packed_sequence_indices", mask_known))
        yield


@contextmanager
def _without(module: Any, name: str, unread: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within it, the calling thread gets None of the function `name` where that is `unread`."""
    own: Callable[..., Any] | None = vars(module).get(name)
    if own is None:  # in another version it has another name
        yield
        return
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
    own = traced.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _GradModeUnrecorded():
            return own(*args, **kwargs)

    vars(traced)["forward"] = forward
    try:
        yield
    finally:
        del vars(traced)["forward"]


class _GradModeUnrecorded(TorchFunctionMode):
    """Turning gradients on and off has its effect and leaves no node."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
