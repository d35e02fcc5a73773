"""Whether this machine has room for so many ranks: asked before the first is started."""

from __future__ import annotations

import os
from pathlib import Path

from partitioner.errors import InputError

__all__ = ["RANKS_PER_CORE", "RANK_BYTES", "require_capacity"]

RANKS_PER_CORE = 16
"""More would do nothing but wait for each other."""
RANK_BYTES = 200 * 2**20
"""What a process of Python and torch takes at the least, without any weights."""


def require_capacity(num_ranks: int) -> None:
    """Raises InputError where the processors or the memory of this machine are too few for `num_ranks` processes."""
    cores = len(os.sched_getaffinity(0))
    if num_ranks > RANKS_PER_CORE * cores:
        raise InputError(
            f"{num_ranks} ranks are too many for this machine: it has {cores} cores for this process, and at most "
            f"{RANKS_PER_CORE} ranks are started per core. Use fewer, or several machines with torchrun"
        )
    free = _free_bytes()
    if free is not None and num_ranks * RANK_BYTES > free:
        raise InputError(
            f"{num_ranks} ranks are too many for this machine: each takes at least {RANK_BYTES >> 20} MB before it has "
            f"any weights, and {free >> 20} MB are free. Use fewer, or several machines with torchrun"
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
