"""The communicator over torch.distributed: NCCL on CUDA, gloo elsewhere; one process per rank.

    default       each collective costs what torch.distributed's costs
    checked run   before each collective the ranks compare a fingerprint of it (one small gather); the first run of
                  every new input shape is checked, all runs with check=True

No wait is unbounded: every group has `timeout_s` (torch's own default is 30 minutes for gloo, 10 for NCCL).

On CPU, a group whose ranks share a host takes shared memory (`runtime/communication/shared_memory/`) instead of gloo:

    shared_memory="auto"  where it can be had; why not, where it cannot, is logged and stands in `transports`
    shared_memory="on"    CommunicationError where it cannot; groups across hosts use gloo all the same
    shared_memory="off"   gloo
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from partitioner.errors import CommunicationError, PlanError, RankLost
from partitioner.sharding.mesh import AXES, Mesh
from runtime.communication.communicator import require_axis, require_op, require_piece
from runtime.communication.exchange import exchange_json, shut_out_strangers
from runtime.communication.failure_verdict import FailureVerdict
from runtime.communication.group_collectives import OPERATIONS, alone
from runtime.communication.matching_calls import FINGERPRINT_BYTES, Call, check_agreement
from runtime.communication.shared_memory.shared_memory import Disconnected, SharedMemory, Unavailable
from runtime.communication.traceable import functional, opaque
from runtime.ops.collectives import all_gather, all_reduce
from runtime.processes.bootstrap import WatchedStore, bootstrap, missing_variables, watched
from runtime.processes.device_watch import DeviceWatch, end_quickly
from runtime.processes.heartbeat import Heartbeat
from runtime.processes.listening import listening_sockets

__all__ = ["ProcessGroups", "Sharing"]

Sharing = Literal["auto", "on", "off"]
"""Whether ranks of one host talk through shared memory; see the module's docstring."""

_log = logging.getLogger("partitioner")

# gloo has no exception type of its own; other RuntimeErrors are this rank's own mistakes
_BROKEN = re.compile("connection|timed? ?out|socket|broken pipe|nccl", re.IGNORECASE)


_MEETINGS = itertools.count()
"""Every rank meets the others equally often, so that all count alike."""


class ProcessGroups:
    """One rank of `mesh`, over a process group that is already initialised; `connect` does that too."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        device: torch.device,
        timeout_s: float = 60.0,
        check: bool = False,
        shared_memory: Sharing = "auto",
        heartbeat: Heartbeat | None = None,
    ) -> None:
        _require_sharing(shared_memory, device)
        self.mesh = mesh
        self.rank = dist.get_rank()
        self.device = device
        self.timeout_s = timeout_s
        self._always = check
        self._checking = check
        self._heartbeat = heartbeat
        self._failure_verdict = FailureVerdict(heartbeat, self.rank, timeout_s=timeout_s)
        self._owned = False
        self._store: Store | None = None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._shared: dict[tuple[int, ...], SharedMemory] = {}
        self._order = torch.zeros(())
        self.transports: dict[str, str] = {}
        """What carries the collectives of every axis with more than one rank, and why."""
        if dist.get_world_size() != mesh.world_size:
            raise _wrong_world(dist.get_world_size(), mesh)
        # for every axis, in the mesh's order: members of overlapping groups must create them in one order
        for axis in AXES:
            ranks = mesh.group((axis,), self.rank)
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = group = dist.new_group(
                    list(ranks), timeout=_group_timeout(timeout_s, device), use_local_synchronization=True
                )
                if device.type == "cuda":
                    # NCCL connects at the first use: here, where a lost rank is noticed
                    dist.all_reduce(torch.zeros(1, device=device), group=group)
                    torch.cuda.synchronize(device)
                self.transports[axis] = self._share(ranks, axis, shared_memory)
        self._watch = DeviceWatch(device, heartbeat, timeout_s) if heartbeat and device.type == "cuda" else None

    @classmethod
    def connect(
        cls,
        mesh: Mesh,
        *,
        device: str | torch.device = "cpu",
        timeout_s: float = 60.0,
        check: bool = False,
        shared_memory: Sharing = "auto",
    ) -> ProcessGroups:
        """Join the other ranks, in a process that torchrun started; the device "cuda" means the local rank's own."""
        if missing := missing_variables():
            raise CommunicationError(f"not started by torchrun: {', '.join(missing)} not set. Run it with torchrun")
        world_size = int(os.environ["WORLD_SIZE"])
        # before joining: with the wrong number of ranks everything after would only time out
        if world_size != mesh.world_size:
            raise _wrong_world(world_size, mesh)
        device = torch.device(device)
        if str(device) == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        _require_sharing(shared_memory, device)
        rank = int(os.environ["RANK"])
        # the launcher's store outlives our groups: without a number, a second meeting would find the first's addresses
        meeting = next(_MEETINGS)
        heartbeat: Heartbeat | None = None

        def join() -> ProcessGroups:
            # which device is the current one is known to each thread for itself
            if device.type == "cuda":
                torch.cuda.set_device(device)
                end_quickly()
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(f"groups/{meeting}", shared_store),
                rank=rank,
                world_size=world_size,
                timeout=_group_timeout(timeout_s, device),
            )
            made = cls(
                mesh, device=device, timeout_s=timeout_s, check=check, shared_memory=shared_memory, heartbeat=heartbeat
            )
            if device.type == "cpu":
                assert heartbeat is not None
                everyone = (range(world_size), dist.distributed_c10d._get_default_group())
                shut_out_strangers(listening, heartbeat, [everyone, *made._groups.items()])
            return made

        try:
            listening = listening_sockets()
            store, heartbeat = watched(
                functools.partial(bootstrap, meeting, rank, world_size, timeout_s), timeout_s=timeout_s
            )
            # NCCL's own threads ask the store too, and must not have to come to Python for that
            shared_store = store if device.type == "cuda" else WatchedStore(store, heartbeat, timeout_s=timeout_s)
            self = watched(join, heartbeat=heartbeat, timeout_s=timeout_s)
            heartbeat.start(timeout_s=timeout_s)
        except BaseException as error:
            concluded = _start_failed(error, heartbeat, rank, timeout_s)
            if concluded is error:
                raise
            raise concluded from error
        self._owned = True
        # not kept alive by the groups, which know it in C++ only
        self._store = shared_store
        return self

    def begin_run(self, *, new_shapes: bool) -> None:
        self._checking = self._always or new_shapes

    def bind(
        self,
        op: Callable[..., Tensor],
        axis: str,
        *,
        node: str,
        options: dict[str, Any],
        overwrite: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        require_axis(axis, node)
        make = require_op(op, OPERATIONS, node)
        ranks = self.mesh.group((axis,), self.rank)
        coordinate = ranks.index(self.rank)
        if len(ranks) == 1:
            return alone
        group = self._groups[ranks]
        call = Call(self.rank, node, op.__name__, axis, options)
        run: Callable[[Tensor], Tensor] = make(group, len(ranks), overwrite=overwrite, **options)
        gather = OPERATIONS[all_gather](group, len(ranks), overwrite=False, dim=0)
        if (shared := self._shared.get(ranks)) is not None:
            if op is all_reduce:
                run = shared.all_reduce(call, overwrite=overwrite, otherwise=run)
            else:
                run = shared.all_gather(call, **options)
            gather = shared.all_gather(Call(self.rank, node, "comparison", axis), dim=0)

        watch = self._watch

        def collective(x: Tensor) -> Tensor:
            try:
                if self._checking:
                    require_piece(x, options, coordinate, node=node, rank=self.rank)
                    self._compare(call.on(x), gather)
                if watch is not None and (cause := watch.cause()) is not None:
                    raise Disconnected(f"connection lost: {cause}")
                return run(x)
            except RuntimeError as error:
                if not _is_broken(error):
                    raise
                raise self._failure_verdict.conclude(call.on(x), ranks, error) from error

        if shared is None:
            return collective
        # torch.compile cannot look into ctypes: without this it tries, and warns
        opaque: Callable[[Tensor], Tensor] = torch.compiler.disable(collective)  # type: ignore[no-untyped-call]
        return opaque

    def bind_traceable(
        self, op: Callable[..., Tensor], axis: str, *, node: str, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        require_axis(axis, node)
        require_op(op, OPERATIONS, node)
        ranks = self.mesh.group((axis,), self.rank)
        if len(ranks) == 1:
            return alone
        if ranks in self._shared:  # quicker than gloo, also through an operator of ours
            run = self.bind(op, axis, node=node, options=options)
            return opaque(op, run, self._order, len(ranks), **options)
        return functional(op, self._groups[ranks].group_name, len(ranks), **options)

    def explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, RuntimeError) or isinstance(error, Disconnected) or not _BROKEN.search(str(error)):
            return error
        everyone = tuple(range(self.mesh.world_size))
        return self._failure_verdict.conclude(Call(self.rank, "a compiled step", "collective", "tp"), everyone, error)

    def _share(self, ranks: tuple[int, ...], axis: str, wanted: Sharing) -> str:
        """Meet the ranks of a group in shared memory, where that is wanted and possible; what carries it then."""
        if self.device.type != "cpu":
            return "nccl"
        if wanted == "off":
            return "gloo"
        group = self._groups[ranks]

        exchange = functools.partial(exchange_json, group=group, num_ranks=len(ranks))
        try:
            shared = SharedMemory.connect(ranks, self.rank, exchange=exchange, timeout_s=self.timeout_s)
        except Unavailable as reason:
            if wanted == "on" and not reason.several_hosts:
                raise CommunicationError(
                    f"the ranks along {axis!r} cannot talk through shared memory: {reason}\n"
                    'shared_memory="auto" takes gloo in such a case, "off" always'
                ) from None
            if self.rank == ranks[0]:
                level = logging.INFO if reason.several_hosts else logging.WARNING
                _log.log(level, "the ranks along %r talk over gloo, not through shared memory: %s", axis, reason)
            return f"gloo: {reason}"
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

    def _compare(self, call: Call, gather: Callable[[Tensor], Tensor]) -> None:
        self._failure_verdict.about_to(call)
        mine = torch.frombuffer(bytearray(call.encode()), dtype=torch.uint8).to(self.device)
        received = gather(mine).cpu().numpy().tobytes()
        check_agreement(
            [Call.decode(received[at : at + FINGERPRINT_BYTES]) for at in range(0, len(received), FINGERPRINT_BYTES)]
        )

    def abort(self, error: BaseException) -> None:
        """Tell the others why; they notice as soon as this process ends or closes."""
        if not isinstance(error, CommunicationError):
            self._failure_verdict.failed(error)

    def barrier(self) -> None:
        try:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        except RuntimeError as error:
            if not _is_broken(error):
                raise
            everyone = range(self.mesh.world_size)
            raise self._failure_verdict.conclude(f"rank {self.rank}: barrier", everyone, error) from error

    def close(self) -> None:
        """May be called again. CUDA graphs with collectives in them must be gone before."""
        for shared in self._shared.values():
            shared.close()
        if self._owned and dist.is_initialized():
            _leave_groups(abort=self._watch is not None and self._watch.cause() is not None)
            self._owned = False
        if self._watch is not None:
            self._watch.close()
        if self._heartbeat is not None:
            self._heartbeat.close()


def _is_broken(error: RuntimeError) -> bool:
    """Whether others are the cause."""
    return isinstance(error, (Disconnected, dist.DistError)) or bool(_BROKEN.search(str(error)))


def _require_sharing(wanted: Sharing, device: torch.device) -> None:
    if wanted not in get_args(Sharing):
        raise CommunicationError(f"shared_memory must be one of {', '.join(get_args(Sharing))}; got {wanted!r}")
    if wanted == "on" and device.type != "cpu":
        raise CommunicationError(f'shared_memory="on" is for ranks on CPU, these are on {device}: leave it at "auto"')


def _group_timeout(timeout_s: float, device: torch.device) -> timedelta:
    # NCCL's watchdog ends the process without saying who is lost: DeviceWatch, which says it, comes first
    return timedelta(seconds=timeout_s + (0.5 if device.type == "cuda" else 0))


def _start_failed(error: BaseException, heartbeat: Heartbeat | None, rank: int, timeout_s: float) -> BaseException:
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
    if dist.is_initialized():
        _leave_groups(abort=dist.get_backend() == "nccl")
    heartbeat.close()
    return error


def _leave_groups(*, abort: bool) -> None:
    if abort:
        # destroying would wait for kernels that wait for the lost rank
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _wrong_world(world_size: int, mesh: Mesh) -> PlanError:
    sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, mesh.sizes, strict=True) if size > 1) or "one rank"
    return PlanError(
        f"the plan ({sizes}) needs {mesh.world_size} processes, got {world_size}: "
        f"start it with torchrun --nproc-per-node {mesh.world_size} on one machine, or change the plan"
    )
