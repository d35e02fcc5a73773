"""The collectives that stand in graphs, by mesh axis; a communicator takes their place when a rank is loaded.

    all_reduce(x, axis)                   x[...]          -> [...]       the sum over the axis
    all_gather(x, axis, dim=d, sizes=s)   x[.., s[i], ..] -> [.., sum(s), ..]   the pieces in order of coordinate

    landed(x)                             x  ->  x                      what is under way, once it is there

`axis` is a mesh axis, or a tuple of axes: then it is one collective of all ranks that differ in any of them. Graphs
name axes and never process groups, so that they print, check and simulate without torch.distributed. The operations
are those of the MPI standard (version 4.1, chapter 6), with axes of the mesh in place of a communicator. What each does
with other ranks stands in `communicating.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from partitioner.errors import CommunicationError

__all__ = ["all_gather", "all_reduce", "arriving", "filling", "landed", "unbound"]


def all_reduce(x: Tensor, axis: str | tuple[str, ...]) -> Tensor:
    """The sum of every rank's `x` over `axis`."""
    unbound("all_reduce", axis)


def all_gather(x: Tensor, axis: str | tuple[str, ...], *, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Every rank's `x` along `axis`, put together at `dim`; `sizes[i]` is coordinate i's part, None: all alike."""
    unbound("all_gather", axis)


def unbound(op: str, axis: str | tuple[str, ...]) -> NoReturn:
    """What an op does that is run without a communicator."""
    raise CommunicationError(
        f"{op} over {axis!r} is not bound to a communicator: run the rank through an Engine "
        f"(parts.engine(rank, communicator)) or all ranks in this process (parts.simulate(...))"
    )


def landed(x: Tensor) -> Tensor:
    """`x`, once it has come; at once where it is not on its way."""
    if not torch.compiler.is_compiling():
        landing = _under_way.pop(x, None)
        if landing is not None:
            landing()
    return x


_under_way: Any = WeakIdKeyDictionary()
"""By a tensor that is not filled yet, what waits for it and fills it; torch's functional collectives keep the same."""


def filling(handle: Any, fill: Callable[[Tensor], object], *tensors: Tensor) -> None:
    """`tensors` are filled by what comes: now, if it is there, or when the first of them is to have landed."""
    is_filled = False

    def land() -> None:
        nonlocal is_filled
        if not is_filled:
            is_filled = True
            fill(handle.finish())

    if handle.is_finished:
        land()
        return
    for tensor in tensors:
        _under_way[tensor] = land


def arriving(handle: Any) -> Tensor:
    """What has begun: its place, to be read once it has landed; itself, where it is there or has no place yet."""
    if handle.is_finished or handle.into is None:
        return handle.finish()  # type: ignore[no-any-return]
    filling(handle, lambda _: None, handle.into)
    return handle.into  # type: ignore[no-any-return]
