"""The primitives over one process group, or over memory that its ranks share where it has them: the host's, or GPUs'.

    default       each costs what torch.distributed's costs
    checked run   before each the ranks that take part compare a fingerprint of it: all ranks of the group in one small
                  gather, the two of a send and receive between themselves

A checked send therefore waits for its receive, as without buffers: what would need buffers is told. No wait is
unbounded: the group has a timeout, and what fails because of others becomes RankLost or RankMismatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch import distributed as dist

from runtime.communication.channels import (
    Channel,
    Handle,
    OwnRows,
    PersistentPermute,
    piece_sizes,
    require_counts,
    require_piece,
)
from runtime.communication.failure_verdict import FailureVerdict, is_broken
from runtime.communication.group_collectives import PRIMITIVES, Group, begin_all_reduce, begin_all_to_all
from runtime.communication.matching_calls import FINGERPRINT_BYTES, Call, check_agreement, check_counts
from runtime.communication.peer_memory import async_collectives
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows.push_rows import PeerRows
from runtime.communication.shared_memory.shared_memory import Disconnected, SharedMemory
from runtime.ops.communicating import Kind, axes_text
from runtime.processes.device_watch import DeviceWatch

__all__ = ["GroupChannel", "RankState"]


@dataclass
class RankState:
    """What all channels of a rank share."""

    rank: int
    device: torch.device
    verdict: FailureVerdict
    checking: bool = False
    """Whether ranks compare what they are about to do."""
    watch: DeviceWatch | None = None


_BETWEEN_GRAPHS = frozenset({"send", "receive", "permute"})
"""Kinds that stages use, and that no graph which torch compiles calls by itself (`traceable.py` does)."""


class GroupChannel(Channel):
    """See the module's docstring; `shared`, `peers`: the memory that the ranks of `group` share, None: they do not."""

    def __init__(
        self,
        axes: tuple[str, ...],
        group: Group,
        state: RankState,
        shared: SharedMemory | None,
        peers: PeerMemory | None = None,
        *,
        node: str,
    ) -> None:
        super().__init__(axes, group.ranks, state.rank, node=node)
        self._group, self._state, self._shared, self._peers = group, state, shared, peers
        self._begins: dict[str | None, Callable[..., Handle]] = {}
        """All-to-alls that are begun, by where their sizes come from."""
        self._reduces: dict[bool, Callable[[Tensor], Handle]] = {}
        """All-reduces that are begun, by whether they overwrite what they are given."""

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        call = Call(self.rank, self.node, kind, axes_text(self.axes), options)
        run: Callable[..., Any]
        if kind in ("send", "receive"):
            peer = self.peer(options["to" if kind == "send" else "from_"])
            run = self._between_two(replace(call, options={}, peer=peer), kind, options)
        elif kind == "permute":
            run = self._permute(call, options)
        elif kind == "all_to_all":
            call = replace(call, options={}, sizes_from=options.get("sizes_from"))
            run = self._all_to_all(call, self._primitive(call, "all_to_all"))
        else:
            run = self._collective(call, kind, overwrite, options)
        # what is begun for another rank stands between graphs, where the call around `run` would cost more than `run`
        if (self._shared is None and self._peers is None) or kind in _BETWEEN_GRAPHS:
            return run
        # torch.compile cannot look into ctypes or launches: without this it tries, and warns
        opaque: Callable[..., Any] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
        return opaque

    def _collective(
        self, call: Call, kind: Kind, overwrite: bool, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        run: Callable[[Tensor], Tensor] = self._primitive(call, kind, overwrite=overwrite, **options)
        state, watch, ranks, coordinate = self._state, self._state.watch, self.ranks, self.coordinate
        gather = self._comparison()

        def collective(x: Tensor) -> Tensor:
            try:
                if state.checking:
                    if kind == "all_gather":
                        require_piece(x, options, coordinate, node=call.node, rank=call.rank)
                    self._compare(call.on(x), gather)
                if watch is not None and (cause := watch.cause()) is not None:
                    raise Disconnected(f"connection lost: {cause}")
                return run(x)
            except RuntimeError as error:
                self._raise(error, call.on(x), ranks)

        def scatter(x: Tensor) -> Tensor:
            piece_sizes(x, options["dim"], options.get("sizes"), self)
            return collective(x)

        return scatter if kind == "reduce_scatter" else collective

    def _primitive(self, call: Call, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        if self._shared is not None and kind != "all_reduce":
            return self._shared.primitive(kind, call, **options)
        if self._shared is not None:
            return self._shared.all_reduce(call, overwrite=overwrite)
        by_group = PRIMITIVES[kind](self._group, overwrite=overwrite, **options)
        if self._peers is not None:
            return self._peers.prepare(kind, otherwise=by_group, overwrite=overwrite, **options)
        return by_group

    def all_reduce_begin(self, x: Tensor, *, overwrite: bool = False) -> Handle:
        if self._shared is not None:  # the host itself sums there
            return super().all_reduce_begin(x, overwrite=overwrite)
        if overwrite not in self._reduces:
            begin = begin_all_reduce(self._group, overwrite=overwrite)
            if self._peers is not None:
                begin = async_collectives.begin_all_reduce(self._peers, otherwise=begin, overwrite=overwrite)
            self._reduces[overwrite] = begin
        begin = self._reduces[overwrite]
        call = self._sum_of(x)
        handle = self._compared(call, lambda: begin(x))
        return self._finishing(handle, call, self.ranks)

    def all_gather_begin(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Handle:
        is_even = dim == 0 and (sizes is None or set(sizes) == {x.shape[0]})
        copies = async_collectives.copies_of(self._peers, x, scatters=False) if is_even else None
        if copies is None:
            return super().all_gather_begin(x, dim, sizes)
        return self._copied("all_gather", x, lambda: copies.gather(x.contiguous()))

    def reduce_scatter_begin(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Handle:
        is_even = dim == 0 and len(set(piece_sizes(x, dim, sizes, self))) == 1
        takes = is_even and x.is_floating_point()
        copies = async_collectives.copies_of(self._peers, x, scatters=True) if takes else None
        if copies is None:
            return super().reduce_scatter_begin(x, dim, sizes)
        return self._copied("reduce_scatter", x, lambda: copies.scatter(x.contiguous()))

    def _copied(self, kind: Kind, x: Tensor, run: Callable[[], Handle]) -> Handle:
        call = Call(self.rank, self.node, kind, axes_text(self.axes)).on(x)
        handle = self._compared(call, run)
        return self._finishing(handle, call, self.ranks)

    def _sum_of(self, x: Tensor) -> Callable[[], Call]:
        """What is told of a sum, which few ask for; without x, which need not be kept for that."""
        shape, dtype = x.shape, x.dtype
        return lambda: Call(self.rank, self.node, "all_reduce", axes_text(self.axes)).of(shape, dtype)

    def sum_norm_begin(
        self, x: Tensor, residual: Tensor | OwnRows | None, weight: Tensor | None, eps: float
    ) -> Callable[[], tuple[OwnRows, Tensor]] | None:
        if self._peers is None or not (rows := self._peers.row_sums).takes(x, weight):
            return None
        finish: Callable[[], tuple[OwnRows, Tensor]] = self._compared(
            self._sum_of(x), lambda: rows.begin(x, residual, weight, eps)
        )
        return finish

    def sum_norm(self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor] | None:
        if self._peers is None or not (sums := self._peers.few_row_sums).takes(x, residual, weight):
            return None
        made: tuple[Tensor, Tensor] = self._compared(self._sum_of(x), lambda: sums(x, residual, weight, eps))
        return made

    def sum_added(self, x: Tensor, residual: Tensor) -> Tensor | None:
        peers = self._peers
        if peers is None or not peers.adds(x, residual):
            return None
        made: Tensor = self._compared(self._sum_of(x), lambda: peers.sum_added(x, residual))
        return made

    def merge_parts(self, parts: Tensor, sinks: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if self._peers is None or not (merge := self._peers.part_merge).takes(parts):
            return None
        found: Tensor = self._compared(
            lambda: Call(self.rank, self.node, "all_gather", axes_text(self.axes)).on(parts),
            lambda: merge.merge(parts, sinks, dtype),
        )
        return found

    def peer_rows(self) -> PeerRows | None:
        peers = self._peers
        # rows that are written compare nothing
        if peers is None or self._state.checking:
            return None
        call = Call(self.rank, self.node, "all_to_all", axes_text(self.axes))
        found: PeerRows | None = self._guarded(call, self.ranks, _nothing_to_compare, lambda: peers.rows)
        return found

    def all_to_all_begin(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], *, sizes_from: str | None = None
    ) -> Handle:
        if self._peers is not None:  # kernels that write into others' memory are through when they return
            return super().all_to_all_begin(x, send_counts, receive_counts, sizes_from=sizes_from)
        if sizes_from not in self._begins:
            call = Call(self.rank, self.node, "all_to_all", axes_text(self.axes), sizes_from=sizes_from)
            shared = self._shared
            begin = begin_all_to_all(self._group) if shared is None else shared.messages.all_to_all(call)
            self._begins[sizes_from] = self._all_to_all(call, begin)
        handle: Handle = self._begins[sizes_from](x, send_counts, receive_counts)
        return self._finishing(handle, Call(self.rank, self.node, "all_to_all", axes_text(self.axes)), self.ranks)

    @property
    def counts_on_device(self) -> bool:
        return self._peers is not None

    def all_to_all_within(self, x: Tensor, num_rows: int, send_counts: Tensor, receive_counts: Tensor) -> Tensor:
        assert self._peers is not None
        peers = self._peers
        out = x.new_empty((num_rows, *x.shape[1:]))
        call = Call(self.rank, self.node, "all_to_all", axes_text(self.axes), sizes_from=self.node).on(x)
        found: Tensor = self._compared(call, lambda: peers.all_to_all(x, out, send_counts, receive_counts))
        return found

    def _all_to_all(self, call: Call, run: Callable[..., Any]) -> Callable[[Tensor, Sequence[int], Sequence[int]], Any]:
        gather = self._comparison()

        def exchange(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Any:
            require_counts(x, send_counts, receive_counts, self)
            counts = (tuple(send_counts), tuple(receive_counts))

            def compare(own: Call) -> None:
                everyone = self._compare(own, gather)
                sent = torch.tensor([*send_counts, *receive_counts], device="cpu")
                rows = gather(sent).view(len(self.ranks), 2, len(self.ranks)).tolist()
                told = zip(everyone, rows, strict=True)
                check_counts([replace(each, counts=(tuple(out), tuple(back))) for each, (out, back) in told])

            return self._guarded(
                replace(call.on(x), counts=counts), self.ranks, compare, lambda: run(x, send_counts, receive_counts)
            )

        return exchange

    def _permute(self, call: Call, options: dict[str, Any]) -> Callable[[Tensor], Handle]:
        run, gather = self._primitive(call, "permute", **options), self._comparison()

        def compare(own: Call) -> None:
            self._compare(own, gather)

        def begin(x: Tensor) -> Handle:
            own = functools.partial(call.of, x.shape, x.dtype)
            handle = self._guarded(own, self.ranks, compare, functools.partial(run, x))
            return self._finishing(handle, own, self.ranks)

        return begin

    def persistent_permute(self, x: Tensor, shift: int) -> PersistentPermute:
        if self._shared is None:
            return super().persistent_permute(x, shift)
        own = Call(self.rank, self.node, "permute", axes_text(self.axes), {"shift": shift}).on(x)
        bare, gather = self._shared.messages.persistent_permute(own, x, shift=shift), self._comparison()

        # as `_guarded`, written out; nothing watches the ranks that share memory of the host
        def begin() -> None:
            try:
                if self._state.checking:
                    self._compare(own, gather)
                bare.begin()
            except RuntimeError as error:
                self._raise(error, own, self.ranks)

        def finish() -> Tensor:
            try:
                return bare.finish()
            except RuntimeError as error:
                self._raise(error, own, self.ranks)

        return PersistentPermute(begin, finish)

    def _between_two(self, call: Call, kind: Kind, options: dict[str, Any]) -> Callable[..., Handle]:
        assert call.peer is not None
        both = tuple(sorted((call.rank, call.peer)))
        if kind == "send":
            send = self._primitive(call, "send", **options)

            def send_begin(x: Tensor) -> Handle:
                own = functools.partial(call.of, x.shape, x.dtype)
                return self._finishing(self._guarded(own, both, self._compare_two, lambda: send(x)), own, both)

            return send_begin
        if self._shared is None:
            options = {**options, "device": self._state.device}
        receive = self._primitive(call, "receive", **options)

        def receive_begin(shape: Sequence[int], dtype: torch.dtype) -> Handle:
            own = functools.partial(call.of, shape, dtype)
            return self._finishing(
                self._guarded(own, both, self._compare_two, lambda: receive(shape, dtype)), own, both
            )

        return receive_begin

    # -- failures ------------------------------------------------------------------------------------------------------

    def _guarded(
        self,
        call: Call | Callable[[], Call],
        ranks: tuple[int, ...],
        compare: Callable[[Call], Any],
        run: Callable[[], Any],
    ) -> Any:
        """`run`, compared before if this run is checked; a failure that others cause says who they are."""
        state = self._state
        try:
            if state.checking:
                compare(call if isinstance(call, Call) else call())
            if state.watch is not None and (cause := state.watch.cause()) is not None:
                raise Disconnected(f"connection lost: {cause}")
            return run()
        except RuntimeError as error:
            self._raise(error, call, ranks)

    def _raise(self, error: RuntimeError, call: Call | Callable[[], Call], ranks: tuple[int, ...]) -> NoReturn:
        """Raises `error`, or who caused it where that is others."""
        if not is_broken(error):
            raise error
        raise self._state.verdict.conclude(call if isinstance(call, Call) else call(), ranks, error) from error

    def _compared(self, call: Call | Callable[[], Call], run: Callable[[], Any]) -> Any:
        """`run` of all ranks of the group; what they compare by is made in checked runs only."""
        return self._guarded(call, self.ranks, lambda call: self._compare(call, self._comparison()), run)

    def _finishing(self, handle: Handle, call: Call | Callable[[], Call], ranks: tuple[int, ...]) -> Handle:
        finish = functools.partial(self._guarded, call, ranks, _nothing_to_compare, handle.finish)
        return Handle(finish, into=handle.into)

    # -- comparing -----------------------------------------------------------------------------------------------------

    def _comparison(self) -> Callable[[Tensor], Tensor]:
        """Brings what every rank of the group has to say to all of them, on the host."""
        if (on_host := self._group.on_host) is not None:
            return lambda said: _bytes_tensor(b"".join(on_host.gather(said.numpy().tobytes()))).view(said.dtype)
        if self._shared is not None:
            return self._shared.all_gather(Call(self.rank, self.node, "comparison", axes_text(self.axes)), dim=0)
        gather, device = PRIMITIVES["all_gather"](self._group, dim=0), self._state.device
        return lambda said: gather(said.to(device)).cpu()

    def _compare(self, call: Call, gather: Callable[[Tensor], Tensor]) -> list[Call]:
        self._state.verdict.about_to(call)
        received = gather(_bytes_tensor(call.encode())).numpy().tobytes()
        calls = [
            Call.decode(received[at : at + FINGERPRINT_BYTES]) for at in range(0, len(received), FINGERPRINT_BYTES)
        ]
        check_agreement(calls)
        return calls

    def _compare_two(self, call: Call) -> None:
        """Between the two of a send and receive; each has sent all that came before, so that these meet."""
        assert call.peer is not None
        self._state.verdict.about_to(call)
        check_agreement(sorted([call, Call.decode(self._exchange(call, call.peer))], key=lambda each: each.rank))

    def _exchange(self, call: Call, peer: int) -> bytes:
        """What `peer` says at the same time."""
        both = sorted((self.rank, peer))
        if (on_host := self._group.on_host) is not None and 0 in both:
            return on_host.gather(call.encode(), both)[both.index(peer)]
        sent = _bytes_tensor(call.encode()).to(self._state.device)
        if self._shared is not None:
            received = self._shared.messages.exchange(call, sent, with_=self.ranks.index(peer))
        else:
            received = torch.empty_like(sent)
            group = self._group.handle
            operations = [dist.P2POp(dist.isend, sent, peer, group), dist.P2POp(dist.irecv, received, peer, group)]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received.cpu().numpy().tobytes()


def _bytes_tensor(said: bytes) -> Tensor:
    return torch.frombuffer(bytearray(said), dtype=torch.uint8)


def _nothing_to_compare(call: Call) -> None:
    """What has begun was compared then."""
