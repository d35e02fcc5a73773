"""A system of aiconfigurator-core: aiconfigurator_core/systems/*.yaml (Apache-2.0, NVIDIA).

    gpu.mem_bw, mem_capacity, *_tc_flops        bytes per second, bytes, FLOP/s by dtype
    node.num_gpus_per_node, intra_node_bw       the host; bytes per second of a GPU in one direction
    node.inter_node_bw, p2p_latency             between hosts
    node.num_gpus_per_rack, inter_rack_bw       racks, where there are some: hosts of a rack are nearer to each other
    misc.other_mem                              what a model cannot have

Tables of measured kernels and collectives are those of its data_dir, where this product has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster, Device, Dimension
from partitioner.planning.collectives import fitted_links
from partitioner.planning.kernels import fitted_grids

__all__ = ["is_system", "system_cluster"]

DTYPES = {
    "fp8_tc_flops": ("float8_e4m3fn",),
    "bfloat16_tc_flops": ("bfloat16", "float16"),
    "float16_tc_flops": ("float16",),
    "fp32_flops": ("float32",),
}


def is_system(told: Any) -> bool:
    return isinstance(told, dict) and isinstance(told.get("gpu"), dict) and isinstance(told.get("node"), dict)


def system_cluster(told: Mapping[str, Any], path: Path, *, hosts: int) -> Cluster:
    """hosts: how many such hosts."""
    if hosts < 1:
        raise InputError(f"--hosts is at least 1; got {hosts}")
    gpu, node, misc = told["gpu"], told["node"], told.get("misc") or {}
    rates = {
        dtype: _number(gpu, name, "gpu", path) for name, dtypes in DTYPES.items() if name in gpu for dtype in dtypes
    }
    if not rates:
        raise InputError(f"{path}: gpu has none of {', '.join(DTYPES)}: its FLOP/s are not known")
    tables = PurePosixPath(str(told.get("data_dir", ""))).name
    kind = Device(
        path.stem,
        int(_number(gpu, "mem_capacity", "gpu", path)),
        int(_number(misc, "other_mem", "misc", path)) if "other_mem" in misc else 0,
        _number(gpu, "mem_bw", "gpu", path),
        rates,
        tables if fitted_grids(tables) else "",
        f"{path.name}, aiconfigurator-core",
    )
    size = int(_number(node, "num_gpus_per_node", "node", path))
    latency = _number(node, "p2p_latency", "node", path) if "p2p_latency" in node else 1e-5
    inside = Dimension("host", size, _number(node, "intra_node_bw", "node", path), latency,
                       tables if fitted_links(tables) is not None else "")  # fmt: skip
    return Cluster(path.stem, (inside, *_outside(node, path, size, hosts, latency)), (kind,))


def _outside(node: Mapping[str, Any], path: Path, size: int, hosts: int, latency: float) -> list[Dimension]:
    if hosts == 1:
        return []
    near = Dimension("between hosts", hosts, _number(node, "inter_node_bw", "node", path), latency)
    if "num_gpus_per_rack" not in node:
        return [near]
    rack = int(_number(node, "num_gpus_per_rack", "node", path)) // size
    if hosts <= rack:
        return [near]
    if hosts % rack:
        raise InputError(f"{path}: a rack has {rack} hosts; {hosts} are no whole number of racks")
    apart = float(node.get("inter_rack_latency", latency))
    rate = _number(node, "inter_rack_bw", "node", path)
    return [Dimension("rack", rack, near.bytes_per_s, latency), Dimension("between racks", hosts // rack, rate, apart)]


def _number(fields: Mapping[str, Any], name: str, where: str, path: Path) -> float:
    found = fields.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found <= 0:
        raise InputError(f"{path}: {where}.{name} is a number above 0; got {str(found)[:40]!r}")
    return float(found)
