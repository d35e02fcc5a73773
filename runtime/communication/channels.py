"""What the ranks of one group can do together: the primitives, over whatever carries them.

    all_reduce(x)                                x[...]          -> [...]             the sum over the group
    all_reduce_begin(x)                          the same, under way
    sum_norm_begin(x, residual, weight, eps)     the same with a residual and a norm, by rows, where there is a way
    sum_norm(x, residual, weight, eps)           the same, of few rows, at once
    sum_added(x, residual)                       the sum plus a residual, of few rows, at once
    merge_parts(parts, sinks, dtype)             parts of an attention, put together in one call, where there is a way
    all_gather(x, dim, sizes)                    x[.., s[i], ..] -> [.., sum(s), ..]  the pieces in order of coordinate
    reduce_scatter(x, dim, sizes)                x[.., sum(s), ..] -> [.., s[i], ..]  this rank's piece of the sum
    all_gather_begin, reduce_scatter_begin       the same, under way
    all_to_all(x, send_counts, receive_counts)   x[sum(s), ..]   -> [sum(r), ..]      rows for each, rows from each
    all_to_all_begin(..)                         the same, under way
    all_to_all_within(x, num_rows, ..)           the same, with counts that only the device knows
    permute_begin(x, shift)                      x[...]          -> [...]             from coordinate - shift
    persistent_permute(x, shift)                 the same again and again, of what stands in the same memory
    send_begin(x, to), receive_begin(shape, dtype, from_)                             to and from one coordinate

Sizes are None where all are alike. Zero rows are sizes like others. `to`, `from_` are coordinates: places in `ranks`.
What is begun returns a `Handle`. The begin is where ranks meet, `finish` is local: a program that needs no buffers runs
through on every implementation, and one that does is told as a deadlock by the simulator and by checked runs.

    group_channel.GroupChannel            process groups (gloo, NCCL), and shared memory for the primitives that it has
    thread_communicator.ThreadChannel     threads of one process
    traceable.{Functional,Opaque}Channel  what torch.compile can follow
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CommunicationError
from runtime.ops.communicating import Kind, axes_text

__all__ = [
    "AloneChannel",
    "Channel",
    "Handle",
    "OwnRows",
    "PersistentPermute",
    "piece_sizes",
    "require_counts",
    "require_piece",
]


_MOST_PREPARED = 16


class Handle:
    """What has begun and is not finished. It keeps the tensors that are on their way alive.

    into: where what comes will stand, if that is known; nobody may read it before `finish`.
    """

    def __init__(self, finish: Callable[[], Tensor], *, into: Tensor | None = None) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None
        self.into = into

    @classmethod
    def done(cls, result: Tensor) -> Handle:
        handle = cls(lambda: result)
        handle.finish()
        return handle

    def finish(self) -> Tensor:
        """What has come; of a send, what was sent, which may be written to from now on. May be called again."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        assert self._result is not None
        return self._result

    @property
    def is_finished(self) -> bool:
        return self._finish is None


@dataclass(frozen=True)
class PersistentPermute:
    """A permute of what stands in the same memory whenever it begins, as MPI's persistent communication (MPI 4.0, 3.9).

    begin: hands on what stands there, which nobody may write to until the finish. finish: what has come, which stays
    as it is until the finish after the next one. One is begun at a time.
    """

    begin: Callable[[], None]
    finish: Callable[[], Tensor]

    @classmethod
    def of(cls, permute: Callable[[Tensor], Handle], x: Tensor) -> PersistentPermute:
        """By one that makes what comes anew each time."""
        under_way: list[Handle] = []
        return cls(lambda: under_way.append(permute(x)), lambda: under_way.pop().finish())


@dataclass(frozen=True)
class OwnRows:
    """What a rank has of the rows of a tensor [.., N]: its share. rows [n, N]; shape: of all."""

    rows: Tensor
    shape: torch.Size

    @staticmethod
    def share(num_rows: int, num_ranks: int, coordinate: int) -> slice:
        """Which rows are whose: as many for each, the last ones may have fewer, or none."""
        each = -(-num_rows // num_ranks)
        return slice(min(coordinate * each, num_rows), min((coordinate + 1) * each, num_rows))

    def whole(self, channel: Channel) -> Tensor:
        """All rows, [.., N]; a collective of those that have the others."""
        num_rows, count = self.shape[:-1].numel(), len(channel.ranks)
        shares = [OwnRows.share(num_rows, count, coordinate) for coordinate in range(count)]
        return channel.all_gather(self.rows, 0, [of.stop - of.start for of in shares]).view(self.shape)


class Channel(abc.ABC):
    """One group of ranks, as one of them sees it; see the module's docstring."""

    def __init__(self, axes: tuple[str, ...], ranks: tuple[int, ...], rank: int, *, node: str) -> None:
        self.axes = axes
        self.ranks = ranks
        """The ranks of the mesh in order of coordinate."""
        self.rank = rank
        self.coordinate = ranks.index(rank)
        self.node = node
        """On whose behalf, for errors."""
        self._prepared: dict[Any, Callable[..., Any]] = {}
        """What was called last, the latest at the end: sizes that follow the length of a text are ever new."""

    @abc.abstractmethod
    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        """A primitive with fixed options, as a bare function of its operands, for what is called often.

        `overwrite`: nobody reads the operand afterwards.

            all_reduce()  all_gather(dim, sizes)          (x) -> Tensor
            reduce_scatter(dim, sizes)                    (x) -> Tensor
            all_to_all(sizes_from)                        (x, send_counts, receive_counts) -> Tensor
            permute(shift)  send(to)                      (x) -> Handle
            receive(from_)                                (shape, dtype) -> Handle
        """

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._ready("all_reduce")(x)  # type: ignore[no-any-return]

    def all_reduce_begin(self, x: Tensor, *, overwrite: bool = False) -> Handle:
        """The same, under way: the sum comes with `finish`. Finished at once where nothing can be under way."""
        return Handle.done(self._ready("all_reduce", overwrite=overwrite)(x))

    def sum_norm_begin(
        self, x: Tensor, residual: Tensor | OwnRows | None, weight: Tensor | None, eps: float
    ) -> Callable[[], tuple[OwnRows, Tensor]] | None:
        """The sum over the group, plus a residual, and its root mean square norm, under way; None: by other primitives.

        What it returns waits for the end: this rank's rows of the sum, and all normed rows. Shapes as in `RowSums`.
        """
        return None

    def sum_norm(self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor] | None:
        """The sum over the group plus a residual, and its root mean square norm, at once and whole; None: by other
        primitives. Shapes as in `FewRowSums`.
        """
        return None

    def sum_added(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """The sum over the group plus a residual of its shape, rounded once; None: by other primitives."""
        return None

    def merge_parts(self, parts: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What parts of an attention come to that ranks have over tokens of their own; None: by a gather.

        parts: float32 [B, H, 1, Dv + 1], the last number the log-sum-exp; sinks [H]. [B, H, 1, Dv] of `dtype`.
        """
        return None

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        return self._ready("all_gather", dim=dim, sizes=sizes)(x)  # type: ignore[no-any-return]

    def reduce_scatter(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        return self._ready("reduce_scatter", dim=dim, sizes=sizes)(x)  # type: ignore[no-any-return]

    def all_gather_begin(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Handle:
        """The same, under way. Finished at once where nothing can be under way, as below."""
        return Handle.done(self.all_gather(x, dim, sizes))

    def reduce_scatter_begin(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Handle:
        return Handle.done(self.reduce_scatter(x, dim, sizes))

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], *, sizes_from: str | None = None
    ) -> Tensor:
        """`sizes_from`: the node that the counts come from, if they depend on data; all ranks must name the same."""
        return self._ready("all_to_all", sizes_from=sizes_from)(x, send_counts, receive_counts)  # type: ignore[no-any-return]

    def all_to_all_begin(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], *, sizes_from: str | None = None
    ) -> Handle:
        """The same, under way: what it yields comes with `finish`. Finished at once where nothing can be under way."""
        return Handle.done(self.all_to_all(x, send_counts, receive_counts, sizes_from=sizes_from))

    @property
    def counts_on_device(self) -> bool:
        """Whether there is `all_to_all_within`."""
        return False

    def all_to_all_within(self, x: Tensor, num_rows: int, send_counts: Tensor, receive_counts: Tensor) -> Tensor:
        """An all_to_all whose counts, int64 [ranks], only the device knows. It yields `num_rows` rows, enough for all
        that come; those behind are not written.
        """
        raise CommunicationError(
            f"node {self.node!r}: what ranks exchange over {axes_text(self.axes)!r} is known to their hosts alone"
        )

    def permute_begin(self, x: Tensor, shift: int) -> Handle:
        """All bring tensors of one shape; the rank at coordinate c gets that of coordinate (c - shift) mod size."""
        return self._ready("permute", shift=shift)(x)  # type: ignore[no-any-return]

    def persistent_permute(self, x: Tensor, shift: int) -> PersistentPermute:
        """The same for what is permuted often: `x` stays where it is, and with it all that can be prepared once."""
        return PersistentPermute.of(self.prepare("permute", shift=shift), x)

    def peer_rows(self) -> Any:
        """What writes rows straight into the others' memory (`peer_memory.rows.push_rows`); None: nothing does."""
        return None

    def send_begin(self, x: Tensor, to: int) -> Handle:
        return self._ready("send", to=to)(x)  # type: ignore[no-any-return]

    def receive_begin(self, shape: Sequence[int], dtype: torch.dtype, from_: int) -> Handle:
        return self._ready("receive", from_=from_)(shape, dtype)  # type: ignore[no-any-return]

    def peer(self, coordinate: int) -> int:
        """The rank of the mesh at another coordinate of this group."""
        if not 0 <= coordinate < len(self.ranks) or coordinate == self.coordinate:
            others = [i for i in range(len(self.ranks)) if i != self.coordinate]
            raise CommunicationError(
                f"rank {self.rank}: node {self.node!r} names coordinate {coordinate} over {axes_text(self.axes)!r}; "
                f"the others are {others or 'none: this rank is alone there'}"
            )
        return self.ranks[coordinate]

    def _ready(self, kind: Kind, **options: Any) -> Callable[..., Any]:
        key = (kind, *(tuple(value) if isinstance(value, list) else value for value in options.values()))
        run = self._prepared.pop(key, None)
        if run is None:
            given: dict[str, Any] = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in options.items()
                if value is not None
            }
            run = self.prepare(kind, **given)
            if len(self._prepared) == _MOST_PREPARED:
                del self._prepared[next(iter(self._prepared))]
        self._prepared[key] = run
        return run


class AloneChannel(Channel):
    """A group of one rank: every primitive is the identity."""

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        if kind in ("send", "receive"):
            self.peer(options["to" if kind == "send" else "from_"])
        return _ALONE[kind]


def alone(x: Tensor) -> Tensor:
    return x


def _alone_counts(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
    return x


_ALONE: dict[Kind, Callable[..., Any]] = {
    "all_reduce": alone,
    "all_gather": alone,
    "reduce_scatter": alone,
    "all_to_all": _alone_counts,
    "permute": Handle.done,
}


# -- what a rank brings ------------------------------------------------------------------------------------------------


def require_piece(x: Tensor, options: Mapping[str, Any], coordinate: int, *, node: str, rank: int) -> None:
    """Raise where this rank's piece of an uneven all_gather is not as long as the graph says."""
    sizes, dim = options.get("sizes"), options.get("dim")
    if sizes is not None and dim is not None and x.shape[dim] != sizes[coordinate]:
        raise CommunicationError(
            f"rank {rank}: node {node!r} gathers pieces of {list(sizes)} along dim {dim}, so this rank must bring "
            f"{sizes[coordinate]}; its tensor is {list(x.shape)}"
        )


def piece_sizes(x: Tensor, dim: int, sizes: Sequence[int] | None, channel: Channel) -> list[int]:
    """What each rank gets of dim `dim` in a reduce_scatter; raises where that is not all of it."""
    size, num_ranks = x.shape[dim], len(channel.ranks)
    found = [size // num_ranks] * num_ranks if sizes is None else list(sizes)
    if sum(found) != size or len(found) != num_ranks:
        raise CommunicationError(
            f"rank {channel.rank}: node {channel.node!r} scatters dim {dim} of {list(x.shape)} over {num_ranks} ranks "
            f"as {'equal pieces' if sizes is None else found}, which are not {size} together"
        )
    return found


def require_counts(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], channel: Channel) -> None:
    """Raise where the counts of an all_to_all do not fit the tensor or the group."""
    num_ranks, own = len(channel.ranks), channel.coordinate
    if not len(send_counts) == len(receive_counts) == num_ranks or sum(send_counts) != x.shape[0]:
        why = f"it must send {x.shape[0]} rows to {num_ranks} ranks, and receive from as many"
    elif send_counts[own] != receive_counts[own]:
        why = f"this rank, at coordinate {own}, would not get from itself what it sends itself"
    else:
        return
    raise CommunicationError(
        f"rank {channel.rank}: node {channel.node!r} sends {list(send_counts)} and receives {list(receive_counts)} "
        f"rows: {why}"
    )
