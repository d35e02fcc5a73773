"""The machine at hand as a cluster, measured in some seconds: copies and products.

GPUs      each kind's memory and rates as measured; links between two as a copy from one to the other takes
no GPU    the host: its memory, one process's copies and products, and copies between two parts of memory
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from partitioner.analysis.cost.device import measure_device
from partitioner.planning.cluster import Cluster, Device, Dimension

__all__ = ["detect"]

SMALL, LARGE = 1 << 10, 1 << 24


def detect() -> Cluster:
    if torch.cuda.is_available():
        return _gpus()
    return _host()


def _host() -> Cluster:
    found = measure_device(torch.device("cpu"), dtypes=(torch.float32, torch.bfloat16))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    alpha, beta = _copies(torch.device("cpu"), torch.device("cpu"))
    cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    said = f"measured with {threads} threads; {cores} cores"
    kind = Device("host", memory, memory // 10, found.bytes_per_s, found.flops_per_s, "", said, fuses=False)
    return Cluster("this-host", (Dimension("Memory", max(1, cores // threads), 1 / beta, alpha),), (kind,))


def _gpus() -> Cluster:
    kinds = []
    count = torch.cuda.device_count()
    for index in range(count):
        where = torch.device("cuda", index)
        found = measure_device(where, dtypes=(torch.bfloat16, torch.float32))
        properties = torch.cuda.get_device_properties(where)
        free, total = torch.cuda.mem_get_info(where)
        reserved = total - min(free, total - (2 << 30))
        kinds.append(Device(properties.name, total, reserved, found.bytes_per_s, found.flops_per_s, "", "measured"))
    alpha, beta = _copies(torch.device("cuda", 0), torch.device("cuda", min(1, count - 1)))
    devices = tuple(kinds) if len({each.name for each in kinds}) > 1 else (kinds[0],)
    return Cluster("this-host", (Dimension("device to device", count, 1 / beta, alpha),), devices)


def _copies(source: torch.device, target: torch.device) -> tuple[float, float]:
    """Alpha and beta of a copy from one memory into the other."""
    small, large = (_best(size, source, target) for size in (SMALL, LARGE))
    beta = max((large - small) / (LARGE - SMALL), 1e-13)
    return max(small - beta * SMALL, 1e-9), beta


def _best(size: int, source: torch.device, target: torch.device) -> float:
    mine, theirs = (
        torch.ones(size, dtype=torch.uint8, device=source),
        torch.empty(size, dtype=torch.uint8, device=target),
    )

    def wait() -> None:
        for each in (source, target):
            if each.type == "cuda":
                torch.cuda.synchronize(each)

    return min(_timed(lambda: theirs.copy_(mine), wait) for _ in range(6))


def _timed(work: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    work()
    wait()
    return max(time.perf_counter() - start, 1e-9)
