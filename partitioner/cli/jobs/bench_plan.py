"""What `partitioner bench plan` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitioner.cli.jobs.job import Job
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.quantities import Workload
from runtime.processes.choose_device import choose_device

if TYPE_CHECKING:
    import torch

__all__ = ["PlanCase"]


@dataclass(frozen=True)
class PlanCase(Job):
    """gpus: the cluster whose tables predict; None: this CPU, calibrated."""

    prompt: int = 64
    new: int = 16
    batch: int = 2
    gpus: str | None = None
    device: str = "auto"
    rounds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.workload  # noqa: B018 - checks the numbers
        if self.new < 2 or self.rounds < 1:
            raise InputError(f"--new is at least 2 and --rounds at least 1; got {self.new} and {self.rounds}")
        if self.gpus is not None:
            Cluster.parse(self.gpus)
        placed = self.placed  # checks the device
        if self.gpus is None and placed.type != "cpu":
            raise InputError(
                "kernels of GPUs are priced by tables: name the cluster, as --gpus 2xH200, or --device cpu"
            )

    @property
    def workload(self) -> Workload:
        return Workload(self.prompt, self.new, self.batch)

    @property
    def placed(self) -> torch.device:
        return choose_device(self.device, num_ranks=self.plan.mesh.world_size)
