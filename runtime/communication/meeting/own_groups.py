"""Process groups of our own, in a program that may have some too: two engines at a time, or a script's own groups.

    own = OwnGroups()
    own.join("gloo", store=..., rank=..., world_size=..., timeout=...)     all ranks
    own.make(ranks, timeout=...)                                           some of them, by each of these
    own.settle()            the program's default group is the default again, where it had one
    own.leave(abort=False)  ours end, and nobody else's

Torch has one default group in a process, which all others are made from. A program that has none gets ours, until it
ends; one that has its own keeps it: ours is the default only while it and what comes of it are made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

from torch import distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import Store

__all__ = ["OwnGroups"]


class OwnGroups:
    def __init__(self) -> None:
        self._programs = c10d.GroupMember.WORLD
        self._all: dist.ProcessGroup | None = None
        self._some: list[dist.ProcessGroup] = []

    @property
    def everyone(self) -> dist.ProcessGroup:
        assert self._all is not None, "join comes first"
        return self._all

    def join(self, backend: str, *, store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
        hook = sys.excepthook
        c10d._update_default_pg(None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        self._all = c10d.GroupMember.WORLD
        if self._programs is not None:
            sys.excepthook = hook  # it names the rank in front of each line already

    def make(self, ranks: Sequence[int], *, timeout: timedelta) -> dist.ProcessGroup:
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        self._some.append(group)
        return group

    def settle(self) -> None:
        if self._programs is not None:
            c10d._update_default_pg(self._programs)

    def leave(self, *, abort: bool) -> None:
        """abort: destroying would wait for kernels that wait for a lost rank. May be called again, or half-way."""
        end = c10d._abort_process_group if abort else dist.destroy_process_group
        known, ours = set(c10d._world.pg_map), {group for group in (self._all, *self._some) if group is not None}
        default = c10d.GroupMember.WORLD
        if known and known <= ours:
            c10d._update_default_pg(self._all)
            end()  # in the one order that all of a process are ended in
        elif known & ours:
            c10d._update_default_pg(None)  # the default cannot be ended without all others
            for group in (*reversed(self._some), self._all):
                if group in known:
                    end(group)
            c10d._update_default_pg(None if default in ours else default)
        if c10d.GroupMember.WORLD is None and self._programs in known - ours:
            self.settle()
        self._all, self._some = None, []
