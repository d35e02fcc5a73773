"""Whether this machine has room for so many ranks: asked before anything is made for the first of them.

require_capacity(100)               as processes
require_threads(100)                as threads of this process
require_memory(100, 2**30, what)    for anything that takes so many bytes
"""

from __future__ import annotations

import os
from pathlib import Path

from partitioner.errors import InputError

__all__ = ["RANKS_PER_CORE", "RANK_BYTES", "THREAD_BYTES", "require_capacity", "require_memory", "require_threads"]

RANKS_PER_CORE = 16
"""More would do nothing but wait for each other."""
RANK_BYTES = 200 * 2**20
"""What a process of Python and torch takes at the least, without any weights."""
THREAD_BYTES = 2**20
"""What a simulated rank takes at the least, with its engine and its graph, without any weights."""


def require_capacity(num_ranks: int) -> None:
    """Raises InputError where the processors or the memory of this machine are too few for `num_ranks` processes."""
    cores = len(os.sched_getaffinity(0))
    if num_ranks > RANKS_PER_CORE * cores:
        raise InputError(
            f"{num_ranks} ranks are too many for this machine: it has {cores} cores for this process, and at most "
            f"{RANKS_PER_CORE} ranks are started per core. Use fewer, or several machines with torchrun"
        )
    each = f"each takes at least {RANK_BYTES >> 20} MB before it has any weights"
    require_memory(num_ranks, num_ranks * RANK_BYTES, each, instead="Use fewer, or several machines with torchrun")


def require_threads(num_ranks: int, *, weights_bytes: int = 0) -> None:
    """Raises InputError where this machine's memory is too little to simulate `num_ranks`, with these weights."""
    each = f"each takes at least {THREAD_BYTES >> 20} MB as a thread"
    also = f", and their weights {weights_bytes >> 20} MB together" if weights_bytes else ""
    require_memory(num_ranks, num_ranks * THREAD_BYTES + weights_bytes, each + also, instead="Simulate fewer")


def require_memory(num_ranks: int, num_bytes: int, why: str, *, instead: str = "Use fewer") -> None:
    """Raises InputError where `num_bytes`, for `why`, are more than are free."""
    free = _free_bytes()
    if free is not None and num_bytes > free:
        raise InputError(
            f"{num_ranks} ranks are too many for this machine: {why}, and {free >> 20} MB are free. {instead}"
        )


def _free_bytes() -> int | None:
    """Of the machine or of this process's control group, whichever is less; None: unknown."""
    found = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit = _lines(group / "memory.max")
    if limit and limit[0].isdigit():
        # not memory.current: it counts caches, which are given back
        used = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith("anon ")]
        found.append(max(0, int(limit[0]) - sum(used)))
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
