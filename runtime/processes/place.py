"""Which rank of which replica this process is, by what its launcher has set; and how messages call ranks.

    Place.here(mesh, replicas=2)    under torchrun, Slurm, or our launcher
    place.name(3)                   "rank 3"; of several stages and replicas "rank 3 of replica 1 (stage 1)"

A launcher that numbers all ranks (torchrun, Slurm) gives the first replica the first ranks, and so on. Our launcher
starts each replica by itself, and says which it is.
"""

from __future__ import annotations

import functools
import os
import platform
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from partitioner.errors import CommunicationError, PlanError
from partitioner.sharding.mesh import Mesh
from runtime.processes.slurm import adopt_slurm

__all__ = ["LOCAL_STORE", "REPLICA", "Place", "is_rank", "kernel_id", "missing_variables", "wrong_world"]

LOCAL_STORE = "PARTITIONER_LOCAL_STORE"
"""Where our launcher says which memory the ranks meet in."""
REPLICA = "PARTITIONER_REPLICA"
"""Where our launcher says which replica it started, as "1/4": the second of four."""


@functools.cache
def kernel_id() -> str:
    """Names the running kernel, as all processes of a host do alike: hosts may have the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def missing_variables() -> list[str]:
    """What a launcher would have set, and is not set."""
    adopt_slurm(os.environ)
    where = () if LOCAL_STORE in os.environ else ("MASTER_ADDR", "MASTER_PORT")
    return [name for name in ("RANK", "WORLD_SIZE", *where) if name not in os.environ]


def is_rank() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return not missing_variables()


@dataclass(frozen=True)
class Place:
    """One process of those that run a plan. rank: within its replica, on `mesh`.

    is_together: whether one launcher has started all replicas, so that their ranks meet at one store.
    """

    mesh: Mesh
    rank: int
    replica: int = 0
    replicas: int = 1
    is_together: bool = True

    @classmethod
    def here(cls, mesh: Mesh, *, replicas: int = 1) -> Place:
        """Raises CommunicationError where nobody says, PlanError where so many ranks do not fit the plan."""
        if missing := missing_variables():
            raise CommunicationError(f"not started by torchrun: {', '.join(missing)} not set. Run it with torchrun")
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # before joining: with the wrong number of ranks everything after would only time out
        if REPLICA in os.environ:
            if num_ranks != mesh.world_size:
                raise wrong_world(num_ranks, mesh)
            replica, _, count = os.environ[REPLICA].partition("/")
            return cls(mesh, rank, int(replica), int(count), is_together=False)
        if num_ranks != mesh.world_size * replicas:
            raise wrong_world(num_ranks, mesh, replicas)
        number, within = divmod(rank, mesh.world_size)
        return cls(mesh, within, number, replicas)

    @property
    def main_host(self) -> str:
        """Where rank 0 of the first replica is; "": all ranks are on this host."""
        number, num_ranks = self.replica * self.mesh.world_size + self.rank, self.replicas * self.mesh.world_size
        return "" if _are_here(number, num_ranks) else os.environ["MASTER_ADDR"]

    @property
    def host(self) -> str:
        """Where the others find this replica's rank 0, as rank 0 itself knows it; "": on this host."""
        if _are_here(self.rank, self.mesh.world_size):
            return ""
        main = os.environ["MASTER_ADDR"]
        return main if self.replica == 0 else _own_address(main, int(os.environ["MASTER_PORT"]))

    @property
    def replicas_here(self) -> int:
        """How many replicas share this host, where each fits into it."""
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        return min(self.replicas, max(1, int(here) // self.mesh.world_size)) if here.isdigit() else 1

    def name(self, rank: int) -> str:
        of = f" of replica {self.replica}" if self.replicas > 1 else ""
        stage = self.stage(rank)
        return f"rank {rank}{of}" + ("" if stage is None else f" (stage {stage})")

    def name_of_all(self, number: int) -> str:
        """The same by the number that a launcher of all replicas has given."""
        replica, rank = divmod(number, self.mesh.world_size)
        return replace(self, replica=replica).name(rank)

    def names(self, ranks: Iterable[int]) -> str:
        """The same for several: "ranks 1 and 2"."""
        ranks = list(ranks)
        if len(ranks) == 1:
            return self.name(ranks[0])
        return "ranks " + ", ".join(self.name(rank).removeprefix("rank ") for rank in ranks)

    def stage(self, rank: int) -> int | None:
        """None where there is one stage."""
        return self.mesh.coordinates(rank)["pp"] if self.mesh.size("pp") > 1 else None


def wrong_world(num_ranks: int, mesh: Mesh, replicas: int = 1) -> PlanError:
    needed = mesh.world_size * replicas
    plan = f"{replicas} replicas of {mesh}" if replicas > 1 else str(mesh)
    return PlanError(
        f"the plan ({plan}) needs {needed} processes, got {num_ranks}: "
        f"start it with torchrun --nproc-per-node {needed} on one machine, or change the plan"
    )


def _are_here(rank: int, num_ranks: int) -> bool:
    """Whether so many neighbours, of which this process is number `rank`, are all on this host."""
    if sys.platform != "linux":
        return False
    if LOCAL_STORE in os.environ:
        return True
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    first = int(os.environ.get("LOCAL_RANK", "0")) - rank
    return here.isdigit() and first >= 0 and first + num_ranks <= int(here)


def _own_address(host: str, port: int) -> str:
    """The address from which this host reaches `host`."""
    try:
        family, kind, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as asking:
            asking.connect(found)  # sends nothing
            return str(asking.getsockname()[0])
    except OSError:
        return socket.gethostname()
