"""Memory of every GPU of a group that all of them have mapped, or why there is none.

standing(device)                what the others must know of this rank
obstacle(ranks, everyone, ..)   why these ranks cannot have it; "": they may
mapped(group, device, name)     the memory, all zeros, and torch's handle with the addresses of all

small pieces    per source 2 slots x SMALL_BLOCKS x UNITS of 16 bytes
data            per source 4 slots x BLOCKS x chunk_bytes
flags           per source BLOCKS of 32 bits
flags of rows   per source one of 32 bits
rows            ROW_BYTES, a part for each source: see `sum_rows.py`
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from runtime.communication.group_collectives import Group
from runtime.ops.kernels.triton_needs import missing_for_triton
from runtime.processes.place import kernel_id

__all__ = [
    "BLOCKS",
    "ROW_BYTES",
    "SMALL_BLOCKS",
    "UNITS",
    "Exchange",
    "Geometry",
    "Unavailable",
    "first_obstacle",
    "mapped",
    "obstacle",
    "standing",
]

UNITS, SMALL_BLOCKS = 256, 256
"""Of eight bytes each, per block of the kernel for small pieces: one thread has one."""
BLOCKS, SLOTS = 256, 4
ROW_BYTES = 64 << 20
"""Of rows that are summed and normed at a time."""

Exchange = Callable[[Any], list[Any]]


class Unavailable(Exception):
    """Why a group cannot write into each other's memory; the same on all of its ranks."""

    def __init__(self, why: str, *, several_hosts: bool = False) -> None:
        super().__init__(why)
        self.several_hosts = several_hosts


@dataclass(frozen=True)
class Geometry:
    """Where what lies in a rank's memory: a part for each source."""

    num_ranks: int

    @functools.cached_property
    def small_bytes(self) -> int:
        """The largest piece that the kernel for small ones takes."""
        return UNITS * SMALL_BLOCKS * 8

    @functools.cached_property
    def chunk_bytes(self) -> int:
        # of eight ranks a quarter: each of the seven others has its slots
        most = 32768 // self.num_ranks
        return int(max(2048, 2 ** math.floor(math.log2(most))))

    @functools.cached_property
    def start_of_data(self) -> int:
        return self.num_ranks * 2 * self.small_bytes * 2

    @functools.cached_property
    def start_of_flags(self) -> int:
        return self.start_of_data + self.num_ranks * SLOTS * BLOCKS * self.chunk_bytes

    @functools.cached_property
    def start_of_row_flags(self) -> int:
        return self.start_of_flags + self.num_ranks * BLOCKS * 4

    @functools.cached_property
    def start_of_rows(self) -> int:
        return math.ceil((self.start_of_row_flags + self.num_ranks * 4) / 256) * 256

    @functools.cached_property
    def num_bytes(self) -> int:
        return self.start_of_rows + ROW_BYTES


def standing(device: torch.device) -> dict[str, Any]:
    """What the others must know of this rank."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "host": kernel_id(),
        "gpu": str(properties.uuid),
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "missing": missing_for_triton(),
        "token": secrets.token_hex(16),  # not of torch's generator: a seed set twice would name two groups alike
    }


def obstacle(ranks: Sequence[int], everyone: list[dict[str, Any]], device: torch.device) -> str:
    if len({each["host"] for each in everyone}) > 1:
        return f"the ranks {', '.join(map(str, ranks))} are on several hosts"
    if len({each["gpu"] for each in everyone}) < len(everyone):
        return "several ranks share a GPU"
    for rank, each in zip(ranks, everyone, strict=True):
        if each["missing"]:
            return f"rank {rank} has {each['missing']}"
        if tuple(each["capability"]) < (7, 0):
            return f"the GPU of rank {rank} ({each['name']}) is older than compute capability 7.0"
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for rank, each in zip(ranks, everyone, strict=True):
        other = visible.get(each["gpu"])
        if other not in (None, device.index) and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} cannot reach the memory of rank {rank}'s ({each['name']})"
    return ""


def first_obstacle(ranks: Sequence[int], everyone: list[dict[str, Any]]) -> str:
    return next((f"rank {rank}: {each['why']}" for rank, each in zip(ranks, everyone, strict=True) if each["why"]), "")


def mapped(group: Group, device: torch.device, name: str, *, num_bytes: int | None = None) -> tuple[Tensor, Any]:
    """Memory of this rank, all zeros, and the addresses of all. num_bytes: by default what the geometry says."""
    from torch.distributed import _symmetric_memory as symmetric

    # some versions of torch look a group up among these, some among process groups
    store = PrefixStore(name, distributed_c10d._get_process_group_store(group.handle))
    torch._C._distributed_c10d._SymmetricMemory.set_group_info(name, group.coordinate, group.size, store)
    torch._C._distributed_c10d._register_process_group(name, group.handle)  # type: ignore[arg-type]
    size = Geometry(group.size).num_bytes if num_bytes is None else num_bytes
    memory = symmetric.empty(size, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # nobody writes into it before
    handle = symmetric.rendezvous(memory, name)  # type: ignore[arg-type]
    if handle is None:
        raise RuntimeError("no handle came back")
    return memory, handle
