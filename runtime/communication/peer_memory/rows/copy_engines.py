"""Parts of tensors copied by a GPU's copy engines: they take no processors from the kernels that run beside them.

    copy_part(target, source)    both [B, H, S, D], of the same numbers; one of them may be in another GPU's memory

A copy engine copies lines of bytes that are equally far apart. Lines are tokens with all their heads where heads lie
beside each other, or heads with all their tokens where tokens do. What lies otherwise in one of the two, or on a host,
torch copies.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["copy_part", "lines_of"]

_ON_DEVICE = 2
_FAR_APART = 1 << 31
"""Bytes between lines that a copy engine does not take."""

Lines = tuple[int, int, int, int]
"""How many, how long, and how far apart they are in the target and in the source; of bytes all but the first."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver."""

    _fields_ = (
        ("source_x", ctypes.c_size_t), ("source_y", ctypes.c_size_t), ("source_kind", ctypes.c_uint),
        ("source_host", ctypes.c_void_p), ("source", ctypes.c_uint64), ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t), ("target_y", ctypes.c_size_t), ("target_kind", ctypes.c_uint),
        ("target_host", ctypes.c_void_p), ("target", ctypes.c_uint64), ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t), ("height", ctypes.c_size_t),
    )  # fmt: skip


def copy_part(target: Tensor, source: Tensor) -> None:
    """On the current stream. See the module's docstring."""
    if not source.numel():
        return
    lines = lines_of(target, source)
    if lines is None or not source.is_cuda or (copy := _driver()) is None:
        target.copy_(source)
        return
    height, width, to_pitch, from_pitch = lines
    stream = torch.cuda.current_stream(source.device).cuda_stream
    to_batch, from_batch = (x.stride(0) * x.element_size() for x in (target, source))
    for batch in range(source.shape[0]):
        copied = _Copy2D(
            source_kind=_ON_DEVICE, source=source.data_ptr() + batch * from_batch, source_pitch=from_pitch,
            target_kind=_ON_DEVICE, target=target.data_ptr() + batch * to_batch, target_pitch=to_pitch,
            width=width, height=height,
        )  # fmt: skip
        if error := copy(ctypes.byref(copied), ctypes.c_void_p(stream)):
            raise RuntimeError(f"CUDA error {error} of a copy of {height} lines of {width} bytes")


def lines_of(target: Tensor, source: Tensor) -> Lines | None:
    """None: the two have no lines of more than one head or token in common."""
    _, heads, tokens, width = source.shape
    item = source.element_size()
    if target.dtype != source.dtype or any(x.stride(3) != 1 for x in (target, source) if width > 1):
        return None
    found = []
    for inner, outer, count in ((1, 2, heads), (2, 1, tokens)):
        if any(x.stride(inner) != width for x in (target, source) if count > 1):
            continue
        height, length = source.shape[outer], count * width * item
        to_pitch, from_pitch = (x.stride(outer) * item if height > 1 else length for x in (target, source))
        if max(to_pitch, from_pitch) < _FAR_APART:
            found.append((height, length, to_pitch, from_pitch))
    return min(found, default=None)


@functools.cache
def _driver() -> Any:
    """The driver's copy; None where there is none to call."""
    try:
        found = ctypes.CDLL("libcuda.so.1").cuMemcpy2DAsync_v2
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return found
