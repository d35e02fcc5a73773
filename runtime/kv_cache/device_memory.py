"""What a user says of a cache's memory, and how much is free on a device.

4_000_000_000, "4 GB", "512 MiB"    so many bytes
"0.9 of free"                       a share of what is free when asked
"fp8"                               the dtype of a cache that is not the model's

CUDA   what the driver has left, and what torch keeps without using it
CPU    the least of what the kernel calls available and what the limits of the process's cgroups leave
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from partitioner.errors import InputError

if TYPE_CHECKING:  # what a user says is checked without torch
    import torch

__all__ = ["FLOAT8", "Amount", "free_bytes", "readable", "require_dtype"]

FLOAT8 = "fp8"

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s+of\s+free\s*", re.IGNORECASE)
_UNLIMITED = 2**60
"""cgroups of version 1 say "no limit" by a number near 2**63."""


@dataclass(frozen=True)
class Amount:
    """So many bytes, or (`bytes` None) a share of what is free."""

    bytes: int | None = None
    share: float = 1.0

    @classmethod
    def of(cls, given: object) -> Amount:
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return cls(given)
        if isinstance(given, str) and (size := _SIZE.fullmatch(given)):
            count = int(float(size[1]) * _UNITS[size[2].upper()]) if size[2].upper() in _UNITS else 0
            if count > 0:
                return cls(count)
        if isinstance(given, str) and (share := _SHARE.fullmatch(given)) and 0 < float(share[1]) <= 1:
            return cls(share=float(share[1]))
        raise InputError(
            f'an amount of memory is a number of bytes, a size such as "4 GB", or a share such as "0.9 of free"; '
            f"got {given!r}"
        )

    def within(self, free: int | None) -> int | None:
        """The bytes that this stands for, where `free` are free (None: unknown)."""
        return self.bytes if self.bytes is not None else None if free is None else int(self.share * free)


def require_dtype(dtype: object) -> None:
    """That of a cache."""
    if dtype not in (None, FLOAT8):
        raise InputError(f"the dtype of a cache must be None, that of the model, or {FLOAT8!r}; got {dtype!r}")


def free_bytes(device: torch.device) -> int | None:
    """None where this system does not say."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator holds and does not use is there for the next tensor
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [_available(Path("/proc/meminfo")), _left_by_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min((count for count in known if count is not None), default=None)


def _available(meminfo: Path) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _left_by_cgroups(own: Path, root: Path) -> int | None:
    """The least that the limits of the process's group, and of those above it, leave; None: there is no limit.

    own: lines of `number:controllers:path`; version 2 has one without controllers.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    left: list[int] = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            names, base, cache = ("memory.max", "memory.current"), root, "inactive_file"
        elif "memory" in controllers.split(","):
            names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes"), root / "memory"
            cache = "total_inactive_file"
        else:
            continue
        folder = base / path.strip("/")
        # a container may see its own group as the root, whatever path it is told
        for group in {folder, *(parent for parent in folder.parents if parent.is_relative_to(base)), base}:
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None and limit < _UNLIMITED:
                left.append(max(0, limit - used + _reclaimable(group / "memory.stat", cache)))
    return min(left, default=None)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(file: Path, name: str) -> int:
    """Pages of files that were read once: they count as used, and are given up as soon as memory is wanted."""
    try:
        found = re.search(rf"^{name} (\d+)", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def readable(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
