"""The communicator over torch.distributed: NCCL on CUDA, gloo elsewhere; one process per rank.

    default       each collective costs what torch.distributed's costs
    checked run   before each collective the ranks compare a fingerprint of it (one small gather); the first run of
                  every new input shape is checked, all runs with check=True

No wait is unbounded: every group has `timeout_s` (torch's own default is 30 minutes for gloo, 10 for NCCL).

On CPU, a group whose ranks share a host takes shared memory (`runtime/communication/shared_memory/`) instead of gloo:

    shared_memory="auto"  where it can be had; why not, where it cannot, is logged and stands in `transports`
    shared_memory="on"    CommunicationError where it cannot; groups across hosts use gloo all the same
    shared_memory="off"   gloo

On CUDA the same holds of NCCL and of GPUs of one host that write into each other's memory, where that is quicker
(`runtime/communication/peer_memory/`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from partitioner.errors import CommunicationError, RankLost
from partitioner.sharding.layout import in_order
from partitioner.sharding.mesh import AXES, EXPERT_AXES, Mesh
from runtime.communication.channels import AloneChannel, Channel
from runtime.communication.communicator import Communicator, require_axes
from runtime.communication.failure_verdict import FailureVerdict
from runtime.communication.failure_verdict import is_broken as _is_broken
from runtime.communication.group_channel import GroupChannel, RankState
from runtime.communication.group_collectives import Group
from runtime.communication.matching_calls import Call
from runtime.communication.meeting.exchange import HostGather, exchange_json, shut_out_strangers
from runtime.communication.meeting.own_groups import OwnGroups
from runtime.communication.peer_memory import measure
from runtime.communication.peer_memory.connect import Exchange, connect
from runtime.communication.peer_memory.connect import Unavailable as NoPeers
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.shared_memory.shared_memory import Disconnected, SharedMemory, Unavailable
from runtime.communication.traceable import FunctionalChannel, OpaqueChannel
from runtime.ops.communicating import Axes, axes_text
from runtime.processes.bootstrap import WatchedStore, bootstrap, watched
from runtime.processes.choose_device import choose_device
from runtime.processes.device_watch import DeviceWatch, end_quickly
from runtime.processes.heartbeat import Heartbeat
from runtime.processes.listening import listening_sockets
from runtime.processes.place import Place, kernel_id, wrong_world

__all__ = ["Meeting", "ProcessGroups", "Sharing"]

Sharing = Literal["auto", "on", "off"]
"""Whether ranks of one host talk through shared memory; see the module's docstring."""

_log = logging.getLogger("partitioner")

_MEETINGS = itertools.count()
"""Every rank meets the others equally often, so that all count alike."""


@dataclass(frozen=True)
class Meeting:
    """Where this process met the others, for the `number`-th time. store: that of all replicas."""

    place: Place
    number: int
    store: Store
    heartbeat: Heartbeat


class ProcessGroups(Communicator):
    """One rank of `mesh`, over `own` groups that it has joined; `connect` does that too.

    `axes`: the axis tuples to make a group for, the same on every rank; None: each single axis.
    """

    def __init__(
        self,
        mesh: Mesh,
        own: OwnGroups,
        *,
        axes: Collection[tuple[str, ...]] | None = None,
        device: torch.device,
        timeout_s: float = 60.0,
        check: bool = False,
        shared_memory: Sharing = "auto",
        heartbeat: Heartbeat | None = None,
    ) -> None:
        _require_sharing(shared_memory, device)
        self.mesh = mesh
        self.rank = own.everyone.rank()
        self.device = device
        self.timeout_s = timeout_s
        self._always = check
        self.can_be_captured = not check and device.type == "cuda"
        self._heartbeat = heartbeat
        self._failure_verdict = FailureVerdict(heartbeat, self.rank, timeout_s=timeout_s)
        self._state = RankState(self.rank, device, self._failure_verdict, checking=check)
        self._own = own
        self._store: Store | None = None
        self.meeting: Meeting | None = None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._on_host: dict[tuple[int, ...], HostGather] = {}
        self._shared: dict[tuple[int, ...], SharedMemory] = {}
        self.peers: dict[tuple[int, ...], PeerMemory] = {}
        """By the ranks of a group: the memory of its GPUs that all of them write into."""
        self._order = torch.zeros((), device="cpu")
        self.hosts: dict[tuple[str, ...], int] = {}
        """On how many hosts the ranks of every group with more than one are, by its axes."""
        self.transports: dict[str, str] = {}
        """What carries the collectives of every group with more than one rank, by its axes, and why."""
        if own.everyone.size() != mesh.world_size:
            raise wrong_world(own.everyone.size(), mesh)
        # members of overlapping groups must create them in one order
        for named in _in_one_order(mesh.single_axes if axes is None else axes):
            axis, ranks = axes_text(named), mesh.group(named, self.rank)
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = group = own.make(ranks, timeout=_group_timeout(timeout_s, device))
                if device.type == "cuda":
                    # NCCL connects at the first use: here, where a lost rank is noticed
                    dist.all_reduce(torch.zeros(1, device=device), group=group)
                    torch.cuda.synchronize(device)
                    if heartbeat is not None and 0 in ranks:
                        self._on_host[ranks] = HostGather(heartbeat, ranks, timeout_s=timeout_s)
                everyone = exchange_json(_host(), group=group, num_ranks=len(ranks), device=device)
                self.hosts[named] = len(set(everyone))
                self.transports[axis] = self._share(ranks, axis, shared_memory)
        late = [peers.late for peers in self.peers.values()]
        watches = heartbeat is not None and device.type == "cuda"
        self._watch = DeviceWatch(device, heartbeat, timeout_s, late=late) if heartbeat and watches else None
        self._state.watch = self._watch

    @classmethod
    def connect(
        cls,
        mesh: Mesh,
        *,
        place: Place | None = None,
        axes: Collection[tuple[str, ...]] | None = None,
        device: str | torch.device = "cpu",
        timeout_s: float = 60.0,
        check: bool = False,
        shared_memory: Sharing = "auto",
    ) -> ProcessGroups:
        """Join the other ranks, in a process that a launcher started. place: which it is; None: of the one replica.

        device: "cuda" means the local rank's own; "auto" that, where this host has one for each of its ranks, or "cpu".
        """
        place = place or Place.here(mesh)
        rank, world_size = place.rank, mesh.world_size
        device = choose_device(device, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
        if str(device) == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        _require_sharing(shared_memory, device)
        # the launcher's store outlives our groups: without a number, a second meeting would find the first's addresses
        meeting = next(_MEETINGS)
        heartbeat: Heartbeat | None = None
        own = OwnGroups()

        def join() -> ProcessGroups:
            # which device is the current one is known to each thread for itself
            if device.type == "cuda":
                torch.cuda.set_device(device)
                end_quickly()
            own.join(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(
                    f"groups/{meeting}" + (f"/{place.replica}" if place.replicas > 1 else ""), shared_store
                ),
                rank=rank,
                world_size=world_size,
                timeout=_group_timeout(timeout_s, device),
            )
            made = cls(
                mesh,
                own,
                axes=axes,
                device=device,
                timeout_s=timeout_s,
                check=check,
                shared_memory=shared_memory,
                heartbeat=heartbeat,
            )
            if device.type == "cpu":
                assert heartbeat is not None
                everyone = (range(world_size), own.everyone)
                shut_out_strangers(listening, heartbeat, [everyone, *made._groups.items()])
            return made

        try:
            listening = listening_sockets()
            store, heartbeat = watched(functools.partial(bootstrap, meeting, place, timeout_s), timeout_s=timeout_s)
            if place.replicas > 1:  # those of other replicas may still come to the store
                listening = listening_sockets()
            # NCCL's own threads ask the store too, and must not have to come to Python for that
            shared_store = store if device.type == "cuda" else WatchedStore(store, heartbeat, timeout_s=timeout_s)
            self = watched(join, heartbeat=heartbeat, timeout_s=timeout_s)
            heartbeat.start(timeout_s=timeout_s)
        except BaseException as error:
            concluded = _start_failed(error, heartbeat, own, rank, timeout_s, device)
            if concluded is error:
                raise
            raise concluded from error
        own.settle()
        # not kept alive by the groups, which know it in C++ only
        self._store = shared_store
        self.meeting = Meeting(place, meeting, store, heartbeat)
        self.replicas_here = place.replicas_here
        return self

    def begin_run(self, *, new_shapes: bool) -> None:
        self._state.checking = self._always or new_shapes

    def channel(self, axes: Axes, *, node: str) -> Channel:
        named = require_axes(axes, node)
        ranks = self.mesh.group(named, self.rank)
        if len(ranks) == 1:
            return AloneChannel(named, ranks, self.rank, node=node)
        group, shared, peers = self._group(named, ranks, node), self._shared.get(ranks), self.peers.get(ranks)
        return GroupChannel(named, group, self._state, shared, peers, node=node)

    def traceable_channel(self, axes: Axes, *, node: str) -> Channel:
        eager = self.channel(axes, node=node)
        if len(eager.ranks) == 1:
            return eager
        opaque = OpaqueChannel(eager, self._order, device=self.device)
        # quicker than gloo and NCCL, also through an operator of ours
        if eager.ranks in self._shared or eager.ranks in self.peers:
            return opaque
        return FunctionalChannel(self._group(eager.axes, eager.ranks, node), opaque)

    def _group(self, axes: tuple[str, ...], ranks: tuple[int, ...], node: str) -> Group:
        if ranks not in self._groups:
            raise CommunicationError(
                f"node {node!r} communicates over {axes_text(axes)!r}, for which no process group was made; there are "
                f"{', '.join(self.transports) or 'none'}: name it in ProcessGroups(axes=...)"
            )
        on_host = self._on_host.get(ranks)
        return Group(self._groups[ranks], ranks, ranks.index(self.rank), self.device.type == "cuda", on_host)

    def explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, RuntimeError) or isinstance(error, Disconnected) or not _is_broken(error):
            return error
        everyone = tuple(range(self.mesh.world_size))
        call = Call(self.rank, "a compiled step", "collective", ", ".join(self.transports))
        return self._failure_verdict.conclude(call, everyone, error)

    def _share(self, ranks: tuple[int, ...], axis: str, wanted: Sharing) -> str:
        """Meet the ranks of a group in shared memory, where that is wanted and possible; what carries it then."""
        otherwise = "gloo" if self.device.type == "cpu" else "nccl"
        if wanted == "off":
            return otherwise
        group = self._groups[ranks]
        exchange = functools.partial(exchange_json, group=group, num_ranks=len(ranks), device=self.device)
        if self.device.type != "cpu":
            return self._share_gpus(ranks, axis, exchange, wanted)
        try:
            shared = SharedMemory.connect(ranks, self.rank, exchange=exchange, timeout_s=self.timeout_s)
        except Unavailable as reason:
            cannot = f"the ranks along {axis!r} cannot talk through shared memory"
            instead = f"the ranks along {axis!r} talk over gloo, not through shared memory"
            return self._refused(reason, wanted, ranks, cannot=cannot, instead=instead, by="gloo")
        except RuntimeError as error:
            if not _is_broken(error):
                raise
            raise self._failure_verdict.conclude(
                f"rank {self.rank}: connecting along {axis!r}", ranks, error
            ) from error
        if shared.build_s:
            _log.info("compiled what ranks need to talk through shared memory in %.1f s", shared.build_s)
        self._shared[ranks] = shared
        return "shared memory"

    def _share_gpus(self, ranks: tuple[int, ...], axis: str, exchange: Exchange, wanted: Sharing) -> str:
        """The same for ranks with a GPU each."""
        group = self._group((axis,), ranks, "memory of GPUs")
        try:
            peers = connect(group, self.device, exchange=exchange, timeout_s=self.timeout_s)
        except NoPeers as reason:
            cannot = f"the GPUs along {axis!r} cannot write into each other's memory"
            instead = f"the GPUs along {axis!r} talk over NCCL, not through their memory"
            return self._refused(reason, wanted, ranks, cannot=cannot, instead=instead, by="NCCL")
        measure.choose(peers, exchange=exchange)
        self.peers[ranks] = peers
        return "peer memory"

    def _refused(
        self,
        reason: Unavailable | NoPeers,
        wanted: Sharing,
        ranks: tuple[int, ...],
        *,
        cannot: str,
        instead: str,
        by: str,
    ) -> str:
        """What carries a group that shares no memory, told by its first rank; raises where that was not to be."""
        if wanted == "on" and not reason.several_hosts:
            raise CommunicationError(
                f'{cannot}: {reason}\nshared_memory="auto" takes {by} in such a case, "off" always'
            ) from None
        if self.rank == ranks[0]:
            _log.log(logging.INFO if reason.several_hosts else logging.WARNING, "%s: %s", instead, reason)
        return f"{by.lower()}: {reason}"

    def abort(self, error: BaseException) -> None:
        """Tell the others why; they notice as soon as this process ends or closes."""
        if not isinstance(error, CommunicationError):
            self._failure_verdict.failed(error)

    def barrier(self) -> None:
        try:
            on = [self.device.index] if self.device.type == "cuda" else None
            dist.barrier(group=self._own.everyone, device_ids=on)
        except RuntimeError as error:
            if not _is_broken(error):
                raise
            everyone = range(self.mesh.world_size)
            raise self._failure_verdict.conclude(f"rank {self.rank}: barrier", everyone, error) from error

    def close(self) -> None:
        """May be called again. CUDA graphs with collectives in them must be gone before."""
        for shared in self._shared.values():
            shared.close()
        lost = self._watch is not None and (self._watch.cause() is not None or self._failure_verdict.is_known)
        for peers in self.peers.values():
            if lost:
                peers.abandon()
            peers.close()
        self._own.leave(abort=lost)
        if self._watch is not None:
            self._watch.close()
        if self._heartbeat is not None:
            self._heartbeat.close()


def _in_one_order(axes: Collection[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Single axes first, in the mesh's order, then tuples: the same on every rank, in whatever order they are given."""
    required = {require_axes(named, "a process group") for named in axes}
    place = {axis: i for i, axis in enumerate(in_order((*AXES, *EXPERT_AXES)))}
    return sorted(required, key=lambda named: (len(named), [place[axis] for axis in named]))


def _host() -> str:
    """Names this host, for a launcher's ranks: by its kernel, and the launcher's own number for it."""
    return f"{kernel_id()} {os.environ.get('GROUP_RANK', '')}"


def _require_sharing(wanted: Sharing, device: torch.device) -> None:
    if wanted not in get_args(Sharing):
        raise CommunicationError(f"shared_memory must be one of {', '.join(get_args(Sharing))}; got {wanted!r}")
    if wanted == "on" and device.type not in ("cpu", "cuda"):
        raise CommunicationError(
            f'shared_memory="on" is for ranks on CPU or CUDA, these are on {device}: leave it at "auto"'
        )


def _group_timeout(timeout_s: float, device: torch.device) -> timedelta:
    # NCCL's watchdog ends the process without saying who is lost: DeviceWatch, which says it, comes first
    return timedelta(seconds=timeout_s + (0.5 if device.type == "cuda" else 0))


def _start_failed(
    error: BaseException,
    heartbeat: Heartbeat | None,
    own: OwnGroups,
    rank: int,
    timeout_s: float,
    device: torch.device,
) -> BaseException:
    """What to raise for `error`, after the others have been told."""
    if heartbeat is None:
        if isinstance(error, (RankLost, RuntimeError)):
            return RankLost(f"rank {rank} could not meet the others within {timeout_s:g} s: {error}")
        return error
    failure_verdict = FailureVerdict(heartbeat, rank, timeout_s=timeout_s)
    if isinstance(error, RuntimeError) and (not heartbeat.is_well or _is_broken(error)):
        error = failure_verdict.conclude(f"rank {rank}: joining the others", range(heartbeat.num_ranks), error)
    elif not isinstance(error, CommunicationError):
        error.add_note(f"rank {rank}, while joining the others")
        failure_verdict.failed(error)
    own.leave(abort=device.type == "cuda")
    heartbeat.close()
    return error
