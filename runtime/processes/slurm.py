"""What Slurm says of the tasks that `srun` started, under torchrun's names.

    RANK, WORLD_SIZE              SLURM_PROCID, SLURM_STEP_NUM_TASKS
    LOCAL_RANK, LOCAL_WORLD_SIZE  SLURM_LOCALID, this node's number in SLURM_STEP_TASKS_PER_NODE
    GROUP_RANK                    SLURM_NODEID
    MASTER_ADDR                   the first host of SLURM_STEP_NODELIST
    MASTER_PORT                   from the job's number, so that jobs of one host do not meet

What is set already stays: torchrun, started by srun, says its own. A step of one task is no job of several ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from partitioner.errors import CommunicationError

__all__ = ["adopt_slurm", "first_host", "tasks_here"]

_FIRST_PORT, _PORTS = 20_000, 10_000


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Sets what torchrun would have set, where it has not and Slurm's step has several tasks."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    if "SLURM_PROCID" not in environment:
        return
    if "cyclic" in environment.get("SLURM_DISTRIBUTION", "") or "plane" in environment.get("SLURM_DISTRIBUTION", ""):
        raise CommunicationError(
            f"SLURM_DISTRIBUTION={environment['SLURM_DISTRIBUTION']}: neighbouring ranks must share a node, as their "
            "stage is divided over them; start it with srun --distribution=block"
        )
    for name, value in _said(environment).items():
        environment.setdefault(name, value)


def _said(environment: Mapping[str, str]) -> dict[str, str]:
    node = int(environment.get("SLURM_NODEID", "0"))
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "GROUP_RANK": str(node),
        "MASTER_PORT": str(_FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % _PORTS),
    }
    if hosts:
        found["MASTER_ADDR"] = first_host(hosts)
    if tasks:
        found["LOCAL_WORLD_SIZE"] = str(tasks_here(tasks, node))
    return found


def first_host(hosts: str) -> str:
    """Of "node[03-05,09],other": "node03"."""
    name = re.match(r"[^,\[]+", hosts)
    if name is None:
        raise CommunicationError(f"the list of Slurm's nodes {hosts!r} has no first: set MASTER_ADDR yourself")
    rest = hosts[name.end() :]
    found = name[0]
    # a name may have several lists of numbers: rack[1-2]node[1-4]
    while rest.startswith("["):
        inside, _, rest = rest[1:].partition("]")
        found += re.split("[-,]", inside)[0]
        more = re.match(r"[^,\[]*", rest)
        found += more[0] if more else ""
        rest = rest[len(more[0]) if more else 0 :]
    return found


def tasks_here(tasks: str, node: int) -> int:
    """Of "2(x3),1", by the number of a node: three nodes have 2 tasks each, the fourth has 1."""
    for part in tasks.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            break
        count = int(found[2] or 1)
        if node < count:
            return int(found[1])
        node -= count
    raise CommunicationError(
        f"Slurm's tasks per node {tasks!r} do not say how many this node has: set LOCAL_WORLD_SIZE"
    )
