"""The collectives that stand in graphs, by mesh axis; a communicator takes their place when a rank is loaded.

    all_reduce(x, axis)                   x[...]          -> [...]       the sum over the axis
    all_gather(x, axis, dim=d, sizes=s)   x[.., s[i], ..] -> [.., sum(s), ..]   the pieces in order of coordinate

Graphs name axes and never process groups, so that they print, check and simulate without torch.distributed. The
operations are those of the MPI standard (version 4.1, chapter 6), with an axis of the mesh in place of a communicator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from torch import Tensor, fx

from partitioner.errors import CommunicationError

__all__ = ["COLLECTIVES", "all_gather", "all_reduce", "axes_of", "unbound"]


def all_reduce(x: Tensor, axis: str | tuple[str, ...]) -> Tensor:
    """The sum of every rank's `x` over `axis`."""
    unbound("all_reduce", axis)


def all_gather(x: Tensor, axis: str | tuple[str, ...], *, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Every rank's `x` along `axis`, put together at `dim`; `sizes[i]` is coordinate i's part, None: all alike."""
    unbound("all_gather", axis)


def axes_of(node: fx.Node) -> tuple[str, ...]:
    """The axes over which a node communicates, its second argument."""
    axes = node.args[1]
    return (axes,) if isinstance(axes, str) else tuple(axes)  # type: ignore[arg-type]


def unbound(op: str, axis: str | tuple[str, ...]) -> NoReturn:
    """What an op does that is run without a communicator."""
    raise CommunicationError(
        f"{op} over {axis!r} is not bound to a communicator: run the rank through an Engine "
        f"(parts.engine(rank, communicator)) or all ranks in this process (parts.simulate(...))"
    )


COLLECTIVES: dict[Callable[..., Tensor], str] = {all_reduce: "all_reduce", all_gather: "all_gather"}
"""Every function here by name: what the engine binds and what a communicator must offer."""
