"""A cluster from a file of another tool, which is known by what is in it.

<system> of NCCL (NCCL_TOPO_DUMP_FILE, .xml)      the links inside a host, and its network cards
topology.yaml of Slurm                            which hosts are near each other
a system of aiconfigurator-core (.yaml)           a device, its host, and what is between hosts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.importers.aiconfigurator_system import is_system, system_cluster
from partitioner.planning.importers.nccl_topology import nccl_cluster
from partitioner.planning.importers.slurm_topology import is_topology, slurm_cluster

__all__ = ["import_cluster"]

LARGEST = 8 << 20


def import_cluster(path: Path, *, device: str | None = None, hosts: int | None = None, topology: str = "") -> Cluster:
    """device: the preset of each place, where the file does not say what it is. hosts: how many like the one that the
    file says, where it says one. topology: which of Slurm's, by name. Raises `InputError` for what a file lacks.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} has {path.stat().st_size} bytes: a topology has {LARGEST} at most")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if text.lstrip().startswith("<"):
        _nothing_else(path, "NCCL topology", topology=topology)
        return nccl_cluster(text, path, device=device, hosts=hosts or 1)
    try:
        told: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is neither XML nor YAML: {str(error).splitlines()[0]}") from error
    if is_topology(told):
        if hosts is not None:
            raise InputError(f"{path} is a topology of Slurm, which names its hosts: leave --hosts out")
        return slurm_cluster(told, path, device=device, topology=topology)
    if is_system(told):
        _nothing_else(path, "system of aiconfigurator-core", topology=topology)
        if device is not None:
            raise InputError(f"{path} is a system of aiconfigurator-core, which says its device: leave --device out")
        return system_cluster(told, path, hosts=hosts or 1)
    raise InputError(
        f"{path} is none of: NCCL's topology (XML, <system>), Slurm's topology.yaml (a list of topologies), a system "
        "of aiconfigurator-core (gpu and node)"
    )


def _nothing_else(path: Path, what: str, *, topology: str) -> None:
    if topology:
        raise InputError(f"{path} is a {what}, which has one topology: leave --topology out")
