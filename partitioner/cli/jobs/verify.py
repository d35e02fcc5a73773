"""What `partitioner verify` is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitioner.cli.jobs.job import Job
from partitioner.errors import CaptureError, InputError
from partitioner.storage.dtypes import require_named
from runtime.kv_cache.device_memory import require_dtype
from runtime.processes.choose_device import choose_device

if TYPE_CHECKING:
    import torch

__all__ = ["Case", "parse_lengths"]

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Case(Job):
    """What to verify: MODEL as in `named_model`, and at which lengths and precisions."""

    dtypes: tuple[str, ...] = ("float64", "float32")
    lengths: tuple[int, ...] = (1, 5, 40)
    seed: int = 0
    device: str = "cpu"
    """Of the ranks, as in `runtime.processes.choose_device`; the original runs on cpu."""
    cache_dtype: str | None = None
    """Of a cache whose loss is measured, as in `CacheSize`; None: none is."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"the seed must be a whole number from 0 to {LARGEST_SEED}, got {self.seed}")
        super().__post_init__()
        for name in self.dtypes:
            require_named(name)
        require_dtype(self.cache_dtype)
        if self.plan.weights != "expanded":
            raise InputError(
                f"verify compares with transformers' own model, whose weights are expanded; the plan has weights="
                f"{self.plan.weights}: leave it out (on a CPU, stored weights give the same numbers)"
            )
        self.placed  # noqa: B018 - checks the device

    @property
    def placed(self) -> torch.device:
        return choose_device(self.device, num_ranks=self.plan.mesh.world_size)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Numbers with commas between, as on the command line."""
    try:
        lengths: Sequence[int] = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise CaptureError(f"--lengths must be whole numbers of at least 1, separated by commas, got {text!r}")
    return tuple(lengths)
